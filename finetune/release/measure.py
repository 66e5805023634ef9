"""What a model says, layer by layer: passes for probes, rows and answers in; logits, loss and greedy answers out."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from transformers import DynamicCache

from finetune.data.examples import Example
from finetune.layout import cut_into_passes
from finetune.release.layerwise import LayerwiseModel, Pass
from finetune.release.routes import Route, joined
from finetune.train.loss import Stretch, lay_end_to_end

POSITIONS = 32  # per probe, its last ones
LOGITS_BYTES = 1 << 28  # of all probes together; with a large vocabulary fewer positions of each are compared
TOKENS_PER_PASS = 2048


@dataclass(frozen=True)
class Answer:
    """A prompt, the tokens a model wrote after it, and its route through both."""

    prompt: list[int]
    written: list[int]
    route: Route


def positions_compared(probes: int, vocabulary: int) -> int:
    """Of how many last positions of each probe logits are kept."""
    return max(1, min(POSITIONS, LOGITS_BYTES // (4 * vocabulary * max(1, probes))))


def probe_passes(
    probes: Sequence[Sequence[int]], *, vocabulary: int, adapted: bool = True, follow: Sequence[Route] | None = None
) -> list[Pass]:
    """One pass a probe, for the logits at its last positions; with `follow`, on these routes."""
    keep = positions_compared(len(probes), vocabulary)
    routes = [None] * len(probes) if follow is None else follow
    return [
        Pass(torch.tensor([list(ids)]), keep, adapted, follow=route) for ids, route in zip(probes, routes, strict=True)
    ]


def probe_logits(
    model: torch.nn.Module, probes: Sequence[Sequence[int]], *, keep: int = POSITIONS
) -> list[torch.Tensor]:
    """Logits [positions, vocabulary] of a whole model at the last positions of every probe, float32, on the CPU."""
    model.eval()
    device = next(model.parameters()).device
    with torch.no_grad():
        return [
            model(input_ids=torch.tensor([list(ids)], device=device), use_cache=False, logits_to_keep=keep)
            .logits[0]
            .float()
            .cpu()
            for ids in probes
        ]


def loss_stretches(rows: Sequence[Example], *, device: str) -> list[Stretch]:
    """The rows end to end, in stretches of TOKENS_PER_PASS."""
    groups = cut_into_passes([row.tokens for row in rows], tokens_per_pass=TOKENS_PER_PASS)
    return [lay_end_to_end([rows[index] for index in group], device=device) for group in groups]


def loss_passes(stretches: Sequence[Stretch]) -> list[Pass]:
    """One pass a stretch, for the logits that predict a supervised token."""
    return [
        Pass(
            stretch.input_ids_1T,
            stretch.predicting_S,
            more={"position_ids": stretch.position_ids_1T, "document_lengths": stretch.document_lengths},
        )
        for stretch in stretches
    ]


def mean_loss_of(stretches: Sequence[Stretch], logits: Iterator[torch.Tensor]) -> float:
    """Mean cross entropy in nats over all supervised tokens; takes one item of `logits` a stretch."""
    sums = []
    for stretch in stretches:
        losses = F.cross_entropy(next(logits).float(), stretch.target_S, reduction="none")
        sums.append(losses.double().sum().item())
    return math.fsum(sums) / sum(stretch.target_S.numel() for stretch in stretches)


def greedy_answers(
    model: LayerwiseModel, prompts: Sequence[Sequence[int]], *, tokens: int, stops: Sequence[int]
) -> list[Answer]:
    """What the model writes if it always takes the likeliest token, up to a stop token; all prompts move together."""
    caches = [DynamicCache(config=model.config) for _ in prompts]
    written: list[list[int]] = [[] for _ in prompts]
    routes: list[list[Route]] = [[] for _ in prompts]
    going = list(range(len(prompts)))
    for step in range(tokens):
        inputs = {index: written[index][-1:] if step else list(prompts[index]) for index in going}
        passes = [Pass(torch.tensor([ids]), keep=1, cache=caches[index]) for index, ids in inputs.items()]
        for index, one, logits_1V in zip(inputs, passes, model.logits(passes), strict=True):
            routes[index].append(one.route)
            written[index].append(int(logits_1V[0].argmax()))
        going = [index for index in going if written[index][-1] not in stops]
    return [
        Answer(list(prompt), answer, joined(parts))
        for prompt, answer, parts in zip(prompts, written, routes, strict=True)
    ]


def answer_passes(answers: Sequence[Answer]) -> list[Pass]:
    """One pass an answer on its own route, for the logits that would choose its tokens."""
    return [
        Pass(torch.tensor([answer.prompt + answer.written[:-1]]), keep=len(answer.written), follow=answer.route)
        for answer in answers
    ]


def greedy_gap(answers: Sequence[Answer], logits: Iterator[torch.Tensor]) -> float:
    """0 where a model would write the same answers; takes one item of its `logits` an answer.

    Else the largest gap, at the first difference of an answer, between the logits that it gives to its own token and
    to the answer's.
    """
    largest = 0.0
    for answer in answers:
        own_AV = next(logits).cpu()
        written_A = torch.tensor(answer.written)
        differing = (own_AV.argmax(dim=1) != written_A).nonzero()
        if len(differing):
            place = int(differing[0])
            largest = max(largest, (own_AV[place].max() - own_AV[place, written_A[place]]).item())
    return largest


def largest_difference(some: Sequence[torch.Tensor], others: Sequence[torch.Tensor]) -> float:
    """Of any two logits at the same place."""
    return max((a - b).abs().max().item() for a, b in zip(some, others, strict=True))


def rms_difference(some: Sequence[torch.Tensor], others: Sequence[torch.Tensor]) -> float:
    """Root mean square over all places."""
    squares = [(a - b).double().square().sum().item() for a, b in zip(some, others, strict=True)]
    return math.sqrt(math.fsum(squares) / sum(a.numel() for a in some))


def deviation(logits: Sequence[torch.Tensor]) -> float:
    """Standard deviation of all logits together."""
    count = sum(found.numel() for found in logits)
    mean = math.fsum(found.double().sum().item() for found in logits) / count
    return math.sqrt(math.fsum((found.double() - mean).square().sum().item() for found in logits) / count)


def mean_divergence(some: Sequence[torch.Tensor], others: Sequence[torch.Tensor]) -> float:
    """Kullback-Leibler divergence of the next-token distributions, others from some, in nats, mean over positions."""
    sums, positions = [], 0
    for a, b in zip(some, others, strict=True):
        log_p, log_q = (logits.double().log_softmax(dim=-1) for logits in (a, b))
        sums.append((log_p.exp() * (log_p - log_q)).sum().item())
        positions += a.shape[0]
    return math.fsum(sums) / positions
