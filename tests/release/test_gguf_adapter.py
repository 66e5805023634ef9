"""A LoRA adapter as a GGUF file: llama.cpp's sum is PEFT's, what it cannot hold is refused, damage is seen."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gguf import GGUFReader, GGUFWriter
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM

from finetune.errors import StorageError, UserError
from finetune.release.gguf.adapter import prove_gguf_adapter, write_gguf_adapter
from finetune.release.source import Source, read_source
from tests.release.models import make_base
from tests.release.runs import random_run

PLAIN: dict[str, Any] = {"r": 4, "lora_alpha": 8, "target_modules": "all-linear"}
# kind of base, LoraConfig's settings, and the alpha that llama.cpp has to divide by the rank
CASES = {
    "grouped queries": ("llama", PLAIN, 8.0),
    "multi-head": ("llama, multi-head", PLAIN, 8.0),
    "biases": ("llama, biases", PLAIN, 8.0),
    "rank-stabilised": ("llama", PLAIN | {"use_rslora": True, "r": 3}, 8 * math.sqrt(3)),
    "the head": ("llama", PLAIN | {"target_modules": ["k_proj", "lm_head"]}, 8.0),
    "ranks and alphas of their own": (
        "llama",
        PLAIN | {"rank_pattern": {"q_proj": 3, r"layers\.1\.mlp\.up_proj": 5}, "alpha_pattern": {"o_proj": 1.7}},
        8.0,
    ),
    "wide heads": ("mistral", PLAIN, 8.0),
    "qwen2": ("qwen2", PLAIN, 8.0),
    "qwen3": ("qwen3", PLAIN | {"use_rslora": True}, 16.0),
    "gemma2": ("gemma2", PLAIN, 8.0),
}
LEAVES = {"q_proj": "attn_q", "k_proj": "attn_k", "v_proj": "attn_v", "o_proj": "attn_output"}
LEAVES |= {"gate_proj": "ffn_gate", "up_proj": "ffn_up", "down_proj": "ffn_down"}


def make_adapter(folder: Path, kind: str, **settings: Any) -> tuple[Source, PeftModel]:
    """A random adapter on a random base."""
    base = make_base(folder / "base", kind, dtype="float32")
    model = AutoModelForCausalLM.from_pretrained(str(base))
    tuned = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", **settings))
    generator = torch.Generator().manual_seed(1)
    for name, parameter in tuned.named_parameters():
        if "lora_" in name:
            parameter.data = 0.1 * torch.randn(parameter.shape, generator=generator)
    tuned.peft_config["default"].base_model_name_or_path = str(base)
    tuned.save_pretrained(str(folder / "adapter"), save_embedding_layers=False)
    return read_source(folder / "adapter"), tuned


def written(source: Source, file: Path) -> GGUFReader:
    write_gguf_adapter(source, file, name="tiny")
    return GGUFReader(file)


def added_by_llama_cpp(reader: GGUFReader) -> dict[str, np.ndarray]:
    """alpha / rank * B A by tensor of the base's file, as llama.cpp's src/llama-adapter.h adds it."""
    arrays = {tensor.name: np.asarray(tensor.data, dtype=np.float64) for tensor in reader.tensors}
    alpha = reader.fields["adapter.lora.alpha"].contents()
    names = [name.removesuffix(".lora_a") for name in arrays if name.endswith(".lora_a")]
    return {
        name: alpha / arrays[f"{name}.lora_b"].shape[1] * arrays[f"{name}.lora_b"] @ arrays[f"{name}.lora_a"]
        for name in names
    }


def rows_of_file(heads: int, size: int) -> list[int]:
    """Which row of transformers' q or k lies in each row of the file: pairs that rotate together are neighbours."""
    half = size // 2
    return [head * size + pair + part * half for head in range(heads) for pair in range(half) for part in (0, 1)]


