"""All of a recipe's data: sources in, training and held-out examples out, every row accounted for."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from finetune.base import Base
from finetune.data.account import Account, later_copies, leak_problems, make_account
from finetune.data.cached import Progress, stored_rows
from finetune.data.pool import Examples, Pool
from finetune.data.store import StoredRows
from finetune.data.template import Template, choose_template
from finetune.errors import Problem, UserError
from finetune.machine import probe_machine
from finetune.plan import DataFacts
from finetune.recipe import DataSection


@dataclass(frozen=True)
class PreparedData:
    """Examples ready to be laid out, the template that wrote them, the account, and the facts a plan needs."""

    train: Examples = field(repr=False)
    eval: Examples = field(repr=False)
    template: Template
    account: Account
    facts: DataFacts
    section: DataSection = field(repr=False)
    base: Base = field(repr=False)


def prepare_data(
    data: DataSection, base: Base, *, seed: int, workers: int | None = None, progress: Progress | None = None
) -> PreparedData:
    """Read, render, tokenise and label every row, or find that done already.

    Rows in = trained + eval + dropped, by reason. Rows to hold out are drawn with the seed. The result does not depend
    on the number of worker processes.

    Raises:
        UserError: what is wrong with the rows, with file:line: the first few of each kind and their number.
    """
    prepared = read_data(data, base, seed=seed, workers=workers, progress=progress)
    if prepared.account.problems:
        raise UserError(prepared.account.problems, total=prepared.account.total_problems)
    return prepared


def read_data(
    data: DataSection, base: Base, *, seed: int, workers: int | None = None, progress: Progress | None = None
) -> PreparedData:
    """As prepare_data, but what is wrong with the rows is left in the account.

    Raises:
        UserError: the template cannot be used.
    """
    template = choose_template(data.template, base, date=data.date)
    workers = workers or probe_machine().cores
    stores = [
        stored_rows(section, data, base, template, workers=workers, progress=progress) for section in data.all_sources
    ]
    count = len(data.sources)
    pool, own_eval = Pool(tuple(stores[:count])), Pool(tuple(stores[count:]))
    kept = _without_copies(pool, data.deduplicate)
    train, held_out, problems = _split(pool, kept, own_eval, data, seed=seed)
    leaked = _leaked(train, held_out)
    if data.leaked == "error":
        problems += leak_problems([held_out.pool.where(int(number)) for number in held_out.chosen[leaked]])
    elif data.leaked == "drop":
        held_out = Examples(held_out.pool, held_out.chosen[~leaked])
    problems += [problem for store in stores for problem in _foreign_tokens(store, base)]
    account = make_account(data, stores, kept, train, held_out, leaked, problems)
    facts = _facts(account, template, train, held_out, stores)
    return PreparedData(train, held_out, template, account, facts, data, base)


def _without_copies(pool: Pool, deduplicate: str) -> np.ndarray:
    """For each example of the pool whether it stays: bool."""
    total = sum(store.examples for store in pool.stores)
    return np.ones(total, bool) if deduplicate == "none" else ~later_copies(pool, deduplicate)


def _split(
    pool: Pool, kept: np.ndarray, own_eval: Pool, data: DataSection, *, seed: int
) -> tuple[Examples, Examples, list[Problem]]:
    """Training and held-out examples, each in the order of the sources."""
    numbers = np.flatnonzero(kept)
    if own_eval.stores:
        everything = np.arange(sum(store.examples for store in own_eval.stores))
        return Examples(pool, numbers), Examples(own_eval, everything), []
    if not isinstance(data.eval, (int, float)) or not len(numbers):
        return Examples(pool, numbers), Examples(pool, numbers[:0]), []
    count = data.eval if isinstance(data.eval, int) else max(1, round(data.eval * len(numbers)))
    if count >= len(numbers):
        message = f"{count} rows are to be held out of {len(numbers)}; at least one must be left to train on"
        return Examples(pool, numbers), Examples(pool, numbers[:0]), [Problem("data.eval", message)]
    out = np.zeros(len(numbers), bool)
    out[random.Random(f"{seed}/eval").sample(range(len(numbers)), count)] = True
    return Examples(pool, numbers[~out]), Examples(pool, numbers[out]), []


def _leaked(train: Examples, held_out: Examples) -> np.ndarray:
    """For each held-out example whether a training example says the same, case and white space folded: bool."""
    if not len(held_out):
        return np.zeros(0, bool)
    return np.isin(held_out.pool.array("near")[held_out.chosen], train.pool.array("near")[train.chosen])


def _foreign_tokens(store: StoredRows, base: Base) -> list[Problem]:
    """A tokenizer that knows tokens its base has no embedding for belongs to another base."""
    if store.largest_id < base.facts.vocabulary:
        return []
    message = (
        f"the tokenizer makes token {store.largest_id} ({base.tokenizer.id_to_token(store.largest_id)!r}) of these "
        f"rows, the base has {base.facts.vocabulary} embeddings; give the base the tokenizer it was trained with"
    )
    return [Problem(str(base.facts.folder), message)]


def _facts(
    account: Account, template: Template, train: Examples, held_out: Examples, stores: Sequence[StoredRows]
) -> DataFacts:
    sources = account.sources[: len(train.pool.stores)]
    return DataFacts(
        format=", ".join(dict.fromkeys(source.format for source in sources)),
        template=template.name,
        template_sha256=template.sha256,
        rows_read=account.read,
        dropped=account.dropped,
        train_tokens=train.tokens,
        train_supervised=train.supervised_tokens,
        truncated_tokens=account.truncated_tokens,
        straddling_tokens=account.straddling_tokens,
        eval_tokens=held_out.tokens,
        stop_token_ids=tuple(sorted({token for store in stores for token in store.stop_token_ids})),
        source_examples=tuple(source.trained for source in sources),
        source_weights=tuple(source.weight for source in sources),
    )
