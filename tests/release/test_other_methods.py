"""What IA3, VeRA and OFT change in a weight: each formula against PEFT's own merge in float64, and by hand."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import IA3Config, OFTConfig, PeftConfig, PeftModel, VeraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from finetune.errors import StorageError, UserError
from finetune.release.changes import read_changes, read_plain_deltas
from finetune.release.delta import Rotated, Scaled, round_tuned, tuned_blocks
from finetune.release.other_methods import cayley
from tests.release.test_merge_kinds import BIASED, Kind, make_base, stored

Q = ["q_proj", "down_proj"]
CONFIGS: dict[str, PeftConfig] = {
    "ia3": IA3Config(task_type="CAUSAL_LM", target_modules=["k_proj", *Q], feedforward_modules=["down_proj"]),
    "vera": VeraConfig(task_type="CAUSAL_LM", target_modules=Q, r=6, projection_prng_key=5),
    "oft": OFTConfig(task_type="CAUSAL_LM", target_modules=Q, r=0, oft_block_size=8, use_cayley_neumann=False),
}


def make_adapter(folder: Path, base: Path, config: PeftConfig) -> Path:
    """An adapter as PEFT writes it, everything that it trains moved."""
    tuned = get_peft_model(AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), config)
    generator = torch.Generator().manual_seed(1)
    for parameter in tuned.parameters():
        if parameter.requires_grad:
            parameter.data += 0.3 * torch.randn(parameter.shape, generator=generator)
    tuned.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_base(tmp_path_factory.mktemp("base") / "base", Kind({}, BIASED, dtype="float32"))


@pytest.fixture(params=CONFIGS)
def adapter(request: pytest.FixtureRequest, base: Path, tmp_path: Path) -> Path:
    return make_adapter(tmp_path / "adapter", base, CONFIGS[request.param])


def exact(base: Path, adapter: Path) -> dict[str, torch.Tensor]:
    """PEFT's merge, in float64."""
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float64)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        tuned: Any = PeftModel.from_pretrained(model, str(adapter), autocast_adapter_dtype=False).double()
    return tuned.merge_and_unload().state_dict()


def test_every_tensor_is_pefts_sum_in_float64(base: Path, adapter: Path) -> None:
    expected, before, changes = exact(base, adapter), stored(base), read_changes(adapter, base)
    for name, weight in before.items():
        change = changes.get(name)
        found = torch.cat([tuned.clone() for _, tuned in tuned_blocks(weight, change)]).reshape(weight.shape)
        assert (found - expected[name]).abs().max() < 1e-14, name
        assert (change is None) == torch.equal(expected[name], weight.double()), name
        assert torch.equal(round_tuned(weight, change, dtype=torch.float32), expected[name].float()) or change


def test_ia3_scales_the_biases_of_what_it_scales_the_outputs_of(base: Path, tmp_path: Path) -> None:
    changes = read_changes(make_adapter(tmp_path / "adapter", base, CONFIGS["ia3"]), base)
    assert "model.layers.0.self_attn.q_proj.bias" in changes
    assert "model.layers.0.mlp.down_proj.bias" not in changes
    assert isinstance(changes["model.layers.0.mlp.down_proj.weight"], Scaled)
    assert not changes["model.layers.0.mlp.down_proj.weight"].of_rows


def test_a_rotation_of_two_inputs_by_hand() -> None:
    """Q = [[0, t], [-t, 0]]: (1 - Q) (1 + Q)^-1 turns by 2 arctan t."""
    angle = 2 * torch.atan(torch.tensor(0.25, dtype=torch.float64))
    (rotation,) = cayley(torch.tensor([[0.25]]), 2)
    expected = torch.stack([torch.stack([angle.cos(), -angle.sin()]), torch.stack([angle.sin(), angle.cos()])])
    assert torch.allclose(rotation, expected, atol=1e-15)
    weight = torch.tensor([[3.0, 5.0]])
    ((_, tuned),) = tuned_blocks(weight, Rotated(rotation[None]))
    assert torch.allclose(tuned, weight.double() @ rotation.T, atol=1e-15)


def test_rotations_keep_the_lengths_of_rows(base: Path, tmp_path: Path) -> None:
    changes = read_changes(make_adapter(tmp_path / "adapter", base, CONFIGS["oft"]), base)
    before = stored(base)
    for name, change in changes.items():
        for block, tuned in tuned_blocks(before[name], change):
            assert torch.allclose(tuned.norm(dim=1), before[name][block].double().norm(dim=1), rtol=1e-12)


def change_config(adapter: Path, **values: Any) -> Path:
    config = json.loads((adapter / "adapter_config.json").read_text()) | values
    (adapter / "adapter_config.json").write_text(json.dumps(config))
    return adapter


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("oft", {"use_cayley_neumann": True}),
        ("oft", {"coft": True}),
        ("oft", {"block_share": True}),
        ("oft", {"bias": "all"}),
        ("ia3", {"fan_in_fan_out": True}),
        ("ia3", {"modules_to_save": ["lm_head"]}),
        ("vera", {"use_tomorrow": True}),
    ],
    ids=str,
)
def test_a_setting_that_these_formulas_do_not_hold_is_refused(
    base: Path, tmp_path: Path, name: str, values: dict[str, Any]
) -> None:
    adapter = make_adapter(tmp_path / "adapter", base, CONFIGS[name])
    with pytest.raises(UserError, match=f"{next(iter(values))}: .* cannot be merged exactly"):
        read_changes(change_config(adapter, **values), base)


def test_another_base_is_refused(base: Path, adapter: Path, tmp_path: Path) -> None:
    wider = make_base(tmp_path / "wider", Kind({}, {"hidden_size": 64}, dtype="float32"))
    with pytest.raises(UserError, match="not the base it was trained on"):
        read_changes(adapter, wider)


def test_it_is_no_lora_file(adapter: Path) -> None:
    with pytest.raises(UserError, match="is no LoRA; merge it and export that"):
        read_plain_deltas(adapter)


def test_a_missing_part_is_named(base: Path, tmp_path: Path) -> None:
    adapter = make_adapter(tmp_path / "adapter", base, CONFIGS["vera"])
    file = adapter / "adapter_model.safetensors"
    tensors = load_file(str(file))
    save_file({name: value for name, value in tensors.items() if not name.endswith("vera_A")}, str(file))
    with pytest.raises(StorageError, match="vera_A is missing"):
        read_changes(adapter, base)
