"""Save and find checkpoints: written beside their final name, synced, then renamed; a half-written one never counts."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path

NAME = re.compile(r"step-(\d{6,})")


def write_checkpoint(folder: Path, *, step: int, keep: int, write: Callable[[Path], None]) -> Path:
    """`folder`/step-000200, filled by `write`; older ones beyond `keep` are removed after it is complete."""
    final = folder / f"step-{step:06d}"
    staging = folder / f".{final.name}.partial"
    shutil.rmtree(staging, ignore_errors=True)
    staging.mkdir(parents=True)
    write(staging)
    for file in staging.rglob("*"):
        _sync(file)
    _sync(staging)
    shutil.rmtree(final, ignore_errors=True)
    staging.rename(final)
    _sync(folder)
    for old in find_checkpoints(folder)[:-keep]:
        shutil.rmtree(old)
    return final


def find_checkpoints(folder: Path) -> list[Path]:
    """The complete checkpoints of a run, oldest first."""
    found = [path for path in folder.glob("step-*") if NAME.fullmatch(path.name) and path.is_dir()]
    return sorted(found, key=step_of)


def step_of(checkpoint: Path) -> int:
    """The optimizer step after which a checkpoint was written."""
    match = NAME.fullmatch(checkpoint.name)
    assert match, checkpoint
    return int(match.group(1))


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
