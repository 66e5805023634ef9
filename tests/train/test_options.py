"""Every choice a recipe offers for training does what its name says."""

from __future__ import annotations

import json
import math
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from finetune.errors import UserError
from finetune.resolve import resolve
from finetune.run import run
from finetune.train.held_out import sum_losses
from finetune.train.trainer import StepTrainer
from finetune.train.watch import read_metrics
from finetune.use.target import load_target
from tests.conftest import CHECKOUT, alpaca_rows, write_recipe

ALL_LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def column(folder: Path, name: str) -> list[float]:
    return [entry[name] for entry in read_metrics(folder / "metrics.jsonl") if name in entry]


def test_recomputing_activations_changes_nothing(tiny_base: Path, tmp_path: Path) -> None:
    rows = alpaca_rows(8)
    kept = run(write_recipe(tmp_path / "a", tiny_base, rows, train__recompute="none"))
    recomputed = run(write_recipe(tmp_path / "b", tiny_base, rows, train__recompute="all"))
    assert column(recomputed.path, "loss") == pytest.approx(column(kept.path, "loss"), rel=1e-6)


def test_continuing_from_an_adapter_starts_where_it_ended(tiny_base: Path, tmp_path: Path) -> None:
    rows = alpaca_rows(4)
    first = run(write_recipe(tmp_path / "a", tiny_base, rows))
    again = write_recipe(tmp_path / "b", tiny_base, rows, adapter__from=str(first.adapter), train__max_steps=1)
    second = run(again)
    examples = resolve(again).data.train
    tuned = load_target(str(first.path))
    tuned.model.set_attn_implementation("documents")
    expected = sum(sum_losses(tuned.model, examples, tokens_per_pass=500)) / sum(e.supervised_tokens for e in examples)
    assert column(second.path, "loss")[0] == pytest.approx(expected, abs=1e-5)
    assert expected < column(first.path, "loss")[0] - 0.1
    with pytest.raises(UserError, match="has r 4, the recipe asks for 8"):
        run(again, ["adapter.rank=8"], out=tmp_path / "c")


@pytest.mark.parametrize("schedule", ["cosine", "linear", "constant"])
def test_the_learning_rate_follows_the_formula(tiny_base: Path, tmp_path: Path, schedule: str) -> None:
    path = write_recipe(
        tmp_path, tiny_base, alpaca_rows(4), train__schedule=schedule, train__warmup=2, train__max_steps=6
    )
    rates = column(run(path).path, "learning_rate")
    after = {
        "cosine": lambda share: 0.5 * (1 + math.cos(math.pi * share)),
        "linear": lambda share: 1 - share,
        "constant": lambda share: 1.0,
    }[schedule]
    expected = [1e-2 * (step / 2 if step < 2 else after((step - 2) / 4)) for step in range(6)]
    assert rates == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize(
    "settings",
    [
        {"model__quantization": "fp4"},
        {"model__quantization": "int8", "model__dtype": "bfloat16"},
        {"train__optimizer": "adamw-8bit"},
        {"adapter__method": "dora", "model__quantization": "nf4"},
        {"adapter__method": "rslora"},
        {"adapter__targets": ["q_proj", "down_proj"]},
        {"data__loss_on": "everything"},
    ],
    ids=lambda settings: "-".join(map(str, settings.values())),
)
def test_training_learns_with(tiny_base: Path, tmp_path: Path, settings: dict) -> None:
    path = write_recipe(tmp_path, tiny_base, alpaca_rows(4), train__max_steps=8, train__schedule="constant", **settings)
    folder = run(path)
    losses = column(folder.path, "loss")
    assert losses[-1] < losses[0] - 0.1
    weights = load_file(folder.adapter / "adapter_model.safetensors")
    assert all(torch.isfinite(tensor).all() for tensor in weights.values())
    targets = settings.get("adapter__targets", ALL_LINEAR)
    assert {name.split(".")[-3] for name in weights if "lora_A" in name} == set(targets)


@pytest.mark.soak
def test_an_interrupted_run_resumes_to_the_same_weights(tiny_base: Path, tmp_path: Path) -> None:
    """SIGTERM: exit code 143 after a checkpoint, and the resumed run ends bit-identical to an undisturbed one."""
    rows = alpaca_rows(64)
    settings = {"train__max_steps": 60, "train__batch_size": 16}
    path = write_recipe(tmp_path / "a", tiny_base, rows, **settings)
    process = subprocess.Popen(
        [sys.executable, "-m", "finetune", "train", str(path)], cwd=CHECKOUT, stderr=subprocess.PIPE, text=True
    )
    assert process.stderr
    assert next(line for line in process.stderr if line.startswith("step "))  # the first sign of progress
    process.send_signal(signal.SIGTERM)
    _, said = process.communicate(timeout=120)
    assert process.returncode == 143, said
    assert "--resume" in said
    stopped_at = len(column(tmp_path / "a" / "run", "loss"))
    assert 0 < stopped_at < 60
    resumed = run(path, resume=True)
    straight = run(write_recipe(tmp_path / "b", tiny_base, rows, **settings))
    name = "adapter_model.safetensors"
    assert (resumed.adapter / name).read_bytes() == (straight.adapter / name).read_bytes()
    assert json.loads((resumed.path / "result.json").read_text())["steps"] == 60


def test_a_template_edited_after_training_began_is_refused(tiny_base: Path, tmp_path: Path) -> None:
    template = tmp_path / "own.jinja"
    template.write_text("{{ bos_token }}{% for m in messages %}{{ m.content }}{{ eos_token }}{% endfor %}")
    recipe = write_recipe(
        tmp_path,
        tiny_base,
        alpaca_rows(8),
        data__template=str(template),
        data__drop=["empty_answer"],
        train__max_steps=1,
    )
    run(recipe)
    run(recipe, resume=True)  # the same template: the run is finished, nothing is wrong
    template.write_text(template.read_text().replace("{{ m.content }}", " {{ m.content }}"))
    with pytest.raises(UserError, match="template_sha256"):
        run(recipe, resume=True)


def test_every_module_is_in_training_mode_while_it_trains(
    tiny_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else dropout and recomputation would be off: PEFT's wrapper alone tells nothing of the base inside."""
    modes: list[set[bool]] = []
    accumulate = StepTrainer._accumulate_gradients

    def watched(self: StepTrainer, model: torch.nn.Module, *args: Any) -> torch.Tensor:
        modes.append({module.training for module in model.modules()})
        return accumulate(self, model, *args)

    monkeypatch.setattr(StepTrainer, "_accumulate_gradients", watched)
    options = {"train__max_steps": 3, "data__eval": 2, "evaluate__every_steps": 1}
    run(write_recipe(tmp_path, tiny_base, alpaca_rows(8), **options))
    assert modes == [{True}] * (1 + 3)  # one is tried before the first step
