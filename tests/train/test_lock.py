"""One run per folder: of several starts one trains, the others end at once and change nothing."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import signal
import socket
from contextlib import nullcontext
from pathlib import Path

import pytest

from finetune import run_lock
from finetune.errors import StorageError, UserError
from finetune.run_lock import only_run_in
from tests.conftest import alpaca_rows, write_recipe
from tests.train.forked import Nursery, weights
from tests.train.test_signals import kill_at

# Waits in its first step until the test opens the other end of a pipe.
WAIT_IN_STEP = """
import finetune.train.trainer as file
original = file.StepTrainer.training_step
def waiting(*args):
    file.StepTrainer.training_step = original
    open({pipe!r}).close()
    return original(*args)
file.StepTrainer.training_step = waiting
"""


def test_of_several_starts_one_trains(nursery: Nursery, tiny_base: Path, tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path, tiny_base, alpaca_rows(8), train__max_steps=2)
    straight, run, pipe = tmp_path / "straight", tmp_path / "run", tmp_path / "pipe"
    assert nursery.train(recipe, "--out", straight).code == 0
    os.mkfifo(pipe)
    hook = WAIT_IN_STEP.format(pipe=str(pipe))
    children = [nursery.start(recipe, "--out", run, "--resume", hook=hook) for _ in range(4)]
    writer = os.open(pipe, os.O_WRONLY)  # opens when one of them trains
    late = nursery.train(recipe, "--out", run, hook=hook)  # the run at work is told first, not how to go on with it
    os.close(writer)
    ended = [child.wait() for child in children]
    assert sorted(each.code for each in [*ended, late]) == [0, 2, 2, 2, 2]
    winner = next(child.pid for child, each in zip(children, ended, strict=True) if each.code == 0)
    assert f"another run is at work in it (host {socket.gethostname()}, process {winner}, since 2" in late.err
    assert "--out" in late.err
    assert weights(run) == weights(straight)
    assert (run / "metrics.jsonl").read_bytes() == (straight / "metrics.jsonl").read_bytes()
    assert {file.name for file in run.iterdir()} == {file.name for file in straight.iterdir()}


def test_a_killed_run_blocks_nobody(nursery: Nursery, tiny_base: Path, tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path, tiny_base, alpaca_rows(8), train__max_steps=2)
    for place in ("finetune.artifact write_json 1", "finetune.artifact write_json 2", "torch.optim AdamW.step 2"):
        run = tmp_path / place.replace(" ", "-")
        assert nursery.train(recipe, "--out", run, hook=kill_at(place, signal.SIGKILL)).code == -signal.SIGKILL
        assert json.loads((run / ".running").read_text())["host"] == socket.gethostname()
        ended = nursery.train(recipe, "--out", run, "--resume")
        assert ended.code == 0, ended.err


def test_a_folder_that_was_only_opened_is_free(nursery: Nursery, tiny_base: Path, tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path, tiny_base, alpaca_rows(8), train__max_steps=1)
    run = tmp_path / "run"
    run.mkdir()
    (run / ".running").touch()
    (run / "exit.json").write_text('{"0": 143, "1": 143}')
    ended = nursery.train(recipe, "--out", run, "--resume")
    assert ended.code == 0, ended.err


def test_a_folder_of_somebody_else_is_left_as_it_is(nursery: Nursery, tiny_base: Path, tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path, tiny_base, alpaca_rows(8), train__max_steps=1)
    theirs = tmp_path / "theirs"
    theirs.mkdir()
    (theirs / "recipe.yaml").write_text("mine")
    ended = nursery.train(recipe, "--out", theirs)
    assert ended.code == 2
    assert "holds no run" in ended.err
    assert [(file.name, file.read_text()) for file in theirs.iterdir()] == [("recipe.yaml", "mine")]


def test_the_second_holder_is_refused_and_the_third_comes_in(tmp_path: Path) -> None:
    with only_run_in(tmp_path / "run"):
        with pytest.raises(UserError, match=f"process {os.getpid()}"), only_run_in(tmp_path / "run"):
            pass
        assert json.loads((tmp_path / "run" / ".running").read_text())["pid"] == os.getpid()
    with only_run_in(tmp_path / "run"):
        pass


@pytest.fixture
def no_locks(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(descriptor: int, operation: int) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", refuse)


def test_without_locks_a_file_that_only_one_can_create(no_locks: None, tmp_path: Path) -> None:
    run = tmp_path / "run"
    with only_run_in(run):
        assert (run / run_lock.EXCLUSIVE).exists()
        with pytest.raises(UserError, match=r"if it has ended, remove .*\.running\.exclusive"), only_run_in(run):
            pass
    assert not (run / run_lock.EXCLUSIVE).exists()
    child = os.fork()
    if child == 0:
        os._exit(0)
    os.waitpid(child, 0)
    for host, refused in ((socket.gethostname(), False), ("elsewhere", True)):
        (run / run_lock.EXCLUSIVE).write_text(json.dumps({"host": host, "pid": child, "since": "long ago"}))
        expected = pytest.raises(UserError, match="host elsewhere") if refused else nullcontext()
        with expected, only_run_in(run):
            assert not refused


def test_another_failure_of_the_lock_is_not_hidden(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(descriptor: int, operation: int) -> None:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(fcntl, "flock", fail)
    with pytest.raises(StorageError, match="Input/output error"), only_run_in(tmp_path / "run"):
        pass
