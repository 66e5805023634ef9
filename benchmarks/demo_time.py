"""How long the training of `make demo` takes with our own pieces and without: the quickstart recipe from start to end.

    python benchmarks/demo_time.py --out benchmarks/results/demo_speed.json

Wall and processor seconds and peak memory of the whole process, imports and evaluations included; the ways take turns.
What is in the file already is not measured again.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.speed.facts import command_line, header, moment
from benchmarks.speed.ours import train_ours
from benchmarks.speed.outside import ROOT, Report

WAYS = ("auto", "none")  # train.speedups


def main() -> None:
    """Measure both ways in every round and print medians."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, help="fewer than the recipe has")
    arguments = parser.parse_args()
    report = Report(arguments.out, recipe="recipes/quickstart.yaml", steps=arguments.steps, **header(command_line()))
    with tempfile.TemporaryDirectory(prefix="demo-time-") as name:
        folder = Path(name)
        recipe = ROOT / "recipes" / "quickstart.yaml"
        train_ours(recipe, folder, "train.max_steps=1")  # fills the caches

        def measure(key: dict[str, Any]) -> dict[str, Any]:
            shorter = [f"train.max_steps={arguments.steps}"] if arguments.steps else []
            return {**moment(), **train_ours(recipe, folder, f"train.speedups={key['way']}", *shorter)}

        report.fill([{"way": way, "round": number} for number in range(arguments.rounds) for way in WAYS], measure)
    for way, entry in summary(report.content["runs"]).items():
        print(way, entry)


def summary(runs: list[dict[str, Any]]) -> dict[str, dict[str, float]]:
    """Medians by way."""
    found = {}
    for way in WAYS:
        group = [run for run in runs if run["way"] == way and not run.get("failed")]
        if group:
            found[way] = {
                "wall_seconds": statistics.median(run["wall_seconds"] for run in group),
                "cpu_seconds": statistics.median(run["cpu_seconds"] for run in group),
                "peak_bytes": max(run["peak_bytes"] for run in group),
                "last_loss": statistics.fmean(group[0]["losses"][-20:]),
                "steps": len(group[0]["losses"]),
            }
    return found


if __name__ == "__main__":
    main()
