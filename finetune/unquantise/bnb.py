"""bitsandbytes' stored form: packed codes, the scales of their blocks and a description in; values out.

Written out, not computed by the library: its CPU code takes another block's scale where a row is not a whole number of
blocks (bitsandbytes/backends/cpu/ops.py, dequantize_4bit).
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

from finetune.base import TensorEntry
from finetune.errors import Problem, StorageError
from finetune.release.weights import read_tensor
from finetune.unquantise.grid import refuse_misfit
from finetune.unquantise.tensors import DTYPE_NAMES, VALUES_AT_ONCE, Tensor, as_stored, dtype_of

DESCRIPTION = ".quant_state.bitsandbytes__"
FOUR_BIT_PARTS = ("absmax", "quant_map", "nested_absmax", "nested_quant_map")
LARGEST_INT8 = 127


def unquantised(folder: Path, config: Mapping[str, Any], entries: Sequence[TensorEntry]) -> list[Tensor]:
    """The tensors of a folder that transformers saved with 4-bit or 8-bit weights of bitsandbytes.

    Raises:
        StorageError: a part of a quantised weight is missing or does not fit the others.
    """
    stored = {entry.name: entry for entry in entries}
    described = {name.partition(DESCRIPTION)[0]: name for name in stored if DESCRIPTION in name}
    scaled = {name.removesuffix(".SCB") + ".weight" for name in stored if name.endswith(".SCB")}
    parts = {f"{name}.{part}" for name in described for part in FOUR_BIT_PARTS} | set(described.values())
    parts |= {name.removesuffix(".weight") + end for name in scaled for end in (".SCB", ".weight_format")}
    found = []
    for entry in entries:
        if entry.name in described:
            found.append(_four_bits(stored, entry, stored[described[entry.name]]))
        elif entry.name in scaled and entry.dtype == "I8":
            scale = stored[entry.name.removesuffix(".weight") + ".SCB"]
            dtype = dtype_of(config)
            refuse_misfit(entry, scale.elements == entry.shape[0])
            read = partial(_read_int8, entry, scale, dtype)
            found.append(Tensor(entry.name, DTYPE_NAMES[dtype], entry.shape, read))
        elif entry.name not in parts:
            found.append(as_stored(entry))
    return found


def four_bit_values(
    packed: torch.Tensor,
    code: torch.Tensor,
    scales: torch.Tensor,
    *,
    block: int,
    shape: Sequence[int],
    dtype: torch.dtype,
) -> torch.Tensor:
    """Every value: its code's number times its block's scale in float32, rounded once.

    Of the two codes in a byte the first is in the high bits.
    """
    packed = packed.reshape(-1).view(torch.uint8)
    values = torch.empty(2 * packed.numel(), dtype=dtype)
    step = max(1, VALUES_AT_ONCE // (2 * block)) * 2 * block
    for start in range(0, values.numel(), step):
        part = packed[start // 2 : (start + step) // 2]
        codes = torch.stack([part >> 4, part & 15], dim=1).reshape(-1)
        scale = scales[start // block : -(-(start + codes.numel()) // block)].repeat_interleave(block)
        values[start : start + codes.numel()] = (code[codes.int()] * scale[: codes.numel()]).to(dtype)
    return values[: torch.Size(shape).numel()].reshape(*shape)


def block_scales(parts: Mapping[str, torch.Tensor], settings: Mapping[str, Any]) -> torch.Tensor:
    """The scale of each block in float32; where scales are quantised themselves, by their own map, scales and mean."""
    if "nested_absmax" not in parts:
        return parts["absmax"].float()
    size, count = int(settings["nested_blocksize"]), parts["absmax"].numel()
    outer = parts["nested_absmax"].float().repeat_interleave(size)[:count]
    offset = torch.tensor(float(settings["nested_offset"]), dtype=torch.float32)
    return parts["nested_quant_map"].float()[parts["absmax"].int()] * outer + offset


def int8_values(codes_OI: torch.Tensor, scale_O: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Each row's codes times its largest magnitude over 127."""
    return (codes_OI.float() * (scale_O.float().reshape(-1, 1) / LARGEST_INT8)).to(dtype)


def _four_bits(stored: Mapping[str, TensorEntry], entry: TensorEntry, description: TensorEntry) -> Tensor:
    try:
        settings = json.loads(bytes(read_tensor(description).tolist()))
        shape = tuple(int(size) for size in settings["shape"])
        dtype = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}[settings["dtype"]]
        parts = {part: stored[f"{entry.name}.{part}"] for part in FOUR_BIT_PARTS if f"{entry.name}.{part}" in stored}
        block, values = int(settings["blocksize"]), torch.Size(shape).numel()
        fits = parts["absmax"].elements == -(-values // block) and entry.bytes == -(-values // 2)
        fits = fits and parts["quant_map"].elements == 16 and block > 0 and block % 2 == 0 and min(shape) > 0
        if "nested_absmax" in parts:
            groups = -(-parts["absmax"].elements // int(settings["nested_blocksize"]))
            fits = fits and parts["nested_quant_map"].elements == 256 and parts["nested_absmax"].elements >= groups
            fits = fits and parts["absmax"].dtype == "U8" and int(settings["nested_blocksize"]) > 0
            fits = fits and float(settings["nested_offset"]) >= 0
        if not fits:
            raise ValueError("the sizes of its parts do not fit each other")
    except (KeyError, TypeError, ValueError, ZeroDivisionError, RecursionError) as error:
        message = f"{entry.name}: its 4-bit weights cannot be read ({error}); fetch the file again"
        raise StorageError(Problem(str(entry.file), message)) from error
    read = partial(_read_four_bits, entry, parts, settings, shape, dtype)
    return Tensor(entry.name, DTYPE_NAMES[dtype], shape, read)


def _read_four_bits(
    entry: TensorEntry,
    parts: Mapping[str, TensorEntry],
    settings: Mapping[str, Any],
    shape: Sequence[int],
    dtype: torch.dtype,
) -> torch.Tensor:
    read = {part: read_tensor(found) for part, found in parts.items()}
    scales = block_scales(read, settings)
    block = int(settings["blocksize"])
    return four_bit_values(read_tensor(entry), read["quant_map"].float(), scales, block=block, shape=shape, dtype=dtype)


def _read_int8(entry: TensorEntry, scale: TensorEntry, dtype: torch.dtype) -> torch.Tensor:
    return int8_values(read_tensor(entry), read_tensor(scale), dtype)
