"""What products in 8 bits (model.compute: int8) gain, and what they cost: beside exact ones, taking turns.

speed    tokens per second of two random LLaMAs in nf4, as benchmarks/training_speed.py measures them
curve    300 steps of a random 24M LLaMA from the same start: the mean loss of the last 50
tuned    the quickstart's recipe on the embedded base, which is trained, with three seeds: held-out loss and seconds

    python benchmarks/eight_bits.py --out benchmarks/results/eight_bits_speed.json

What is in the file already is not measured again.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.speed.facts import command_line, header, moment
from benchmarks.speed.ours import train_ours
from benchmarks.speed.outside import ROOT, Report
from benchmarks.speed.subjects import SHAPES, alpaca_rows, make_base, write_recipe

WAYS = ("auto", "int8")
MODELS = ("24M", "160M")
STEPS, LAST, ROWS = 300, 50, 999
SEEDS = (17, 18, 19)


def main() -> None:
    """Measure what is not in the report yet and print what it comes to."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--shared", type=Path, default=Path("../shared/data"))
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    report = Report(arguments.out, steps=STEPS, **header(command_line()))
    shared = arguments.shared.resolve()
    with tempfile.TemporaryDirectory(prefix="eight-bits-") as name:
        folder = Path(name)
        measure_speed(report, folder, shared, arguments.rounds)
        measure_curve(report, folder / "24M", shared)
        measure_tuned(report, folder)
    print(json.dumps(summary(report.content["runs"]), indent=2))


def measure_speed(report: Report, folder: Path, shared: Path, rounds: int) -> None:
    """One epoch and several, in turns."""
    for model in MODELS:
        here, shape = folder / model, SHAPES[model]
        here.mkdir()
        base = make_base(here / "base", shape, shared / "tokenizers" / "llama2")
        recipe = write_recipe(here, base, alpaca_rows(shared, shape.rows), "nf4")
        train_ours(recipe, here, "train.max_steps=1")  # fills the caches

        def measure(key: dict[str, Any], recipe: Path = recipe, here: Path = here) -> dict[str, Any]:
            settings = (f"train.epochs={key['epochs']}", f"model.compute={key['way']}")
            return {**moment(), **train_ours(recipe, here, *settings)}

        epochs = (1, shape.epochs)
        keys = [
            {"check": "speed", "model": model, "round": number, "way": way, "epochs": each}
            for number in range(rounds)
            for way in WAYS
            for each in epochs
        ]
        report.fill(keys, measure)


def measure_curve(report: Report, folder: Path, shared: Path) -> None:
    """Losses of every step."""
    recipe = write_recipe(folder, folder / "base", alpaca_rows(shared, ROWS), "nf4", learning_rate=1e-3)

    def measure(key: dict[str, Any]) -> dict[str, Any]:
        found = train_ours(recipe, folder, f"train.max_steps={STEPS}", f"model.compute={key['way']}")
        return {**found, "last": statistics.fmean(found["losses"][-LAST:])}

    report.fill([{"check": "curve", "way": way} for way in WAYS], measure)


def measure_tuned(report: Report, folder: Path) -> None:
    """Held-out losses, which are computed exactly in both ways."""

    def measure(key: dict[str, Any]) -> dict[str, Any]:
        recipe = ROOT / "recipes" / "quickstart.yaml"
        found = train_ours(recipe, folder, f"model.compute={key['way']}", f"seed={key['seed']}")
        entries = [json.loads(line) for line in (folder / "run" / "metrics.jsonl").read_text().splitlines()]
        return {**found, "held_out": [entry["eval_loss"] for entry in entries if "eval_loss" in entry][-1]}

    report.fill([{"check": "tuned", "seed": seed, "way": way} for seed in SEEDS for way in WAYS], measure)


def summary(runs: list[dict[str, Any]]) -> dict[str, Any]:
    """Last losses of the curve, and the tuned base's medians, by way."""
    found: dict[str, Any] = {}
    for way in WAYS:
        curve = [run["last"] for run in runs if (run["check"], run["way"]) == ("curve", way) and not run.get("failed")]
        tuned = [run for run in runs if (run["check"], run["way"]) == ("tuned", way) and not run.get("failed")]
        found[way] = {
            "curve": curve[0] if curve else None,
            "held_out": [run["held_out"] for run in tuned],
            "seconds": statistics.median(run["wall_seconds"] for run in tuned) if tuned else None,
        }
    return found


if __name__ == "__main__":
    main()
