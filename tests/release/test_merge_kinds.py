"""Every kind of change that an adapter made by PEFT can hold is merged exactly, or refused."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, MixtralConfig, Qwen3MoeConfig
from transformers.models.llama4 import Llama4TextConfig

from finetune.base import read_tensor_entries
from finetune.errors import FinetuneError, StorageError, UserError
from finetune.release.changes import HEAD, read_changes
from finetune.release.choice import Choice
from finetune.release.merge import write_release
from finetune.release.proof import make_onto
from finetune.release.proof_files import prove_weights
from finetune.release.source import check_base, read_source
from finetune.release.weights import read_tensors
from tests.conftest import POCKET

SHAPE = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 2, "num_key_value_heads": 1}
SHAPE |= {"num_hidden_layers": 2, "initializer_range": 0.1, "pad_token_id": None}
EXPERTS = ["experts.gate_up_proj", "experts.down_proj"]
MIXTRAL = {"num_local_experts": 4, "num_experts_per_tok": 2}
QWEN = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24, "head_dim": 16}
LLAMA4 = {"num_local_experts": 4, "num_experts_per_tok": 1, "head_dim": 16, "intermediate_size_mlp": 48}
LLAMA4 |= {"interleave_moe_layer_step": 1, "attention_chunk_size": 64}
BIASED = {"attention_bias": True, "mlp_bias": True}
TIED = {"tie_word_embeddings": True}


@dataclass(frozen=True)
class Kind:
    """A base's config, an adapter's settings, and whether PEFT's merge is what PEFT's own adapter computes."""

    settings: dict[str, Any]
    base: dict[str, Any] = field(default_factory=dict)
    config: Callable[..., Any] = LlamaConfig
    dtype: str = "bfloat16"
    peft_merges_it: bool = True


Q = ["q_proj"]
KINDS = {
    "linears": Kind({"target_modules": "all-linear"}),
    "patterns": Kind(
        {
            "target_modules": ["q_proj", "down_proj"],
            "rank_pattern": {"down_proj": 2, "layers.0.self_attn.q_proj": 3},
            "alpha_pattern": {"layers.1.*q_proj": 5},
        }
    ),
    "rslora with patterns": Kind({"target_modules": Q, "use_rslora": True, "rank_pattern": {"1.self_attn.q_proj": 2}}),
    "dora": Kind({"target_modules": ["q_proj", "down_proj"], "use_dora": True}, dtype="float16"),
    "orthogonal": Kind({"target_modules": Q, "init_lora_weights": "orthogonal"}),
    "eva": Kind({"target_modules": Q, "init_lora_weights": "eva"}),
    "lora_bias": Kind({"target_modules": Q, "lora_bias": True}, BIASED),
    "bias all": Kind({"target_modules": Q, "bias": "all"}, BIASED),
    "bias lora_only": Kind({"target_modules": Q, "bias": "lora_only", "lora_bias": True}, BIASED, dtype="float32"),
    "modules_to_save": Kind({"target_modules": Q, "modules_to_save": ["lm_head", "embed_tokens", "norm"]}),
    "modules_to_save norms": Kind({"target_modules": Q, "modules_to_save": ["input_layernorm", "q_norm"]}),
    "embedding": Kind({"target_modules": ["q_proj", "embed_tokens"]}),
    "embedding dora": Kind({"target_modules": ["q_proj", "embed_tokens"], "use_dora": True}),
    "head": Kind({"target_modules": ["q_proj", "lm_head"]}),
    "tokens": Kind({"target_modules": Q, "trainable_token_indices": [7, 3]}),
    "tokens of both": Kind({"target_modules": Q, "trainable_token_indices": {"embed_tokens": [9], "lm_head": [2, 5]}}),
    "tied, head saved": Kind({"target_modules": Q, "modules_to_save": ["lm_head"]}, TIED),
    "tied, embedding saved": Kind({"target_modules": Q, "modules_to_save": ["embed_tokens"]}, TIED),
    "tied, both saved": Kind({"target_modules": Q, "modules_to_save": ["embed_tokens", "lm_head"]}, TIED),
    "tied, saved together": Kind(
        {"target_modules": Q, "modules_to_save": ["embed_tokens"], "ensure_weight_tying": True}, TIED
    ),
    "tied, embedding": Kind({"target_modules": ["q_proj", "embed_tokens"]}, TIED, peft_merges_it=False),
    "tied, head": Kind({"target_modules": ["q_proj", "lm_head"]}, TIED, peft_merges_it=False),
    "tied, tokens": Kind({"target_modules": Q, "trainable_token_indices": [7, 3]}, TIED),
    "tied, tokens of the embedding": Kind(
        {"target_modules": Q, "trainable_token_indices": {"embed_tokens": [4]}}, TIED
    ),
    "mixtral": Kind({"target_modules": Q, "target_parameters": EXPERTS}, MIXTRAL, MixtralConfig),
    "mixtral, router": Kind({"target_modules": ["q_proj", "gate"]}, MIXTRAL, MixtralConfig, dtype="float32"),
    "mixtral, one parameter": Kind(
        {
            "target_modules": Q,
            "target_parameters": ["gate.weight", "experts.down_proj"],
            "use_rslora": True,
            "rank_pattern": {"experts.down_proj": 2},
        },
        MIXTRAL,
        MixtralConfig,
    ),
    "qwen3_moe": Kind({"target_modules": ["q_proj", "gate"], "target_parameters": EXPERTS}, QWEN, Qwen3MoeConfig),
    "llama4, fused files": Kind({"target_modules": Q, "target_parameters": EXPERTS}, LLAMA4, Llama4TextConfig),
}


@dataclass(frozen=True)
class Made:
    """An adapter on a base, and the release that we wrote."""

    kind: Kind
    base: Path
    adapter: Path
    release: Path


def make_base(folder: Path, kind: Kind) -> Path:
    """A tiny random base with pocket-llama's tokenizer; biases are random too."""
    tokenizer = AutoTokenizer.from_pretrained(POCKET)
    ids = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    config = kind.config(**(SHAPE | ids | {"vocab_size": len(tokenizer), "tie_word_embeddings": False} | kind.base))
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config)
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            parameter.data.normal_(0, 0.1)
    model.to(getattr(torch, kind.dtype)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def make_adapter(folder: Path, base: Path, **settings: Any) -> Path:
    """An adapter as PEFT writes it, everything that it trains moved a little."""
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT's opinions of the settings
        tuned = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", **({"r": 4, "lora_alpha": 8} | settings)))
        generator = torch.Generator().manual_seed(1)
        for parameter in tuned.parameters():
            if parameter.requires_grad:
                parameter.data += 0.05 * torch.randn(parameter.shape, generator=generator)
        tuned.save_pretrained(folder)
    return folder


def load(base: Path, adapter: Path | None = None, dtype: torch.dtype = torch.float64) -> Any:
    """A model, with an adapter if one is named, all in `dtype`."""
    # eager: the fused kernel for experts knows no float64
    model = AutoModelForCausalLM.from_pretrained(base, dtype=dtype, experts_implementation="eager")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return (PeftModel.from_pretrained(model, str(adapter)) if adapter else model).to(dtype).eval()


def logits(model: Any) -> torch.Tensor:
    tokens_BT = torch.randint(0, 60, (2, 24), generator=torch.Generator().manual_seed(3))
    tokens_BT[0, :8] = torch.arange(2, 10)
    with torch.no_grad():
        return model(input_ids=tokens_BT, use_cache=False).logits


def merge_alone(adapter: Path, out: Path) -> Path:
    """A release as merge writes it, before the proofs."""
    source = read_source(adapter)
    out.mkdir()
    choice = Choice("original", "original", "as asked", {}, 0, None)
    write_release(out, source, choice, base_sha256=check_base(source), out=out)
    return out


@pytest.fixture(scope="module", params=KINDS)
def made(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Made:
    folder, kind = tmp_path_factory.mktemp("kind"), KINDS[request.param]
    base = make_base(folder / "base", kind)
    adapter = make_adapter(folder / "adapter", base, **kind.settings)
    return Made(kind, base, adapter, merge_alone(adapter, folder / "release"))


def stored(folder: Path) -> dict[str, torch.Tensor]:
    return {entry.name: tensor for entry, tensor in read_tensors(list(read_tensor_entries(folder)))}


def test_the_release_computes_what_base_and_adapter_compute(made: Made) -> None:
    expected, plain = logits(load(made.base, made.adapter)), logits(load(made.base))
    assert (expected - plain).abs().max() > 1e-3
    released = logits(load(made.release))
    limit = {"float32": 1e-5, "float16": 1e-2, "bfloat16": 0.1}[made.kind.dtype]
    assert (released - expected).abs().max() < limit * expected.std()


def test_each_element_is_the_nearest_to_pefts_sum_in_float64_and_all_else_is_the_base(
    made: Made, tmp_path: Path
) -> None:
    if not made.kind.peft_merges_it:
        pytest.skip("PEFT merges a change of one of two tied weights into both; the written-out formula has its test")
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Input and output embeddings are no longer tied")
        load(made.base, made.adapter).merge_and_unload().save_pretrained(tmp_path)
    exact, base, released = stored(tmp_path), stored(made.base), stored(made.release)
    assert exact.keys() == released.keys()
    changed = 0
    for name, values in exact.items():
        before = base.get(name, base["model.embed_tokens.weight"])
        ours = released[name]
        assert ours.dtype == before.dtype
        if torch.equal(values, before.double()):
            assert torch.equal(ours, before), name
            continue
        changed += 1
        step = {torch.float32: 2.0**-23, torch.float16: 2.0**-10, torch.bfloat16: 2.0**-7}[ours.dtype]
        nearest = values.to(ours.dtype)
        assert ((ours.double() - values).abs() <= 0.501 * step * values.abs().clamp(min=2.0**-14)).all(), name
        assert (ours != nearest).float().mean() < 1e-3, name
    assert changed >= 2


def test_the_proofs_of_the_files_hold_and_see_one_changed_element(made: Made) -> None:
    source = read_source(made.adapter)
    onto = make_onto(source, "original")
    assert all(found.value == 0 for found in prove_weights(made.release, source, onto))
    names = read_changes(made.adapter, made.base)
    tensors = load_file(str(made.release / "model.safetensors"))
    for name in [*list(names)[::7], "model.layers.1.self_attn.v_proj.weight"]:
        flipped = tensors[name].clone()
        flipped.view(-1)[-1] *= 1.25
        save_file(tensors | {name: flipped}, str(made.release / "model.safetensors"), metadata={"format": "pt"})
        found = {proof.name: proof.value for proof in prove_weights(made.release, source, onto)}
        assert sum(found.values()) == 1, name
    save_file(tensors, str(made.release / "model.safetensors"), metadata={"format": "pt"})


Q_PROJ, EMBED = "model.layers.1.self_attn.q_proj.weight", "model.embed_tokens.weight"


def parts(adapter: Path, module: str) -> dict[str, torch.Tensor]:
    """The stored tensors of one module, in float64."""
    prefix = f"base_model.model.{module}."
    found = load_file(str(adapter / "adapter_model.safetensors"))
    return {key.removeprefix(prefix): value.double() for key, value in found.items() if key.startswith(prefix)}


def make(folder: Path, name: str, *, dtype: str = "float32", **settings: Any) -> Made:
    """One kind, stored in float32 unless said otherwise."""
    kind = KINDS[name]
    kind = Kind(kind.settings | settings, kind.base, kind.config, dtype)
    base = make_base(folder / "base", kind)
    adapter = make_adapter(folder / "adapter", base, **kind.settings)
    return Made(kind, base, adapter, merge_alone(adapter, folder / "release"))


def close(some: torch.Tensor, exact: torch.Tensor) -> bool:
    """Within one rounding to float32."""
    return bool(((some.double() - exact).abs() <= 2.0**-24 * exact.abs() * 1.001).all())


def test_experts_stored_one_by_one_get_their_own_slices(tmp_path: Path) -> None:
    """PEFT holds the ranks of all experts in one matrix: in A one expert after the other, in B interleaved."""
    made = make(tmp_path, "mixtral")
    base, ours = stored(made.base), stored(made.release)
    outer, experts = "model.layers.1.mlp.experts", "model.layers.1.block_sparse_moe.experts"
    found = parts(made.adapter, outer)
    for expert in range(4):
        a = found["base_layer.lora_A.weight"][expert * 4 : expert * 4 + 4]
        b = found["base_layer.lora_B.weight"][:, expert::4]
        fused = 2.0 * b @ a  # alpha / r; gate's rows lie above up's
        for name, delta in (("w1", fused[:48]), ("w3", fused[48:])):
            key = f"{experts}.{expert}.{name}.weight"
            assert close(ours[key], base[key].double() + delta), key
        a, b = found["lora_A.weight"][expert * 4 : expert * 4 + 4], found["lora_B.weight"][:, expert::4]
        key = f"{experts}.{expert}.w2.weight"
        assert close(ours[key], base[key].double() + 2.0 * b @ a)


def test_of_a_tied_base_only_the_adapted_side_changes(tmp_path: Path) -> None:
    made = make(tmp_path / "embedding", "tied, embedding")
    base, ours, found = stored(made.base), stored(made.release), parts(made.adapter, "model.embed_tokens")
    assert HEAD not in base
    assert torch.equal(ours[HEAD], base[EMBED])
    assert close(ours[EMBED], base[EMBED].double() + 2.0 * (found["lora_embedding_B"] @ found["lora_embedding_A"]).T)
    assert json.loads((made.release / "config.json").read_text())["tie_word_embeddings"] is False
    made = make(tmp_path / "head", "tied, head")
    base, ours, found = stored(made.base), stored(made.release), parts(made.adapter, "lm_head")
    assert torch.equal(ours[EMBED], base[EMBED])
    assert close(ours[HEAD], base[EMBED].double() + 2.0 * found["lora_B.weight"] @ found["lora_A.weight"])


@pytest.mark.parametrize("name", ["tied, tokens", "tied, saved together", "tied, tokens of the embedding"])
def test_what_both_sides_share_stays_tied(tmp_path: Path, name: str) -> None:
    made = make(tmp_path, name)
    assert HEAD not in stored(made.release)
    assert json.loads((made.release / "config.json").read_text())["tie_word_embeddings"] is True


def test_dora_of_an_embedding_has_a_magnitude_per_column(tmp_path: Path) -> None:
    made = make(tmp_path, "embedding dora")
    found = parts(made.adapter, "model.embed_tokens")
    exact = stored(made.base)[EMBED].double() + 2.0 * (found["lora_embedding_B"] @ found["lora_embedding_A"]).T
    exact *= found["lora_magnitude_vector"] / exact.square().sum(dim=0).sqrt()
    assert close(stored(made.release)[EMBED], exact)


def test_trained_rows_replace_theirs_and_no_other(tmp_path: Path) -> None:
    made = make(tmp_path, "tokens", dtype="bfloat16")
    exact = stored(made.base)[EMBED].clone()
    exact[[7, 3]] = parts(made.adapter, "model.embed_tokens")["token_adapter.trainable_tokens_delta"].bfloat16()
    assert torch.equal(stored(made.release)[EMBED], exact)


def test_an_adapter_of_separate_experts_is_merged_into_the_separate_files(tmp_path: Path) -> None:
    """As older libraries wrote it, where each expert was a module with linears of its own."""
    made = make(tmp_path, "mixtral, router")
    config = json.loads((made.adapter / "adapter_config.json").read_text())
    config |= {"target_modules": ["w2"], "target_parameters": None}
    (made.adapter / "adapter_config.json").write_text(json.dumps(config))
    name = "model.layers.0.block_sparse_moe.experts.2.w2"
    a, b = torch.randn(4, 48), torch.randn(32, 4)
    tensors = {f"base_model.model.{name}.lora_A.weight": a, f"base_model.model.{name}.lora_B.weight": b}
    save_file(tensors, str(made.adapter / "adapter_model.safetensors"))
    ours, base = stored(merge_alone(made.adapter, tmp_path / "again")), stored(made.base)
    exact = base[f"{name}.weight"].double() + 2.0 * b.double() @ a.double()
    assert close(ours.pop(f"{name}.weight"), exact)
    assert all(torch.equal(values, base[key]) for key, values in ours.items())


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "peft_type": ({"peft_type": "LOKR"}, "peft_type"),
    "pissa": ({"init_lora_weights": "pissa"}, "init_lora_weights: 'pissa'"),
    "olora": ({"init_lora_weights": "olora"}, "init_lora_weights"),
    "corda": ({"init_lora_weights": "corda", "corda_config": {"x": 1}}, "init_lora_weights"),
    "loftq": ({"init_lora_weights": "loftq"}, "init_lora_weights"),
    "qalora": ({"use_qalora": True}, "use_qalora"),
    "replicated layers": ({"layer_replication": [[0, 1]]}, "layer_replication"),
    "fan_in_fan_out": ({"fan_in_fan_out": True}, "fan_in_fan_out"),
    "invocation tokens": ({"alora_invocation_tokens": [1, 2]}, "alora_invocation_tokens"),
    "kasa": ({"kasa_config": {"x": 1}}, "kasa_config"),
    "dora with its own bias": ({"use_dora": True, "lora_bias": True}, "lora_bias"),
    "a setting of tomorrow": ({"use_tomorrow": True}, "use_tomorrow"),
    "another rank": ({"r": 3}, "stored with rank 4, adapter_config.json says 3"),
}


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Made:
    return make(tmp_path_factory.mktemp("plain"), "linears")


def change_config(made: Made, folder: Path, changes: dict[str, Any]) -> Path:
    """The adapter with other settings."""
    folder.mkdir()
    for file in made.adapter.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    config = json.loads((folder / "adapter_config.json").read_text()) | changes
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


@pytest.mark.parametrize("case", REFUSED)
def test_what_a_merge_cannot_represent_is_refused(plain: Made, tmp_path: Path, case: str) -> None:
    changes, words = REFUSED[case]
    with pytest.raises(UserError, match=words):
        read_changes(change_config(plain, tmp_path / "adapter", changes), plain.base)


def test_all_that_is_refused_is_told_at_once(plain: Made, tmp_path: Path) -> None:
    changes = {"init_lora_weights": "pissa", "use_qalora": True, "layer_replication": [[0, 1]]}
    with pytest.raises(UserError) as caught:
        read_changes(change_config(plain, tmp_path / "adapter", changes), plain.base)
    assert len(caught.value.problems) == 3


def test_a_base_that_does_not_fit_is_refused_tensor_by_tensor(plain: Made, tmp_path: Path) -> None:
    other = make_base(tmp_path / "other", Kind({}, {"intermediate_size": 64}))
    with pytest.raises(UserError, match="not the base it was trained on") as caught:
        read_changes(plain.adapter, other)
    assert len(caught.value.problems) == 6  # gate, up and down of two layers


DAMAGED: dict[str, tuple[Callable[[dict[str, Any]], Any], str]] = {
    "overlap": (lambda header: header["b"].update(data_offsets=[4, 16], shape=[3]), "b does not begin where"),
    "hole": (lambda header: header["a"].update(data_offsets=[0, 4], shape=[1]), "b does not begin where"),
    "size": (lambda header: header["a"].update(shape=[3]), "a has 8 bytes, its shape needs 12"),
    "negative": (lambda header: header["a"].update(shape=[-2]), "a has a size that is no count"),
    "past the end": (lambda header: header["b"].update(data_offsets=[8, 20]), "expected"),
    "no list": (lambda header: header["b"].update(data_offsets=None), "damaged"),
}


@pytest.mark.parametrize("case", DAMAGED)
def test_a_damaged_header_is_a_storage_error_that_names_the_file(tmp_path: Path, case: str) -> None:
    change, words = DAMAGED[case]
    header: dict[str, Any] = {
        name: {"dtype": "F32", "shape": [2], "data_offsets": [start, start + 8]} for name, start in (("a", 0), ("b", 8))
    }
    change(header)
    text = json.dumps(header).encode()
    (tmp_path / "model.safetensors").write_bytes(len(text).to_bytes(8, "little") + text + bytes(16))
    with pytest.raises(StorageError, match=words) as caught:
        list(read_tensor_entries(tmp_path))
    assert "model.safetensors" in caught.value.problems[0].where
    assert isinstance(caught.value, FinetuneError)
    assert caught.value.code == 3
