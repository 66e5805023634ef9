"""A rank that dies, hangs or never comes: the others end with exit code 7 and say where the run goes on."""

from __future__ import annotations

import errno
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from finetune.artifact import RunFolder
from finetune.errors import Interrupted, StorageError, UserError, WorkerError
from finetune.stop import Stopped, StopSignal, stop_on_signals
from finetune.train.checkpoints import find_checkpoints, find_damage
from finetune.train.ranks import is_lost_connection, joined_ranks, note_exit
from finetune.train.silence import GIVEN_UP, SignsOfLife
from tests.conftest import alpaca_rows, write_recipe
from tests.train.forked import Child, Ended, Nursery
from tests.train.test_signals import each_phase, kill_at

OPTIONS = {"data__eval": 3, "evaluate__every_steps": 2, "output__save_every_steps": 2, "train__max_steps": 5}
JOIN_SOON = "import finetune.train.ranks as ranks\nranks.JOIN_SECONDS = 1.5\n"
# From the second step on, for a busy machine can be silent while it loads; one more is tried before the first.
SILENT_SOON = """
import finetune.train.silence as silence, torch
silence.BEAT_SECONDS = 0.1
before_silence, steps = torch.optim.AdamW.step, []
def soon(*args, **kwargs):
    steps.append(1)
    if len(steps) == 3:
        silence.SILENCE_SECONDS = 1.5
    return before_silence(*args, **kwargs)
torch.optim.AdamW.step = soon
"""


