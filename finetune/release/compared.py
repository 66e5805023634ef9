"""What the models of a proof compute: base + adapter, the release and the model as trained."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import torch

from finetune.base import BaseFacts, TensorEntry, read_tensor_entries
from finetune.data.examples import Example
from finetune.machine import GIB, probe_machine
from finetune.model.adapter import load_adapter
from finetune.model.delta import quantized_weights
from finetune.model.load import load_base
from finetune.release.delta import Onto
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
from finetune.release.merging import make_merging
from finetune.release.parts import Read
from finetune.release.routes import Route
from finetune.release.source import Source
from finetune.release.stored_names import read_stored_names
from finetune.release.weights import read_tensors
from finetune.train.trainer import autocast, mean_loss

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

    `routes` is empty for a model that chooses no experts; `effect` is what the adapter changes in the logits, root mean
    square; `greedy_gap` how far it is from writing the release's answers, see measure.greedy_gap.
    """

    logits: Logits
    on_routes: Logits
    routes: list[Route]
    effect: float
    greedy_gap: float


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
    is_routed = any(route.rated for route in released.routes)
    bound = probe_passes(probes, vocabulary=facts.vocabulary, follow=released.routes) if is_routed else []
    answers = answer_passes(released.answers)
    given = model.logits([*base, *free, *bound, *answers])
    alone = [found.cpu() for found in islice(given, len(base))]
    logits = [found.cpu() for found in islice(given, len(free))]
    effect = rms_difference(logits, alone)
    del alone
    on_routes = [found.cpu() for found in islice(given, len(bound))] if bound else logits
    gap = greedy_gap(released.answers, given)
    return Chosen(logits, on_routes, [one.route for one in [*bound, *answers] if is_routed], effect, gap)


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


def _count_differing(model: torch.nn.Module, source: Source, onto: Onto) -> int:
    """How many of the dequantised weights are not those that the trained model holds, one linear at a time."""
    folder = source.base.facts.folder
    names = {f"{linear.module}.weight" for linear in source.base.facts.linears}
    stored = list(read_tensor_entries(folder))
    entries = {entry.name: entry for entry in stored if entry.name in names}
    renamed = read_stored_names(folder, stored).renamed
    differing, held = 0, set()
    for module, weight in quantized_weights(model):
        name = renamed.get(f"{module}.weight", f"{module}.weight")
        held.add(name)
        if name in entries:
            ((_, tensor),) = read_tensors([entries[name]])
            differing += int((weight.cpu() != onto.weight(tensor)).sum())
    return differing + len(held ^ entries.keys())
