"""Seal, verify, find and rotate checkpoints: one is a folder whose manifest, written last, fits every byte of it.

A crash at any moment leaves either the older checkpoints or the older ones and the new one: files are written beside
the final name and synced, then the manifest, then the rename, and only then are older checkpoints removed.
"""

from __future__ import annotations

import errno
import hashlib
import json
import math
import os
import re
import shutil
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

from finetune.base import sha256_of
from finetune.errors import Problem, StorageError

NAME = re.compile(r"step-(\d{6,})")
SET_ASIDE = re.compile(r"step-\d{6,}\.damaged(-\d+)?")
LEFT_BEHIND = re.compile(r"\.step-\d{6,}\.(partial|removed)")
MANIFEST = "checkpoint.json"
FORMAT = "finetune-checkpoint-1"
NO_FSYNC_HERE = {errno.EINVAL, errno.ENOTSUP}  # what some network file systems answer; anything else is a failed save


def write_checkpoint(
    folder: Path,
    *,
    step: int,
    keep: int,
    write: Callable[[Path], None],
    losses: Mapping[int, float] = MappingProxyType({}),
) -> Path:
    """`folder`/step-000200, filled by `write` and sealed; then older ones are removed, so that `keep` are left.

    With `losses` (by step) the whole one with the lowest is left, too. A whole checkpoint of this step that is there
    already stays as it is. A failure leaves no staging folder.
    """
    final = folder / f"step-{step:06d}"
    staging = _hidden(final, "partial")
    _remove(staging)
    try:
        staging.mkdir(parents=True)
        write(staging)
        _seal(staging, step)
        if final.exists() and find_damage(final) is None:
            _remove(staging)
        else:
            if final.exists():
                set_aside(final)
            staging.rename(final)
            _sync(folder)
    except BaseException:
        shutil.rmtree(staging, ignore_errors=True)
        raise
    _rotate(final, keep=keep, losses=losses)
    return final


def newest_whole_checkpoint(folder: Path) -> Path | None:
    """The newest checkpoint whose every byte is as it was sealed; None if no step was ever saved.

    Damaged ones on the way are renamed to step-000200.damaged and said on stderr; what killed runs left is removed.

    Raises:
        StorageError: there are checkpoints, and none is whole.
    """
    sweep(folder)
    for checkpoint in reversed(find_checkpoints(folder)):
        damage = find_damage(checkpoint)
        if damage is None:
            return checkpoint
        aside = set_aside(checkpoint)
        sys.stderr.write(f"{checkpoint}: {damage}; kept as {aside.name} and not used, the one before it is tried\n")
    if folder.is_dir() and any(SET_ASIDE.fullmatch(path.name) for path in folder.iterdir()):
        message = (
            "no checkpoint in it is whole, so the run cannot go on from one; put an undamaged copy back, "
            "remove this folder to train from the first step, or name another run folder with --out"
        )
        raise StorageError(Problem(str(folder), message))
    return None


def best_first(losses: Mapping[int, float]) -> list[int]:
    """The steps from the lowest loss to the highest, of equal ones the earlier first; NaN is none of them."""
    return sorted((step for step, loss in losses.items() if math.isfinite(loss)), key=lambda step: (losses[step], step))


def best_whole_checkpoint(folder: Path, losses: Mapping[int, float], *, sealed: Path | None = None) -> Path | None:
    """The checkpoint with the lowest loss whose every byte is as it was sealed; `sealed` was just now."""
    there = {step_of(checkpoint): checkpoint for checkpoint in find_checkpoints(folder)}
    found = (there[step] for step in best_first(losses) if step in there)
    return next((path for path in found if path == sealed or find_damage(path) is None), None)


def find_checkpoints(folder: Path) -> list[Path]:
    """The folders that are named as a step, whole or not, oldest first."""
    found = [path for path in folder.glob("step-*") if NAME.fullmatch(path.name) and path.is_dir()]
    return sorted((path for path in found if not path.is_symlink()), key=step_of)


def step_of(checkpoint: Path) -> int:
    """The optimizer step after which a checkpoint was written."""
    match = NAME.fullmatch(checkpoint.name)
    assert match, checkpoint
    return int(match.group(1))


def find_damage(checkpoint: Path, *, contents: bool = True) -> str | None:
    """What differs from the moment of sealing, naming the file, or None; without `contents` names and sizes only."""
    try:
        files = _read_manifest(checkpoint)
        found = {path.relative_to(checkpoint).as_posix(): path for path in checkpoint.rglob("*")}
        found.pop(MANIFEST)
        for name in sorted(files.keys() | found.keys()):
            if name not in found:
                return f"{name} is missing"
            if name not in files:
                return f"{name} does not belong to it"
            if found[name].is_symlink() or not found[name].is_file():
                return f"{name} is no plain file"
            size = found[name].stat().st_size
            if size != files[name]["bytes"]:
                return f"{name} has {size} bytes, {files[name]['bytes']} were saved"
            if contents and sha256_of(found[name]) != files[name]["sha256"]:
                return f"{name} has changed since it was saved"
    except _Damaged as damage:
        return str(damage)
    except OSError as error:
        return f"cannot be read ({error})"
    return None


