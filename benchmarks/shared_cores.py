"""What waiting threads cost: training speed by how long they spin before they sleep, alone and beside a busy program.

The quickstart recipe for a few steps, each measurement in a process of its own, taking turns. The busy program is one
endless loop on one core.

    python benchmarks/shared_cores.py --rounds 3 --out benchmarks/results/NAME.json
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from finetune.machine import SPINS

POLICIES = {
    "spinning": {"OMP_WAIT_POLICY": "ACTIVE"},
    "sleeping": {"OMP_WAIT_POLICY": "PASSIVE", "GOMP_SPINCOUNT": "0"},
    "ours": {"OMP_WAIT_POLICY": "PASSIVE", "GOMP_SPINCOUNT": SPINS},
}


def tokens_per_second(policy: str, steps: int) -> float:
    """Real tokens per second of a short quickstart training under a wait policy."""
    with tempfile.TemporaryDirectory() as folder:
        command = [
            sys.executable,
            "-m",
            "finetune",
            "train",
            "recipes/quickstart.yaml",
            "--out",
            f"{folder}/run",
            "--json",
        ]
        command += ["--set", f"train.max_steps={steps}", "--set", "data.eval=null"]
        environment = os.environ | POLICIES[policy] | {"HF_HUB_OFFLINE": "1"}
        done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    return json.loads(done.stdout)["tokens_per_second"]


def main() -> None:
    """Measure all combinations, round by round, and print the medians."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--out")
    arguments = parser.parse_args()
    speeds: dict[str, list[float]] = {}
    for _ in range(arguments.rounds):
        for machine in ("alone", "beside a busy program"):
            busy = subprocess.Popen([sys.executable, "-c", "while True: pass"]) if machine != "alone" else None
            for policy in POLICIES:
                speeds.setdefault(f"{policy} {machine}", []).append(tokens_per_second(policy, arguments.steps))
            if busy:
                busy.kill()
                busy.wait()
    result = {"tokens_per_second": speeds, "medians": {name: statistics.median(runs) for name, runs in speeds.items()}}
    text = json.dumps(result, indent=2)
    print(text)
    if arguments.out:
        Path(arguments.out).write_text(text + "\n")


if __name__ == "__main__":
    main()
