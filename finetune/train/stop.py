"""Stop a training on a signal: at the next step boundary, after a checkpoint; a second signal ends it at once."""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Iterator
from pathlib import Path
from types import FrameType
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from finetune.errors import Interrupted, Problem

SIGNALS = (signal.SIGINT, signal.SIGTERM)


class StopOnSignal(TrainerCallback):
    """Remembers the first signal and asks the trainer to save and stop when the running step is done."""

    def __init__(self) -> None:
        self.signal_number = 0

    def receive(self, number: int, _frame: FrameType | None) -> None:
        if self.signal_number:
            raise KeyboardInterrupt
        self.signal_number = number

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        if self.signal_number:
            control.should_save = control.should_training_stop = True

    def interrupted(self, *, step: int, folder: Path) -> Interrupted:
        name = signal.Signals(self.signal_number).name
        message = f"{name} after step {step}; a checkpoint is saved, continue with the same command and --resume"
        return Interrupted(Problem(str(folder), message), signal_number=self.signal_number)


@contextlib.contextmanager
def stop_on_signal() -> Iterator[StopOnSignal]:
    """Route SIGINT and SIGTERM to a StopOnSignal while the block runs."""
    stop = StopOnSignal()
    before = {number: signal.signal(number, stop.receive) for number in SIGNALS}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
