"""The sha256 of a base's files, each read once: a file that has not changed since is not read again."""

from __future__ import annotations

import os
import time
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from hashlib import file_digest, sha256
from pathlib import Path

from finetune.machine import cache_folder

SETTLED_SECONDS = 2.0  # a file younger than this could change again without its times telling


def weight_sha256(files: Iterable[Path]) -> dict[str, str]:
    """sha256 (hex) of each file by its name.

    What is remembered goes by path, size, inode and both times of the last change, of which no program can set the
    second. A proof reads the files themselves.
    """
    files = list(files)
    with ThreadPoolExecutor() as pool:  # hashing lets go of the interpreter's lock
        return dict(zip((file.name for file in files), pool.map(_remembered, files), strict=True))


def _remembered(file: Path) -> str:
    state = _state(file)
    entry = cache_folder() / "hashes" / sha256(state.encode()).hexdigest()[:40]
    with suppress(OSError, ValueError):
        digest, seal = entry.read_text(encoding="ascii").split()
        if seal == _seal(state, digest):
            return digest
    digest = _read(file)
    if _state(file) == state and _is_settled(file):
        _write(entry, f"{digest} {_seal(state, digest)}\n")
    return digest


def _read(file: Path) -> str:
    with file.open("rb") as stream:
        return file_digest(stream, "sha256").hexdigest()


def _state(file: Path) -> str:
    found = file.stat()
    numbers = (found.st_size, found.st_dev, found.st_ino, found.st_mtime_ns, found.st_ctime_ns)
    return f"{file.resolve()}\n{numbers}"


def _is_settled(file: Path) -> bool:
    found = file.stat()
    return time.time() - max(found.st_mtime, found.st_ctime) > SETTLED_SECONDS


def _seal(state: str, digest: str) -> str:
    return sha256(f"{state}\n{digest}".encode()).hexdigest()


def _write(entry: Path, text: str) -> None:
    staging = entry.with_name(f"{entry.name}.{os.getpid()}.partial")
    with suppress(OSError):  # not remembered, then
        entry.parent.mkdir(parents=True, exist_ok=True)
        staging.write_text(text, encoding="ascii")
        staging.replace(entry)
