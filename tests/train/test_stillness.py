"""A run of one process that does nothing any more ends with exit code 7 and its stacks; a slow one goes on."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from finetune.errors import WorkerError
from finetune.machine import Work, work_done
from finetune.train.checkpoints import find_checkpoints, find_damage
from finetune.train.stillness import IDLE_SECONDS, LEAST_STEP_SECONDS, TIMES, Stillness
from tests.conftest import alpaca_rows, write_recipe
from tests.train.forked import Ended, Nursery

OPTIONS = {"data__eval": 3, "evaluate__every_steps": 2, "output__save_every_steps": 2, "train__max_steps": 5}
# Looks often, and waits a second and a half, not ten minutes; blocks for ever where a function is called the nth time.
STUCK = """
import importlib, os
import finetune.train.stillness as stillness
from finetune.machine import Work
stillness.LOOK_SECONDS, stillness.IDLE_SECONDS = 0.1, 1.5
stillness.LEAST = Work(0.5, 2**20)
def block(module, name, call, hang):
    owner = importlib.import_module(module)
    *path, last = name.split(".")
    for part in path:
        owner = getattr(owner, part)
    original, calls = getattr(owner, last), []
    def stuck_here(*args, **kwargs):
        calls.append(1)
        if len(calls) == call:
            hang()
        return original(*args, **kwargs)
    setattr(owner, last, stuck_here)
def for_ever():
    os.read(os.pipe()[0], 1)
"""


@pytest.fixture(scope="module")
def recipe(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_recipe(tmp_path_factory.mktemp("still"), tiny_base, alpaca_rows(14), **OPTIONS)


def train(nursery: Nursery, recipe: Path, run: Path, hook: str, *more: str) -> Ended:
    """To its end, at most two minutes: what is tested here is a hang."""
    child = nursery.start(recipe, "--out", run, *more, hook=hook)
    too_late = subprocess.Popen(["sh", "-c", f"sleep 120; kill -9 {child.pid}"])
    try:
        return child.wait()
    finally:
        too_late.kill()
        too_late.wait()


@pytest.mark.parametrize(
    ("place", "call"),
    [
        ("torch.optim AdamW.step", 4),
        pytest.param("finetune.train.trainer StepTrainer._mean_loss_held_out", 2, marks=pytest.mark.soak),
        pytest.param("finetune.train.checkpoints _seal", 2, marks=pytest.mark.soak),
        ("finetune.model.load load_base", 1),
        pytest.param("finetune.run resolve", 1, marks=pytest.mark.soak),
    ],
)
def test_where_nothing_is_done_any_more_the_run_ends(
    nursery: Nursery, recipe: Path, tmp_path: Path, place: str, call: int
) -> None:
    run = tmp_path / "run"
    module, name = place.split(" ")
    ended = train(nursery, recipe, run, f"{STUCK}\nblock({module!r}, {name!r}, {call}, for_ever)\n")
    assert ended.code == 7, ended.err
    assert "finetune: nothing was computed, read or written for " in ended.err
    assert "in for_ever" in ended.err  # where its main thread stands
    last = ended.err.splitlines()[-1]
    assert "--resume" in last
    assert "Traceback" not in ended.err
    if module != "finetune.run":  # else there is no folder yet
        assert "in for_ever" in (run / "stacks.txt").read_text()
    kept = find_checkpoints(run / "checkpoints")
    assert [find_damage(path) for path in kept] == [None for _ in kept]
    assert (f"which goes on from {run}/checkpoints/step-000002" in last) == bool(kept)
    assert bool(kept) == (module not in {"finetune.model.load", "finetune.run"})
    resumed = nursery.train(recipe, "--out", run, "--resume")
    assert resumed.code == 0, resumed.err


SLOW = {  # for three seconds, twice the time after which nothing must have been done
    "computes": "end = time.process_time() + 3\nwhile time.process_time() < end: pass",
    "reads": "for _ in range(30): open('/dev/zero', 'rb').read(2**20); time.sleep(0.1)",
    "a child computes": "import subprocess, sys; subprocess.run([sys.executable, '-c', "
    "'import time\\nwhile time.process_time() < 3: pass'], check=True)",
    "is stopped and continues": "time.sleep(0.5); import subprocess, signal; subprocess.Popen(['sh', '-c', "
    "f'sleep 3; kill -CONT {os.getpid()}']); os.kill(os.getpid(), signal.SIGSTOP)",
}


@pytest.mark.parametrize("how", [pytest.param(h, marks=() if "stopped" in h else pytest.mark.soak) for h in SLOW])
def test_a_slow_run_is_not_ended(nursery: Nursery, recipe: Path, tmp_path: Path, how: str) -> None:
    body = SLOW[how].replace("\n", "\n    ")
    hook = f"{STUCK}\nimport time\ndef slow():\n    {body}\nblock('finetune.model.load', 'load_base', 1, slow)\n"
    if how == "is stopped and continues":  # in a group of its own, see test_lost_ranks.py
        hook += "os.setpgrp()\n"
    ended = train(nursery, recipe, tmp_path / "run", hook)
    assert ended.code == 0, ended.err
    assert not (tmp_path / "run" / "stacks.txt").exists()


class Looks:
    """Looks one after the other, as the thread does them; each is five seconds after the one before."""

    def __init__(self) -> None:
        self.ends: list[WorkerError] = []
        self.stillness = Stillness(self.ends.append)
        self.work = Work(0.0, 0)

    def for_(self, seconds: float, *, cpu: float = 0.0, moved: float = 0.0, step_seconds: float = 0) -> str | None:
        """`cpu`, `moved`: a second's share; with `step_seconds` steps of that length, else none is at work."""
        in_this_step = 0.0
        for _ in range(round(seconds / 5)):
            self.work = Work(self.work.processor_seconds + 5 * cpu, round(self.work.moved_bytes + 5 * moved))
            in_this_step += 5
            ended = bool(step_seconds) and in_this_step >= step_seconds
            in_this_step = 0.0 if ended else in_this_step
            if what := self.stillness.look(5, self.work, moved_on=ended, in_step=bool(step_seconds)):
                return what
        return None


