"""Out of memory in a pass: the step is begun again in a lighter layout, which plan.json and every resume keep."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from finetune.errors import OutOfMemoryError
from finetune.plan import TrainPlan
from finetune.plan_lowered import layout_of_step, lighten
from finetune.run import run
from finetune.train import trainer as trainer_file
from finetune.train.loss import stretch_losses_S
from finetune.train.watch import read_metrics
from tests.conftest import alpaca_rows, write_recipe
from tests.train.forked import Nursery, weights

SETTINGS = {"train__batch_size": 24, "train__max_steps": 4, "output__save_every_steps": 2}
LIMIT = 700  # tokens that a pass of this small memory holds


def column(folder: Path, name: str) -> list[float]:
    return [entry[name] for entry in read_metrics(folder / "metrics.jsonl") if name in entry]


def lowered(folder: Path) -> list[dict[str, Any]]:
    return json.loads((folder / "plan.json").read_text())["train"]["lowered"]


class SmallMemory:
    """From a step on, a pass that is too wide fails in the real allocator, after its losses are computed."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, *, from_step: int) -> None:
        self.failures = 0
        self.from_step = from_step
        monkeypatch.setattr(trainer_file, "stretch_losses_S", self.losses)
        original = trainer_file.StepTrainer.training_step

        def training_step(trainer: trainer_file.StepTrainer, *args: Any) -> torch.Tensor:
            self.trainer = trainer
            return original(trainer, *args)

        monkeypatch.setattr(trainer_file.StepTrainer, "training_step", training_step)

    def losses(self, model: torch.nn.Module, stretch: Any) -> torch.Tensor:
        losses = stretch_losses_S(model, stretch)
        recomputes = any(getattr(module, "gradient_checkpointing", False) for module in model.modules())
        wide = stretch.tokens > LIMIT and not recomputes
        if wide and self.trainer.state.global_step + 1 >= self.from_step:
            self.failures += 1
            torch.empty(1 << 60, dtype=torch.uint8)
        return losses


