"""Every key of a recipe changed once when a run goes on: it takes effect, makes the run longer, or is refused."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from finetune.errors import StorageError, UserError
from finetune.recipe import Recipe, load_recipe
from finetune.resume_keys import FREE, KEYS, LAYOUT, LENGTH, MUST_MATCH, compare_plans
from finetune.run import run
from finetune.train.watch import read_metrics
from tests.conftest import alpaca_rows, write_recipe
from tests.train.forked import weights

NAME = "adapter_model.safetensors"
OPTIONS = {"output__save_every_steps": 2, "data__eval": 2, "evaluate__every_steps": 2}


def test_every_key_of_a_recipe_has_a_class() -> None:
    recipe = Recipe.model_validate_json(
        json.dumps({"version": 1, "name": "x", "model": {"base": "b"}, "data": {"train": "t"}})
    )
    assert KEYS.keys() == recipe.settings().keys()
    assert set(KEYS.values()) == {MUST_MATCH, LENGTH, LAYOUT, FREE}


@pytest.fixture(scope="module")
def stopped(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The recipe of a run of 4 steps that ended after step 2; the run lies beside it, and `own.jinja`, a template."""
    folder = tmp_path_factory.mktemp("stopped")
    recipe = write_recipe(folder, tiny_base, alpaca_rows(10), **OPTIONS)
    run(recipe)
    unfinish(folder / "run")
    (folder / "more.jsonl").write_bytes((folder / "rows.jsonl").read_bytes())
    shutil.copytree(tiny_base, folder / "other-base")
    (folder / "prompts.txt").write_text("Where is the fox?\n")
    return recipe


