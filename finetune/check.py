"""Prove before training what can be proven: a recipe in, an account of every row and token, proofs and problems out."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from finetune.base import read_base
from finetune.data.cached import Progress
from finetune.data.passes import Packing, packing_of
from finetune.data.pool import Examples
from finetune.data.prepare import PreparedData, read_data
from finetune.data.store import StoredRows
from finetune.errors import FinetuneError, Problem, ProofError, UserError
from finetune.machine import probe_machine
from finetune.plan import Plan, make_plan
from finetune.recipe import Recipe, load_recipe

PARTS = ("recipe", "data")
EXAMPLES_AT_ONCE = 10_000


@dataclass(frozen=True)
class Proof:
    """A figure that must not exceed its limit."""

    name: str
    value: int
    limit: int = 0

    @property
    def passed(self) -> bool:
        return self.value <= self.limit


@dataclass(frozen=True)
class Checked:
    """What was found: problems that the user can cure, and as far as they let it be known all the rest."""

    data: PreparedData | None
    plan: Plan | None
    packing: Packing | None
    proofs: tuple[Proof, ...]
    problems: tuple[Problem, ...]
    total_problems: int

    def to_json(self) -> dict[str, Any]:
        """The keys of `finetune check --json`; what is not known is null."""
        known = self.data.account.to_json() if self.data else {"rows": None, "tokens": None}
        return {
            **known,
            "packing": self.packing.to_json() if self.packing else None,
            "problems": [asdict(problem) for problem in self.problems],
            "proofs": [{**asdict(proof), "passed": proof.passed} for proof in self.proofs],
        }

    def error(self) -> FinetuneError | None:
        """What the command fails with, its answer at hand; None if there is nothing wrong."""
        broken = [
            Problem("check", f"{proof.name}: {proof.value:,}, at most {proof.limit} is right; a bug, please report it")
            for proof in self.proofs
            if not proof.passed
        ]
        error: FinetuneError | None = None
        if self.problems:
            error = UserError([*self.problems, *broken], total=self.total_problems + len(broken))
        elif broken:
            error = ProofError(broken)
        if error:
            error.answer = self.to_json()
        return error


def check(
    recipe_path: Path, overrides: Sequence[str] = (), *, only: str | None = None, progress: Progress | None = None
) -> Checked:
    """Recipe, base, every row and the plan, or only the part that is asked for; all problems at once.

    Raises:
        UserError: the recipe cannot be read, so that nothing else is known.
    """
    if only not in (None, *PARTS):
        raise UserError(Problem("--only", f"{only!r} is not possible; write {' or '.join(PARTS)}"))
    recipe = load_recipe(recipe_path, overrides)
    if only == "recipe":
        return Checked(None, None, None, (), (), 0)
    try:
        base = read_base(recipe.model.base, revision=recipe.model.revision)
    except UserError as error:
        from finetune.data.trace import find_data_problems

        return _failed([*error.problems, *find_data_problems(recipe.data)])
    try:
        data = read_data(recipe.data, base, seed=recipe.seed, progress=progress)
    except UserError as error:
        return _failed(error.problems)
    plan, problems = (None, []) if only == "data" or not len(data.train) else _plan(recipe, data)
    return Checked(
        data=data,
        plan=plan,
        packing=packing_of(plan.train, data.train.tokens) if plan else None,
        proofs=tuple(prove(data)),
        problems=(*data.account.problems, *problems),
        total_problems=data.account.total_problems + len(problems),
    )


def _failed(problems: Sequence[Problem]) -> Checked:
    return Checked(None, None, None, (), tuple(problems), len(problems))


def _plan(recipe: Recipe, data: PreparedData) -> tuple[Plan | None, list[Problem]]:
    try:
        return make_plan(recipe, probe_machine(), data.base.facts, data.facts), []
    except UserError as error:
        return None, list(error.problems)


def prove(data: PreparedData) -> Iterator[Proof]:
    """The account's sums counted again, from the stored ids and labels alone."""
    account = data.account
    left_out = sum(account.dropped.values()) + sum(account.refused.values())
    yield Proof("rows that do not add up", abs(account.read - account.trained - account.eval - left_out))
    stops = sorted(set(data.facts.stop_token_ids) & set(data.base.special_tokens.values()))
    recounts = [_recount(examples, stops) for examples in (data.train, data.eval)]
    tokens, supervised, cut, unlearned, unstopped = (sum(each) for each in zip(*recounts, strict=True))
    wrong = abs(account.supervised_tokens - supervised) + abs(account.context_tokens - (tokens - supervised))
    yield Proof("tokens that do not add up", wrong + abs(account.truncated_tokens - cut))
    yield Proof("examples without a supervised token", unlearned)
    yield Proof("uncut examples that do not end in a stop token", unstopped)


def _recount(examples: Examples, stops: Sequence[int]) -> tuple[int, ...]:
    """Tokens, supervised and cut ones; examples that learn nothing; uncut ones that do not end in a stop token."""
    totals = np.zeros(5, np.int64)
    first = 0
    for store in examples.pool.stores:
        is_chosen = np.isin(np.arange(first, first + store.examples), examples.chosen)
        first += store.examples
        for start in range(0, store.examples, EXAMPLES_AT_ONCE):
            stop = min(start + EXAMPLES_AT_ONCE, store.examples)
            totals += _recount_block(store, start, stop, stops)[:, is_chosen[start:stop]].sum(axis=1)
    return tuple(totals.tolist())


def _recount_block(store: StoredRows, start: int, stop: int, stops: Sequence[int]) -> np.ndarray:
    """The five counts of each example from start to stop: int64 [5, stop - start]."""
    bounds = store.starts[start : stop + 1]
    ids, learned = (store.read(name, int(bounds[0]), int(bounds[-1])) for name in ("ids", "learned"))
    places = bounds[:-1] - bounds[0]
    supervised = np.add.reduceat(learned, places, dtype=np.int64) - learned[places]
    last = np.maximum.reduceat(np.where(learned, np.arange(len(learned)), 0), places)
    ends = learned[last] & np.isin(ids[last], stops)
    cut = store.arrays["cut_tokens"][start:stop]
    return np.stack([np.diff(bounds), supervised, cut, supervised == 0, (cut == 0) & ~ends]).astype(np.int64)