def test_only_doing_nothing_ends_a_run_outside_of_steps() -> None:
    assert Looks().for_(7 * 24 * 3600, cpu=0.01) is None  # of a week a hundredth of a core
    assert Looks().for_(7 * 24 * 3600, moved=50_000) is None  # a slow line
    assert Looks().for_(IDLE_SECONDS) is None
    what = Looks().for_(IDLE_SECONDS + 10)
    assert what is not None
    assert "for 600 seconds" in what
    assert Looks().for_(IDLE_SECONDS + 10, cpu=0.0002, moved=100) is not None  # what the looks take themselves


def test_a_step_that_computes_without_end_is_told_by_the_steps_before() -> None:
    looks = Looks()
    assert looks.for_(24 * 3600, cpu=1, step_seconds=25 * 3600) is None  # the first may last for ever
    looks = Looks()
    assert looks.for_(3600, cpu=1, step_seconds=100) is None
    assert looks.for_(TIMES * 100 - 50, cpu=1, step_seconds=10**9) is None
    what = looks.for_(100, cpu=1, step_seconds=10**9)
    assert what == "a step has lasted 1005 seconds, the longest before it 100"
    looks = Looks()
    assert looks.for_(600, cpu=1, step_seconds=5) is None
    assert looks.for_(LEAST_STEP_SECONDS - 10, cpu=1, step_seconds=10**9) is None  # ten times 5 seconds is little
    assert looks.for_(20, cpu=1, step_seconds=10**9) is not None
    looks = Looks()
    assert looks.for_(100, cpu=1, step_seconds=5) is None
    assert looks.for_(24 * 3600, cpu=1) is None  # a long evaluation is no step


def test_what_children_do_counts() -> None:
    before = work_done()
    if before is None:
        pytest.skip("only Linux tells what a process does")
    busy = "import time\nwhile time.process_time() < 0.3: pass\nprint(open('/dev/zero', 'rb').read(10**6)[:1])\ninput()"
    child = subprocess.Popen([sys.executable, "-c", busy], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert child.stdout is not None
    child.stdout.readline()
    after = work_done()
    child.communicate(b"\n")
    assert after is not None
    assert after.processor_seconds - before.processor_seconds > 0.25
    assert after.moved_bytes - before.moved_bytes > 10**6


def test_without_proc_nothing_is_known(tmp_path: Path) -> None:
    assert work_done(tmp_path) is None
    assert Stillness(lambda _: None).look(10**6, None, moved_on=False, in_step=False) is None