@pytest.mark.parametrize(("kind", "settings", "alpha"), CASES.values(), ids=CASES)
def test_llama_cpp_adds_what_peft_adds(tmp_path, kind, settings, alpha):
    source, tuned = make_adapter(tmp_path, kind, **settings)
    reader = written(source, tmp_path / "a.gguf")
    assert reader.fields["adapter.lora.alpha"].contents() == np.float32(alpha)
    config = tuned.config
    size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
    added = added_by_llama_cpp(reader)
    for module_name, module in tuned.named_modules():
        if not hasattr(module, "lora_A"):
            continue
        parts, leaf = module_name.split("."), module_name.rsplit(".", 1)[-1]
        name = "output.weight" if leaf == "lm_head" else f"blk.{parts[parts.index('layers') + 1]}.{LEAVES[leaf]}.weight"
        expected = module.get_delta_weight("default").detach().double().numpy()
        if leaf in heads and config.model_type in {"llama", "mistral"}:
            expected = expected[rows_of_file(heads[leaf], size)]
        np.testing.assert_allclose(added.pop(name), expected, rtol=0, atol=3e-7 * np.abs(expected).max())
    assert not added
    proofs = prove_gguf_adapter(tmp_path / "a.gguf", source)
    assert all(found.passed for found in proofs)
    assert len(proofs) == 5


def test_header(tmp_path):
    source, _ = make_adapter(tmp_path, "mistral", **PLAIN)
    reader = written(source, tmp_path / "a.gguf")
    fields = {key: field.contents() for key, field in reader.fields.items() if not key.startswith("GGUF.")}
    assert fields == {
        "general.architecture": "llama",
        "general.type": "adapter",
        "general.name": "tiny",
        "general.file_type": 0,
        "adapter.type": "lora",
        "adapter.lora.alpha": 8.0,
    }
    assert {tensor.tensor_type.name for tensor in reader.tensors} == {"F32"}


def test_the_matrices_of_a_plain_adapter_are_those_trained_bit_for_bit(tmp_path):
    source, tuned = make_adapter(tmp_path, "qwen2", **PLAIN)
    arrays = {tensor.name: np.asarray(tensor.data) for tensor in written(source, tmp_path / "a.gguf").tensors}
    for layer in range(2):
        module = tuned.get_submodule(f"base_model.model.model.layers.{layer}.mlp.up_proj")
        for part, ending in ((module.lora_A, "lora_a"), (module.lora_B, "lora_b")):
            trained = part["default"].weight.detach().numpy()
            np.testing.assert_array_equal(arrays[f"blk.{layer}.ffn_up.weight.{ending}"], trained)


def test_a_run_on_quantised_weights_says_so(tmp_path):
    run = random_run(tmp_path, adapter__method="rslora")
    source = read_source(run.path)
    notes = write_gguf_adapter(source, tmp_path / "a.gguf", name="tiny")
    assert any("nf4" in note for note in notes)
    assert any(source.template.sha256[:12] in note for note in notes)
    assert all(found.passed for found in prove_gguf_adapter(tmp_path / "a.gguf", source))


