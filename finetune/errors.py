"""Every way a command can end early: what went wrong in, one line per problem and an exit code out."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Problem:
    """One thing that is wrong: `where` (path:line: field, or a stage) and a message that ends in the cure."""

    where: str
    message: str

    def __str__(self) -> str:
        return f"{self.where}: {self.message}"


class FinetuneError(Exception):
    """A failure with a known cause; `code` is the exit code, `problems` is what a person reads."""

    code = 1

    def __init__(self, problems: Problem | Iterable[Problem], *, total: int | None = None) -> None:
        self.problems = (problems,) if isinstance(problems, Problem) else tuple(problems)
        self.total = len(self.problems) if total is None else total  # where only the first of a kind are listed
        self.answer: Mapping[str, Any] = {}  # what a failing command knows nevertheless; printed with --json
        super().__init__("\n".join(map(str, self.problems)))


class UserError(FinetuneError):
    """The user can change it: recipe, data or machine."""

    code = 2


class StorageError(FinetuneError):
    """Disk full, no usable checkpoint, or a damaged file."""

    code = 3


class NumericsError(FinetuneError):
    """A loss or gradient is not finite."""

    code = 4


class OutOfMemoryError(FinetuneError):
    """Memory ran out; the problem names the stage, the bytes and the keys to lower."""

    code = 5


class ProofError(FinetuneError):
    """A proof failed and nothing was published."""

    code = 6


class WorkerError(FinetuneError):
    """Another process of the same run is gone or does not answer; the last checkpoint is kept."""

    code = 7


class Interrupted(FinetuneError):
    """A signal ended the run after a checkpoint was saved; the exit code is 128 + the signal's number."""

    def __init__(self, problems: Problem | Iterable[Problem], *, signal_number: int) -> None:
        super().__init__(problems)
        self.code = 128 + signal_number


def raise_problems(problems: Iterable[Problem], *, error: type[FinetuneError] = UserError) -> None:
    """Raise all problems together, or return if there are none."""
    found = tuple(problems)
    if found:
        raise error(found)


@contextmanager
def storing(where: Path) -> Iterator[None]:
    """Say what could not be written as a StorageError, exit code 3."""
    from safetensors import SafetensorError  # what a full disk is there; only now, it is no light import

    try:
        yield
    except (OSError, SafetensorError) as error:
        message = f"cannot be written ({error}); make room, then the same command with --resume goes on"
        raise StorageError(Problem(str(where), message)) from error
