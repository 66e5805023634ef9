"""A frozen linear's weight as products want it: a linear in; x W^T and dy W, and the bytes kept for them, out.

Four ways, all with the same values: the linear's own tensor; a 4-bit weight dequantised once and kept; either of them
packed for oneDNN, once for each of the two products, which saves the repacking inside every product; a 4-bit weight
dequantised for each product. And, where it was asked for, in 8 bits, with about the same values (eight_bit.py).
"""

# T = tokens, I = inputs, O = outputs; a weight is [O, I].

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch.nn import functional

from finetune.model.fast.eight_bit import EightBit

EXACT = "auto"  # of model.compute: products of the weight's own values
FLOATS = (torch.float32, torch.bfloat16, torch.float16)


class FrozenWeight(Protocol):
    """W and bias of one linear, as its two products; `kept_bytes` is what it holds beside the linear's parameters."""

    @property
    def kept_bytes(self) -> int: ...

    def forward(self, x_TI: torch.Tensor) -> torch.Tensor:
        """x W^T + bias, [T, O]."""
        ...

    def backward(self, dy_TO: torch.Tensor) -> torch.Tensor:
        """dy W, [T, I]."""
        ...


def is_4bit(linear: torch.nn.Module) -> bool:
    """Whether this is bitsandbytes' own 4-bit linear (which is loaded wherever such a linear exists)."""
    if type(linear).__name__ != "Linear4bit":
        return False
    from bitsandbytes.nn.modules import Linear4bit

    return type(linear) is Linear4bit


def compute_dtype(linear: Any) -> torch.dtype:
    """The dtype this linear multiplies in, where its input has it, too."""
    if not is_4bit(linear):
        return linear.weight.dtype
    return linear.compute_dtype or linear.weight.quant_state.dtype


def why_not(linear: Any) -> str | None:
    """Why the library has to compute this linear; None where we can."""
    if not is_4bit(linear):
        if type(linear) is not torch.nn.Linear:
            return f"the base's class is {type(linear).__name__}"
        if linear.weight.dtype not in FLOATS:
            return f"the base's dtype is {linear.weight.dtype}"
    elif getattr(linear.weight, "quant_state", None) is None:
        return "not quantised yet"
    elif getattr(linear.weight.quant_state, "packing_format_for_cpu", False):
        return "packed by bitsandbytes for inference"
    if linear.weight.device.type == "meta":
        return "not loaded"
    if any(parameter.requires_grad for parameter in linear.parameters()):
        return "the base is trained"
    return None


def can_pack(linear: Any) -> bool:
    """Whether oneDNN multiplies this linear's weights on this CPU in its own layout."""
    return (
        linear.weight.device.type == "cpu"
        and compute_dtype(linear) is torch.bfloat16
        and torch.backends.mkldnn.is_available()
        and torch.ops.mkldnn._is_mkldnn_bf16_supported()
    )


def bytes_to_keep(linear: Any, *, keep: bool, pack: bool, compute: str = EXACT, exact_forward: bool = False) -> int:
    """What freeze() will hold beside the linear's own parameter."""
    once = int(linear.in_features * linear.out_features * compute_dtype(linear).itemsize)
    if compute != EXACT:
        held = once if (pack and can_pack(linear)) or is_4bit(linear) else 0
        return once // 2 + (held if exact_forward else once // 2)
    if not keep:
        return 0
    if pack and can_pack(linear):
        return 2 * once
    return once if is_4bit(linear) else 0


def freeze(linear: Any, *, keep: bool, pack: bool, compute: str = EXACT, exact_forward: bool = False) -> FrozenWeight:
    """The weight of one linear, ready for its products; `pack` asks for oneDNN's layout where that is possible.

    Without `keep` a 4-bit weight is dequantised for each product, and no weight is packed. In 8 bits (`compute` is int8
    or fp8) it is kept in any case; with `exact_forward` only the product back is one of 8 bits.
    """
    bias_O = None if linear.bias is None else linear.bias.detach().to(compute_dtype(linear))
    if compute == EXACT and is_4bit(linear) and not keep:
        return Dequantised(linear, bias_O)
    weight_OI = dequantise(linear) if is_4bit(linear) else linear.weight.detach()
    if compute != EXACT and not exact_forward:
        return EightBit.of(weight_OI, bias_O, compute)
    if compute != EXACT:
        packs = pack and can_pack(linear)
        plain = Plain(weight_OI, bias_O, kept_bytes=weight_OI.nbytes if is_4bit(linear) else 0)
        exact = PackedForward.of(weight_OI, bias_O) if packs else plain
        return EightBit.of(weight_OI, bias_O, compute, exact=exact)
    if keep and pack and can_pack(linear):
        return Packed.of(weight_OI, bias_O)
    return Plain(weight_OI, bias_O, kept_bytes=weight_OI.nbytes if is_4bit(linear) else 0)


