"""What each piece of our own code gains: training with all of them, with each one alone left out, and with none.

The same measurement as benchmarks/training_speed.py (a process of one epoch and one of several, the rate of the
difference); the ways take turns. Leaving out `linears` leaves out `weights` too, which are theirs.

    python benchmarks/ablation.py --out benchmarks/results/ablation_speed.json

What is in the file already is not measured again.
"""

from __future__ import annotations

import argparse
import itertools
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.speed.contenders import prepare
from benchmarks.speed.facts import command_line, header, moment
from benchmarks.speed.ours import train_ours
from benchmarks.speed.outside import Report
from benchmarks.speed.rates import rates
from benchmarks.speed.subjects import BATCH_SIZE, SHAPES
from finetune.plan_layout import SPEEDUPS

NEEDS = {"weights": "linears"}


def ways() -> dict[str, list[str] | str]:
    """What train.speedups is set to, by name."""
    without = {
        f"without {name}": [each for each in SPEEDUPS if name not in (each, NEEDS.get(each))] for name in SPEEDUPS
    }
    return {"all": list(SPEEDUPS), **without, "none": "none"}


def main() -> None:
    """Measure every way in every round and print the rates."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--shared", type=Path, default=Path("../shared/data"))
    parser.add_argument("--models", nargs="+", choices=SHAPES, default=["160M"])
    parser.add_argument("--quantization", nargs="+", choices=["nf4", "none"], default=["nf4"])
    parser.add_argument("--ways", nargs="+", choices=list(ways()), default=list(ways()))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--rows", type=int, default=0, help="other than the size's own number")
    parser.add_argument("--epochs", type=int, default=0, help="of the longer process, other than the size's own")
    arguments = parser.parse_args()
    report = Report(arguments.out, batch_size=BATCH_SIZE, **header(command_line()))
    with tempfile.TemporaryDirectory(prefix="ablation-") as folder:
        for model, quantization in itertools.product(arguments.models, arguments.quantization):
            where = {"folder": Path(folder), "shared": arguments.shared.resolve(), "peers": Path(folder)}
            work = prepare(model, quantization, **where, rows=arguments.rows)
            train_ours(work.recipe, work.folder, "train.max_steps=1")  # fills the caches
            keys = [
                {"model": model, "quantization": quantization, "way": way, "round": number, "epochs": epochs}
                for number in range(arguments.rounds)
                for way in arguments.ways
                for epochs in (1, arguments.epochs or SHAPES[model].epochs)
            ]

            def measure(key: dict[str, Any], work: Any = work) -> dict[str, Any]:
                settings = (f"train.epochs={key['epochs']}", f"train.speedups={json.dumps(ways()[key['way']])}")
                return {**moment(), **train_ours(work.recipe, work.folder, *settings)}

            report.fill(keys, measure)
    for line in rates(report.content["runs"], by=("model", "quantization", "way")):
        print(line)


if __name__ == "__main__":
    main()
