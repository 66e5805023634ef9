"""A base that is stored quantised is made into an ordinary one once, and its records say so to the end."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import bitsandbytes as bnb
import bitsandbytes.functional
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig

from finetune import base as base_module
from finetune import quantised_base
from finetune.artifact import read_json
from finetune.base import find_base_folder, read_base, read_tensor_entries
from finetune.cache import look_at_caches
from finetune.errors import StorageError, UserError
from finetune.quantised_base import stored_as
from finetune.release.gguf.write import write_gguf
from finetune.release.manifest import MANIFEST
from finetune.release.merge import merge
from finetune.resolve import resolve
from finetune.run import run
from finetune.unquantise import convert
from finetune.unquantise.convert import make_folder, read_unquantised
from finetune.use.target import find_target
from tests.conftest import alpaca_rows, make_tiny_base, write_recipe

KINDS = {
    "nf4": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True},
    "nf4, scales as they are": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"},
    "fp4 stored as bfloat16": {"load_in_4bit": True, "bnb_4bit_quant_storage": torch.bfloat16},
    "int8": {"load_in_8bit": True},
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The same model in every form that transformers saves with bitsandbytes."""
    root = tmp_path_factory.mktemp("bases")
    plain = make_tiny_base(root / "plain", dtype="bfloat16")
    (plain / "LICENSE").write_text("Ours.\n")
    found = {"plain": plain}
    for name, settings in KINDS.items():
        config = BitsAndBytesConfig(**settings, **({"bnb_4bit_compute_dtype": torch.bfloat16} if "4" in name else {}))
        model = AutoModelForCausalLM.from_pretrained(plain, dtype=torch.bfloat16, quantization_config=config)
        found[name] = root / name.replace(" ", "-")
        model.save_pretrained(found[name])
        AutoTokenizer.from_pretrained(plain).save_pretrained(found[name])
        shutil.copyfile(plain / "LICENSE", found[name] / "LICENSE")
    return found


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "finetune" / "unquantised"


def weights_of(folder: Path) -> dict[str, torch.Tensor]:
    return {tensor.name: tensor.read() for tensor in read_unquantised(folder).tensors}


@pytest.mark.parametrize("kind", KINDS)
def test_the_values_are_those_that_transformers_computes_with(kind: str, folders: dict[str, Path]) -> None:
    found = weights_of(folders[kind])
    plain = load_file(folders["plain"] / "model.safetensors")
    assert {name: weight.shape for name, weight in found.items()} == {name: each.shape for name, each in plain.items()}
    model = AutoModelForCausalLM.from_pretrained(folders[kind])
    quantised = 0
    for name, module in model.named_modules():
        weight = getattr(module, "weight", None)
        if isinstance(module, bnb.nn.Linear4bit):
            wanted = bitsandbytes.functional.dequantize_4bit(weight.data, weight.quant_state)
        elif isinstance(module, bnb.nn.Linear8bitLt):
            wanted = weight.data.double() * weight.SCB.double()[:, None] / 127
        else:
            continue
        quantised += 1
        assert torch.equal(found[f"{name}.weight"], wanted.to(torch.bfloat16)), name
        assert (found[f"{name}.weight"] - plain[f"{name}.weight"]).abs().max() < 0.1
    assert quantised == 14
    assert torch.equal(found["model.embed_tokens.weight"], plain["model.embed_tokens.weight"])


def test_scales_of_scales_are_their_closed_formula(folders: dict[str, Path]) -> None:
    """Written out from the file: code, scale, the scales' own code, scale and mean."""
    name = "model.layers.1.mlp.up_proj.weight"
    stored = load_file(folders["nf4"] / "model.safetensors")
    parts = {key.removeprefix(name + "."): value for key, value in stored.items() if key.startswith(name + ".")}
    settings = json.loads(bytes(parts["quant_state.bitsandbytes__nf4"].tolist()))
    scales = parts["nested_quant_map"][parts["absmax"].long()] * parts["nested_absmax"][0] + settings["nested_offset"]
    assert settings["nested_offset"] > 0.1
    packed = stored[name].flatten()
    codes = torch.stack([packed >> 4, packed % 16], dim=1).flatten().long()
    wanted = parts["quant_map"][codes].double() * scales.double().repeat_interleave(64)
    found = weights_of(folders["nf4"])[name]
    torch.testing.assert_close(found.double(), wanted.reshape(128, 64), rtol=2**-8, atol=0)


