"""Show one row as the model sees it: a recipe and a row in, its text, tokens and labels out."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from finetune.data.examples import NOT_LEARNED, Example
from finetune.data.prepare import PreparedData
from finetune.errors import Problem, UserError

GREEN, DIM, RESET = "\x1b[32m", "\x1b[2m", "\x1b[0m"


@dataclass(frozen=True)
class ShownRow:
    """One example and the piece of text each of its tokens stands for."""

    example: Example

    def to_json(self) -> dict[str, Any]:
        example = self.example
        return {
            "text": example.text,
            "ids": list(example.ids),
            "labels": list(example.labels),
            "supervised_text": example.supervised_text,
            "source": example.row.where,
        }


def find_example(data: PreparedData, row: str, *, split: str | None = None) -> ShownRow:
    """The example of a row's number or of file:line; `split` says that it must be a training or a held-out one.

    Numbers count the records of data.train (with split eval: of its own file, if it has one) from 0 as they were read,
    before any is dropped or held out.

    Raises:
        UserError: there is no such row, it was dropped, or it is in the other split.
    """
    if split not in (None, "train", "eval"):
        raise UserError(Problem("--split", f"{split!r} is not possible; write train or eval"))
    where = _numbered(data, int(row), split) if row.isdecimal() else row
    splits = {"train": data.train, "eval": data.eval}
    for name, examples in splits.items():
        found = next((example for example in examples if example.row.where == where), None)
        if found is not None and split in (None, name):
            return ShownRow(found)
        if found is not None:
            raise UserError(Problem("--row", f"{where} is in the other split; write --split {name}"))
    for part in data.parts:
        if where in part.dropped:
            raise UserError(Problem("--row", f"{where} was dropped: {part.dropped[where]}"))
    first, last = data.parts[0].rows[0].where, data.parts[-1].rows[-1].where
    raise UserError(Problem("--row", f"no row stands at {where}; rows stand from {first} to {last}"))


def _numbered(data: PreparedData, number: int, split: str | None) -> str:
    part = data.parts[-1 if split == "eval" else 0]
    if number < len(part.rows):
        return part.rows[number].where
    message = f"{number} is too large; {', '.join(part.files)} has {len(part.rows)} rows, counted from 0"
    raise UserError(Problem("--row", message))


def row_text(shown: ShownRow, *, colour: bool) -> str:
    """For people: learned text green (or in [[ ]]), context dim, and the counts."""
    example = shown.example
    on, off, context = (GREEN, RESET, DIM) if colour else ("[[", "]]", "")
    pieces, position = [], 0
    for start, end in example.spans:
        pieces.append(f"{context}{example.text[position:start]}{RESET if colour else ''}")
        pieces.append(f"{on}{example.text[start:end]}{off}")
        position = end
    pieces.append(f"{context}{example.text[position:]}{RESET if colour else ''}")
    learned = sum(label != NOT_LEARNED for label in example.labels)
    return f"{''.join(pieces)}\n\n{example.row.where}: {example.tokens} tokens, {learned} supervised"