def test_the_run_goes_on_in_narrower_passes_and_trains_the_same(
    tiny_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = alpaca_rows(96)
    straight = run(write_recipe(tmp_path / "straight", tiny_base, rows, **SETTINGS)).path
    memory = SmallMemory(monkeypatch, from_step=3)
    short = run(write_recipe(tmp_path / "short", tiny_base, rows, **SETTINGS)).path
    assert memory.failures == 2, "3072 and 1536 tokens do not fit, 768 do"
    assert lowered(short) == [{"step": 3, "tokens_per_pass": 768, "recompute": False}]
    assert lowered(straight) == []
    assert column(short, "loss")[:2] == column(straight, "loss")[:2], "what came before is untouched"
    assert column(short, "loss") == pytest.approx(column(straight, "loss"), rel=1e-5)
    assert column(short, "loss") != column(straight, "loss"), "other passes, other rounding"
    said = capsys.readouterr().err
    assert "step 3 ran out of memory, 1,152,921,504,606,846,976 bytes were asked for; from here on" in said
    assert "train.tokens_per_pass is 1536 (was 3072): the same training up to rounding" in said
    assert "train.tokens_per_pass is 768 (was 1536)" in said


def test_a_step_begun_again_is_the_step_of_that_layout(
    tiny_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Bit for bit, with dropout: nothing is left of the pass before the failed one, and no random number is lost."""
    rows = alpaca_rows(120)
    settings = {**SETTINGS, "train__max_steps": 2, "train__batch_size": 60, "adapter__dropout": 0.2}
    narrow = run(write_recipe(tmp_path / "narrow", tiny_base, rows, train__tokens_per_pass=1536, **settings)).path
    passes: list[Any] = []
    tried = []
    original = trainer_file.StepTrainer._run_passes

    def run_passes(trainer: trainer_file.StepTrainer, *args: Any) -> Any:
        tried.append(trainer.state.global_step)  # once by the trial, then by the step itself
        losses = second_fails if len(tried) == 2 else stretch_losses_S
        monkeypatch.setattr(trainer_file, "stretch_losses_S", losses)
        return original(trainer, *args)

    def second_fails(model: torch.nn.Module, stretch: Any) -> torch.Tensor:
        losses = stretch_losses_S(model, stretch)
        passes.append(stretch)
        if len(passes) == 2:
            torch.empty(1 << 60, dtype=torch.uint8)
        return losses

    monkeypatch.setattr(trainer_file.StepTrainer, "_run_passes", run_passes)
    begun_again = run(write_recipe(tmp_path / "again", tiny_base, rows, **settings)).path
    assert lowered(begun_again) == [{"step": 1, "tokens_per_pass": 1536, "recompute": False}]
    assert (tried, len(passes)) == ([0, 0, 0, 1], 2)
    assert column(begun_again, "loss") == column(narrow, "loss")
    assert weights(begun_again) == weights(narrow)


def test_a_resume_takes_each_step_in_the_layout_it_had(
    tiny_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As if killed in step 4, with checkpoint 1 alone left: step 2 is wide again, the third narrow at once."""
    path = write_recipe(tmp_path, tiny_base, alpaca_rows(96), **{**SETTINGS, "output__save_every_steps": 1})
    memory = SmallMemory(monkeypatch, from_step=3)
    folder = run(path, ["output.keep_checkpoints=4"]).path
    before, failures = (weights(folder), column(folder, "loss")), memory.failures
    for step in (2, 3, 4):
        shutil.rmtree(folder / "checkpoints" / f"step-{step:06d}")
    (folder / "result.json").unlink()
    run(path, ["output.keep_checkpoints=4"], resume=True)
    assert memory.failures == failures, "no pass was tried that had failed before"
    assert (weights(folder), column(folder, "loss")) == before
    (folder / "result.json").unlink()
    run(path, ["output.keep_checkpoints=4", "train.tokens_per_pass=600"], resume=True)
    assert lowered(folder) == [], "a layout that is asked for now counts from its beginning"


def test_recomputation_comes_after_the_narrowest_passes(
    tiny_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = {**SETTINGS, "train__tokens_per_pass": 2048}
    rows = alpaca_rows(96)
    straight = run(write_recipe(tmp_path / "straight", tiny_base, rows, **settings)).path
    memory = SmallMemory(monkeypatch, from_step=2)
    path = write_recipe(tmp_path / "short", tiny_base, rows, **settings)
    short = run(path).path
    assert memory.failures == 1
    assert lowered(short) == [{"step": 2, "tokens_per_pass": 2048, "recompute": True}]
    assert column(short, "loss") == pytest.approx(column(straight, "loss"), rel=1e-6)
    saved, losses = weights(short), column(short, "loss")
    shutil.rmtree(short / "checkpoints" / "step-000004")
    (short / "result.json").unlink()
    run(path, resume=True)
    assert memory.failures == 1
    assert (weights(short), column(short, "loss")) == (saved, losses)


def test_what_the_recipe_asks_for_is_not_changed(
    tiny_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = {**SETTINGS, "train__tokens_per_pass": 2048, "train__recompute": "none"}
    SmallMemory(monkeypatch, from_step=2)
    with pytest.raises(OutOfMemoryError, match="lower train.tokens_per_pass") as caught:
        run(write_recipe(tmp_path, tiny_base, alpaca_rows(48), **settings))
    assert caught.value.code == 5
    assert lowered(tmp_path / "run") == []


def test_all_ranks_take_the_lighter_layout_of_one(nursery: Nursery, tiny_base: Path, tmp_path: Path) -> None:
    """A pass of the second rank fails once in step 1; both then train what two ranks train with narrower passes."""
    rows, settings = alpaca_rows(48), {**SETTINGS, "train__max_steps": 2}
    hook = """
import torch, finetune.train.trainer as trainer
run_passes, losses_of, tried = trainer.StepTrainer._run_passes, trainer.stretch_losses_S, []
def too_large(model, stretch):
    return torch.empty(1 << 60, dtype=torch.uint8)
def fails_once(self, *arguments):
    tried.append(self.state.global_step)  # once by the trial, then by the step itself
    trainer.stretch_losses_S = too_large if len(tried) == 2 else losses_of
    return run_passes(self, *arguments)
trainer.StepTrainer._run_passes = fails_once
"""
    recipe, narrow = (
        write_recipe(tmp_path / name, tiny_base, rows, **settings, **more)
        for name, more in (("short", {}), ("narrow", {"train__tokens_per_pass": 1024}))
    )
    ended = nursery.train_ranks(2, recipe, hooks={1: hook})
    assert [each.code for each in ended] == [0, 0], ended
    assert "step 1 ran out of memory, another rank asked for it" in ended[0].err
    assert [each.code for each in nursery.train_ranks(2, narrow)] == [0, 0]
    assert lowered(tmp_path / "short" / "run") == [{"step": 1, "tokens_per_pass": 1536, "recompute": False}]
    assert weights(tmp_path / "short" / "run") == weights(tmp_path / "narrow" / "run")


def plan_of(*open_keys: str, tokens: int = 4096, recompute: bool = False) -> TrainPlan:
    """Only what decides a layout."""
    return replace(
        TrainPlan(**dict.fromkeys(TrainPlan.__dataclass_fields__)),  # type: ignore[arg-type]
        tokens_per_pass=tokens,
        recompute=recompute,
        open_keys=open_keys,
        lowered=(),
    )


def test_the_order_of_what_is_lowered() -> None:
    """Written out: halved while it helps, then recomputed, then nothing; steps before keep what they had."""
    plan: TrainPlan | None = plan_of("tokens_per_pass", "recompute")
    seen: list[tuple[tuple[int, int, bool], ...]] = []
    for step in (5, 5, 9, 9):
        assert plan
        last, plan = plan, lighten(plan, step=step, longest=700)
        seen.append(tuple((each.step, each.tokens_per_pass, each.recompute) for each in plan.lowered) if plan else ())
    assert seen == [((5, 2048, False),), ((5, 1024, False),), ((5, 1024, False), (9, 1024, True)), ()]
    layouts = {step: layout_of_step(last, step) for step in (1, 4, 5, 8, 9, 99)}
    assert [each.tokens_per_pass for each in layouts.values()] == [4096, 4096, 1024, 1024, 1024, 1024]
    assert [each.recompute for each in layouts.values()] == [False, False, False, False, True, True]
    earlier = lighten(last, step=2, longest=700)  # a run that goes on from an earlier checkpoint
    assert earlier
    assert [each.step for each in earlier.lowered] == [2, 5, 9]
    at_once = lighten(plan_of("tokens_per_pass"), step=1, longest=9)
    assert at_once
    assert layout_of_step(at_once, 1).tokens_per_pass == 2048
    assert lighten(plan_of("recompute", recompute=True), step=1, longest=9) is None
    assert lighten(plan_of("tokens_per_pass", tokens=1023), step=1, longest=9) is None, "not under 512"
    assert lighten(plan_of(), step=1, longest=9) is None
