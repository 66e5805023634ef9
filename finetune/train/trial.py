"""What a run needs is tried once before its first step, on the real model: a trainer in, the trainer as it was out.

The longest examples go forward and backward, the optimizer takes its step, held-out rows are scored and a checkpoint is
written: what would run out of memory or room, or could never learn, is told in minutes, not after hours. Then all of
it is taken back: the run that follows is bit for bit the run without a trial.
"""

from __future__ import annotations

import heapq
import math
import shutil
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedTokenizerBase, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from finetune.data.examples import Example
from finetune.errors import Problem, ProofError, UserError, storing
from finetune.model.adapter import adapted_modules, base_alone
from finetune.train.held_out import sum_losses
from finetune.train.optimizer import forget_gradients
from finetune.train.parity import compare_with_exact
from finetune.train.state import random_state_bytes
from finetune.train.step_again import free_memory, random_state, set_random_state
from finetune.train.trainer import PASSES, StepTrainer

# First loss to the base's, nats per token: rounding only. A wrong start is off by tenths.
LIMITS = {"float32": 1e-3, "bfloat16": 0.02, "float16": 0.02}
ROWS = 16  # whose answers the base is asked for; on a page of them a template's worth shows
FEWEST_TOKENS, MARGIN = 200, 0.05  # of them, to speak of a template; nats per token that are no chance
NAMES_TOLD = 5


class TrialBeforeFirstStep(TrainerCallback):
    """Tries what a step needs before the first one; a run that goes on has done so."""

    def __init__(self, trainer: StepTrainer, *, starts_at_base: bool) -> None:
        self.trainer = trainer
        self.starts_at_base = starts_at_base

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        if state.global_step == 0:
            try_step(self.trainer, starts_at_base=self.starts_at_base)


def try_step(trainer: StepTrainer, *, starts_at_base: bool) -> None:
    """Try all that a step needs and take it back.

    Raises:
        UserError: a module gets an adapter that nothing could ever train.
        ProofError: the first loss is not the base's.
        NumericsError: a loss or gradient is not finite, or in 8 bits too far from the exact one.
        StorageError: a checkpoint cannot be written.
        RuntimeError, MemoryError: out of memory.
    """
    started = time.monotonic()
    tokens_at_once = trainer.layout.tokens_per_pass * trainer.ranks.count
    longest = fullest_step(trainer.examples, batch_size=trainer.plan.batch_size, tokens=tokens_at_once)
    with taken_back(trainer):
        told = _compare_with_base(trainer, starts_at_base=starts_at_base)
        trainer.training_step(trainer.adapted_model, longest)
        tokens_per_pass = trainer.layout.tokens_per_pass  # which that may have lowered
        _refuse_idle_adapters(trainer, [trainer.examples[index] for index in longest])
        trainer._clip_grad_norm(trainer.adapted_model)
        assert trainer.optimizer is not None
        trainer.optimizer.step()
        if trainer.plan.compute != "auto":  # here, where no adapter's B is zero any more, so that A has a gradient, too
            told += f"; {compare_with_exact(trainer)}"
        _score_longest_held_out(trainer, tokens_per_pass)
        _write_checkpoint(trainer)
    if trainer.ranks.is_first:
        seconds = time.monotonic() - started
        first = trainer.examples[longest[0]]
        sys.stderr.write(f"tried a step with {first.where} ({first.tokens:,} tokens) in {seconds:.1f} s; {told}\n")


def fullest_step(examples: Sequence[Example], *, batch_size: int, tokens: int) -> list[int]:
    """Positions of the longest example, and of the next longest ones that fit beside it: as much as a pass can hold."""
    longest = heapq.nlargest(batch_size, range(len(examples)), key=lambda index: examples[index].tokens)
    chosen, left = longest[:1], tokens - examples[longest[0]].tokens
    for index in longest[1:]:
        if examples[index].tokens <= left:
            chosen.append(index)
            left -= examples[index].tokens
    return chosen


@contextmanager
def taken_back(trainer: StepTrainer) -> Iterator[None]:
    """Weights, gradients, the optimizer's state, the loss scale and random numbers are afterwards what they were."""
    assert trainer.optimizer is not None
    # In the machine's memory. Not more than the optimizer's state, which is not there yet while a pass is tried.
    weights = [parameter.detach().to("cpu", copy=True) for parameter in trainer._trainable]
    random_numbers = random_state(trainer.args.device)
    scaler = trainer.accelerator.scaler
    scale = scaler.state_dict() if scaler else {}
    try:
        yield
    finally:
        with torch.no_grad():
            for parameter, before in zip(trainer._trainable, weights, strict=True):
                parameter.copy_(before)
        forget_gradients(trainer._trainable)
        trainer.optimizer.state.clear()
        if scaler:
            scaler.load_state_dict(scale)
        set_random_state(trainer.args.device, random_numbers)
        free_memory(trainer.args.device)  # of states and files, whose holes would lie between the passes' tensors
        trainer.settled_gib = -trainer.settled_gib  # no step needs more than the fullest one
        trainer.stage = PASSES


