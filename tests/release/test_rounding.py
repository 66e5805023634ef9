"""How far rounding to 16 bits may move a release: as far as rounding the exact sums does, however deep the model is."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from finetune.artifact import RunFolder
from finetune.release import changes
from finetune.release.fresh import Proof
from finetune.release.measure import deviation, positions_compared, probe_logits, rms_difference
from finetune.release.proof import EXACT, FINE_SHARE, MEASURED_SHARE, PROBE_ROWS, PROBE_TOKENS, ROUNDED, prove
from finetune.release.source import read_source
from tests.release.models import make_base
from tests.release.runs import random_run_on, unproven_release

NOT_NEAREST = "tuned elements that are not the nearest value"
LOGITS, RMS = "logits against base + adapter", "logits against base + adapter, root mean square"
DIVERGENCE = "divergence from base + adapter"
FREE = "divergence, each model choosing its experts"

DEEP = [
    *itertools.product(["gemma3"], [8, 16], ["bfloat16", "float16", "float32"]),
    *itertools.product(["gemma2", "llama", "qwen3"], [16, 32], ["bfloat16", "float16", "float32"]),
    *itertools.product(["mixtral", "qwen3_moe"], [8], ["bfloat16", "float16", "float32"]),
]


def release_of(base: Path, folder: Path, *, quantization: str = "none") -> tuple[Path, RunFolder]:
    run = random_run_on(base, folder, model__quantization=quantization)
    return unproven_release(folder / "release", run, "original" if quantization == "none" else "dequantized"), run


def proofs_of(release: Path, run: RunFolder) -> dict[str, Proof]:
    return {found.name: found for found in prove(release, run.path)}


def failed(proofs: dict[str, Proof]) -> set[str]:
    return {found.name for found in proofs.values() if not found.passed}


@pytest.mark.soak
@pytest.mark.parametrize(("kind", "layers", "dtype"), DEEP)
def test_a_deep_model_passes(kind: str, layers: int, dtype: str, tmp_path: Path) -> None:
    proofs = proofs_of(*release_of(make_base(tmp_path / "base", kind, dtype=dtype, layers=layers), tmp_path))
    assert failed(proofs) == set()


def test_the_limit_is_what_rounding_does(tmp_path: Path) -> None:
    """By transformers and PEFT alone: PEFT's merge in float32, and the same rounded.

    Of a model whose logits rounding moves by more than any limit that grows as a random walk does.
    """
    release, run = release_of(make_base(tmp_path / "base", "gemma3", dtype="bfloat16", layers=8), tmp_path)
    source = read_source(run.path)
    probes = [*source.probe_ids(), *(row.ids.tolist() for row in source.rows.examples[:PROBE_ROWS])]
    probes = [ids[:PROBE_TOKENS] for ids in probes]
    keep = positions_compared(len(probes), source.base.facts.vocabulary)
    base = AutoModelForCausalLM.from_pretrained(source.base.facts.folder, dtype=torch.float32)
    merged = PeftModel.from_pretrained(base, str(run.adapter)).merge_and_unload()
    exact = probe_logits(merged, probes, keep=keep)
    for parameter in merged.parameters():
        parameter.data = parameter.bfloat16().float()
    rounded = probe_logits(merged, probes, keep=keep)
    moved = rms_difference(rounded, exact) / deviation(exact)
    proofs = proofs_of(release, run)
    assert failed(proofs) == set()
    assert proofs[RMS].limit == pytest.approx(MEASURED_SHARE * moved, rel=0.01)
    assert proofs[RMS].value == pytest.approx(moved, rel=0.01)
    assert proofs[ROUNDED].limit == proofs[EXACT].limit == pytest.approx(FINE_SHARE["BF16"] * moved, rel=0.01)
    assert proofs[EXACT].value < proofs[RMS].value / 1000


@pytest.mark.parametrize("kind", ["mixtral", "qwen3_moe"])
@pytest.mark.parametrize(
    ("seed", "router", "quantization"),
    [
        (1, 1.0, "none"),
        *(
            pytest.param(*case, marks=pytest.mark.soak)
            for case in itertools.product(range(20), [1.0, 10.0], ["none", "nf4"])
            if case != (1, 1.0, "none")
        ),
    ],
)
def test_a_mixture_passes_whatever_its_routers_choose(
    kind: str, seed: int, router: float, quantization: str, tmp_path: Path
) -> None:
    base = make_base(tmp_path / "base", kind, dtype="bfloat16", seed=seed, router=router)
    proofs = proofs_of(*release_of(base, tmp_path, quantization=quantization))
    assert failed(proofs) == set()
    assert proofs[DIVERGENCE].limit == 1e-3
    assert proofs[DIVERGENCE].value < 1e-4
    assert proofs[ROUNDED].limit is not None
    assert proofs[ROUNDED].limit < 1e-4
    if (kind, seed, router, quantization) == ("mixtral", 1, 1.0, "none"):  # rounding turns a choice that matters
        assert proofs[FREE].value > 1e-3
        assert proofs["experts chosen otherwise, share"].value > 0


@pytest.mark.parametrize("kind", ["llama", "mixtral"])
def test_a_wrong_formula_is_seen_though_merge_and_proof_share_it(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A fifth of a percent too much of every delta drowns in what rounding to bfloat16 does, but not in exact sums."""
    right = changes.scale_of
    monkeypatch.setattr(changes, "scale_of", lambda *args, rank: 1.002 * right(*args, rank=rank))
    proofs = proofs_of(*release_of(make_base(tmp_path / "base", kind, dtype="bfloat16"), tmp_path))
    assert proofs[NOT_NEAREST].passed
    assert proofs[LOGITS].passed
    assert proofs[ROUNDED].passed
    assert {name for name in failed(proofs) if not name.startswith("experts")} == {EXACT}  # a router sees it, too
