"""finetune measured from outside: its own command line trains a recipe; counts and losses are read from the run."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any

from benchmarks.speed.outside import ROOT, run_outside


def train_ours(recipe: Path, folder: Path, *settings: str) -> dict[str, Any]:
    """`finetune train RECIPE --set ...` as a process of its own: its figures, tokens, and the loss of every step.

    Raises:
        RuntimeError: it failed.
    """
    run = folder / "run"
    shutil.rmtree(run, ignore_errors=True)
    command = [sys.executable, str(ROOT / "cli.py"), "train", str(recipe), "--out", str(run), "--offline"]
    for setting in settings:
        command += ["--set", setting]
    seen = run_outside(command, folder / "ours.log", environment={"XDG_CACHE_HOME": str(folder / "cache")})
    if seen.code:
        raise RuntimeError(
            f"exit code {seen.code}: {' '.join(command)}\n{seen.log.read_text(errors='replace')[-3000:]}"
        )
    entries = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    steps = [entry for entry in entries if "loss" in entry]
    return {
        **seen.figures(),
        "tokens": sum(step["tokens"] for step in steps),
        "supervised_tokens": sum(step["supervised_tokens"] for step in steps),
        "losses": [step["loss"] for step in steps],
    }
