"""NaN and infinity in a loss, a gradient or a weight, at any step: the run stops in that step, and saves none of it."""

from __future__ import annotations

import random
import shutil
import time
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from benchmarks.faults.hooks import hook
from benchmarks.faults.stage import Case, Stage, has_traceback, hex_losses, last_line, report, tell

WHAT = ("loss", "gradient", "weight", "updated")
VALUES = ("nan", "inf", "-inf")
STEPS = 8


def run(stage: Stage, count: int, seed: int, *, dtypes: tuple[str, ...] = ("float32", "bfloat16")) -> dict[str, Any]:
    """`count` numbers that are not finite; every third run is resumed without them."""
    chance, started, rounds = random.Random(seed), time.monotonic(), []
    for number in range(count):
        if stage.is_over:
            break
        what, dtype = WHAT[number % len(WHAT)], dtypes[number // 4 % len(dtypes)]
        case = stage.case(model__dtype=dtype, output__save_every_steps=1)
        step = chance.choice([1, STEPS, chance.randint(1, STEPS)])
        value = chance.choice(VALUES)
        outcome, ok = stop(stage, case, (what, step, value), resume=number % 3 == 0)
        rounds.append({"class": f"{what}, {dtype}", "step": step, "value": value, "outcome": outcome, "ok": ok})
        tell(number, count, rounds[-1])
    return report("numerics", rounds, seed=seed, seconds=time.monotonic() - started)


def stop(stage: Stage, case: Case, spoilt: tuple[str, int, str], *, resume: bool) -> tuple[str, bool]:
    """How a run ended, and whether all that it has written is finite and from before."""
    folder = stage.new_folder("numerics")
    what, step, _ = spoilt
    ended = stage.train(case, folder, hook=hook("spoil", *spoilt))
    if ended[0].code != 4 or has_traceback(ended):
        return f"exits {ended[0].code}: {last_line(ended)}", False
    metrics = folder / "metrics.jsonl"  # not there yet where the first step was only tried
    last_step = max((found for found, _ in hex_losses(metrics.read_text() if metrics.exists() else "")), default=0)
    # A weight that the update has spoilt is seen when it is saved, after its step was logged.
    if last_step != (step if what == "updated" else step - 1):
        return f"late: the last step in metrics.jsonl is {last_step}", False
    if not all(is_finite(file) for file in folder.rglob("*.safetensors")):
        return "not finite: a file of the run", False
    if not resume:
        return "exit 4 in that step", True
    if not (folder / "checkpoints").exists():
        shutil.rmtree(folder)
    outcome, ok = stage.resumed(case, folder)
    return f"exit 4 in that step, then {outcome}", ok


def is_finite(file: Path) -> bool:
    return all(bool(torch.isfinite(tensor).all()) for tensor in load_file(file).values() if tensor.is_floating_point())
