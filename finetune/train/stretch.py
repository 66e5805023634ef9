"""The input of one pass: examples laid end to end without padding; what several of them begin with, only once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch

from finetune.data.examples import Example

SHORTEST_PREFIX = 8  # tokens; for fewer the detour is not worth it

# T = tokens of the stretch, S = supervised tokens


@dataclass(frozen=True)
class Stretch:
    """Examples end to end, without padding: a row of documents.

    Every example is a document, or a document that continues another: `document_prefixes` names for each document the
    one it continues, or -1. A document that is continued is what several examples begin with. An example ends before
    its last learned token, which is predicted, and nothing sees it: that one and what follows it are not computed.

    The token at `predicting_S[i]` predicts `target_S[i]`; both belong to the same example, so no example's loss depends
    on another's tokens. `target_S` is in the order of the examples. A shared position predicts once for each example
    that learns what follows it: `predicting_S` may repeat itself, and need not ascend.
    """

    input_ids_1T: torch.Tensor
    position_ids_1T: torch.Tensor
    document_lengths: list[int]
    document_prefixes: list[int]
    predicting_S: torch.Tensor
    target_S: torch.Tensor

    @property
    def tokens(self) -> int:
        """How many tokens are computed; shared ones count once."""
        return self.input_ids_1T.shape[1]

    @property
    def inputs(self) -> dict[str, Any]:
        """What the model's forward takes of it, by keyword; of prefixes it hears where there are some."""
        shared = {"document_prefixes": self.document_prefixes} if max(self.document_prefixes) >= 0 else {}
        return {
            "input_ids": self.input_ids_1T,
            "position_ids": self.position_ids_1T,
            "document_lengths": self.document_lengths,
            **shared,
        }


class Document(NamedTuple):
    """Tokens `start` to `stop` of an example; `prefix` is the document that holds the tokens before `start`, or -1."""

    example: int
    start: int
    stop: int
    prefix: int


class Beginning(NamedTuple):
    """`tokens` that an example shares with others, of which `first` is the first; 0 if it shares none."""

    first: int
    tokens: int


def lay_end_to_end(
    examples: Sequence[Example], *, device: str | torch.device = "cpu", share_prefixes: bool = False
) -> Stretch:
    """One stretch of all examples, positions starting at 0 in each.

    With `share_prefixes`, what several examples begin with is laid once. That changes no loss of a model that draws
    nothing by chance and in which tokens meet in an attention that follows `document_prefixes`, and nowhere else.
    """
    alone = [Beginning(number, 0) for number in range(len(examples))]
    seen = [_tokens_seen(example) for example in examples]
    ids = [example.ids[:count] for example, count in zip(examples, seen, strict=True)]
    documents = _documents(seen, shared_beginnings(ids) if share_prefixes else alone)
    lengths = [document.stop - document.start for document in documents]
    starts = np.cumsum([0, *lengths])
    places = [np.arange(start, start + length) for start, length in zip(starts, lengths, strict=False)]
    predicting, targets = [], []
    for place, document in zip(places, documents, strict=True):
        if document.stop < seen[document.example]:
            continue  # a prefix; it predicts as a part of every example that continues it
        example = examples[document.example]
        whole = place if document.prefix < 0 else np.concatenate([places[document.prefix], place])
        learned = np.flatnonzero(example.learned[1:])  # nothing predicts a first token
        predicting.append(whole[learned])
        targets.append(example.ids[learned + 1])

    def tensor(pieces: Sequence[np.ndarray]) -> torch.Tensor:
        return torch.from_numpy(np.concatenate(pieces).astype(np.int64)).to(device)

    return Stretch(
        input_ids_1T=tensor([examples[d.example].ids[d.start : d.stop] for d in documents])[None],
        position_ids_1T=tensor([np.arange(d.start, d.stop) for d in documents])[None],
        document_lengths=lengths,
        document_prefixes=[document.prefix for document in documents],
        predicting_S=tensor(predicting),
        target_S=tensor(targets),
    )


def _tokens_seen(example: Example) -> int:
    """How many tokens of an example anything is computed from: those before the last learned one, at least one."""
    learned = np.flatnonzero(example.learned)
    return max(1, int(learned[-1])) if len(learned) else 1


def _documents(tokens: Sequence[int], beginnings: Sequence[Beginning]) -> list[Document]:
    """The examples, of so many tokens, in their order, each beginning before the first example that continues it."""
    documents: list[Document] = []
    prefixes: dict[int, int] = {}
    for number, (stop, (first, shared)) in enumerate(zip(tokens, beginnings, strict=True)):
        if shared and first == number:
            prefixes[number] = len(documents)
            documents.append(Document(number, 0, shared, -1))
        documents.append(Document(number, shared, stop, prefixes[first] if shared else -1))
    return documents


def shared_beginnings(ids: Sequence[np.ndarray]) -> list[Beginning]:
    """For every example the beginning it shares; as many tokens as possible are saved.

    Sorted, examples that begin alike are neighbours: the best way to cut that row into groups is found from its start
    on. At least one token of every example stays its own.
    """
    order = sorted(range(len(ids)), key=lambda number: ids[number].astype(">u4").tobytes())
    common = np.array([_common_tokens(ids[a], ids[b]) for a, b in zip(order, order[1:], strict=False)], np.int64)
    saved = np.zeros(len(ids) + 1, np.int64)  # of the first examples in that order
    cuts = [0]  # where the last group of the first examples begins
    for end in range(1, len(ids) + 1):
        beginning = np.append(np.minimum.accumulate(common[: end - 1][::-1])[::-1], 0)
        beginning[beginning < SHORTEST_PREFIX] = 0
        gain = saved[:end] + beginning * np.arange(end - 1, -1, -1)
        cuts.append(int(end - 1 - np.argmax(gain[::-1])))  # of equal ones the smallest group
        saved[end] = gain[cuts[-1]]
    beginnings = [Beginning(number, 0) for number in range(len(ids))]
    end = len(ids)
    while end:
        group = order[cuts[end] : end]
        if len(group) > 1:
            tokens = int(common[cuts[end] : end - 1].min())
            for number in group:
                beginnings[number] = Beginning(min(group), tokens)
        end = cuts[end]
    return beginnings


def _common_tokens(one: np.ndarray, other: np.ndarray) -> int:
    """How many tokens both begin with, short of the whole of either."""
    limit = min(len(one), len(other)) - 1
    different = np.flatnonzero(one[:limit] != other[:limit])
    return int(different[0]) if len(different) else limit
