"""A signal in any phase: a clean end, exit code 128 + n, and the resumed run is bit for bit the undisturbed one."""

from __future__ import annotations

import json
import signal
from pathlib import Path

import pytest

from finetune.train.checkpoints import find_checkpoints, find_damage
from tests.conftest import alpaca_rows, write_recipe
from tests.train.forked import Nursery, weights

OPTIONS = {
    "adapter__dropout": 0.1,
    "data__eval": 2,
    "evaluate__every_steps": 4,
    "output__save_every_steps": 4,
    "train__max_steps": 6,
}

# Kills itself with the signal when the function is called for the nth time.
KILL_AT = """
import importlib, os
def kill_at(module, name, call, number):
    owner = importlib.import_module(module)
    *path, last = name.split(".")
    for part in path:
        owner = getattr(owner, part)
    original, calls = getattr(owner, last), []
    def patched(*args, **kwargs):
        calls.append(1)
        if len(calls) == call:
            os.kill(os.getpid(), number)
        return original(*args, **kwargs)
    setattr(owner, last, patched)
"""


def kill_at(place: str, number: int) -> str:
    module, name, call = place.split(" ")
    return f"{KILL_AT}\nkill_at({module!r}, {name!r}, {call}, {int(number)})\n"


class Straight:
    """The run that nothing disturbs."""

    def __init__(self, nursery: Nursery, folder: Path, base: Path) -> None:
        self.nursery = nursery
        self.recipe = write_recipe(folder, base, alpaca_rows(12), **OPTIONS)
        self.run = folder / "straight"
        ended = nursery.train(self.recipe, "--out", self.run)
        assert ended.code == 0, ended.err

    def assert_resumes_to_the_same(self, run: Path) -> None:
        ended = self.nursery.train(self.recipe, "--out", run, "--resume")
        assert ended.code == 0, ended.err
        assert weights(run) == weights(self.run)
        assert (run / "metrics.jsonl").read_bytes() == (self.run / "metrics.jsonl").read_bytes()
        times = {"seconds", "tokens_per_second", "peak_memory_gib"}
        results = [json.loads((folder / "result.json").read_text()) for folder in (run, self.run)]
        assert len({json.dumps({k: v for k, v in each.items() if k not in times}) for each in results}) == 1


