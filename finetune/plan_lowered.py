"""After out of memory: the layout that a run's further steps take, kept in plan.json so that every resume takes it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from finetune.plan import TrainPlan
from finetune.plan_layout import FEWEST_TOKENS_PER_PASS, Lowered


def layout_of_step(plan: TrainPlan, step: int) -> Lowered:
    """The layout of a step's passes: that of the last entry of the plan that is not after it."""
    planned = Lowered(1, plan.tokens_per_pass, plan.recompute)
    return [planned, *(each for each in plan.lowered if each.step <= step)][-1]


def lighten(plan: TrainPlan, *, step: int, longest: int) -> TrainPlan | None:
    """The plan with a lighter layout from `step` on; None where nothing is left that the recipe leaves to `auto`.

    First narrower passes, which cost the least, then recomputation. `longest`: tokens of the longest example, which no
    pass can be narrower than.
    """
    now = layout_of_step(plan, step)
    narrower = now.tokens_per_pass // 2
    if "tokens_per_pass" in plan.open_keys and narrower >= max(longest, FEWEST_TOKENS_PER_PASS):
        lighter = Lowered(step, narrower, now.recompute)
    elif "recompute" in plan.open_keys and not now.recompute:
        lighter = Lowered(step, now.tokens_per_pass, recompute=True)
    else:
        return None
    others = [each for each in plan.lowered if each.step != step]
    return replace(plan, lowered=tuple(sorted([*others, lighter], key=lambda each: each.step)))


def lowered_before(begun: Mapping[str, Any], plan: TrainPlan) -> TrainPlan:
    """The plan of a run that goes on, lowered as its plan.json says; not where the recipe asks for another layout."""
    before = begun.get("train", {})
    if (before.get("tokens_per_pass"), before.get("recompute")) != (plan.tokens_per_pass, plan.recompute):
        return plan
    return replace(plan, lowered=tuple(Lowered(**each) for each in before.get("lowered", ())))
