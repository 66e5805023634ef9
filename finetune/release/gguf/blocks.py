"""The types of a GGUF tensor: float32 weights in, the bytes of one of ggml's block formats out.

Q8_0, Q4_0, Q5_0 and Q5_1 round as llama.cpp's reference quantizer does (ggml-quants.c); bytes are little-endian.
"""

from __future__ import annotations

import numpy as np

Floats = np.ndarray  # float32
Bytes = np.ndarray  # uint8
F32 = np.float32


def encode_f32(x_BW: Floats) -> Bytes:
    return np.ascontiguousarray(x_BW, dtype="<f4").view(np.uint8)


def encode_f16(x_BW: Floats) -> Bytes:
    return halves(x_BW).view(np.uint8)


def encode_bf16(x_BW: Floats) -> Bytes:
    """The upper halves of the float32 bits, rounded to the nearest, ties to even."""
    bits = np.ascontiguousarray(x_BW).view(np.uint32)
    return ((bits + (0x7FFF + (bits >> 16 & 1))) >> 16).astype("<u2").view(np.uint8)


def encode_q8_0(x_BW: Floats) -> Bytes:
    """Bytes [B, 34]: d (float16), then 32 quants of 8 bits. B = blocks, W = 32 weights."""
    d = np.abs(x_BW).max(axis=1) / F32(127)
    scaled = x_BW * _inverse(d)[:, None]
    magnitude = np.abs(scaled)
    whole = np.floor(magnitude)
    rounded = whole + np.floor((magnitude - whole) * F32(2))  # halves away from zero, as C's roundf
    return np.concatenate([_head(d), np.copysign(rounded, scaled).astype(np.int8).view(np.uint8)], axis=1)


def encode_q4_0(x_BW: Floats) -> Bytes:
    """Bytes [B, 18]: d (float16), then 32 quants of 4 bits, the weight of largest magnitude at -8."""
    d, quants = _symmetric(x_BW, 8)
    return np.concatenate([_head(d), _pack_halves(quants)], axis=1)


def encode_q5_0(x_BW: Floats) -> Bytes:
    """Bytes [B, 22]: d (float16), the 32 fifth bits, then 32 nibbles; the weight of largest magnitude at -16."""
    d, quants = _symmetric(x_BW, 16)
    return np.concatenate([_head(d), _fifth_bits(quants), _pack_halves(quants & 15)], axis=1)


def encode_q5_1(x_BW: Floats) -> Bytes:
    """Bytes [B, 24]: d and minimum (float16), the 32 fifth bits, then 32 nibbles."""
    low = x_BW.min(axis=1)
    d = (x_BW.max(axis=1) - low) / F32(31)
    quants = ((x_BW - low[:, None]) * _inverse(d)[:, None] + F32(0.5)).astype(np.uint8)
    return np.concatenate([_head(d), _head(low), _fifth_bits(quants), _pack_halves(quants & 15)], axis=1)


def halves(values: Floats) -> np.ndarray:
    """float16, rounded to the nearest, ties to even; a value above 65,504 becomes infinite."""
    with np.errstate(over="ignore"):
        return np.ascontiguousarray(values).astype("<f2")


def _symmetric(x_BW: Floats, half: int) -> tuple[Floats, Bytes]:
    peak = np.take_along_axis(x_BW, np.abs(x_BW).argmax(axis=1)[:, None], axis=1)[:, 0]
    d = np.where(peak == 0, F32(0), peak) / F32(-half)  # the reference knows no negative zero
    quants = (x_BW * _inverse(d)[:, None] + F32(half + 0.5)).astype(np.int8).astype(np.uint8)
    return d, np.minimum(quants, np.uint8(2 * half - 1))


def _inverse(d: Floats) -> Floats:
    return np.where(d != 0, F32(1) / np.where(d != 0, d, F32(1)), F32(0))


def _head(values_B: Floats) -> Bytes:
    return halves(values_B).view(np.uint8).reshape(-1, 2)


def _pack_halves(quants_BW: Bytes) -> Bytes:
    """[B, 16]: the first 16 weights in the low nibbles, the last 16 in the high ones."""
    return quants_BW[:, :16] | quants_BW[:, 16:] << 4


def _fifth_bits(quants_BW: Bytes) -> Bytes:
    """[B, 4]: bit n of 32 is the fifth bit of weight n."""
    return np.packbits(quants_BW >> 4, axis=1, bitorder="little")
