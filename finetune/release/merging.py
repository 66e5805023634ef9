"""What a merge makes of each tensor: a run and the chosen values of its base in; a release's tensors out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from finetune.base import BaseFacts, TensorEntry
from finetune.model.experts import FOUR_BITS, quantized_expert_tensors
from finetune.release.changes import read_changes, release_entries
from finetune.release.delta import Change, Onto, round_tuned
from finetune.release.source import Source


@dataclass(frozen=True)
class Merging:
    """The tensors of a release, each where its base values lie, and what becomes of them."""

    entries: Sequence[TensorEntry]
    changes: Mapping[str, Change]  # by stored name
    quantized: frozenset[str]  # the linears' weights, if the run computed with other values than those stored
    onto: Onto

    @property
    def rounded(self) -> frozenset[str]:
        """The tensors that a release holds computed and rounded; all others are the base's bytes."""
        return self.quantized | frozenset(self.changes)

    def meets(self, entry: TensorEntry, tensor: torch.Tensor) -> torch.Tensor:
        """The values of a stored tensor that a change is added to."""
        return self.onto.weight(tensor) if entry.name in self.quantized else tensor

    def tuned(self, entry: TensorEntry, tensor: torch.Tensor) -> torch.Tensor:
        """A tensor as the release holds it."""
        if entry.name not in self.rounded:
            return tensor
        return round_tuned(self.meets(entry, tensor), self.changes.get(entry.name), dtype=tensor.dtype)


def make_merging(source: Source, onto: Onto) -> Merging:
    """What the run's adapter makes of its base.

    Raises:
        UserError: the adapter cannot be merged, or does not fit the base.
        StorageError: a damaged file.
    """
    folder = source.base.facts.folder
    changes = read_changes(source.adapter, folder)
    is_quantized = onto.name == "dequantized" and onto.quantization != "none"
    quantized = quantized_tensors(source.base.facts, onto.quantization) if is_quantized else frozenset()
    return Merging(release_entries(folder, changes), changes, quantized, onto)


def quantized_tensors(facts: BaseFacts, quantization: str) -> frozenset[str]:
    """The stored names of what a run computes with in fewer bits than the files hold."""
    linears = frozenset(f"{linear.module}.weight" for linear in facts.linears)
    return linears | quantized_expert_tensors(facts.folder) if quantization in FOUR_BITS else linears
