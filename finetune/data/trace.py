"""Label rows in memory and keep their text: one row of a recipe, or an evaluation file. No cache."""

from __future__ import annotations

import os
from collections.abc import Iterator

from finetune.base import Base
from finetune.data.encoder import Encoder
from finetune.data.examples import TracedExample
from finetune.data.labelling import first_of_a_kind, format_of, label_rows, make_reading, read_any
from finetune.data.rows import UNREADABLE, Refusal, Row
from finetune.data.sources import read_rows
from finetune.data.template import Template
from finetune.errors import Problem, UserError, raise_problems
from finetune.recipe import DataSection, SourceSection


def trace(
    data: DataSection, base: Base, template: Template, where: str | int, *, eval_source: bool = False
) -> TracedExample | Refusal:
    """A row with all its stages; `where` is file:line or a number, counted over the sources' records from 0.

    Raises:
        UserError: there is no such row.
    """
    sections = [data.eval_source] if eval_source and data.eval_source else list(data.sources)
    if isinstance(where, str) and not eval_source and data.eval_source:
        sections.append(data.eval_source)
    number = 0
    for section in sections:
        for found in read_rows(section):
            if isinstance(found, Refusal) and found.reason == UNREADABLE:
                continue
            if where == number or (isinstance(where, str) and _same_place(where, found.where)):
                reading = make_reading(section, data, base, template)
                return label_rows([found], reading, Encoder(base))[0]
            number += 1
    counted = f"rows are counted from 0 to {number - 1}"
    there = counted if isinstance(where, int) else "write FILE:LINE, the line that the row begins on"
    raise UserError(Problem("--row", f"there is no row {where}; {there}"))


def _same_place(asked: str, place: str) -> bool:
    """Whether two FILE:LINE are the same, however the path is written."""
    (file, _, line), (other_file, _, other_line) = asked.rpartition(":"), place.rpartition(":")
    return line == other_line and (file == other_file or os.path.normpath(file) == os.path.normpath(other_file))


def read_eval_examples(
    path: str, base: Base, template: Template, *, system: str | None = None, max_tokens: int | None = None
) -> list[TracedExample]:
    """Every row of an evaluation file as an example with its text; nothing is dropped.

    Raises:
        UserError: as prepare_data.
    """
    data = DataSection(train=path, max_tokens=max_tokens or 2**31 - 1, system=system)
    section = data.sources[0]
    labelled = label_rows(list(read_rows(section)), make_reading(section, data, base, template), Encoder(base))
    raise_problems(each.problem for each in labelled if isinstance(each, Refusal))
    return [each for each in labelled if isinstance(each, TracedExample)]


def find_data_problems(data: DataSection) -> list[Problem]:
    """What is wrong with the rows as far as it shows without a base: files, JSON, columns, turns, empty answers."""
    return [
        refusal.problem
        for section in data.all_sources
        for refusal in first_of_a_kind(_refusals(section, data))
        if refusal.reason not in data.dropped_reasons
    ]


def _refusals(section: SourceSection, data: DataSection) -> Iterator[Refusal]:
    row_format = format_of(section, data)
    for found in read_rows(section):
        read = read_any(found, format=row_format, system=data.system) if isinstance(found, Row) else found
        if isinstance(read, Refusal):
            yield read
