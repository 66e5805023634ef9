"""Show rows as the model sees them: prepared data and a row or a step in, text, tokens and labels out."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np

from finetune.data.account import later_copies
from finetune.data.encoder import Encoder
from finetune.data.examples import TracedExample
from finetune.data.labelling import label_rows, make_reading
from finetune.data.passes import Step, passes_of_steps
from finetune.data.pool import Examples
from finetune.data.prepare import PreparedData
from finetune.data.rows import DUPLICATE, LEAKED, Refusal
from finetune.data.sources import read_rows
from finetune.data.store import StoredRows
from finetune.data.trace import trace
from finetune.errors import Problem, UserError
from finetune.plan import TrainPlan

SPLITS = ("train", "eval")


@dataclass(frozen=True)
class Piece:
    """A stretch of a row's text; `token` counts the example's tokens, None for what was cut or has no token."""

    text: str
    token: int | None


@dataclass(frozen=True)
class ShownRow:
    """One example with its text, and where it goes: split is train, eval, duplicate or leaked (neither is used)."""

    traced: TracedExample = field(repr=False)
    split: str
    format: str
    template: str
    loss_on: str
    special_ids: frozenset[int] = field(repr=False)
    names: tuple[str, ...] = field(repr=False)  # each token as the vocabulary writes it

    @property
    def where(self) -> str:
        return self.traced.example.where

    def pieces(self) -> Iterator[Piece]:
        """The row's whole text, in order: the new characters of each token, and what was cut or has no token."""
        text, position, token = self.traced.text, 0, 0
        for (start, end), kept in zip(self.traced.offsets.tolist(), self.traced.kept.tolist(), strict=True):
            if start > position:
                yield Piece(text[position:start], None)
                position = start
            yield Piece(text[position:end], token if kept else None)  # empty for the further bytes of one character
            token += kept
            position = max(position, end)
        if position < len(text):
            yield Piece(text[position:], None)

    def is_control(self, token: int) -> bool:
        return int(self.traced.example.ids[token]) in self.special_ids

    @cached_property
    def literal_tokens(self) -> frozenset[int]:
        """The tokens of a row's own text that only reads like a control token."""
        starts, ends = self.traced.offsets[self.traced.kept].T
        return frozenset(
            int(token)
            for since, until in self.traced.literals
            for token in np.flatnonzero((starts < until) & (ends > since))
        )

    def turns(self) -> list[dict[str, Any]]:
        """Who speaks in which order, and whether any of it is learned."""
        turns = self.traced.conversation.turns
        return [{"role": turn.role, "learned": self._is_learned(index)} for index, turn in enumerate(turns)]

    def _is_learned(self, index: int) -> bool:
        turns = self.traced.conversation.turns
        answers = [number for number, turn in enumerate(turns) if turn.role == "assistant" and turn.train]
        if self.loss_on == "everything":  # what follows the last learned answer nobody has to say
            return index in answers or (turns[index].role != "assistant" and index < max(answers))
        return index in answers and (self.loss_on == "assistant" or index == len(turns) - 1)

    def to_json(self) -> dict[str, Any]:
        example = self.traced.example
        return {
            "text": self.traced.text,
            "ids": example.ids.tolist(),
            "labels": example.labels.tolist(),
            "pieces": [piece.text for piece in self.pieces() if piece.token is not None],
            "supervised_text": self.traced.supervised_text,
            "source": self.where,
            "split": self.split,
            "format": self.format,
            "template": self.template,
            "turns": self.turns(),
            "literals": [list(span) for span in self.traced.literals],
            "supervised_tokens": example.supervised_tokens,
            "straddling_tokens": self.traced.straddling_tokens,
            "cut_tokens": example.cut_tokens,
        }


@dataclass(frozen=True)
class ShownPass:
    """One forward and backward pass: its rows, of `count`, and how much of tokens_per_pass they fill."""

    rows: tuple[ShownRow, ...]
    count: int
    tokens: int
    tokens_per_pass: int

    @property
    def share(self) -> float:
        return self.tokens / self.tokens_per_pass

    def to_json(self) -> dict[str, Any]:
        return {"tokens": self.tokens, "share": round(self.share, 4), "rows": [row.to_json() for row in self.rows]}


@dataclass(frozen=True)
class ShownStep:
    """One optimizer step, counted from 1, as it is laid out into passes."""

    number: int
    passes: tuple[ShownPass, ...]

    def to_json(self) -> dict[str, Any]:
        return {
            "step": self.number,
            "tokens_per_pass": self.passes[0].tokens_per_pass,
            "passes": [each.to_json() for each in self.passes],
        }


def find_row(prepared: PreparedData, row: str, *, split: str | None = None) -> ShownRow:
    """The row of a number or of file:line; `split` says that it must be a training or a held-out one.

    Numbers count the records of data.train (with split eval: of its own source, if it has one) from 0 as they were
    read, before any is dropped or held out.

    Raises:
        UserError: there is no such row, it cannot be trained on, or it is in the other split.
    """
    if split not in (None, *SPLITS):
        raise UserError(Problem("--split", f"{split!r} is not possible; write train or eval"))
    wanted = int(row) if row.isdecimal() else row
    counts_eval = isinstance(wanted, int) and split == "eval"
    found = trace(prepared.section, prepared.base, prepared.template, wanted, eval_source=counts_eval)
    if isinstance(found, Refusal):
        fate = "dropped" if found.reason in prepared.section.dropped_reasons else "refused"
        error = UserError(Problem("--row", f"{found.where} is {fate}, {found.reason}: {found.message}"))
        error.answer = {"source": found.where, "split": fate, "reason": found.reason}
        raise error
    splits = _splits_of(prepared, found.example.where)
    if split is not None and split not in splits:
        cure = f"write --split {splits[0]}" if splits[0] in SPLITS else "leave --split out"
        raise UserError(Problem("--row", f"{found.example.where} is in the other split, {splits[0]}; {cure}"))
    return _Shower(prepared).show(found, split or splits[0])