def set_aside(checkpoint: Path) -> Path:
    """Rename a damaged checkpoint so that it is kept and never loaded; its new path."""
    aside = checkpoint.with_name(f"{checkpoint.name}.damaged")
    number = 1
    while aside.exists():
        number += 1
        aside = checkpoint.with_name(f"{checkpoint.name}.damaged-{number}")
    checkpoint.rename(aside)
    _sync(checkpoint.parent)
    return aside


def sweep(folder: Path) -> None:
    """Remove what a killed run left of a save or of a removal."""
    for path in folder.glob(".step-*"):
        if LEFT_BEHIND.fullmatch(path.name):
            _remove(path)


class _Damaged(Exception):
    """A manifest that cannot be trusted."""


def _seal(staging: Path, step: int) -> None:
    """Sync every file, then write and sync the manifest: with it the folder is a checkpoint."""
    paths = sorted(staging.rglob("*"))
    for path in paths:
        _sync(path)
    files = {
        path.relative_to(staging).as_posix(): {"bytes": path.stat().st_size, "sha256": sha256_of(path)}
        for path in paths
    }
    with (staging / MANIFEST).open("xb") as stream:
        stream.write(_manifest_bytes({"format": FORMAT, "step": step, "files": files}))
        stream.flush()
        _sync_descriptor(stream.fileno())
    _sync(staging)


def _manifest_bytes(content: dict[str, Any]) -> bytes:
    sealed = {**content, "sha256": hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()}
    return (json.dumps(sealed, indent=2) + "\n").encode()


def _read_manifest(checkpoint: Path) -> dict[str, Any]:
    """The sealed files, from a manifest that is byte for byte what we would write."""
    file = checkpoint / MANIFEST
    if not file.is_file():
        raise _Damaged(f"{MANIFEST} is missing")
    stored = file.read_bytes()
    try:
        content = json.loads(stored)
        content.pop("sha256")
        as_written = _manifest_bytes(content)
    except (ValueError, KeyError, AttributeError, TypeError, RecursionError):
        raise _Damaged(f"{MANIFEST} is damaged") from None
    # Comparing bytes, not values, sees a flipped bit also where JSON would not: in blanks and in the sha256 itself.
    if stored != as_written:
        raise _Damaged(f"{MANIFEST} is damaged")
    if content.get("format") != FORMAT:
        raise _Damaged(f"{MANIFEST} has format {content.get('format')!r}, {FORMAT!r} is read")
    if content["step"] != step_of(checkpoint):
        raise _Damaged(f"{MANIFEST} is that of step {content['step']}")
    return content["files"]


def _rotate(sealed: Path, *, keep: int, losses: Mapping[int, float]) -> None:
    """Remove checkpoints older than the one just sealed beyond `keep`; what holds no manifest of ours is not touched.

    Nor is the best whole one, which stays beside the `keep` newest.
    One that is newer, or damaged and newer than those kept, is left alone: rotation never removes the newest whole one.
    One that cannot be removed is said and left: the new checkpoint is whole all the same.
    """
    kept, best = 1, best_whole_checkpoint(sealed.parent, losses, sealed=sealed)
    for old in reversed(find_checkpoints(sealed.parent)):
        if step_of(old) >= step_of(sealed) or (kept >= keep and old == best):
            continue
        if kept >= keep and _holds_manifest(old):
            try:
                _retire(old)
            except OSError as error:
                sys.stderr.write(
                    f"{old}: no longer needed, but it could not be removed ({error}); remove it yourself\n"
                )
        elif find_damage(old, contents=False) is None:
            kept += 1


def _retire(old: Path) -> None:
    doomed = _hidden(old, "removed")
    _remove(doomed)
    old.rename(doomed)  # so that a kill in the middle of removing leaves nothing that looks like a checkpoint
    _remove(doomed)


def _holds_manifest(checkpoint: Path) -> bool:
    try:
        _read_manifest(checkpoint)
    except (_Damaged, OSError):
        return False
    return True


def _hidden(checkpoint: Path, suffix: str) -> Path:
    return checkpoint.with_name(f".{checkpoint.name}.{suffix}")


def _remove(folder: Path) -> None:
    if folder.is_symlink() or folder.is_file():
        folder.unlink()
    elif folder.exists():
        shutil.rmtree(folder)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        _sync_descriptor(descriptor)
    finally:
        os.close(descriptor)


def _sync_descriptor(descriptor: int) -> None:
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in NO_FSYNC_HERE:
            raise
