"""Signals in, a clean end out: the first asks the command to stop, a second ends it where it is."""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from types import FrameType
from typing import NoReturn

from finetune.errors import FinetuneError, Interrupted, Problem

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP)
# A launcher of several ranks passes a signal on that its ranks have got from the terminal already.
ECHO_SECONDS = 5.0
NOTHING_LOST = "no step was trained yet, so nothing is lost; start again with the same command"


class Stopped(BaseException):
    """Raised from the signal handler where nothing is to be saved; no `except Exception` on the way holds it up."""


def print_error(error: FinetuneError) -> None:
    """One line a problem, on stderr."""
    sys.stderr.write("".join(f"{problem}\n" for problem in error.problems))
    sys.stderr.flush()


class StopSignal:
    """Remembers the first signal. `at_once`: end there and then; else somebody looks at `number` and saves first.

    `tell` and `note` are for an end without going back: the last words, and the exit code where others look for it.
    """

    def __init__(self, *, rank: int = 0, ranks: int = 1, tell: Callable[[FinetuneError], None] = print_error) -> None:
        self.number = 0
        self.at_once = True
        self.raised = False  # Stopped was, and whatever else comes out is what became of it
        self.cure = NOTHING_LOST
        self.tell = tell
        self.note: Callable[[int], None] = lambda code: None
        self._lost = False
        self._rank, self._ranks = rank, ranks
        self._since = 0.0
        self._process = os.getpid()

    def receive(self, number: int, _frame: FrameType | None) -> None:
        if os.getpid() != self._process:  # a child that inherited the handler ends as children do
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
            return
        if not self.number or self._lost:
            self.number, self._since, self._lost = self.number or number, time.monotonic(), False
            if self.at_once:
                self.raised = True
                raise Stopped
        elif self._ranks == 1 or time.monotonic() - self._since > ECHO_SECONDS:
            words = Problem("finetune", "a second signal: ended without saving; the newest checkpoint is whole")
            self.end_here(Interrupted(words, signal_number=self.number))

    def raise_again(self, lost: sys.UnraisableHookArgs, otherwise: Callable[[sys.UnraisableHookArgs], None]) -> None:
        """In place of sys.unraisablehook: a callback of the interpreter cannot raise, and would print Stopped instead.

        Such are `__del__` and what is called around a fork.
        """
        if not isinstance(lost.exc_value, Stopped):
            otherwise(lost)
            return
        self._lost = True
        again = threading.Timer(0.02, self._send_again)  # after the callback; if it meets another, once more
        again.daemon = True
        again.start()

    def check(self) -> None:
        """End here if a signal has come, between two stages, for what raises in the middle of one can be swallowed."""
        if self.number:
            self.raised, self._lost = True, False
            raise Stopped

    def _send_again(self) -> None:
        if self._lost:
            os.kill(self._process, self.number)

    def code_of(self, error: BaseException | None) -> int:
        """The exit code of a command that ends with this error, or with none."""
        if isinstance(error, Stopped) or (error and self.raised):
            return 128 + self.number
        if isinstance(error, FinetuneError):
            return error.code
        return 1 if error else 0

    def end_here(self, error: FinetuneError) -> NoReturn:
        """Leave at once, without a traceback: a checkpoint that is being written is sealed, or swept away later."""
        for child in multiprocessing.active_children():
            child.kill()
        with suppress(RuntimeError, OSError):  # the signal came in the middle of another line
            self.tell(error)
        self.note(error.code)
        os._exit(error.code)

    def interrupted(self) -> Interrupted:
        name = signal.Signals(self.number).name
        problem = Problem("finetune", f"{name}: {self.cure}")
        return Interrupted(problem if self._rank == 0 else (), signal_number=self.number)  # the first speaks for all


@contextmanager
def stop_on_signals(
    *, rank: int = 0, ranks: int = 1, tell: Callable[[FinetuneError], None] = print_error
) -> Iterator[StopSignal]:
    """Route the signals to a StopSignal while the block runs; those that are ignored, as under nohup, stay ignored.

    Raises:
        Interrupted: a signal ended the block.
    """
    stop = StopSignal(rank=rank, ranks=ranks, tell=tell)
    before = {
        number: signal.signal(number, stop.receive)
        for number in SIGNALS
        if signal.getsignal(number) is not signal.SIG_IGN
    }
    otherwise = sys.unraisablehook
    sys.unraisablehook = lambda lost: stop.raise_again(lost, otherwise)
    try:
        yield stop
    except Stopped:
        raise stop.interrupted() from None
    except Exception:
        if stop.raised:  # what was broken off made an error of its own of it, as an import or a `finally` can
            raise stop.interrupted() from None
        raise
    finally:
        sys.unraisablehook = otherwise
        if not stop.number:  # after a signal the command is about to end; the next one must not change how
            for number, handler in before.items():
                signal.signal(number, handler)
