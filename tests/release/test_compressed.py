"""A model in 4 bits: codes against compressed-tensors and brute force, folders proven, damage seen."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32, unpack_from_int32
from compressed_tensors.quantization import preset_name_to_scheme
from compressed_tensors.quantization.lifecycle.forward import dequantize, quantize
from compressed_tensors.quantization.utils import calculate_qparams
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from finetune.base import read_tensor_entries
from finetune.errors import UserError
from finetune.release import compressed
from finetune.release.compressed import compressed_bytes, prove_compressed, refuse_compressed, write_compressed
from finetune.release.compressed_layout import read_layout
from finetune.release.int4 import decode, group_scales, nearest_codes, pack, unpack
from finetune.release.manifest import CARD, MANIFEST
from finetune.release.source import read_source
from tests.conftest import POCKET
from tests.release.models import SHAPE, make_base
from tests.release.runs import random_run

DTYPES = [torch.bfloat16, torch.float16, torch.float32]
SCHEME = preset_name_to_scheme("W4A16", ["Linear"]).weights
Q = "model.layers.0.self_attn.q_proj.weight"
DOWN = "model.layers.1.mlp.down_proj.weight"


@pytest.fixture
def _wide(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows of 128 and 256, which groups of 128 fill."""
    monkeypatch.setitem(SHAPE, "hidden_size", 128)
    monkeypatch.setitem(SHAPE, "intermediate_size", 256)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A LLaMA in bfloat16, and its compressed form."""
    folder = tmp_path_factory.mktemp("compressed")
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(SHAPE, "hidden_size", 128)
        patch.setitem(SHAPE, "intermediate_size", 256)
        model = make_base(folder / "model", "llama", dtype="bfloat16")
    return model, write(model, folder / "out")


def write(model: Path, out: Path) -> Path:
    out.mkdir()
    write_compressed(model, out)
    return out


def failed(out: Path, model: Path) -> list[str]:
    return [found.name for found in prove_compressed(out, model) if not found.passed]


def some_weights(dtype: torch.dtype) -> torch.Tensor:
    """Random rows, a row of zeros, one of equal values, one of a single large value, one of tiny ones, exact ties."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(64, 384, generator=generator)
    weight[1] = 0
    weight[2] = -0.25
    weight[3, 5] = 300
    weight[4] *= 1e-7
    weight[5] = torch.arange(384) % 16 - 7.5  # the largest is 7.5, so that the scale is 1 and every value a tie
    return weight.to(dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_scales_and_codes_are_those_of_compressed_tensors(dtype):
    weight = some_weights(dtype)
    grouped = weight.unflatten(1, (-1, 128))
    theirs, zero = calculate_qparams(grouped.amin(2), grouped.amax(2), SCHEME)
    scale = group_scales(weight)
    assert scale.dtype == dtype
    assert torch.equal(scale, theirs)
    # In double: in 16 bits the library rounds the quotient too, see the test below.
    codes = quantize(weight.double(), theirs.double(), zero.double(), SCHEME, dtype=torch.int8)
    ours = nearest_codes(weight, scale)
    assert torch.equal(ours, codes)
    assert torch.equal(pack(ours), pack_to_int32(codes, 4))
    assert torch.equal(unpack(pack(ours)), ours)
    assert torch.equal(unpack_from_int32(pack(ours), 4, weight.shape), ours)
    assert torch.equal(decode(ours, scale), dequantize(codes, theirs, zero, SCHEME))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_no_other_code_is_nearer(dtype):
    weight = some_weights(dtype)
    scale, codes = group_scales(weight), nearest_codes(weight, group_scales(weight))
    wide = scale.double().repeat_interleave(128, dim=1)
    distances = torch.stack([(weight.double() - code * wide).abs() for code in range(-8, 8)])
    chosen = distances.gather(0, (codes.long() + 8)[None])[0]
    assert torch.equal(chosen, distances.min(dim=0).values)


def test_the_librarys_own_codes_in_16_bits_are_not_all_nearest():
    weight = some_weights(torch.bfloat16)
    scale = group_scales(weight)
    theirs = quantize(weight, scale, torch.zeros_like(scale), SCHEME, dtype=torch.int8)
    ours = nearest_codes(weight, scale)
    assert 0 < (ours != theirs).float().mean() < 0.02
    wide = scale.double().repeat_interleave(128, dim=1)
    error = [(weight.double() - code.double() * wide).abs() for code in (ours, theirs)]
    assert (error[0] <= error[1]).all()


@pytest.mark.usefixtures("_wide")
@pytest.mark.parametrize(
    ("kind", "dtype"),
    [
        ("llama, multi-head", "float32"),
        ("llama, tied", "bfloat16"),
        ("llama, biases", "float16"),
        ("qwen2", "bfloat16"),
        ("gemma2", "bfloat16"),
        ("mixtral", "bfloat16"),
    ],
)
def test_every_family_is_proven(tmp_path, kind, dtype):
    model = make_base(tmp_path / "model", kind, dtype=dtype)
    refuse_compressed(model)
    out = write(model, tmp_path / "out")
    proofs = {found.name: found for found in prove_compressed(out, model)}
    assert all(found.passed for found in proofs.values())
    assert proofs["logits as transformers reads the folder"].value == 0
    assert 0.08 < proofs["quantisation error, share of the weights' size"].value < 0.13
    linears = [name for name in load_file(out / "model.safetensors") if name.endswith(".weight_packed")]
    per_layer = {"mixtral": 4 + 4 * 3, "gemma2": 4 + 3 - 1}  # the gemma's o_proj has rows of 64
    assert len(linears) == 2 * per_layer.get(kind, 4 + 3)


def test_the_folder_holds_what_a_release_holds(made):
    model, out = made
    assert {file.name for file in out.iterdir()} == {file.name for file in model.iterdir()}
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        assert (out / name).read_bytes() == (model / name).read_bytes()


def test_card_manifest_and_hidden_files_stay_behind(made, tmp_path):
    model = shutil.copytree(made[0], tmp_path / "model")
    for name in (CARD, MANIFEST, ".hidden", "LICENSE", "consolidated.pth"):
        (model / name).write_text("{}")
    there = {file.name for file in write(model, tmp_path / "out").iterdir()}
    assert there & {CARD, MANIFEST, ".hidden", "LICENSE", "consolidated.pth"} == {"LICENSE"}


def test_config_json_says_what_vllm_reads(made):
    model, out = made
    config = json.loads((out / "config.json").read_text())
    assert config.pop("quantization_config") == {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "quantization_status": "compressed",
        "version": "0.20.0",
        "config_groups": {
            "group_0": {
                "format": "pack-quantized",
                "targets": ["Linear"],
                "input_activations": None,
                "output_activations": None,
                "weights": {
                    "num_bits": 4,
                    "type": "int",
                    "symmetric": True,
                    "strategy": "group",
                    "group_size": 128,
                    "dynamic": False,
                    "actorder": None,
                    "observer": "memoryless_minmax",
                },
            }
        },
        "ignore": ["lm_head"],
        "kv_cache_scheme": None,
        "global_compression_ratio": None,
    }
    assert config == json.loads((model / "config.json").read_text())


@pytest.mark.usefixtures("_wide")
def test_routers_are_ignored_by_their_stored_names(tmp_path):
    ignored = read_layout(make_base(tmp_path / "model", "mixtral", dtype="bfloat16")).ignore
    assert ignored == ["lm_head", "model.layers.0.block_sparse_moe.gate", "model.layers.1.block_sparse_moe.gate"]


def test_bytes_are_known_before_writing(made):
    model, out = made
    assert compressed_bytes(model) == sum(entry.bytes for entry in read_tensor_entries(out))


def test_shards_hold_the_same_tensors(made, tmp_path, monkeypatch):
    model, whole = made
    monkeypatch.setattr(compressed, "SHARD_BYTES", 150_000)
    out = write(model, tmp_path / "out")
    index = json.loads((out / "model.safetensors.index.json").read_text())
    assert len(set(index["weight_map"].values())) > 3
    assert index["metadata"]["total_size"] == compressed_bytes(model)
    expected = load_file(whole / "model.safetensors")
    assert index["weight_map"].keys() == expected.keys()
    for name, file in index["weight_map"].items():
        assert torch.equal(load_file(out / file)[name], expected[name])
    assert failed(out, model) == []


def test_rows_that_groups_do_not_fill_stay_in_16_bits(tmp_path, monkeypatch):
    monkeypatch.setitem(SHAPE, "hidden_size", 128)
    monkeypatch.setitem(SHAPE, "intermediate_size", 192)
    model = make_base(tmp_path / "model", "llama", dtype="bfloat16")
    (tmp_path / "out").mkdir()
    notes = write_compressed(model, tmp_path / "out")
    assert any("2 modules stay in 16 bits" in note and "down_proj (192)" in note for note in notes)
    ignored = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]["ignore"]
    assert ignored == ["lm_head", "model.layers.0.mlp.down_proj", "model.layers.1.mlp.down_proj"]
    assert failed(tmp_path / "out", model) == []


