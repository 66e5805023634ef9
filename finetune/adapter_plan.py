"""Resolve an adapter: what was asked and the base's shapes in; its modules, their ranks and its parameters out."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from finetune.base import BaseFacts, ExpertShape, LinearShape
from finetune.recipe import Recipe
from finetune.recipe_adapter import AdapterSection

KINDS = ("all-linear", "attention", "mlp", "experts")
# A router chooses experts, a gate weighs one: its output is a decision for each token, not a state (and Llama 4's is a
# tuple, on which PEFT fails).
ROUTERS = {"router", "gate", "shared_expert_gate"}
# Of these architectures PEFT takes a LoRA's target gate_proj, up_proj or down_proj for the experts' fused parameters,
# wherever it lies (utils/transformers_weight_conversion.py): a dense MLP beside the experts cannot be adapted.
LORA_METHODS = ("lora", "rslora", "dora")
TAKEN_FOR_EXPERTS = ("gate_proj", "up_proj", "down_proj")
TAKEN_IN = {
    *("Dots3NoteTextModel", "UnlimitedOcrTextModel", "afmoe", "beam", "cohere2_moe", "deepseek_v2", "deepseek_v3"),
    *("deepseek_v32", "dots1", "ernie4_5_moe", "exaone_moe", "flex_olmo", "glm4_moe", "glm4_moe_lite", "glm4v_moe"),
    *("glm_moe_dsa", "hunyuan_v1_moe", "longcat_flash", "mellum", "olmoe", "qwen3_moe", "qwen3_next", "qwen3_omni_moe"),
    *("qwen3_omni_moe_text", "qwen3_omni_moe_thinker", "solar_open"),
}
BLOCK_SIZE = 32  # of oft, as in its paper's code
LAYER = re.compile(r"\.layers\.(\d+)\.")


@dataclass(frozen=True)
class AdapterPlan:
    """The trainable delta: which modules, and how it is scaled."""

    method: str
    rank: int
    alpha: float
    dropout: float
    targets: tuple[str, ...]  # ends of modules' paths, sorted
    start_from: Path | None
    seed: int
    experts: tuple[str, ...] = ()  # ends of the paths of fused parameters
    layers: tuple[int, ...] | None = None  # None: all
    rank_by: Mapping[str, int] = field(default_factory=dict)
    alpha_by: Mapping[str, float] = field(default_factory=dict)
    start: str = "default"
    scaled_inputs: tuple[str, ...] = ()  # of ia3: the targets whose inputs are scaled, not their outputs
    block_size: int = 0  # of oft
    token_ids: tuple[int, ...] = ()  # rows of the embedding and, where it is not tied, of the head
    also_train: tuple[str, ...] = ()
    tied_embeddings: bool = False
    beside_vision: bool = False  # the model has a vision tower, whose modules of the same names stay as they are


def plan_adapter(recipe: Recipe, base: BaseFacts, token_ids: Mapping[str, int | None]) -> AdapterPlan:
    """The adapter; what keeps it from being attached is adapter_problems'. `token_ids` by token."""
    asked = recipe.adapter
    linears, experts = chosen(asked, base)
    return AdapterPlan(
        method=asked.method,
        rank=asked.rank,
        alpha=float(asked.alpha),
        dropout=asked.dropout,
        targets=_endings(linears, base.linears),
        start_from=Path(asked.from_).expanduser() if asked.from_ else None,
        seed=recipe.seed,
        experts=tuple(sorted({_last(shape.parameter, 2) for shape in experts})),
        layers=layers_of(asked.layers) or _text_layers(base),
        rank_by=dict(asked.rank_by or {}),
        alpha_by={pattern: float(alpha) for pattern, alpha in (asked.alpha_by or {}).items()},
        start=asked.start,
        scaled_inputs=_endings([each for each in linears if _narrows(each, base)], base.linears)
        if asked.method == "ia3"
        else (),
        block_size=(asked.block_size or BLOCK_SIZE) if asked.method == "oft" else 0,
        token_ids=tuple(sorted({found for found in map(token_ids.get, asked.train_tokens) if found is not None})),
        also_train=tuple(sorted(asked.also_train)),
        tied_embeddings=base.tied_embeddings,
        beside_vision=base.has_vision,
    )


def count_parameters(plan: AdapterPlan, base: BaseFacts) -> int:
    """Trainable parameters in closed form."""
    total = sum(
        parameters_of(linear, method=plan.method, rank=rank_of(plan, linear.module), scaled_inputs=plan.scaled_inputs,
                      block_size=plan.block_size)
        for linear in in_layers(base.linears, plan)
        if is_target(linear.module, plan.targets)
    )  # fmt: skip
    total += sum(
        shape.experts * rank_of(plan, _last(shape.parameter, 2)) * (shape.in_features + shape.out_features)
        for shape in base.experts
        if is_target(shape.parameter, plan.experts) and is_in(shape.parameter, plan.layers)
    )
    matrices = min(len(plan.also_train), 1) if base.tied_embeddings else len(plan.also_train)
    rows = len(plan.token_ids) * (1 if base.tied_embeddings else 2) + base.vocabulary * matrices
    return total + rows * base.hidden_size


