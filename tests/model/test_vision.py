"""Models of text and images, trained on text: the tower is neither adapted nor quantised, and lies in the release as
it lay in the base. Oracles: PEFT's own count, bitsandbytes' classes, the files' bytes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from transformers import AutoTokenizer

from finetune.families import VISION
from finetune.model.adapter import attach_adapter
from finetune.model.load import load_base
from finetune.release import merge as merging
from finetune.release import proof
from finetune.resolve import resolve
from finetune.run import run
from finetune.twin import make_twin
from tests.conftest import POCKET, alpaca_rows, write_recipe
from tests.test_families import published_config

KINDS = ("gemma3", "mllama", "llama4")


@pytest.fixture(scope="module", params=KINDS)
def kind(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module")
def base(kind: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp(kind)
    tokenizer: Any = AutoTokenizer.from_pretrained(POCKET)
    published_config(kind, tokenizer).save_pretrained(folder / "published")
    tokenizer.save_pretrained(folder / "published")
    make_twin(folder / "published", folder / "base", stored_dtype="BF16")
    return folder / "base"


def stored(folder: Path) -> dict[str, torch.Tensor]:
    found: dict[str, torch.Tensor] = {}
    for file in folder.glob("*.safetensors"):
        with safe_open(str(file), "pt") as opened:
            found |= {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118 - no mapping
    return found


def of_images(name: str) -> bool:
    return any(f"{part}." in name for part in VISION)


def image_layers(base: Path) -> list[int]:
    text = json.loads((base / "config.json").read_text())["text_config"]
    return text.get("cross_attention_layers") or []


@pytest.mark.parametrize("method", ["lora", "ia3", "vera", "oft"])
def test_only_what_text_passes_is_adapted(kind: str, base: Path, tmp_path: Path, method: str) -> None:
    recipe = write_recipe(tmp_path, base, alpaca_rows(4))
    adapter = {"method": method} | ({"rank": 4} if method in {"lora", "vera"} else {})
    recipe.write_text(json.dumps(json.loads(recipe.read_text()) | {"adapter": adapter}))
    plan = resolve(recipe).plan
    tuned = attach_adapter(load_base(plan.model), plan.adapter, base="x")
    trained = {name: value for name, value in tuned.named_parameters() if value.requires_grad}
    assert sum(value.numel() for value in trained.values()) == plan.trainable_parameters > 0
    assert not [name for name in trained if of_images(name)]
    passed_by = [f".layers.{layer}." for layer in image_layers(base)]
    assert not [name for name in trained if any(layer in name for layer in passed_by)]
    assert (kind == "mllama") == bool(passed_by)


def test_a_tower_is_not_quantised(base: Path, tmp_path: Path) -> None:
    plan = resolve(write_recipe(tmp_path, base, alpaca_rows(4), model__quantization="nf4")).plan
    model = load_base(plan.model)
    kinds = {
        name: type(module).__name__ for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)
    }
    assert {found for name, found in kinds.items() if of_images(f"{name}.")} <= {"Linear"}
    assert {
        found for name, found in kinds.items() if name.endswith(("q_proj", "down_proj")) and not of_images(name)
    } == {"Linear4bit"}
    assert kinds[next(name for name in kinds if name.endswith("lm_head"))] == "Linear"


@pytest.mark.parametrize("quantization", ["none", "nf4"])
def test_a_release_carries_the_tower_along(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, quantization: str
) -> None:
    monkeypatch.setattr(merging, "prove_in_fresh_process", lambda pairs: [proof.prove(*pair) for pair in pairs])
    options = {"model__quantization": quantization, "train__max_steps": 3, "train__learning_rate": 0.01}
    finished = run(write_recipe(tmp_path, base, alpaca_rows(12), **options), out=tmp_path / "run")
    onto = "original" if quantization == "none" else "dequantized"
    merging.merge(finished.path, out=tmp_path / "release", onto=onto)
    before, after = stored(base), stored(tmp_path / "release")
    assert before.keys() == after.keys()
    seen = [name for name in before if of_images(name)]
    assert seen
    assert all(torch.equal(before[name].view(torch.uint8), after[name].view(torch.uint8)) for name in seen)
    assert any(not torch.equal(before[name], after[name]) for name in before if name not in seen)
