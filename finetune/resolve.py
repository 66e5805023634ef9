"""From a recipe file to a plan, before a weight is loaded: what `plan`, `show`, `check` and `train` have in common."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from finetune.artifact import plan_begun_with
from finetune.base import Base, read_base
from finetune.calibration import read_calibration
from finetune.data.cached import Progress
from finetune.data.prepare import PreparedData, prepare_data
from finetune.data.template import Template
from finetune.errors import UserError
from finetune.machine import probe_machine
from finetune.plan import Plan, make_plan
from finetune.plan_lowered import lowered_before
from finetune.recipe import Recipe, load_recipe

if TYPE_CHECKING:
    from finetune.data.prompts import Prompt


@dataclass(frozen=True)
class Resolved:
    """A recipe with everything that follows from it."""

    recipe: Recipe
    base: Base
    data: PreparedData
    plan: Plan
    prompts: tuple[Prompt, ...] = ()  # answered while it trains


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
    begun = plan_begun_with(out or recipe.run_folder) if resume else None
    machine = probe_machine()
    plan = make_plan(
        recipe,
        machine,
        base.facts,
        data.facts,
        token_ids=token_ids,
        begun=begun["settings"] if begun else None,
        calibration=read_calibration(machine),
    )
    if begun:
        plan = replace(plan, train=lowered_before(begun, plan.train))
    plan = replace(plan, run_folder=out) if out else plan
    return Resolved(recipe, base, data, plan, _prompts_of(plan, base, data.template))


def _prompts_of(plan: Plan, base: Base, template: Template) -> tuple[Prompt, ...]:
    if plan.train.prompts is None:
        return ()
    from finetune.data.prompts import read_prompts  # what reads rows without the cache

    return read_prompts(plan.train.prompts, base, template, system=plan.settings["data.system"])


def _read_base_and_data(recipe: Recipe, progress: Progress | None, *, weights: bool) -> tuple[Base, PreparedData]:
    try:
        base = read_base(recipe.model.base, revision=recipe.model.revision, weights=weights)
    except UserError as error:
        from finetune.data.trace import find_data_problems  # what reads rows without the cache

        raise UserError([*error.problems, *find_data_problems(recipe.data)]) from error
    return base, prepare_data(recipe.data, base, seed=recipe.seed, progress=progress)