def _compare_with_base(trainer: StepTrainer, *, starts_at_base: bool) -> str:
    """The first loss and the base's on a few rows, in words; a template that the base does not know is told."""
    tokens = trainer.layout.tokens_per_pass
    rows = _first_rows(trainer.examples, tokens=tokens)
    assert isinstance(trainer.processing_class, PreTrainedTokenizerBase)
    control = control_ids(trainer.processing_class)
    texts = [without_control_targets(row, control) for row in rows]
    compared = [row for row in texts if row.supervised_tokens] or rows
    known = sum(row.supervised_tokens for row in compared)
    first = _mean_loss(trainer, compared, tokens)
    with base_alone(trainer.adapted_model):
        base = _mean_loss(trainer, compared, tokens)
        plain = [without_control_tokens(row, control) for row in compared]
        comparable = known >= FEWEST_TOKENS and _differ(compared, plain)
        in_plain_text = _mean_loss(trainer, plain, tokens) if comparable else math.inf
    if starts_at_base and not abs(first - base) <= LIMITS[trainer.plan.dtype]:
        message = f"the first loss is {first:.6g}, that of the base alone {base:.6g}: an adapter that has learned "
        message += "nothing changes the model; please report it with your recipe"
        error = ProofError(Problem("before the first step", message))
        trainer.ranks.agree(error if trainer.ranks.is_first else None)
    if base > in_plain_text + MARGIN and trainer.ranks.is_first:
        sys.stderr.write(
            f"warning: the base expects the answers less with the template's control tokens (loss {base:.3f}) than in "
            f"plain text without them ({in_plain_text:.3f}; {known:,} tokens of {len(compared)} rows): it may not know "
            "this template; see data.template\n"
        )
    return f"first loss {first:.4f}, the base's {base:.4f}"


def _first_rows(examples: Sequence[Example], *, tokens: int) -> list[Example]:
    """As many as fit into a pass, at least one."""
    rows = [examples[index] for index in range(min(ROWS, len(examples)))]
    held = np.cumsum([row.tokens for row in rows])
    return [row for row, so_far in zip(rows, held, strict=True) if so_far <= tokens] or rows[:1]


def _mean_loss(trainer: StepTrainer, rows: Sequence[Example], tokens_per_pass: int) -> float:
    with trainer.compute_loss_context_manager():
        sums = sum_losses(trainer.adapted_model, rows, tokens_per_pass=tokens_per_pass)
    return math.fsum(sums) / sum(row.supervised_tokens for row in rows)


def control_ids(tokenizer: PreTrainedTokenizerBase) -> np.ndarray:
    """The ids that stand for no text."""
    added = tokenizer.added_tokens_decoder
    return np.array(sorted({*tokenizer.all_special_ids, *(number for number, token in added.items() if token.special)}))


def without_control_targets(row: Example, control: np.ndarray) -> Example:
    """The same tokens, of which only text is learned."""
    return replace(row, learned=row.learned & ~np.isin(row.ids, control))


def without_control_tokens(row: Example, control: np.ndarray) -> Example:
    """Only the text of it, after the first token of all, which many bases need."""
    kept = ~np.isin(row.ids, control)
    kept[0] = True
    learned = row.learned & ~np.isin(row.ids, control)
    return replace(row, ids=row.ids[kept], learned=learned[kept])


def _differ(rows: Sequence[Example], others: Sequence[Example]) -> bool:
    """Whether there is something to compare."""
    return any(row.tokens != other.tokens for row, other in zip(rows, others, strict=True))


def _refuse_idle_adapters(trainer: StepTrainer, rows: Sequence[Example]) -> None:
    if not any(row.learned[2:].any() for row in rows):
        return  # the first token attends to itself alone: queries and keys have no gradient from it
    idle = [
        name
        for name, parameters in adapted_modules(trainer.adapted_model).items()
        if not any(p.grad is not None and bool(p.grad.any()) for p in parameters)
    ]
    if idle:
        more = f" and {len(idle) - NAMES_TOLD} more" if len(idle) > NAMES_TOLD else ""
        message = f"{len(idle)} modules got an adapter that no gradient reaches, so it would never learn: "
        message += f"{', '.join(idle[:NAMES_TOLD])}{more}; leave them out (adapter.targets, adapter.layers)"
        error = UserError(Problem("adapter.targets", message))
        trainer.ranks.agree(error if trainer.ranks.is_first else None)


def _score_longest_held_out(trainer: StepTrainer, tokens_per_pass: int) -> None:
    if trainer.held_out:
        trainer.stage = "evaluation"
        longest = fullest_step(trainer.held_out, batch_size=len(trainer.held_out), tokens=tokens_per_pass)
        _mean_loss(trainer, [trainer.held_out[index] for index in longest], tokens_per_pass)


def _write_checkpoint(trainer: StepTrainer) -> None:
    """Beside the checkpoints, by a name that is swept away if we are killed."""
    trainer.stage = "saving a checkpoint"
    folder = Path(str(trainer.args.output_dir))
    staging = folder / ".step-000000.partial"

    def write() -> None:
        with storing(folder):
            shutil.rmtree(staging, ignore_errors=True)
            try:
                staging.mkdir(parents=True)
                trainer._write_checkpoint_files(staging, [random_state_bytes()])
            finally:
                shutil.rmtree(staging, ignore_errors=True)

    trainer.ranks.first_alone(write)
