"""What it takes to begin a step again in a lighter layout: random numbers put back, memory free, layers recomputed."""

from __future__ import annotations

import torch
from transformers import PreTrainedModel

from finetune.machine import return_freed_memory


def random_state(device: torch.device) -> tuple[torch.Tensor, ...]:
    """Where torch's generators are that a pass draws from: the CPU's and the device's own."""
    return (torch.get_rng_state(), *([torch.cuda.get_rng_state(device)] if device.type == "cuda" else []))


def set_random_state(device: torch.device, state: tuple[torch.Tensor, ...]) -> None:
    """Put them back."""
    torch.set_rng_state(state[0])
    if device.type == "cuda":
        torch.cuda.set_rng_state(state[1], device)


def free_memory(device: torch.device) -> None:
    """Give back what a pass that was broken off has left, so that pieces of another size fit."""
    if device.type == "cuda":
        torch.cuda.empty_cache()
    return_freed_memory()


def recompute_layers(model: torch.nn.Module, *, on: bool) -> None:
    """Whether a layer's tensors are kept for the gradients or computed again, as train.recompute says it."""
    base = next(module for module in model.modules() if isinstance(module, PreTrainedModel))
    # The newer name is that of transformers 5.20 and later (transformers/modeling_utils.py).
    kind = "activation" if hasattr(base, "activation_checkpointing_enable") else "gradient"
    getattr(base, f"{kind}_checkpointing_{'enable' if on else 'disable'}")()
