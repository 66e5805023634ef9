"""K-quants: blocks of 256 float32 weights in, the bytes of Q4_K, Q5_K and Q6_K blocks out.

The search for scales is that of llama.cpp's reference quantizer (ggml-quants.c: quantize_row_q4_K_ref, q5_K, q6_K),
operation by operation in float32, so that the bytes are the same as those of its x86-64 build. Sub-blocks lie in
columns, [weights, sub-blocks]: a sum over axis 0 then adds in the order of the reference.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from finetune.release.gguf.blocks import Bytes, Floats, halves

BLOCK = 256
TINY = np.float32(1e-15)  # below this a sub-block counts as all zero
F32 = np.float32


@dataclass(frozen=True)
class AffineSearch:
    """How make_qkx2_quants looks for a scale: quants 0..levels; width / scale = levels + first + n/10, n = 0..steps."""

    levels: int
    first: float
    steps: int


Q4_SEARCH = AffineSearch(levels=15, first=-1.0, steps=20)
Q5_SEARCH = AffineSearch(levels=31, first=-0.5, steps=15)


def encode_q4_k(x_BW: Floats) -> Bytes:
    """Bytes [B, 144]: d and dmin (float16), 8 scales and 8 minima of 6 bits, 4 bits a weight. B = blocks, W = 256."""
    head, quants = _encode_affine(x_BW, Q4_SEARCH)
    return np.concatenate([head, _pack_nibbles(quants)], axis=1)


def encode_q5_k(x_BW: Floats) -> Bytes:
    """Bytes [B, 176]: as Q4_K, with the fifth bits of the weights before their nibbles."""
    head, quants = _encode_affine(x_BW, Q5_SEARCH)
    fifth = (quants >> 4).reshape(-1, 8, 32) << np.arange(8, dtype=np.uint8)[:, None]
    return np.concatenate([head, np.bitwise_or.reduce(fifth, axis=1), _pack_nibbles(quants & 15)], axis=1)


def encode_q6_k(x_BW: Floats) -> Bytes:
    """Bytes [B, 210]: low nibbles, high bit pairs, 16 scales of 8 bits, d (float16)."""
    x_WN = np.ascontiguousarray(x_BW.reshape(-1, 16).T)
    scale_N, inverse_N = _search_symmetric(x_WN)
    scale_BS = scale_N.reshape(-1, 16)
    largest = np.take_along_axis(scale_BS, np.abs(scale_BS).argmax(axis=1)[:, None], axis=1)[:, 0]
    empty = np.abs(largest) < TINY
    inverse_B = F32(-128) / np.where(empty, F32(1), largest)
    d_B = halves(np.where(empty, F32(0), F32(1) / inverse_B))
    scales = np.minimum(127, np.rint(inverse_B[:, None] * scale_BS)).astype(np.int8)
    scales[empty] = 0
    step_N = (d_B.astype(F32)[:, None] * scales.astype(F32)).reshape(-1)
    flat = step_N == 0
    with np.errstate(over="ignore", invalid="ignore"):
        q_WN = np.rint(x_WN / np.where(flat, F32(1), step_N))
    if flat.any():  # such a sub-block keeps the quants of the search; they decode to zero
        q_WN[:, flat] = np.where(inverse_N[flat] == 0, F32(-32), np.rint(inverse_N[flat] * x_WN[:, flat]))
    quants = (np.clip(q_WN, -32, 31) + 32).astype(np.uint8).T.reshape(-1, 2, 4, 32)
    quants[empty] = 0
    low, high = quants & 15, quants >> 4
    nibbles = np.concatenate([low[:, :, 0] | low[:, :, 2] << 4, low[:, :, 1] | low[:, :, 3] << 4], axis=2)
    pairs = high[:, :, 0] | high[:, :, 1] << 2 | high[:, :, 2] << 4 | high[:, :, 3] << 6
    parts = [nibbles.reshape(-1, 128), pairs.reshape(-1, 64), scales.view(np.uint8), d_B.view(np.uint8).reshape(-1, 2)]
    return np.concatenate(parts, axis=1)


def _encode_affine(x_BW: Floats, search: AffineSearch) -> tuple[Bytes, Bytes]:
    """The 16 bytes before the quants of each block, and the quants [B, 256], one a byte."""
    x_WN = np.ascontiguousarray(x_BW.reshape(-1, 32).T)
    weight_WN = np.sqrt(np.add.reduce(x_WN * x_WN, axis=0) / F32(32)) + np.abs(x_WN)
    scale_N, low_N, inverse_N, from_N = _search_affine(x_WN, weight_WN, search)
    d_B, scale_BS = _six_bits(scale_N.reshape(-1, 8))
    dmin_B, min_BS = _six_bits(-low_N.reshape(-1, 8))
    step_N = (d_B.astype(F32)[:, None] * scale_BS.astype(F32)).reshape(-1)
    min_N = (dmin_B.astype(F32)[:, None] * min_BS.astype(F32)).reshape(-1)
    flat = step_N == 0
    q_WN = np.rint((x_WN + min_N) / np.where(flat, F32(1), step_N))
    if flat.any():  # such a sub-block keeps the quants of the search; they decode to its minimum
        q_WN[:, flat] = np.rint(inverse_N[flat] * (x_WN[:, flat] - from_N[flat]))
    quants = np.clip(q_WN, 0, search.levels).astype(np.uint8).T.reshape(-1, BLOCK)
    halves_B4 = np.stack([d_B, dmin_B], axis=1).view(np.uint8)
    return np.concatenate([halves_B4, _pack_six_bits(scale_BS, min_BS)], axis=1), quants


def _search_affine(x_WN: Floats, weight_WN: Floats, search: AffineSearch) -> tuple[Floats, Floats, Floats, Floats]:
    """Scale and minimum of each sub-block, and the inverse scale and minimum that its quants were rounded with.

    make_qkx2_quants: of the trial scales the one whose weighted least-squares fit has the smallest weighted error. A
    better fit moves the minimum that later trials start from, as it does there.
    """
    low, high = np.minimum(x_WN.min(axis=0), F32(0)), x_WN.max(axis=0)
    flat = high == low
    high = np.where(flat, low + F32(1), high)
    sum_w, sum_x = np.add.reduce(weight_WN, axis=0), np.add.reduce(weight_WN * x_WN, axis=0)
    inverse = F32(search.levels) / (high - low)
    scale, rounded_with, rounded_from = F32(1) / inverse, inverse, low.copy()
    q, wq, work = (np.empty_like(x_WN) for _ in range(3))
    _round_quants(x_WN, low, inverse, search.levels, out=q)
    best = _squared_error(x_WN, weight_WN, q, scale, low, work)
    for step in range(search.steps + 1):
        inverse = (F32(search.first) + F32(0.1) * F32(step) + F32(search.levels)) / (high - low)
        _round_quants(x_WN, low, inverse, search.levels, out=q)
        np.multiply(weight_WN, q, out=wq)
        sum_q = np.add.reduce(wq, axis=0)
        sum_qq = np.add.reduce(np.multiply(wq, q, out=work), axis=0)
        sum_qx = np.add.reduce(np.multiply(wq, x_WN, out=work), axis=0)
        new_scale, new_low, solvable = _least_squares(sum_w, sum_x, sum_q, sum_qq, sum_qx)
        error = _squared_error(x_WN, weight_WN, q, new_scale, new_low, work)
        better = solvable & (error < best) & ~flat
        rounded_with, rounded_from = np.where(better, inverse, rounded_with), np.where(better, low, rounded_from)
        best, scale = np.where(better, error, best), np.where(better, new_scale, scale)
        low = np.where(better, new_low, low)
    return np.where(flat, F32(0), scale), low, rounded_with, rounded_from


def _least_squares(
    sum_w: Floats, sum_x: Floats, sum_q: Floats, sum_qq: Floats, sum_qx: Floats
) -> tuple[Floats, Floats, np.ndarray]:
    """Scale and minimum (0 at most) of the weighted line through quants and weights, and where there is one."""
    determinant = sum_w * sum_qq - sum_q * sum_q
    solvable = determinant > 0
    safe = np.where(solvable, determinant, F32(1))
    scale, low = (sum_w * sum_qx - sum_x * sum_q) / safe, (sum_qq * sum_x - sum_q * sum_qx) / safe
    above = low > 0
    through_zero = sum_qx / np.where(sum_qq > 0, sum_qq, F32(1))
    return np.where(above, through_zero, scale), np.where(above, F32(0), low), solvable


def _round_quants(x_WN: Floats, low: Floats, inverse: Floats, levels: int, *, out: Floats) -> None:
    np.subtract(x_WN, low, out=out)
    np.multiply(out, inverse, out=out)
    np.rint(out, out=out)
    np.maximum(out, F32(0), out=out)
    np.minimum(out, F32(levels), out=out)


def _squared_error(x: Floats, weight: Floats, q: Floats, scale: Floats, low: Floats, work: Floats) -> Floats:
    np.multiply(q, scale, out=work)
    np.add(work, low, out=work)
    np.subtract(work, x, out=work)
    np.multiply(work, work, out=work)
    np.multiply(weight, work, out=work)
    return np.add.reduce(work, axis=0)


def _search_symmetric(x_WN: Floats) -> tuple[Floats, Floats]:
    """Scale of each sub-block of 16 for quants -32..31, and the inverse scale that its quants were rounded with.

    make_qx_quants with weights x^2: of 19 trial scales the one whose least-squares fit explains most.
    """
    peak = np.take_along_axis(x_WN, np.abs(x_WN).argmax(axis=0)[None], axis=0)[0]
    empty = np.abs(peak) < TINY
    peak = np.where(empty, F32(1), peak)
    square = x_WN * x_WN
    cube = square * x_WN
    q, work = np.empty_like(x_WN), np.empty_like(x_WN)
    inverse = F32(-32) / peak
    sum_qx, sum_qq = _symmetric_sums(x_WN, square, cube, inverse, q, work)
    scale = np.where(sum_qq > 0, sum_qx / np.where(sum_qq > 0, sum_qq, F32(1)), F32(0))
    best, rounded_with = scale * sum_qx, inverse
    for step in (*range(-9, 0), *range(1, 10)):
        inverse = -(F32(32) + F32(0.1) * F32(step)) / peak
        sum_qx, sum_qq = _symmetric_sums(x_WN, square, cube, inverse, q, work)
        better = (sum_qq > 0) & (sum_qx * sum_qx > best * sum_qq)
        rounded_with = np.where(better, inverse, rounded_with)
        scale = np.where(better, sum_qx / np.where(better, sum_qq, F32(1)), scale)
        best = np.where(better, scale * sum_qx, best)
    return np.where(empty, F32(0), scale), np.where(empty, F32(0), rounded_with)


def _symmetric_sums(
    x: Floats, square: Floats, cube: Floats, inverse: Floats, q: Floats, work: Floats
) -> tuple[Floats, Floats]:
    np.multiply(x, inverse, out=q)
    np.rint(q, out=q)
    np.maximum(q, F32(-32), out=q)
    np.minimum(q, F32(31), out=q)
    sum_qx = np.add.reduce(np.multiply(cube, q, out=work), axis=0)
    np.multiply(square, q, out=work)
    return sum_qx, np.add.reduce(np.multiply(work, q, out=work), axis=0)


def _six_bits(values_BS: Floats) -> tuple[np.ndarray, Bytes]:
    """The float16 unit of each block and its eight values in that unit, 0..63."""
    largest = np.maximum(values_BS.max(axis=1), F32(0))
    inverse = np.where(largest > 0, F32(63) / np.where(largest > 0, largest, F32(1)), F32(0))
    steps = np.rint(inverse[:, None] * values_BS).astype(np.int32).astype(np.uint8)
    return halves(largest / F32(63)), np.minimum(steps, np.uint8(63))


def _pack_six_bits(scale_BS: Bytes, min_BS: Bytes) -> Bytes:
    """[B, 12]: the first four of each whole, the high pairs of the last four on top of them, their nibbles together."""
    first = scale_BS[:, :4] | (scale_BS[:, 4:] >> 4) << 6
    second = min_BS[:, :4] | (min_BS[:, 4:] >> 4) << 6
    return np.concatenate([first, second, (scale_BS[:, 4:] & 15) | (min_BS[:, 4:] & 15) << 4], axis=1)


def _pack_nibbles(quants_BW: Bytes) -> Bytes:
    """[B, 128]: of every 64 weights, the first 32 in the low nibbles and the last 32 in the high ones."""
    pairs = quants_BW.reshape(-1, 4, 2, 32)
    return (pairs[:, :, 0] | pairs[:, :, 1] << 4).reshape(-1, 128)
