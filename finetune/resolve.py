"""From a recipe file to a plan, before a weight is loaded: what `plan`, `show`, `check` and `train` have in common."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from finetune.base import Base, read_base
from finetune.data.cached import Progress
from finetune.data.prepare import PreparedData, prepare_data
from finetune.errors import UserError
from finetune.machine import probe_machine
from finetune.plan import Plan, make_plan
from finetune.recipe import Recipe, load_recipe


@dataclass(frozen=True)
class Resolved:
    """A recipe with everything that follows from it."""

    recipe: Recipe
    base: Base
    data: PreparedData
    plan: Plan


def resolve(
    recipe_path: Path, overrides: Sequence[str] = (), *, out: Path | None = None, progress: Progress | None = None
) -> Resolved:
    """Recipe, base facts, data and plan; `out` is a run folder in place of the recipe's.

    Raises:
        UserError: all problems of the first of recipe, base and data, and plan that has any.
    """
    recipe = load_recipe(recipe_path, overrides)
    base, data = _read_base_and_data(recipe, progress)
    plan = make_plan(recipe, probe_machine(), base.facts, data.facts)
    return Resolved(recipe, base, data, replace(plan, run_folder=out) if out else plan)


def _read_base_and_data(recipe: Recipe, progress: Progress | None) -> tuple[Base, PreparedData]:
    try:
        base = read_base(recipe.model.base, revision=recipe.model.revision)
    except UserError as error:
        from finetune.data.trace import find_data_problems  # what reads rows without the cache

        raise UserError([*error.problems, *find_data_problems(recipe.data)]) from error
    return base, prepare_data(recipe.data, base, seed=recipe.seed, progress=progress)
