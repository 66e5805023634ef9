"""What the models of a proof compute: base + adapter, its exact and rounded sums, the release, the model as trained."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import chain, islice
from pathlib import Path

import torch

from finetune.base import BaseFacts, TensorEntry, read_tensor_entries
from finetune.data.examples import Example
from finetune.machine import GIB, probe_machine
from finetune.model.adapter import load_adapter
from finetune.model.delta import quantized_weights
from finetune.model.experts import held_experts
from finetune.model.load import load_base
from finetune.model.stored_names import read_stored_names
from finetune.release.delta import Onto, round_tuned
from finetune.release.layerwise import LayerwiseModel
from finetune.release.measure import (
    TOKENS_PER_PASS,
    Answer,
    answer_passes,
    greedy_answers,
    greedy_gap,
    loss_passes,
    loss_stretches,
    mean_loss_of,
    positions_compared,
    probe_logits,
    probe_passes,
    rms_difference,
)
from finetune.release.merging import Merging, make_merging, quantized_tensors
from finetune.release.parts import Read
from finetune.release.routes import Route
from finetune.release.source import Source
from finetune.release.weights import read_tensors
from finetune.train.held_out import autocast, mean_loss

GREEDY_TOKENS = 24
GREEDY_TOKENS_AT_LEAST = 4
GREEDY_BYTES = 64 * 10**9  # of weights read to write them: each token reads all of them once
# Of this computer's memory: a base that takes less in float32 stays there while the greedy answers are written.
KEPT_SHARE = 0.15

Logits = list[torch.Tensor]  # of each probe [positions, vocabulary]


@dataclass(frozen=True)
class Released:
    """The release, as any transformers user computes with it in float32: logits, routes, loss and greedy answers."""

    logits: Logits
    routes: list[Route]
    loss: float | None
    answers: list[Answer]


@dataclass(frozen=True)
class Chosen:
    """The chosen base with its adapter: logits by itself and on the release's routes, and how it followed these.

    `own_routes` are its own; `routes` is empty for a model that chooses no experts; `effect` is what the adapter
    changes in the logits, root mean square; `greedy_gap` how far it is from writing the release's answers, see
    measure.greedy_gap.
    """

    logits: Logits
    on_routes: Logits
    own_routes: list[Route]
    routes: list[Route]
    effect: float
    greedy_gap: float


@dataclass(frozen=True)
class Summed:
    """The base with the merge's sums for weights, not yet rounded, without PEFT and without the release's files.

    Logits on the own routes of base + adapter and on the release's, and how it followed each. `rounded`: on the
    release's routes with each sum rounded once, as the base is stored; to bfloat16 where that is in float32.
    """

    logits: Logits
    on_routes: Logits
    rounded: Logits
    own_routes: list[Route]
    routes: list[Route]
    rounded_routes: list[Route]


def greedy_tokens(facts: BaseFacts) -> int:
    """How many tokens of each greedy answer are compared: fewer of a large model, see GREEDY_BYTES."""
    return max(GREEDY_TOKENS_AT_LEAST, min(GREEDY_TOKENS, GREEDY_BYTES // facts.stored_bytes))


def compute_released(
    folder: Path, source: Source, probes: Sequence[list[int]], prompts: Sequence[list[int]], rows: Sequence[Example]
) -> Released:
    """From the release's files alone, but for the run's probes, prompts, rows and stop tokens.

    The release writes the answers, not base + adapter: to read its weights for each token costs least.
    """
    facts = source.base.facts
    model = LayerwiseModel(folder, device=source.model.device)
    stretches = loss_stretches(rows, device=source.model.device)
    passes = probe_passes(probes, vocabulary=facts.vocabulary)
    given = model.logits([*passes, *loss_passes(stretches)])
    logits = [found.cpu() for found in islice(given, len(passes))]
    loss = mean_loss_of(stretches, given) if rows else None
    model.parts.keeps = 4 * facts.parameters < KEPT_SHARE * probe_machine().memory_gib * GIB
    answers = greedy_answers(model, prompts, tokens=greedy_tokens(facts), stops=source.stop_token_ids)
    return Released(logits, [one.route for one in passes], loss, answers)


def compute_chosen(source: Source, onto: Onto, probes: Sequence[list[int]], released: Released) -> Chosen:
    """With the base's weights as the deltas meet them and the adapter beside them, in float32; each is read once."""
    facts = source.base.facts
    model = LayerwiseModel(
        facts.folder, read=read_chosen(source, onto), adapter=source.adapter, device=source.model.device
    )
    base = probe_passes(probes, vocabulary=facts.vocabulary, adapted=False)
    free = probe_passes(probes, vocabulary=facts.vocabulary)
    bound = probe_passes(probes, vocabulary=facts.vocabulary, follow=released.routes) if is_routed(released) else []
    answers = answer_passes(released.answers)
    given = model.logits([*base, *free, *bound, *answers])
    alone = [found.cpu() for found in islice(given, len(base))]
    logits = [found.cpu() for found in islice(given, len(free))]
    effect = rms_difference(logits, alone)
    del alone
    on_routes = [found.cpu() for found in islice(given, len(bound))] if bound else logits
    gap = greedy_gap(released.answers, given)
    own, taken = ([one.route for one in passes] for passes in (free, bound))
    return Chosen(logits, on_routes, own, taken, effect, gap)


