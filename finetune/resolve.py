"""From a recipe file to a plan, before a weight is loaded: what `plan`, `show`, `check` and `train` have in common."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from finetune.artifact import settings_begun_with
from finetune.base import Base, is_here, read_base
from finetune.calibration import read_calibration
from finetune.data.cached import Progress
from finetune.data.prepare import PreparedData, prepare_data
from finetune.errors import UserError
from finetune.families import find_model
from finetune.machine import probe_machine
from finetune.plan import Plan, make_plan
from finetune.recipe import Recipe, load_recipe
from finetune.unseen import plan_unseen


@dataclass(frozen=True)
class Resolved:
    """A recipe with everything that follows from it."""

    recipe: Recipe
    base: Base
    data: PreparedData
    plan: Plan


def resolve(
    recipe_path: Path,
    overrides: Sequence[str] = (),
    *,
    out: Path | None = None,
    progress: Progress | None = None,
    weights: bool = True,
    resume: bool = False,
) -> Resolved:
    """Recipe, base facts, data and plan; `out` is a run folder in place of the recipe's.

    A base that is not here is fetched; without `weights` no more of it than a plan needs. With `resume` the layout that
    the recipe leaves open is that of the run in the folder.

    Raises:
        UserError: all problems of the first of recipe, base and data, and plan that has any.
    """
    recipe = load_recipe(recipe_path, overrides)
    base, data = _read_base_and_data(recipe, progress, weights=weights)
    token_ids = base.token_ids(recipe.adapter.train_tokens)
    begun = settings_begun_with(out or recipe.run_folder) if resume else None
    machine = probe_machine()
    plan = make_plan(
        recipe,
        machine,
        base.facts,
        data.facts,
        token_ids=token_ids,
        begun=begun,
        calibration=read_calibration(machine),
    )
    return Resolved(recipe, base, data, replace(plan, run_folder=out) if out else plan)


def plan_values(
    recipe_path: Path, overrides: Sequence[str] = (), *, progress: Progress | None = None
) -> dict[str, Any]:
    """What `finetune plan` answers; of a published base that is not on this machine what its shape tells.

    Raises:
        UserError: as resolve.
    """
    recipe = load_recipe(recipe_path, overrides)
    model = find_model(recipe.model.base)
    if model and not is_here(recipe.model.base, revision=recipe.model.revision):
        values = plan_unseen(recipe, model)
    else:
        values = resolve(recipe_path, overrides, progress=progress, weights=False).plan.to_json()
    machine = probe_machine()
    return values | {"device_name": machine.device_name, "device_memory_gib": machine.device_memory_gib}


def _read_base_and_data(recipe: Recipe, progress: Progress | None, *, weights: bool) -> tuple[Base, PreparedData]:
    try:
        base = read_base(recipe.model.base, revision=recipe.model.revision, weights=weights)
    except UserError as error:
        from finetune.data.trace import find_data_problems  # what reads rows without the cache

        raise UserError([*error.problems, *find_data_problems(recipe.data)]) from error
    return base, prepare_data(recipe.data, base, seed=recipe.seed, progress=progress)
