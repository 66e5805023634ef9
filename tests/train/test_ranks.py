"""Several ranks train what one trains, and agree on every end: a signal, a NaN, a full disk, an error of one."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file

from finetune.train.checkpoints import find_checkpoints, find_damage
from finetune.train.ranks import deal, note_exit
from finetune.train.watch import read_metrics
from tests.conftest import alpaca_rows, write_recipe
from tests.train.forked import WEIGHTS, Nursery, weights
from tests.train.test_signals import KILL_AT, kill_at

OPTIONS = {
    "data__eval": 3,
    "evaluate__every_steps": 2,
    "output__save_every_steps": 2,
    "train__max_steps": 5,
    "train__tokens_per_pass": 150,
}


class Pair:
    """One run with one rank and one with two."""

    def __init__(self, nursery: Nursery, folder: Path, base: Path, **more: object) -> None:
        self.nursery = nursery
        self.recipe = write_recipe(folder, base, alpaca_rows(14), **OPTIONS, **more)
        self.one, self.two = folder / "one", folder / "two"
        assert nursery.train(self.recipe, "--out", self.one).code == 0
        self.ended = nursery.train_ranks(2, self.recipe, "--out", self.two)
        assert [each.code for each in self.ended] == [0, 0], self.ended


@pytest.fixture(scope="module")
def pair(nursery: Nursery, tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Pair:
    return Pair(nursery, tmp_path_factory.mktemp("pair"), tiny_base)


def column(run: Path, name: str) -> list[float]:
    return [entry[name] for entry in read_metrics(run / "metrics.jsonl") if name in entry]


def test_two_ranks_train_what_one_trains(pair: Pair) -> None:
    for name in ("loss", "eval_loss", "grad_norm"):
        assert column(pair.two, name) == pytest.approx(column(pair.one, name), rel=1e-5)
        assert len(column(pair.two, name)) in (3, 5)
    for name in ("tokens", "supervised_tokens", "learning_rate"):
        assert column(pair.two, name) == column(pair.one, name)
    one, two = (load_file(run / "adapter" / WEIGHTS) for run in (pair.one, pair.two))
    assert one.keys() == two.keys()
    assert max((one[name] - two[name]).abs().max().item() for name in one) < 1e-6
    assert any((tensor.abs() > 1e-3).any() for name, tensor in two.items() if "lora_B" in name)


def test_only_the_first_rank_speaks_and_each_code_is_noted(pair: Pair) -> None:
    assert "step 5/5" in pair.ended[0].err
    assert "5 steps" in pair.ended[0].out
    assert pair.ended[1].out == pair.ended[1].err == ""
    assert json.loads((pair.two / "exit.json").read_text()) == {"0": 0, "1": 0}
    assert not (pair.one / "exit.json").exists()


@pytest.mark.parametrize("signalled", [pytest.param(0, marks=pytest.mark.soak), 1])
def test_one_signalled_rank_stops_both_at_the_same_step(
    nursery: Nursery, tiny_base: Path, tmp_path: Path, signalled: int
) -> None:
    """With dropout, so that a resumed rank needs its own random numbers; bit for bit the undisturbed two."""
    recipe = write_recipe(tmp_path, tiny_base, alpaca_rows(14), **OPTIONS, adapter__dropout=0.1)
    run, straight = tmp_path / "run", tmp_path / "straight"
    hooks = {signalled: kill_at("torch.optim AdamW.step 4", signal.SIGTERM)}
    ended = nursery.train_ranks(2, recipe, "--out", run, hooks=hooks)
    assert [each.code for each in ended] == [143, 143]
    assert json.loads((run / "exit.json").read_text()) == {"0": 143, "1": 143}
    assert "after step 3 of 5 a checkpoint is saved" in ended[0].err
    assert ended[1].err == ""
    newest = find_checkpoints(run / "checkpoints")[-1]
    assert newest.name == "step-000003"
    first, second = ((newest / f"random-00{rank}.json").read_bytes() for rank in (0, 1))
    assert first != second
    assert [each.code for each in nursery.train_ranks(2, recipe, "--out", run, "--resume")] == [0, 0]
    assert [each.code for each in nursery.train_ranks(2, recipe, "--out", straight)] == [0, 0]
    assert weights(run) == weights(straight)
    assert (run / "metrics.jsonl").read_bytes() == (straight / "metrics.jsonl").read_bytes()


@pytest.mark.soak
def test_another_number_of_ranks_is_refused_unless_it_is_allowed(pair: Pair, tmp_path: Path) -> None:
    run = tmp_path / "run"
    hook = kill_at("torch.optim AdamW.step 4", signal.SIGTERM)
    assert {each.code for each in pair.nursery.train_ranks(2, pair.recipe, "--out", run, hooks={0: hook})} == {143}
    refused = pair.nursery.train(pair.recipe, "--out", run, "--resume")
    assert refused.code == 2
    assert "began with 2 ranks, now there are 1" in refused.err
    wrong = pair.nursery.train(pair.recipe, "--out", run, "--resume", "--allow-change", "batch_size")
    assert wrong.code == 2
    assert "'batch_size' is not possible; write world_size" in wrong.err
    allowed = pair.nursery.train(pair.recipe, "--out", run, "--resume", "--allow-change", "world_size")
    assert allowed.code == 0, allowed.err
    assert column(run, "loss") == pytest.approx(column(pair.one, "loss"), rel=1e-5)


NAN_ON_THIS_RANK = """
import finetune.train.trainer as file
original, calls = file.stretch_losses_S, []
def broken(model, stretch):
    calls.append(1)
    losses = original(model, stretch)
    return losses * float("nan") if model.training and file_step() == 2 else losses
