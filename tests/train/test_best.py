"""The lowest held-out loss: its checkpoint is kept and becomes the adapter, and waiting for a lower one has an end."""

from __future__ import annotations

import json
import math
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from finetune.cli_text import train_text
from finetune.errors import UserError
from finetune.plan import run_bytes
from finetune.resolve import resolve
from finetune.run import run
from finetune.stop import Stopped, StopSignal
from finetune.train import trainer as trainer_file
from finetune.train.checkpoints import find_checkpoints
from finetune.train.held_out import EvaluationStopped
from finetune.train.trainer import StepTrainer
from tests.conftest import alpaca_rows, write_recipe
from tests.train.forked import WEIGHTS, Nursery, weights

# So high a learning rate that the held-out loss goes down and up again.
OPTIONS: dict[str, Any] = {
    "seed": 0,
    "adapter__dropout": 0.1,
    "data__eval": 3,
    "evaluate__every_steps": 1,
    "output__save_every_steps": 8,
    "output__keep_checkpoints": 1,
    "train__max_steps": 8,
    "train__batch_size": 2,
    "train__learning_rate": 0.2,
    "train__schedule": "cosine",
}


class Crash(Exception):
    """The end of a process, without its last words."""


class Full:
    """The run of all its steps, without either key."""

    def __init__(self, folder: Path, base: Path) -> None:
        self.recipe = write_recipe(folder, base, alpaca_rows(14), **OPTIONS)
        self.path = run(self.recipe).path
        self.metrics = (self.path / "metrics.jsonl").read_bytes()

    def best(self, *, until: int = 8) -> int:
        losses = losses_of(self.path)
        return min(range(1, until + 1), key=lambda step: losses[step])

    def stops_at(self, patience: int) -> int:
        """By the rule as it is told to people."""
        lowest, waited = math.inf, 0
        for step, loss in sorted(losses_of(self.path).items()):
            lowest, waited = (loss, 0) if loss < lowest else (lowest, waited + 1)
            if waited == patience:
                return step
        return 8

    def metrics_until(self, step: int) -> bytes:
        lines = self.metrics.splitlines(keepends=True)
        return b"".join(line for line in lines if json.loads(line)["step"] <= step)


def losses_of(path: Path) -> dict[int, float]:
    entries = map(json.loads, (path / "metrics.jsonl").read_text().splitlines())
    return {entry["step"]: entry["eval_loss"] for entry in entries if "eval_loss" in entry}


def steps_kept(path: Path) -> list[str]:
    return [checkpoint.name for checkpoint in find_checkpoints(path / "checkpoints")]


def result_of(path: Path) -> dict[str, Any]:
    return json.loads((path / "result.json").read_text())


def unfinish(path: Path) -> None:
    (path / "result.json").unlink()
    shutil.rmtree(path / "adapter")


