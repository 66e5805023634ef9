"""Weights in FP8 with a scale for each block of rows and columns, as DeepSeek V3 and Qwen 3 are stored; values out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

from finetune.base import TensorEntry
from finetune.release.weights import read_tensor
from finetune.unquantise.grid import refuse_misfit
from finetune.unquantise.tensors import DTYPE_NAMES, Tensor, as_stored, dtype_of

SCALE = "_scale_inv"  # called so, and multiplied with


def unquantised(folder: Path, config: Mapping[str, Any], entries: Sequence[TensorEntry]) -> list[Tensor]:
    """The tensors of a folder whose weights are FP8.

    Raises:
        StorageError: scales that do not fit their weight.
    """
    rows, columns = config["quantization_config"]["weight_block_size"]
    stored = {entry.name: entry for entry in entries}
    dtype = dtype_of(config)
    found = []
    for entry in entries:
        if (scale := stored.get(entry.name + SCALE)) is not None:
            blocks = tuple(-(-size // block) for size, block in zip(entry.shape, (rows, columns), strict=False))
            refuse_misfit(entry, len(entry.shape) == 2 and scale.shape == blocks)
            read = partial(_read, entry, scale, rows, columns, dtype)
            found.append(Tensor(entry.name, DTYPE_NAMES[dtype], entry.shape, read))
        elif not entry.name.endswith(SCALE):
            found.append(as_stored(entry))
    return found


def _read(entry: TensorEntry, scale: TensorEntry, rows: int, columns: int, dtype: torch.dtype) -> torch.Tensor:
    code_OI, scale_block = read_tensor(entry), read_tensor(scale).float()
    values = torch.empty(entry.shape, dtype=dtype)
    for number, scale_of_row in enumerate(scale_block):
        block = slice(number * rows, (number + 1) * rows)
        wide = scale_of_row.repeat_interleave(columns)[: entry.shape[1]]
        values[block] = (code_OI[block].float() * wide).to(dtype)
    return values
