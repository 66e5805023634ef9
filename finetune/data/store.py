"""Keep what the rows of a source became: flat arrays in a content-addressed folder, checksummed, mapped into memory."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cached_property
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np

from finetune.base import sha256_of
from finetune.data.rows import REASONS, Refusal
from finetune.errors import Problem, StorageError
from finetune.machine import cache_folder

# N = examples of a source, R = its rows (those refused too), T = tokens of all its examples
ARRAYS: dict[str, str] = {
    "ids": "<i4",  # T
    "learned": "|b1",  # T
    "tokens": "<i4",  # N, after truncation
    "prompt_tokens": "<i4",  # N
    "cut_tokens": "<i4",  # N
    "supervised_tokens": "<i4",  # N
    "straddling_tokens": "<i4",  # N
    "exact": "|S16",  # N, a hash of what is said
    "near": "|S16",  # N, the same with case and white space folded
    "file": "<i4",  # R, an index into files
    "line": "<i8",  # R
    "outcome": "|u1",  # R, 0: an example, else 1 + the index of the reason in OUTCOMES
}
OUTCOMES = tuple(REASONS)
LITTER_SECONDS = 24 * 3600
# Files that change no id and no label.
FOR_PEOPLE = ("show", "page", "passes", "account", "prepare", "prompts", "pool", "steps")
FIRST_OF_A_KIND = 5  # so many problems of a kind are kept in words, all of them are counted


@dataclass(frozen=True)
class StoredRows:
    """The rows of one source, labelled: arrays as in ARRAYS, and what is known in words."""

    folder: Path
    arrays: Mapping[str, np.ndarray]
    format: str
    files: tuple[str, ...]
    refusals: tuple[Refusal, ...]  # the first few of each reason, in order
    unreadable: tuple[Refusal, ...]
    stop_token_ids: tuple[int, ...]
    largest_id: int
    rows_with_control_texts: int

    @property
    def rows(self) -> int:
        return len(self.arrays["outcome"])

    @property
    def examples(self) -> int:
        return len(self.arrays["tokens"])

    @cached_property
    def starts(self) -> np.ndarray:
        """Where each example's tokens begin in ids, and where the last one's end: int64 [N + 1]."""
        return np.concatenate([np.zeros(1, np.int64), np.cumsum(self.arrays["tokens"], dtype=np.int64)])

    @cached_property
    def row_of_example(self) -> np.ndarray:
        """The row each example came from: int64 [N]."""
        return np.flatnonzero(self.arrays["outcome"] == 0)

    def read(self, name: str, start: int, stop: int) -> np.ndarray:
        """A stretch of an array, read from its file and not through the map, so that it is gone after use."""
        array = self.arrays[name]
        if not isinstance(array, np.memmap):
            return array[start:stop]
        file = self.folder / f"{name}.bin"
        return np.fromfile(file, array.dtype, count=stop - start, offset=start * array.itemsize)

    def refused(self) -> dict[str, int]:
        """How many rows were refused, by reason."""
        counts = np.bincount(self.arrays["outcome"], minlength=1 + len(OUTCOMES))[1:]
        return {reason: int(count) for reason, count in zip(OUTCOMES, counts, strict=True) if count}

    def where(self, row: int) -> str:
        return f"{self.files[self.arrays['file'][row]]}:{self.arrays['line'][row]}"

    def outcome(self, row: int) -> str | None:
        """The reason why a row is no example, or None."""
        code = int(self.arrays["outcome"][row])
        return OUTCOMES[code - 1] if code else None


def key_of(ingredients: Mapping[str, Any]) -> str:
    """The name of a store: a hash of everything that changes ids or labels, and of the code that makes them."""
    code = sha256()
    folder = Path(__file__).parent
    for file in sorted([*folder.glob("*.py"), *folder.rglob("*.jinja")]):
        if not file.name.startswith(FOR_PEOPLE):
            code.update(file.name.encode() + b"\0" + file.read_bytes())
    whole = {**ingredients, "code": code.hexdigest()}
    return sha256(json.dumps(whole, sort_keys=True).encode()).hexdigest()[:40]


def tokens_folder() -> Path:
    """Where the stores lie: the cache, or a folder of this process where the cache cannot be written."""
    folder = cache_folder() / "tokens"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if os.access(folder, os.W_OK):
            return folder
    except OSError:
        pass
    return own_folder()


_OWN: list[tempfile.TemporaryDirectory[str]] = []


def own_folder() -> Path:
    """A folder that ends with this process, for what cannot be cached."""
    if not _OWN:
        _OWN.append(tempfile.TemporaryDirectory(prefix="finetune-tokens-", ignore_cleanup_errors=True))
    return Path(_OWN[0].name)


def open_store(folder: Path) -> StoredRows | None:
    """The store in a folder, every byte checked against its checksum; None if there is none, or a damaged one."""
    try:
        text = (folder / "store.json").read_text(encoding="utf-8")
        seal, _, body = text.partition("\n")
        if sha256(body.encode()).hexdigest() != seal:
            return None
        facts = json.loads(body)
        arrays = {name: _open_array(folder, name, facts["arrays"][name]) for name in ARRAYS}
    except (OSError, ValueError, KeyError):
        return None
    return StoredRows(
        folder=folder,
        arrays=arrays,
        format=facts["format"],
        files=tuple(facts["files"]),
        refusals=tuple(Refusal(*each) for each in facts["refusals"]),
        unreadable=tuple(Refusal(*each) for each in facts["unreadable"]),
        stop_token_ids=tuple(facts["stop_token_ids"]),
        largest_id=facts["largest_id"],
        rows_with_control_texts=facts["rows_with_control_texts"],
    )


def _open_array(folder: Path, name: str, facts: Mapping[str, Any]) -> np.ndarray:
    file = folder / f"{name}.bin"
    if file.stat().st_size == 0 == facts["bytes"]:
        return np.empty(0, ARRAYS[name])
    # The checksum is taken of the file, not of the map: what is mapped and looked at counts as this process's memory.
    if file.stat().st_size != facts["bytes"] or sha256_of(file) != facts["sha256"]:
        raise ValueError(f"{file} is damaged")
    return np.memmap(file, dtype=ARRAYS[name], mode="r")


class StoreWriter:
    """Writes a store piece by piece into a folder of its own; `publish` gives it its name, or leaves the one there."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.staging = folder.with_name(f"{folder.name}.{os.getpid()}.partial")
        _sweep(folder.parent)
        shutil.rmtree(self.staging, ignore_errors=True)
        self.staging.mkdir(parents=True)
        self._files = {name: (self.staging / f"{name}.bin").open("wb") for name in ARRAYS}
        self._digests = {name: sha256() for name in ARRAYS}
        self._bytes = dict.fromkeys(ARRAYS, 0)

    def append(self, arrays: Mapping[str, np.ndarray]) -> None:
        with self._storing():
            for name, dtype in ARRAYS.items():
                data = np.ascontiguousarray(arrays[name], dtype=dtype).tobytes()
                self._files[name].write(data)
                self._digests[name].update(data)
                self._bytes[name] += len(data)

    def publish(self, facts: Mapping[str, Any]) -> StoredRows:
        """Seal the store with its facts and rename it to its folder."""
        with self._storing():
            for stream in self._files.values():
                stream.close()
        arrays = {name: {"bytes": self._bytes[name], "sha256": self._digests[name].hexdigest()} for name in ARRAYS}
        body = json.dumps({**facts, "arrays": arrays}, ensure_ascii=True)
        seal = sha256(body.encode()).hexdigest()
        with self._storing():
            (self.staging / "store.json").write_text(f"{seal}\n{body}", encoding="utf-8")
        try:
            self.staging.rename(self.folder)
        except OSError:  # another run was faster, or a damaged one lies there
            if open_store(self.folder) is None:
                self._replace_damaged()
            self.discard()
        stored = open_store(self.folder)
        assert stored is not None
        return stored

    def discard(self) -> None:
        for stream in self._files.values():
            with suppress(OSError):  # what a full disk did not take goes with the folder
                stream.close()
        shutil.rmtree(self.staging, ignore_errors=True)

    @contextmanager
    def _storing(self) -> Iterator[None]:
        """Say what could not be written as a StorageError, exit code 3."""
        try:
            yield
        except OSError as error:
            folder = self.folder.parent
            message = f"the labelled rows cannot be written ({error}); make room, or set XDG_CACHE_HOME to another disk"
            raise StorageError(Problem(str(folder), message)) from error

    def _replace_damaged(self) -> None:
        aside = self.folder.with_name(f"{self.folder.name}.{os.getpid()}.partial-damaged")
        # Another run may be doing the same at this moment: whoever comes second finds a whole store.
        with suppress(OSError):
            self.folder.rename(aside)
        with suppress(OSError):
            self.staging.rename(self.folder)
        shutil.rmtree(aside, ignore_errors=True)


def _sweep(root: Path) -> None:
    """Remove what killed runs left behind: an old staging folder whose process is gone (as far as this host knows)."""
    for folder in _partial_folders(root):
        pid = folder.name.split(".")[1]
        with suppress(OSError):
            is_old = time.time() - folder.stat().st_mtime > LITTER_SECONDS
            if is_old and not (pid.isdecimal() and Path("/proc", pid).exists()):
                shutil.rmtree(folder, ignore_errors=True)


def _partial_folders(root: Path) -> Iterable[Path]:
    return list(root.glob("*.*.partial*"))
