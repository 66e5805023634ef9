"""Faster frozen linears with LoRA: a PEFT model in; the same model, its linears computed by our own products, out.

y = x W^T + bias + s (x A^T) B^T. PEFT computes it with several more passes over tensors of y's size, one a clone, and
bitsandbytes dequantises a 4-bit weight for each product. Here each linear is one autograd function that adds in
place, saves x and the narrow x A^T for backward, and multiplies by weights dequantised once (weights.py), by A and B in
products made for their shapes (thin.py). Only `forward` of the model's own modules is replaced: parameters, their
names, and what PEFT does with them stay. Whatever PEFT is asked for beside one plain adapter goes to the library's own
forward, call by call.

q, k, v share x, and so do gate and up, yet nothing is computed for several at once: on the CPU measured, one product
over joined weights is no faster than one each, and joining the A of q, k, v would save less than 1 % of their time.
"""

# T = tokens, I = inputs, O = outputs, R = rank; A is [R, I], B is [O, R], W is [O, I].

from __future__ import annotations

from typing import Any

import torch
from peft.tuners.lora import LoraLayer
from peft.tuners.lora.layer import Linear as LoraLinear
from peft.tuners.tuners_utils import BaseTunerLayer
from torch.autograd.function import once_differentiable

from finetune.model.fast import thin
from finetune.model.fast.swapped import Swapped
from finetune.model.fast.weights import (
    EXACT,
    CurrentWeight,
    FrozenWeight,
    bytes_to_keep,
    compute_dtype,
    is_4bit,
    why_not,
)
from finetune.plan_cost import EXACT_FORWARD

HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


def swap_linears(model: torch.nn.Module, *, keep: bool = True, pack: bool = True, compute: str = EXACT) -> Swapped:
    """Compute the model's LoRA linears, and its 4-bit linears without LoRA, by our own products, from now on.

    `keep` holds dequantised weights for as long as the model lives; else they are dequantised for each product.
    `pack` holds kept weights in oneDNN's two layouts, where the CPU has products for them;
    bytes_kept says beforehand how many bytes that is. Neither changes a value. `compute`, int8 or fp8, multiplies by
    weights and rows in 8 bits while a module is in training mode; what is evaluated is exact.
    """
    ours, left = _sorted_out(model)
    kept_bytes = 0
    for name, (module, linear) in ours.items():
        own = OwnForward(module, linear, keep=keep, pack=pack, **_in_8_bits(name, compute))
        kept_bytes += own.weight.get().kept_bytes
        module.forward = own.forward
    return Swapped(len(ours), kept_bytes, left)


def bytes_kept(model: torch.nn.Module, *, keep: bool = True, pack: bool = True, compute: str = EXACT) -> int:
    """What swap_linears would hold in memory beside the model."""
    ours, _ = _sorted_out(model)
    return sum(
        bytes_to_keep(linear, keep=keep, pack=pack, **_in_8_bits(name, compute)) for name, (_, linear) in ours.items()
    )


def _in_8_bits(path: str, compute: str) -> dict[str, Any]:
    """How freeze() is to hold the linear of this path."""
    return {} if compute == EXACT else {"compute": compute, "exact_forward": path.endswith(EXACT_FORWARD)}


def why_left(layer: Any) -> str | None:
    """Why the library computes this layer of an adapter; None where we can."""
    kind = type(layer).__name__
    known = isinstance(layer, LoraLayer) and (type(layer) is LoraLinear or kind == "Linear4bit")
    if not known:
        return f"the adapter's layers are {kind}"
    if len(layer.active_adapters) != 1 or layer.active_adapters[0] not in layer.lora_A:
        return "not one active adapter"
    name, linear = layer.active_adapters[0], layer.base_layer
    if name in layer.lora_variant:
        return f"the LoRA is a {type(layer.lora_variant[name]).__name__.removesuffix('LinearVariant')}"
    if layer.lora_bias[name] or layer.fan_in_fan_out:
        return "lora_bias" if layer.lora_bias[name] else "fan_in_fan_out"
    if not isinstance(layer.lora_dropout[name], torch.nn.Identity):
        return "dropout"
    if any(getattr(part, hooks) for part in (linear, layer.lora_A[name], layer.lora_B[name]) for hooks in HOOKS):
        return "hooks on its parts"
    return why_not(linear)


