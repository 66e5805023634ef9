"""Prove an adapter folder: plain PEFT with it on one side, the base with exactly changed weights on the other."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch

from finetune.base import TensorEntry
from finetune.model.adapter import load_adapter
from finetune.model.load import load_base
from finetune.release.delta import round_tuned
from finetune.release.fresh import Proof, proof
from finetune.release.layerwise import LayerwiseModel
from finetune.release.measure import (
    deviation,
    largest_difference,
    positions_compared,
    probe_logits,
    probe_passes,
    rms_difference,
)
from finetune.release.merging import make_merging
from finetune.release.proof import NO_OP_LIMIT, PROBE_TOKENS, fine_limit, load_plain, make_onto
from finetune.release.proof_files import prove_text
from finetune.release.source import Source
from finetune.release.weights import read_tensors
from finetune.train.held_out import autocast

Exact = Callable[
    [TensorEntry, torch.Tensor], torch.Tensor
]  # a stored tensor's tuned values, not yet rounded to 16 bits
Logits = list[torch.Tensor]


def prove_adapter_folder(folder: Path, source: Source) -> list[Proof]:
    """The folder against the run or adapter it is a copy of, whatever that one changes."""
    merging = make_merging(source, make_onto(source, "original"))

    def exact(entry: TensorEntry, tensor: torch.Tensor) -> torch.Tensor:
        change = merging.changes.get(entry.name)
        return tensor if change is None else round_tuned(tensor, change, dtype=torch.float32)

    probes = probes_of(source)
    as_run = []
    for adapter in (source.adapter, folder):
        with autocast(source.model.device, source.model.dtype):
            as_run.append(probe_logits(load_adapter(load_base(source.model), adapter), probes))
    against = largest_difference(*as_run) / deviation(as_run[0])
    proofs = prove_against_exact(folder, source, merging.entries, exact, named="base + delta")
    return [
        *prove_text(folder, source),
        *proofs,
        proof("logits on the run's base against the run's", against, proofs[0].limit),
    ]


def prove_against_exact(
    folder: Path, source: Source, entries: Sequence[TensorEntry], exact: Exact, *, named: str
) -> list[Proof]:
    """Plain PEFT with the folder computes what the base's tensors with these exact values compute, in float32."""
    probes = probes_of(source)
    base = layerwise_logits(source, probes, entries=None, exact=lambda entry, tensor: tensor)
    wanted = layerwise_logits(source, probes, entries=entries, exact=exact)
    to = torch.float16 if source.base.facts.stored_dtype == "F16" else torch.bfloat16
    rounded = layerwise_logits(source, probes, entries=entries, exact=lambda entry, tensor: exact(entry, tensor).to(to))
    logits = plain_peft_logits(folder, source, probes)
    effect, missed = rms_difference(wanted, base), rms_difference(logits, wanted)
    largest = largest_difference(logits, wanted) / deviation(wanted)
    return [
        proof(f"logits with plain peft against {named}", largest, fine_limit(source.base.facts, rounded, wanted)),
        proof("no-op", missed / effect if effect else math.inf, NO_OP_LIMIT),
    ]


def probes_of(source: Source) -> list[list[int]]:
    """Token ids of the probe conversations, not longer than a proof's."""
    return [ids[:PROBE_TOKENS] for ids in source.probe_ids()]


def plain_peft_logits(folder: Path, source: Source, probes: Sequence[list[int]]) -> Logits:
    """What PEFT computes in float32 with the base as stored."""
    loaded = load_adapter(load_plain(source.base.facts.folder, source.model.device), folder)
    return probe_logits(loaded, probes, keep=positions_compared(len(probes), source.base.facts.vocabulary))


def layerwise_logits(
    source: Source, probes: Sequence[list[int]], *, entries: Sequence[TensorEntry] | None, exact: Exact
) -> Logits:
    """What the base's model computes in float32 with other values; one layer in memory at a time, without PEFT."""

    def read(wanted: Sequence[TensorEntry]) -> Iterator[tuple[TensorEntry, torch.Tensor]]:
        for entry, tensor in read_tensors(wanted):
            yield entry, exact(entry, tensor)

    # A head among the entries is the head's, whether or not the base's config says that it is tied.
    model = LayerwiseModel(source.base.facts.folder, entries=entries, read=read, device=source.model.device)
    return [found.cpu() for found in model.logits(probe_passes(probes, vocabulary=source.base.facts.vocabulary))]
