"""compressed-tensors' stored forms: codes, scales and zero points of each linear module in; values out.

Read are pack-quantized (4 or 8 bits in words of 32), int- and naive-quantized (a byte each) and float-quantized (FP8),
with a scale for the tensor, each row or each group of a row. What was to become of activations is left out.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

from finetune.base import TensorEntry
from finetune.errors import Problem, UserError
from finetune.release.weights import read_tensor
from finetune.unquantise.grid import dtype_by, refuse_misfit, scaled, unpacked
from finetune.unquantise.tensors import DTYPE_NAMES, Tensor, as_stored

PARTS = ("_packed", "_scale", "_zero_point", "_shape", "_g_idx")
OF_ACTIVATIONS = tuple(
    f".{which}_{part}" for which in ("input", "output") for part in ("scale", "zero_point", "global_scale")
)
WHOLE = {"I8", "F8_E4M3", "F8_E5M2"}


def unquantised(folder: Path, config: Mapping[str, Any], entries: Sequence[TensorEntry]) -> list[Tensor]:
    """The tensors of a compressed model.

    Raises:
        UserError: scales over blocks of rows, or attention that is quantised, too.
        StorageError: parts that do not fit each other.
    """
    _refuse_others(folder, config, entries)
    stored = {entry.name: entry for entry in entries}
    found = []
    for entry in entries:
        name = entry.name.removesuffix("_packed")
        if name.endswith(".weight") and f"{name}_scale" in stored and (entry.dtype in WHOLE or name != entry.name):
            found.append(_weight(name, entry, stored, config))
        elif not entry.name.endswith((*(f".weight{part}" for part in PARTS), *OF_ACTIVATIONS)):
            found.append(as_stored(entry))
    return found


def _refuse_others(folder: Path, config: Mapping[str, Any], entries: Sequence[TensorEntry]) -> None:
    groups = (config["quantization_config"].get("config_groups") or {}).values()
    strategies = {str((group.get("weights") or {}).get("strategy")) for group in groups}
    problems = []
    if odd := sorted(strategies - {"tensor", "channel", "group", "None"}):
        problems.append(
            f"weights with a scale for each {odd[0]!r} are not read; for each tensor, channel, group they are"
        )
    if cached := [entry.name for entry in entries if entry.name.endswith((".k_scale", ".v_scale", ".q_scale"))]:
        problems.append(f"{cached[0]} is the scale of quantised attention, which is not read")
    if problems:
        cure = "name the model that it was made from"
        raise UserError(Problem(str(folder / "config.json"), f"{message}; {cure}") for message in problems)


def _weight(name: str, entry: TensorEntry, stored: Mapping[str, TensorEntry], config: Mapping[str, Any]) -> Tensor:
    scale, is_packed = stored[f"{name}_scale"], entry.name != name
    shape, bits = entry.shape, 8
    if is_packed:
        refuse_misfit(entry, f"{name}_shape" in stored and stored[f"{name}_shape"].elements == 2)
        shape = tuple(read_tensor(stored[f"{name}_shape"]).tolist())
        bits = 4 if entry.shape[-1] == -(-shape[1] // 8) else 8
        refuse_misfit(entry, entry.dtype == "I32" and entry.shape == (shape[0], -(-shape[1] * bits // 32)))
    groups = scale.shape[1] if len(scale.shape) == 2 else 1
    by_column = f"{name}_g_idx" in stored
    fits = len(shape) == 2 and scale.elements in (groups, groups * shape[0]) and groups > 0
    refuse_misfit(entry, fits and (by_column or shape[1] % groups == 0))
    parts = {part: stored[name + part] for part in PARTS if name + part in stored}
    dtype = dtype_by(scale, config)
    return Tensor(name, DTYPE_NAMES[dtype], shape, partial(_read, entry, parts, shape, bits, dtype))


def _read(
    entry: TensorEntry, parts: Mapping[str, TensorEntry], shape: tuple[int, ...], bits: int, dtype: torch.dtype
) -> torch.Tensor:
    code_OI = read_tensor(entry)
    if code_OI.dtype == torch.int32:
        code_OI = _signed(unpacked(code_OI, bits)[:, : shape[1]], bits)
    scale = read_tensor(parts["_scale"])
    scale_AG = scale.reshape(-1, scale.shape[1] if scale.dim() == 2 else 1)
    zero_AG = None
    if "_zero_point" in parts:
        zero = read_tensor(parts["_zero_point"])
        if zero.dtype == torch.int32:  # packed down the rows
            zero = _signed(unpacked(zero.T, bits)[:, : shape[0]].T, bits)
        refuse_misfit(parts["_zero_point"], zero.numel() == scale_AG.numel())
        zero_AG = zero.reshape(scale_AG.shape)
    group_of_I = None
    if "_g_idx" in parts:
        group_of_I = read_tensor(parts["_g_idx"]).long()
        inside = bool((group_of_I >= 0).all() and (group_of_I < scale_AG.shape[1]).all())
        group_of_I = group_of_I if inside else None  # all -1: columns are in order
        refuse_misfit(parts["_g_idx"], group_of_I is None or group_of_I.numel() == shape[1])
    return scaled(code_OI, scale_AG, zero_AG, dtype=dtype, group_of_I=group_of_I)


def _signed(code: torch.Tensor, bits: int) -> torch.Tensor:
    return (code.to(torch.int16) - 2 ** (bits - 1)).to(torch.int8)
