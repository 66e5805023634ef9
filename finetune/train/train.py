"""Train an adapter: a plan, a model and examples in; a trained model, its figures and checkpoints out."""

from __future__ import annotations

import resource
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import PreTrainedTokenizerBase

from finetune.data.examples import Example
from finetune.errors import Problem, StorageError
from finetune.machine import GIB
from finetune.model.adapter import keep_adapter_in_float32
from finetune.plan import TrainPlan
from finetune.train.checkpoints import newest_whole_checkpoint, step_of
from finetune.train.stop import stop_on_signal
from finetune.train.trainer import autocast, make_trainer, mean_loss
from finetune.train.watch import Watch, draw_loss_curve, read_metrics


@dataclass(frozen=True)
class TrainResult:
    """The figures of a finished training, as `finetune train --json` prints them."""

    steps: int
    examples: int
    supervised_tokens: int
    train_loss: float  # mean over the last epoch's worth of steps, at most 20
    eval_loss: float | None
    seconds: float
    tokens_per_second: float
    peak_memory_gib: float


def train(
    plan: TrainPlan,
    model: torch.nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    *,
    examples: Sequence[Example],
    held_out: Sequence[Example],
    folder: Path,
) -> TrainResult:
    """Train `model` in place from the newest whole checkpoint in `folder`, or from the start.

    Raises:
        NumericsError: a loss, a weight or a state is not finite.
        StorageError: no checkpoint of an earlier start is whole, or saving failed again and again.
    """
    started = time.perf_counter()
    checkpoint = newest_whole_checkpoint(folder / "checkpoints")
    trainer = make_trainer(
        plan, model=model, tokenizer=tokenizer, examples=examples, held_out=held_out, folder=folder / "checkpoints"
    )
    keep_adapter_in_float32(model)  # TRL's constructor casts the adapters of quantised bases to bfloat16
    watch = Watch(
        plan,
        folder / "metrics.jsonl",
        first_step=step_of(checkpoint) if checkpoint else 0,
        step_counts=lambda: (trainer.step_tokens, trainer.step_supervised),
    )
    trainer.add_callback(watch)
    with stop_on_signal() as stop:
        trainer.add_callback(stop)
        try:
            trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
        finally:
            watch.close()
    if stop.signal_number and trainer.state.global_step < plan.steps:
        if trainer.failed_saves:
            message = (
                f"a signal after step {trainer.state.global_step}, which could not be saved; make room, then --resume"
            )
            raise StorageError(Problem(str(folder), message))
        raise stop.interrupted(step=trainer.state.global_step, folder=folder)
    eval_loss = None
    if held_out:
        with autocast(plan.device, plan.dtype):
            eval_loss = mean_loss(model, held_out, tokens_per_pass=plan.tokens_per_pass)
    draw_loss_curve(folder / "metrics.jsonl", folder / "loss.png")
    losses = [entry["loss"] for entry in read_metrics(folder / "metrics.jsonl") if "loss" in entry]
    return TrainResult(
        steps=plan.steps,
        examples=len(examples),
        supervised_tokens=watch.supervised_tokens,
        train_loss=sum(losses[-20:]) / len(losses[-20:]),
        eval_loss=eval_loss,
        seconds=time.perf_counter() - started,
        tokens_per_second=watch.tokens_per_second,
        peak_memory_gib=peak_memory_gib(plan.device),
    )


def peak_memory_gib(device: str) -> float:
    """The most memory this process held: of the GPU, or resident on the CPU."""
    if device == "cuda":
        return torch.cuda.max_memory_reserved() / GIB
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / GIB
