"""PEFT's settings of each adapter method: a plan and a model in, a config out. Every value that matters is named."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from peft import IA3Config, LoraConfig, OFTConfig, PeftConfig, VeraConfig

from finetune.families import VISION
from finetune.plan import AdapterPlan


def make_config(plan: AdapterPlan, model: torch.nn.Module) -> PeftConfig:
    """The settings with which PEFT attaches the plan's adapter to this model."""
    return METHODS[plan.method](plan, model)


def _lora(plan: AdapterPlan, model: torch.nn.Module, **extra: Any) -> LoraConfig:
    # A start taken from the base lies beside the trained matrices in the same ones: finetune/model/starts.py.
    times = 1 if plan.start == "default" else 2
    return LoraConfig(
        task_type="CAUSAL_LM",
        r=times * plan.rank,
        lora_alpha=_number(times * plan.alpha),
        lora_dropout=plan.dropout,
        rank_pattern={pattern: times * rank for pattern, rank in plan.rank_by.items()},
        alpha_pattern={pattern: _number(times * alpha) for pattern, alpha in plan.alpha_by.items()},
        **_modules(plan),
        target_parameters=_experts(plan, model) or None,
        trainable_token_indices=_token_rows(plan, model),
        modules_to_save=_whole_modules(plan, model) or None,
        ensure_weight_tying=plan.tied_embeddings and bool(plan.also_train),
        bias="none",
        **extra,
    )


def _ia3(plan: AdapterPlan, model: torch.nn.Module) -> IA3Config:
    # IA3 knows no layers: one pattern over the whole path says both.
    return IA3Config(
        task_type="CAUSAL_LM",
        target_modules=_path_pattern(plan, plan.targets),
        feedforward_modules=_path_pattern(plan, plan.scaled_inputs) if plan.scaled_inputs else [],
        init_ia3_weights=True,
    )


def _vera(plan: AdapterPlan, model: torch.nn.Module) -> VeraConfig:
    return VeraConfig(
        task_type="CAUSAL_LM",
        r=plan.rank,
        vera_dropout=plan.dropout,
        **_modules(plan),
        projection_prng_key=plan.seed,
        save_projection=True,  # another version of torch may draw other numbers from the same seed
        d_initial=0.1,
    )


def _oft(plan: AdapterPlan, model: torch.nn.Module) -> OFTConfig:
    return OFTConfig(
        task_type="CAUSAL_LM",
        r=0,
        oft_block_size=plan.block_size,
        **_modules(plan),
        use_cayley_neumann=False,  # the series of five terms leaves the rotations: it stretches what it turns
    )


METHODS: dict[str, Callable[[AdapterPlan, torch.nn.Module], PeftConfig]] = {
    "lora": _lora,
    "rslora": lambda plan, model: _lora(plan, model, use_rslora=True),
    "dora": lambda plan, model: _lora(plan, model, use_dora=True),
    "ia3": _ia3,
    "vera": _vera,
    "oft": _oft,
}


def _number(value: float) -> Any:
    return int(value) if float(value).is_integer() else value


def _experts(plan: AdapterPlan, model: torch.nn.Module) -> list[str]:
    """Full paths of the fused parameters in the plan's layers."""
    return sorted(
        name
        for name, _ in model.named_parameters()
        if name.endswith(tuple(f".{target}" for target in plan.experts))
        and (plan.layers is None or any(f".layers.{layer}." in name for layer in plan.layers))
    )


def _token_rows(plan: AdapterPlan, model: Any) -> list[int] | dict[str, list[int]] | None:
    """Rows of the embedding; of a head of its own, too, which would not learn to write the tokens otherwise."""
    if not plan.token_ids:
        return None
    rows = list(plan.token_ids)
    embedding, head = _name_of(model, model.get_input_embeddings()), _name_of(model, model.get_output_embeddings())
    return {embedding: rows} if plan.tied_embeddings else {embedding: rows, head: rows}


def _whole_modules(plan: AdapterPlan, model: Any) -> list[str]:
    found = {"embed_tokens": model.get_input_embeddings(), "lm_head": model.get_output_embeddings()}
    return sorted(_name_of(model, found[name]) for name in plan.also_train)


def _name_of(model: torch.nn.Module, wanted: torch.nn.Module) -> str:
    return next(path.rpartition(".")[2] for path, module in model.named_modules() if module is wanted)


def _modules(plan: AdapterPlan) -> dict[str, Any]:
    """Which modules, as PEFT is told: by the ends of their paths, or, beside a vision tower, by the whole path."""
    if plan.beside_vision and plan.targets:
        return {"target_modules": _path_pattern(plan, plan.targets)}
    return {
        "target_modules": list(plan.targets),
        "layers_to_transform": None if plan.layers is None else list(plan.layers),
        "layers_pattern": None if plan.layers is None else "layers",
    }


def _path_pattern(plan: AdapterPlan, targets: tuple[str, ...]) -> str:
    seen = "".join(rf"(?!(.*\.)?{part}\.)" for part in VISION) if plan.beside_vision else ""
    layers = r"\d+" if plan.layers is None else "|".join(map(str, plan.layers))
    ends = "|".join(target.replace(".", r"\.") for target in targets)
    return rf"{seen}.*\.layers\.({layers})\.(.*\.)?({ends})"
