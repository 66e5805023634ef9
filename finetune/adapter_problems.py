"""What keeps an adapter from being attached, trained or merged: what was asked and its plan in, problems out."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from finetune.adapter_plan import (
    KINDS,
    ROUTERS,
    AdapterPlan,
    chosen,
    in_layers,
    is_in,
    is_taken_for_experts,
    is_target,
    layers_of,
    matches,
    rank_of,
)
from finetune.base import BaseFacts, LinearShape
from finetune.errors import Problem
from finetune.recipe import Recipe
from finetune.recipe_adapter import AdapterSection


def adapter_problems(
    recipe: Recipe, plan: AdapterPlan, base: BaseFacts, token_ids: Mapping[str, int | None]
) -> list[Problem]:
    """Everything that is wrong with an adapter on this base; `token_ids` are those of adapter.train_tokens."""
    asked = recipe.adapter
    problems = [*_target_problems(asked, base), *_expert_problems(recipe, base), *_layer_problems(asked, plan, base)]
    problems += [*_pattern_problems(plan, base), *_start_problems(recipe, plan, base), *_block_problems(plan, base)]
    return problems + list(_token_problems(asked, base, token_ids))


def _target_problems(asked: AdapterSection, base: BaseFacts) -> Iterator[Problem]:
    known = sorted({linear.leaf for linear in base.linears if linear.leaf not in ROUTERS})
    for name in [asked.targets] if isinstance(asked.targets, str) else asked.targets:
        taken = [each for each in base.linears if is_target(each.module, (name,))]
        if taken and all(is_taken_for_experts(each, base, asked.method) for each in taken):
            message = f"PEFT takes {name} of a {base.model_type} for its experts; write targets: [attention, experts]"
            yield Problem("adapter.targets", message)
        if name == "experts" or _names_a_linear(name, base.linears):
            continue
        if name in KINDS:
            if not chosen(asked.model_copy(update={"targets": name}), base)[0]:
                message = f"{base.base} has no linear modules of the kind {name}; write another kind"
                yield Problem("adapter.targets", message)
            continue
        message = f"no linear module is called {name!r} in {base.base}; there are: {', '.join(known)}; "
        yield Problem("adapter.targets", f"{message}write one of these, or `targets: all-linear`")


def _names_a_linear(name: str, linears: Sequence[LinearShape]) -> bool:
    """Whether a target names a linear that is no router."""
    return any(is_target(linear.module, (name,)) and linear.leaf not in ROUTERS for linear in linears)


def _expert_problems(recipe: Recipe, base: BaseFacts) -> Iterator[Problem]:
    asked = recipe.adapter
    if "experts" not in ([asked.targets] if isinstance(asked.targets, str) else asked.targets):
        return
    if not chosen(asked, base)[1]:
        yield Problem("adapter.targets", "the base has no experts; write attention, mlp or all-linear")
    if asked.method not in ("lora", "rslora"):
        yield Problem("adapter.targets", f"{asked.method} cannot adapt experts; write method: lora or rslora")
    if asked.dropout:
        yield Problem("adapter.dropout", "has no effect on experts, whose inputs PEFT does not see; write 0")
    if recipe.model.quantization == "int8":
        message = "experts are adapted in 4 or 16 bits; write model.quantization: nf4 or none, or other targets"
        yield Problem("adapter.targets", message)


def _layer_problems(asked: AdapterSection, plan: AdapterPlan, base: BaseFacts) -> Iterator[Problem]:
    layers = layers_of(asked.layers)
    if layers is None:
        return
    places = [linear.module for linear in base.linears if is_target(linear.module, plan.targets)]
    places += [shape.parameter for shape in base.experts if is_target(shape.parameter, plan.experts)]
    if not layers:
        yield Problem("adapter.layers", f"{asked.layers}: the first layer is behind the last; write it the other way")
    elif layers[-1] >= base.layers:
        yield Problem("adapter.layers", f"{base.base} has the layers 0 to {base.layers - 1}, got {layers[-1]}")
    elif places and not any(is_in(place, layers) for place in places):
        yield Problem("adapter.layers", "none of these layers holds a target; name others, or other targets")


def _pattern_problems(plan: AdapterPlan, base: BaseFacts) -> Iterator[Problem]:
    """A pattern that fits no target, or one that another pattern fits too: PEFT takes the first, whichever that is."""
    paths = [linear.module for linear in in_layers(base.linears, plan) if is_target(linear.module, plan.targets)]
    paths += plan.experts  # what comes before differs between files and model
    for key, patterns in (("rank_by", plan.rank_by), ("alpha_by", plan.alpha_by)):
        taken: dict[str, str] = {}
        for pattern in patterns:
            fitting = [path for path in paths if matches(pattern, path)]
            if not fitting:
                yield Problem(f"adapter.{key}", f"{pattern!r} fits no target; targets are: {', '.join(plan.targets)}")
            shared = next((path for path in fitting if path in taken), None)
            if shared:
                yield Problem(f"adapter.{key}", f"{taken[shared]!r} and {pattern!r} both fit {shared}; keep one")
            taken |= dict.fromkeys(fitting, pattern)


def _start_problems(recipe: Recipe, plan: AdapterPlan, base: BaseFacts) -> Iterator[Problem]:
    if plan.start == "default":
        return
    if plan.start_from is not None:
        yield Problem("adapter.start", "has no effect beside adapter.from, whose matrices are taken; remove one")
    if plan.experts:
        yield Problem("adapter.start", f"{plan.start} is for linears, not for experts; write default")
    if recipe.train.weight_decay:
        yield Problem("train.weight_decay", f"would wear down the part that {plan.start} holds fixed; write 0")
    for linear in in_layers(base.linears, plan):
        smaller = min(linear.in_features, linear.out_features)
        if is_target(linear.module, plan.targets) and rank_of(plan, linear.module) > smaller:
            message = f"{plan.start} takes as many directions from {linear.module}, which has {smaller}; lower it"
            yield Problem("adapter.rank", message)
            return


def _block_problems(plan: AdapterPlan, base: BaseFacts) -> Iterator[Problem]:
    if plan.method != "oft":
        return
    targets = [linear for linear in in_layers(base.linears, plan) if is_target(linear.module, plan.targets)]
    odd = sorted({linear.leaf for linear in targets if linear.in_features % plan.block_size})
    if odd:
        sizes = ", ".join(str(size) for size in sorted({linear.in_features for linear in targets}))
        message = f"{plan.block_size} does not divide the inputs of {', '.join(odd)}; the targets have {sizes}"
        yield Problem("adapter.block_size", message)


def _token_problems(asked: AdapterSection, base: BaseFacts, token_ids: Mapping[str, int | None]) -> Iterator[Problem]:
    for token in asked.train_tokens:
        found = token_ids.get(token)
        if found is None:
            message = f"the tokenizer has no token {token!r}; take one that it has, as a reserved one"
            yield Problem("adapter.train_tokens", message)
        elif found >= base.vocabulary:
            message = f"{token!r} has the id {found}, the base's embedding has {base.vocabulary} rows; take another"
            yield Problem("adapter.train_tokens", message)
    if asked.train_tokens and asked.also_train:
        yield Problem("adapter.train_tokens", "stands beside adapter.also_train, which trains all rows; keep one")
