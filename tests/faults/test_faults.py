"""A share of every fault harness in benchmarks/faults against the real command; more of each in `make soak`.

The oracle is the same run, undisturbed: every bit of every loss and of the adapter.
"""

from __future__ import annotations

import errno
import importlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from benchmarks.faults.hooks import NAME, hook
from benchmarks.faults.stage import Stage, compile_storage_faults, difference, stage_in

# The harness, and how much of it; `make soak` does more.
SHARES = {
    "kills": (3, {"quantizations": ("none",), "ranks": (1,)}),
    "crash_points": (5, {"every": 9}),
    "storage": (9, {}),
    "retention": (60, {}),
    "signals": (3, {"two": 0}),
    "numerics": (4, {"dtypes": ("float32",)}),
    "double_starts": (2, {}),
}
SOAK = {
    "kills": (20, {}),
    "crash_points": (1000, {"every": 3}),
    "storage": (60, {}),
    "retention": (400, {}),
    "signals": (26, {}),
    "numerics": (16, {}),
    "double_starts": (12, {}),
    "recipe_keys": (1000, {}),
}


@pytest.fixture(scope="module")
def stage(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stage]:
    if compile_storage_faults(tmp_path_factory.mktemp("compiled")) is None:
        pytest.skip(
            "file-system calls are made to fail by a library that a C compiler makes; there is none (Linux only)"
        )
    with stage_in(tmp_path_factory.mktemp("stage")) as ready:
        yield ready


def report_of(stage: Stage, name: str, share: tuple[int, dict[str, Any]]) -> dict[str, Any]:
    count, more = share
    return importlib.import_module(f"benchmarks.faults.{name}").run(stage, count, 3, **more)


@pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork:DeprecationWarning")
@pytest.mark.parametrize("name", SHARES)
def test_every_run_ends_as_promised(stage: Stage, name: str) -> None:
    found = report_of(stage, name, SHARES[name])
    assert found["failed"] == []
    assert found["as_promised"] == found["rounds"] > 0


@pytest.mark.soak
@pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork:DeprecationWarning")
@pytest.mark.parametrize("name", SOAK)
def test_more_runs_end_as_promised(stage: Stage, name: str) -> None:
    assert report_of(stage, name, SOAK[name])["failed"] == []


@pytest.mark.soak
def test_sealing_costs_at_most_a_fiftieth(stage: Stage) -> None:
    from benchmarks.faults import sealing

    assert sealing.run(stage, 5, 0)["overhead"]["processor"] < sealing.LIMIT


def test_the_harness_does_break_what_it_says(stage: Stage, tmp_path: Path) -> None:
    """A check that cannot fail is none: a full disk ends a save, and another run is seen to be another."""
    case = stage.case()
    run = stage.new_folder("broken")
    ended = stage.train(case, run, hook=hook("break_storage", "saving", 1, 1, errno.ENOSPC, NAME))
    assert [each.code for each in ended] == [3]
    assert "No space left on device" in ended[0].err
    other = stage.train(case, stage.new_folder("other"), "--set", "seed=4")
    assert [each.code for each in other] == [0]
    assert difference(stage.folder / "runs" / "other", case.straight) == "another loss"
