"""Answers to the run's own prompts while it trains: weights of now in, lines of samples.jsonl out."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from finetune.errors import storing
from finetune.train.held_out import EvaluationStopped
from finetune.train.stop import StopAtStepEnd
from finetune.train.trainer import StepTrainer
from finetune.train.watch import MetricsFile, is_evaluated

# {"prompt", "answer", "tokens", "stopped"} for every prompt; EvaluationStopped where its argument says so.
AnswerAll = Callable[[Callable[[], bool]], Sequence[dict[str, Any]]]


class Samples(TrainerCallback):
    """Has the prompts, if any, answered after every step that is evaluated; broken off by a signal, it is made up for.

    The first rank answers and writes, while the others wait for it.
    """

    def __init__(
        self, trainer: StepTrainer, answer_all: AnswerAll | None, file: Path, *, boundary: StopAtStepEnd
    ) -> None:
        self.trainer = trainer
        self.answer_all = answer_all
        self.file = MetricsFile(file)
        self.boundary = boundary

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        step, ranks = state.global_step, self.trainer.ranks
        if self.answer_all is None:
            return
        owed = False
        if ranks.is_first:
            with storing(self.file.file):
                kept = self.file.open(until_step=step)
            owed = is_evaluated(self.trainer.plan, step) and not any(line["step"] == step for line in kept)
        if ranks.largest(owed):
            self._answer(step)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        if self.answer_all and is_evaluated(self.trainer.plan, state.global_step):
            self._answer(state.global_step)
            self.boundary.stop_if_agreed(control)

    @contextmanager
    def written(self) -> Iterator[None]:
        """Close the file at the end of the block.

        Raises:
            StorageError: what a full disk refused until then cannot be written.
        """
        try:
            yield
            with storing(self.file.file):
                self.file.flush()
        finally:
            self.file.close()

    def _answer(self, step: int) -> None:
        self.trainer.stage = "evaluation"
        self.trainer.ranks.first_alone(lambda: self._write(step))

    def _write(self, step: int) -> None:
        assert self.answer_all
        with suppress(EvaluationStopped):
            answers = self.answer_all(self.trainer.signalled)
            self.file.add(*({"step": step, **answer} for answer in answers))
