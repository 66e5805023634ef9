"""The arithmetic of a merge: stored values and what an adapter changes in; exact tuned values, in float64, out."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch

from finetune.model.load import dequantize_like_base
from finetune.release.adapter_file import scale_of as scale_of

ELEMENTS_AT_ONCE = 1 << 18  # 2 MiB in float64: a block stays in a core's cache, seven times faster than 64 MiB
DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}


@dataclass(frozen=True)
class Delta:
    """Low-rank matrices as trained: tuned = W + scale * B * A. O = rows, I = columns, R = rank.

    Fused experts have one more dimension in front of both matrices. DoRA has a magnitude per row, of an embedding one
    per column. `start` are values that the adapter brings along in the place of W.
    """

    a_RI: torch.Tensor
    b_OR: torch.Tensor
    magnitude_O: torch.Tensor | None
    scale: float
    magnitude_I: torch.Tensor | None = None
    start: torch.Tensor | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        return (*self.b_OR.shape[:-1], self.a_RI.shape[-1])


@dataclass(frozen=True)
class Trained:
    """Values trained in the place of the base's: of a whole tensor, or of some of its rows."""

    values: torch.Tensor
    rows: tuple[int, ...] | None = None
    start: torch.Tensor | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.values.shape)


@dataclass(frozen=True)
class Shift:
    """A trained bias on top of the base's: tuned = bias + scale * values; `start` stands in the place of the bias."""

    values: torch.Tensor
    scale: float
    start: torch.Tensor | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.values.shape)


@dataclass(frozen=True)
class Kept:
    """The base's values, stored under a name of their own: a head that is no longer tied to the embedding."""

    shape: tuple[int, ...]
    start: None = None


@dataclass(frozen=True)
class Scaled:
    """Trained factors, one for each row or for each column; a bias is one row."""

    factors: torch.Tensor
    of_rows: bool
    shape: tuple[int, ...]
    start: None = None


@dataclass(frozen=True)
class Rotated:
    """Inputs turned before the weight sees them, in blocks of S: tuned = W * R^T, R block-diagonal with N blocks."""

    rotations_NSS: torch.Tensor
    start: None = None

    @property
    def width(self) -> int:
        return self.rotations_NSS.shape[0] * self.rotations_NSS.shape[1]


Change = Delta | Trained | Shift | Kept | Scaled | Rotated


def tuned_blocks(weight: torch.Tensor, change: Change | None) -> Iterator[tuple[slice, torch.Tensor]]:
    """Blocks of rows of the exact tuned values, float64, in order; rows are those of the weight seen as a matrix.

    A block is overwritten by the next one. Without a change the weight itself. DoRA: m * (W + s*B*A) / norm
    (arXiv:2402.09353, equation 5; in PEFT tuners/lora/dora.py the norm is that of the same sum).
    """
    rows_OI = _as_matrix(weight if change is None or change.start is None else change.start)
    if isinstance(change, Delta) and change.a_RI.dim() == 3:
        size = rows_OI.shape[0] // change.a_RI.shape[0]
        for expert, (a_RI, b_OR) in enumerate(zip(change.a_RI, change.b_OR, strict=True)):
            part = slice(expert * size, (expert + 1) * size)
            for block, tuned in tuned_blocks(rows_OI[part], Delta(a_RI, b_OR, None, change.scale)):
                yield slice(part.start + block.start, part.start + block.stop), tuned
        return
    factors_I = None
    if isinstance(change, Delta) and change.magnitude_I is not None:
        factors_I = change.magnitude_I.double() / _column_norms(rows_OI, change)
    for block, tuned in _sums(rows_OI, change):
        yield block, tuned if factors_I is None else tuned.mul_(factors_I)


def round_tuned(weight: torch.Tensor, change: Change | None, *, dtype: torch.dtype) -> torch.Tensor:
    """The tuned weight, each element rounded once from float64 to its nearest value in `dtype`."""
    rounded = torch.empty(weight.shape, dtype=dtype)
    rows_OI = _as_matrix(rounded)
    with one_thread():
        for block, tuned in tuned_blocks(weight, change):
            rows_OI[block] = round_to(tuned, dtype)
    return rounded