def compute_summed(
    source: Source, onto: Onto, probes: Sequence[list[int]], released: Released, own_routes: Sequence[Route]
) -> Summed:
    """In float32; `own_routes` are those that base + adapter chose by itself."""
    merging = make_merging(source, onto)
    facts, vocabulary = source.base.facts, source.base.facts.vocabulary
    exact, rounded = (
        LayerwiseModel(
            facts.folder, entries=merging.entries, read=_read_summed(merging, dtype), device=source.model.device
        )
        for dtype in (torch.float32, torch.bfloat16 if facts.stored_dtype == "F32" else None)
    )
    follow = released.routes if is_routed(released) else None
    own = probe_passes(probes, vocabulary=vocabulary, follow=own_routes if follow else None)
    bound = probe_passes(probes, vocabulary=vocabulary, follow=follow) if follow else []
    given = exact.logits([*own, *bound])
    logits = [found.cpu() for found in islice(given, len(own))]
    on_routes = [found.cpu() for found in given] if bound else logits
    last = probe_passes(probes, vocabulary=vocabulary, follow=follow)
    values = [found.cpu() for found in rounded.logits(last)]
    return Summed(logits, on_routes, values, *([one.route for one in passes] for passes in (own, bound, last)))


def is_routed(released: Released) -> bool:
    """Whether the model chooses experts."""
    return any(route.rated for route in released.routes)


def compute_trained(
    source: Source, onto: Onto, probes: Sequence[list[int]], rows: Sequence[Example]
) -> tuple[Logits, float | None, int]:
    """Logits and loss of the base as trained with the adapter, and how many weights it holds that `onto` does not.

    A quantised base is loaded whole: it was in memory to train, and takes no more now.
    """
    plan, vocabulary = source.model, source.base.facts.vocabulary
    if plan.quantization == "none":
        model = LayerwiseModel(
            source.base.facts.folder,
            adapter=source.adapter,
            device=plan.device,
            dtype=getattr(torch, plan.dtype),
            attention=plan.attention,
        )
        stretches = loss_stretches(rows, device=plan.device)
        with autocast(plan.device, plan.dtype):
            given = model.logits([*probe_passes(probes, vocabulary=vocabulary), *loss_passes(stretches)])
            logits = [found.cpu() for found in islice(given, len(probes))]
            return logits, mean_loss_of(stretches, given) if rows else None, 0
    whole = load_adapter(load_base(plan), source.adapter)
    with torch.no_grad(), autocast(plan.device, plan.dtype):
        logits = probe_logits(whole, probes, keep=positions_compared(len(probes), vocabulary))
        loss = mean_loss(whole, rows, tokens_per_pass=TOKENS_PER_PASS) if rows else None
    return logits, loss, _count_differing(whole, source, onto) if onto.name == "dequantized" else 0


def read_chosen(source: Source, onto: Onto) -> Read:
    """Read the base's tensors as the deltas meet them."""
    merging = make_merging(source, onto)

    def read(entries: Sequence[TensorEntry]) -> Iterator[tuple[TensorEntry, torch.Tensor]]:
        for entry, tensor in read_tensors(entries):
            yield entry, merging.meets(entry, tensor)

    return read


def _read_summed(merging: Merging, dtype: torch.dtype | None) -> Read:
    """Read the tensors of a release that was never written, with the changed ones rounded to `dtype`, or as stored."""

    def read(entries: Sequence[TensorEntry]) -> Iterator[tuple[TensorEntry, torch.Tensor]]:
        for entry, tensor in read_tensors(entries):
            if entry.name in merging.rounded:
                change = merging.changes.get(entry.name)
                yield entry, round_tuned(merging.meets(entry, tensor), change, dtype=dtype or tensor.dtype)
            else:
                yield entry, tensor

    return read


def _count_differing(model: torch.nn.Module, source: Source, onto: Onto) -> int:
    """How many of the dequantised weights are not those that the trained model holds, one linear at a time."""
    folder = source.base.facts.folder
    names = quantized_tensors(source.base.facts, onto.quantization)
    stored = list(read_tensor_entries(folder))
    entries = {entry.name: entry for entry in stored if entry.name in names}
    renamed = read_stored_names(folder, stored).renamed
    differing, held = 0, set()
    linears = ((f"{module}.weight", weight) for module, weight in quantized_weights(model))
    linears_by_stored_name = ((renamed.get(parameter, parameter), weight) for parameter, weight in linears)
    for name, weight in chain(linears_by_stored_name, held_experts(model)):
        held.add(name)
        if name in entries:
            ((_, tensor),) = read_tensors([entries[name]])
            differing += int((weight.cpu() != onto.weight(tensor)).sum())
    return differing + len(held ^ entries.keys())