@pytest.fixture(scope="module")
def straight(nursery: Nursery, tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Straight:
    return Straight(nursery, tmp_path_factory.mktemp("straight"), tiny_base)


# Where there is nothing to save yet, or all is saved: the end comes at once.
AT_ONCE = {
    "reading the recipe": ("finetune.resolve load_recipe 1", signal.SIGINT),
    "tokenising": ("finetune.data.cached StoreWriter.append 1", signal.SIGTERM),
    "creating the folder": ("finetune.artifact write_json 1", signal.SIGHUP),
    "loading": ("finetune.model.load load_base 1", signal.SIGUSR1),
    "drawing the curve": ("finetune.train.train draw_loss_curve 1", signal.SIGINT),
    "writing the adapter": ("finetune.artifact write_tokenizer 1", signal.SIGTERM),
    "writing the result": ("finetune.artifact asdict 1", signal.SIGHUP),
}


def each_phase(phases: dict, *always: str) -> pytest.MarkDecorator:
    """All phases, those that are not named only in the long run."""
    soak = pytest.mark.soak
    return pytest.mark.parametrize("phase", [pytest.param(p, marks=() if p in always else soak) for p in phases])


@each_phase(AT_ONCE, "tokenising", "loading", "writing the adapter")
def test_where_nothing_is_to_be_saved_the_end_comes_at_once(straight: Straight, tmp_path: Path, phase: str) -> None:
    place, number = AT_ONCE[phase]
    data = tmp_path / "rows.jsonl"  # bytes of its own, so that they are not in the cache yet
    data.write_bytes((straight.recipe.parent / "rows.jsonl").read_bytes() + b"\n" * len(phase))
    recipe = straight.recipe if phase != "tokenising" else tmp_path / "recipe.json"
    recipe.write_text(straight.recipe.read_text().replace(str(straight.recipe.parent / "rows.jsonl"), str(data))
                      if phase == "tokenising" else straight.recipe.read_text())  # fmt: skip
    ended = straight.nursery.train(recipe, "--out", tmp_path / "run", hook=kill_at(place, number))
    assert ended.code == 128 + number
    assert ended.err.splitlines()[-1].startswith(f"finetune: {number.name}: ")
    assert "Traceback" not in ended.err
    assert not (tmp_path / "run" / "result.json").exists()
    if phase != "tokenising":
        straight.assert_resumes_to_the_same(tmp_path / "run")


# In training: a checkpoint at the next boundary, which for an evaluation and a save is the one they stand at. Each of
# these functions is called once before the first step, when one is tried (finetune/train/trial.py).
IN_TRAINING = {
    "a pass": ("finetune.train.trainer stretch_losses_S 4", signal.SIGINT, 3),
    "the trial": ("finetune.train.trainer lay_end_to_end 1", signal.SIGTERM, 1),
    "the first step": ("finetune.train.trainer lay_end_to_end 2", signal.SIGTERM, 1),
    "the optimizer": ("torch.optim AdamW.step 3", signal.SIGUSR1, 2),
    "an evaluation": ("finetune.train.held_out sum_losses 1", signal.SIGHUP, 4),
    "a save": ("finetune.train.trainer save_state 2", signal.SIGTERM, 4),
    "the last step": ("torch.optim AdamW.step 7", signal.SIGTERM, 6),
    "the last save": ("finetune.train.trainer save_state 3", signal.SIGINT, 6),
    "the evaluation of the last step": ("finetune.train.held_out sum_losses 2", signal.SIGTERM, 6),
}


@each_phase(IN_TRAINING, "a pass", "an evaluation", "a save", "the last step")
def test_in_training_a_checkpoint_is_saved_first(straight: Straight, tmp_path: Path, phase: str) -> None:
    place, number, step = IN_TRAINING[phase]
    run = tmp_path / "run"
    ended = straight.nursery.train(straight.recipe, "--out", run, hook=kill_at(place, number))
    assert ended.code == 128 + number, ended.err
    assert "Traceback" not in ended.err
    last = ended.err.splitlines()[-1]
    assert last.startswith(f"finetune: {number.name}: after step {step} of 6 ")
    assert "--resume" in last
    assert int(find_checkpoints(run / "checkpoints")[-1].name[5:]) == step
    assert not (run / "result.json").exists()
    assert not (run / "adapter").exists()
    straight.assert_resumes_to_the_same(run)


def test_a_second_signal_ends_at_once(straight: Straight, tmp_path: Path) -> None:
    """The first comes in step 5, the second while its checkpoint is written; that of step 4 is whole."""
    run = tmp_path / "run"
    hook = kill_at("torch.optim AdamW.step 6", signal.SIGTERM)
    hook += kill_at("finetune.train.trainer save_state 3", signal.SIGINT)
    ended = straight.nursery.train(straight.recipe, "--out", run, hook=hook)
    assert ended.code == 128 + signal.SIGTERM
    assert "Traceback" not in ended.err
    assert "a second signal" in ended.err.splitlines()[-1]
    found = find_checkpoints(run / "checkpoints")
    assert [(path.name, find_damage(path)) for path in found] == [("step-000004", None)]
    straight.assert_resumes_to_the_same(run)


def test_a_signal_that_is_ignored_stays_ignored(straight: Straight, tmp_path: Path) -> None:
    """As under nohup."""
    hook = "import signal\nsignal.signal(signal.SIGHUP, signal.SIG_IGN)\n"
    hook += kill_at("torch.optim AdamW.step 2", signal.SIGHUP)
    assert straight.nursery.train(straight.recipe, "--out", tmp_path / "run", hook=hook).code == 0


@pytest.mark.soak
def test_a_killed_run_resumes_to_the_same(straight: Straight, tmp_path: Path) -> None:
    for place in (
        "torch.optim AdamW.step 6",
        "finetune.train.checkpoints _seal 2",
        "finetune.train.train draw_loss_curve 1",
    ):
        run = tmp_path / place.split(" ")[1]
        ended = straight.nursery.train(straight.recipe, "--out", run, hook=kill_at(place, signal.SIGKILL))
        assert ended.code == -signal.SIGKILL
        straight.assert_resumes_to_the_same(run)