def round_to(values: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """float64 values rounded to `dtype`; to 16 bits through float32, which moves a tie by 2^-13 of a step at most."""
    return values.float().to(dtype)


@contextmanager
def one_thread() -> Iterator[None]:
    """Blocks that fit the cache take less time than it takes to share them out."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


@dataclass(frozen=True)
class Onto:
    """Which values of the base the delta is added to: `original` as stored, `dequantized` as the run computed with."""

    name: str
    quantization: str
    dtype: torch.dtype  # the run's compute dtype, in which quantised weights become values again
    device: str

    def weight(self, stored_OI: torch.Tensor) -> torch.Tensor:
        """A linear's weight as the delta meets it."""
        if self.name == "original" or self.quantization == "none":
            return stored_OI
        on_device = stored_OI.to(self.device)  # the same arithmetic as at training, where it can be had
        return dequantize_like_base(on_device, quantization=self.quantization, dtype=self.dtype).cpu()


def read_deltas(folder: Path) -> dict[str, Delta]:
    """The changes of an adapter folder that holds nothing but low-rank matrices of linears, by stored weight.

    Raises:
        UserError: the adapter does something else too, or something that a merge cannot represent.
        StorageError: the adapter's file is damaged.
    """
    from finetune.release.changes import read_plain_deltas  # it imports this file

    return read_plain_deltas(folder)


def _as_matrix(weight: torch.Tensor) -> torch.Tensor:
    return weight.reshape(-1, weight.shape[-1]) if weight.dim() > 1 else weight.reshape(1, -1)


def _sums(rows_OI: torch.Tensor, change: Change | None) -> Iterator[tuple[slice, torch.Tensor]]:
    """Blocks of the tuned values, but for an embedding's magnitude."""
    height, width = rows_OI.shape
    room = torch.empty(min(height, max(1, ELEMENTS_AT_ONCE // width)), width, dtype=torch.float64)
    a_RI = change.a_RI.double() if isinstance(change, Delta) else None
    for start in range(0, height, room.shape[0]):
        block = slice(start, min(start + room.shape[0], height))
        tuned = room[: block.stop - block.start].copy_(rows_OI[block])
        if isinstance(change, Delta):
            assert a_RI is not None
            tuned.addmm_(change.b_OR[block].double(), a_RI, alpha=change.scale)
            if change.magnitude_O is not None:
                tuned.mul_((change.magnitude_O[block].double() / tuned.norm(dim=1))[:, None])
        elif isinstance(change, Trained):
            _put(tuned, block, change)
        elif isinstance(change, Scaled):
            factors = change.factors.double()
            tuned.mul_(factors[block][:, None] if change.of_rows else factors)
        elif isinstance(change, Rotated):
            blocks_ONS = tuned.unflatten(1, change.rotations_NSS.shape[:2])
            tuned.copy_(torch.einsum("ons,nts->ont", blocks_ONS, change.rotations_NSS).flatten(1))
        elif isinstance(change, Shift):
            tuned.add_(_as_matrix(change.values)[block].double(), alpha=change.scale)
        yield block, tuned


def _put(tuned: torch.Tensor, block: slice, change: Trained) -> None:
    values = _as_matrix(change.values)
    if change.rows is None:
        tuned.copy_(values[block])
        return
    for position, row in enumerate(change.rows):
        if block.start <= row < block.stop:
            tuned[row - block.start] = values[position]


def _column_norms(rows_OI: torch.Tensor, change: Delta) -> torch.Tensor:
    squares_I = torch.zeros(rows_OI.shape[1], dtype=torch.float64)
    for _, tuned in _sums(rows_OI, change):
        squares_I += tuned.square().sum(dim=0)
    return squares_I.sqrt()
