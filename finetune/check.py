"""Prove before training what can be proven: a recipe in, an account of every row and token, proofs and problems out.

A rehearsal on a small twin of the base comes last, and only where nothing else is wrong.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from finetune.artifact import refuse_unusable
from finetune.base import Base, read_base
from finetune.base_problems import find_adapter_problems, find_base_problems
from finetune.check_unseen import check_unseen, unseen_model
from finetune.data.cached import Progress
from finetune.data.passes import Packing, packing_of
from finetune.data.pool import Examples
from finetune.data.prepare import PreparedData, read_data
from finetune.data.store import StoredRows
from finetune.disk import refuse_full_disk
from finetune.errors import FinetuneError, Problem, ProofError, StorageError, UserError
from finetune.machine import probe_machine
from finetune.plan import Plan, make_plan, memory_problem
from finetune.recipe import Recipe, load_recipe
from finetune.rehearsal import Rehearsed, left_out

PARTS = ("recipe", "data", "rehearsal")
EXAMPLES_AT_ONCE = 10_000
REHEARSED = "rehearsal: "
Rehearse = Callable[[Recipe, Base], Rehearsed]


@dataclass(frozen=True)
class Proof:
    """A figure that must not exceed its limit; without one it is only recorded."""

    name: str
    value: float
    limit: float | None = 0

    @property
    def passed(self) -> bool:
        return self.value == self.value and (self.limit is None or self.value <= self.limit)

    def told(self) -> Problem:
        """What a person reads where it does not hold."""
        bug = "" if self.name.startswith(REHEARSED) else "; a bug, please report it"
        return Problem("check", f"{self.name}: {self.value:,.6g}, at most {self.limit or 0:,.6g} is right{bug}")


@dataclass(frozen=True)
class Checked:
    """What was found: problems that the user can cure, and as far as they let it be known all the rest."""

    data: PreparedData | None
    plan: Plan | None
    packing: Packing | None
    proofs: tuple[Proof, ...]
    problems: tuple[Problem, ...]
    total_problems: int
    rehearsed: Rehearsed | None = None
    failure: type[FinetuneError] = UserError  # what the problems are

    def to_json(self) -> dict[str, Any]:
        """The keys of `finetune check --json`; what is not known is null."""
        known = self.data.account.to_json() if self.data else {"rows": None, "tokens": None}
        return {
            **known,
            "packing": self.packing.to_json() if self.packing else None,
            "problems": [asdict(problem) for problem in self.problems],
            "proofs": [{**asdict(proof), "passed": proof.passed} for proof in self.proofs],
            "rehearsal": self.rehearsed.to_json() if self.rehearsed else None,
        }

    def error(self) -> FinetuneError | None:
        """What the command fails with, its answer at hand; None if there is nothing wrong."""
        broken = [proof.told() for proof in self.proofs if not proof.passed]
        error: FinetuneError | None = None
        if self.problems:
            is_proof = self.rehearsed is not None and self.rehearsed.proof_failed
            kind: type[FinetuneError] = ProofError if is_proof else self.failure
            error = kind([*self.problems, *broken], total=self.total_problems + len(broken))
        elif broken:
            error = ProofError(broken)
        if error:
            error.answer = self.to_json()
        return error


def check(
    recipe_path: Path,
    overrides: Sequence[str] = (),
    *,
    only: str | None = None,
    progress: Progress | None = None,
    rehearse: Rehearse | None = None,
) -> Checked:
    """Recipe, base, every row, the plan and, with `rehearse`, a rehearsal; or only the part that is asked for.

    Raises:
        UserError: the recipe cannot be read, so that nothing else is known.
    """
    if only not in (None, *PARTS):
        raise UserError(Problem("--only", f"{only!r} is not possible; write {', '.join(PARTS[:-1])} or {PARTS[-1]}"))
    recipe = load_recipe(recipe_path, overrides)
    if only == "recipe":
        return Checked(None, None, None, (), (), 0)
    if only != "data" and (model := unseen_model(recipe)):
        problems, rehearsed = check_unseen(recipe, model, rehearse)
        return replace(_failed(problems), rehearsed=rehearsed, proofs=tuple(map(_proof, rehearsed.proofs)))
    try:
        base = read_base(recipe.model.base, revision=recipe.model.revision)
        if only == "rehearsal":
            return _with_rehearsal(_failed(()), recipe, base, rehearse)
    except (UserError, StorageError) as error:
        from finetune.data.trace import find_data_problems

        failed = _failed([*error.problems, *find_data_problems(recipe.data)])
        failed = replace(failed, rehearsed=left_out("the base cannot be read, so there is no twin of it"))
        return replace(failed, failure=type(error))
    checked = _check_data(recipe, base, only=only, progress=progress)
    return checked if only == "data" else _with_rehearsal(checked, recipe, base, rehearse)


def _check_data(recipe: Recipe, base: Base, *, only: str | None, progress: Progress | None) -> Checked:
    """The account of the rows, and unless only the data is asked for, the base's weights and the plan."""
    of_base: list[Problem] = []
    try:
        of_base = [] if only == "data" else find_base_problems(base)
        data = read_data(recipe.data, base, seed=recipe.seed, progress=progress)
    except UserError as error:
        return _failed([*of_base, *error.problems])
    plan, problems = (None, []) if only == "data" or not len(data.train) else _plan(recipe, data)
    problems = [*of_base, *problems]
    return Checked(
        data=data,
        plan=plan,
        packing=packing_of(plan.train, data.train.tokens) if plan else None,
        proofs=tuple(prove(data)),
        problems=(*data.account.problems, *problems),
        total_problems=data.account.total_problems + len(problems),
    )


