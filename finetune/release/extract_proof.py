"""Prove an extracted adapter from the files of three folders: adapter, base and tuned; prints the proofs when run."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from finetune.base import TensorEntry, read_base, read_tensor_entries
from finetune.data.template import Template, choose_template, parse_date
from finetune.errors import FinetuneError
from finetune.machine import quiet_libraries
from finetune.release.adapter_proof import (
    layerwise_logits,
    plain_peft_logits,
    probes_of,
    prove_against_exact,
)
from finetune.release.algebra import delta_of
from finetune.release.delta import Delta
from finetune.release.fresh import Proof, proof
from finetune.release.manifest import damaged_files, read_manifest
from finetune.release.measure import deviation, largest_difference, mean_divergence, rms_difference
from finetune.release.proof_files import prove_text
from finetune.release.source import DEFAULT_DATE, Source, read_source
from finetune.release.stacked import read_plain
from finetune.release.weights import read_tensor

# Of a tensor's change: how much farther than the best product of the rank it may lie, and what a full rank may miss
# (a random matrix of 512 columns: 4e-8; one of 2100 x 2200, decomposed in float32: 3e-6).
BEYOND_BEST_LIMIT, FULL_RANK_LIMIT = 1e-5, 1e-5


def prove_extracted(folder: Path, base: Path, tuned: Path) -> list[Proof]:
    """Every proof of an extracted adapter; damaged files are not read further."""
    manifest = read_manifest(folder)
    proofs = [proof("files", len(damaged_files(folder, manifest["files"])), 0)]
    if not proofs[0].passed:
        return proofs
    source = on_base(read_source(folder), base)
    deltas = read_plain(source)
    proofs += prove_errors(deltas, base, tuned, manifest["extracted"])
    proofs += prove_text(folder, of_tuned(source, tuned))
    return proofs + prove_logits(folder, source, deltas, tuned, manifest["extracted"])


def prove_errors(deltas: Mapping[str, Delta], base: Path, tuned: Path, told: Mapping[str, Any]) -> list[Proof]:
    """Each product is the nearest of its rank to the difference, misses what was told, and nothing else differs."""
    before = {entry.name: entry for entry in read_tensor_entries(base)}
    after = {entry.name: entry for entry in read_tensor_entries(tuned)}
    beyond = worst_told = missed_squares = squares = 0.0
    undeclared, named = 0, {*deltas, *told["left_out"]}
    for name in before.keys() | after.keys():
        difference = _difference(before.get(name), after.get(name))
        if name not in deltas:
            undeclared += name not in named and bool(difference.any())
            continue
        delta = deltas[name]
        missed = float(np.linalg.norm(difference - delta.scale * _array(delta.b_OR) @ _array(delta.a_RI)))
        size = float(np.linalg.norm(difference))
        best = smallest_error(difference, delta.a_RI.shape[0])
        beyond = max(beyond, (missed - best) / size)
        worst_told = max(worst_told, abs(missed / size - told["relative_errors"][name.removesuffix(".weight")]))
        missed_squares, squares = missed_squares + missed**2, squares + size**2
    total = math.sqrt(missed_squares / squares)
    is_full = _is_full(deltas)
    return [
        proof("relative error, all tensors together", total, FULL_RANK_LIMIT if is_full else None),
        proof("relative error beyond the smallest of the rank", beyond, BEYOND_BEST_LIMIT),
        proof("relative error that is not the one told", max(worst_told, abs(total - told["relative_error"])), 1e-6),
        proof("tensors that differ and are neither in the adapter nor named", undeclared, 0),
    ]


def prove_logits(
    folder: Path, source: Source, deltas: Mapping[str, Delta], tuned: Path, told: Mapping[str, Any]
) -> list[Proof]:
    """Plain PEFT computes base + B A; how near that is to the tuned model is recorded, and at full rank bounded."""

    def exact(entry: TensorEntry, tensor: torch.Tensor) -> torch.Tensor:
        change = deltas.get(entry.name)
        return tensor if change is None else (tensor.double() + delta_of(tensor, change)).float()

    entries = list(read_tensor_entries(source.base.facts.folder))
    proofs = prove_against_exact(folder, source, entries, exact, named="base + B A")
    probes = probes_of(source)
    wanted = layerwise_logits(of_tuned(source, tuned), probes, entries=None, exact=lambda entry, tensor: tensor)
    base = layerwise_logits(source, probes, entries=None, exact=lambda entry, tensor: tensor)
    found = plain_peft_logits(folder, source, probes)
    is_bound = _is_full(deltas) and not told["left_out"]
    effect, missed = rms_difference(wanted, base), rms_difference(found, wanted)
    largest = largest_difference(found, wanted) / deviation(wanted)
    return [
        *proofs,
        proof("logits against the tuned model", largest, proofs[0].limit if is_bound else None),
        proof("logits against the tuned model, share of its change", missed / effect if effect else math.inf, None),
        proof("divergence from the tuned model", mean_divergence(wanted, found), None),
    ]


def smallest_error(difference: np.ndarray[Any, Any], rank: int) -> float:
    """Frobenius distance to the nearest matrix of a rank: the root of the squares of all smaller singular values.

    From the eigenvalues of D D^T, not from the decomposition that made the adapter (Eckart and Young, 1936).
    """
    small = difference if difference.shape[0] <= difference.shape[1] else difference.T
    squares = np.linalg.eigvalsh(small @ small.T)  # ascending
    return math.sqrt(max(0.0, float(squares[: max(0, len(squares) - rank)].sum())))


def on_base(source: Source, base: Path) -> Source:
    """The source with the base as it lies in this folder."""
    name = source.base.facts.base
    if source.base.facts.folder == base:
        return source
    found = read_base(str(base))
    facts = replace(found.facts, base=name)
    return replace(source, base=replace(found, facts=facts), model=replace(source.model, folder=base))


def of_tuned(source: Source, tuned: Path) -> Source:
    """The source with the tuned model in the place of the base: its tokenizer, template and stop tokens."""
    model = read_base(str(tuned))
    if model.chat_template is None:
        template = choose_template("auto", model, date=DEFAULT_DATE)
    else:
        date = parse_date(DEFAULT_DATE)
        template = Template("own", model.chat_template, model.bos_token, model.eos_token, date)
    return replace(source, base=model, template=template)


def main() -> None:
    """`python -m finetune.release.extract_proof FOLDER BASE TUNED` prints the JSON list of an adapter's proofs."""
    quiet_libraries()
    try:
        answer: Any = [found.to_json() for found in prove_extracted(*map(Path, sys.argv[1:4]))]
    except FinetuneError as error:
        answer = {"code": error.code, "problems": [vars(problem) for problem in error.problems]}
    sys.stdout.write(json.dumps(answer) + "\n")


def _is_full(deltas: Mapping[str, Delta]) -> bool:
    return all(delta.a_RI.shape[0] == min(delta.shape) for delta in deltas.values())


def _difference(before: TensorEntry | None, after: TensorEntry | None) -> np.ndarray[Any, Any]:
    if before is None or after is None or before.shape != after.shape:
        return np.array([math.inf])
    return _array(read_tensor(after)) - _array(read_tensor(before))


def _array(tensor: torch.Tensor) -> np.ndarray[Any, Any]:
    return tensor.double().numpy()