@pytest.fixture(scope="module")
def recipe(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_recipe(tmp_path_factory.mktemp("lost"), tiny_base, alpaca_rows(14), **OPTIONS)


@contextmanager
def two_ranks(nursery: Nursery, recipe: Path, run: Path, *hooks: str) -> Iterator[list[Child]]:
    """Both are killed at the end, whatever became of them; and after two minutes, for what is tested here is a hang."""
    children = nursery.start_ranks(2, recipe, "--out", run, hooks=dict(enumerate(hooks)))

    def kill() -> None:
        for child in children:
            child.kill()

    too_late = threading.Timer(120, kill)
    too_late.start()
    try:
        yield children
    finally:
        too_late.cancel()
        kill()


def both(nursery: Nursery, recipe: Path, run: Path, *hooks: str) -> list[Ended]:
    with two_ranks(nursery, recipe, run, *hooks) as children:
        ended = [child.wait() for child in children]
    assert not [each.err for each in ended if "Traceback" in each.err]
    return ended


def codes_noted(run: Path) -> dict[str, int | None]:
    """None of a rank that has noted nothing: it lives, or was killed."""
    return json.loads((run / "exit.json").read_text())


# In a group of its own: the kernel continues, and hangs up, a group whose last other member ends while one is stopped.
STOP_IN_STEP_3 = f"{SILENT_SOON}import os\nos.setpgrp()\n" + kill_at("torch.optim AdamW.step 4", signal.SIGSTOP)


def test_a_rank_that_hangs_ends_the_other_with_its_stack(nursery: Nursery, recipe: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    with two_ranks(nursery, recipe, run, SILENT_SOON, STOP_IN_STEP_3) as (first, _):
        ended = first.wait()
    assert ended.code == 7, ended.err
    assert codes_noted(run) == {"0": 7, "1": None}
    told = ended.err.splitlines()
    assert "rank 0: rank 1 has given no sign of life for 1.5 seconds; where this rank stands:" in told
    assert f"goes on from {run}/checkpoints/step-000002" in told[-1]
    assert any("ranks.py" in line and line.endswith(" in largest") for line in told)  # where its main thread waits
    assert [find_damage(path) for path in find_checkpoints(run / "checkpoints")] == [None]
    assert [each.code for each in both(nursery, recipe, run, "", "")] == [2, 2]  # not without --resume
    resumed = nursery.train_ranks(2, recipe, "--out", run, "--resume")
    assert [each.code for each in resumed] == [0, 0]


@pytest.mark.soak
def test_the_rank_that_keeps_the_store_hangs(nursery: Nursery, recipe: Path, tmp_path: Path) -> None:
    """Nothing is heard any more then, not even that nothing is."""
    with two_ranks(nursery, recipe, tmp_path / "run", STOP_IN_STEP_3, SILENT_SOON) as (_, second):
        ended = second.wait()
    assert ended.code == 7, ended.err
    assert "rank 0 has given no sign of life" in ended.err
    assert codes_noted(tmp_path / "run") == {"0": None, "1": 7}


STUCK_IN_STEP_3 = """
import os, torch
step, calls = torch.optim.AdamW.step, []
def stuck_here(*args, **kwargs):
    calls.append(1)
    if len(calls) == 4:
        ends = os.pipe()
        os.read(ends[0], 1)
    return step(*args, **kwargs)
torch.optim.AdamW.step = stuck_here
"""


@pytest.mark.parametrize("stuck", [pytest.param(0, marks=pytest.mark.soak), 1])
def test_a_rank_that_lives_and_is_stuck_ends_both(nursery: Nursery, recipe: Path, tmp_path: Path, stuck: int) -> None:
    hooks = [SILENT_SOON, SILENT_SOON]
    hooks[stuck] += STUCK_IN_STEP_3
    ended = both(nursery, recipe, tmp_path / "run", *hooks)
    assert [each.code for each in ended] == [7, 7]
    assert codes_noted(tmp_path / "run") == {"0": 7, "1": 7}
    assert "another rank has not come for " in ended[1 - stuck].err
    assert "in stuck_here" in ended[stuck].err  # its own stack says where
    if stuck == 0:  # else the store may go before it has heard
        assert "rank 1 has waited in vain for another" in ended[0].err
    assert all("step-000002" in each.err.splitlines()[-1] for each in ended)


SLOW_SAVE = """
import finetune.train.trainer as trainer, time
write, saves = trainer.write_checkpoint, []
def slowly(*args, **kwargs):
    saves.append(1)
    if len(saves) == 2:
        time.sleep(4)
    return write(*args, **kwargs)
trainer.write_checkpoint = slowly
"""


def test_work_of_one_alone_may_last_longer_than_silence(nursery: Nursery, recipe: Path, tmp_path: Path) -> None:
    """A rank that lives is waited for while it saves, as while it reads rows."""
    soon = SILENT_SOON.replace("1.5", "2.5")
    assert [each.code for each in both(nursery, recipe, tmp_path / "run", soon + SLOW_SAVE, soon)] == [0, 0]


# Where a rank dies, with what the other is waiting in: our own meeting, and one of the Trainer's.
DEATHS = {
    "tokenising": (0, "finetune.run resolve 1", signal.SIGTERM),
    "the Trainer's own meeting": (1, "transformers.trainer nested_gather 3", signal.SIGKILL),
    "publishing": (0, "finetune.artifact RunFolder.write_adapter 1", signal.SIGINT),
    "loading": (1, "finetune.model.load load_base 1", signal.SIGTERM),
}


@each_phase(DEATHS, "tokenising", "the Trainer's own meeting")
def test_whoever_waits_for_a_dead_rank_ends_with_7(nursery: Nursery, recipe: Path, tmp_path: Path, phase: str) -> None:
    dead, place, number = DEATHS[phase]
    hooks = ["", ""]
    hooks[dead] = kill_at(place, number)
    ended = both(nursery, recipe, tmp_path / "run", *hooks)
    assert ended[dead].code == (-number if number == signal.SIGKILL else 128 + number)
    assert ended[1 - dead].code == 7
    assert "another rank is gone" in ended[1 - dead].err.splitlines()[-1]
    if phase != "tokenising":  # the folder is not known yet
        noted = {str(rank): each.code if each.code >= 0 else None for rank, each in enumerate(ended)}
        assert codes_noted(tmp_path / "run") == noted


def test_a_second_signal_is_noted_too(nursery: Nursery, recipe: Path, tmp_path: Path) -> None:
    hook = "import finetune.stop\nfinetune.stop.ECHO_SECONDS = -1\n"
    hook += kill_at("torch.optim AdamW.step 4", signal.SIGTERM)
    hook += kill_at("finetune.train.trainer save_state 3", signal.SIGTERM)
    ended = both(nursery, recipe, tmp_path / "run", hook, "")
    assert [each.code for each in ended] == [143, 7]
    assert codes_noted(tmp_path / "run") == {"0": 143, "1": 7}


@pytest.mark.parametrize(
    ("what", "gone", "expected"),
    [
        ("it dies", "import os\nos._exit(9)", "have not found each other within 1.5 seconds"),
        pytest.param("it gets a signal", "import os\nos.kill(os.getpid(), 15)", "", marks=pytest.mark.soak),
    ],
)
def test_a_rank_is_gone_before_all_are_connected(
    nursery: Nursery, recipe: Path, tmp_path: Path, what: str, gone: str, expected: str
) -> None:
    """After it has found the others and before they have found it."""
    gone = gone.replace("\n", "\n    ")
    leave = f"import torch.distributed\ndef leave(*a, **k):\n    {gone}\ntorch.distributed.init_process_group = leave\n"
    ended = both(nursery, recipe, tmp_path / "run", JOIN_SOON, leave)
    assert [each.code for each in ended] == [7, 9 if what == "it dies" else 143]
    assert expected in ended[0].err
    assert ended[0].err.endswith("start all ranks again with --resume\n")


@pytest.mark.parametrize("rank", ["0", "1"])  # the one that keeps the store, and one that looks for it
def test_a_rank_that_never_comes_is_not_waited_for(rank: str) -> None:
    """In an interpreter of its own, which must not stumble over the thread that still waits in torch."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environment = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1"}
    command = f"{JOIN_SOON}import sys\nfrom finetune.cli import main\nsys.argv = ['', 'train', 'x', '--json']\nmain()"
    ended = subprocess.run(
        [sys.executable, "-c", command], env={**os.environ, **environment, "MASTER_PORT": str(port)}, timeout=100,
        check=False, capture_output=True, text=True,
    )  # fmt: skip
    assert ended.returncode == 7, ended.stderr
    assert ended.stderr.endswith("have not found each other within 1.5 seconds; start all ranks again with --resume\n")
    assert json.loads(ended.stdout)["error"]["code"] == 7
    assert "frame #" not in ended.stderr, "the libraries' own stacks, a page each time they try again"


def test_a_port_that_is_taken_is_the_users(nursery: Nursery, recipe: Path, tmp_path: Path) -> None:
    environment = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1"}
    with socket.socket(socket.AF_INET6) as taken:
        taken.bind(("::", 0))
        taken.listen()
        environment["MASTER_PORT"] = str(taken.getsockname()[1])
        ended = nursery.start(recipe, "--out", tmp_path / "run", environment=environment).wait()
    assert ended.code == 2, ended.err
    assert len(ended.err.splitlines()) == 1, "and none of the libraries'"
    assert "cannot be connected" in ended.err
    assert "Traceback" not in ended.err


def test_more_ranks_than_gpus_is_the_users(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with (
        pytest.raises(UserError, match="1 GPUs are here, and every rank needs one"),
        joined_ranks(1, 1, 2, stop=StopSignal()),
    ):
        pass


def test_a_lock_file_that_cannot_be_written_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(file: Path, value: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    (tmp_path / "lock.json").write_text("{}")
    monkeypatch.setattr("finetune.artifact.write_json", full)
    with pytest.raises(StorageError, match="No space left on device"):
        RunFolder(tmp_path).keep_ranks(2, allow_other=False)


def test_a_partner_that_goes_while_connecting_is_not_the_users(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    def refused(*_: object, **__: object) -> None:
        words = "[/pytorch/third_party/gloo/gloo/transport/tcp/pair.cc:152] timed out connecting: Connection refused"
        raise RuntimeError(f"Gloo connectFullMesh failed with {words}")

    monkeypatch.setattr(torch.distributed, "rendezvous", lambda *_, **__: iter([({}, 0, 2)]))
    monkeypatch.setattr(torch.distributed, "init_process_group", refused)
    told = pytest.raises(WorkerError, match="of 2 ranks another is gone before all were connected .*Connection refused")
    with told, joined_ranks(0, 0, 2, stop=StopSignal()):
        pass


def test_a_stop_is_not_lost_in_a_callback_of_the_interpreter(capfd: pytest.CaptureFixture[str]) -> None:
    class Last:
        def __del__(self) -> None:  # which cannot raise
            os.kill(os.getpid(), signal.SIGTERM)
            places.append(sum(range(10)))

    def work() -> None:
        last = Last()
        del last
        until = time.monotonic() + 30
        while time.monotonic() < until:
            sum(range(10))
        places.append("the end of the work")

    places: list[object] = []
    hook = sys.unraisablehook
    with pytest.raises(Interrupted) as caught, stop_on_signals():
        work()
    assert caught.value.code == 143
    assert places == []
    assert "Stopped" not in capfd.readouterr().err
    assert sys.unraisablehook is hook


def test_what_became_of_a_stop_is_still_a_stop() -> None:
    """A library that was broken off may raise something of its own; before a signal an error stays what it is."""

    def broken_off() -> None:
        try:
            os.kill(os.getpid(), signal.SIGTERM)
        except Stopped:
            raise RuntimeError("generator didn't stop after throw()") from None

    with pytest.raises(Interrupted) as caught, stop_on_signals() as stop:
        broken_off()
    assert caught.value.code == stop.code_of(RuntimeError()) == 143
    with pytest.raises(RuntimeError, match="a bug"), stop_on_signals() as stop:
        raise RuntimeError("a bug")
    assert [stop.code_of(error) for error in (None, RuntimeError(), UserError(()))] == [0, 1, 2]
    stop = StopSignal()
    stop.at_once = False
    stop.receive(signal.SIGINT, None)
    assert [stop.code_of(error) for error in (RuntimeError(), Stopped())] == [1, 130]  # training goes to its boundary


def test_a_bug_is_no_lost_connection() -> None:
    words = "[/pytorch/third_party/gloo/gloo/transport/tcp/pair.cc:547] Connection closed by peer [127.0.0.1]:4"
    assert is_lost_connection(RuntimeError(words))
    assert is_lost_connection(type("DistNetworkError", (RuntimeError,), {})())
    assert not is_lost_connection(RuntimeError("The size of tensor a (3) must match the size of tensor b (4)"))


def test_a_code_is_noted_also_by_who_holds_the_lock(tmp_path: Path) -> None:
    """A second signal can come in the middle of noting the first."""
    import fcntl

    file = tmp_path / "exit.json"
    with file.open("w") as stream:
        fcntl.flock(stream, fcntl.LOCK_EX)
        note_exit(file, rank=1, code=143)
    assert json.loads(file.read_text()) == {"1": 143}


def test_a_given_up_wait_reaches_who_lives() -> None:
    """Without processes: a store as a dictionary, an end as a list."""

    class Store(dict):
        def set(self, key: str, value: str | bytes) -> None:
            self[key] = value if isinstance(value, bytes) else value.encode()

        def check(self, keys: list[str]) -> bool:
            return all(key in self for key in keys)

    store, ends = Store(), []
    signs = SignsOfLife(store, rank=0, count=2, end=ends.append)  # type: ignore[arg-type]
    signs._hear()
    store.set("alive/1", "1")
    signs._hear()
    assert not ends
    store.set("alive/1", GIVEN_UP)
    signs._hear()
    assert "rank 1 has waited in vain" in str(ends[0])
