"""What the caches hold: their folder in; what each is for, how many entries and bytes out, or all of it removed."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from finetune.errors import Problem, StorageError
from finetune.machine import cache_folder

# Everything here can be made again; a run that still reads an entry keeps reading it after it is removed.
KINDS = {
    "4bit": "bases quantised to 4 bits, by the content of their weights and all that quantises them",
    "bases": "weights that were read and hold neither NaN nor infinity, by file, size and time of change",
    "hashes": "sha256 of weight files, and of all files of quantised bases, by path, size and times of change",
    "kernels": "compiled code of this machine, by source, compiler and processor",
    "rehearsals": "proofs of small twins, by base, tokenizer, template, recipe and code",
    "tokens": "labelled rows, by the content of the data and of all that labels it",
    "tokenizers": "tokenizers converted to tokenizer.json, by their content",
    "unquantised": "16-bit weights of bases that are stored quantised, by their content",
}


@dataclass(frozen=True)
class Cache:
    """One kind of cache."""

    kind: str
    holds: str
    folder: Path
    entries: int
    bytes: int

    def to_json(self) -> dict[str, Any]:
        return {**vars(self), "folder": str(self.folder)}


def look_at_caches() -> list[Cache]:
    """Every kind of cache, those that are empty too."""
    return [_look(kind, holds) for kind, holds in KINDS.items()]


def clear_caches() -> list[Cache]:
    """Remove all entries and return what there was.

    Raises:
        StorageError: an entry cannot be removed; the others are.
    """
    found = look_at_caches()
    problems: list[Problem] = []
    for cache in found:
        for entry in _entries(cache.folder):
            try:
                shutil.rmtree(entry) if entry.is_dir() else entry.unlink()
            except FileNotFoundError:
                continue  # another process was faster
            except OSError as error:
                problems.append(Problem(str(entry), f"cannot be removed: {error.strerror}; remove it by hand"))
    if problems:
        raise StorageError(problems)
    return found


def _look(kind: str, holds: str) -> Cache:
    folder = cache_folder() / kind
    entries = _entries(folder)
    files = [file for entry in entries for file in ([entry] if entry.is_file() else entry.rglob("*"))]
    return Cache(kind, holds, folder, len(entries), sum(file.stat().st_size for file in files if file.is_file()))


def _entries(folder: Path) -> list[Path]:
    return sorted(folder.iterdir()) if folder.is_dir() else []
