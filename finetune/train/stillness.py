"""Notice a run of one process that hangs: what it does and its steps in, a stack dump and exit code 7 out.

A slow run must never be ended for being slow. So time alone says little: before the first step is finished, and while
rows are read, weights loaded, held-out rows scored or checkpoints written, a run hangs only if it does *nothing*: no
processor time and no byte read or written, of this process or of its children. A step that computes without end is
seen by its time, compared with the steps before it.
"""

from __future__ import annotations

import faulthandler
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from finetune.errors import Problem, WorkerError
from finetune.machine import Work, work_done

LOOK_SECONDS = 5.0  # between two looks
# Nothing at all done for so long: a file system that answers no more, children that wait for each other.
IDLE_SECONDS = 600.0
# Less than this in IDLE_SECONDS is nothing: what the looks take themselves.
LEAST = Work(processor_seconds=1.0, moved_bytes=2**20)
# A step of so many times the longest before it, and at least so many seconds, will not end.
TIMES, LEAST_STEP_SECONDS = 10, 600.0
WRITE_SECONDS = 5.0  # for the stacks in the run folder, whose disk may be what hangs
STACKS = "stacks.txt"


class Stillness:
    """A thread beside the work that looks every few seconds. It costs a step two assignments.

    Time is counted in looks, never more than two of them at once: a machine that was suspended, or a process that was
    stopped and continues, has not been idle meanwhile.
    """

    def __init__(self, end: Callable[[WorkerError], None]) -> None:
        self.folder: Path | None = None  # the run's, once it is held
        self.kept = ""  # where the run can go on; known beforehand, for the disk may not answer any more
        self._end = end
        self._steps, self._in_step = 0, False  # written by the training alone
        self._over = threading.Event()
        self._idle = self._stepping = self._longest = 0.0
        self._before: Work | None = None

    @contextmanager
    def watched(self) -> Iterator[None]:
        """Look while the block runs."""
        thread = threading.Thread(target=self._watch, daemon=True)
        thread.start()
        try:
            yield
        finally:
            self._over.set()
            thread.join(timeout=1)

    def step_begins(self) -> None:
        self._in_step = True

    def step_ended(self) -> None:
        self._steps, self._in_step = self._steps + 1, False

    def _watch(self) -> None:
        looked, seen = time.monotonic(), self._steps
        while not self._over.wait(LOOK_SECONDS):
            now = time.monotonic()
            passed = min(now - looked, 2 * LOOK_SECONDS)
            looked = now
            steps, in_step = self._steps, self._in_step
            if what := self.look(passed, work_done(), moved_on=steps != seen, in_step=in_step):
                self._leave(what)
                return
            seen = steps

    def look(self, passed: float, work: Work | None, *, moved_on: bool, in_step: bool) -> str | None:
        """What hangs, `passed` seconds after the look before; `work` is what was done so far, None if unknown."""
        if moved_on:
            self._longest, self._stepping = max(self._longest, self._stepping), 0.0
        self._stepping += passed if in_step else 0.0
        if work is None or self._before is None or moved_on or work.is_beyond(self._before, by=LEAST):
            self._idle, self._before = 0.0, work
        else:
            self._idle += passed
        if self._idle >= IDLE_SECONDS:
            return f"nothing was computed, read or written for {self._idle:.0f} seconds"
        if self._longest and self._stepping > max(LEAST_STEP_SECONDS, TIMES * self._longest):
            return f"a step has lasted {self._stepping:.0f} seconds, the longest before it {self._longest:.0f}"
        return None

    def _leave(self, what: str) -> None:
        sys.stderr.write(f"finetune: {what}; where it stands:\n")
        sys.stderr.flush()
        faulthandler.dump_traceback(all_threads=True)
        if self.folder:
            writing = threading.Thread(target=_write_stacks, args=(self.folder / STACKS, what), daemon=True)
            writing.start()
            writing.join(timeout=WRITE_SECONDS)
        message = f"{what}; the command is ended, for nothing would follow. Look at the disk or the device, then use"
        self._end(WorkerError(Problem("finetune", f"{message} --resume{self.kept}")))


def _write_stacks(file: Path, what: str) -> None:
    with suppress(OSError), file.open("w", encoding="utf-8") as stream:
        stream.write(f"{what}\n")
        stream.flush()
        faulthandler.dump_traceback(stream, all_threads=True)