def test_what_cannot_be_compressed_is_refused(made, tmp_path, monkeypatch):
    monkeypatch.setitem(SHAPE, "intermediate_size", 64)
    narrow = make_base(tmp_path / "narrow", "llama", dtype="bfloat16")
    monkeypatch.setitem(SHAPE, "intermediate_size", 256)
    monkeypatch.setitem(SHAPE, "hidden_size", 192)
    experts = make_base(tmp_path / "experts", "mixtral", dtype="bfloat16")
    with pytest.raises(UserError, match=r"q_proj \(64\)"):
        refuse_compressed(narrow)
    with pytest.raises(UserError, match=r"w1 \(192\): 2 modules of experts"):
        refuse_compressed(experts)
    with pytest.raises(UserError, match="quantised already"):
        refuse_compressed(made[1])
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError) as caught:
        refuse_compressed(narrow)
    assert len(caught.value.problems) == 2
    assert "finetune-toolkit[compressed-tensors]" in str(caught.value)
    with pytest.raises(UserError, match="is not installed"):
        prove_compressed(made[1], made[0])


def test_a_model_without_the_weights_of_its_modules_is_refused(made, tmp_path):
    model = shutil.copytree(made[0], tmp_path / "model")
    tensors = load_file(model / "model.safetensors")
    save_file({f"text.{name}": tensor for name, tensor in tensors.items()}, model / "model.safetensors")
    with pytest.raises(UserError, match="14 linear modules have no stored weight of their name"):
        refuse_compressed(model)


