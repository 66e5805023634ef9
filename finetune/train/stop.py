"""Stop a training on a signal: at the boundary of a step, after a checkpoint, all ranks at the same one."""

from __future__ import annotations

from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from finetune.stop import StopSignal
from finetune.train.ranks import Ranks


class StopAtStepEnd(TrainerCallback):
    """Asks the trainer to save and stop once any rank has got a signal; `agreed` is its number on every rank."""

    def __init__(self, stop: StopSignal, ranks: Ranks) -> None:
        self.stop = stop
        self.ranks = ranks
        self.agreed = 0

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self._stop_if_agreed(control)

    def on_evaluate(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self._stop_if_agreed(control)

    def _stop_if_agreed(self, control: TrainerControl) -> None:
        self.agreed = self.ranks.largest(self.agreed or self.stop.number)
        if self.agreed:
            control.should_save = control.should_training_stop = True

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """A signal that came while the checkpoint was written needs no further step."""
        self.agreed = self.ranks.largest(self.agreed or self.stop.number)
        if self.agreed:
            control.should_training_stop = True
