"""Prove a folder made of several adapters: the formulas written out once more, in numpy; prints the proofs when run.

Nothing here shares arithmetic with algebra.py. What both take from elsewhere is the reading of an adapter and, for
adapters that are no plain LoRA, the exact tuned values of a single one.
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from finetune.base import TensorEntry, read_tensor_entries
from finetune.errors import FinetuneError
from finetune.machine import quiet_libraries
from finetune.release.adapter_proof import layerwise_logits, probes_of, prove_against_exact
from finetune.release.algebra import Combining, Formula, dare_draws, make_combining
from finetune.release.combined import agreed_base, formula_of
from finetune.release.delta import Change, Delta, one_thread, tuned_blocks
from finetune.release.fresh import Proof, proof
from finetune.release.layerwise import LayerwiseModel
from finetune.release.manifest import damaged_files, read_manifest
from finetune.release.measure import (
    deviation,
    largest_difference,
    loss_passes,
    loss_stretches,
    mean_divergence,
    mean_loss_of,
    probe_passes,
    rms_difference,
)
from finetune.release.proof import (
    NO_OP_LIMIT,
    ROUNDED,
    divergence_limit,
    fine_limit,
    make_onto,
    rounding_limit,
)
from finetune.release.proof_files import TIE, prove_text
from finetune.release.source import Source, read_source
from finetune.release.stacked import read_plain
from finetune.release.weights import read_tensor, same_bytes

Array = np.ndarray[Any, np.dtype[np.float64]]


def prove_combined(folder: Path, runs: Sequence[Path]) -> list[Proof]:
    """Every proof of a combined folder, from the files on disk alone; damaged files are not read further."""
    manifest = read_manifest(folder)
    proofs = [proof("files", len(damaged_files(folder, manifest["files"])), 0)]
    if not proofs[0].passed:
        return proofs
    sources, formula = [read_source(run) for run in runs], formula_of(manifest)
    agreed_base(sources)
    onto = "original" if manifest["format"] == "adapter" else manifest["onto"]["chosen"]
    combining = make_combining(sources, formula, make_onto(sources[0], onto))
    if manifest["format"] == "adapter":
        proofs += [count_wrong_products(folder, sources, formula), *prove_text(folder, sources[0])]
        exact = Exact(combining)
        entries, named = combining.entries, "base + combined deltas"
        return proofs + prove_against_exact(folder, sources[0], entries, exact, named=named)
    proofs += prove_elements(folder, combining)
    proofs += prove_text(folder, sources[0])
    return proofs + prove_logits(folder, sources, combining) if proofs[1].passed else proofs


class Exact:
    """The exact tuned values of a stored tensor, rounded to float32 only."""

    def __init__(self, combining: Combining) -> None:
        self.combining = combining

    def __call__(self, entry: TensorEntry, tensor: torch.Tensor) -> torch.Tensor:
        if entry.name not in self.combining.rounded:
            return tensor
        values = exact_values(self.combining, entry.name, self.combining.meets(entry, tensor))
        return torch.from_numpy(values.astype(np.float32))


class Rounded:
    """The same rounded as the base is stored; to bfloat16 where that is in float32."""

    def __init__(self, combining: Combining, stored_dtype: str) -> None:
        self.exact, self.names, self.halves = Exact(combining), combining.rounded, stored_dtype == "F32"

    def __call__(self, entry: TensorEntry, tensor: torch.Tensor) -> torch.Tensor:
        exact = self.exact(entry, tensor)
        return exact.to(torch.bfloat16 if self.halves else tensor.dtype) if entry.name in self.names else exact


def prove_elements(folder: Path, combining: Combining) -> list[Proof]:
    """Same tensors as the base; each changed element the nearest value to the formula's; all others unchanged."""
    wanted = {entry.name: entry for entry in combining.entries}
    released = {entry.name: entry for entry in read_tensor_entries(folder)}
    shapes = [{name: (entry.dtype, entry.shape) for name, entry in found.items()} for found in (wanted, released)]
    odd = [name for name in wanted.keys() | released.keys() if shapes[0].get(name) != shapes[1].get(name)]
    proofs = [proof("tensor names, shapes and dtypes", len(odd), 0)]
    if odd:
        return proofs
    not_nearest = changed = 0
    for name, entry in wanted.items():
        if name not in combining.rounded:
            changed += not same_bytes(entry, released[name])
            continue
        exact = exact_values(combining, name, combining.meets(entry, read_tensor(entry)))
        not_nearest += count_not_nearest(read_tensor(released[name]), torch.from_numpy(exact))
    proofs.append(proof("combined elements that are not the nearest value", not_nearest, 0))
    proofs.append(proof("other tensors that changed", changed, 0))
    return proofs


def prove_logits(folder: Path, sources: Sequence[Source], combining: Combining) -> list[Proof]:
    """The release computes what the base with the combined deltas computes; what it costs each run is recorded."""
    first = sources[0]
    facts, probes = first.base.facts, probes_of(first)
    base = layerwise_logits(first, probes, entries=None, exact=combining.meets)
    wanted = layerwise_logits(first, probes, entries=combining.entries, exact=Exact(combining))
    rounded = layerwise_logits(first, probes, entries=combining.entries, exact=Rounded(combining, facts.stored_dtype))
    model = LayerwiseModel(folder, device=first.model.device)
    logits = [found.cpu() for found in model.logits(probe_passes(probes, vocabulary=facts.vocabulary))]
    effect, missed = rms_difference(wanted, base), rms_difference(logits, wanted)
    stored = wanted if facts.stored_dtype == "F32" else rounded
    by_rounding, largest = (largest_difference(logits, other) / deviation(wanted) for other in (stored, wanted))
    proofs = [
        proof(ROUNDED, by_rounding, fine_limit(facts, rounded, wanted)),
        proof("logits against base + combined deltas", largest, rounding_limit(facts, rounded, wanted)),
        proof(
            "divergence from base + combined deltas",
            mean_divergence(wanted, logits),
            divergence_limit(facts, rounded, wanted),
        ),
        proof("no-op", missed / effect if effect else math.inf, NO_OP_LIMIT),
    ]
    for source in sources:
        if rows := list(source.rows.examples):
            stretches = loss_stretches(rows, device=first.model.device)
            loss = mean_loss_of(stretches, model.logits(loss_passes(stretches)))
            proofs.append(proof(f"loss on the rows of {source.path.resolve().name}", loss, None))
    return proofs


