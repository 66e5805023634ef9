"""A model as a training run has it, in this process: base, adapter and our own pieces, ready for passes."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from finetune.data.examples import Example
from finetune.model.adapter import attach_adapter
from finetune.model.fast.speed_up import speed_up
from finetune.model.load import load_base
from finetune.resolve import Resolved, resolve
from finetune.train.held_out import autocast
from finetune.train.loss import lay_end_to_end, stretch_losses_S


def ready(recipe: Path, *settings: str) -> tuple[torch.nn.Module, Resolved]:
    """The model that `finetune train` would train, in training mode, and what the recipe resolves to."""
    resolved = resolve(recipe, settings)
    plan = resolved.plan
    model = attach_adapter(load_base(plan.model), plan.adapter, base=plan.model.base)
    speed_up(model, plan.train.speedups)
    return model.train(), resolved


def add_gradients(model: torch.nn.Module, resolved: Resolved, examples: Sequence[Example]) -> float:
    """The examples' gradients, added to the parameters', from one pass; their loss, the mean over supervised tokens."""
    train = resolved.plan.train
    stretch = lay_end_to_end(examples, device=train.device, share_prefixes="prefix" in train.speedups)
    with autocast(train.device, train.dtype):
        loss = stretch_losses_S(model, stretch).sum() / sum(example.supervised_tokens for example in examples)
    loss.backward()
    return loss.item()


def synthetic_examples(vocabulary: int, *, tokens: int, count: int, seed: int = 0) -> list[Example]:
    """Examples of equal length from random ids, every token learned; they share no beginning."""
    random = np.random.default_rng(seed)
    ids = random.integers(3, vocabulary, size=(count, tokens)).astype(np.int32)
    return [Example(row, np.ones(tokens, bool), f"{number}", 0, 0) for number, row in enumerate(ids)]
