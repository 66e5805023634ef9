"""Weights as 4-bit codes: a matrix in; codes, one scale for each group of a row, and packed words out, and back.

O = out features, I = in features, G = groups of a row, I / 128.
"""

from __future__ import annotations

import sys

import torch

GROUP = 128
SMALLEST, LARGEST = -8, 7
CODES_PER_WORD = 8


def group_scales(weight_OI: torch.Tensor) -> torch.Tensor:
    """One scale a group, [O, G] in the weights' dtype: its largest magnitude over 7.5, half of the codes' range.

    A group of zeros gets the dtype's epsilon, which any code 0 can be multiplied with. The same as
    compressed_tensors.quantization.utils.calculate_qparams.
    """
    largest_OG = weight_OI.unflatten(1, (-1, GROUP)).abs().amax(dim=2)
    scale_OG = (largest_OG.float() / ((LARGEST - SMALLEST) / 2)).to(weight_OI.dtype)
    return torch.where(scale_OG == 0, torch.finfo(scale_OG.dtype).eps, scale_OG)


def nearest_codes(weight_OI: torch.Tensor, scale_OG: torch.Tensor) -> torch.Tensor:
    """int8 [O, I]: the code whose value, code times scale, is nearest; of two equally near ones the even one.

    Divided in float64: in 16 bits the quotient itself would be rounded, over the middle between two codes at times.
    """
    quotient = weight_OI.double().unflatten(1, (-1, GROUP)) / scale_OG.double()[:, :, None]
    return quotient.round_().clamp_(SMALLEST, LARGEST).to(torch.int8).flatten(1)


def decode(code_OI: torch.Tensor, scale_OG: torch.Tensor) -> torch.Tensor:
    """[O, I] in the scales' dtype: code times scale, rounded once."""
    value = code_OI.float().unflatten(1, (-1, GROUP)) * scale_OG.float()[:, :, None]
    return value.flatten(1).to(scale_OG.dtype)


def pack(code_OI: torch.Tensor) -> torch.Tensor:
    """int32 [O, I / 8]: codes plus 8, the first of eight in the lowest four bits."""
    nibbles = (code_OI - SMALLEST).to(torch.uint8)
    halves = (nibbles[:, 0::2] | nibbles[:, 1::2] << 4).contiguous()
    assert sys.byteorder == "little"
    return halves.view(torch.int32)


def unpack(packed: torch.Tensor) -> torch.Tensor:
    """int8 [O, I], the codes of `pack`, by shifting each word."""
    shifts = torch.arange(0, 32, 4, dtype=torch.int32)
    return ((packed[:, :, None] >> shifts & 15) + SMALLEST).to(torch.int8).flatten(1)


def count_not_nearest(weight_OI: torch.Tensor, code_OI: torch.Tensor, scale_OG: torch.Tensor) -> int:
    """Weights that a neighbouring code would be nearer to; ties count for either."""
    grouped = weight_OI.double().unflatten(1, (-1, GROUP))
    code, scale = code_OI.double().unflatten(1, (-1, GROUP)), scale_OG.double()[:, :, None]
    here = (grouped - code * scale).abs()
    lower = (grouped - (code - 1).clamp_(min=SMALLEST) * scale).abs()
    upper = (grouped - (code + 1).clamp_(max=LARGEST) * scale).abs()
    return int((~((here <= lower) & (here <= upper))).sum())
