"""All of a recipe's data: sources in, training and held-out examples out, every row accounted for."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from finetune.base import Base
from finetune.data.conversations import Conversation, detect_format, read_conversations
from finetune.data.examples import Encoder, Example, make_examples
from finetune.data.sources import Row, read_rows
from finetune.data.template import Template, choose_template
from finetune.errors import Problem, UserError, raise_problems
from finetune.plan import DataFacts
from finetune.recipe import DataSection

EMPTY_ANSWER, TOO_LONG = "empty answer", "too long"


@dataclass(frozen=True)
class Part:
    """What became of the rows of one group of files: an example or a reason to drop it, for each of them."""

    files: tuple[str, ...]
    format: str
    rows: list[Row] = field(repr=False)
    examples: list[Example] = field(repr=False)
    dropped: Mapping[str, str]  # the reason, by file:line


@dataclass(frozen=True)
class PreparedData:
    """Examples ready to be laid out, the template that wrote them, and the facts a plan needs."""

    train: list[Example] = field(repr=False)
    eval: list[Example] = field(repr=False)
    template: Template
    facts: DataFacts
    parts: tuple[Part, ...] = field(repr=False)  # of data.train, and of data.eval where it names a file


def prepare_data(data: DataSection, base: Base, *, seed: int) -> PreparedData:
    """Read, render, tokenise and label every row.

    Rows in = trained + eval + dropped, by reason. Rows to hold out are drawn with the seed.

    Raises:
        UserError: every problem of every row of every file, with file:line, all at once.
    """
    template = choose_template(data.template, base, date=data.date)
    groups = [data.train_files] + ([(data.eval_file,)] if data.eval_file is not None else [])
    parts, problems = [], []
    for files in groups:
        part, found = _read_part(files, data, template, base)
        parts.append(part)
        problems += found
    raise_problems(problems)
    train, held_out = parts[0].examples, parts[1].examples if len(parts) > 1 else []
    if isinstance(data.eval, (int, float)):
        train, held_out = _split(train, data.eval, seed=seed)
    facts = DataFacts(
        format=parts[0].format,
        template=template.name,
        template_sha256=template.sha256,
        rows_read=sum(len(part.rows) for part in parts),
        dropped=dict(Counter(reason for part in parts for reason in part.dropped.values())),
        train_tokens=tuple(example.tokens for example in train),
        train_supervised=tuple(example.supervised_tokens for example in train),
        straddling_tokens=sum(example.straddling_tokens for example in train),
        eval_tokens=tuple(example.tokens for example in held_out),
        stop_token_ids=tuple(sorted({_stop_token(example) for example in train})),
    )
    return PreparedData(train, held_out, template, facts, tuple(parts))


def read_eval_examples(
    path: str, base: Base, template: Template, *, system: str | None = None, max_tokens: int | None = None
) -> list[Example]:
    """Every row of an evaluation file as an example; nothing is dropped.

    Raises:
        UserError: as prepare_data.
    """
    section = DataSection(train=path, max_tokens=max_tokens or 2**31 - 1, system=system)
    part, problems = _read_part((path,), section, template, base)
    raise_problems(problems)
    return part.examples


def find_data_problems(data: DataSection) -> list[Problem]:
    """What is wrong with the rows as far as it shows without a base: files, JSON, columns, empty answers."""
    groups = [data.train_files] + ([(data.eval_file,)] if data.eval_file is not None else [])
    return [problem for files in groups for problem in _read_answered(files, data)[-1]]


def _read_part(files: tuple[str, ...], data: DataSection, template: Template, base: Base) -> tuple[Part, list[Problem]]:
    rows, row_format, conversations, dropped, problems = _read_answered(files, data)
    examples, refused = make_examples(conversations, template, Encoder(base), loss_on=data.loss_on)
    too_long = [example for example in examples if example.tokens > data.max_tokens]
    fitting = [example for example in examples if example.tokens <= data.max_tokens]
    if data.too_long == "drop":
        dropped |= {example.row.where: TOO_LONG for example in too_long}
    else:
        refused += [_too_long(example, data.max_tokens) for example in too_long]
    problems += refused or _foreign_tokens(fitting, base)
    if not fitting and not problems:
        reasons = ", ".join(f"{count} {reason}" for reason, count in Counter(dropped.values()).items())
        problems.append(Problem(", ".join(files), f"none of its {len(rows)} rows is left, dropped: {reasons}"))
    return Part(files, row_format, rows, fitting, dropped), problems


def _read_answered(
    files: Sequence[str], data: DataSection
) -> tuple[list[Row], str, list[Conversation], dict[str, str], list[Problem]]:
    """Rows, their format, the conversations that have an answer, the rows dropped by reason, and all problems."""
    rows, problems = read_rows(files)
    if not rows:
        return rows, data.format, [], {}, problems
    try:
        row_format = detect_format(rows) if data.format == "auto" else data.format
    except UserError as error:
        return rows, data.format, [], {}, [*problems, *error.problems]
    conversations, misfits = read_conversations(rows, format=row_format, system=data.system)
    empty = [conversation for conversation in conversations if not conversation.answer.strip()]
    answered = [conversation for conversation in conversations if conversation.answer.strip()]
    problems += misfits
    if data.empty_answer == "drop":
        return rows, row_format, answered, {each.row.where: EMPTY_ANSWER for each in empty}, problems
    cure = "the answer is empty; write one, or set data.empty_answer: drop"
    return rows, row_format, answered, {}, problems + [Problem(each.row.where, cure) for each in empty]


def _too_long(example: Example, max_tokens: int) -> Problem:
    cure = "raise it, shorten the row, or set data.too_long: drop"
    return Problem(example.row.where, f"{example.tokens} tokens, data.max_tokens is {max_tokens}; {cure}")


def _foreign_tokens(examples: Sequence[Example], base: Base) -> list[Problem]:
    """A tokenizer that knows tokens its base has no embedding for belongs to another base."""
    largest = max((max(example.ids) for example in examples), default=0)
    if largest < base.facts.vocabulary:
        return []
    message = (
        f"the tokenizer makes token {largest} ({base.tokenizer.id_to_token(largest)!r}) of these rows, the base has "
        f"{base.facts.vocabulary} embeddings; give the base the tokenizer it was trained with"
    )
    return [Problem(str(base.facts.folder), message)]


def _split(examples: list[Example], share: float | int, *, seed: int) -> tuple[list[Example], list[Example]]:
    """Training and held-out examples, each in the order of the file."""
    count = share if isinstance(share, int) else max(1, round(share * len(examples)))
    if count >= len(examples):
        message = f"{count} rows are to be held out of {len(examples)}; at least one must be left to train on"
        raise_problems([Problem("data.eval", message)])
    chosen = set(random.Random(f"{seed}/eval").sample(range(len(examples)), count))
    return (
        [example for index, example in enumerate(examples) if index not in chosen],
        [example for index, example in enumerate(examples) if index in chosen],
    )


def _stop_token(example: Example) -> int:
    return next(label for label in reversed(example.labels) if label >= 0)