def file_step():
    return trainer[0].state.global_step
trainer = []
init = file.StepTrainer.__init__
file.StepTrainer.__init__ = lambda self, **kwargs: (trainer.append(self), init(self, **kwargs))[1]
file.stretch_losses_S = broken
"""


def test_a_nan_on_one_rank_stops_both_before_the_update(pair: Pair, tmp_path: Path) -> None:
    run = tmp_path / "run"
    ended = pair.nursery.train_ranks(2, pair.recipe, "--out", run, hooks={1: NAN_ON_THIS_RANK})
    assert [each.code for each in ended] == [4, 4]
    assert "step 3: the loss is nan; nothing was updated" in ended[0].err
    assert ended[1].err == ""
    assert [find_damage(path) for path in find_checkpoints(run / "checkpoints")] == [None]


NO_ROOM = """
import errno, finetune.train.trainer as file
save, calls = file.save_state, []
def full(*args, **kwargs):
    calls.append(1)
    if len(calls) > 1:  # the first is a trial's, before the first step
        raise OSError(errno.ENOSPC, "No space left on device")
    save(*args, **kwargs)
file.save_state = full
"""


def test_failed_saves_of_the_first_rank_end_both(pair: Pair, tmp_path: Path) -> None:
    options = ["--set", "output.save_every_steps=1", "--out", tmp_path / "run"]
    ended = pair.nursery.train_ranks(2, pair.recipe, *options, hooks={0: NO_ROOM})
    assert [each.code for each in ended] == [3, 3]
    assert ended[0].err.count("No space left") == 3
    assert ended[1].err == ""


def test_a_rank_that_dies_does_not_leave_the_other_waiting(pair: Pair, tmp_path: Path) -> None:
    hook = kill_at("torch.optim AdamW.step 4", signal.SIGKILL)
    ended = pair.nursery.train_ranks(2, pair.recipe, "--out", tmp_path / "run", hooks={1: hook})
    assert [each.code for each in ended] == [7, -signal.SIGKILL]
    assert json.loads((tmp_path / "run" / "exit.json").read_text()) == {"0": 7, "1": None}
    assert "another rank is gone" in ended[0].err
    assert "Traceback" not in ended[0].err


def test_an_error_before_training_is_told_once(pair: Pair, tmp_path: Path) -> None:
    ended = pair.nursery.train_ranks(2, pair.recipe, "--out", tmp_path / "run", "--set", "train.batch_sise=3")
    assert [each.code for each in ended] == [2, 2]
    assert "batch_sise" in ended[0].err
    assert ended[1].err == ""
    assert not (tmp_path / "run").exists()


@pytest.mark.soak
def test_rows_are_read_by_the_first_rank_only(pair: Pair, tmp_path: Path) -> None:
    rows = tmp_path / "rows.jsonl"
    rows.write_bytes((pair.recipe.parent / "rows.jsonl").read_bytes() + b"\n \n")
    kill_reader = f"{KILL_AT}\nkill_at('finetune.data.cached', 'StoreWriter.__init__', 1, {int(signal.SIGKILL)})\n"
    arguments = ["--out", tmp_path / "run", "--set", f"data.train={rows}", "--set", "train.max_steps=1"]
    assert [each.code for each in pair.nursery.train_ranks(2, pair.recipe, *arguments, hooks={1: kill_reader})] == [
        0,
        0,
    ]


@given(st.lists(st.integers(1, 5000), max_size=40), st.integers(1, 5))
def test_every_example_of_a_step_is_dealt_once_and_evenly(tokens: list[int], count: int) -> None:
    shares = deal(tokens, count=count)
    assert sorted(position for share in shares for position in share) == list(range(len(tokens)))
    assert len(shares) == count
    held = [sum(tokens[position] for position in share) for share in shares]
    assert max(held) - min(held) <= max(tokens, default=0)
    assert deal(tokens, count=1) == [list(range(len(tokens)))]


def test_exit_codes_of_ranks_are_collected(tmp_path: Path) -> None:
    for rank, code in ((1, 143), (0, 0), (10, 3), (1, 5)):
        note_exit(tmp_path / "exit.json", rank=rank, code=code)
    assert json.loads((tmp_path / "exit.json").read_text()) == {"0": 0, "1": 5, "10": 3}
    note_exit(tmp_path / "missing" / "exit.json", rank=0, code=0)


def test_gradients_of_a_rank_without_a_share_are_zeros() -> None:
    """Alone nothing is summed, and a gradient that is not there stays away."""
    from finetune.train.ranks import Ranks

    parameter = torch.nn.Parameter(torch.ones(2))
    Ranks().sum_gradients_([parameter])
    assert parameter.grad is None


def test_ranks_that_cannot_be_connected_are_told(nursery: Nursery, pair: Pair, tmp_path: Path) -> None:
    environment = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": ""}
    ended = nursery.start(pair.recipe, "--out", tmp_path / "run", environment=environment).wait()
    assert ended.code == 2, ended.err
    assert "2 ranks are announced (WORLD_SIZE), but they cannot be connected" in ended.err
    assert "Traceback" not in ended.err


WAIT_ALONE = """
import threading, os, signal, sys, time
import finetune.train.ranks as ranks
from finetune.stop import stop_on_signals
import torch.distributed
meet = torch.distributed.rendezvous
def told(*args, **kwargs):
    threading.Timer(0.2, os.kill, (os.getpid(), signal.SIGTERM)).start()
    return meet(*args, **kwargs)
torch.distributed.rendezvous = told
from finetune.errors import Interrupted
try:
    with stop_on_signals(rank=0, ranks=2) as stop, ranks.joined_ranks(0, 0, 2, stop=stop):
        pass
except Interrupted as error:
    sys.exit(error.code)
"""


def test_a_rank_that_waits_for_another_ends_with_the_signal() -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "RANK": "0", "WORLD_SIZE": "2"}
    command = [sys.executable, "-c", WAIT_ALONE]
    ended = subprocess.run(command, env={**os.environ, **address}, timeout=60, check=False, capture_output=True)
    assert ended.returncode == 128 + signal.SIGTERM, ended.stderr
