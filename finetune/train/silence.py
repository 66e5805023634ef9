"""Notice a rank that hangs: signs of life of all ranks in, a stack dump and exit code 7 out."""

from __future__ import annotations

import faulthandler
import itertools
import math
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Protocol

from finetune.errors import Problem, WorkerError

# A rank that gives no sign of life for so long is stopped, or its host is; whether it is at work does not matter.
SILENCE_SECONDS = 300.0
# A rank that lives can still be stuck. Once steps are trained, nobody waits for it longer than SILENCE_SECONDS and so
# many times the longest stretch that this rank has worked between two meetings (a step, a share of an evaluation).
TIMES = 10
BEAT_SECONDS = 5.0  # between two signs of life
GIVEN_UP = b"given up"
AGAIN = "start all ranks again with --resume"


class Store(Protocol):
    """What the ranks have met over: a dictionary that all of them see."""

    def set(self, key: str, value: str | bytes) -> None: ...

    def get(self, key: str) -> bytes: ...

    def check(self, keys: list[str]) -> bool: ...


class SignsOfLife:
    """Two threads beside the training: one tells and hears signs of life, one ends the rank when others are silent.

    They are two because hearing can hang itself, when the rank that keeps the store is stopped.
    """

    def __init__(self, store: Store, *, rank: int, count: int, end: Callable[[WorkerError], None]) -> None:
        self.in_steps = False  # from the first step on: before, ranks may differ by what they fetch, read and load
        self.kept: Callable[[], str] = lambda: ""  # where the run can go on, for the last words
        self._store, self._rank, self._end = store, rank, end
        now = time.monotonic()
        self._heard = {other: (b"", now) for other in range(count) if other != rank}
        self._waiting_since, self._met, self._longest = math.inf, now, 0.0
        self._given_up = False
        self._over = threading.Event()
        self._threads = [threading.Thread(target=work, daemon=True) for work in (self._exchange, self._watch)]

    @contextmanager
    def exchanged(self) -> Iterator[None]:
        """Tell and hear while the block runs."""
        for thread in self._threads:
            thread.start()
        try:
            yield
        finally:
            self._over.set()
            for thread in self._threads:
                thread.join(timeout=1)

    @contextmanager
    def meeting(self, *, patient: bool) -> Iterator[None]:
        """All ranks meet in this block; `patient`: one is at work alone, and is waited for as long as it lives."""
        now = time.monotonic()
        if self.in_steps:
            self._longest = max(self._longest, now - self._met)
        self._waiting_since = math.inf if patient else now
        try:
            yield
        finally:
            self._waiting_since, self._met = math.inf, time.monotonic()

    def _exchange(self) -> None:
        with suppress(RuntimeError):  # the store went with the rank that kept it: silence
            for beat in itertools.count():
                self._store.set(f"alive/{self._rank}", GIVEN_UP if self._given_up else str(beat))
                self._hear()
                if self._over.wait(BEAT_SECONDS):
                    break

    def _hear(self) -> None:
        for other, (last, _) in self._heard.items():
            if self._store.check([f"alive/{other}"]):
                sign = self._store.get(f"alive/{other}")
                if sign == GIVEN_UP:
                    self._leave(f"rank {other} has waited in vain for another; its stack and this one's tell where")
                if sign != last:
                    self._heard[other] = (sign, time.monotonic())

    def _watch(self) -> None:
        while not self._over.wait(BEAT_SECONDS):
            now = time.monotonic()
            silent = [rank for rank, (_, heard) in self._heard.items() if now - heard > SILENCE_SECONDS]
            waited = now - self._waiting_since
            if silent:
                self._leave(f"rank {silent[0]} has given no sign of life for {SILENCE_SECONDS:g} seconds")
            # Twice, so that of a rank that is stopped the silence is noticed first, which names it.
            elif self.in_steps and waited > max(2 * SILENCE_SECONDS, TIMES * self._longest):
                self._give_up(waited)

    def _give_up(self, waited: float) -> None:
        """Let the others know first, who live, so that their stacks are told too."""
        self._given_up = True
        time.sleep(3 * BEAT_SECONDS)  # one to tell, one to hear; the store may go with us
        self._leave(f"another rank has not come for {waited:.0f} seconds")

    def _leave(self, what: str) -> None:
        sys.stderr.write(f"rank {self._rank}: {what}; where this rank stands:\n")
        sys.stderr.flush()
        faulthandler.dump_traceback(all_threads=True)
        self._end(WorkerError(Problem(f"rank {self._rank}", f"{what}; {AGAIN}{self.kept()}")))
