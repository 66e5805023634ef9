"""Account for every row: stored sources and what was chosen from them in; counts that add up out."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

from finetune.data.pool import Examples, Pool
from finetune.data.rows import DUPLICATE, LEAKED, Refusal
from finetune.data.store import FIRST_OF_A_KIND, StoredRows
from finetune.errors import Problem
from finetune.recipe import DataSection

HISTOGRAM_BARS = 16


@dataclass(frozen=True)
class SourceAccount:
    """One source's share."""

    source: str
    format: str
    rows: int
    trained: int
    eval: int
    tokens: int
    supervised_tokens: int
    weight: float


@dataclass(frozen=True)
class Account:
    """Rows in = trained + eval + dropped + refused; tokens in = supervised + context + truncated."""

    read: int
    trained: int
    eval: int
    dropped: Mapping[str, int]
    refused: Mapping[str, int]
    supervised_tokens: int
    context_tokens: int
    truncated_tokens: int
    truncated_rows: int
    straddling_tokens: int
    rows_with_control_texts: int
    duplicates: Mapping[str, int]  # exact: later copies; near: further ones equal but for case and white space
    leaked: int  # held-out rows that are training rows too, case and white space folded
    first_copies: tuple[str, ...]  # a few of the copies in words
    lengths: Mapping[str, int]  # tokens of an example: shortest, median, p90, p99, longest
    histogram: tuple[tuple[int, int, int], ...]  # examples with from <= tokens < until
    sources: tuple[SourceAccount, ...]
    problems: tuple[Problem, ...] = field(repr=False)
    total_problems: int

    @property
    def tokens(self) -> int:
        return self.supervised_tokens + self.context_tokens + self.truncated_tokens

    def to_json(self) -> dict[str, Any]:
        """The keys of `finetune check --json` that concern the data."""
        return {
            "rows": {
                "read": self.read,
                "trained": self.trained,
                "eval": self.eval,
                "dropped": dict(self.dropped),
                "refused": dict(self.refused),
            },
            "tokens": {
                "total": self.tokens,
                "supervised": self.supervised_tokens,
                "context": self.context_tokens,
                "truncated": self.truncated_tokens,
            },
            "truncated_rows": self.truncated_rows,
            "straddling_tokens": self.straddling_tokens,
            "rows_with_control_texts": self.rows_with_control_texts,
            "duplicates": dict(self.duplicates),
            "leaked": self.leaked,
            "first_copies": list(self.first_copies),
            "lengths": dict(self.lengths),
            "histogram": [list(bar) for bar in self.histogram],
            "sources": [asdict(source) for source in self.sources],
        }


def later_copies(pool: Pool, kind: str) -> np.ndarray:
    """For each example whether an earlier one says the same; kind: exact or near."""
    hashes = pool.array(kind)
    first = np.zeros(len(hashes), bool)
    first[np.unique(hashes, return_index=True)[1]] = True
    return ~first


def describe_copies(pool: Pool, kept: np.ndarray) -> tuple[dict[str, int], tuple[str, ...]]:
    """How many of the kept examples are later copies, exact and near, and the first few of them in words."""
    exact, near = later_copies(pool, "exact") & kept, later_copies(pool, "near") & kept
    near_hashes = pool.array("near")
    words = []
    for example in np.flatnonzero(near)[:FIRST_OF_A_KIND]:
        original = int(np.flatnonzero(near_hashes == near_hashes[example])[0])
        likeness = "the same as" if exact[example] else "but for case and white space the same as"
        words.append(f"{pool.where(int(example))} is {likeness} {pool.where(original)}")
    return {"exact": int(exact.sum()), "near": int((near & ~exact).sum())}, tuple(words)


