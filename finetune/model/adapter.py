"""Attach, save and load adapters: a frozen base and a plan in, a PEFT model out. The only door to PEFT."""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from enum import Enum
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from safetensors.torch import load_file
from transformers import PreTrainedModel, set_seed

from finetune.errors import Problem, UserError
from finetune.model.experts import experts_shown_whole
from finetune.model.methods import make_config
from finetune.model.starts import start_from_base
from finetune.plan import AdapterPlan

# Settings in which an adapter may differ from the one it starts from: they say how it was made, not what it is.
BESIDES = {"lora_dropout", "vera_dropout", "inference_mode", "base_model_name_or_path", "peft_version", "revision"}
BESIDES |= {"auto_mapping", "runtime_config", "init_lora_weights", "projection_prng_key", "task_type"}


def attach_adapter(model: PreTrainedModel, plan: AdapterPlan, *, base: str) -> PeftModel:
    """The model with trainable deltas, all in float32; the base's own parameters are untouched.

    Step 0 is exactly the base (LoRA, arXiv:2106.09685, section 4.1), unless `start_from` names the adapter whose
    weights are taken instead. `base` is the name the saved adapter will carry.

    Raises:
        UserError: `start_from` is no adapter of the same method, ranks, alphas and targets.
    """
    set_seed(plan.seed)
    with without_pattern_warning(), experts_shown_whole(model):
        tuned = get_peft_model(model, make_config(plan, model))  # type: ignore[assignment]
    assert isinstance(tuned, PeftModel)
    tuned.peft_config["default"].base_model_name_or_path = base
    if plan.start_from is not None:
        _load_weights(tuned, plan.start_from)
    keep_adapter_in_float32(tuned)
    if plan.start != "default":
        start_from_base(tuned, plan.start)
    return tuned


@contextmanager
def without_pattern_warning() -> Iterator[None]:
    """PEFT says of a pattern for fused experts that it was ignored, and follows it (tuners/tuners_utils.py)."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="The following (rank|alpha)_pattern keys", category=RuntimeWarning)
        yield


def stored_tensors(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """What save_adapter writes, by the names in the file; the tensors share their memory with the model."""
    assert isinstance(model, PeftModel)
    return get_peft_model_state_dict(model, save_embedding_layers=False)


def is_left_matrix(name: str) -> bool:
    """Whether a parameter is the B of a LoRA, which LoRA+ (arXiv:2402.12354) trains faster than all else."""
    return "lora_B." in name or "lora_embedding_B." in name


def adapted_modules(model: torch.nn.Module) -> dict[str, list[torch.nn.Parameter]]:
    """By module of the base, what is trained of it; without rows of an embedding, which few texts hold."""
    assert isinstance(model, PeftModel)
    mark = f".{model.base_model.prefix}"
    found: dict[str, list[torch.nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and "trainable_tokens" not in name:
            module = name.partition(mark)[0].removeprefix("base_model.model.")
            found.setdefault(module, []).append(parameter)
    return found


@contextmanager
def base_alone(model: torch.nn.Module) -> Iterator[None]:
    """The model without its adapter while the block runs."""
    assert isinstance(model, PeftModel)
    with model.disable_adapter():
        yield


@contextmanager
def adapter_untouched(model: torch.nn.Module) -> Iterator[None]:
    """Trainable weights are afterwards what they were: TRL's constructor casts those of quantised bases to bfloat16
    (trl/trainer/sft_trainer.py, SFTTrainer.__init__), which rounds an adapter to start from, or trained embeddings."""
    before = [(parameter, parameter.data) for parameter in model.parameters() if parameter.requires_grad]
    yield
    for parameter, values in before:
        parameter.data = values


def keep_adapter_in_float32(model: torch.nn.Module) -> None:
    """Trainable weights in float32: in bfloat16 late, small updates vanish, and a resume would change the dtype."""
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()


def load_adapter(model: PreTrainedModel, folder: Path) -> PeftModel:
    """The model with a saved adapter, frozen, for generation and scoring."""
    with without_pattern_warning(), experts_shown_whole(model):
        return PeftModel.from_pretrained(model, str(folder), is_trainable=False)


def save_adapter(model: torch.nn.Module, folder: Path) -> None:
    """Write adapter_config.json and adapter_model.safetensors, the PEFT format."""
    assert isinstance(model, PeftModel)
    model.save_pretrained(str(folder), save_embedding_layers=False)
    # PEFT stores names as sets, whose order differs from run to run.
    config_file = folder / "adapter_config.json"
    config = {key: _sorted(value) for key, value in json.loads(config_file.read_text()).items()}
    config_file.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
    (folder / "README.md").unlink(missing_ok=True)  # PEFT's empty model card


def _sorted(value: Any) -> Any:
    return sorted(value) if isinstance(value, list) and all(isinstance(item, str) for item in value) else value


def _load_weights(model: PeftModel, folder: Path) -> None:
    config_file, weights_file = folder / "adapter_config.json", folder / "adapter_model.safetensors"
    if not (config_file.is_file() and weights_file.is_file()):
        message = f"{folder} is no adapter folder: adapter_config.json and adapter_model.safetensors are needed"
        raise UserError(Problem("adapter.from", message))
    saved = json.loads(config_file.read_text())
    wanted = model.peft_config["default"].to_dict()
    problems = [
        Problem(
            "adapter.from", f"{folder} has {key} {_shown(saved.get(key))}, the recipe asks for {_shown(wanted[key])}"
        )
        for key in sorted(wanted.keys() - BESIDES)
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
    """A setting as people read it; PEFT writes what is not set as null, false or empty, by version."""
    if isinstance(value, Enum):
        return str(value.value)
    if isinstance(value, (list, set, tuple)):
        return ", ".join(sorted(map(str, value))) or "nothing"
    return "nothing" if value is None or value is False or value == {} else str(value)
