"""One harness against the real command: faults in, a JSON report of what became of the runs out.

python benchmarks/faults/run.py NAME [--count N] [--seed S] [--folder DIR] [--out FILE]
"""

from __future__ import annotations

import argparse
import importlib
import json
import sys
import tempfile
import warnings
from functools import partial
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


def measure(name: str, folder: Path, *, count: int, seed: int, **more: Any) -> dict[str, Any]:
    """The report of one harness."""
    from benchmarks.faults.stage import stage_in

    harness = importlib.import_module(f"benchmarks.faults.{HARNESSES[name][0]}")
    with stage_in(folder) as stage:
        return partial(harness.run, **more)(stage, count, seed)


def main() -> None:
    """Run one and print or write its report; exit code 1 if something did not go as promised."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", choices=HARNESSES)
    parser.add_argument("--count", type=int)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()))
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    count = arguments.count or HARNESSES[arguments.name][1]
    with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
        found = measure(arguments.name, Path(folder), count=count, seed=arguments.seed)
    text = json.dumps(found, indent=1)
    if arguments.out:
        arguments.out.write_text(text + "\n")
    summary = {key: value for key, value in found.items() if key != "each"}
    print(json.dumps(summary, indent=1))
    sys.exit(1 if found["failed"] else 0)


if __name__ == "__main__":
    main()
