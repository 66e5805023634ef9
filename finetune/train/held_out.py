"""Losses without gradients, pass by pass: of held-out examples while training, of anything that is evaluated."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager

import torch

from finetune.data.examples import Example
from finetune.layout import cut_into_passes
from finetune.train.loss import lay_end_to_end, stretch_losses_S
from finetune.train.ranks import ALONE, Ranks, deal


class EvaluationStopped(Exception):
    """A signal came between two passes of an evaluation."""


def mean_loss(  # noqa: PLR0913 - how a pass is laid out, by whom, and what ends it
    model: torch.nn.Module,
    examples: Sequence[Example],
    *,
    tokens_per_pass: int,
    share_prefixes: bool = False,
    ranks: Ranks = ALONE,
    stopping: Callable[[], bool] = lambda: False,
) -> float:
    """Mean cross entropy in nats over all supervised tokens of the examples, without gradients; the ranks share them.

    Raises:
        EvaluationStopped: `stopping` answered True between two passes.
    """
    share = deal([example.tokens for example in examples], count=ranks.count)[ranks.rank]
    sums = sum_losses(
        model,
        [examples[index] for index in share],
        tokens_per_pass=tokens_per_pass,
        share_prefixes=share_prefixes,
        stopping=stopping,
    )
    total = torch.tensor([math.fsum(sums)], dtype=torch.float64)
    ranks.sum_(total)
    return total.item() / sum(example.supervised_tokens for example in examples)


def sum_losses(
    model: torch.nn.Module,
    examples: Sequence[Example],
    *,
    tokens_per_pass: int,
    share_prefixes: bool = False,
    stopping: Callable[[], bool] = lambda: False,
) -> list[float]:
    """Per example the sum of its supervised tokens' cross entropies in nats, without gradients, in evaluation mode."""
    sums = [0.0] * len(examples)
    device = next(model.parameters()).device
    with evaluating(model):
        for members in cut_into_passes([e.tokens for e in examples], tokens_per_pass=tokens_per_pass):
            if stopping():
                raise EvaluationStopped
            chosen = [examples[index] for index in members]
            losses = stretch_losses_S(model, lay_end_to_end(chosen, device=device, share_prefixes=share_prefixes))
            pieces = losses.split([example.supervised_tokens for example in chosen])
            for index, piece in zip(members, pieces, strict=True):
                sums[index] = piece.double().sum().item()
    return sums


@contextmanager
def evaluating(model: torch.nn.Module) -> Iterator[None]:
    """Without gradients and dropout, and afterwards as it was."""
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        model.train(was_training)


def autocast(device: str, dtype: str) -> AbstractContextManager:
    """The precision training computes in: bfloat16 or float16 products, or everything in float32."""
    return torch.autocast(device, dtype=getattr(torch, dtype), enabled=dtype != "float32")