def bars_of(tokens: np.ndarray) -> tuple[tuple[int, int, int], ...]:
    """A histogram of lengths with round, equal steps."""
    if not len(tokens):
        return ()
    width = _round_up(int(tokens.max()) / HISTOGRAM_BARS)
    counts = np.bincount(tokens // width)
    return tuple((index * width, (index + 1) * width, int(count)) for index, count in enumerate(counts))


def _round_up(width: float) -> int:
    """The next of 1, 2, 5, 10, 20, 50, ..."""
    power = 1
    while True:
        for step in (power, 2 * power, 5 * power):
            if step >= width:
                return step
        power *= 10


def lengths_of(tokens: np.ndarray) -> dict[str, int]:
    if not len(tokens):
        return {}
    names = {"shortest": 0, "median": 50, "p90": 90, "p99": 99, "longest": 100}
    return {name: int(np.percentile(tokens, share, method="lower")) for name, share in names.items()}


def problems_of(
    stores: Sequence[StoredRows], names: Sequence[str], *, dropped: frozenset[str]
) -> tuple[list[Problem], int]:
    """What is wrong with the rows: the first few of each kind with their places, a line on the rest; and the total."""
    problems: list[Problem] = []
    total = 0
    for store, name in zip(stores, names, strict=True):
        problems += [refusal.problem for refusal in store.unreadable]
        total += len(store.unreadable)
        counts = {reason: count for reason, count in store.refused().items() if reason not in dropped}
        shown = [refusal for refusal in store.refusals if refusal.reason in counts]
        problems += [refusal.problem for refusal in shown]
        for reason, count in counts.items():
            total += count
            listed = sum(refusal.reason == reason for refusal in shown)
            if count > listed:
                more = f"{reason}: {count - listed} more rows, {count} in all; to drop them: data.drop: [{reason}]"
                problems.append(Problem(name, more))
    return problems, total


def leak_problems(places: Sequence[str]) -> list[Problem]:
    cure = "row: held out, but a training row says the same; remove one, or set data.leaked: drop"
    found = [Refusal(LEAKED, place, cure).problem for place in places[:FIRST_OF_A_KIND]]
    if len(places) > FIRST_OF_A_KIND:
        found.append(Problem(f"{LEAKED}", f"{len(places) - FIRST_OF_A_KIND} more rows, {len(places)} in all"))
    return found


def make_account(  # noqa: PLR0913 - all that is counted
    data: DataSection,
    stores: Sequence[StoredRows],
    kept: np.ndarray,
    train: Examples,
    held_out: Examples,
    leaked: np.ndarray,
    problems: list[Problem],
) -> Account:
    """The account of all sources; `kept` are the pool's examples that are no copies, `leaked` marks held-out ones."""
    names = [section.source for section in data.all_sources]
    dropped_reasons, pool = data.dropped_reasons, train.pool
    counts: Counter[str] = Counter()
    for store in stores:
        counts.update(store.refused())
    dropped = {reason: count for reason, count in counts.items() if reason in dropped_reasons}
    refused = {reason: count for reason, count in counts.items() if reason not in dropped_reasons}
    if copies := int((~kept).sum()):
        dropped[DUPLICATE] = copies
    if data.leaked == "drop" and leaked.any():
        dropped[LEAKED] = int(leaked.sum())
    row_problems, total = problems_of(stores, names, dropped=dropped_reasons)
    if not len(train) and not row_problems:
        reasons = ", ".join(f"{count} {reason}" for reason, count in dropped.items())
        problems = [
            *problems,
            Problem(", ".join(names), f"no row is left to train on, dropped: {reasons or 'none read'}"),
        ]
    tokens, supervised = _sums(train, held_out)
    cut = np.concatenate([each.pool.array("cut_tokens")[each.chosen] for each in (train, held_out)])
    copies_seen, words = describe_copies(pool, kept)
    all_tokens = np.concatenate([train.tokens, held_out.tokens])
    return Account(
        read=sum(store.rows for store in stores),
        trained=len(train),
        eval=len(held_out) - (int(leaked.sum()) if data.leaked == "error" else 0),
        dropped=dropped,
        refused=refused | ({LEAKED: int(leaked.sum())} if data.leaked == "error" and leaked.any() else {}),
        supervised_tokens=supervised,
        context_tokens=tokens - supervised,
        truncated_tokens=int(cut.sum()),
        truncated_rows=int((cut > 0).sum()),
        straddling_tokens=int(train.pool.array("straddling_tokens")[train.chosen].sum()),
        rows_with_control_texts=sum(store.rows_with_control_texts for store in stores),
        duplicates=copies_seen,
        leaked=int(leaked.sum()),
        first_copies=words,
        lengths=lengths_of(all_tokens),
        histogram=bars_of(all_tokens),
        sources=tuple(_source_accounts(data, stores, names, train, held_out)),
        problems=(*row_problems, *problems),
        total_problems=total + len(problems),
    )


def _sums(train: Examples, held_out: Examples) -> tuple[int, int]:
    """Tokens and supervised tokens of all examples."""
    tokens = int(train.tokens.sum()) + int(held_out.tokens.sum())
    return tokens, int(train.supervised_tokens.sum()) + int(held_out.supervised_tokens.sum())


def _source_accounts(
    data: DataSection, stores: Sequence[StoredRows], names: Sequence[str], train: Examples, held_out: Examples
) -> Iterator[SourceAccount]:
    own_eval = data.eval_source is not None
    trained = np.bincount(train.pool.source_of()[train.chosen], minlength=len(data.sources))
    out = np.bincount(held_out.pool.source_of()[held_out.chosen], minlength=len(data.sources))
    for index, (store, name) in enumerate(zip(stores, names, strict=True)):
        is_eval = index >= len(data.sources)
        yield SourceAccount(
            source=name,
            format=store.format,
            rows=store.rows,
            trained=0 if is_eval else int(trained[index]),
            eval=int(out[0]) if is_eval else 0 if own_eval else int(out[index]),
            tokens=int(store.arrays["tokens"].sum()),
            supervised_tokens=int(store.arrays["supervised_tokens"].sum()),
            weight=1.0 if is_eval else data.sources[index].weight,
        )
