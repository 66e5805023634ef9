"""Row-wise pieces of a layer, tensors in and tensors out: compiled C where there is a compiler, torch elsewhere."""

from __future__ import annotations

import ctypes
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache

import torch
import torch.nn.functional as F

from finetune.model.fast.native import Unavailable, load_library

# R = rows, N = numbers of a row, T = tokens, H = heads, D = head size, P = positions, V = vocabulary

# Arguments of kernels.c: p a pointer, n an int64 size, f a float, i an int, t a Thin; all return nothing.
_SIGNATURES = {
    "rms_norm": "ppppnnfii",
    "rms_norm_gradient": "pppppnnii",
    "rotate": "pnnppnpnnniii",
    "gated": "pppniii",
    "gated_gradient": "pppppniii",
    "cross_entropy": "ppppnnffii",
    "eight_bits": "pppnnii",
    "times_rows": "ppnnii",
}
_THIN = dict.fromkeys(("thin_product", "thin_addition", "thin_gradient"), "ptppni")


class Thin(ctypes.Structure):
    """A float32 matrix [width, rank] in any strides, and what it is multiplied by."""

    _fields_ = (
        ("data", ctypes.c_void_p),
        *((name, ctypes.c_int64) for name in ("along_width", "along_rank", "width", "rank")),
        ("scale", ctypes.c_float),
    )


_TYPES = {"p": ctypes.c_void_p, "n": ctypes.c_int64, "f": ctypes.c_float, "i": ctypes.c_int, "t": Thin}
_STORED = {torch.bfloat16: 1, torch.float32: 0}


SMALLEST = 1e-30  # beside which 8 bits tell nothing from 0