def test_weights_stored_in_8_bits_are_refused(made, tmp_path):
    model = shutil.copytree(made[0], tmp_path / "model")
    tensors = load_file(model / "model.safetensors")
    save_file(tensors | {Q: tensors[Q].to(torch.float8_e4m3fn)}, model / "model.safetensors")
    with pytest.raises(UserError, match=r"q_proj.weight \(F8_E4M3\): 1 weights are not stored"):
        refuse_compressed(model)


def test_groups_of_zeros_and_of_tiny_weights_are_proven(made, tmp_path):
    model = shutil.copytree(made[0], tmp_path / "model")
    tensors = load_file(model / "model.safetensors")
    tensors[Q][:5] = 0
    tensors[DOWN][7, :128] = 1e-40
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})
    out = write(model, tmp_path / "out")
    assert (load_file(out / "model.safetensors")[f"{Q}_packed"][:5] == -0x77777778).all()  # every code is 0
    assert failed(out, model) == []


def test_fused_experts_are_refused(made, tmp_path):
    model = shutil.copytree(made[0], tmp_path / "model")
    tensors = load_file(model / "model.safetensors")
    tensors["model.layers.0.mlp.experts.gate_up_proj"] = torch.zeros(2, 128, 256, dtype=torch.bfloat16)
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match="experts.gate_up_proj: 1 tensors hold all experts"):
        refuse_compressed(model)


def test_weights_that_are_not_finite_are_refused(made, tmp_path):
    model = shutil.copytree(made[0], tmp_path / "model")
    tensors = load_file(model / "model.safetensors")
    tensors[DOWN][3, 7] = torch.inf
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})
    (tmp_path / "out").mkdir()
    with pytest.raises(UserError, match=r"down_proj.weight: holds weights that are not finite"):
        write_compressed(model, tmp_path / "out")


