"""Attach, save and load adapters: a frozen base and a plan in, a PEFT model out. The only door to PEFT."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model, set_peft_model_state_dict
from safetensors.torch import load_file
from transformers import PreTrainedModel, set_seed

from finetune.errors import Problem, UserError
from finetune.plan import AdapterPlan


def _lora(plan: AdapterPlan, **extra: Any) -> LoraConfig:
    return LoraConfig(
        task_type="CAUSAL_LM",
        r=plan.rank,
        lora_alpha=int(plan.alpha) if plan.alpha.is_integer() else plan.alpha,  # type: ignore[arg-type]
        lora_dropout=plan.dropout,
        target_modules=list(plan.targets),
        bias="none",
        **extra,
    )


METHODS: dict[str, Callable[[AdapterPlan], LoraConfig]] = {
    "lora": _lora,
    "rslora": lambda plan: _lora(plan, use_rslora=True),
    "dora": lambda plan: _lora(plan, use_dora=True),
}


def attach_adapter(model: PreTrainedModel, plan: AdapterPlan, *, base: str) -> PeftModel:
    """The model with trainable deltas, all in float32; the base's own parameters are untouched.

    B starts at zero so that step 0 is exactly the base (LoRA, arXiv:2106.09685, section 4.1); with `start_from` the
    weights of that adapter are taken instead. `base` is the name the saved adapter will carry.

    Raises:
        UserError: `start_from` is no adapter of the same method, rank, alpha and targets.
    """
    set_seed(plan.seed)
    config = METHODS[plan.method](plan)
    tuned = get_peft_model(model, config)
    tuned.peft_config["default"].base_model_name_or_path = base
    if plan.start_from is not None:
        _load_weights(tuned, plan.start_from, plan)
    keep_adapter_in_float32(tuned)
    return tuned


def keep_adapter_in_float32(model: torch.nn.Module) -> None:
    """Trainable weights in float32: in bfloat16 late, small updates vanish, and a resume would change the dtype.

    TRL casts the adapters of quantised bases to bfloat16 (trl/trainer/sft_trainer.py, SFTTrainer.__init__), so this
    runs once more after its constructor.
    """
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()


def load_adapter(model: PreTrainedModel, folder: Path) -> PeftModel:
    """The model with a saved adapter, frozen, for generation and scoring."""
    return PeftModel.from_pretrained(model, str(folder), is_trainable=False)


def save_adapter(model: torch.nn.Module, folder: Path) -> None:
    """Write adapter_config.json and adapter_model.safetensors, the PEFT format."""
    assert isinstance(model, PeftModel)
    model.save_pretrained(str(folder), save_embedding_layers=False)
    # PEFT stores the targets as a set, whose order differs from run to run.
    config_file = folder / "adapter_config.json"
    config = json.loads(config_file.read_text())
    config["target_modules"] = sorted(config["target_modules"])
    config_file.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
    (folder / "README.md").unlink(missing_ok=True)  # PEFT's empty model card


def _load_weights(model: PeftModel, folder: Path, plan: AdapterPlan) -> None:
    config_file, weights_file = folder / "adapter_config.json", folder / "adapter_model.safetensors"
    if not (config_file.is_file() and weights_file.is_file()):
        message = f"{folder} is no adapter folder: adapter_config.json and adapter_model.safetensors are needed"
        raise UserError(Problem("adapter.from", message))
    saved = json.loads(config_file.read_text())
    wanted = METHODS[plan.method](plan).to_dict()
    problems = [
        Problem(
            "adapter.from", f"{folder} has {key} {_shown(saved.get(key))}, the recipe asks for {_shown(wanted[key])}"
        )
        for key in ("r", "lora_alpha", "target_modules", "use_dora", "use_rslora")
        if _shown(saved.get(key)) != _shown(wanted[key])
    ]
    if problems:
        raise UserError(problems)
    result = set_peft_model_state_dict(model, load_file(str(weights_file)))
    unexpected: list[str] = result.unexpected_keys  # type: ignore[attr-defined]
    if unexpected:
        message = f"{folder} holds weights this base has no place for: {sorted(unexpected)[0]}"
        raise UserError(Problem("adapter.from", message))


def _shown(value: Any) -> str:
    return ", ".join(sorted(value)) if isinstance(value, (list, set, tuple)) else str(value)