def count_stored(plan: AdapterPlan, base: BaseFacts) -> int:
    """Parameters that the optimizer and the adapter's file hold: a start taken from the base is held beside it."""
    return count_parameters(plan, base) * (1 if plan.start == "default" else 2)


def count_trainable(linears: tuple[LinearShape, ...], targets: tuple[str, ...], *, method: str, rank: int) -> int:
    """Trainable parameters of one rank on all the linears that are targets."""
    return sum(
        parameters_of(linear, method=method, rank=rank) for linear in linears if is_target(linear.module, targets)
    )


def parameters_of(
    linear: LinearShape, *, method: str, rank: int, scaled_inputs: Sequence[str] = (), block_size: int = 0
) -> int:
    """Trainable parameters of one linear; docs/adapters.md derives each line."""
    inputs, outputs = linear.in_features, linear.out_features
    if method == "ia3":
        return inputs if is_target(linear.module, scaled_inputs) else outputs
    if method == "vera":
        return rank + outputs
    if method == "oft":
        return inputs * (block_size - 1) // 2
    return rank * (inputs + outputs) + (outputs if method == "dora" else 0)


def is_target(path: str, targets: Sequence[str]) -> bool:
    """Whether a module's path is one of these, or ends with one after a dot: PEFT's own rule."""
    return any(path == target or path.endswith(f".{target}") for target in targets)


def rank_of(plan: AdapterPlan, path: str) -> int:
    """The rank of a module or fused parameter."""
    return next((rank for pattern, rank in plan.rank_by.items() if matches(pattern, path)), plan.rank)


def layers_of(asked: str | tuple[int, ...] | None) -> tuple[int, ...] | None:
    """The numbers of the layers: "8-15" holds both its ends."""
    if isinstance(asked, str):
        first, last = map(int, asked.split("-"))
        return tuple(range(first, last + 1)) if last - first < 100_000 else (first, last)
    return None if asked is None else tuple(sorted(asked))


def _text_layers(base: BaseFacts) -> tuple[int, ...] | None:
    """The layers that rows of text go through, where that is not all of them."""
    return tuple(layer for layer in range(base.layers) if layer not in base.image_layers) if base.image_layers else None


def chosen(asked: AdapterSection, base: BaseFacts) -> tuple[list[LinearShape], list[ExpertShape]]:
    """The linears and the fused parameters that the targets name, in any layer."""
    names = [asked.targets] if isinstance(asked.targets, str) else list(asked.targets)
    linears = [
        linear
        for linear in base.linears
        if is_target(linear.module, names)
        or (
            linear.leaf not in ROUTERS
            and kind_of(linear, names)
            and not is_taken_for_experts(linear, base, asked.method)
        )
    ]
    return linears, list(base.experts) if "experts" in names else []


def is_of_a_kind(linear: LinearShape, base: BaseFacts, method: str) -> bool:
    """Whether a kind of targets may mean this linear at all."""
    return linear.leaf not in ROUTERS and not is_taken_for_experts(linear, base, method)


def is_taken_for_experts(linear: LinearShape, base: BaseFacts, method: str) -> bool:
    """Whether PEFT would adapt the experts in place of this linear; it asks only a LoRA's targets."""
    return method in LORA_METHODS and base.model_type in TAKEN_IN and linear.leaf in TAKEN_FOR_EXPERTS


def kind_of(linear: LinearShape, kinds: Sequence[str]) -> bool:
    kind = "attention" if "attn" in linear.module or "attention" in linear.module else "mlp"
    return "all-linear" in kinds or kind in kinds


def _endings(linears: Sequence[LinearShape], every: Sequence[LinearShape]) -> tuple[str, ...]:
    """The shortest ends of paths that name these linears and no other: a leaf, or parent and leaf."""
    chosen = {linear.module for linear in linears}
    others = {linear.leaf for linear in every if linear.module not in chosen}
    return tuple(sorted({_last(each.module, 1 + (each.leaf in others)) for each in linears}))


def _last(path: str, parts: int) -> str:
    return ".".join(path.split(".")[-parts:])


def _narrows(linear: LinearShape, base: BaseFacts) -> bool:
    """Whether this is the second linear of an mlp, whose inputs are the inner activations that IA3 scales."""
    return kind_of(linear, ["mlp"]) and linear.out_features == base.hidden_size != linear.in_features


def is_in(path: str, layers: tuple[int, ...] | None) -> bool:
    found = LAYER.search(path)
    return layers is None or (found is not None and int(found.group(1)) in layers)


def in_layers(linears: Sequence[LinearShape], plan: AdapterPlan) -> Iterator[LinearShape]:
    return (linear for linear in linears if is_in(linear.module, plan.layers))


def matches(pattern: str, path: str) -> bool:
    try:
        return re.match(rf"(.*\.)?({pattern})$", path) is not None  # PEFT utils/other.py, get_pattern_key
    except re.error:
        return False  # told in its place
