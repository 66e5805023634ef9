"""Quantised blocks: what gguf's own dequantizer reads from them lies within closed bounds; llama.cpp's own bytes."""

from __future__ import annotations

import hashlib

import numpy as np
import pytest
import torch
from gguf import quants

from finetune.release.gguf import bounds
from finetune.release.gguf.mix import ENCODERS, QUANTS, ModelShape, Type, block_size, more_bits, tensor_type

BLOCKS = [Type.Q8_0, Type.Q4_0, Type.Q5_0, Type.Q5_1, Type.Q4_K, Type.Q5_K, Type.Q6_K]
# sha256 (first 16 digits) of what ggml_quantize_chunk of llama-cpp-python 0.3.36 (x86-64) makes of `sawtooth()`.
LLAMA_CPP_BYTES = {
    Type.Q8_0: "de7d47915994f480",
    Type.Q4_0: "463f6b78fd559ac6",
    Type.Q5_0: "fbfc85b612d2a2df",
    Type.Q5_1: "bd7b69ce92384ec9",
    Type.Q4_K: "8f3f96d0b4b80e52",
    Type.Q5_K: "8c01cb2037fcabc3",
    Type.Q6_K: "3f85be79827de433",
}


def sawtooth() -> np.ndarray:
    """64 blocks of 256 weights that any machine makes alike: whole numbers over powers of two, every block its size."""
    place = np.arange(64 * 256, dtype=np.int64)
    whole = (place * 7919 + place * place * 13) % 10007 - 5003
    whole[256:512] = 0
    whole[512:544] = 0
    return (whole / 2.0 ** (13 + place // 32 % 11)).astype(np.float32)


def weights(kind: str) -> np.ndarray:
    rng = np.random.default_rng(7)
    values = {
        "normal": lambda: rng.standard_normal((256, 256)) * 0.02,
        "heavy tails": lambda: rng.standard_t(2, (256, 256)) * 0.02,
        "sub-blocks of very different size": lambda: (
            rng.standard_normal((256, 8, 32)) * 10.0 ** rng.uniform(-4, 0, (256, 8, 1))
        ),
        "one outlier in 32": lambda: np.where(np.arange(65536) % 32, 1e-3, 1.0) * rng.standard_normal(65536),
        "all positive": lambda: rng.uniform(0.9, 1, (256, 256)),
        "tiny": lambda: rng.standard_normal((256, 256)) * 1e-6,
        "zero": lambda: np.zeros((256, 256)),
    }
    return values[kind]().astype(np.float32).reshape(-1, 256)


def encode(values: np.ndarray, kind: Type) -> np.ndarray:
    return ENCODERS[kind](values.reshape(-1, block_size(kind)))


WEIGHTS = [
    *("normal", "heavy tails", "sub-blocks of very different size", "one outlier in 32", "all positive", "tiny", "zero")
]


@pytest.mark.parametrize("kind", BLOCKS, ids=lambda kind: kind.name)
@pytest.mark.parametrize("values", WEIGHTS)
def test_every_weight_lies_within_the_bound_and_is_its_blocks_nearest_value(kind, values):
    source = weights(values)
    raw = encode(source, kind)
    read = quants.dequantize(raw, kind).reshape(source.shape)
    assert bounds.count_beyond(source, read, kind) == 0
    assert bounds.count_not_nearest(source, raw, read, kind) == 0


@pytest.mark.parametrize("kind", BLOCKS, ids=lambda kind: kind.name)
def test_a_scale_that_is_off_is_seen(kind):
    source = weights("normal")
    raw = encode(source, kind)
    place = {Type.Q6_K: 208}.get(kind, 0)
    scale = np.ascontiguousarray(raw[5, place : place + 2]).view(np.float16)
    raw[5, place : place + 2] = (scale * np.float16(1.1)).view(np.uint8)
    read = quants.dequantize(raw, kind).reshape(source.shape)
    assert bounds.count_beyond(source, read, kind) + bounds.count_not_nearest(source, raw, read, kind) > 0


@pytest.mark.parametrize("kind", BLOCKS[4:], ids=lambda kind: kind.name)
def test_a_scale_of_one_sub_block_that_is_off_by_one_is_seen(kind):
    source = weights("normal")
    raw = encode(source, kind)
    raw[5, 192 if kind == Type.Q6_K else 4] -= 1
    read = quants.dequantize(raw, kind).reshape(source.shape)
    assert bounds.count_not_nearest(source, raw, read, kind) > 0


@pytest.mark.parametrize("kind", BLOCKS[:4], ids=lambda kind: kind.name)
def test_blocks_of_32_are_those_of_ggufs_own_encoder(kind):
    source = weights("normal")
    np.testing.assert_array_equal(encode(source, kind).reshape(-1), quants.quantize(source, kind).reshape(-1))


@pytest.mark.parametrize("kind", BLOCKS, ids=lambda kind: kind.name)
def test_bytes_are_llama_cpps(kind):
    assert hashlib.sha256(encode(sawtooth(), kind).tobytes()).hexdigest()[:16] == LLAMA_CPP_BYTES[kind]


@pytest.mark.parametrize("values", ["normal", "tiny", "heavy tails"])
def test_16_bit_types_round_as_torch_does(values):
    source = weights(values)
    for kind, dtype in ((Type.F16, torch.float16), (Type.BF16, torch.bfloat16)):
        expected = torch.from_numpy(source).to(dtype).view(torch.int16).numpy().view(np.uint8)
        np.testing.assert_array_equal(ENCODERS[kind](source), expected)


def test_error_falls_with_the_bits():
    source = weights("normal")
    kinds = [Type.Q4_0, Type.Q4_K, Type.Q5_0, Type.Q5_K, Type.Q6_K, Type.Q8_0]
    read = {kind: quants.dequantize(encode(source, kind), kind).reshape(source.shape) for kind in kinds}
    errors = [np.square(read[kind] - source).mean() for kind in kinds]
    assert errors == sorted(errors, reverse=True)


# A mix by layer: the eighths at both ends and every third layer between get more bits (32 layers, llama.cpp's rule).
MORE_BITS_OF_32 = {0, 1, 2, 3, 6, 9, 12, 15, 18, 21, 24, 27, 28, 29, 30, 31}
TYPES = [
    # quantisation, tensor, shape, model, type
    ("q4_k_m", "blk.5.attn_q.weight", (4096, 4096), ModelShape(32, True, False), Type.Q4_K),
    ("q4_k_m", "blk.0.attn_v.weight", (1024, 4096), ModelShape(32, True, False), Type.Q6_K),
    ("q4_k_m", "blk.4.attn_v.weight", (1024, 4096), ModelShape(32, True, False), Type.Q4_K),
    ("q4_k_m", "blk.4.attn_v.weight", (1024, 8192), ModelShape(80, True, True), Type.Q6_K),
    ("q4_k_m", "blk.10.attn_v.weight", (1024, 8192), ModelShape(80, True, True), Type.Q5_K),
    ("q5_k_m", "blk.10.attn_v.weight", (1024, 8192), ModelShape(80, True, True), Type.Q5_K),
    ("q4_k_m", "blk.31.ffn_down.weight", (4096, 11008), ModelShape(32, True, False), Type.Q6_K),
    ("q5_k_m", "blk.6.ffn_down.weight", (4096, 11008), ModelShape(32, True, False), Type.Q6_K),
    ("q5_k_m", "blk.5.ffn_down.weight", (4096, 11008), ModelShape(32, True, False), Type.Q5_K),
    ("q4_k_m", "output.weight", (32000, 4096), ModelShape(32, True, False), Type.Q6_K),
    ("q4_k_m", "token_embd.weight", (32000, 4096), ModelShape(32, True, False), Type.Q4_K),
    ("q4_k_m", "token_embd.weight", (32000, 4096), ModelShape(32, False, False), Type.Q6_K),
    ("q4_0", "output.weight", (32000, 4096), ModelShape(32, True, False), Type.Q6_K),
    ("q4_0", "blk.0.attn_v.weight", (1024, 4096), ModelShape(32, True, False), Type.Q4_0),
    ("q8_0", "output.weight", (32000, 4096), ModelShape(32, True, False), Type.Q8_0),
    ("q4_k_m", "blk.5.ffn_down.weight", (896, 4864), ModelShape(24, True, False), Type.Q6_K),
    ("q4_k_m", "blk.5.attn_q.weight", (896, 896), ModelShape(24, True, False), Type.Q5_0),
    ("q5_k_m", "blk.4.attn_q.weight", (896, 896), ModelShape(24, True, False), Type.Q5_1),
    ("q6_k", "blk.4.attn_q.weight", (896, 896), ModelShape(24, True, False), Type.Q8_0),
    ("q4_k_m", "token_embd.weight", (512, 64), ModelShape(5, False, False), Type.Q8_0),
    ("q4_0", "blk.0.ffn_down.weight", (64, 172), ModelShape(5, False, False), Type.F16),
    ("q4_k_m", "blk.0.attn_norm.weight", (4096,), ModelShape(32, True, False), Type.F32),
    ("f16", "output_norm.weight", (4096,), ModelShape(32, True, False), Type.F32),
    ("bf16", "blk.0.attn_q.bias", (4096,), ModelShape(32, True, False), Type.F32),
    ("bf16", "blk.0.attn_q.weight", (64, 172), ModelShape(32, True, False), Type.BF16),
]


@pytest.mark.parametrize(("quant", "name", "shape", "model", "expected"), TYPES)
def test_type_of_a_tensor(quant, name, shape, model, expected):
    assert tensor_type(name, shape, quant=QUANTS[quant], model=model) == expected


def test_layers_with_more_bits():
    assert {layer for layer in range(32) if more_bits(layer, 32)} == MORE_BITS_OF_32
