"""Swap our own code into a model: names of pieces in; how many modules each took, and what it left to the library, out.

Only modules of this one model are replaced, never a library's code; the adapter's parameters and their names stay.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from finetune.model.attention import swap_attention
from finetune.model.fast.attention import compiled
from finetune.model.fast.head import swap_head
from finetune.model.fast.kernels import load_kernels
from finetune.model.fast.layers import swap_layers
from finetune.model.fast.linears import swap_linears
from finetune.model.fast.swapped import Swapped
from finetune.model.fast.weights import EXACT

Swap = Callable[[torch.nn.Module, Sequence[str], str], Swapped]

# What is swapped in, in this order, given all names and model.compute. `weights` says how linears and head hold theirs;
# `prefix` is a matter of how a pass is laid out (finetune/train/stretch.py).
PIECES: dict[str, Swap] = {
    "attention": lambda model, names, compute: swap_attention(model),
    "linears": lambda model, names, compute: swap_linears(model, keep="weights" in names, compute=compute),
    "layers": lambda model, names, compute: swap_layers(model),
    "head": lambda model, names, compute: swap_head(model, keep="weights" in names),
}


def speed_up(model: torch.nn.Module, names: Sequence[str], *, compute: str = EXACT) -> dict[str, Swapped]:
    """The pieces by name, swapped into `model` in place; an unknown name of a plan is no piece.

    `compute` is model.compute: in how many bits linears multiply by the frozen weights.
    """
    return {name: swap(model, names, compute) for name, swap in PIECES.items() if name in names}


def left_told(swapped: Mapping[str, Swapped]) -> list[str]:
    """One line for each piece that left modules to the library, with the reasons."""
    return [f"{name}: {_modules(each)} the library's ({_reasons(each)})" for name, each in swapped.items() if each.left]


def record(swapped: Mapping[str, Swapped]) -> dict[str, Any]:
    """What decides how a pass is computed, in plain JSON values: the counts by piece and reason, and the kernels."""
    return {
        "pieces": {name: {"swapped": each.count, "left": dict(_counts(each))} for name, each in swapped.items()},
        "kernels": kernels_told() if swapped else {},
    }


def kernels_told() -> dict[str, str]:
    """The compiled code by the names of its files, which follow source, compiler and CPU; or why torch computes."""
    kernels = load_kernels()
    found = {"kernels": kernels.library or kernels.reason, "attention": compiled()}
    return {
        name: f"torch ({each})" if isinstance(each, str) else f"compiled {Path(each._name).stem}"
        for name, each in found.items()
    }


def _modules(piece: Swapped) -> str:
    return "1 module stays" if len(piece.left) == 1 else f"{len(piece.left)} modules stay"


def _reasons(piece: Swapped) -> str:
    counts = _counts(piece)
    return (
        next(iter(counts)) if len(counts) == 1 else ", ".join(f"{count} {reason}" for reason, count in counts.items())
    )


def _counts(piece: Swapped) -> Counter[str]:
    return Counter(sorted(piece.left.values()))
