"""Adapters that start at the base's own directions: a LoRA of twice the rank, one half trained, one half held fixed.

PiSSA (arXiv:2404.02948) and OLoRA (arXiv:2406.01775) start at matrices A0, B0 taken from the weight W, and take s*B0*A0
out of W, so that step 0 is the base. Here W stays what it is (it may be stored in 4 bits, and is what a release is
proven against): the adapter computes W + s*B*A - s*B0*A0, with [A, A0] and [B, -B0] each as one matrix of twice the
rank. The trained half is the same as in the papers, step 0 is the base to the last rounding of a sum, and what is
saved is an ordinary LoRA that merges like any other.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from peft import PeftModel
from peft.tuners.lora import LoraLayer

from finetune.model.delta import quantized_weights

Pair = tuple[torch.Tensor, torch.Tensor]
ITERATIONS = 16  # of the randomised decomposition: PiSSA, section 4, finds no difference to the exact one from 16 on


def start_from_base(tuned: PeftModel, start: str) -> None:
    """Set both halves of every pair of matrices; gradients reach the first half only."""
    for layer, weight_OI in _adapted_linears(tuned):
        a_RI, b_OR = layer.lora_A["default"].weight, layer.lora_B["default"].weight
        rank = a_RI.shape[0] // 2
        a0_RI, b0_OR = STARTS[start](weight_OI.float(), rank, layer.scaling["default"])
        with torch.no_grad():
            a_RI.copy_(torch.cat([a0_RI, a0_RI]))
            b_OR.copy_(torch.cat([b0_OR, -b0_OR], dim=1))
    hold_second_half(tuned)


def hold_second_half(tuned: torch.nn.Module) -> None:
    """No gradient for the second half of every pair: its optimizer moments stay zero, and so does its update."""
    for layer in tuned.modules():
        if isinstance(layer, LoraLayer) and "default" in layer.lora_A:
            for matrices, dim in ((layer.lora_A, 0), (layer.lora_B, 1)):
                weight: Any = matrices["default"].weight
                weight.register_hook(partial(_first_half, dim=dim))


def _first_half(grad: torch.Tensor, *, dim: int) -> torch.Tensor:
    kept = grad.clone()
    kept.narrow(dim, grad.shape[dim] // 2, grad.shape[dim] // 2).zero_()
    return kept


def _principal(weight_OI: torch.Tensor, rank: int, scale: float) -> Pair:
    """The largest singular directions, with the roots of their values: s * B0 @ A0 is the nearest of its rank to W."""
    wide = min(2 * rank + 8, *weight_OI.shape)
    u_OR, values_R, v_IR = torch.svd_lowrank(weight_OI, q=wide, niter=ITERATIONS)
    roots_R = (values_R[:rank] / scale).sqrt()
    return roots_R[:, None] * v_IR[:, :rank].T, u_OR[:, :rank] * roots_R


def _orthonormal(weight_OI: torch.Tensor, rank: int, scale: float) -> Pair:
    """The first rows of R and columns of Q in W = Q @ R, as they are (PEFT tuners/lora/layer.py, olora_init)."""
    q_OK, r_KI = torch.linalg.qr(weight_OI)
    return r_KI[:rank], q_OK[:, :rank]


STARTS: dict[str, Callable[[torch.Tensor, int, float], Pair]] = {"pissa": _principal, "olora": _orthonormal}


def _adapted_linears(tuned: PeftModel) -> Iterator[tuple[Any, torch.Tensor]]:
    """Each adapted linear with the weight [out, in] that it computes with."""
    layers = {
        path.removeprefix("base_model.model."): module
        for path, module in tuned.named_modules()
        if isinstance(module, LoraLayer) and "default" in module.lora_A
    }
    for path, weight in quantized_weights(tuned):
        if path in layers:
            yield layers.pop(path), weight
    for layer in layers.values():
        plain: Any = layer.get_base_layer()
        yield layer, plain.weight.data
