"""Count what a plan needs of rows without a tokenizer: every row is read and rendered, tokens come from its bytes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

import numpy as np

from finetune.data.labelling import format_of, read_any
from finetune.data.rows import Refusal, Row
from finetune.data.sources import read_rows
from finetune.data.template import Template, TemplateProblem
from finetune.errors import Problem, UserError
from finetune.plan import DataFacts
from finetune.recipe import DataSection, SourceSection

SHOWN_PROBLEMS = 20
Lengths = list[tuple[int, int]]  # of each row: tokens, supervised tokens


def estimate_facts(data: DataSection, template: Template, *, bytes_per_token: float) -> DataFacts:
    """The facts of the rows; rows are counted exactly, tokens estimated, nothing is known of stop tokens.

    Raises:
        UserError: what is wrong with the rows, with file:line.
    """
    counted = [_read(section, data, template, bytes_per_token) for section in data.sources]
    refusals = [each for _, refused in counted for each in refused]
    problems = [each.problem for each in refusals if each.reason not in data.dropped_reasons]
    if problems:
        raise UserError(problems[:SHOWN_PROBLEMS], total=len(problems))
    rows = sum(len(lengths) for lengths, _ in counted)
    held_out = _held_out(data, rows)
    lengths_R2 = np.array([row for lengths, _ in counted for row in lengths], dtype=np.int64).reshape(-1, 2)
    if data.too_long != "error":
        lengths_R2 = np.minimum(lengths_R2, data.max_tokens)
    train_R2, eval_R2 = lengths_R2[: rows - held_out], lengths_R2[rows - held_out :]
    if data.eval_source:
        own, _ = _read(data.eval_source, data, template, bytes_per_token)
        eval_R2 = np.array(own, dtype=np.int64).reshape(-1, 2)
    return DataFacts(
        format=", ".join(dict.fromkeys(format_of(section, data) for section in data.sources)),
        template=template.name,
        template_sha256=template.sha256,
        rows_read=rows + len(refusals),
        dropped=dict(Counter(each.reason for each in refusals)),
        train_tokens=train_R2[:, 0],
        train_supervised=train_R2[:, 1],
        truncated_tokens=0,
        straddling_tokens=0,
        eval_tokens=eval_R2[:, 0],
        stop_token_ids=(),
        source_examples=tuple(_left(map(len, (lengths for lengths, _ in counted)), rows - held_out)),
        source_weights=tuple(section.weight for section in data.sources),
    )


def assumed_facts(data: DataSection, template: Template, *, rows: int, tokens: int) -> DataFacts:
    """The facts of so many rows that nobody has read, all of them of this length and all of it learned.

    Raises:
        UserError: more rows are held out than there are.
    """
    held_out = _held_out(data, rows)
    lengths = np.full(rows - held_out, tokens, dtype=np.int64)
    return DataFacts(
        format=data.format,
        template=template.name,
        template_sha256=template.sha256,
        rows_read=rows,
        dropped={},
        train_tokens=lengths,
        train_supervised=lengths,
        truncated_tokens=0,
        straddling_tokens=0,
        eval_tokens=np.full(held_out, tokens, dtype=np.int64),
        stop_token_ids=(),
        source_examples=(len(lengths),),
        source_weights=(1.0,),
    )


def _read(
    section: SourceSection, data: DataSection, template: Template, bytes_per_token: float
) -> tuple[Lengths, list[Refusal]]:
    row_format = format_of(section, data)
    read = (_lengths(found, row_format, data, template, bytes_per_token) for found in read_rows(section))
    lengths: Lengths = []
    refused: list[Refusal] = []
    for each in read:
        if isinstance(each, Refusal):
            refused.append(each)
        else:
            lengths.append(each)
    return lengths, refused


def _lengths(
    found: Row | Refusal, row_format: str, data: DataSection, template: Template, bytes_per_token: float
) -> tuple[int, int] | Refusal:
    said = found if isinstance(found, Refusal) else read_any(found, format=row_format, system=data.system)
    if isinstance(said, Refusal):
        return said
    try:
        rendered = template.render(said.turns, tools=said.tools)
    except TemplateProblem as problem:
        return Refusal(problem.reason, found.where, problem.message)
    learned = sum(len(rendered.text[start:end].encode()) for start, end in rendered.spans)
    whole = len(rendered.text.encode())
    return max(1, round(whole / bytes_per_token)), max(1, round(learned / bytes_per_token))


def _held_out(data: DataSection, rows: int) -> int:
    """How many rows the recipe holds out; which ones does not matter to an estimate."""
    if data.eval_source or not isinstance(data.eval, (int, float)):
        return 0
    count = data.eval if isinstance(data.eval, int) else max(1, round(data.eval * rows))
    if count >= rows:
        message = f"{count} rows are to be held out of {rows}; at least one must be left to train on"
        raise UserError(Problem("data.eval", message))
    return count


def _left(counts: Iterable[int], total: int) -> Iterable[int]:
    """The counts of the sources when only the first `total` rows are trained on."""
    for count in counts:
        yield min(count, total)
        total -= min(count, total)