@pytest.mark.parametrize("kind", ["nf4", "nf4, scales as they are"])
def test_nf4_again_gives_the_same_codes(kind: str, folders: dict[str, Path]) -> None:
    stored = load_file(folders[kind] / "model.safetensors")
    for name, weight in weights_of(folders[kind]).items():
        if f"{name}.absmax" in stored:
            again, _ = bitsandbytes.functional.quantize_4bit(weight, blocksize=64, quant_type="nf4")
            assert torch.equal(again, stored[name]), name


def test_rows_that_are_no_whole_blocks_keep_their_own_scales(tmp_path: Path) -> None:
    """Where bitsandbytes' CPU code takes another block's."""
    weight = torch.randn(6, 96, generator=torch.Generator().manual_seed(0)) * torch.logspace(-3, 0, 6)[:, None]
    packed, state = bitsandbytes.functional.quantize_4bit(weight.bfloat16(), blocksize=64, quant_type="nf4")
    stored = {"x.weight": packed} | {f"x.weight.{key}": part for key, part in state.as_dict(packed=True).items()}
    save_file(stored, tmp_path / "model.safetensors")
    settings = {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}
    (tmp_path / "config.json").write_text(json.dumps({"quantization_config": settings}))
    found = weights_of(tmp_path)["x.weight"].float()
    scales = weight.flatten().unflatten(0, (-1, 64)).abs().amax(dim=1).repeat_interleave(64).reshape(6, 96)
    assert ((found - weight).abs() <= 0.16 * scales).all()


def test_damaged_parts_are_told(folders: dict[str, Path], tmp_path: Path) -> None:
    name = "model.layers.0.mlp.up_proj.weight"
    stored = load_file(folders["nf4"] / "model.safetensors")
    wrong = {"absmax": stored[f"{name}.absmax"][:-1], "quant_state.bitsandbytes__nf4": torch.zeros(3).byte()}
    wrong["nested_quant_map"] = torch.zeros(3)
    for part, value in wrong.items():
        folder = tmp_path / part
        folder.mkdir()
        shutil.copyfile(folders["nf4"] / "config.json", folder / "config.json")
        save_file(stored | {f"{name}.{part}": value}, folder / "model.safetensors")
        with pytest.raises(StorageError, match="its 4-bit weights cannot be read"):
            read_unquantised(folder)


def test_a_plan_needs_no_weights(folders: dict[str, Path], cache: Path) -> None:
    plain = read_base(str(folders["plain"]), weights=False).facts
    found = read_base(str(folders["nf4"]), weights=False).facts
    assert found.base == str(folders["nf4"])
    for name in ("linears", "parameters", "stored_bytes", "stored_dtype", "tied_embeddings", "layers", "vocabulary"):
        mine, its = getattr(found, name), getattr(plain, name)
        assert (set(mine), len(mine)) == (set(its), len(its)) if name == "linears" else mine == its, name
    assert not list(cache.rglob("*.safetensors"))


def test_train_and_release_say_what_the_base_was(folders: dict[str, Path], cache: Path, tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path, folders["nf4"], alpaca_rows(8), model__quantization="nf4", train__max_steps=2)
    folder = run(recipe)
    lock, plan = read_json(folder.path / "lock.json"), folder.plan
    original = base_module.sha256_of(folders["nf4"] / "model.safetensors")
    assert lock["base"] == plan["model"]["base"] == str(folders["nf4"])
    assert lock["base_stored"]["form"] == "bitsandbytes nf4"
    assert lock["base_stored"]["sha256"] == {"model.safetensors": original}
    shutil.rmtree(cache)  # it is made again, the same
    release = merge(folder.path, out=tmp_path / "release")
    assert all(proof.passed for proof in release.proofs)
    manifest = read_json(tmp_path / "release" / MANIFEST)
    assert manifest["base"]["id"] == str(folders["nf4"])
    assert manifest["base"]["stored"]["sha256"] == {"model.safetensors": original}
    card = (tmp_path / "release" / "README.md").read_text()
    assert card.count("the base was stored in 4 bits (bitsandbytes nf4)") == 1
    assert "quantization_config" not in read_json(tmp_path / "release" / "config.json")
    assert (tmp_path / "release" / "LICENSE").read_text() == "Ours.\n"
    assert resolve(recipe, resume=True).plan.model.folder == find_base_folder(str(folders["nf4"]))