def count_wrong_products(folder: Path, sources: Sequence[Source], formula: Formula) -> Proof:
    """Elements of the folder's B * A that are farther from sum_i w_i s_i B_i A_i than B's rounding explains."""
    stored = read_plain(read_source(folder))
    trained = [read_plain(source) for source in sources]
    wrong = len(stored.keys() ^ {name for each in trained for name in each})
    for name, delta in stored.items():
        exact, bound = np.zeros(delta.shape), np.zeros(delta.shape)
        for weight, each in zip(formula.weights, trained, strict=True):
            if name in each:
                left, right = weight * each[name].scale * as_array(each[name].b_OR), as_array(each[name].a_RI)
                exact += left @ right
                bound += np.abs(left) @ np.abs(right)
        found = delta.scale * as_array(delta.b_OR) @ as_array(delta.a_RI)
        wrong += int((np.abs(found - exact) > 2.0**-23 * bound).sum())
    return proof("elements of B * A that are not the sum of the runs'", wrong, 0)


def exact_values(combining: Combining, name: str, weight: torch.Tensor) -> Array:
    """Base plus combined deltas of one tensor, float64, by the formulas as they are published."""
    with one_thread():
        deltas = [one_delta(weight, changes.get(name)) for changes in combining.changes]
        return as_array(weight) + FORMULAS[combining.formula.method](deltas, combining.formula, name)


def one_delta(weight: torch.Tensor, change: Change | None) -> Array:
    """What one adapter adds to a tensor."""
    if change is None:
        return np.zeros(tuple(weight.shape))
    if isinstance(change, Delta) and change.magnitude_O is change.magnitude_I is change.start is None:
        product: Array = np.matmul(as_array(change.b_OR), as_array(change.a_RI))
        return change.scale * product
    tuned = np.concatenate([rows.numpy().copy() for _, rows in tuned_blocks(weight, change)])
    return tuned.reshape(tuple(weight.shape)) - as_array(weight)


def weighted_sum(deltas: Sequence[Array], formula: Formula, name: str) -> Array:
    """w1 d1 + w2 d2 + ..."""
    return np.einsum("r...,r->...", np.stack(deltas), np.array(formula.weights))


def ties(deltas: Sequence[Array], formula: Formula, name: str) -> Array:
    """arXiv:2306.01708, algorithm 1: keep the largest, elect the sign of the sum, average those of that sign."""
    assert formula.density is not None
    kept = []
    for weight, delta in zip(formula.weights, deltas, strict=True):
        sizes = np.sort(np.abs(delta), axis=None)[::-1]
        smallest = sizes[max(round(formula.density * sizes.size), 1) - 1]
        kept.append(weight * np.where(np.abs(delta) < smallest, 0.0, delta))
    votes = sum(kept)
    positive = np.mean(np.ma.masked_less_equal(np.stack(kept), 0), axis=0)
    negative = np.mean(np.ma.masked_greater_equal(np.stack(kept), 0), axis=0)
    return np.where(votes > 0, np.ma.filled(positive, 0.0), np.where(votes < 0, np.ma.filled(negative, 0.0), 0.0))


def dare(deltas: Sequence[Array], formula: Formula, name: str) -> Array:
    """arXiv:2311.03099: 53 random bits a number say whether an element stays; those are divided."""
    assert formula.density is not None
    assert formula.seed is not None
    total = np.zeros(deltas[0].shape)
    for run, (weight, delta) in enumerate(zip(formula.weights, deltas, strict=True)):
        bits = dare_draws(formula.seed, run, name).random_raw(delta.size) >> np.uint64(11)
        stays = (bits < formula.density * 2.0**53).reshape(delta.shape)
        total[stays] += weight * (delta[stays] / formula.density)
    return total


def count_not_nearest(written: torch.Tensor, exact: torch.Tensor) -> int:
    """How many written elements are not their dtype's nearest value to the exact one, ties apart."""
    here, there = written.double(), exact.float().to(written.dtype).double()
    farther = (here - exact).abs() - (there - exact).abs()
    return int(((here != there) & ~(farther <= TIE * (here - there).abs())).sum())


def as_array(tensor: torch.Tensor) -> Array:
    """The values in float64."""
    return tensor.double().numpy()


def main() -> None:
    """`python -m finetune.release.combined_proof FOLDER RUN RUN...` prints the JSON list of a folder's proofs."""
    quiet_libraries()
    try:
        folder, *runs = map(Path, sys.argv[1:])
        answer: Any = [found.to_json() for found in prove_combined(folder, runs)]
    except FinetuneError as error:
        answer = {"code": error.code, "problems": [vars(problem) for problem in error.problems]}
    sys.stdout.write(json.dumps(answer) + "\n")


FORMULAS: Mapping[str, Any] = {"linear": weighted_sum, "cat": weighted_sum, "ties": ties, "dare": dare}