def find_step(prepared: PreparedData, plan: TrainPlan, number: int) -> ShownStep:
    """Every example of an optimizer step, counted from 1, as it is laid out into passes.

    Raises:
        UserError: the run has no such step.
    """
    if not 1 <= number <= plan.steps:
        message = f"there is no step {number}; the run has {plan.steps:,} steps, counted from 1"
        raise UserError(Problem("--step", message))
    passes = passes_of_steps(plan, prepared.train.tokens, steps=number)[-1]
    return next(shown_steps(prepared, plan, [passes], first=number))


def shown_steps(
    prepared: PreparedData, plan: TrainPlan, steps: Sequence[Step], *, first: int = 1, rows: int | None = None
) -> Iterator[ShownStep]:
    """Steps given as passes of example numbers, the first so many rows of them with their text."""
    budget = sum(map(len, (each for passes in steps for each in passes))) if rows is None else rows
    numbers = [number for passes in steps for each in passes for number in each][:budget]
    texts = show_rows(prepared, prepared.train, numbers, split="train")
    for index, passes in enumerate(steps):
        shown = []
        for each in passes:
            some, budget = each[:budget], max(0, budget - len(each))
            tokens = int(prepared.train.tokens[each].sum())
            shown.append(ShownPass(tuple(texts[i] for i in some), len(each), tokens, plan.tokens_per_pass))
        yield ShownStep(first + index, tuple(shown))


def show_rows(
    prepared: PreparedData, examples: Examples, numbers: Collection[int], *, split: str
) -> dict[int, ShownRow]:
    """Some of the examples with their text, by number; the sources are read once."""
    numbers_at: dict[str, list[int]] = {}
    for number in dict.fromkeys(numbers):
        numbers_at.setdefault(examples[number].where, []).append(number)
    shower = _Shower(prepared)
    rows: dict[int, ShownRow] = {}
    own = prepared.section.eval_source if split == "eval" else None
    for section in [own] if own else prepared.section.sources:
        if not numbers_at:
            break
        found = [each for each in read_rows(section) if each.where in numbers_at]
        reading = make_reading(section, prepared.section, prepared.base, prepared.template)
        labelled = label_rows(found, reading, shower.encoder)
        for traced in (each for each in labelled if isinstance(each, TracedExample)):
            shown = shower.show(traced, split)
            rows |= dict.fromkeys(numbers_at.pop(shown.where, ()), shown)
    if numbers_at:
        gone = next(iter(numbers_at))
        raise UserError(Problem(gone, "row: is not what it was a moment ago; do not write to the data meanwhile"))
    return rows


def stores_of(prepared: PreparedData) -> tuple[StoredRows, ...]:
    """All sources, the evaluation rows' own last."""
    pool, own = prepared.train.pool, prepared.eval.pool
    return pool.stores if own is pool else (*pool.stores, *own.stores)


class _Shower:
    """What a traced example needs to be shown: formats, and the tokenizer's words."""

    def __init__(self, prepared: PreparedData) -> None:
        self.encoder = Encoder(prepared.base)
        self._template = prepared.template.name
        self._loss_on = prepared.section.loss_on
        self._tokenizer = prepared.base.tokenizer
        self._formats = {file: store.format for store in stores_of(prepared) for file in store.files}

    def show(self, traced: TracedExample, split: str) -> ShownRow:
        row_format = self._formats[traced.example.where.rpartition(":")[0]]
        return ShownRow(
            traced=traced,
            split=split,
            format=row_format,
            template="none" if row_format == "text" else self._template,
            loss_on=self._loss_on,
            special_ids=self.encoder.special_ids,
            names=tuple(self._tokenizer.id_to_token(token) or "" for token in traced.example.ids.tolist()),
        )


def _splits_of(prepared: PreparedData, where: str) -> list[str]:
    """Where a labelled row goes: train, eval, or both where it is in both sources; else why to neither."""
    places = {"train": _number_of(prepared.train, where), "eval": _number_of(prepared.eval, where)}
    chosen = {"train": prepared.train.chosen, "eval": prepared.eval.chosen}
    splits = [name for name, number in places.items() if number is not None and number in chosen[name]]
    if splits:
        return splits
    number, kind = places["train"], prepared.section.deduplicate
    is_copy = number is not None and kind != "none" and later_copies(prepared.train.pool, kind)[number]
    return [DUPLICATE if is_copy else LEAKED]


def _number_of(examples: Examples, where: str) -> int | None:
    """A row's number in the pool of examples."""
    first = 0
    for store in examples.pool.stores:
        row = _row_of(store, where)
        if row is not None and store.outcome(row) is None:
            return first + int(np.searchsorted(store.row_of_example, row))
        first += store.examples
    return None


def _row_of(store: StoredRows, where: str) -> int | None:
    file, _, line = where.rpartition(":")
    if file not in store.files:
        return None
    rows = np.flatnonzero((store.arrays["file"] == store.files.index(file)) & (store.arrays["line"] == int(line)))
    return int(rows[0]) if len(rows) else None
