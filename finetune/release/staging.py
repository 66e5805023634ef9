"""Publish a folder or nothing: a name in, a hidden folder to work in and an atomic rename out.

`with work_folder(out) as work:` write `work / "release"`, prove it, `publish(work / "release", out)`. However it ends,
`work` is gone; killed without a chance to clean up, it is cleared by the next one that wants the same name.
"""

from __future__ import annotations

import errno
import fcntl
import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from finetune.artifact import write_json
from finetune.errors import Problem, ProofError, StorageError, UserError, raise_problems
from finetune.release.fresh import Proof, failed_problems

ROOM_BYTES = 64 << 20  # for tokenizer, header, card and manifest
NO_ROOM = {errno.ENOSPC, errno.EDQUOT}
LOCK = "lock"


def refuse_content(out: Path) -> None:
    """A release takes the name of nothing that is there.

    Raises:
        UserError: `out` names no folder, is a link, or exists and is not an empty folder.
    """
    if out.name in {"", ".."}:
        raise UserError(Problem("--out", f"{str(out)!r} names no new folder; name one"))
    if out.is_symlink():
        raise UserError(Problem(str(out), "is a link; name the folder itself, or another one"))
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(Problem(str(out), "is there already and not empty; name another folder, or remove it first"))


def refuse_full_disk(out: Path, weight_bytes: int) -> None:
    """Before anything is written, with both figures.

    Raises:
        StorageError: the disk that `out` will lie on has no room for so many bytes and what belongs to them.
    """
    there = next(folder for folder in out.absolute().parents if folder.exists())
    free, needed = shutil.disk_usage(there).free, weight_bytes + ROOM_BYTES
    if free < needed:
        message = f"{needed / 1e9:.1f} GB are needed for a while, {free / 1e9:.1f} GB are free; "
        raise StorageError(Problem(str(out.parent), message + "make room or name another disk"))


@contextmanager
def work_folder(out: Path) -> Iterator[Path]:
    """An empty hidden folder beside `out`, on the same file system, that no other process works in.

    Raises:
        UserError: `out` is taken, cannot be written, or another process is writing it now.
        StorageError: the disk became full.
    """
    refuse_content(out)
    work = out.with_name(f".{out.name}.partial")
    with storage_errors(out):
        lock = _lock(work, out)
        try:
            _clear(work)
            yield work
        finally:
            _clear(work)  # the lock last: whoever takes it finds the folder empty
            shutil.rmtree(work, ignore_errors=True)
            os.close(lock)


@contextmanager
def storage_errors(out: Path) -> Iterator[None]:
    """A disk that becomes full ends as an error of its own, not as a traceback."""
    try:
        yield
    except OSError as error:
        if error.errno not in NO_ROOM:
            raise
        message = "the disk became full; nothing was published; make room or name another disk"
        raise StorageError(Problem(str(out.parent), message)) from error


def publish(folder: Path, out: Path) -> None:
    """Every file on the disk first, then the name; an empty folder of that name is replaced.

    Raises:
        UserError: meanwhile something else took the name.
    """
    for path in [*folder.rglob("*"), folder]:
        _sync(path)
    try:
        folder.rename(out)
    except OSError as error:
        if error.errno not in {errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR}:
            raise
        raise UserError(Problem(str(out), "something else took this name meanwhile; name another folder")) from error
    _sync(out.parent)


def proven_or_reported(out: Path, prove: Callable[[], Sequence[Proof]], facts: Mapping[str, Any]) -> list[Proof]:
    """The proofs, all passed; a failed one, or none at all, leaves a report beside `out` with `facts` and every figure.

    Raises:
        ProofError: not all passed; its last problem names the report.
    """
    report = out.with_name(f"{out.name}.failed.json")
    proofs: list[Proof] = []
    try:
        proofs = list(prove())
        raise_problems(failed_problems(out, proofs), error=ProofError)
    except ProofError as error:
        problems = [{"where": problem.where, "message": problem.message} for problem in error.problems]
        write_json(report, {**facts, "proofs": [found.to_json() for found in proofs], "problems": problems})
        told = Problem(str(report), "nothing was published; this report holds every figure")
        raise ProofError([*error.problems, told]) from error
    report.unlink(missing_ok=True)  # of an earlier attempt
    return proofs


def _lock(work: Path, out: Path) -> int:
    """The open lock file in `work`; a lock goes with its process, so that a killed one does not keep it."""
    while True:
        try:
            work.mkdir(parents=True, exist_ok=True)
            descriptor = os.open(work / LOCK, os.O_RDWR | os.O_CREAT, 0o600)
        except FileNotFoundError:  # removed by the process that had it, between the two lines
            continue
        except OSError as error:
            if error.errno in NO_ROOM:
                raise
            raise UserError(Problem(str(out), f"cannot be written ({error.strerror}); name another folder")) from error
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if os.fstat(descriptor).st_ino == (work / LOCK).stat().st_ino:
                return descriptor
        except BlockingIOError as error:
            os.close(descriptor)
            message = "another process is writing this release now; wait for it, or name another folder"
            raise UserError(Problem(str(out), message)) from error
        except FileNotFoundError:
            pass
        os.close(descriptor)  # the lock of a folder that is gone; take the new one's


def _clear(work: Path) -> None:
    """Remove everything but the lock; before the work that is what a process that was killed left."""
    for left in work.iterdir():
        if left.is_dir():
            shutil.rmtree(left, ignore_errors=True)
        elif left.name != LOCK:
            left.unlink()


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
