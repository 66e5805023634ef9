"""Read an adapter folder as PEFT writes it: its settings, refused where a merge would not be exact, and its tensors."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from finetune.base import read_header
from finetune.errors import Problem, StorageError, UserError, raise_problems
from finetune.release.weights import TORCH_DTYPES, read_tensors

PREFIX = "base_model.model."
WEIGHTS = "adapter_model.safetensors"
# Parts of a LoRA by the end of their key; all other tensors are trained values that take the place of the base's.
PARTS: tuple[str, ...] = ("lora_A.weight", "lora_B.weight", "lora_B.bias", "lora_embedding_A", "lora_embedding_B")
PARTS += ("lora_magnitude_vector", "token_adapter.trainable_tokens_delta")
# Settings of PEFT's LoraConfig (0.21) by what they mean for a merge: read here, no matter, or not representable.
READ = {"r", "lora_alpha", "use_rslora", "rank_pattern", "alpha_pattern", "use_dora", "lora_bias", "bias", "peft_type"}
READ |= {"init_lora_weights", "target_parameters", "trainable_token_indices", "ensure_weight_tying"}
NO_MATTER = {"auto_mapping", "base_model_name_or_path", "corda_config", "eva_config", "exclude_modules", "task_type"}
NO_MATTER |= {"inference_mode", "layers_pattern", "layers_to_transform", "loftq_config", "lora_dropout", "peft_version"}
NO_MATTER |= {"lora_ga_config", "megatron_core", "modules_to_save", "qalora_group_size", "revision", "runtime_config"}
NO_MATTER |= {"target_modules", "modules_to_tie", "target_modules_to_tie"}
# The same of other methods: finetune/release/other_methods.py.
EVERYWHERE = {"auto_mapping", "base_model_name_or_path", "exclude_modules", "inference_mode", "layers_pattern"}
EVERYWHERE |= {"layers_to_transform", "peft_type", "peft_version", "revision", "target_modules", "task_type"}
OTHERS: dict[str, set[str]] = {
    "IA3": EVERYWHERE | {"feedforward_modules", "init_ia3_weights"},
    "VERA": EVERYWHERE | {"d_initial", "init_weights", "projection_prng_key", "r", "save_projection", "vera_dropout"},
    "OFT": EVERYWHERE | {"eps", "init_weights", "module_dropout", "num_cayley_neumann_terms", "oft_block_size", "r"},
}
EXACT_INITS = (True, False, "gaussian", "orthogonal", "eva")  # the others move a part of the base into the adapter
CURE = "cannot be merged exactly; merge it with the tool that made it, or train without it"


@dataclass
class Parts:
    """The tensors of one module: parts of a LoRA by level, 0 the outermost wrapper, and trained values by name."""

    lora: dict[int, dict[str, torch.Tensor]] = field(default_factory=dict)
    trained: dict[str, torch.Tensor] = field(default_factory=dict)


def read_config(folder: Path) -> dict[str, Any]:
    """The adapter's settings.

    Raises:
        UserError: a setting that a merge cannot represent; all of them at once.
        StorageError: the file is damaged.
    """
    file = folder / "adapter_config.json"
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
        raise_problems(Problem(f"{folder}: {key}", f"{config.get(key)!r} {CURE}") for key in _odd_settings(config))
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise StorageError(Problem(str(file), f"the adapter cannot be read ({error}); train it again")) from error
    return config


def read_parts(folder: Path) -> dict[str, Parts]:
    """The adapter's tensors by module.

    Raises:
        UserError: a tensor that is no part of a LoRA.
        StorageError: a damaged file, or values that are not finite.
    """
    try:
        entries = read_header(folder / WEIGHTS)
    except OSError as error:
        raise StorageError(Problem(str(folder), f"the adapter cannot be read ({error}); train it again")) from error
    modules: dict[str, Parts] = {}
    odd = []
    for entry, tensor in read_tensors(entries):
        if not TORCH_DTYPES[entry.dtype].is_floating_point:
            odd.append(Problem(str(folder), f"{entry.name} is stored as {entry.dtype}; it {CURE}"))
            continue
        if not np.isfinite(tensor.float().numpy()).all():  # small ones: torch would wake all its threads for each
            message = f"{entry.name} holds values that are not finite; take an earlier checkpoint"
            raise StorageError(Problem(str(folder), message))
        module, level, part = split_key(entry.name)
        if part not in PARTS and ("lora_" in part or "adapter" in part):
            odd.append(Problem(str(folder), f"holds {entry.name}, which is no part of a LoRA that we know; it {CURE}"))
        elif part in PARTS:
            modules.setdefault(module, Parts()).lora.setdefault(level, {})[part] = tensor
        else:
            modules.setdefault(module, Parts()).trained[part] = tensor
    raise_problems(odd)
    return modules


def split_key(key: str) -> tuple[str, int, str]:
    """Module path, level of wrapping and part: `...experts.base_layer.lora_A.weight` is on level 1 of `...experts`."""
    path = key.removeprefix(PREFIX).removesuffix(".default")
    for part in PARTS:
        head, found, tail = path.rpartition(f".{part}")
        if found and tail in {"", ".weight"}:
            break
    else:
        head, _, part = path.rpartition(".")
        if "lora_" in head or "token_adapter" in head:
            return head, 0, path[re.search(r"lora_|token_adapter", path).start() :]  # type: ignore[union-attr]
    level = head.count(".base_layer")
    return head.replace(".base_layer", ""), level, part


def scale_of(config: Mapping[str, Any], parameter: str = "", *, rank: int | None = None) -> float:
    """alpha / rank, or alpha / sqrt(rank) for rank-stabilised LoRA (arXiv:2312.03732), of one module or parameter.

    Raises:
        UserError: `rank`, that of the stored matrices, is not what the settings say.
    """
    said, alpha = (
        _by_pattern(config, "rank_pattern", parameter, "r"),
        _by_pattern(config, "alpha_pattern", parameter, "lora_alpha"),
    )
    if rank is not None and rank != said:
        raise UserError(Problem(parameter, f"stored with rank {rank}, adapter_config.json says {said}; train it again"))
    return float(alpha / (math.sqrt(said) if config.get("use_rslora") else said))


def _by_pattern(config: Mapping[str, Any], patterns: str, parameter: str, default: str) -> Any:
    # PEFT utils/other.py, get_pattern_key: the first pattern that the end of the module's path matches.
    for pattern, value in (config.get(patterns) or {}).items():
        if re.match(rf"(.*\.)?({pattern})$", parameter):
            return value
    return config[default]


def _odd_settings(config: Mapping[str, Any]) -> Iterator[str]:
    if config.get("peft_type") in OTHERS:
        known = OTHERS[config["peft_type"]]
        yield from (key for key, value in config.items() if value and value != "none" and key not in known)
        return
    if config.get("peft_type") != "LORA":
        yield "peft_type"
    yield from (key for key, value in config.items() if value and key not in READ | NO_MATTER)
    if config.get("init_lora_weights", True) not in EXACT_INITS:
        yield "init_lora_weights"
    if config.get("use_dora") and config.get("lora_bias"):
        yield "lora_bias"  # PEFT's row norm would hold the bias then (tuners/lora/dora.py, get_lora_weight)
