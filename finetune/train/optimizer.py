"""What is done to all gradients of a step at once: an adapter has hundreds of small ones, and each call costs."""

from __future__ import annotations

from collections.abc import Sequence

import torch


def clip_gradients_(parameters: Sequence[torch.nn.Parameter], *, largest: float) -> torch.Tensor:
    """The norm of all gradients together, float32 and before clipping; the gradients are scaled down to `largest`.

    The same as torch.nn.utils.clip_grad_norm_, which asks each tensor for its own norm and multiplies all of them even
    where nothing is to be clipped.
    """
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    if not gradients:
        return torch.zeros(())
    norm = torch.linalg.vector_norm(torch.cat([gradient.flatten() for gradient in gradients]))
    factor = largest / (norm + 1e-6)
    if factor < 1:
        for gradient in gradients:
            gradient.mul_(factor)
    return norm


def forget_gradients(parameters: Sequence[torch.nn.Parameter]) -> None:
    """Every gradient is gone, its memory free."""
    for parameter in parameters:
        parameter.grad = None