def test_it_is_made_once(folders: dict[str, Path], cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = find_base_folder(str(folders["int8"]))
    weights = load_file(folder / "model.safetensors")
    assert all(torch.equal(weights[name], value) for name, value in weights_of(folders["int8"]).items())
    assert (folder / "tokenizer.json").read_bytes() == (folders["int8"] / "tokenizer.json").read_bytes()
    assert stored_as(folder)["bits"] == 8
    monkeypatch.setattr(quantised_base.subprocess, "run", None)
    assert find_base_folder(str(folders["int8"])) == folder
    counted = {each.kind: each for each in look_at_caches()}["unquantised"]
    assert counted.entries == 1
    assert counted.bytes > (folder / "model.safetensors").stat().st_size


def test_the_original_alone_names_the_folder(folders: dict[str, Path], tmp_path: Path, cache: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(folders["nf4"], copy)
    folder = find_base_folder(str(copy))
    moved = copy.rename(tmp_path / "moved")
    assert find_base_folder(str(moved)) == folder
    before = (moved / "model.safetensors").stat()
    entry = next(each for each in read_tensor_entries(moved) if each.name == "model.layers.0.mlp.up_proj.weight")
    content = bytearray((moved / "model.safetensors").read_bytes())
    content[entry.start] ^= 1
    (moved / "model.safetensors").write_bytes(content)
    os.utime(moved / "model.safetensors", ns=(before.st_atime_ns, before.st_mtime_ns))
    assert find_base_folder(str(moved)) != folder


def test_half_a_folder_is_never_used(folders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target = tmp_path / "unquantised" / "key"
    target.parent.mkdir()
    with monkeypatch.context() as broken:
        broken.setattr(convert, "write_json", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            make_folder("weights", read_unquantised(folders["nf4"]), target, {})
    assert list(target.parent.iterdir()) == []
    make_folder("weights", read_unquantised(folders["nf4"]), target, {})
    assert (target / "config.json").is_file()


def test_a_full_disk_is_told_before_anything_is_written(
    folders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    with pytest.raises(StorageError) as caught:
        make_folder("weights", read_unquantised(folders["nf4"]), tmp_path / "key", {})
    assert "are needed for a while" in caught.value.problems[0].message
    assert "XDG_CACHE_HOME" in caught.value.problems[1].message
    assert list(tmp_path.iterdir()) == []


def test_shards_are_small_and_indexed(
    folders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(convert, "SHARD_BYTES", 100_000)
    make_folder("weights", read_unquantised(folders["nf4"]), tmp_path / "key", {})
    assert len(list((tmp_path / "key").glob("model-*.safetensors"))) > 3
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "key")
    wanted = weights_of(folders["nf4"])
    assert all(torch.equal(found, wanted[name]) for name, found in model.named_parameters())


def test_what_is_refused_in_the_child_is_told_plainly(folders: dict[str, Path], tmp_path: Path, cache: Path) -> None:
    write_gguf(folders["plain"], tmp_path / "m.gguf", quant="f16", chat_template=None, stop_token_ids=[1], name="x")
    content = (tmp_path / "m.gguf").read_bytes()
    (tmp_path / "m.gguf").write_bytes(
        content.replace(b"\x05\x00\x00\x00\x00\x00\x00\x00llama", b"\x05" + bytes(7) + b"gpt-9")
    )
    with pytest.raises(UserError, match="a GGUF file of 'gpt-9' is not read"):
        read_base(str(tmp_path / "m.gguf"), weights=False)


def test_a_quantised_model_that_is_asked_itself_answers_as_it_is(folders: dict[str, Path], cache: Path) -> None:
    assert find_target(str(folders["nf4"])).plan.folder == folders["nf4"]
    assert not cache.exists()
