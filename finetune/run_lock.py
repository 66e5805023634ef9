"""One run per folder: a folder in, a lock out that lasts as long as this process, however it ends."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import datetime
from pathlib import Path
from typing import Any

from finetune.errors import Problem, StorageError, UserError, storing

LOCK = ".running"
EXCLUSIVE = ".running.exclusive"  # where the file system has no locks
NO_LOCKS_HERE = {errno.ENOLCK, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS}


@contextmanager
def only_run_in(folder: Path) -> Iterator[None]:
    """Hold the folder, which is made if it is not there; the kernel gives it back also when the process is killed.

    Raises:
        UserError: another process holds it, or the folder cannot be written.
        StorageError: the disk is full or fails.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(folder / LOCK, os.O_RDWR | os.O_CREAT, 0o666)
    except (FileExistsError, NotADirectoryError, PermissionError, ValueError) as error:
        message = f"the run folder cannot be written ({error}); name another with --out"
        raise UserError(Problem(str(folder), message)) from error
    except OSError as error:
        message = f"cannot be written ({error}); make room, or name a folder on another disk with --out"
        raise StorageError(Problem(str(folder), message)) from error
    try:
        with storing(folder):
            exclusive = _lock(folder, descriptor)
            os.ftruncate(descriptor, 0)
            os.pwrite(descriptor, _ourselves(), 0)
        try:
            yield
        finally:
            if exclusive:
                exclusive.unlink(missing_ok=True)
    finally:
        os.close(descriptor)


def _lock(folder: Path, descriptor: int) -> Path | None:
    """Take the lock; the file to remove at the end where the file system has none."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise _refusal(folder, folder / LOCK, "wait for it, stop it") from None
    except OSError as error:
        if error.errno not in NO_LOCKS_HERE:
            raise
        return _lock_by_creating(folder)
    return None


def _lock_by_creating(folder: Path) -> Path:
    """The second best: a file that only one process can create. What a killed run left is seen on its own host only."""
    file = folder / EXCLUSIVE
    for _ in range(2):
        try:
            descriptor = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
        except FileExistsError:
            if not _is_of_a_dead_process(file):
                cure = f"wait for it, stop it, or, if it has ended, remove {file}"
                raise _refusal(folder, file, cure) from None
            file.unlink(missing_ok=True)
            continue
        os.write(descriptor, _ourselves())
        os.close(descriptor)
        return file
    raise _refusal(folder, file, "wait for it, stop it")


def _is_of_a_dead_process(file: Path) -> bool:
    holder = _holder(file)
    if holder.get("host") != socket.gethostname():
        return False
    try:
        os.kill(int(holder["pid"]), 0)
    except ProcessLookupError:
        return True
    except (PermissionError, KeyError, ValueError, TypeError):
        return False
    return False


def _refusal(folder: Path, file: Path, cure: str) -> UserError:
    holder = _holder(file)
    who = "host {host}, process {pid}, since {since}".format(**holder) if holder else "it has just started"
    return UserError(Problem(str(folder), f"another run is at work in it ({who}); {cure}, or name another with --out"))


def _holder(file: Path) -> dict[str, Any]:
    with suppress(OSError, ValueError):
        holder = json.loads(file.read_text(encoding="utf-8"))
        if isinstance(holder, dict) and {"host", "pid", "since"} <= holder.keys():
            return holder
    return {}


def _ourselves() -> bytes:
    since = datetime.now().astimezone().isoformat(timespec="seconds")
    return (json.dumps({"host": socket.gethostname(), "pid": os.getpid(), "since": since}) + "\n").encode()
