"""Whether faster passes train the same: gradients, loss curves and repeats beside plain transformers and PEFT.

Three checks on a random 24M LLaMA (LoRA rank 16 on all linear modules, Alpaca rows), each in nf4 and unquantised:

gradients  of every A and B (B drawn at random, so that A has one), from one pass of 8 rows in bfloat16, against plain
           transformers and PEFT in float32 without autocast, row by row; the cosine of each, with our own pieces and
           without
curves     300 steps of 8 rows from the same start: our own pieces, without them, and ten lines of plain PyTorch over
           transformers and PEFT in bfloat16; the mean loss of the last 50 steps of each
repeats    the same training twice: every loss and the adapter file, to the bit

    python benchmarks/parity.py --out benchmarks/results/parity_speed.json

Exit code 1 if a limit is broken: a cosine of 0.999, 0.01 nat, a bit.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import statistics
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.speed.facts import command_line, header
from benchmarks.speed.ours import train_ours
from benchmarks.speed.outside import Report, answer_of, python
from benchmarks.speed.subjects import SHAPES, alpaca_rows, make_base, write_recipe, write_tokens

COSINE, NATS, LAST = 0.999, 0.01, 50
QUANTIZATIONS = ("nf4", "none")


def gradients(recipe: Path, arguments: argparse.Namespace) -> dict[str, Any]:
    """Cosines by way and adapter tensor, the smallest first."""
    return answer_of(python("gradients.py", recipe), recipe.parent / "gradients.log")


def curves(recipe: Path, arguments: argparse.Namespace) -> dict[str, Any]:
    """The losses of every step, and the mean of the last ones, by way of computing."""
    folder, steps = recipe.parent, f"train.max_steps={arguments.steps}"
    tokens = folder / "curve.jsonl"
    write_tokens(recipe, tokens, steps)
    losses = {way: train_ours(recipe, folder, steps, f"train.speedups={way}")["losses"] for way in ("auto", "none")}
    losses["plain"] = answer_of(python("with_peft.py", recipe, tokens), folder / "plain.log")["losses"]
    return {"losses": losses, "last": {way: statistics.fmean(values[-LAST:]) for way, values in losses.items()}}


def repeats(recipe: Path, arguments: argparse.Namespace) -> dict[str, Any]:
    """Whether two runs are equal to the bit."""
    found = []
    for _ in range(2):
        run = train_ours(recipe, recipe.parent, f"train.max_steps={arguments.repeat_steps}")
        adapter = (recipe.parent / "run" / "adapter" / "adapter_model.safetensors").read_bytes()
        found.append((run["losses"], hashlib.sha256(adapter).hexdigest()))
    return {"steps": len(found[0][0]), "equal": found[0] == found[1]}


CHECKS: dict[str, Callable[[Path, argparse.Namespace], dict[str, Any]]] = {
    "gradients": gradients,
    "curves": curves,
    "repeats": repeats,
}


def problems(runs: list[dict[str, Any]]) -> list[str]:
    """Which limit is broken where."""
    found = []
    for run in runs:
        name = f"{run['check']} {run['quantization']}"
        if run.get("failed"):
            found.append(f"{name}: {run['reason']}")
        elif run["check"] == "gradients" and min(run["cosines"]["auto"].values()) <= COSINE:
            found.append(f"{name}: cosine {min(run['cosines']['auto'].values())}")
        elif run["check"] == "curves":
            others = [run["last"][way] for way in ("none", "plain")]
            if max(abs(run["last"]["auto"] - other) for other in others) > NATS:
                found.append(f"{name}: {run['last']}")
        elif run["check"] == "repeats" and not run["equal"]:
            found.append(f"{name}: two runs differ")
    return found


def main() -> None:
    """Carry out the checks that are not in the report yet; exit code 1 where a limit is broken."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--shared", type=Path, default=Path("../shared/data"))
    parser.add_argument("--shape", choices=SHAPES, default="24M")
    parser.add_argument("--checks", nargs="+", choices=CHECKS, default=list(CHECKS))
    parser.add_argument("--quantization", nargs="+", choices=QUANTIZATIONS, default=list(QUANTIZATIONS))
    parser.add_argument("--rows", type=int, default=999, help="of the Alpaca demo")
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--repeat-steps", type=int, default=20)
    arguments = parser.parse_args()
    report = Report(arguments.out, limits={"cosine": COSINE, "nats": NATS}, **header(command_line()))
    report.content |= {"shape": arguments.shape, "steps": arguments.steps, "rows": arguments.rows}
    shared = arguments.shared.resolve()
    with tempfile.TemporaryDirectory(prefix="parity-") as name:
        folder = Path(name)
        base = make_base(folder / "base", SHAPES[arguments.shape], shared / "tokenizers" / "llama2")
        rows = alpaca_rows(shared, arguments.rows)
        recipes = {each: write_recipe(folder, base, rows, each, learning_rate=1e-3) for each in arguments.quantization}
        keys = [{"quantization": q, "check": check} for check in arguments.checks for q in arguments.quantization]
        report.fill(keys, lambda key: CHECKS[key["check"]](recipes[key["quantization"]], arguments))
    broken = problems(report.content["runs"])
    print(json.dumps({"broken": broken}))
    sys.exit(1 if broken else 0)


if __name__ == "__main__":
    main()
