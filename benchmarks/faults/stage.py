"""What every harness stands on: tiny runs, forked from one process, and a comparison with the undisturbed ones."""

from __future__ import annotations

import importlib.metadata
import json
import math
import os
import platform
import select
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.faults.hooks import hook
from tests.conftest import CHECKOUT, alpaca_rows, make_tiny_base, write_recipe
from tests.train.forked import Child, Ended, Nursery, nursery_in

HANG_SECONDS = 60.0
HUNG = 999  # the exit code of a process that had to be ended
JOIN_SECONDS = 45.0  # of ranks that wait for one that was killed before they met
WEIGHTS = "adapter_model.safetensors"
OPTIONS: dict[str, Any] = {
    "data__eval": 3,
    "evaluate__every_steps": 2,
    "output__save_every_steps": 2,
    "output__keep_checkpoints": 2,
    "train__max_steps": 8,
    "train__batch_size": 2,
}
QUANTIZATIONS = ("none", "nf4")
Outcome = tuple[str, bool]  # what happened, in the words of the report; whether that is what is promised


@dataclass(frozen=True)
class Case:
    """A recipe, the number of ranks that train it, and the run that nothing disturbed."""

    recipe: Path
    ranks: int
    straight: Path
    seconds: float


@dataclass
class Stage:
    """A folder, a process to fork runs from, and the cases that have been made."""

    folder: Path
    nursery: Nursery
    cases: dict[tuple[Any, ...], Case] = field(default_factory=dict)
    ends: float = math.inf  # by time.monotonic(); no further round is begun then

    @property
    def is_over(self) -> bool:
        return time.monotonic() > self.ends

    @property
    def base(self) -> Path:
        base = self.folder / "base"
        return base if base.exists() else make_tiny_base(base, dtype="float32")

    def case(self, quantization: str = "none", *, ranks: int = 1, dropout: float = 0.1, **more: Any) -> Case:
        """The case of these settings; the first time it is trained."""
        key = (quantization, ranks, dropout, *sorted(more.items()))
        if key not in self.cases:
            folder = self.folder / f"case-{len(self.cases)}"
            settings = {**OPTIONS, "model__quantization": quantization, "adapter__dropout": dropout, **more}
            recipe = write_recipe(folder, self.base, alpaca_rows(14), **settings)
            straight = folder / "straight"
            for _ in range(2):  # the second time nothing is new to the process or the caches
                shutil.rmtree(straight, ignore_errors=True)
                started = time.monotonic()
                ended = wait(self.start(Case(recipe, ranks, straight, 0.0), straight))
                assert {each.code for each in ended} == {0}, ended
            self.cases[key] = Case(recipe, ranks, straight, time.monotonic() - started)
        return self.cases[key]

    def start(
        self, case: Case, out: Path | str, *more: object, hooks: Mapping[int, str] | None = None, resume: bool = False
    ) -> list[Child]:
        """`finetune train` of a case in a folder, one process a rank; `hooks` (Python) by rank."""
        arguments = [case.recipe, "--out", out, *(["--resume"] if resume else []), *more]
        hooks = hooks or {}
        if case.ranks == 1:
            return [self.nursery.start(*arguments, hook=hooks.get(0, ""))]
        port, count = free_port(), str(case.ranks)
        return [
            self.nursery.start(
                *arguments,
                hook=hook("meet_within", JOIN_SECONDS) + hooks.get(rank, ""),
                environment={
                    "RANK": str(rank),
                    "LOCAL_RANK": str(rank),
                    "WORLD_SIZE": count,
                    "LOCAL_WORLD_SIZE": count,
                    "MASTER_ADDR": "127.0.0.1",
                    "MASTER_PORT": str(port),
                },
            )  # fmt: skip
            for rank in range(case.ranks)
        ]

    def train(self, case: Case, out: Path, *more: object, hook: str = "", resume: bool = False) -> list[Ended]:
        """A run to its end; the hook is the first rank's."""
        return wait(self.start(case, out, *more, hooks={0: hook}, resume=resume))

    def new_folder(self, name: str) -> Path:
        """A path below the stage where nothing is."""
        path = self.folder / "runs" / name
        shutil.rmtree(path, ignore_errors=True)
        path.parent.mkdir(exist_ok=True)
        return path

    def resumed(self, case: Case, run: Path) -> Outcome:
        """What `--resume` makes of it: the undisturbed run to the bit, or what went wrong."""
        ended = self.train(case, run, resume=True)
        codes = [each.code for each in ended]
        if set(codes) != {0}:
            return f"lost: --resume exits {codes}: {last_line(ended)}", False
        found = difference(run, case.straight)
        return (f"lost: {found}", False) if found else ("resumed, same bits", True)


