"""What `finetune plan` answers: a recipe, a machine and a memory to fit into in; every number in plain values out."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from finetune.base import BaseFacts, is_here, read_base
from finetune.calibration import Calibration, read_calibration
from finetune.data.cached import Progress
from finetune.data.prepare import prepare_data
from finetune.errors import UserError
from finetune.families import find_model
from finetune.fit import Changes, as_override, fit_into, read_size
from finetune.machine import Machine, probe_machine
from finetune.named_machines import assumptions, named_machine
from finetune.plan import DataFacts, Plan, make_plan
from finetune.recipe import DataSection, Recipe, load_recipe
from finetune.recipe_overrides import key_of
from finetune.unseen import find_facts, mark_unseen


@dataclass(frozen=True)
class Facts:
    """What a plan is made of, besides the recipe and the machine."""

    base: BaseFacts
    data: DataFacts
    token_ids: Mapping[str, int | None]
    notes: tuple[str, ...] = ()  # what is assumed of the rows, where they cannot be read
    is_seen: bool = True  # the base is on this machine


def plan_values(
    recipe_path: Path,
    overrides: Sequence[str] = (),
    *,
    progress: Progress | None = None,
    on: str | None = None,
    fit: str | None = None,
) -> dict[str, Any]:
    """The plan of this recipe here, or `on` a machine of that name; with `fit` also what to change to fit so much.

    Of a published base that is not on this machine its shape is taken: what is estimated then is named, what is unknown
    is None.

    Raises:
        UserError: all problems of the first of recipe, base and data, and plan that has any.
    """
    size = read_size(fit) if fit else None
    machine, calibration = named_machine(on) if on else (probe_machine(), read_calibration(probe_machine()))
    facts_of = _facts_reader(progress)
    recipe = load_recipe(recipe_path, overrides)
    facts = facts_of(recipe)
    plan = _plan(recipe, facts, machine, calibration)
    values = plan.to_json() if facts.is_seen else mark_unseen(plan.to_json())
    values |= {"device_name": machine.device_name, "device_memory_gib": machine.device_memory_gib}
    values |= {"on": on, "assumptions": [*facts.notes, *(assumptions(on) if on else ())]}
    if size is None:
        return values

    def replan(changes: Changes) -> Plan:
        kept = [override for override in overrides if key_of(override) not in changes]
        changed = load_recipe(recipe_path, [*kept, *(as_override(*change) for change in changes.items())])
        return _plan(changed, facts_of(changed), machine, calibration)

    return values | {"fit": fit_into(size, replan).to_json()}


def _plan(recipe: Recipe, facts: Facts, machine: Machine, calibration: Calibration | None) -> Plan:
    return make_plan(recipe, machine, facts.base, facts.data, token_ids=facts.token_ids, calibration=calibration)


def _facts_reader(progress: Progress | None) -> Callable[[Recipe], Facts]:
    """Reads a recipe's base and rows; rows that were read once are not read again for other keys than those of data."""
    read: list[tuple[DataSection, Facts]] = []

    def facts_of(recipe: Recipe) -> Facts:
        for data, facts in read:
            if data == recipe.data:
                return facts
        read.append((recipe.data, _read_facts(recipe, progress)))
        return read[-1][1]

    return facts_of


def _read_facts(recipe: Recipe, progress: Progress | None) -> Facts:
    model = find_model(recipe.model.base)
    if model and not is_here(recipe.model.base, revision=recipe.model.revision):
        base, data, notes = find_facts(recipe, model)
        rows = {token: row for row, token in enumerate(recipe.adapter.train_tokens)}  # which ones is not known here
        return Facts(base, data, rows, notes, is_seen=False)
    try:
        found = read_base(recipe.model.base, revision=recipe.model.revision, weights=False)
    except UserError as error:
        from finetune.data.trace import find_data_problems  # what reads rows without the cache

        raise UserError([*error.problems, *find_data_problems(recipe.data)]) from error
    prepared = prepare_data(recipe.data, found, seed=recipe.seed, progress=progress)
    return Facts(found.facts, prepared.facts, found.token_ids(recipe.adapter.train_tokens))