@dataclass(frozen=True)
class Kernels:
    """The same functions compiled or not: numbers stored as bfloat16 or float32, computed in float32, rounded once.

    `library` is None where torch computes; `reason` then says why. A function whose name ends in _ writes over its
    first tensor. Compiled code takes contiguous CPU tensors of one dtype; for all others torch computes.
    """

    library: ctypes.CDLL | None = None
    reason: str = ""
    thin: bool = False  # whether the library has a LoRA's products, for which the CPU has to multiply bfloat16

    def rms_norm(self, x_RN: torch.Tensor, weight_N: torch.Tensor, eps: float) -> tuple[torch.Tensor, torch.Tensor]:
        """x / rms(x) * weight, and 1 / rms(x), float32 [R]; the weight is float32."""
        if self._takes(x_RN):
            y_RN, scale_R = torch.empty_like(x_RN), x_RN.new_empty(x_RN.shape[0], dtype=torch.float32)
            self._call("rms_norm", x_RN, _dense(weight_N, x_RN.shape[1]), y_RN, scale_R, *x_RN.shape, eps, stored=x_RN)
            return y_RN, scale_R
        wide_RN = _wide(x_RN)
        scale_R = torch.rsqrt(wide_RN.square().mean(-1) + eps)
        return (wide_RN * scale_R[:, None] * weight_N).to(x_RN.dtype), scale_R

    def rms_norm_gradient(
        self, g_RN: torch.Tensor, x_RN: torch.Tensor, weight_N: torch.Tensor, scale_R: torch.Tensor
    ) -> torch.Tensor:
        """The gradient of x, from the gradient of y and what rms_norm returned."""
        if self._takes(x_RN, g_RN):
            dx_RN = torch.empty_like(x_RN)
            rows, width = x_RN.shape
            vectors = _dense(weight_N, width), _dense(scale_R, rows)
            self._call("rms_norm_gradient", g_RN, x_RN, *vectors, dx_RN, rows, width, stored=x_RN)
            return dx_RN
        wide_RN, scale_R1 = _wide(x_RN), scale_R[:, None]
        weighted_RN = _wide(g_RN) * weight_N
        mean_R1 = (weighted_RN * wide_RN).mean(-1, keepdim=True) * scale_R1.square()
        return ((weighted_RN - wide_RN * mean_R1) * scale_R1).to(x_RN.dtype)

    def rotate(
        self, x_THD: torch.Tensor, cos_PD: torch.Tensor, sin_PD: torch.Tensor, *, back: bool = False
    ) -> torch.Tensor:
        """Rotary embedding x cos + (-x_high, x_low) sin, contiguous; `back` is its gradient, the transpose.

        x's heads and tokens may lie in any order, its last dimension is dense. Token t has position t mod P.
        """
        tokens, heads, size = x_THD.shape
        fits = x_THD.stride(2) == 1 and size == cos_PD.shape[1] and not size % 2 and not tokens % len(cos_PD)
        if fits and self._takes(cos_PD, sin_PD) and (x_THD.dtype, x_THD.device) == (cos_PD.dtype, cos_PD.device):
            y_THD = x_THD.new_empty(x_THD.shape)
            angles, halves, places = (cos_PD, sin_PD, len(cos_PD)), size // 2, x_THD.stride()[:2]
            self._call("rotate", x_THD, *places, *angles, y_THD, tokens, heads, halves, int(back), stored=x_THD)
            return y_THD
        repeats = tokens // len(cos_PD)
        cos_T1D, sin_T1D = (_wide(each).repeat(repeats, 1)[:, None] for each in (cos_PD, sin_PD))
        wide_THD = _wide(x_THD)
        turned_THD = -_half_turn(wide_THD * sin_T1D) if back else _half_turn(wide_THD) * sin_T1D
        return (wide_THD * cos_T1D + turned_THD).to(x_THD.dtype).contiguous()

    def gated(self, gate: torch.Tensor, up: torch.Tensor, *, gelu: bool) -> torch.Tensor:
        """silu(gate) * up, or GELU by tanh; all of the same shape. torch rounds the activation too, as libraries do."""
        if self._takes(gate, up):
            y = torch.empty_like(gate)
            self._call("gated", gate, up, y, gate.numel(), int(gelu), stored=gate)
            return y
        return _activated(gate, gelu).mul_(up)

    def gated_gradient(
        self, g: torch.Tensor, gate: torch.Tensor, up: torch.Tensor, *, gelu: bool
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The gradients of gate and up."""
        if self._takes(gate, up, g):
            d_gate, d_up = torch.empty_like(gate), torch.empty_like(up)
            self._call("gated_gradient", g, gate, up, d_gate, d_up, gate.numel(), int(gelu), stored=gate)
            return d_gate, d_up
        d_up = _activated(gate, gelu).mul_(g)
        if gelu:
            return torch.ops.aten.gelu_backward(g * up, gate, approximate="tanh"), d_up
        return torch.ops.aten.silu_backward(g * up, gate), d_up

    def cross_entropy_(
        self,
        products_RV: torch.Tensor,
        targets_R: torch.Tensor,
        weights_R: torch.Tensor | None = None,
        *,
        scale: float = 1.0,
        cap: float = 0.0,
    ) -> torch.Tensor:
        """Cross entropies in nats, float32 [R], of logits scale * product, or cap * tanh(scale * product / cap).

        With weights, float32, the products become each row's weight times the gradient of its loss. Targets are int64
        in [0, V); one outside gives NaN.
        """
        rows, width = products_RV.shape
        if self._takes(products_RV):
            losses_R = products_RV.new_empty(rows, dtype=torch.float32)
            weights_R = None if weights_R is None else _dense(weights_R, rows)
            given = (_dense(targets_R, rows, torch.int64), weights_R, losses_R, rows, width, scale, cap)
            self._call("cross_entropy", products_RV, *given, stored=products_RV)
            return losses_R
        logits_RV = _wide(products_RV) * scale
        if cap:
            logits_RV = torch.tanh(logits_RV / cap) * cap
        known_R = (targets_R >= 0) & (targets_R < width)
        places_R1 = torch.where(known_R, targets_R, 0)[:, None]
        norm_R1 = logits_RV.logsumexp(-1, keepdim=True)
        losses_R = torch.where(known_R, (norm_R1 - logits_RV.gather(1, places_R1))[:, 0], torch.nan)
        if weights_R is not None:
            slope_RV = (logits_RV - norm_R1).exp_()
            slope_RV.scatter_add_(1, places_R1, -known_R.to(slope_RV.dtype)[:, None])
            slope_RV *= weights_R[:, None] * scale
            if cap:
                slope_RV *= 1 - (logits_RV / cap).square()
            products_RV.copy_(slope_RV)
        return losses_R

    def eight_bits(self, x_RN: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """q, uint8 [R, N], and a scale for each row, float32 [R]: x is (q - 128) scale, to half a scale.

        The scale of a row with NaN or infinity is NaN; where no number is over 1e-30 it is 0.
        """
        rows, width = x_RN.shape
        if self._takes(x_RN):
            q_RN, scale_R = x_RN.new_empty(x_RN.shape, dtype=torch.uint8), x_RN.new_empty(rows, dtype=torch.float32)
            self._call("eight_bits", x_RN, q_RN, scale_R, rows, width, stored=x_RN)
            return q_RN, scale_R
        wide_RN = x_RN.float()
        largest_R = wide_RN.abs().amax(-1)
        scale_R = torch.where(largest_R.isfinite(), largest_R / 127, torch.nan)
        scale_R = torch.where(largest_R <= SMALLEST, 0.0, scale_R)
        up_R = torch.where(scale_R > 0, 127 / largest_R, 0.0)
        q_RN = (wide_RN * up_R[:, None]).nan_to_num(0.0).round_() + 128
        return q_RN.to(torch.uint8), scale_R

    def times_rows_(self, y_RN: torch.Tensor, by_R: torch.Tensor) -> torch.Tensor:
        """Each row times its own float32 number, rounded once."""
        if self._takes(y_RN):
            self._call("times_rows", y_RN, _dense(by_R, len(y_RN)), *y_RN.shape, stored=y_RN)
            return y_RN
        return y_RN.copy_(y_RN * by_R[:, None])

    def _takes(self, *tensors: torch.Tensor) -> bool:
        dtype, shape = tensors[0].dtype, tensors[0].shape
        return (
            self.library is not None
            and dtype in _STORED
            and all((t.dtype, t.shape, t.device.type) == (dtype, shape, "cpu") and t.is_contiguous() for t in tensors)
        )

    def _call(self, name: str, *arguments: torch.Tensor | float | None, stored: torch.Tensor) -> None:
        values = [each.data_ptr() if isinstance(each, torch.Tensor) else each for each in arguments]
        getattr(self.library, name)(*values, _STORED[stored.dtype], torch.get_num_threads())


@cache
def load_kernels() -> Kernels:
    """The kernels of this machine, compiled by the first process that asks; the others find them in the cache."""
    try:
        return make_kernels(load_library())
    except Unavailable as error:
        return Kernels(reason=str(error))


def make_kernels(library: ctypes.CDLL) -> Kernels:
    """Kernels of a loaded library, its functions' arguments declared."""
    _declare(library, _SIGNATURES)
    has_thin = bool(ctypes.c_int.in_dll(library, "thin_products"))
    _declare(library, _THIN if has_thin else {})
    return Kernels(library, thin=has_thin)


def _declare(library: ctypes.CDLL, signatures: Mapping[str, str]) -> None:
    for name, letters in signatures.items():
        function = getattr(library, name)
        function.argtypes = [_TYPES[letter] for letter in letters]
        function.restype = None


def _dense(vector: torch.Tensor, length: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """The vector as compiled code reads it: it cannot see how long it is."""
    assert vector.shape == (length,), (vector.shape, length)
    return vector.to("cpu", dtype).contiguous()


def _wide(x: torch.Tensor) -> torch.Tensor:
    """x in at least float32; itself if it is."""
    return x if x.dtype == torch.float64 else x.float()


def _half_turn(x_THD: torch.Tensor) -> torch.Tensor:
    low, high = x_THD.chunk(2, dim=-1)
    return torch.cat((-high, low), dim=-1)


def _activated(gate: torch.Tensor, gelu: bool) -> torch.Tensor:
    return F.gelu(gate, approximate="tanh") if gelu else F.silu(gate)