def _with_rehearsal(checked: Checked, recipe: Recipe, base: Base, rehearse: Rehearse | None) -> Checked:
    """What is wrong already is cured first: a rehearsal of it would tell the same later."""
    if rehearse is None:
        return checked
    if checked.problems:
        return replace(checked, rehearsed=left_out("it comes when the problems found before it are solved"))
    try:
        rehearsed = rehearse(recipe, base)
    except UserError as error:
        return replace(checked, problems=error.problems, total_problems=len(error.problems))
    return replace(
        checked,
        rehearsed=rehearsed,
        proofs=(*checked.proofs, *map(_proof, rehearsed.proofs)),
        problems=rehearsed.problems,
        total_problems=len(rehearsed.problems),
    )


def _proof(values: Mapping[str, Any]) -> Proof:
    return Proof(REHEARSED + values["name"], values["value"], values["limit"])


def _failed(problems: Sequence[Problem]) -> Checked:
    return Checked(None, None, None, (), tuple(problems), len(problems))


def _plan(recipe: Recipe, data: PreparedData) -> tuple[Plan | None, list[Problem]]:
    machine = probe_machine()
    token_ids = data.base.token_ids(recipe.adapter.train_tokens)
    try:
        token_ids = data.base.token_ids(recipe.adapter.train_tokens)
        plan = make_plan(recipe, machine, data.base.facts, data.facts, token_ids=token_ids)
    except UserError as error:
        return None, list(error.problems)
    problem = memory_problem(plan, machine)
    problems = [problem] if problem else []
    if plan.adapter.start_from:
        problems += find_adapter_problems(plan.adapter.start_from, data.base)
    problems += _prompt_problems(plan, data)
    try:
        refuse_unusable(plan, resume=True)
        there = next(path for path in (plan.run_folder, *plan.run_folder.absolute().parents) if path.is_dir())
        refuse_full_disk(there, plan, merged_bytes=data.base.facts.stored_bytes)
    except (UserError, StorageError) as error:
        problems += error.problems
    return plan, problems


def _prompt_problems(plan: Plan, data: PreparedData) -> Sequence[Problem]:
    if plan.train.prompts is None:
        return ()
    from finetune.data.prompts import read_prompts  # what reads rows without the cache

    try:
        read_prompts(plan.train.prompts, data.base, data.template, system=plan.settings["data.system"])
    except UserError as error:
        return error.problems
    return ()


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
