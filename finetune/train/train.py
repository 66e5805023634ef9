"""Train an adapter: a plan, a model and examples in; a trained model, its figures and checkpoints out."""

from __future__ import annotations

import resource
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from finetune.data.examples import Example
from finetune.errors import Problem, StorageError, storing
from finetune.machine import GIB
from finetune.model.adapter import adapter_untouched
from finetune.plan import TrainPlan
from finetune.stop import Stopped, StopSignal
from finetune.train.best import EndedEarly, FollowHeldOut, take_best
from finetune.train.checkpoints import find_checkpoints, newest_whole_checkpoint, step_of
from finetune.train.memory import out_of_memory_told
from finetune.train.ranks import ALONE, Ranks
from finetune.train.samples import AnswerAll, Samples
from finetune.train.stop import StopAtStepEnd
from finetune.train.trainer import StepTrainer, make_trainer
from finetune.train.trial import TrialBeforeFirstStep
from finetune.train.watch import Watch, draw_loss_curve, flush, read_metrics


@dataclass(frozen=True)
class TrainResult:
    """The figures of a finished training, as `finetune train --json` prints them."""

    steps: int  # that were done; fewer than planned where the run ended early
    examples: int
    supervised_tokens: int
    train_loss: float  # mean over the last epoch's worth of steps, at most 20
    eval_loss: float | None  # of the adapter
    seconds: float
    tokens_per_second: float
    peak_memory_gib: float
    adapter_step: int | None = None  # whose weights the adapter has; None where that was not asked: the last step's


def train(  # noqa: PLR0913 - everything a training is made of
    plan: TrainPlan,
    model: torch.nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    *,
    examples: Sequence[Example],
    held_out: Sequence[Example],
    folder: Path,
    stop: StopSignal | None = None,
    ranks: Ranks = ALONE,
    lightened: Callable[[TrainPlan, str], None] = lambda plan, told: None,
    starts_at_base: bool = True,
    answer_all: AnswerAll | None = None,
) -> TrainResult | None:
    """Train `model` in place from the newest whole checkpoint in `folder`, or from the start; the first rank's figures.

    `lightened` is called before a step that ran out of memory is begun again in a lighter layout, with the plan that
    holds it and what to say. `starts_at_base`: the adapter is new, and none that another run has trained.
    `answer_all` answers the prompts of samples.jsonl.

    Raises:
        Stopped: a signal came, and a checkpoint is saved.
        NumericsError: a loss, a gradient, a weight or a state is not finite.
        StorageError: no checkpoint of an earlier start is whole, or saving failed again and again.
        OutOfMemoryError: in a pass, in the optimizer, an evaluation or a save.
    """
    started = time.perf_counter()
    checkpoint = _newest_checkpoint(folder / "checkpoints", ranks)
    with adapter_untouched(model):
        trainer = make_trainer(
            plan,
            model=model,
            tokenizer=tokenizer,
            examples=examples,
            held_out=held_out,
            folder=folder / "checkpoints",
            ranks=ranks,
        )
    trainer.lightened = lambda told: lightened(trainer.plan, told)
    trainer.add_callback(TrialBeforeFirstStep(trainer, starts_at_base=starts_at_base))
    watch = Watch(
        plan,
        folder / "metrics.jsonl",
        first_step=step_of(checkpoint) if checkpoint else 0,
        step_counts=lambda: (trainer.step_tokens, trainer.step_supervised),
    )
    with out_of_memory_told(lambda: trainer.stage, kept=lambda: _kept(folder)):
        try:
            _run_steps(trainer, watch, stop or StopSignal(), checkpoint, answer_all)
            with storing(folder / "metrics.jsonl"):
                watch.metrics.flush()  # what a full disk refused until now
        finally:
            watch.close()
    if not ranks.is_first:
        return None
    step = trainer.state.global_step
    with storing(folder / "checkpoints"):
        taken = take_best(model, folder / "checkpoints", watch.held_out, now=step) if plan.keep_best else None
    entries = read_metrics(folder / "metrics.jsonl")
    steps = [entry for entry in entries if "loss" in entry]
    losses = [entry["loss"] for entry in steps[-20:]]
    if not losses:
        cure = "put it back, or remove the newest checkpoint, so that its steps are trained and written again"
        raise StorageError(Problem(str(folder / "metrics.jsonl"), f"holds the loss of no step any more; {cure}"))
    with storing(folder / "loss.png"):
        draw_loss_curve(folder / "metrics.jsonl", folder / "loss.png")
    return TrainResult(
        steps=step,
        examples=len(examples),
        supervised_tokens=sum(entry["supervised_tokens"] for entry in steps),
        train_loss=sum(losses) / len(losses),
        eval_loss=watch.held_out.get(taken or step),
        seconds=time.perf_counter() - started,
        tokens_per_second=watch.tokens_per_second,
        peak_memory_gib=peak_memory_gib(plan.device),
        adapter_step=taken,
    )


