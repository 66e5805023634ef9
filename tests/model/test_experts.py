"""Experts in 4 bits: what the model holds is what bitsandbytes makes of each stored tensor, PEFT adapts it as it adapts
16 bits, and the release holds it. Oracles: bitsandbytes on the files' tensors, and the same values in a plain model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import bitsandbytes.functional as bnb
import peft.utils.transformers_weight_conversion as conversion
import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

from finetune.adapter_plan import TAKEN_FOR_EXPERTS, TAKEN_IN
from finetune.errors import UserError
from finetune.model.adapter import attach_adapter, load_adapter, save_adapter
from finetune.model.experts import ExpertsIn4Bit, held_experts, quantized_expert_tensors
from finetune.model.load import load_base
from finetune.release import merge as merging
from finetune.release import proof
from finetune.resolve import resolve
from finetune.run import run
from finetune.twin import make_twin
from tests.conftest import POCKET, alpaca_rows, write_recipe
from tests.model.test_vision import stored
from tests.test_families import published_config

KINDS = ("mixtral", "llama4", "qwen3_moe", "deepseek_v3")
BITS = 4 + 8 / 64 + 32 / (64 * 256)  # QLoRA, arXiv:2305.14314, section 3: double quantisation


@pytest.fixture(scope="module", params=KINDS)
def kind(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module")
def base(kind: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make(kind, tmp_path_factory.mktemp(kind))


def make(kind: str, folder: Path) -> Path:
    tokenizer: Any = AutoTokenizer.from_pretrained(POCKET)
    published_config(kind, tokenizer).save_pretrained(folder / "published")
    tokenizer.save_pretrained(folder / "published")
    make_twin(folder / "published", folder / "base", stored_dtype="BF16")
    return folder / "base"


def plan_of(folder: Path, base: Path, **settings: object) -> Any:
    return resolve(write_recipe(folder, base, alpaca_rows(8), **({"model__quantization": "nf4"} | settings))).plan


def is_experts(name: str) -> bool:
    return ".experts." in name and "shared" not in name


def by_bitsandbytes(weight: torch.Tensor) -> torch.Tensor:
    packed, state = bnb.quantize_4bit(weight.float(), blocksize=64, compress_statistics=True, quant_type="nf4")
    return bnb.dequantize_4bit(packed, state)


def test_a_model_holds_what_each_stored_tensor_becomes(base: Path, tmp_path: Path) -> None:
    held = dict(held_experts(load_base(plan_of(tmp_path, base).model)))
    files = {name: tensor for name, tensor in stored(base).items() if is_experts(name)}
    assert held.keys() == files.keys() == quantized_expert_tensors(base)
    assert all(torch.equal(values, by_bitsandbytes(files[name])) for name, values in held.items())
    assert any(not torch.equal(values, files[name].float()) for name, values in held.items())


def test_an_expert_takes_a_quarter_of_16_bits(tmp_path: Path) -> None:
    experts, rows, columns = 2, 512, 1024
    weights = torch.randn(experts, rows, columns)
    states = [bnb.quantize_4bit(weights[i], blocksize=64, compress_statistics=True)[1] for i in range(experts)]
    values = ExpertsIn4Bit(states, weights.shape, ["a", "b"])
    assert 8 * values.stored_bytes / weights.numel() == pytest.approx(BITS, rel=1e-4)


def whole(folder: Path, base: Path) -> Any:
    """The base in float32 as any transformers user loads it, every quantised tensor replaced by its 4-bit values."""
    from safetensors.torch import save_file

    folder.mkdir()
    for file in base.iterdir():
        if not file.name.endswith(".safetensors"):
            (folder / file.name).write_bytes(file.read_bytes())
    tensors = {name: tensor.float() for name, tensor in stored(base).items()}
    quantized = {f"{linear.module}.weight" for linear in resolve_facts(base).linears}
    values = {
        name: by_bitsandbytes(tensor) if name in quantized or is_experts(name) else tensor
        for name, tensor in tensors.items()
    }
    save_file(values, folder / "model.safetensors", metadata={"format": "pt"})
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")


def resolve_facts(base: Path) -> Any:
    from finetune.base import read_base

    return read_base(str(base)).facts


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable` is deprecated")
@pytest.mark.parametrize("recompute", [False, True])
def test_an_adapter_on_experts_learns_what_it_learns_in_16_bits(base: Path, tmp_path: Path, recompute: bool) -> None:
    plan = plan_of(tmp_path / "recipe", base, adapter__targets=["attention", "experts"])
    tuned: Any = attach_adapter(load_base(plan.model), plan.adapter, base="x")
    generator = torch.Generator().manual_seed(1)
    for parameter in tuned.parameters():
        if parameter.requires_grad:
            parameter.data.normal_(0, 0.05, generator=generator)
    save_adapter(tuned, tmp_path / "adapter")
    same: Any = PeftModel.from_pretrained(whole(tmp_path / "whole", base), tmp_path / "adapter", is_trainable=True)
    if recompute:
        tuned.gradient_checkpointing_enable({"use_reentrant": False})
    ids = torch.arange(3, 40)[None]
    for model in (tuned.train(), same.train()):
        for _ in range(2):  # PEFT leaves nothing behind that a second forward would add again
            model.zero_grad()
            model(input_ids=ids, use_cache=False).logits.float().logsumexp(-1).sum().backward()
    torch.testing.assert_close(tuned(input_ids=ids).logits, same(input_ids=ids).logits, rtol=1e-4, atol=1e-4)
    mine, theirs = ({n: p.grad for n, p in m.named_parameters() if p.requires_grad} for m in (tuned, same))
    assert mine.keys() == theirs.keys()
    assert any("experts" in name for name in mine)
    for name, gradient in mine.items():
        torch.testing.assert_close(gradient, theirs[name], rtol=1e-3, atol=1e-4, msg=name)


def test_a_saved_adapter_is_loaded_onto_4_bits(base: Path, tmp_path: Path) -> None:
    plan = plan_of(tmp_path / "recipe", base, adapter__targets=["experts"])
    tuned: Any = attach_adapter(load_base(plan.model), plan.adapter, base="x")
    for parameter in tuned.parameters():
        if parameter.requires_grad:
            parameter.data.normal_(0, 0.05)
    save_adapter(tuned, tmp_path / "adapter")
    ids = torch.arange(3, 40)[None]
    again = load_adapter(load_base(plan.model), tmp_path / "adapter")
    assert torch.equal(again.eval()(input_ids=ids).logits, tuned.eval()(input_ids=ids).logits)


def test_what_was_asked_is_adapted_beside_experts(base: Path, tmp_path: Path) -> None:
    plan = plan_of(tmp_path, base)
    tuned = attach_adapter(load_base(plan.model), plan.adapter, base="x")
    trained = {name: value for name, value in tuned.named_parameters() if value.requires_grad}
    assert sum(value.numel() for value in trained.values()) == plan.trainable_parameters > 0
    assert not [name for name in trained if is_experts(name)]


def test_a_target_that_peft_takes_for_the_experts_is_refused(tmp_path: Path) -> None:
    base = make("deepseek_v3", tmp_path)
    with pytest.raises(UserError, match=r"PEFT takes up_proj of a deepseek_v3 for its experts; write targets"):
        plan_of(tmp_path / "recipe", base, adapter__targets=["q_a_proj", "up_proj"])
    ia3 = write_recipe(tmp_path / "ia3", base, alpaca_rows(8))
    ia3.write_text(json.dumps(json.loads(ia3.read_text()) | {"adapter": {"method": "ia3"}}))
    assert "up_proj" in " ".join(resolve(ia3).plan.adapter.targets)


def test_the_architectures_are_those_of_peft() -> None:
    table = conversion._MODEL_TO_CONVERSION_PATTERN
    taken = {
        kind for kind, pattern in table.items() if conversion._MOE_FUSED_TARGETS.get(pattern) and pattern != "mixtral"
    }
    assert taken == TAKEN_IN
    assert {*conversion._MOE_TARGET_MODULE_MAPPING["qwen2_moe"]} - {"gate"} == {*TAKEN_FOR_EXPERTS}


@pytest.mark.parametrize(
    "kind",
    ["mixtral", *(pytest.param(kind, marks=pytest.mark.soak) for kind in ("llama4", "qwen3_moe", "deepseek_v3"))],
)
def test_a_release_holds_the_4_bit_values_and_the_delta(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = make(kind, tmp_path)
    monkeypatch.setattr(merging, "prove_in_fresh_process", lambda pairs: [proof.prove(*pair) for pair in pairs])
    settings = {"model__quantization": "nf4", "adapter__targets": ["experts"], "train__max_steps": 3}
    finished = run(write_recipe(tmp_path, base, alpaca_rows(12), **settings), out=tmp_path / "run")
    proofs = merging.merge(finished.path, out=tmp_path / "release", onto="dequantized").proofs
    assert {"dequantised weights that the trained model does not hold"} <= {each.name for each in proofs}
    before, after = stored(base), stored(tmp_path / "release")
    moved = [name for name in before if is_experts(name) and not torch.equal(before[name], after[name])]
    assert len(moved) == len(quantized_expert_tensors(base))
    name = moved[0]  # a small change of the 4-bit values, not of the stored ones
    near, far = (
        (after[name].float() - by_bitsandbytes(before[name])).norm(),
        (after[name] - before[name]).float().norm(),
    )
    assert near < far / 2
