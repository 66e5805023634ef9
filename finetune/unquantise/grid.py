"""Whole numbers on a grid: codes, scales and zero points in; values out.

O = rows, I = columns, A = 1 or O, G = groups of a row's columns.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from finetune.base import TensorEntry
from finetune.errors import Problem, StorageError
from finetune.unquantise.tensors import dtype_of, row_blocks


def scaled(
    code_OI: torch.Tensor,
    scale_AG: torch.Tensor,
    zero_AG: torch.Tensor | None,
    *,
    dtype: torch.dtype,
    group_of_I: torch.Tensor | None = None,
) -> torch.Tensor:
    """(code - zero) times scale of each value's group, in float32, rounded once; groups are as wide as each other
    unless `group_of_I` says which one a column belongs to."""
    rows, columns = code_OI.shape
    groups = group_of_I if group_of_I is not None else torch.arange(columns) // (columns // scale_AG.shape[1])
    values_OI = torch.empty(rows, columns, dtype=dtype)
    for block in row_blocks(rows, columns):
        part = code_OI[block].float()
        if zero_AG is not None:
            part -= _of_rows(zero_AG, block, rows)[:, groups]
        values_OI[block] = (part * _of_rows(scale_AG, block, rows)[:, groups]).to(dtype)
    return values_OI


def unpacked(words: torch.Tensor, bits: int) -> torch.Tensor:
    """uint8 [rows, words * 32 / bits]: the numbers in int32 words, the first of each word in its lowest bits."""
    as_bytes = words.contiguous().view(torch.uint8)
    if bits == 8:
        return as_bytes
    shifts = torch.arange(0, 8, bits, dtype=torch.uint8)
    return ((as_bytes[:, :, None] >> shifts) & (2**bits - 1)).flatten(1)


def dtype_by(scale: TensorEntry, config: Mapping[str, Any]) -> torch.dtype:
    """The scales' dtype, in which libraries compute the values; the config's where that has 32 bits."""
    return {"F16": torch.float16, "BF16": torch.bfloat16}.get(scale.dtype) or dtype_of(config)


def refuse_misfit(entry: TensorEntry, fits: bool) -> None:
    """Raises a StorageError where the parts of a weight do not fit each other."""
    if not fits:
        message = f"{entry.name}: codes, scales and shape do not fit each other; fetch the file again"
        raise StorageError(Problem(str(entry.file), message))


def _of_rows(part_AG: torch.Tensor, block: slice, rows: int) -> torch.Tensor:
    return (part_AG[block] if part_AG.shape[0] == rows else part_AG).float()