@contextmanager
def stage_in(folder: Path) -> Iterator[Stage]:
    """A stage in a new folder below, removed at the end; its runs can be told to fail by benchmarks/faults/hooks.py."""
    place = folder / "faults"
    shutil.rmtree(place, ignore_errors=True)
    place.mkdir(parents=True)
    before = os.environ.get("LD_PRELOAD")
    library = compile_storage_faults(place)
    if library:
        os.environ["LD_PRELOAD"] = str(library)
    try:
        with nursery_in(place) as nursery:
            if before is None:
                os.environ.pop("LD_PRELOAD", None)
            yield Stage(place, nursery)
    finally:
        os.environ.pop("LD_PRELOAD", None)
        shutil.rmtree(place, ignore_errors=True)


def compile_storage_faults(folder: Path) -> Path | None:
    """The library that lets file-system calls fail; None without a C compiler."""
    compiler = shutil.which("cc") or shutil.which("gcc")
    if compiler is None or sys.platform != "linux":
        return None
    library = folder / "storage.so"
    source = CHECKOUT / "benchmarks" / "faults" / "storage.c"
    subprocess.run([compiler, "-shared", "-fPIC", "-O2", "-o", library, source, "-ldl"], check=True)
    return library


def wait(children: Sequence[Child], seconds: float = HANG_SECONDS) -> list[Ended]:
    """How each ended; one that takes longer than that is killed and has the code HUNG."""
    end = time.monotonic() + seconds
    found = []
    for child in children:
        handle = os.pidfd_open(child.pid)
        ready, _, _ = select.select([handle], [], [], max(0.0, end - time.monotonic()))
        if not ready:
            signal.pidfd_send_signal(handle, signal.SIGKILL)
        os.close(handle)
        ended = child.wait()
        found.append(ended if ready else Ended(HUNG, ended.out, ended.err))
    return found


def difference(run: Path, straight: Path) -> str | None:
    """What of a finished run is not, to the bit, that of another; None if nothing is."""
    if not (run / "result.json").is_file():
        return "no result.json"
    mine, theirs = ((each / "metrics.jsonl").read_text() for each in (run, straight))
    if hex_losses(mine) != hex_losses(theirs):
        return "another loss"
    if mine != theirs:
        return "other metrics"
    if (run / "adapter" / WEIGHTS).read_bytes() != (straight / "adapter" / WEIGHTS).read_bytes():
        return "another adapter"
    return None


def hex_losses(metrics: str) -> list[tuple[int, str]]:
    """Step and loss, every bit of it, of each line that has one."""
    entries = [json.loads(line) for line in metrics.splitlines()]
    return [(entry["step"], float(entry["loss"]).hex()) for entry in entries if "loss" in entry]


def last_line(ended: Sequence[Ended]) -> str:
    """The last that any of them said."""
    said = [each.err.strip().splitlines()[-1] for each in ended if each.err.strip()]
    return said[-1][:300] if said else ""


def has_traceback(ended: Sequence[Ended]) -> bool:
    return any("Traceback" in each.err for each in ended)


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def report(name: str, rounds: Sequence[dict[str, Any]], *, seed: int, seconds: float, **more: Any) -> dict[str, Any]:
    """The counts of outcomes, whole and by class, and every round that did not go as promised.

    A round has `class`, `outcome` and `ok`, and what it takes to repeat it.
    """
    by_class: dict[str, Counter[str]] = {}
    for each in rounds:
        by_class.setdefault(each["class"], Counter())[short(each["outcome"])] += 1
    return {
        "harness": name,
        "rounds": len(rounds),
        "as_promised": sum(each["ok"] for each in rounds),
        "failed": [each for each in rounds if not each["ok"]],
        "outcomes": dict(Counter(short(each["outcome"]) for each in rounds)),
        "by_class": {key: dict(counts) for key, counts in sorted(by_class.items())},
        **more,
        "seed": seed,
        "seconds": round(seconds, 1),
        **versions(),
        "each": rounds,
    }


def short(outcome: str) -> str:
    """An outcome without what is special in it."""
    return outcome.split(":")[0]


def versions() -> dict[str, Any]:
    """What was tested, and on what."""
    names = ("torch", "transformers", "trl", "peft", "bitsandbytes", "accelerate", "safetensors")
    return {
        "versions": {name: importlib.metadata.version(name) for name in names},
        "python": platform.python_version(),
        "cores": len(os.sched_getaffinity(0)),
        "date": time.strftime("%Y-%m-%d"),
    }


def tell(number: int, count: int, found: Mapping[str, Any]) -> None:
    """A line on stderr for each round."""
    mark = "" if found["ok"] else "  <<<<<<"
    sys.stderr.write(f"{number + 1}/{count} {found['class']}: {found['outcome']}{mark}\n")


Harness = Callable[[Stage, int, int], dict[str, Any]]
