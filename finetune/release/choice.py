"""Which base to merge onto: a run in, the candidate with the lower loss and both figures out."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from finetune.base import TensorEntry
from finetune.errors import Problem, UserError
from finetune.release.layerwise import LayerwiseModel
from finetune.release.measure import loss_passes, loss_stretches, mean_loss_of
from finetune.release.merging import Merging, make_merging
from finetune.release.parts import Read
from finetune.release.proof import make_onto
from finetune.release.source import Source
from finetune.release.weights import read_tensors

Progress = Callable[[str], None]
ONTO = ("auto", "original", "dequantized")


@dataclass(frozen=True)
class Choice:
    """Which base values were merged onto, why, and the losses that decided, in nats a supervised token."""

    asked: str
    chosen: str
    reason: str
    scores: Mapping[str, float]
    rows: int
    rows_from: str | None

    def to_json(self) -> dict[str, Any]:
        return {**vars(self), "scores": dict(self.scores)}


def choose_onto(source: Source, asked: str, *, progress: Progress = lambda line: None) -> Choice:
    """Measure both candidates as they would be published, and take the one with the lower loss.

    Raises:
        UserError: `asked` is none of auto, original, dequantized.
    """
    if asked not in ONTO:
        raise UserError(Problem("--onto", f"{asked!r} is not possible; write one of {', '.join(ONTO)}"))
    if source.model.quantization == "none":
        return Choice(asked, "original", "the run did not quantise its base", {}, 0, None)
    if asked != "auto":
        return Choice(asked, asked, "as asked", {}, 0, None)
    rows = source.rows
    if not rows.examples:
        return Choice(asked, "original", f"could not be measured, rows to score on: {rows.origin}", {}, 0, None)
    progress(f"scoring two candidates on {len(rows.examples)} {rows.origin}")
    scores = score_candidates(source)
    best = min(scores, key=lambda name: scores[name])
    reason = f"loss {scores[best]:.4f} over {len(rows.examples)} {rows.origin}, against {max(scores.values()):.4f}"
    return Choice(asked, best, reason, scores, len(rows.examples), rows.origin)


def score_candidates(source: Source) -> dict[str, float]:
    """Mean loss over the source's rows of each candidate, rounded as published, computed in float32 layer by layer."""
    stretches = loss_stretches(source.rows.examples, device=source.model.device)
    scores = {}
    for name in ("original", "dequantized"):
        merging = make_merging(source, make_onto(source, name))
        model = LayerwiseModel(
            source.base.facts.folder, entries=merging.entries, read=read_merged(merging), device=source.model.device
        )
        scores[name] = mean_loss_of(stretches, model.logits(loss_passes(stretches)))
    return scores


def read_merged(merging: Merging) -> Read:
    """Read the tensors of a release that was never written."""

    def read(entries: Sequence[TensorEntry]) -> Iterator[tuple[TensorEntry, torch.Tensor]]:
        for entry, tensor in read_tensors(entries):
            yield entry, merging.tuned(entry, tensor)

    return read
