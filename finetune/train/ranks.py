"""Several processes that train one adapter: what each of them does in a step, and how they agree on everything else."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import socket
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from finetune.errors import FinetuneError, Problem, UserError, WorkerError, storing
from finetune.stop import Stopped, StopSignal
from finetune.train.checkpoints import find_checkpoints
from finetune.train.memory import is_out_of_memory
from finetune.train.silence import AGAIN, SignsOfLife, Store
from finetune.train.stillness import Stillness

if TYPE_CHECKING:
    import torch

T = TypeVar("T")
# The ranks have to find each other within this time of the first one's start.
JOIN_SECONDS = 300.0
# A collective waits this long for a rank that lives: the first may be tokenising, which is done once. One that died is
# noticed at once, by its closed connection, one that hangs by finetune/train/silence.py.
PATIENCE = timedelta(hours=6)


@dataclass(frozen=True)
class Ranks:
    """This process among all of them; one alone needs no other, calls no collective and imports no torch."""

    rank: int = 0
    count: int = 1
    signs: SignsOfLife | None = None
    stillness: Stillness | None = None  # of one alone, whom nobody waits for

    @property
    def is_first(self) -> bool:
        return self.rank == 0

    def largest(self, number: int, *, patient: bool = False) -> int:
        """The largest of all ranks' numbers, on every rank: how they agree on a signal or on an exit code.

        `patient`: one of them may be at work alone for as long as it needs.
        """
        if self.count == 1:
            return number
        import torch

        number_1 = torch.tensor([number])
        with self._together(patient=patient):
            torch.distributed.all_reduce(number_1, op=torch.distributed.ReduceOp.MAX)
        return int(number_1.item())

    def sum_(self, tensor: torch.Tensor) -> None:
        """Replace a tensor by the sum over all ranks."""
        if self.count > 1:
            import torch

            # A GPU only queues its work and its meetings; so that waiting is seen as waiting and work as work:
            finished = torch.cuda.current_stream(tensor.device).synchronize if tensor.is_cuda else lambda: None
            finished()
            with self._together():
                torch.distributed.all_reduce(tensor)
                finished()

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
        if self.signs:
            self.signs.in_steps = True

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
        code = self.largest(error.code if error else 0, patient=True)
        if error:
            raise error
        if code:
            silent = FinetuneError(())
            silent.code = code
            raise silent

    @contextlib.contextmanager
    def _together(self, *, patient: bool = False) -> Iterator[None]:
        with self.signs.meeting(patient=patient) if self.signs else contextlib.nullcontext():
            try:
                yield
            except RuntimeError as error:
                if is_out_of_memory(error):
                    raise
                raise self._left_alone() from error

    def _left_alone(self) -> WorkerError:
        kept = self.signs.kept() if self.signs else ""
        return WorkerError(Problem(f"rank {self.rank}", f"another rank is gone, so this one stops too; {AGAIN}{kept}"))

    @contextlib.contextmanager
    def ends_noted(self, folder: Path, stop: StopSignal) -> Iterator[None]:
        """Every rank's exit code in the run folder's exit.json, for a launcher that answers 1 whatever they answer.

        One that could note nothing, because it was killed, stays null.

        Raises:
            WorkerError: a library was meeting the other ranks, and one was gone.
        """
        if self.count == 1:
            if self.stillness:
                self.stillness.folder, self.stillness.kept = folder, kept_in(folder)
            yield
            return
        file = folder / "exit.json"
        self.first_alone(lambda: _expect_ends(file, self.count))
        stop.note = lambda code: note_exit(file, rank=self.rank, code=code)
        if self.signs:
            self.signs.kept = lambda: kept_in(folder)
        error: BaseException | None = None
        try:
            yield
        except RuntimeError as caught:
            error = self._left_alone() if is_lost_connection(caught) else caught
            raise error from caught
        except BaseException as caught:
            error = caught
            raise
        finally:
            stop.note(stop.code_of(error))


ALONE = Ranks()


@contextlib.contextmanager
def joined_ranks(rank: int, local_rank: int, count: int, *, stop: StopSignal) -> Iterator[Ranks]:
    """The ranks of a launcher, connected: gloo between CPUs, NCCL between GPUs; `stop` is how one ends that waits.

    Raises:
        UserError: what the launcher says cannot be.
        WorkerError: another is gone before all are connected.
    """
    if count == 1:
        stillness = Stillness(stop.end_here)
        with stillness.watched():
            yield Ranks(stillness=stillness)
        return
    import torch

    if torch.cuda.is_available():
        if local_rank >= torch.cuda.device_count():
            message = f"{torch.cuda.device_count()} GPUs are here, and every rank needs one: start as many ranks a host"
            raise UserError(Problem(f"rank {rank}", f"{message} (torchrun --nproc-per-node)"))
        torch.cuda.set_device(local_rank)
        backend = "cpu:gloo,cuda:nccl"  # numbers to agree on never leave the CPU
    else:
        backend = "gloo"
    if _on_one_host(count) and "lo" in {name for _, name in socket.if_nameindex()}:
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")  # gloo's own choice is the interface of the host's name
    store = _connect(backend, rank, count, stop)
    signs = SignsOfLife(store, rank=rank, count=count, end=stop.end_here)
    try:
        with signs.exchanged():
            yield Ranks(rank, count, signs)
    finally:
        with contextlib.suppress(RuntimeError):
            torch.distributed.destroy_process_group()


def _connect(backend: str, rank: int, count: int, stop: StopSignal) -> Store:
    """Meet the other ranks where the launcher says; the store that they have met over.

    A signal, or nobody there in time, ends the command here: while a thread is still at it in torch, the interpreter
    cannot end in order (it aborts).
    """
    import torch

    def connect() -> Store:
        limit = timedelta(seconds=JOIN_SECONDS)
        store = _store_on_loopback(count, limit) if rank == 0 else None
        store = store or next(torch.distributed.rendezvous("env://", timeout=limit))[0]  # type: ignore[attr-defined]
        torch.distributed.init_process_group(backend, store=store, rank=rank, world_size=count, timeout=PATIENCE)
        return store

    try:
        store = _in_thread(connect, seconds=JOIN_SECONDS)
    except Stopped:
        stop.end_here(stop.interrupted())
    except (ValueError, RuntimeError) as error:
        if isinstance(error, ValueError) or "failed to listen" in str(error):
            message = f"{count} ranks are announced (WORLD_SIZE), but they cannot be connected: {error}"
            raise UserError(Problem(f"rank {rank}", f"{_first_line(message)}; start with torchrun")) from error
        message = f"of {count} ranks another is gone before all were connected ({_first_line(str(error))}); {AGAIN}"
        raise WorkerError(Problem(f"rank {rank}", message)) from error
    if store is None:
        message = f"the {count} ranks have not found each other within {JOIN_SECONDS:g} seconds; {AGAIN}"
        stop.end_here(WorkerError(Problem(f"rank {rank}", message)))
    return store


def _store_on_loopback(count: int, limit: timedelta) -> Any:
    """What the ranks meet over, if this process opens it and all of them are on this host; None if not.

    torch's own listens on every interface (torch/distributed/rendezvous.py, _create_c10d_store). Under torchrun it is
    torchrun that opens it.

    Raises:
        ValueError: the port is taken.
    """
    import torch

    host, port = os.environ.get("MASTER_ADDR", ""), os.environ.get("MASTER_PORT", "")
    is_torchruns = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    if host not in {"127.0.0.1", "localhost"} or not port.isdecimal() or is_torchruns or not _on_one_host(count):
        return None
    with socket.socket() as listening:
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listening.bind(("127.0.0.1", int(port)))
        except (OSError, OverflowError) as error:
            message = f"failed to listen on 127.0.0.1:{port} ({error})"
            raise ValueError(message) from error
        listening.listen()
        number = listening.detach()  # from here on torch's
    return torch.distributed.TCPStore(  # type: ignore[attr-defined]
        "127.0.0.1", int(port), count, is_master=True, timeout=limit, master_listen_fd=number
    )


def _on_one_host(count: int) -> bool:
    return os.environ.get("LOCAL_WORLD_SIZE") == str(count)


def _in_thread(work: Callable[[], T], *, seconds: float) -> T | None:
    """What the work makes, or None after so many seconds; no signal would be heard while the main thread is in it."""
    made: list[T] = []
    failed: list[Exception] = []

    def run() -> None:
        try:
            made.append(work())
        except Exception as error:
            failed.append(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    end = time.monotonic() + seconds
    while thread.is_alive() and time.monotonic() < end:
        thread.join(0.1)
    if failed:
        raise failed[0]
    return made[0] if made else None


def is_lost_connection(error: BaseException) -> bool:
    """Whether a library's error is that of a collective whose partner is gone, and no bug."""
    kinds = ("DistBackendError", "DistNetworkError", "DistStoreError")  # by name, so that this file needs no torch
    words = ("gloo", "Connection closed by peer", "Connection reset by peer", "Broken pipe", "NCCL")
    return type(error).__name__ in kinds or any(word in str(error) for word in words)


