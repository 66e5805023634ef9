"""compressed-tensors, GPTQ and AWQ: what is read equals other readings of the same words."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
from compressed_tensors.quantization.utils import calculate_qparams
from safetensors.torch import load_file, save_file

from finetune.errors import StorageError, UserError
from finetune.quantised_base import find_stored
from finetune.release.compressed import write_compressed
from finetune.unquantise.convert import read_unquantised
from tests.release.models import make_base

MODULE = "model.layers.0.self_attn.q_proj"
ROWS, COLUMNS, GROUP = 48, 64, 16


def stored(folder: Path, tensors: dict[str, torch.Tensor], **settings: object) -> Path:
    """A folder with these tensors of one module, and a norm that is as it was."""
    folder.mkdir(exist_ok=True)
    named = {f"{MODULE}.{name}": tensor.contiguous() for name, tensor in tensors.items()}
    save_file(named | {"model.norm.weight": torch.ones(4, dtype=torch.float16)}, folder / "model.safetensors")
    config = {"model_type": "llama", "dtype": "float16", "quantization_config": settings}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def weights_of(folder: Path) -> dict[str, torch.Tensor]:
    found = {tensor.name: (tensor, tensor.read()) for tensor in read_unquantised(folder).tensors}
    assert all(tuple(values.shape) == tensor.shape for tensor, values in found.values())
    return {name: values for name, (_, values) in found.items()}


COMPRESSED = {
    "groups of 4 bits": ("pack-quantized", {"num_bits": 4, "strategy": "group", "group_size": GROUP}),
    "groups with zero points": (
        "pack-quantized",
        {"num_bits": 4, "strategy": "group", "group_size": GROUP, "symmetric": False},
    ),
    "channels of 8 bits": ("pack-quantized", {"num_bits": 8, "strategy": "channel"}),
    "channels of 8 bits with zero points": (
        "pack-quantized",
        {"num_bits": 8, "strategy": "channel", "symmetric": False},
    ),
    "bytes": ("int-quantized", {"num_bits": 8, "strategy": "channel"}),
    "bytes with zero points": ("naive-quantized", {"num_bits": 8, "strategy": "channel", "symmetric": False}),
    "one scale": ("int-quantized", {"num_bits": 8, "strategy": "tensor"}),
    "fp8": ("float-quantized", {"num_bits": 8, "type": "float", "strategy": "channel"}),
}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(("form", "settings"), COMPRESSED.values(), ids=COMPRESSED.keys())
def test_compressed_weights_are_what_the_library_decodes(form: str, settings: dict, dtype, tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(1)
    weight = torch.randn(ROWS, COLUMNS, generator=generator).to(dtype) + 0.3
    arguments = QuantizationArgs(**settings)
    grouped = weight.unflatten(1, (-1, GROUP)) if settings["strategy"] == "group" else weight[:, None]
    low, high = grouped.amin(dim=2), grouped.amax(dim=2)
    if settings["strategy"] == "tensor":
        low, high = low.amin().reshape(1), high.amax().reshape(1)
    scale, zero = calculate_qparams(low, high, arguments)
    scheme = QuantizationScheme(targets=["Linear"], weights=arguments, format=form)
    compressor = BaseCompressor.get_value_from_registry(form)
    given = {"weight": weight, "weight_scale": scale.to(dtype), "weight_zero_point": zero}
    packed = compressor.compress(given, scheme)
    wanted = compressor.decompress(dict(packed), scheme)["weight"]
    parts = {name: torch.tensor(part) if not torch.is_tensor(part) else part for name, part in packed.items()}
    group = {"weights": json.loads(arguments.model_dump_json()), "targets": ["Linear"]}
    folder = stored(
        tmp_path / "base", parts, quant_method="compressed-tensors", format=form, config_groups={"group_0": group}
    )
    found = weights_of(folder)
    assert found.keys() == {f"{MODULE}.weight", "model.norm.weight"}
    assert torch.equal(found[f"{MODULE}.weight"], wanted.to(dtype))
    assert (found[f"{MODULE}.weight"] - weight).abs().max() < 0.5


def test_our_own_export_comes_back(tmp_path: Path) -> None:
    base = make_base(tmp_path / "base", "llama", dtype="bfloat16")
    (tmp_path / "w4").mkdir()
    write_compressed(base, tmp_path / "w4")
    found, plain = weights_of(tmp_path / "w4"), load_file(base / "model.safetensors")
    packed = load_file(tmp_path / "w4" / "model.safetensors")
    assert found.keys() == plain.keys()
    name = "model.layers.1.mlp.down_proj.weight"
    words, scale = packed[f"{name}_packed"], packed[f"{name}_scale"]
    codes = torch.stack([(words >> (4 * place) & 15) - 8 for place in range(8)], dim=2).flatten(1)
    wanted = codes.double() * scale.double().repeat_interleave(128, 1)
    assert torch.equal(found[name], wanted.to(torch.bfloat16))
    untouched = [other for other in plain if f"{other}_packed" not in packed]
    assert all(torch.equal(found[other], plain[other]) for other in untouched)


def gptq_parts(bits: int, *, less_one: bool, ordered: bool) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """One linear's tensors as GPTQ stores them, word by word, and the values they stand for."""
    chance = torch.Generator().manual_seed(bits)
    most, per_word, groups = 2**bits - 1, 32 // bits, COLUMNS // GROUP
    codes = torch.randint(0, most + 1, (ROWS, COLUMNS), generator=chance)
    zeros = torch.randint(0, most + 1, (ROWS, groups), generator=chance)
    scales = (torch.rand(ROWS, groups, generator=chance) * 0.1).half()
    group_of = torch.randperm(COLUMNS, generator=chance) // GROUP if ordered else torch.arange(COLUMNS) // GROUP
    qweight = torch.zeros(COLUMNS // per_word, ROWS, dtype=torch.int64)
    for column in range(COLUMNS):
        qweight[column // per_word] |= codes[:, column] << (bits * (column % per_word))
    qzeros = torch.zeros(groups, ROWS // per_word, dtype=torch.int64)
    kept = (zeros - 1) % (most + 1) if less_one else zeros
    for row in range(ROWS):
        qzeros[:, row // per_word] |= kept[row] << (bits * (row % per_word))
    values = (codes - zeros[:, group_of]).double() * scales.double()[:, group_of]
    parts = {"qweight": as_words(qweight), "qzeros": as_words(qzeros), "scales": scales.T}
    return parts | {"g_idx": group_of.int()}, values.half()


def as_words(numbers: torch.Tensor) -> torch.Tensor:
    return torch.where(numbers >= 2**31, numbers - 2**32, numbers).int()


@pytest.mark.parametrize("ordered", [False, True], ids=["in order", "by importance"])
@pytest.mark.parametrize("less_one", [True, False], ids=["v1", "v2"])
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_gptq_is_read_word_by_word(bits: int, less_one: bool, ordered: bool, tmp_path: Path) -> None:
    parts, wanted = gptq_parts(bits, less_one=less_one, ordered=ordered)
    version = "gptq" if less_one else "gptq_v2"
    folder = stored(tmp_path / "base", parts, quant_method="gptq", bits=bits, checkpoint_format=version)
    assert torch.equal(weights_of(folder)[f"{MODULE}.weight"], wanted)


def test_fp8_in_blocks_is_its_closed_formula(tmp_path: Path) -> None:
    chance = torch.Generator().manual_seed(4)
    code = torch.randn(ROWS, COLUMNS, generator=chance).to(torch.float8_e4m3fn)
    scale = torch.rand(3, 2, generator=chance) + 0.1
    settings = {"quant_method": "fp8", "weight_block_size": [20, 40]}
    folder = stored(tmp_path / "base", {"weight": code, "weight_scale_inv": scale}, **settings)
    wanted = torch.stack(
        [
            torch.stack([code[row, column].double() * scale[row // 20, column // 40] for column in range(COLUMNS)])
            for row in range(ROWS)
        ]
    )
    found = weights_of(folder)
    assert found.keys() == {f"{MODULE}.weight", "model.norm.weight"}
    assert torch.equal(found[f"{MODULE}.weight"], wanted.to(torch.float16))
    with pytest.raises(StorageError, match="do not fit each other"):
        weights_of(stored(tmp_path / "base", {"weight": code, "weight_scale_inv": scale[:2]}, **settings))


def test_biases_of_a_model_without_any_are_left_out(tmp_path: Path) -> None:
    parts, _ = gptq_parts(4, less_one=True, ordered=False)
    settings = {"quant_method": "gptq", "bits": 4}
    zeros = parts | {"bias": torch.zeros(ROWS).half()}
    assert f"{MODULE}.bias" not in weights_of(stored(tmp_path / "zeros", zeros, **settings))
    others = parts | {"bias": torch.ones(ROWS).half()}
    assert f"{MODULE}.bias" in weights_of(stored(tmp_path / "others", others, **settings))


def test_awq_is_read_word_by_word(tmp_path: Path) -> None:
    chance = torch.Generator().manual_seed(3)
    codes = torch.randint(0, 16, (ROWS, COLUMNS), generator=chance)
    zeros = torch.randint(0, 16, (ROWS, COLUMNS // GROUP), generator=chance)
    scales = (torch.rand(ROWS, COLUMNS // GROUP, generator=chance) * 0.1).half()

    def words(numbers_OX: torch.Tensor) -> torch.Tensor:
        packed = torch.zeros(numbers_OX.shape[1], ROWS // 8, dtype=torch.int64)
        for word in range(ROWS // 8):
            for place, row in enumerate((0, 2, 4, 6, 1, 3, 5, 7)):
                packed[:, word] |= numbers_OX[8 * word + row] << (4 * place)
        return as_words(packed)

    parts = {"qweight": words(codes), "qzeros": words(zeros), "scales": scales.T}
    folder = stored(tmp_path / "base", parts, quant_method="awq", bits=4, version="gemm", group_size=GROUP)
    group = torch.arange(COLUMNS) // GROUP
    wanted = ((codes - zeros[:, group]).double() * scales.double()[:, group]).half()
    assert torch.equal(weights_of(folder)[f"{MODULE}.weight"], wanted)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"quant_method": "hqq"}, "stored as 'hqq', which is not read"),
        ({"quant_method": "aqlm"}, "read are bitsandbytes, compressed-tensors, gptq, awq, fp8 and GGUF"),
        ({"quant_method": "mxfp4"}, "name the model that it was made from"),
        (
            {"quant_method": "compressed-tensors", "format": "nvfp4-pack-quantized"},
            "'nvfp4-pack-quantized' is not read",
        ),
        ({"quant_method": "gptq", "bits": 3}, "GPTQ in 3 bits is not read"),
        ({"quant_method": "awq", "bits": 4, "version": "gemv"}, "AWQ 'gemv' in 4 bits"),
        ({"quant_method": "fp8"}, "FP8 without weight_block_size"),
        ({"load_in_4bit": True, "bnb_4bit_quant_type": "[x](y)"}, "are read as nf4 and fp4 only"),
        ("yes", "must be an object, got str"),
    ],
)
def test_what_is_not_read_is_refused_by_its_config(settings: object, message: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama", "quantization_config": settings}))
    with pytest.raises(UserError, match=message):
        find_stored(tmp_path)


def test_blocks_and_quantised_attention_are_refused(tmp_path: Path) -> None:
    parts = {"weight": torch.zeros(4, 4, dtype=torch.int8), "weight_scale": torch.ones(1, 1), "k_scale": torch.ones(1)}
    group = {"weights": {"strategy": "block", "num_bits": 8}}
    settings = {"quant_method": "compressed-tensors", "format": "int-quantized", "config_groups": {"g": group}}
    with pytest.raises(UserError) as caught:
        read_unquantised(stored(tmp_path / "base", parts, **settings))
    assert len(caught.value.problems) == 2


@pytest.mark.parametrize("changed", ["qzeros", "scales", "g_idx"])
def test_parts_that_do_not_fit_are_damage(changed: str, tmp_path: Path) -> None:
    parts, _ = gptq_parts(4, less_one=True, ordered=False)
    parts[changed] = parts[changed][:-1]
    with pytest.raises(StorageError, match="do not fit each other"):
        weights_of(stored(tmp_path / "base", parts, quant_method="gptq", bits=4))
