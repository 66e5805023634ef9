"""Measure targets on rows of data: loss, perplexity and exact match, two targets on the very same tokens."""

from __future__ import annotations

import json
import math
import unicodedata
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from rich.console import Console
from rich.progress import Progress

from finetune.data.encoder import Encoder
from finetune.data.examples import TracedExample
from finetune.data.template import Rendered
from finetune.data.trace import read_eval_examples
from finetune.errors import NumericsError, Problem, UserError, raise_problems
from finetune.plan import AUTO_TOKENS_PER_PASS
from finetune.train.held_out import autocast, sum_losses
from finetune.use.generate import Completion, complete
from finetune.use.target import FoundTarget, Target, attention_for_loss, find_target, open_target

ROWS_AT_ONCE = 256  # between two movements of the progress bar
LARGEST_EXPONENT = 709.0  # exp(710) is no float any more
SHARES = ("exact_match", "begins_correctly", "stopped")
SPARE_TOKENS = 8  # an answer may run this much longer than the longest expected one before it is cut


@dataclass(frozen=True)
class RowResult:
    """One row: what was asked, what should and what did come; text is None where no text was asked for."""

    where: str
    prompt: str
    expected: str
    text: str | None
    stopped: str | None
    loss_sum: float  # nats over the row's supervised tokens
    supervised_tokens: int
    values: dict[str, Any] = field(repr=False)  # the raw row

    @property
    def correct(self) -> bool:
        return self.text is not None and _comparable(self.text) == _comparable(self.expected)

    @property
    def begins_correctly(self) -> bool:
        return self.text is not None and _comparable(self.text).startswith(_comparable(self.expected))


@dataclass(frozen=True)
class TargetScore:
    """A target's figures, all of them sums and shares over its rows."""

    target: str
    rows: tuple[RowResult, ...] = field(repr=False)
    has_texts: bool
    by: str | None

    @property
    def supervised_tokens(self) -> int:
        return sum(row.supervised_tokens for row in self.rows)

    @property
    def loss(self) -> float:
        return _mean_loss(self.rows)

    @property
    def perplexity(self) -> float | None:
        """exp(loss); None where a diverged model's is beyond the largest float, which JSON has no word for."""
        return math.exp(self.loss) if self.loss < LARGEST_EXPONENT else None

    @property
    def exact_match(self) -> float | None:
        return self._share(lambda row: row.correct)

    def to_json(self) -> dict[str, Any]:
        figures = {
            "target": self.target,
            "rows": len(self.rows),
            "supervised_tokens": self.supervised_tokens,
            "loss": self.loss,
            "perplexity": self.perplexity,
            "exact_match": self.exact_match,
            "begins_correctly": self._share(lambda row: row.begins_correctly),
            "stopped": self._share(lambda row: row.stopped == "eos"),
        }
        return figures | ({"groups": self._groups(self.by)} if self.by else {})

    def _groups(self, column: str) -> dict[str, dict[str, Any]]:
        members: dict[str, list[RowResult]] = {}
        for row in self.rows:
            members.setdefault(_group_name(row.values.get(column)), []).append(row)
        scores = {name: TargetScore(self.target, tuple(rows), self.has_texts, None) for name, rows in members.items()}
        return {
            name: {"rows": len(score.rows), "loss": score.loss, "exact_match": score.exact_match}
            for name, score in sorted(scores.items())
        }

    def _share(self, holds: Callable[[RowResult], bool]) -> float | None:
        return sum(map(holds, self.rows)) / len(self.rows) if self.has_texts else None


@dataclass(frozen=True)
class Evaluation:
    """One or two targets on the same rows, in the order target, against."""

    targets: tuple[TargetScore, ...]

    @property
    def rows(self) -> tuple[RowResult, ...]:
        """The first target's rows."""
        return self.targets[0].rows

    def to_json(self) -> dict[str, Any]:
        """The JSON answer of `finetune evaluate`; shares are fractions 0-1, None where no text was asked for."""
        return {"targets": [score.to_json() for score in self.targets]}


def evaluate(  # noqa: PLR0913 - the options of the command, one to one
    target_name: str,
    *,
    data: str,
    against: str | None = None,
    template: str | None = None,
    by: str | None = None,
    exact_match: bool = True,
    max_new_tokens: int | None = None,
) -> Evaluation:
    """The figures of a target on every row of a data file, and those of `against` on the same token ids.

    The texts are rendered with `template`, else the first target's own. Loss is the mean cross entropy in nats over all
    supervised tokens, in the precision of training. Answers are continued greedily for at most `max_new_tokens`, by
    default a little more than the longest expected one has. `by` names a column to group the rows by.

    Raises:
        UserError: a target or the data cannot be used, no template, or tokenizers that differ.
    """
    first = find_target(target_name, template=template)
    if first.template is None:
        message = "this base has no chat template; say how the rows become text with `--template alpaca`"
        raise UserError(Problem(target_name, message))
    examples = read_eval_examples(data, first.base, first.template, system=first.system)
    found = [first]
    if against is not None:
        found.append(find_target(against, template=first.template))
        _refuse_other_tokens(found[1], examples, first)
    _refuse_what_cannot_be_scored(found, examples, by=by, data=data)
    room = max_new_tokens or _longest_answer(examples) + SPARE_TOKENS
    return Evaluation(
        tuple(_score(each, examples, room=room if exact_match else None, by=by) for each in found),
    )


