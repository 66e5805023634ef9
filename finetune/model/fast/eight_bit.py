"""Frozen weights in 8 bits: a weight [O, I] in; its products x W^T and dy W, each by numbers of 8 bits, out.

The weight is rounded once, with a scale for each output, and its transpose with a scale for each input; the rows of x
and of dy are rounded while they are multiplied, with a scale for each row (Dettmers et al. 2022, LLM.int8(), section 3,
vector-wise). int8 by oneDNN on a CPU, float8 e4m3 by cuBLAS on a GPU. Both lose some of what bfloat16 keeps, so that
nobody gets them without asking (model.compute), and a run compares loss and gradients with the exact products before
its first step (finetune/train/parity.py).

The second linear of a gated MLP goes forward exactly: its rows are products of two activations, with a few numbers so
large that one scale for the row leaves little of the others; rounded alone, it turns the gradients most. Back through
it 8 bits do no harm.
"""

# T = tokens, I = inputs, O = outputs.

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import torch

from finetune.model.fast.kernels import load_kernels

INT8_LARGEST = 127.0
ZERO = 128  # what oneDNN's unsigned activations take off
FLOAT8 = torch.float8_e4m3fn
FLOAT8_LARGEST = torch.finfo(FLOAT8).max
SMALLEST_SCALE = 1e-30  # of rows of zeros


class Matrix(Protocol):
    """A matrix [O, I] that rows [T, I] are multiplied by."""

    @property
    def nbytes(self) -> int: ...

    def product(self, x_TI: torch.Tensor) -> torch.Tensor:
        """About x W^T, bfloat16 [T, O]."""
        ...


@dataclass(frozen=True)
class EightBit:
    """A frozen weight (weights.FrozenWeight), as two matrices in 8 bits; or forward as another holds it, exactly."""

    for_forward: Matrix | None
    for_backward: Matrix
    bias_O: torch.Tensor | None
    kept_bytes: int
    exact: Any = None  # a FrozenWeight, where forward is exact

    @classmethod
    def of(cls, weight_OI: torch.Tensor, bias_O: torch.Tensor | None, kind: str, *, exact: Any = None) -> EightBit:
        matrix = MATRICES[kind]
        forward, backward = None if exact else matrix(weight_OI), matrix(weight_OI.t().contiguous())
        kept_bytes = backward.nbytes + (forward.nbytes if forward else exact.kept_bytes)
        return cls(forward, backward, bias_O, kept_bytes, exact)

    def forward(self, x_TI: torch.Tensor) -> torch.Tensor:
        y_TO: torch.Tensor
        if self.for_forward is None:
            y_TO = self.exact.forward(x_TI)
            return y_TO
        y_TO = self.for_forward.product(x_TI)
        return y_TO if self.bias_O is None else y_TO.add_(self.bias_O)

    def backward(self, dy_TO: torch.Tensor) -> torch.Tensor:
        return self.for_backward.product(dy_TO)


class Int8:
    """By oneDNN, which multiplies uint8 rows and int8 weights into int32 sums and rounds these to bfloat16."""

    def __init__(self, weight_OI: torch.Tensor) -> None:
        wide_OI = weight_OI.float()
        self.scale_O = (wide_OI.abs().amax(-1) / INT8_LARGEST).clamp_(min=SMALLEST_SCALE)
        whole_OI = (wide_OI / self.scale_O[:, None]).round_().to(torch.int8)
        self.packed = torch.ops.onednn.qlinear_prepack(whole_OI, None)
        self.zeros_O = torch.zeros(len(weight_OI), dtype=torch.int64)
        self.nbytes = whole_OI.nbytes

    def product(self, x_TI: torch.Tensor) -> torch.Tensor:
        whole_TI, scale_T = load_kernels().eight_bits(x_TI)
        weight = (self.packed, self.scale_O, self.zeros_O)
        y_TO = torch.ops.onednn.qlinear_pointwise(
            whole_TI, 1.0, ZERO, *weight, None, 1.0, 0, torch.bfloat16, "none", [], ""
        )
        return load_kernels().times_rows_(y_TO, scale_T)


class Float8:
    """By cuBLAS, from GPUs of compute capability 8.9 on, where both sizes are multiples of 16."""

    def __init__(self, weight_OI: torch.Tensor) -> None:
        self.weight_OI, self.scale_O = _float8_rows(weight_OI)
        self.nbytes = self.weight_OI.nbytes

    def product(self, x_TI: torch.Tensor) -> torch.Tensor:
        rounded_TI, scale_T = _float8_rows(x_TI)
        y_TO: torch.Tensor = torch._scaled_mm(
            rounded_TI,
            self.weight_OI.t(),
            scale_a=scale_T[:, None],
            scale_b=self.scale_O[None],
            out_dtype=torch.bfloat16,
        )
        return y_TO


MATRICES: dict[str, Any] = {"int8": Int8, "fp8": Float8}


def _float8_rows(x_TI: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """x about rounded * scale, a scale for each row, float32; NaN and infinity make their row NaN."""
    scale_T = (x_TI.abs().amax(-1).float() / FLOAT8_LARGEST).clamp_(min=SMALLEST_SCALE)
    return (x_TI / scale_T[:, None]).to(FLOAT8), scale_T
