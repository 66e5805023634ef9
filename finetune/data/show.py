"""Show one row as the model sees it: a recipe and a row in, its text, tokens and labels out."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from finetune.data.examples import NOT_LEARNED, Example
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


def find_example(examples: list[Example], row: str) -> ShownRow:
    """The example of a row number (from 0) or of file:line.

    Raises:
        UserError: there is no such row among the examples.
    """
    if row.isdigit():
        if int(row) < len(examples):
            return ShownRow(examples[int(row)])
        raise UserError(Problem("--row", f"{row} is too large; there are {len(examples)} rows, counted from 0"))
    found = next((example for example in examples if example.row.where == row), None)
    if found is None:
        first, last = examples[0].row.where, examples[-1].row.where
        raise UserError(Problem("--row", f"no row stands at {row}; rows stand from {first} to {last}"))
    return ShownRow(found)


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