def evaluation_text(evaluation: Evaluation) -> str:
    """The figures for people: two lines a target, then a line a group."""
    lines = []
    for score in (target.to_json() for target in evaluation.targets):
        lines.append(f"{score['target']}  ({score['rows']} rows, {score['supervised_tokens']} supervised tokens)")
        perplexity = "beyond all floats" if score["perplexity"] is None else f"{score['perplexity']:.2f}"
        shares = [f"{name.replace('_', ' ')} {score[name]:.1%}" for name in SHARES if score[name] is not None]
        lines.append("  ".join([f"  loss {score['loss']:.4f}", f"perplexity {perplexity}", *shares]))
        for name, group in score.get("groups", {}).items():
            match = "" if group["exact_match"] is None else f"  exact match {group['exact_match']:.1%}"
            lines.append(f"    {name}: {group['rows']} rows  loss {group['loss']:.4f}{match}")
    return "\n".join(lines)


def _score(found: FoundTarget, examples: Sequence[TracedExample], *, room: int | None, by: str | None) -> TargetScore:
    target = open_target(found)
    with _progress(f"{found.name}: loss", len(examples)) as advance:
        losses = _losses(target, examples, advance)
    said: list[Completion | None] = [None] * len(examples)
    if room is not None:
        with _progress(f"{found.name}: answers", len(examples)) as advance:
            prompts = [each.example.prompt_ids.tolist() for each in examples]
            said = [*complete(target, prompts, max_new_tokens=room, advance=advance)]
    rows = tuple(_row_result(*of_row) for of_row in zip(examples, losses, said, strict=True))
    return TargetScore(found.name, rows, room is not None, by)


def _losses(target: Target, examples: Sequence[TracedExample], advance: Callable[[int], None]) -> list[float]:
    """Per example the sum of its supervised tokens' cross entropies, computed as the training computes it."""
    losses: list[float] = []
    tokens_per_pass = AUTO_TOKENS_PER_PASS[target.device]
    with attention_for_loss(target), autocast(target.device, target.dtype):
        for start in range(0, len(examples), ROWS_AT_ONCE):
            some = [each.example for each in examples[start : start + ROWS_AT_ONCE]]
            losses += sum_losses(target.model, some, tokens_per_pass=tokens_per_pass)
            advance(len(some))
    raise_problems(
        (
            Problem(example.example.where, f"{target.name} gives this row a loss of {loss}")
            for example, loss in zip(examples, losses, strict=True)
            if not math.isfinite(loss)
        ),
        error=NumericsError,
    )
    return losses


def _row_result(traced: TracedExample, loss_sum: float, said: Completion | None) -> RowResult:
    return RowResult(
        where=traced.example.where,
        prompt=traced.text[: traced.spans[-1][0]],
        expected=traced.conversation.answer,
        text=said.text if said else None,
        stopped=said.stopped if said else None,
        loss_sum=loss_sum,
        supervised_tokens=traced.example.supervised_tokens,
        values=traced.conversation.row.values,
    )


def _mean_loss(rows: Sequence[RowResult]) -> float:
    return math.fsum(row.loss_sum for row in rows) / sum(row.supervised_tokens for row in rows)


def _longest_answer(examples: Sequence[TracedExample]) -> int:
    return max(each.example.tokens - each.example.prompt_tokens for each in examples)


def _comparable(text: str) -> str:
    return unicodedata.normalize("NFC", text).strip()


def _group_name(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _refuse_other_tokens(other: FoundTarget, examples: Sequence[TracedExample], first: FoundTarget) -> None:
    encodings = Encoder(other.base).encode([Rendered(each.text, (), each.literals) for each in examples])
    for each, encoding in zip(examples, encodings, strict=True):
        if not np.array_equal(encoding.ids, each.example.ids):
            message = (
                f"its tokenizer gives {each.example.where} other tokens ({len(encoding.ids)}) than {first.name}'s "
                f"({each.example.tokens}), so the losses could not be compared; evaluate the two one by one"
            )
            raise UserError(Problem(other.name, message))


def _refuse_what_cannot_be_scored(
    found: Sequence[FoundTarget], examples: Sequence[TracedExample], *, by: str | None, data: str
) -> None:
    context = min(target.base.facts.context_tokens for target in found)
    problems = [
        Problem(each.example.where, f"{each.example.tokens} tokens, but only {context} can be read; shorten this row")
        for each in examples
        if each.example.tokens > context
    ]
    columns = sorted({column for each in examples for column in each.conversation.row.values})
    if by is not None and by not in columns:
        problems.append(Problem(data, f"no row has a column {by!r} to group by; there are: {', '.join(columns)}"))
    raise_problems(problems)


@contextmanager
def _progress(title: str, total: int) -> Iterator[Callable[[int], None]]:
    """A bar on stderr where that is a terminal, nothing elsewhere; yields the function that moves it."""
    console = Console(stderr=True)
    with Progress(console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task(title, total=total)
        yield lambda rows: progress.advance(task, rows)