class OwnForward:
    """What replaces the forward of one module: `module` is a LoRA layer over the frozen `linear`, or that itself."""

    def __init__(self, module: Any, linear: Any, *, keep: bool, pack: bool, **in_8_bits: Any) -> None:
        self.module = module
        self.linear = linear
        self.weight = CurrentWeight(linear, keep=keep, pack=pack, **in_8_bits)
        # A second form would be held for evaluations only: they dequantise for each product.
        self.evaluated = CurrentWeight(linear, keep=False, pack=False) if in_8_bits else self.weight
        self._plain_adapters: list[str] | None = None  # those that why_left was asked about, and found nothing

    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        """y [..., O] of x [..., I], in x's dtype."""
        if args or kwargs or not self._is_plain(x):
            return type(self.module).forward(self.module, x, *args, **kwargs)  # type: ignore[no-any-return]
        y: torch.Tensor
        weight = (self.weight if self.module.training else self.evaluated).get()
        if self.module is self.linear:
            y = FrozenProduct.apply(x, weight)
            return y
        (name,) = self.module.active_adapters
        a_RI, b_OR = self.module.lora_A[name].weight, self.module.lora_B[name].weight
        y = LoraProduct.apply(x, a_RI, b_OR, self.module.scaling[name], weight)
        return y

    def _is_plain(self, x: torch.Tensor) -> bool:
        """Whether this call is the plain case: one adapter, not merged, in the dtype the weight is kept in."""
        device, module = x.device.type, self.module
        if x.dtype is not compute_dtype(self.linear) or not x.numel():
            return False
        if torch.is_autocast_enabled(device) and torch.get_autocast_dtype(device) is not x.dtype:
            return False
        if module is self.linear:
            return True
        if module.merged:
            self.weight.forget()  # PEFT added the adapter to the weight in place, and will subtract it again
            return False
        if self._plain_adapters != module.active_adapters and why_left(module) is None:
            self._plain_adapters = list(module.active_adapters)
        return not module.disable_adapters and self._plain_adapters == module.active_adapters


class FrozenProduct(torch.autograd.Function):
    """x W^T + bias, of which only x learns anything; nothing is saved."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: FrozenWeight) -> torch.Tensor:
        ctx.weight = weight
        return _shaped_like(x, weight.forward(_rows(x)))

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, dy: torch.Tensor) -> tuple[torch.Tensor, None]:
        dx = ctx.weight.backward(_rows(dy))
        return dx.view(*dy.shape[:-1], -1), None


class LoraProduct(torch.autograd.Function):
    """x W^T + bias + s (x A^T) B^T for frozen W and bias. Products are in x's dtype, and sum in float32."""

    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        a_RI: torch.Tensor,
        b_OR: torch.Tensor,
        scale: float,
        weight: FrozenWeight,
    ) -> torch.Tensor:
        x_TI = _rows(x)
        y_TO = weight.forward(x_TI)
        t_TR = thin.product(x_TI, a_RI.t())
        thin.add_product_(y_TO, t_TR, b_OR, scale=scale)
        ctx.weight, ctx.scale = weight, scale
        _, learns_a, learns_b, *_ = ctx.needs_input_grad
        ctx.save_for_backward(x if learns_a else None, t_TR if learns_b else None, a_RI, b_OR)
        return _shaped_like(x, y_TO)

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, dy: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x, t_TR, a_RI, b_OR = ctx.saved_tensors
        learns_x, learns_a, learns_b, *_ = ctx.needs_input_grad
        dx = da_RI = db_OR = None
        dy_TO = _rows(dy)
        if learns_b:
            db_OR = thin.gradient(dy_TO, t_TR, b_OR, scale=ctx.scale)
        if learns_a or learns_x:
            dt_TR = thin.product(dy_TO, b_OR, scale=ctx.scale)
        if learns_a:
            da_RI = thin.gradient(_rows(x), dt_TR, a_RI.t()).t()
        if learns_x:
            dx = thin.add_product_(ctx.weight.backward(dy_TO), dt_TR, a_RI.t()).view(*dy.shape[:-1], -1)
        return dx, da_RI, db_OR, None, None


def _sorted_out(model: torch.nn.Module) -> tuple[dict[str, tuple[Any, Any]], dict[str, str]]:
    """Modules we compute, each with its frozen linear, and adapter layers left to the library with the reason."""
    ours: dict[str, tuple[Any, Any]] = {}
    left: dict[str, str] = {}
    for name, module in model.named_modules():
        if not isinstance(module, BaseTunerLayer):
            continue
        reason = "its forward is replaced already" if "forward" in vars(module) else why_left(module)
        if reason is None:
            ours[name] = (module, module.get_base_layer())
        else:
            left[name] = reason
    taken = {linear for _, linear in ours.values()}
    for name, module in model.named_modules():
        if is_4bit(module) and module not in taken and "forward" not in vars(module) and why_not(module) is None:
            ours[name] = (module, module)
    return ours, left


def _rows(x: torch.Tensor) -> torch.Tensor:
    """[..., N] as [T, N] in rows."""
    return x.reshape(-1, x.shape[-1]).contiguous()


def _shaped_like(x: torch.Tensor, y_TO: torch.Tensor) -> torch.Tensor:
    """[T, O] as [..., O]; no view for autograd, so that the model may add to it in place (Llama 4's experts do)."""
    y: torch.Tensor = torch.ops.aten._unsafe_view(y_TO, [*x.shape[:-1], y_TO.shape[-1]])
    return y
