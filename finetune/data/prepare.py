"""All of a recipe's data: sources in, training and held-out examples out, every row accounted for."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

from finetune.base import Base
from finetune.data.conversations import Conversation, detect_format, read_conversations
from finetune.data.examples import Encoder, Example, make_examples
from finetune.data.sources import no_rows, read_rows
from finetune.data.template import Template, choose_template
from finetune.errors import Problem, raise_problems
from finetune.plan import DataFacts
from finetune.recipe import DataSection


@dataclass(frozen=True)
class PreparedData:
    """Examples ready to be laid out, the template that wrote them, and the facts a plan needs."""

    train: list[Example] = field(repr=False)
    eval: list[Example] = field(repr=False)
    template: Template
    facts: DataFacts


def prepare_data(data: DataSection, base: Base, *, seed: int) -> PreparedData:
    """Read, render, tokenise and label every row.

    Rows in = trained + eval + dropped, by reason. Rows to hold out are drawn with the seed.

    Raises:
        UserError: every problem of a stage (reading; formats; rendering; lengths), with file:line, all at once.
    """
    template = choose_template(data.template, base, date=data.date)
    encoder = Encoder(base)
    dropped: Counter[str] = Counter()
    train, train_format = _read_examples(data.train_files, data, template, encoder, dropped)
    held_out: list[Example] = []
    if data.eval_file is not None:
        held_out, _ = _read_examples((data.eval_file,), data, template, encoder, dropped)
    elif data.eval is not None:
        train, held_out = _split(train, data.eval, seed=seed)  # type: ignore[arg-type]
    if not train:
        raise no_rows(data.train_files)
    facts = DataFacts(
        format=train_format,
        template=template.name,
        template_sha256=template.sha256,
        rows_read=len(train) + len(held_out) + sum(dropped.values()),
        dropped={reason: count for reason, count in dropped.items() if count},
        train_tokens=tuple(example.tokens for example in train),
        train_supervised=tuple(example.supervised_tokens for example in train),
        eval_tokens=tuple(example.tokens for example in held_out),
        stop_token_ids=tuple(sorted({_stop_token(example) for example in train})),
    )
    return PreparedData(train, held_out, template, facts)


def read_eval_examples(
    path: str, base: Base, template: Template, *, system: str | None = None, max_tokens: int | None = None
) -> list[Example]:
    """Every row of an evaluation file as an example; nothing is dropped.

    Raises:
        UserError: as prepare_data.
    """
    section = DataSection(train=path, max_tokens=max_tokens or 2**31 - 1, system=system)
    examples, _ = _read_examples((path,), section, template, Encoder(base), Counter())
    return examples


def _read_examples(
    paths: Sequence[str], data: DataSection, template: Template, encoder: Encoder, dropped: Counter[str]
) -> tuple[list[Example], str]:
    rows = read_rows(paths)
    if not rows:
        raise no_rows(paths)
    row_format = detect_format(rows) if data.format == "auto" else data.format
    conversations = read_conversations(rows, format=row_format, system=data.system)
    answered = _without_empty_answers(conversations, data, dropped)
    examples = make_examples(answered, template, encoder, loss_on=data.loss_on)
    return _without_too_long(examples, data, dropped), row_format


def _without_empty_answers(
    conversations: list[Conversation], data: DataSection, dropped: Counter[str]
) -> list[Conversation]:
    empty = [conversation for conversation in conversations if not conversation.answer.strip()]
    if data.empty_answer == "error":
        cure = "the answer is empty; write one, or set data.empty_answer: drop"
        raise_problems(Problem(conversation.row.where, cure) for conversation in empty)
    dropped["empty answer"] += len(empty)
    return [conversation for conversation in conversations if conversation.answer.strip()]


def _without_too_long(examples: list[Example], data: DataSection, dropped: Counter[str]) -> list[Example]:
    too_long = [example for example in examples if example.tokens > data.max_tokens]
    if data.too_long == "error":
        raise_problems(
            Problem(
                example.row.where,
                f"{example.tokens} tokens, data.max_tokens is {data.max_tokens}; raise it, shorten the row, or set "
                "data.too_long: drop",
            )
            for example in too_long
        )
    dropped["too long"] += len(too_long)
    return [example for example in examples if example.tokens <= data.max_tokens]


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
