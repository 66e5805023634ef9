"""Which type each tensor gets: a quantisation's name, the tensor's name and shape in, one of ggml's types out.

The same choice as llama.cpp's own quantizer makes (src/llama-quant.cpp: llama_tensor_get_type_impl and
tensor_type_fallback, without an importance matrix), for dense models of the LLaMA kind.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, LlamaFileType

from finetune.release.gguf import blocks, k_blocks

Type = GGMLQuantizationType


@dataclass(frozen=True)
class Quant:
    """One row of the table: the type most tensors get, the file type in the header, and whether layers differ."""

    default: Type
    file_type: LlamaFileType
    mixed: bool = False


QUANTS = {
    "f32": Quant(Type.F32, LlamaFileType.ALL_F32),
    "f16": Quant(Type.F16, LlamaFileType.MOSTLY_F16),
    "bf16": Quant(Type.BF16, LlamaFileType.MOSTLY_BF16),
    "q8_0": Quant(Type.Q8_0, LlamaFileType.MOSTLY_Q8_0),
    "q4_0": Quant(Type.Q4_0, LlamaFileType.MOSTLY_Q4_0),
    "q5_0": Quant(Type.Q5_0, LlamaFileType.MOSTLY_Q5_0),
    "q4_k_m": Quant(Type.Q4_K, LlamaFileType.MOSTLY_Q4_K_M, mixed=True),
    "q5_k_m": Quant(Type.Q5_K, LlamaFileType.MOSTLY_Q5_K_M, mixed=True),
    "q6_k": Quant(Type.Q6_K, LlamaFileType.MOSTLY_Q6_K),
}
UNQUANTISED = {Type.F32, Type.F16, Type.BF16}
ENCODERS: dict[Type, Callable[[np.ndarray], np.ndarray]] = {
    Type.F32: blocks.encode_f32,
    Type.F16: blocks.encode_f16,
    Type.BF16: blocks.encode_bf16,
    Type.Q8_0: blocks.encode_q8_0,
    Type.Q4_0: blocks.encode_q4_0,
    Type.Q5_0: blocks.encode_q5_0,
    Type.Q5_1: blocks.encode_q5_1,
    Type.Q4_K: k_blocks.encode_q4_k,
    Type.Q5_K: k_blocks.encode_q5_k,
    Type.Q6_K: k_blocks.encode_q6_k,
}
# Where a row is no multiple of 256.
SMALLER_BLOCKS = {Type.Q4_K: Type.Q5_0, Type.Q5_K: Type.Q5_1, Type.Q6_K: Type.Q8_0}


@dataclass(frozen=True)
class ModelShape:
    """What of a model decides the types of its tensors."""

    layers: int
    has_output: bool  # an output.weight of its own; else the embedding does both
    is_70b: bool  # 80 layers with grouped queries: attn_v is small and gets more bits


def tensor_type(name: str, shape: tuple[int, ...], *, quant: Quant, model: ModelShape) -> Type:
    """The type of the tensor `name` (as a GGUF file names it) with `shape` (rows, columns)."""
    if len(shape) < 2 or not name.endswith(".weight") or name.endswith("_norm.weight"):
        return Type.F32
    if quant.default in UNQUANTISED:
        return quant.default
    return _fitting(_wanted(name, shape[-1], quant, model), shape[-1])


def block_size(kind: Type) -> int:
    """Weights in a block."""
    return GGML_QUANT_SIZES[kind][0]


def encoded_bytes(kind: Type, elements: int) -> int:
    size, size_bytes = GGML_QUANT_SIZES[kind]
    return elements // size * size_bytes


def more_bits(layer: int, layers: int) -> bool:
    """Whether a mix gives attn_v and ffn_down of a layer more bits: the first and last eighth, every third between."""
    return layer < layers // 8 or layer >= 7 * layers // 8 or (layer - layers // 8) % 3 == 2


def _wanted(name: str, columns: int, quant: Quant, model: ModelShape) -> Type:
    if name == "output.weight" or (name == "token_embd.weight" and not model.has_output):
        if quant.default == Type.Q8_0 or columns % block_size(quant.default):
            return Type.Q8_0
        return Type.Q6_K
    kind = quant.default
    if not name.startswith("blk.") or not quant.mixed:
        return kind
    layer, part = int(name.split(".")[1]), name.split(".")[2]
    if part in {"attn_v", "ffn_down"} and more_bits(layer, model.layers):
        return Type.Q6_K
    if part == "attn_v" and model.is_70b and kind == Type.Q4_K:
        return Type.Q5_K
    return kind


def _fitting(kind: Type, columns: int) -> Type:
    if columns % block_size(kind):
        kind = SMALLER_BLOCKS.get(kind, kind)
    return Type.F16 if columns % block_size(kind) else kind
