"""One harness against the real command: faults in, a JSON report of what became of the runs out.

python benchmarks/faults/run.py NAME [--count N] [--seed S] [--minutes M] [--folder DIR] [--out FILE]

A round that went wrong is printed with what it takes to repeat it; another seed draws other rounds.
"""

from __future__ import annotations

import argparse
import importlib
import json
import math
import sys
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any

CHECKOUT = Path(__file__).resolve().parents[2]
sys.path[0] = str(CHECKOUT)  # not this folder, whose file names are common words

# Name: the module, and the count that the published report has.
HARNESSES = {
    "kills": ("kills", 200),
    "crash-points": ("crash_points", 1000),
    "storage": ("storage", 300),
    "retention": ("retention", 2000),
    "signals": ("signals", 130),
    "numerics": ("numerics", 60),
    "double-starts": ("double_starts", 100),
    "recipe-keys": ("recipe_keys", 1000),
    "stock": ("stock", 200),
    "sealing": ("sealing", 10),
}


def measure(name: str, folder: Path, *, count: int, seed: int, minutes: float = math.inf) -> dict[str, Any]:
    """The report of one harness; after so many minutes it begins no further round."""
    from benchmarks.faults.stage import stage_in

    harness = importlib.import_module(f"benchmarks.faults.{HARNESSES[name][0]}")
    with stage_in(folder) as stage:
        stage.ends = time.monotonic() + 60 * minutes
        return harness.run(stage, count, seed) | {"asked_for": count}


def main() -> None:
    """Run one and print or write its report; exit code 1 if something did not go as promised."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", choices=HARNESSES)
    parser.add_argument("--count", type=int, help="rounds; without it as many as the published report has")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--minutes", type=float, default=math.inf, help="begin no further round after this time")
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()), help="where the runs are made")
    parser.add_argument("--out", type=Path, help="where the report with every round is written, as JSON")
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    count = arguments.count or HARNESSES[arguments.name][1]
    with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
        found = measure(arguments.name, Path(folder), count=count, seed=arguments.seed, minutes=arguments.minutes)
    text = json.dumps(found, indent=1)
    if arguments.out:
        arguments.out.write_text(text + "\n")
    summary = {key: value for key, value in found.items() if key != "each"}
    print(json.dumps(summary, indent=1))
    sys.exit(1 if found["failed"] else 0)


if __name__ == "__main__":
    main()