class CurrentWeight:
    """The weight of one linear, as freeze() makes it; made anew where somebody changed it: a merge, a load, a move."""

    def __init__(self, linear: Any, **how: Any) -> None:
        self.linear, self.how = linear, how  # as freeze() takes it
        self._frozen: FrozenWeight | None = None
        self._made_from: tuple[Any, int, int] | None = None

    def get(self) -> FrozenWeight:
        parameter = self.linear.weight
        source = (parameter, parameter._version, parameter.data_ptr())
        old = self._made_from
        if self._frozen is None or old is None or old[0] is not parameter or old[1:] != source[1:]:
            assert not parameter.requires_grad, "a weight that learns has a gradient, which no product here computes"
            self._frozen = None  # before the new one takes its memory
            self._frozen = freeze(self.linear, **self.how)
            self._made_from = source
        return self._frozen

    def forget(self) -> None:
        """Free what is kept."""
        self._frozen = None

    def __getstate__(self) -> dict[str, Any]:
        """All but the weight, which a copy of the model makes anew: packed tensors cannot be copied."""
        return {**vars(self), "_frozen": None, "_made_from": None}


@dataclass(frozen=True)
class Plain:
    """A weight [O, I] in rows."""

    weight_OI: torch.Tensor
    bias_O: torch.Tensor | None
    kept_bytes: int

    def forward(self, x_TI: torch.Tensor) -> torch.Tensor:
        return functional.linear(x_TI, self.weight_OI, self.bias_O)

    def backward(self, dy_TO: torch.Tensor) -> torch.Tensor:
        return torch.mm(dy_TO, self.weight_OI)


@dataclass(frozen=True)
class Packed:
    """A weight in the layout oneDNN multiplies fastest by, once for each product: opaque tensors."""

    for_forward: torch.Tensor
    for_backward: torch.Tensor
    bias_O: torch.Tensor | None
    kept_bytes: int

    @classmethod
    def of(cls, weight_OI: torch.Tensor, bias_O: torch.Tensor | None) -> Packed:
        pack = torch.ops.mkldnn._reorder_linear_weight
        return cls(pack(weight_OI, None), pack(weight_OI.t().contiguous(), None), bias_O, 2 * weight_OI.nbytes)

    def forward(self, x_TI: torch.Tensor) -> torch.Tensor:
        return _multiply_packed(x_TI, self.for_forward, self.bias_O)

    def backward(self, dy_TO: torch.Tensor) -> torch.Tensor:
        return _multiply_packed(dy_TO, self.for_backward, None)


@dataclass(frozen=True)
class PackedForward:
    """The first of these two layouts alone."""

    for_forward: torch.Tensor
    bias_O: torch.Tensor | None
    kept_bytes: int

    @classmethod
    def of(cls, weight_OI: torch.Tensor, bias_O: torch.Tensor | None) -> PackedForward:
        return cls(torch.ops.mkldnn._reorder_linear_weight(weight_OI, None), bias_O, weight_OI.nbytes)

    def forward(self, x_TI: torch.Tensor) -> torch.Tensor:
        return _multiply_packed(x_TI, self.for_forward, self.bias_O)


@dataclass(frozen=True)
class Dequantised:
    """A 4-bit weight, dequantised for each product and freed with it, so that the next one takes its memory."""

    linear: Any
    bias_O: torch.Tensor | None
    kept_bytes: int = 0

    def forward(self, x_TI: torch.Tensor) -> torch.Tensor:
        return functional.linear(x_TI, dequantise(self.linear), self.bias_O)

    def backward(self, dy_TO: torch.Tensor) -> torch.Tensor:
        return torch.mm(dy_TO, dequantise(self.linear))


def dequantise(linear: Any) -> torch.Tensor:
    """The values of a 4-bit weight [O, I] in the linear's compute dtype, as bitsandbytes' own forward takes them."""
    import bitsandbytes.functional as bnb

    state = linear.weight.quant_state
    if state.dtype is not compute_dtype(linear):
        state = copy.copy(state)
        state.dtype = compute_dtype(linear)
    weight_OI: torch.Tensor = bnb.dequantize_4bit(linear.weight.detach(), state)
    return weight_OI


def _multiply_packed(x_TI: torch.Tensor, packed: torch.Tensor, bias_O: torch.Tensor | None) -> torch.Tensor:
    y_TO: torch.Tensor = torch.ops.mkldnn._linear_pointwise(x_TI, packed, bias_O, "none", [], "")
    return y_TO
