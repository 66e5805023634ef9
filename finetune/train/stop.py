"""Stop a training on a signal: at the boundary of a step, after a checkpoint, all ranks at the same one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from finetune.stop import StopSignal
from finetune.train.ranks import Ranks, kept_in


class StopAtStepEnd(TrainerCallback):
    """Asks the trainer to save and stop once any rank has got a signal; `agreed` is its number on every rank."""

    def __init__(self, stop: StopSignal, ranks: Ranks) -> None:
        self.stop = stop
        self.ranks = ranks
        self.agreed = 0

    def on_step_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        if self.ranks.stillness:
            self.ranks.stillness.step_begins()

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        if self.ranks.stillness:
            self.ranks.stillness.step_ended()
        self.stop_if_agreed(control)

    def on_evaluate(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self.stop_if_agreed(control)

    def stop_if_agreed(self, control: TrainerControl) -> None:
        self.agreed = self.ranks.largest(self.agreed or self.stop.number)
        if self.agreed:
            control.should_save = control.should_training_stop = True

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """A signal that came while the checkpoint was written needs no further step."""
        if self.ranks.stillness:
            self.ranks.stillness.kept = kept_in(Path(str(args.output_dir)).parent)
        self.agreed = self.ranks.largest(self.agreed or self.stop.number)
        if self.agreed:
            control.should_training_stop = True
