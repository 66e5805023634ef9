"""What rounding to bfloat16 does to random models, and how much of it the proofs of a release leave unexplained.

Random bases of tests/release/models.py with random adapters are merged and proven. Of each kind and depth: how far the
release is from base + adapter, root mean square in units of the logits' spread, its divergence in nats, and how far
the exact sums are from base + adapter. Then mixtures with many seeds, with random routers and with ten times as decided
ones: the divergence on the same experts, and with each model choosing its own.

    python benchmarks/rounding.py [--seeds 3] [--mixtures 20] --out benchmarks/results/rounding.json
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path

CHECKOUT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(CHECKOUT))

from finetune.machine import quiet_libraries  # noqa: E402

quiet_libraries()

from finetune.release.proof import EXACT, prove  # noqa: E402
from tests.release.models import make_base  # noqa: E402
from tests.release.runs import random_run_on, unproven_release  # noqa: E402

KINDS, LAYERS = ("llama", "gemma3"), (2, 8, 16)
FIGURES = {
    "moved": "logits against base + adapter, root mean square",
    "divergence": "divergence from base + adapter",
    "unexplained": EXACT,
    "divergence, each choosing": "divergence, each model choosing its experts",
    "chosen otherwise": "experts chosen otherwise, share",
}


def measure(kind: str, *, layers: int = 2, seed: int = 0, router: float = 1.0) -> dict[str, float]:
    """The figures of one random model in bfloat16."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        base = make_base(folder / "base", kind, dtype="bfloat16", layers=layers, seed=seed, router=router)
        run = random_run_on(base, folder, model__quantization="none")
        proofs = {found.name: found for found in prove(unproven_release(folder / "release", run, "original"), run.path)}
    if failed := [found for found in proofs.values() if not found.passed]:
        raise SystemExit(f"{kind}, {layers} layers, seed {seed}, router {router}: {failed}")
    return {figure: proofs[proof].value for figure, proof in FIGURES.items() if proof in proofs}


def median(values: list[float]) -> float:
    return sorted(values)[len(values) // 2]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--mixtures", type=int, default=20, help="seeds of each mixture")
    parser.add_argument("--out", type=Path, required=True)
    asked = parser.parse_args()
    results: dict[str, list[dict[str, float]]] = {}
    for kind in KINDS:
        for layers in LAYERS:
            results[f"{kind}, {layers} layers"] = [measure(kind, layers=layers, seed=s) for s in range(asked.seeds)]
    for router in (1.0, 10.0):
        found = [measure("mixtral", seed=seed, router=router) for seed in range(asked.mixtures)]
        results[f"mixtral, 2 layers, router times {router:g}"] = found
    for case, rows in results.items():
        figures = {figure: [row[figure] for row in rows] for figure in rows[0]}
        print(
            case, *(f"{figure} {median(each):.2g} (to {max(each):.2g})" for figure, each in figures.items()), sep="; "
        )
    asked.out.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