@pytest.mark.filterwarnings("ignore:Adapter 'default'. .* invalid shape")  # PEFT's own lora_bias has one dimension
@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"use_dora": True}, "use_dora"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
        ({"lora_bias": True}, "lora_bias"),
        ({"bias": "all"}, "bias"),
        ({"trainable_token_indices": [5]}, "trainable_token_indices"),
        ({"target_modules": ["embed_tokens", "q_proj"]}, "embed_tokens"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_a_lora_file_cannot_hold_is_refused(tmp_path, settings, named):
    source, _ = make_adapter(tmp_path, "llama, biases", **(PLAIN | settings))
    with pytest.raises(UserError, match=named):
        write_gguf_adapter(source, tmp_path / "a.gguf", name="tiny")
    assert not (tmp_path / "a.gguf").exists()


def test_all_problems_are_told_at_once(tmp_path):
    source, _ = make_adapter(tmp_path, "llama", **PLAIN, use_dora=True, modules_to_save=["norm"])
    with pytest.raises(UserError) as caught:
        write_gguf_adapter(source, tmp_path / "a.gguf", name="tiny")
    assert [problem.where.rsplit(" ", 1)[1] for problem in caught.value.problems] == ["use_dora", "modules_to_save"]
    assert all("--format gguf" in problem.message for problem in caught.value.problems)


@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`:UserWarning")
def test_a_head_that_is_the_embedding_is_refused(tmp_path):
    source, _ = make_adapter(tmp_path, "llama, tied", **(PLAIN | {"target_modules": ["lm_head"]}))
    with pytest.raises(UserError, match=r"lm_head.weight.*tied"):
        write_gguf_adapter(source, tmp_path / "a.gguf", name="tiny")


def test_an_adapter_without_effect_is_refused(tmp_path):
    source, _ = make_adapter(tmp_path, "llama", **PLAIN)
    file = source.adapter / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"lora_alpha": 0}))
    with pytest.raises(UserError, match="changes nothing"):
        write_gguf_adapter(source, tmp_path / "a.gguf", name="tiny")


def swapped_rows(name: str, data: np.ndarray) -> np.ndarray:
    """The rows of a q's B as transformers has them."""
    return data[np.argsort(rows_of_file(4, 16))] if name == "blk.0.attn_q.weight.lora_b" else data


def one_element(name: str, data: np.ndarray) -> np.ndarray:
    changed = data.copy()
    changed[-1, -1] *= 1.0001 if name == "blk.1.ffn_down.weight.lora_a" else 1
    return changed


Damage = Callable[[str, np.ndarray], np.ndarray | None]
DAMAGES: dict[str, tuple[str, dict[str, Any], Damage]] = {
    "alpha of another scale": ("header", {"adapter.lora.alpha": 16.0}, lambda name, data: data),
    "another architecture": ("header", {"general.architecture": "qwen2"}, lambda name, data: data),
    "a model, no adapter": ("header", {"general.type": "model"}, lambda name, data: data),
    "a module that is missing": ("missing", {}, lambda name, data: None if "blk.1.attn_v" in name else data),
    "float16": ("missing", {}, lambda name, data: data.astype(np.float16) if "ffn_up" in name else data),
    "rows that are not permuted": ("beyond", {}, swapped_rows),
    "one element": ("beyond", {}, one_element),
}


@pytest.mark.parametrize(("told", "fields", "change"), DAMAGES.values(), ids=DAMAGES)
def test_the_proofs_see_damage(tmp_path, told, fields, change):
    source, _ = make_adapter(tmp_path, "llama", **PLAIN)
    reader = written(source, tmp_path / "a.gguf")
    found = {key: field.contents() for key, field in reader.fields.items() if not key.startswith("GGUF.")} | fields
    writer = GGUFWriter(tmp_path / "b.gguf", found.pop("general.architecture"))
    for key, value in found.items():
        {str: writer.add_string, float: writer.add_float32, int: writer.add_uint32}[type(value)](key, value)
    for tensor in reader.tensors:
        data = change(tensor.name, np.asarray(tensor.data))
        if data is not None:
            writer.add_tensor(tensor.name, np.ascontiguousarray(data))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    failed = [found.name for found in prove_gguf_adapter(tmp_path / "b.gguf", source) if not found.passed]
    assert any(told in name for name in failed), failed


def test_a_file_that_ends_early_is_a_storage_error(tmp_path):
    source, _ = make_adapter(tmp_path, "llama", **PLAIN)
    written(source, tmp_path / "a.gguf")
    (tmp_path / "b.gguf").write_bytes((tmp_path / "a.gguf").read_bytes()[:-5000])
    with pytest.raises(StorageError, match="not a whole GGUF file"):
        prove_gguf_adapter(tmp_path / "b.gguf", source)
