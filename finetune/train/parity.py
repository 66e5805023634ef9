"""Products in 8 bits beside exact ones, before the first step: a trainer in; how near they are, or a refusal, out."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from finetune.data.examples import Example
from finetune.errors import NumericsError, Problem
from finetune.train.loss import lay_end_to_end, stretch_losses_S
from finetune.train.optimizer import forget_gradients
from finetune.train.trainer import StepTrainer

# Of the exact loss, and of all gradients of the adapter as one vector. Where a base is asked for what it does not know
# yet, small errors grow, and it trains as well nevertheless (the embedded base: benchmarks/eight_bits.py); one whose
# rows 8 bits cannot hold is far from both.
FARTHEST_LOSS, SMALLEST_COSINE = 0.02, 0.9
ROWS, TOKENS = 16, 1024  # which are compared: the shortest of the first


def compare_with_exact(trainer: StepTrainer) -> str:
    """Loss and gradients of a few rows in 8 bits beside those of exact products, in words.

    A module in evaluation mode multiplies exactly (finetune/model/fast/linears.py).

    Raises:
        NumericsError: they are too far from each other to be called the same training.
    """
    rows = _few_rows(trainer.examples)
    in_8_bits, gradient = _loss_and_gradient(trainer, rows)
    trainer.adapted_model.eval()
    exact, exact_gradient = _loss_and_gradient(trainer, rows)
    trainer.adapted_model.train()
    cosine = torch.nn.functional.cosine_similarity(gradient, exact_gradient, dim=0).item()
    told = f"loss {in_8_bits:.4f} ({exact:.4f} exactly), gradients at a cosine of {cosine:.5f}"
    if are_near(in_8_bits, exact, cosine):
        return f"in {trainer.plan.compute} {told}"
    message = (
        f"{trainer.plan.compute} is too coarse for this base: {told}; at most {FARTHEST_LOSS:.1%} of the loss and a "
    )
    message += f"cosine of at least {SMALLEST_COSINE} are allowed; write model.compute: auto"
    error = NumericsError(Problem("model.compute", message))
    trainer.ranks.agree(error if trainer.ranks.is_first else None)
    return told


def are_near(in_8_bits: float, exact: float, cosine: float) -> bool:
    """Whether two losses and the cosine of their gradients are those of the same training; none is where one is NaN."""
    return abs(in_8_bits - exact) <= FARTHEST_LOSS * exact and cosine >= SMALLEST_COSINE


def _few_rows(examples: Sequence[Example]) -> list[Example]:
    """Short ones, at least one: the exact pass keeps everything, also where passes are recomputed."""
    shortest = sorted((examples[index] for index in range(min(ROWS, len(examples)))), key=lambda row: row.tokens)
    chosen = shortest[:1]
    for row in shortest[1:]:
        if sum(each.tokens for each in chosen) + row.tokens <= TOKENS:
            chosen.append(row)
    return chosen


def _loss_and_gradient(trainer: StepTrainer, rows: Sequence[Example]) -> tuple[float, torch.Tensor]:
    """Nats per token, and all gradients of the adapter end to end."""
    forget_gradients(trainer._trainable)
    with trainer.compute_loss_context_manager():
        loss = stretch_losses_S(trainer.adapted_model, lay_end_to_end(rows, device=trainer.args.device)).mean()
    loss.backward()
    gradients = [torch.zeros_like(p) if p.grad is None else p.grad.clone() for p in trainer._trainable]
    forget_gradients(trainer._trainable)
    return loss.item(), torch.cat([gradient.flatten().double() for gradient in gradients])