@pytest.mark.parametrize("place", ["model", ".out.partial/merged"])
def test_the_loss_on_the_runs_rows_is_recorded(tmp_path, place):
    run = random_run(tmp_path / "run")
    model = shutil.copytree(POCKET, tmp_path / place)
    (model / MANIFEST).write_text(json.dumps({"run": os.path.relpath(run.path, tmp_path / "out")}))
    out = write(model, tmp_path / "out")
    proofs = {found.name: found for found in prove_compressed(out, model)}
    rows = read_source(run.path).rows.examples
    assert len(rows) == 6
    for folder, name in ((model, "loss of the model on the run's rows"), (out, "loss on the run's rows")):
        network = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
        total = 0.0
        for row in rows:
            with torch.no_grad():
                logits = network(torch.tensor(row.ids)[None].long()).logits[0, :-1].float()
            total += F.cross_entropy(logits, torch.tensor(row.labels)[1:].long(), reduction="sum").item()
        mean = total / sum(row.supervised_tokens for row in rows)
        assert proofs[name].value == pytest.approx(mean, rel=0.01)  # in bfloat16, another order of summation
        assert proofs[name].limit is None


def test_a_model_that_does_not_fit_is_proven_without_loading_it_whole(made, monkeypatch):
    """All but what only transformers with the whole model can say; the rest has the same values."""
    model, out = made[0], made[1]
    whole = {found.name: found for found in prove_compressed(out, model)}
    monkeypatch.setattr(compressed, "fits_whole", lambda bytes_stored: False)
    monkeypatch.setattr(compressed, "_load", None)
    parts = {found.name: found for found in prove_compressed(out, model)}
    assert whole.keys() - parts.keys() == {
        "weights that transformers misses or does not know",
        "logits as transformers reads the folder",
    }
    assert parts == {name: found for name, found in whole.items() if name in parts}


Tensors = dict[str, torch.Tensor]


def another_code(tensors: Tensors) -> None:
    tensors[f"{Q}_packed"][5, 3] ^= 1 << 8


def another_scale(tensors: Tensors) -> None:
    """The codes fit the new scale, so that only the scale is wrong."""
    tensors[f"{Q}_scale"][2, 0] *= 1.5


def zero_scale(tensors: Tensors) -> None:
    tensors[f"{Q}_scale"][2, 0] = 0


def two_rows(tensors: Tensors) -> None:
    tensors[f"{DOWN}_packed"][[0, 1]] = tensors[f"{DOWN}_packed"][[1, 0]]


def other_shape(tensors: Tensors) -> None:
    tensors[f"{DOWN}_shape"] = tensors[f"{DOWN}_shape"].flip(0).contiguous()


def a_norm(tensors: Tensors) -> None:
    tensors["model.norm.weight"][0] += 0.1


def no_scale(tensors: Tensors) -> None:
    del tensors[f"{DOWN}_scale"]


def wide_scale(tensors: Tensors) -> None:
    tensors[f"{DOWN}_scale"] = tensors[f"{DOWN}_scale"].float()


@pytest.mark.parametrize(
    ("damage", "told"),
    [
        (another_code, "codes that are not the nearest"),
        (another_scale, "scales that are not their group's"),
        (zero_scale, "scales that are zero"),
        (two_rows, "codes that are not the nearest"),
        (other_shape, "decodes otherwise"),
        (a_norm, "other tensors that changed"),
        (no_scale, "tensor names"),
        (wide_scale, "tensor names"),
    ],
)
def test_the_proofs_see_damaged_weights(made, tmp_path, damage: Callable[[Tensors], None], told):
    out = shutil.copytree(made[1], tmp_path / "out")
    tensors = load_file(out / "model.safetensors")
    damage(tensors)
    save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})
    names = failed(out, made[0])
    assert any(told in name for name in names), names


@pytest.mark.parametrize(
    "change",
    [
        lambda config: config.pop("quantization_config"),
        lambda config: config["quantization_config"]["ignore"].clear(),
        lambda config: config["quantization_config"].update(format="int-quantized"),
        lambda config: config["quantization_config"]["config_groups"]["group_0"]["weights"].update(group_size=64),
        lambda config: config["quantization_config"]["config_groups"]["group_0"].update(targets=["re:.*q_proj"]),
        lambda config: config.update(rms_norm_eps=1e-5),
    ],
    ids=["no entry", "nothing ignored", "another format", "groups of 64", "only q_proj", "another norm"],
)
def test_the_proofs_see_another_config(made, tmp_path, change: Callable[[dict[str, Any]], object]):
    out = shutil.copytree(made[1], tmp_path / "out")
    config = json.loads((out / "config.json").read_text())
    change(config)
    (out / "config.json").write_text(json.dumps(config))
    assert failed(out, made[0]) == ["config entries that differ"]