@pytest.fixture(scope="module")
def full(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Full:
    return Full(tmp_path_factory.mktemp("full"), tiny_base)


@pytest.fixture(scope="module")
def best(full: Full) -> Path:
    """The run that keeps its best checkpoint."""
    return run(full.recipe, ["output.keep_best=true"], out=full.path.parent / "best").path


@pytest.fixture(scope="module")
def early(full: Full) -> Path:
    """The run that ends after two evaluations without a lower loss, with its best adapter."""
    return run(full.recipe, ["output.keep_best=true", "evaluate.patience=2"], out=full.path.parent / "early").path


def test_the_losses_here_go_down_and_up(full: Full) -> None:
    assert 1 < full.best() < 8
    assert full.stops_at(1) < full.stops_at(2) < 8
    assert full.best(until=full.stops_at(2)) < full.stops_at(2)


def test_the_adapter_is_the_best_checkpoint(full: Full, best: Path) -> None:
    name = f"step-{full.best():06d}"
    assert steps_kept(best) == [name, "step-000008"], "kept beside the newest, and saved though no save was due"
    assert weights(best) == (best / "checkpoints" / name / WEIGHTS).read_bytes()
    assert weights(best) != weights(full.path)
    result = result_of(best)
    assert (result["steps"], result["adapter_step"]) == (8, full.best())
    assert result["eval_loss"] == min(losses_of(full.path).values())
    assert f"held-out loss {result['eval_loss']:.4f}; the adapter is that of step {full.best()}" in train_text(
        {"run": "run", **result}
    )
    assert (best / "metrics.jsonl").read_bytes() == full.metrics, "the training is as it was"
    assert (best / "checkpoints" / "step-000008" / WEIGHTS).read_bytes() == weights(full.path)
    assert result_of(full.path)["adapter_step"] is None


@pytest.mark.parametrize("patience", [1, 2, 8])
def test_a_run_ends_after_so_many_evaluations_without_a_lower_loss(
    full: Full, tmp_path: Path, patience: int, capsys: pytest.CaptureFixture[str]
) -> None:
    """And up to there it is the run that had all the time, with the learning rate of all steps."""
    ended = run(full.recipe, [f"evaluate.patience={patience}"], out=tmp_path / "run").path
    last = full.stops_at(patience)
    assert (ended / "metrics.jsonl").read_bytes() == full.metrics_until(last)
    assert result_of(ended)["steps"] == last
    assert steps_kept(ended) == [f"step-{last:06d}"]
    assert weights(ended) == (ended / "checkpoints" / f"step-{last:06d}" / WEIGHTS).read_bytes()
    told = f"step {last} of 8: ended early, no lower held-out loss in {patience} evaluations"
    assert capsys.readouterr().err.count(told) == (last < 8)


@pytest.mark.parametrize("step", [2, 3, 4])
def test_a_run_that_crashed_ends_as_the_undisturbed_one(
    full: Full, early: Path, tmp_path: Path, step: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is over before the step, so that it goes on from the last checkpoint."""
    change = ["output.keep_best=true", "evaluate.patience=2"]
    original = StepTrainer.training_step

    def crashing(self: StepTrainer, *args: Any) -> Any:
        if self.state.global_step == step - 1:
            raise Crash
        return original(self, *args)

    with monkeypatch.context() as patch:
        patch.setattr(StepTrainer, "training_step", crashing)
        with pytest.raises(Crash):
            run(full.recipe, change, out=tmp_path / "run")
    assert_the_same(run(full.recipe, change, out=tmp_path / "run", resume=True).path, early)


def assert_the_same(path: Path, other: Path) -> None:
    assert weights(path) == weights(other)
    assert (path / "metrics.jsonl").read_bytes() == (other / "metrics.jsonl").read_bytes()
    figures = ("steps", "adapter_step", "eval_loss", "train_loss", "supervised_tokens")
    assert [result_of(path)[name] for name in figures] == [result_of(other)[name] for name in figures]
    assert steps_kept(path) == steps_kept(other)


def test_a_run_that_ended_early_and_crashed_before_its_result(
    full: Full, early: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    copy = shutil.copytree(early, tmp_path / "run")
    unfinish(copy)
    change = ["output.keep_best=true", "evaluate.patience=2"]
    run(full.recipe, change, out=copy, resume=True)
    assert_the_same(copy, early)
    assert capsys.readouterr().err.count("ended early") == 1
    written = (copy / "result.json").read_bytes()
    run(full.recipe, change, out=copy, resume=True)
    assert (copy / "result.json").read_bytes() == written, "nothing is left to do"


def test_a_signal_in_the_evaluation_that_would_have_ended_it(
    full: Full, early: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is made up for, and no further step is trained."""
    change, stop = ["output.keep_best=true", "evaluate.patience=2"], StopSignal()
    original, calls = trainer_file.mean_loss, []

    def signalled(*args: Any, **kwargs: Any) -> float:
        calls.append(1)
        if len(calls) == full.stops_at(2):
            stop.number = 15
            raise EvaluationStopped
        return original(*args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(trainer_file, "mean_loss", signalled)
        with pytest.raises(Stopped):
            run(full.recipe, change, out=tmp_path / "run", stop=stop)
    assert len(losses_of(tmp_path / "run")) == full.stops_at(2) - 1
    assert_the_same(run(full.recipe, change, out=tmp_path / "run", resume=True).path, early)


def test_a_finished_run_goes_on_with_more_patience(full: Full, early: Path, best: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(early, tmp_path / "run")
    run(full.recipe, ["output.keep_best=true", "evaluate.patience=8"], out=copy, resume=True)
    assert_the_same(copy, best)


def test_more_steps_alone_give_no_more_patience(full: Full, early: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(early, tmp_path / "run")
    change = ["output.keep_best=true", "evaluate.patience=2", "train.max_steps=10"]
    run(full.recipe, change, out=copy, resume=True)
    assert_the_same(copy, early)


def test_the_next_best_takes_the_place_of_a_damaged_one(
    full: Full, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    change = ["output.keep_best=true", "output.keep_checkpoints=9", "output.save_every_steps=1", "train.max_steps=6"]
    path = run(full.recipe, change, out=tmp_path / "run").path
    losses = losses_of(path)
    first, second, third = sorted(losses, key=lambda step: losses[step])[:3]
    assert 6 not in (first, second), "whose weights the model has already"
    unfinish(path)
    file = path / "checkpoints" / f"step-{first:06d}" / WEIGHTS
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    capsys.readouterr()
    run(full.recipe, change, out=path, resume=True)
    told = capsys.readouterr().err
    assert f"{WEIGHTS} has changed since it was saved; kept as step-{first:06d}.damaged and not used" in told
    assert_adapter_is(path, second)
    unfinish(path)
    shutil.rmtree(path / "checkpoints" / f"step-{second:06d}")
    run(full.recipe, change, out=path, resume=True)
    told = capsys.readouterr().err
    assert f"step-{second:06d}: is not there; its held-out loss is {losses[second]:.4f}" in told
    assert_adapter_is(path, third)


def assert_adapter_is(path: Path, step: int) -> None:
    result = result_of(path)
    assert (result["adapter_step"], result["eval_loss"]) == (step, losses_of(path)[step])
    assert weights(path) == (path / "checkpoints" / f"step-{step:06d}" / WEIGHTS).read_bytes()


def test_the_disk_needs_room_for_the_best_one(full: Full) -> None:
    train = replace(resolve(full.recipe).plan.train, steps=100, save_every_steps=10)
    one = run_bytes(replace(train, keep_checkpoints=2), 10**6) - run_bytes(train, 10**6)
    assert run_bytes(replace(train, keep_best=True), 10**6) == run_bytes(train, 10**6) + one > 10**6


@pytest.mark.parametrize(("key", "value"), [("evaluate.patience", 1), ("output.keep_best", "true")])
def test_a_held_out_loss_needs_held_out_rows(full: Full, tmp_path: Path, key: str, value: object) -> None:
    with pytest.raises(UserError, match=f"{key}: needs held-out rows, and there are none"):
        run(full.recipe, ["data.eval=null", f"{key}={value}"], out=tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.soak
def test_two_ranks_end_at_the_same_step(full: Full, early: Path, nursery: Nursery, tmp_path: Path) -> None:
    options = ["--set", "output.keep_best=true", "--set", "evaluate.patience=2", "--set", "adapter.dropout=0"]
    alone = nursery.train(full.recipe, *options, "--out", tmp_path / "alone")
    together = nursery.train_ranks(2, full.recipe, *options, "--out", tmp_path / "run")
    assert [each.code for each in (alone, *together)] == [0, 0, 0], [alone.err, *(each.err for each in together)]
    results = [result_of(tmp_path / name) for name in ("alone", "run")]
    assert len({(each["steps"], each["adapter_step"]) for each in results}) == 1
    unfinish(tmp_path / "run")
    again = nursery.train_ranks(2, full.recipe, *options, "--out", tmp_path / "run", "--resume")
    assert [each.code for each in again] == [0, 0]
    assert result_of(tmp_path / "run")["adapter_step"] == results[0]["adapter_step"]