@pytest.fixture(scope="module")
def unchanged(stopped: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run that went on without a change."""
    return go_on(stopped, tmp_path_factory.mktemp("unchanged") / "run", "seed", 17)


def unfinish(folder: Path) -> None:
    """As after a crash behind step 2."""
    (folder / "result.json").unlink()
    shutil.rmtree(folder / "adapter")
    shutil.rmtree(folder / "checkpoints" / "step-000004")


OTHER_VALUES: dict[str, Any] = {
    "name": "renamed",
    "seed": 18,
    "model.base": "{folder}/other-base",
    "model.revision": "0" * 40,
    "model.quantization": "nf4",
    "model.dtype": "bfloat16",
    "adapter.method": "dora",
    "adapter.rank": 8,
    "adapter.alpha": 16,
    "adapter.dropout": 0.1,
    "adapter.targets": ["q_proj"],
    "adapter.layers": [0],
    "adapter.rank_by": {"q_proj": 8},
    "adapter.alpha_by": {"q_proj": 8},
    "adapter.start": "olora",
    "adapter.learning_rate_ratio": 16.0,
    "adapter.train_tokens": ["</s>"],
    "adapter.also_train": ["lm_head"],
    "adapter.from": "{folder}/run/checkpoints/step-000002",
    "data.train": "{folder}/more.jsonl",
    "data.eval": 3,
    "data.format": "alpaca",
    "data.template": "vicuna",
    "data.loss_on": "everything",
    "data.max_tokens": 500,
    "data.too_long": "drop",
    "data.truncate": "answer",
    "data.empty_answer": "drop",
    "data.special_tokens": "control",
    "data.deduplicate": "exact",
    "data.leaked": "drop",
    "data.drop": ["too_long"],
    "data.system": "Answer.",
    "data.date": "1 Jan 2026",
    "train.epochs": 9,
    "train.max_steps": 6,
    "train.batch_size": 3,
    "train.tokens_per_pass": 120,
    "train.recompute": "all",
    "train.speedups": ["linears"],
    "train.learning_rate": 0.5,
    "train.schedule": "linear",
    "train.warmup": 3,
    "train.optimizer": "adamw-8bit",
    "train.weight_decay": 0.1,
    "train.max_grad_norm": 0.5,
    "evaluate.every_steps": 3,
    "evaluate.prompts": "{folder}/prompts.txt",
    "evaluate.patience": 3,
    "output.folder": "{folder}/elsewhere",
    "output.save_every_steps": 1,
    "output.keep_checkpoints": 1,
    "output.keep_best": True,
    "output.log_to": ["tensorboard"],
}
# The last but one is oft's alone, the last not for every machine (test_eight_bit.py goes on with another).
ONE_VALUE_ONLY = {"version", "train.objective", "adapter.block_size", "model.compute"}
SAME_MEANING = {"data.format"}  # auto was alpaca already


def test_every_key_has_another_value_here() -> None:
    assert OTHER_VALUES.keys() | ONE_VALUE_ONLY == KEYS.keys()


def go_on(stopped: Path, copy: Path, key: str, value: Any) -> Path:
    shutil.copytree(stopped.parent / "run", copy)
    text = json.dumps(value).replace("{folder}", str(stopped.parent))
    return run(stopped, [f"{key}={text}"], out=copy, resume=True).path


@pytest.mark.parametrize("key", [key for key, kind in KEYS.items() if kind == MUST_MATCH and key in OTHER_VALUES])
def test_a_key_that_must_match_is_refused_with_both_values(stopped: Path, tmp_path: Path, key: str) -> None:
    if key in SAME_MEANING:
        go_on(stopped, tmp_path / "run", key, OTHER_VALUES[key])
        return
    before = load_recipe(stopped).settings()[key]
    with pytest.raises(UserError) as caught:
        go_on(stopped, tmp_path / "run", key, OTHER_VALUES[key])
    assert caught.value.code == 2
    if key == "name":
        assert "holds another run: name was 'tiny', is 'renamed'" in str(caught.value)
        return
    problem = next((each for each in caught.value.problems if each.where == key), None)
    assert problem, str(caught.value)
    if key not in {"adapter.targets", "data.template", "train.warmup", "model.revision"}:  # resolved, or refused before
        assert f"was {before!r} when this run began, is " in problem.message
    assert not (tmp_path / "run" / "result.json").exists()
    assert [file.name for file in (tmp_path / "run" / "checkpoints").iterdir()] == ["step-000002"]


def test_a_logger_is_free_and_one_that_is_not_installed_is_named(
    stopped: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr("importlib.util.find_spec", lambda name: None)
        with pytest.raises(UserError, match=r"output\.log_to: tensorboard is not installed; pip install tensorboard"):
            go_on(stopped, tmp_path / "run", "output.log_to", ["tensorboard"])
    plan = json.loads((stopped.parent / "run" / "plan.json").read_text())
    now = {**plan, "settings": {**plan["settings"], "output.log_to": ["tensorboard"]}}
    changes = compare_plans(plan, now, asked_before={}, asked_now={})
    assert (changes.problems, changes.longer) == ((), False)
    assert changes.notes == ("output.log_to was [], is ['tensorboard']: from here on",)


@pytest.mark.parametrize(
    "key", [key for key, kind in KEYS.items() if kind in (FREE, LAYOUT) and key != "output.log_to"]
)
def test_a_free_key_takes_effect_and_leaves_the_training_as_it_was(
    stopped: Path, unchanged: Path, tmp_path: Path, key: str, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = go_on(stopped, tmp_path / "run", key, OTHER_VALUES[key])
    assert f"{key} was " in capsys.readouterr().err
    losses, same = (
        [entry["loss"] for entry in read_metrics(each / "metrics.jsonl") if "loss" in entry]
        for each in (folder, unchanged)
    )
    assert losses == pytest.approx(same, rel=1e-5)
    if KEYS[key] == FREE:
        assert weights(folder) == weights(unchanged)
    now = json.loads((folder / "plan.json").read_text())["settings"]
    assert now[key] == json.loads(json.dumps(OTHER_VALUES[key]).replace("{folder}", str(stopped.parent)))
    (folder / "result.json").unlink()
    text = json.dumps(OTHER_VALUES[key]).replace("{folder}", str(stopped.parent))
    run(stopped, [f"{key}={text}"], out=folder, resume=True)
    assert f"{key} was " not in capsys.readouterr().err, "the changed value is the run's own from now on"


@pytest.mark.parametrize("finished", [False, True])
def test_a_run_can_be_made_longer(
    stopped: Path,
    tmp_path: Path,
    finished: bool,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """From the step it goes on at, the learning rate is that of a run which was as long from the start."""
    if finished:
        run(stopped, out=tmp_path / "run")
    else:
        shutil.copytree(stopped.parent / "run", tmp_path / "run")
    taken: list[float] = []
    step = torch.optim.AdamW.step
    monkeypatch.setattr(
        torch.optim.AdamW, "step", lambda self, *args: (taken.append(self.param_groups[0]["lr"]), step(self, *args))[1]
    )
    folder = run(stopped, ["train.max_steps=6"], out=tmp_path / "run", resume=True).path
    assert "6 steps in place of 4" in capsys.readouterr().err
    entries = [entry for entry in read_metrics(folder / "metrics.jsonl") if "loss" in entry]
    assert [entry["step"] for entry in entries] == [1, 2, 3, 4, 5, 6]
    first = 4 if finished else 2

    def rate(step: int, steps: int) -> float:  # warmup 0.03 of the steps is one step
        return 0.0 if step == 1 else 1e-2 * 0.5 * (1 + math.cos(math.pi * (step - 2) / (steps - 1)))

    expected = [rate(step, 4 if step <= first else 6) for step in range(1, 7)]
    assert [entry["learning_rate"] for entry in entries] == pytest.approx(expected, rel=1e-6, abs=1e-12)
    assert json.loads((folder / "result.json").read_text())["steps"] == 6
    assert taken == pytest.approx(expected[first:], rel=1e-6)
    with pytest.raises(UserError, match=r"train\.max_steps: the run began with 6 steps, now 5 are asked for"):
        run(stopped, ["train.max_steps=5"], out=folder, resume=True)


def test_a_longer_run_does_not_hide_another_change(stopped: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(stopped.parent / "run", tmp_path / "run")
    with pytest.raises(UserError) as caught:
        run(stopped, ["train.max_steps=6", "train.warmup=0.5", "train.weight_decay=0.1"], out=copy, resume=True)
    assert [problem.where for problem in caught.value.problems] == ["train.warmup", "train.weight_decay"]


def test_a_key_that_came_later_with_its_default_is_no_change(stopped: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(stopped.parent / "run", tmp_path / "run")
    plan = json.loads((copy / "plan.json").read_text())
    assert plan["settings"].pop("data.leaked") == "keep"
    (copy / "plan.json").write_text(json.dumps(plan))
    with pytest.raises(UserError, match="data.leaked: was None"):
        run(stopped, ["data.leaked=drop"], out=copy, resume=True)
    run(stopped, out=copy, resume=True)


def test_a_run_from_before_a_layout_key_goes_on_as_it_began(
    stopped: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Without the key in its plan it was computed by the libraries alone; and the width of a pass stays its own."""
    began = run(stopped, ["train.speedups=none", "train.tokens_per_pass=111"], out=tmp_path / "run").path
    whole = weights(began)
    unfinish(began)
    for name, part in (("plan.json", "settings"), ("lock.json", None)):
        values = json.loads((began / name).read_text())
        del (values[part] if part else values)["train.speedups" if part else "speedups"]
        (began / name).write_text(json.dumps(values))
    capsys.readouterr()
    run(stopped, out=began, resume=True)
    assert weights(began) == whole
    assert "was" not in capsys.readouterr().err
    again = shutil.copytree(began, tmp_path / "again")
    unfinish(again)
    run(stopped, ["train.speedups=[layers]"], out=again, resume=True)
    assert "train.speedups was None, is ['layers']: the same training up to rounding" in capsys.readouterr().err


def test_a_run_that_goes_on_with_other_kernels_says_so(
    stopped: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    copy = shutil.copytree(stopped.parent / "run", tmp_path / "run")
    lock = json.loads((copy / "lock.json").read_text())
    kernels = lock["speedups"]["kernels"]
    lock["speedups"]["kernels"] = {**kernels, "attention": "compiled elsewhere"}
    lock["speedups"]["pieces"] |= {"linears": {"swapped": 1, "left": {}}}
    (copy / "lock.json").write_text(json.dumps(lock))
    run(stopped, out=copy, resume=True)
    told = capsys.readouterr().err
    assert "the compiled attention was 'compiled elsewhere', is " in told
    assert json.loads((copy / "lock.json").read_text())["speedups"]["kernels"] == kernels


def test_resume_starts_a_run_that_is_not_there(stopped: Path, tmp_path: Path) -> None:
    first = run(stopped, out=tmp_path / "a", resume=True)
    second = run(stopped, out=tmp_path / "b")
    assert weights(first.path) == weights(second.path)


def test_storage_error_is_what_a_run_without_a_whole_checkpoint_gets(stopped: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(stopped.parent / "run", tmp_path / "run")
    (copy / "checkpoints" / "step-000002" / NAME).write_bytes(b"")
    with pytest.raises(StorageError, match="no checkpoint in it is whole"):
        run(stopped, out=copy, resume=True)


def test_a_run_without_its_lock_file_is_told(stopped: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(stopped.parent / "run", tmp_path / "run")
    (copy / "lock.json").write_text("{")
    with pytest.raises(StorageError, match=r"its lock\.json cannot be read"):
        run(stopped, out=copy, resume=True)