def _newest_checkpoint(folder: Path, ranks: Ranks) -> Path | None:
    """The same on all ranks; the first looks for it, because a damaged one is renamed on the way."""
    found = ranks.first_alone(lambda: newest_whole_checkpoint(folder))
    step = ranks.largest(step_of(found) if found else 0)
    return found or (folder / f"step-{step:06d}" if step else None)


def _run_steps(
    trainer: StepTrainer, watch: Watch, stop: StopSignal, checkpoint: Path | None, answer_all: AnswerAll | None
) -> None:
    """From the checkpoint, or the start, to the last step.

    Raises:
        Stopped: a signal came on any rank, and a checkpoint is saved.
        StorageError: it could not be saved.
    """
    ranks, folder = trainer.ranks, Path(str(trainer.args.output_dir)).parent
    boundary = StopAtStepEnd(stop, ranks)
    samples = Samples(trainer, answer_all, folder / "samples.jsonl", boundary=boundary)
    if ranks.is_first:
        trainer.add_callback(watch)
        trainer.before_save = lambda: flush(watch.metrics, samples.file)
        if trainer.plan.keep_best:
            trainer.losses_kept = lambda: watch.held_out
    trainer.signalled = lambda: bool(stop.number)
    for callback in (_OwedEvaluation(trainer, watch), boundary, samples, FollowHeldOut(trainer, watch)):
        trainer.add_callback(callback)
    trainer.seed_rank()
    stop.at_once = False
    stop.check()
    with samples.written(), suppress(EndedEarly):
        trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    step = trainer.state.global_step
    if boundary.agreed:
        stop.number = boundary.agreed
        if not trainer.failed_saves:
            stop.cure = f"after step {step} of {trainer.plan.steps} a checkpoint is saved in {folder}; "
            stop.cure += "the same command with --resume goes on"
            raise Stopped
        if step < trainer.plan.steps:
            message = f"a signal after step {step}, which could not be saved; make room, then --resume"
            ranks.agree(StorageError(Problem(str(folder), message)) if ranks.is_first else None)
    if not trainer.failed_saves:  # else what was learned is only here, and a signal waits until it is written
        stop.cure = f"all steps are trained and saved in {folder}; the same command with --resume finishes the run"
        stop.at_once = True
        stop.check()


class _OwedEvaluation(TrainerCallback):
    """Makes up for the evaluation that a signal broke off just before the checkpoint was saved."""

    def __init__(self, trainer: StepTrainer, watch: Watch) -> None:
        self.trainer = trainer
        self.watch = watch

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        ranks = self.trainer.ranks
        owed = ranks.is_first and bool(self.trainer.held_out) and self.watch.owes_evaluation(state.global_step)
        if ranks.largest(owed):
            self.trainer.evaluate()


def _kept(folder: Path) -> str:
    """The end of a message that says where a run can go on."""
    checkpoints = find_checkpoints(folder / "checkpoints")
    return f"; {checkpoints[-1]} is kept" if checkpoints else ""


def peak_memory_gib(device: str) -> float:
    """The most memory this process held: of the GPU, or resident on the CPU."""
    if device == "cuda":
        return torch.cuda.max_memory_reserved() / GIB
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / GIB
