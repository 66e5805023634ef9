"""GPTQ's and AWQ's stored forms: codes in words of 32 bits, zero points and scales of groups in; values out.

GPTQ packs down the columns of a weight and may order groups by importance (g_idx); its first version stores each zero
point less one. AWQ ("gemm") packs across rows, eight to a word in the order 0 2 4 6 1 3 5 7.
O = rows, I = columns of the weight; both store it the other way round. G = groups of columns.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

from finetune.base import TensorEntry
from finetune.release.weights import read_tensor
from finetune.unquantise.grid import dtype_by, refuse_misfit, scaled, unpacked
from finetune.unquantise.tensors import DTYPE_NAMES, Tensor, as_stored

PARTS = (".qweight", ".qzeros", ".scales", ".g_idx")
AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)


def unquantised(folder: Path, config: Mapping[str, Any], entries: Sequence[TensorEntry]) -> list[Tensor]:
    """The tensors of a model in either form.

    Raises:
        StorageError: parts that do not fit each other.
    """
    settings = config["quantization_config"]
    stored = {entry.name: entry for entry in entries}
    packed = {name.removesuffix(".qweight") for name in stored if name.endswith(".qweight")}
    found = []
    for entry in entries:
        module, _, part = entry.name.rpartition(".")
        if module in packed and part == "bias" and _is_of_no_use(entry, config):
            continue
        if module not in packed or f".{part}" not in PARTS:
            found.append(as_stored(entry))
        elif part == "qweight":
            parts = {part: stored[module + part] for part in PARTS if module + part in stored}
            found.append(_weight(f"{module}.weight", parts, settings, config))
    return found


def _weight(
    name: str, parts: Mapping[str, TensorEntry], settings: Mapping[str, Any], config: Mapping[str, Any]
) -> Tensor:
    is_awq, bits = settings["quant_method"] == "awq", int(settings.get("bits", 4))
    entry, per_word = parts[".qweight"], 32 // bits
    refuse_misfit(entry, {".qzeros", ".scales"} <= parts.keys() and len(entry.shape) == 2 and entry.dtype == "I32")
    tall, wide = entry.shape
    rows, columns = (wide * per_word, tall) if is_awq else (wide, tall * per_word)
    scales, zeros = parts[".scales"], parts[".qzeros"]
    groups = scales.shape[0]
    fits = scales.shape == (groups, rows) and zeros.shape == (groups, -(-rows // per_word)) and zeros.dtype == "I32"
    in_order = ".g_idx" not in parts
    refuse_misfit(entry, fits and groups > 0 and (columns % groups == 0 if in_order else True))
    refuse_misfit(entry, in_order or parts[".g_idx"].shape == (columns,))
    dtype = dtype_by(scales, config)
    # Version 2 is named so; GPTQModel calls the first one "gptq".
    less_one = not is_awq and settings.get("checkpoint_format", "gptq") != "gptq_v2"
    read = partial(_read_awq, parts, dtype) if is_awq else partial(_read_gptq, parts, bits, less_one, dtype)
    return Tensor(name, DTYPE_NAMES[dtype], (rows, columns), read)


def _is_of_no_use(bias: TensorEntry, config: Mapping[str, Any]) -> bool:
    """Whether a bias of zeros was saved though the model has none, as AutoGPTQ did."""
    has_none = config.get("model_type") in ("llama", "mistral") and not config.get("attention_bias")
    return has_none and not config.get("mlp_bias") and not read_tensor(bias).any()


def _read_gptq(parts: Mapping[str, TensorEntry], bits: int, less_one: bool, dtype: torch.dtype) -> torch.Tensor:
    code_OI = unpacked(read_tensor(parts[".qweight"]).T, bits)
    scale_OG = read_tensor(parts[".scales"]).T
    zero_OG = unpacked(read_tensor(parts[".qzeros"]), bits).T[: scale_OG.shape[0]]
    if less_one:
        zero_OG = (zero_OG + 1) & (2**bits - 1)
    group_of_I = None
    if ".g_idx" in parts:
        group_of_I = read_tensor(parts[".g_idx"]).long()
        refuse_misfit(parts[".g_idx"], bool(((group_of_I >= 0) & (group_of_I < scale_OG.shape[1])).all()))
    return scaled(code_OI, scale_OG, zero_OG, dtype=dtype, group_of_I=group_of_I)


def _read_awq(parts: Mapping[str, TensorEntry], dtype: torch.dtype) -> torch.Tensor:
    code_IO, zero_GO = (_in_order(read_tensor(parts[part])) for part in (".qweight", ".qzeros"))
    return scaled(code_IO.T, read_tensor(parts[".scales"]).T, zero_GO.T, dtype=dtype)


def _in_order(words: torch.Tensor) -> torch.Tensor:
    """uint8 [rows, words * 8]: where place p of a word holds column AWQ_ORDER[p] of its eight."""
    places = torch.tensor([AWQ_ORDER.index(column) for column in range(8)])
    return unpacked(words, 4).unflatten(1, (-1, 8))[:, :, places].flatten(1)
