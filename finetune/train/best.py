"""What the held-out loss decides: evaluations in; when to save, when to end early, and the best step's weights out."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from finetune.train.checkpoints import best_first, find_damage, set_aside
from finetune.train.state import load_weights
from finetune.train.trainer import StepTrainer
from finetune.train.watch import Watch


class EndedEarly(Exception):
    """A run that goes on has already waited long enough for a lower held-out loss."""


class FollowHeldOut(TrainerCallback):
    """After an evaluation: a save if it is the best so far (`output.keep_best`), the end after `evaluate.patience`.

    The first rank decides, from the losses in metrics.jsonl, so that a run that goes on decides as one that never
    stopped.
    """

    def __init__(self, trainer: StepTrainer, watch: Watch) -> None:
        self.trainer = trainer
        self.watch = watch
        self._told = False

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        if state.global_step and self._is_over(state.global_step):
            raise EndedEarly

    def on_evaluate(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        step, losses, ranks = state.global_step, self.watch.held_out, self.trainer.ranks
        if self.trainer.plan.keep_best and ranks.largest(step in best_first(losses)[:1]):
            control.should_save = True
        if self._is_over(step):
            control.should_save = control.should_training_stop = True

    def _is_over(self, step: int) -> bool:
        """Whether the run ends here before its last step; the first rank says so."""
        plan, losses = self.trainer.plan, self.watch.held_out
        if plan.patience is None or step >= plan.steps:
            return False
        waited = evaluations_since_best(losses)
        if not self.trainer.ranks.largest(waited >= plan.patience):
            return False
        if self.trainer.ranks.is_first and not self._told:
            self._told = True
            best = best_first(losses)[:1]
            lowest = f"than {losses[best[0]]:.4f} of step {best[0]}" if best else "that is finite"
            words = f"no lower held-out loss in {waited} evaluations {lowest} (evaluate.patience)"
            self.watch.note(f"step {step} of {plan.steps}: ended early, {words}")
        return True


def evaluations_since_best(losses: Mapping[int, float]) -> int:
    """How many evaluations there were since the one with the lowest loss; of equal ones the first counts."""
    best = best_first(losses)[:1] or [0]
    return sum(step > best[0] for step in losses)


def take_best(model: torch.nn.Module, folder: Path, losses: Mapping[int, float], *, now: int) -> int:
    """Copy the best checkpoint's weights into the model's own tensors; the step whose weights they are.

    `now` is the step whose weights the model has. A checkpoint that is damaged is renamed, one that is not there could
    not be saved, and the next best takes its place; all of it is said on stderr.
    """
    for step in best_first(losses):
        checkpoint = folder / f"step-{step:06d}"
        if step == now:
            return now
        if not checkpoint.is_dir():
            said = "is not there"
        elif damage := find_damage(checkpoint):
            said = f"{damage}; kept as {set_aside(checkpoint).name} and not used"
        else:
            load_weights(checkpoint, model)
            return step
        sys.stderr.write(f"{checkpoint}: {said}; its held-out loss is {losses[step]:.4f}, the next best is taken\n")
    return now
