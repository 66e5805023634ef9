"""Signals in, a clean end out: the first asks the command to stop, a second ends it where it is."""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from finetune.errors import Interrupted, Problem

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP)
# A launcher of several ranks passes a signal on that its ranks have got from the terminal already.
ECHO_SECONDS = 5.0
NOTHING_LOST = "no step was trained yet, so nothing is lost; start again with the same command"


class Stopped(BaseException):
    """Raised from the signal handler where nothing is to be saved; no `except Exception` on the way holds it up."""


class StopSignal:
    """Remembers the first signal. `at_once`: end there and then; else somebody looks at `number` and saves first."""

    def __init__(self, *, rank: int = 0, ranks: int = 1) -> None:
        self.number = 0
        self.at_once = True
        self.cure = NOTHING_LOST
        self._rank, self._ranks = rank, ranks
        self._since = 0.0
        self._process = os.getpid()

    def receive(self, number: int, _frame: FrameType | None) -> None:
        if os.getpid() != self._process:  # a child that inherited the handler ends as children do
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
            return
        if not self.number:
            self.number, self._since = number, time.monotonic()
            if self.at_once:
                raise Stopped
        elif self._ranks == 1 or time.monotonic() - self._since > ECHO_SECONDS:
            _end_here(self.number)

    def check(self) -> None:
        """End here if a signal has come.

        A handler's exception can get lost in a callback of the interpreter; this, between two stages, does not.
        """
        if self.number:
            raise Stopped

    def interrupted(self) -> Interrupted:
        name = signal.Signals(self.number).name
        problem = Problem("finetune", f"{name}: {self.cure}")
        return Interrupted(problem if self._rank == 0 else (), signal_number=self.number)  # the first speaks for all


@contextmanager
def stop_on_signals(*, rank: int = 0, ranks: int = 1) -> Iterator[StopSignal]:
    """Route the signals to a StopSignal while the block runs; those that are ignored, as under nohup, stay ignored.

    Raises:
        Interrupted: a signal ended the block.
    """
    stop = StopSignal(rank=rank, ranks=ranks)
    before = {
        number: signal.signal(number, stop.receive)
        for number in SIGNALS
        if signal.getsignal(number) is not signal.SIG_IGN
    }
    try:
        yield stop
    except Stopped:
        raise stop.interrupted() from None
    finally:
        if not stop.number:  # after a signal the command is about to end; the next one must not change how
            for number, handler in before.items():
                signal.signal(number, handler)


def _end_here(number: int) -> None:
    """Leave at once, without a traceback: a checkpoint that is being written is either sealed or swept away later."""
    for child in multiprocessing.active_children():
        child.kill()
    sys.stderr.write("a second signal: ended without saving; the newest checkpoint is whole\n")
    sys.stderr.flush()
    os._exit(128 + number)
