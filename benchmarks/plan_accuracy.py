"""How far a plan is from its run: bases of several sizes trained for a few steps, prediction beside measurement.

    python benchmarks/plan_accuracy.py SHARED_DATA WORK_FOLDER [NAME...]

Memory is the run's own `peak_memory_gib`. Time is what the processor worked on the further steps of a longer run,
shared among its cores, so that other programs change it little. Calibrate first: finetune doctor --calibrate.
"""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
COMMAND = [sys.executable, str(ROOT / "cli.py")]


@dataclass(frozen=True)
class Cell:
    """One run: a shape (hidden, inner, layers, heads) or the name of a base, and how its passes are laid out."""

    base: tuple[int, int, int, int] | str
    quantization: str = "nf4"
    tokens_per_pass: int = 2048
    recompute: str = "none"
    batch_size: int = 16
    steps: tuple[int, int] = (3, 8)  # of the shorter run and of the longer


SMALL, LARGE = (288, 768, 6, 6), (768, 2048, 12, 12)
CELLS = {
    "pocket-llama": Cell("builtin:pocket-llama", steps=(5, 40)),
    "24M 4096": Cell(SMALL, tokens_per_pass=4096, batch_size=32),
    "160M 1024": Cell(LARGE, tokens_per_pass=1024),
    "160M 4096": Cell(LARGE, tokens_per_pass=4096, batch_size=32, steps=(2, 4)),
    "160M 4096 recomputed": Cell(LARGE, tokens_per_pass=4096, batch_size=32, recompute="all", steps=(2, 4)),
    "160M 4096 16-bit": Cell(LARGE, quantization="none", tokens_per_pass=4096, batch_size=32, steps=(2, 4)),
}


def main() -> None:
    """Print one line a cell."""
    shared, work, names = Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3:] or list(CELLS)
    for name in names:
        cell = CELLS[name]
        base = cell.base if isinstance(cell.base, str) else str(make_base(work, cell.base, shared))
        runs = [
            measure(write_recipe(work / f"{name}-{steps}".replace(" ", "-"), base, cell, steps, shared))
            for steps in cell.steps
        ]
        (_, short), (plan, long) = runs
        seconds = (long["cpu"] - short["cpu"]) / (cell.steps[1] - cell.steps[0]) / len(os.sched_getaffinity(0))
        told = f"{name:22} GiB planned {plan['peak_memory_gib']:.2f}, measured {long['peak_memory_gib']:.2f}"
        if plan["seconds_per_step"]:
            told += f"; seconds a step planned {plan['seconds_per_step']:.2f}, measured {seconds:.2f}"
        sys.stdout.write(told + "\n")
        sys.stdout.flush()


def make_base(work: Path, sizes: tuple[int, int, int, int], shared: Path) -> Path:
    """A LLaMA with random weights, Llama 2's tokenizer and 32,000 words, made once."""
    from benchmarks.speed.subjects import Shape
    from benchmarks.speed.subjects import make_base as make

    folder = work / f"base-{sizes[0]}"
    hidden, inner, layers, heads = sizes
    shape = Shape(hidden, inner, layers, heads, heads)
    folder.mkdir(parents=True, exist_ok=True)
    return folder if (folder / "config.json").exists() else make(folder, shape, shared / "tokenizers" / "llama2")


def write_recipe(folder: Path, base: str, cell: Cell, steps: int, shared: Path) -> Path:
    """On the first 160 rows of the Alpaca demo; a run folder from before is in the way, so the folder must be new."""
    folder.mkdir(parents=True)
    rows = json.loads((shared / "alpaca" / "alpaca_en_demo.json").read_text(encoding="utf-8"))[:160]
    (folder / "rows.json").write_text(json.dumps(rows), encoding="utf-8")
    train: dict[str, Any] = {"batch_size": cell.batch_size, "max_steps": steps, "tokens_per_pass": cell.tokens_per_pass}
    data = {"train": str(folder / "rows.json"), "template": "alpaca", "max_tokens": 1024, "too_long": "drop"}
    recipe = {
        "version": 1,
        "name": "plan-accuracy",
        "model": {"base": base, "quantization": cell.quantization},
        "data": data,
        "train": {**train, "recompute": cell.recompute},
        "output": {"folder": str(folder / "run")},
    }
    path = folder / "recipe.json"
    path.write_text(json.dumps(recipe), encoding="utf-8")
    return path


def measure(recipe: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """The plan, and the run's own answer with the seconds that the processor worked (`cpu`)."""
    plan = _answer("plan", str(recipe))
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    result = _answer("train", str(recipe))
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return plan, {**result, "cpu": after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime}


def _answer(*arguments: str) -> dict[str, Any]:
    done = subprocess.run([*COMMAND, *arguments, "--json"], capture_output=True, text=True, check=True)
    answer: dict[str, Any] = json.loads(done.stdout)
    return answer


if __name__ == "__main__":
    main()
