"""What a token costs as passes grow longer and as documents do: forward and backward, tokens per second, peak memory.

A random LLaMA (24M), LoRA rank 16 on all linear modules, nf4; documents of random tokens, all of them learned. First
the tokens of a pass grow while documents stay at 256 tokens; then documents grow while a pass stays at 8,192 tokens.
Every point is a process of its own, measured with our own pieces and without; points take turns.

    python benchmarks/linear_cost.py --out benchmarks/results/linear_cost_speed.json

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

from benchmarks.speed.contenders import prepare
from benchmarks.speed.facts import command_line, header, moment
from benchmarks.speed.outside import Report, answer_of, python
from benchmarks.speed.subjects import SHAPES

DOCUMENT_OF_PASSES = 256
PASSES = [(DOCUMENT_OF_PASSES, tokens) for tokens in (1024, 2048, 4096, 8192, 16384)]  # tokens of a document, of a pass
DOCUMENTS = [(length, 8192) for length in (64, 128, 256, 512, 1024, 2048, 4096, 8192)]
WAYS = ("auto", "none")  # train.speedups


def main() -> None:
    """Measure all points in every round and print medians."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--shared", type=Path, default=Path("../shared/data"))
    parser.add_argument("--model", choices=SHAPES, default="24M")
    parser.add_argument("--quantization", choices=["nf4", "none"], default="nf4")
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=list(WAYS))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=5.0, help="of passes at each point")
    parser.add_argument("--most-tokens", type=int, default=16384, help="leave longer passes out")
    arguments = parser.parse_args()
    report = Report(arguments.out, model=arguments.model, quantization=arguments.quantization, **header(command_line()))
    points = [p for p in dict.fromkeys(PASSES + DOCUMENTS) if p[1] <= arguments.most_tokens]
    with tempfile.TemporaryDirectory(prefix="linear-cost-") as folder:
        where = {"folder": Path(folder), "shared": arguments.shared.resolve(), "peers": Path(folder)}
        work = prepare(arguments.model, arguments.quantization, **where, rows=8)

        def measure(key: dict[str, Any]) -> dict[str, Any]:
            length, tokens = key["document_tokens"], key["pass_tokens"]
            facts = (work.recipe, key["way"], length, tokens // length, arguments.seconds)
            answer = answer_of(python("one_pass.py", *facts), work.folder / "one_pass.log")
            return {**moment(), "peak_bytes": answer.pop("outside")["peak_bytes"], **answer}

        report.fill(
            [
                {"way": way, "document_tokens": length, "pass_tokens": tokens, "round": number}
                for number in range(arguments.rounds)
                for length, tokens in points
                for way in arguments.ways
            ],
            measure,
        )
    for point in medians(report.content["runs"]):
        print(point)


def medians(runs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """One entry for every point and way: its median rate and its peak."""
    keys = ("way", "document_tokens", "pass_tokens")
    groups: dict[tuple, list[dict[str, Any]]] = {}
    for run in runs:
        if not run.get("failed"):
            groups.setdefault(tuple(run[key] for key in keys), []).append(run)
    return [
        {
            **dict(zip(keys, key, strict=True)),
            "tokens_per_second": statistics.median(run["tokens"] / run["pass_seconds"] for run in group),
            "microseconds_per_token": statistics.median(1e6 * run["pass_seconds"] / run["tokens"] for run in group),
            "peak_bytes": max(run["peak_bytes"] for run in group),
        }
        for key, group in groups.items()
    ]


if __name__ == "__main__":
    main()
