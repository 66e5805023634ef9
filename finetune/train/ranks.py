"""Several processes that train one adapter: what each of them does in a step, and how they agree on everything else."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from finetune.errors import FinetuneError, Problem, UserError, WorkerError

if TYPE_CHECKING:
    import torch

T = TypeVar("T")
# A collective waits this long for the slowest rank: the first may be tokenising, which is done once. A rank that died
# is noticed at once, by its closed connection.
PATIENCE = timedelta(hours=6)


@dataclass(frozen=True)
class Ranks:
    """This process among all of them; one alone needs no other, calls no collective and imports no torch."""

    rank: int = 0
    count: int = 1

    @property
    def is_first(self) -> bool:
        return self.rank == 0

    def largest(self, number: int) -> int:
        """The largest of all ranks' numbers, on every rank: how they agree on a signal or on an exit code."""
        if self.count == 1:
            return number
        import torch

        number_1 = torch.tensor([number])
        with self._together():
            torch.distributed.all_reduce(number_1, op=torch.distributed.ReduceOp.MAX)
        return int(number_1.item())

    def sum_(self, tensor: torch.Tensor) -> None:
        """Replace a tensor by the sum over all ranks."""
        if self.count > 1:
            import torch

            with self._together():
                torch.distributed.all_reduce(tensor)

    def sum_gradients_(self, parameters: Sequence[torch.nn.Parameter]) -> None:
        """Replace the gradients by their sums over all ranks; a rank without a share in the step adds zeros."""
        if self.count == 1:
            return
        import torch

        gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
        flat = torch.cat([gradient.reshape(-1) for gradient in gradients])
        self.sum_(flat)
        for parameter, piece in zip(parameters, flat.split([p.numel() for p in parameters]), strict=True):
            parameter.grad = piece.view_as(parameter)

    def gather(self, data: bytes) -> list[bytes]:
        """Every rank's bytes, in their order, on every rank."""
        if self.count == 1:
            return [data]
        import torch

        size = self.largest(len(data))
        own = torch.zeros(8 + size, dtype=torch.uint8)
        own[: 8 + len(data)] = torch.frombuffer(bytearray(len(data).to_bytes(8, "big") + data), dtype=torch.uint8)
        every = [torch.empty_like(own) for _ in range(self.count)]
        with self._together():
            torch.distributed.all_gather(every, own)
        raw = [bytes(each.tolist()) for each in every]
        return [each[8 : 8 + int.from_bytes(each[:8], "big")] for each in raw]

    def first_alone(self, work: Callable[[], T]) -> T | None:
        """What the first rank makes of it, while the others wait and get None.

        Raises:
            FinetuneError: the first rank's, on the others without words.
        """
        made, error = None, None
        if self.is_first:
            try:
                made = work()
            except FinetuneError as caught:
                error = caught
        self.agree(error)
        return made

    def agree(self, error: FinetuneError | None) -> None:
        """Raise the error of any rank on all of them; only a rank that has one itself puts it in words."""
        code = self.largest(error.code if error else 0)
        if error:
            raise error
        if code:
            silent = FinetuneError(())
            silent.code = code
            raise silent

    @contextlib.contextmanager
    def _together(self) -> Iterator[None]:
        try:
            yield
        except RuntimeError as error:
            message = "another rank is gone, so this one stops too; start all of them again with --resume"
            raise WorkerError(Problem(f"rank {self.rank}", message)) from error


@contextlib.contextmanager
def joined_ranks(rank: int, local_rank: int, count: int) -> Iterator[Ranks]:
    """The ranks of a launcher, connected: gloo between CPUs, NCCL between GPUs.

    Raises:
        UserError: they cannot be connected.
    """
    if count == 1:
        yield Ranks()
        return
    import torch

    if torch.cuda.is_available():
        torch.cuda.set_device(local_rank)
        backend = "cpu:gloo,cuda:nccl"  # numbers to agree on never leave the CPU
    else:
        backend = "gloo"
    try:
        _join(lambda: torch.distributed.init_process_group(backend, timeout=PATIENCE))
    except (ValueError, RuntimeError) as error:
        message = (
            f"{count} ranks are announced (WORLD_SIZE), but they cannot be connected: {error}; start with torchrun"
        )
        raise UserError(Problem(f"rank {rank}", message)) from error
    try:
        yield Ranks(rank, count)
    finally:
        with contextlib.suppress(RuntimeError):
            torch.distributed.destroy_process_group()


def _join(connect: Callable[[], None]) -> None:
    """Connect in a thread: no Python runs while a rank waits for the others, and so no signal would be heard."""
    failed: list[Exception] = []

    def work() -> None:
        try:
            connect()
        except (ValueError, RuntimeError) as error:
            failed.append(error)

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    while thread.is_alive():
        thread.join(0.1)
    if failed:
        raise failed[0]


def deal(tokens: Sequence[int], *, count: int) -> list[list[int]]:
    """Positions of a step's examples for each rank, in order: longest first, to whoever has the fewest tokens."""
    shares: list[list[int]] = [[] for _ in range(count)]
    held = [0] * count
    for position in sorted(range(len(tokens)), key=lambda index: (-tokens[index], index)):
        rank = held.index(min(held))
        shares[rank].append(position)
        held[rank] += tokens[position]
    return [sorted(share) for share in shares]


def note_exit(file: Path, *, rank: int, code: int) -> None:
    """Write a rank's exit code into exit.json, for a launcher that answers 1 whatever its ranks answer."""
    with contextlib.suppress(OSError), file.open("a+", encoding="utf-8") as stream:
        fcntl.flock(stream, fcntl.LOCK_EX)  # the other ranks end at the same moment
        stream.seek(0)
        known: dict[str, Any] = {}
        with contextlib.suppress(ValueError):
            known = json.loads(stream.read())
        known[str(rank)] = code
        os.ftruncate(stream.fileno(), 0)
        stream.write(json.dumps(dict(sorted(known.items(), key=lambda item: int(item[0])))) + "\n")