def _first_line(text: str) -> str:
    return text.strip().splitlines()[0]


def _expect_ends(file: Path, count: int) -> None:
    with storing(file):
        file.write_text(json.dumps(dict.fromkeys(map(str, range(count)))) + "\n", encoding="utf-8")


def kept_in(folder: Path) -> str:
    """The end of a message that says where a run can go on."""
    checkpoints = find_checkpoints(folder / "checkpoints")
    return f", which goes on from {checkpoints[-1]}" if checkpoints else ""


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
    with contextlib.suppress(OSError):
        descriptor = os.open(file, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            _lock(descriptor)
            known: dict[str, Any] = {}
            with contextlib.suppress(ValueError):
                known = json.loads(os.pread(descriptor, os.fstat(descriptor).st_size, 0))
            known[str(rank)] = code
            text = json.dumps(dict(sorted(known.items(), key=lambda item: int(item[0])))) + "\n"
            os.ftruncate(descriptor, os.pwrite(descriptor, text.encode(), 0))  # never empty for who reads meanwhile
        finally:
            os.close(descriptor)


def _lock(descriptor: int) -> None:
    """Alone, for the other ranks end at the same moment; but not for ever, for this one may hold the lock itself."""
    for _ in range(20):
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            time.sleep(0.05)
        else:
            return
