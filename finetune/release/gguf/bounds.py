"""How far a quantised weight may be from its source: raw blocks of a file and the source in, weights too far out.

Two closed conditions for each weight, on what gguf's own dequantizer makes of the file:
1. it is the nearest value that its block can hold, given the scales stored in the block;
2. it lies within the type's bound, which knows nothing of the stored scales (`largest_error`).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from gguf import GGMLQuantizationType, quants

Type = GGMLQuantizationType


@dataclass(frozen=True)
class Kind:
    """A block format: weights that share a scale, the range of its quants, and whether it has a minimum of its own."""

    shared: int
    lowest: int
    highest: int
    affine: bool = False
    units: int = 0  # K-quants: a scale is a whole number of units, at most this many, shared by 256 weights


KINDS = {
    Type.Q8_0: Kind(32, -127, 127),
    Type.Q4_0: Kind(32, -8, 7),
    Type.Q5_0: Kind(32, -16, 15),
    Type.Q5_1: Kind(32, 0, 31, affine=True),
    Type.Q4_K: Kind(32, 0, 15, affine=True, units=63),
    Type.Q5_K: Kind(32, 0, 31, affine=True, units=63),
    Type.Q6_K: Kind(16, -32, 31, units=128),
}


def count_not_nearest(source: np.ndarray, raw: np.ndarray, read: np.ndarray, kind: Type) -> int:
    """How many weights `read` from the `raw` blocks (uint8 [blocks, bytes]) are not the nearest to `source`.

    The types with blocks of 32 round with the scale as it was before it became a float16: `slack` is what that moves.
    """
    layout = KINDS[kind]
    step, low = _grid(raw, kind)
    source_SW, read_SW = (values.astype(np.float64).reshape(-1, layout.shared) for values in (source, read))
    flat = step == 0
    step = np.where(flat, 1, step)
    wanted = np.clip((source_SW - low) / step, layout.lowest, layout.highest)
    found = (read_SW - low) / step
    slack = np.full(wanted.shape, 1e-3)
    if not layout.units:
        error = half_error(step)
        moved = (np.abs(found) + 0.5) * error + (half_error(low) if layout.affine else 0)
        slack += moved / np.maximum(np.abs(step) - error, error)
    return int(((np.abs(found - wanted) > 0.5 + slack) & ~flat).sum())


def count_beyond(source: np.ndarray, read: np.ndarray, kind: Type) -> int:
    """How many weights are farther from `source` than the type allows, or not finite."""
    error = np.abs(read.astype(np.float64) - source.astype(np.float64)).reshape(-1, KINDS[kind].shared)
    return int((~(error <= largest_error(source, kind) * (1 + 1e-6))).sum())


def largest_error(source: np.ndarray, kind: Type) -> np.ndarray:
    """The bound of each group of weights that share a scale, [groups, 1].

    spread = what the quants have to reach over (with a minimum: highest less lowest weight, zero included where the
    minimum cannot be positive; else the largest magnitude), n = the largest quant.
    Q8_0: half a step spread/n, and n roundings of the scale to float16. Q5_1: the same and that of the minimum.
    Q4_0, Q5_0: a whole step, because the largest weight takes -n, and one as large with the other sign only n - 1.
    K-quants: a whole step spread/n (the search may clip half a step); and half a unit of scale and of minimum, a unit
    being the widest spread of the 256 over n and 63 (Q6_K: 128); and float16's rounding of the units.
    """
    layout = KINDS[kind]
    rows = source.astype(np.float64).reshape(-1, layout.shared)
    n = max(-layout.lowest, layout.highest)
    if layout.affine:
        top, bottom = rows.max(axis=1, keepdims=True), rows.min(axis=1, keepdims=True)
        spread = np.maximum(top, 0) - np.minimum(bottom, 0) if layout.units else top - bottom
    else:
        spread = np.abs(rows).max(axis=1, keepdims=True)
    step = spread / n
    if not layout.units:
        whole = 0.5 if kind in {Type.Q8_0, Type.Q5_1} else 1.0
        return whole * step + n * half_error(step) + (half_error(bottom) if layout.affine else 0)
    per_block = 256 // layout.shared
    widest = np.repeat(spread.reshape(-1, per_block).max(axis=1), per_block)[:, None]
    unit = widest / n / layout.units
    half_units = n * unit / 2 + (widest / layout.units / 2 if layout.affine else 0)
    rounding = layout.units * (n * half_error(unit) + (half_error(widest / layout.units) if layout.affine else 0))
    return step + half_units + rounding


def half_error(values: np.ndarray) -> np.ndarray:
    """What rounding to float16 moves a value at most: 2^-11 of it, or 2^-25 below the normal range."""
    return np.maximum(np.abs(values) * 2.0**-11, 2.0**-25)


def _grid(raw: np.ndarray, kind: Type) -> tuple[np.ndarray, np.ndarray]:
    """Step and lowest point (the value of quant 0) of each group of weights, [groups, 1], float64."""
    layout = KINDS[kind]
    if kind == Type.Q6_K:
        unit, scales = _half(raw, 208), raw[:, 192:208].view(np.int8)
        return (unit[:, None] * scales).reshape(-1, 1), np.zeros((raw.shape[0] * 16, 1))
    if not layout.units:
        step = _half(raw, 0)[:, None]
        return step, _half(raw, 2)[:, None] if layout.affine else np.zeros_like(step)
    scales, minima = quants.Q4_K.get_scale_min(np.ascontiguousarray(raw[:, 4:16]))
    step = _half(raw, 0)[:, None] * scales.reshape(-1, 8)
    low = -_half(raw, 2)[:, None] * minima.reshape(-1, 8)
    return step.reshape(-1, 1), low.reshape(-1, 1)


def _half(raw: np.ndarray, place: int) -> np.ndarray:
    return np.ascontiguousarray(raw[:, place : place + 2]).view("<f2")[:, 0].astype(np.float64)
