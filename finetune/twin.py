"""A small twin of a base: its folder in; the same architecture, tokenizer and template with random weights out."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from finetune.errors import Problem, UserError
from finetune.trust import is_trusted

WIDTH = 64  # bitsandbytes' block: every width is a multiple of it
HEAD_SIZES = (16, 32, 64)
FEWEST_LAYERS, MOST_LAYERS = 2, 8  # more than two only where the kinds of layers repeat later
EXPERTS = 4
# A tenth of a logit apart, two experts would change places by rounding, and a good merge would look like a bad one.
ROUTER_SCALE = 8.0
ROUTERS = (".gate.weight", ".router.weight")
LEFT_BEHIND = (".safetensors", ".safetensors.index.json", ".bin", ".bin.index.json", ".pt", ".pth", ".gguf", ".h5")
LARGEST_FILE = 100_000_000  # a tokenizer's, at most
DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


def make_twin(base: Path, target: Path, *, stored_dtype: str) -> None:
    """Write the twin of `base` to `target`, stored in the same element type; the same base gives the same bytes.

    Raises:
        UserError: transformers cannot build the base's architecture.
    """
    trusted = is_trusted(base)
    target.mkdir(parents=True)
    for file in base.iterdir():
        if file.is_file() and not file.name.endswith(LEFT_BEHIND) and file.stat().st_size <= LARGEST_FILE:
            shutil.copyfile(file, target / file.name)
    try:
        config = AutoConfig.from_pretrained(str(base), trust_remote_code=trusted)
        raw = json.loads((base / "config.json").read_text(encoding="utf-8"))
        write_config(target, raw, config)
        small = AutoConfig.from_pretrained(str(target), trust_remote_code=trusted)
        model = _build(small, trusted=trusted)
        randomise_(model, hidden=small.get_text_config().hidden_size)
        for parameter in model.parameters():  # not buffers: Llama 4 has complex ones
            parameter.data = parameter.data.to(DTYPES.get(stored_dtype, torch.bfloat16))
        model.save_pretrained(str(target))
    except Exception as error:  # whatever an architecture's own code raises is its answer
        first_line = (str(error).strip().splitlines() or [type(error).__name__])[0]
        message = f"transformers cannot build this architecture: {first_line}; correct config.json, or name another"
        raise UserError(Problem(str(base / "config.json"), message)) from error
    write_config(target, raw, config)  # save_pretrained has written another


def write_config(target: Path, raw: Mapping[str, Any], config: Any) -> None:
    """The base's own config.json, with the twin's sizes in the place of its own."""
    text = config.get_text_config()
    small = dict(raw)
    if text is not config:
        name = next(key for key in ("text_config", "llm_config") if isinstance(raw.get(key), dict))
        small[name] = {**raw[name], **small_sizes(text)}
        small |= {"vision_config": _small_vision(raw["vision_config"])} if "vision_config" in raw else {}
    else:
        small |= small_sizes(text)
    (target / "config.json").write_text(json.dumps(small, indent=2, ensure_ascii=False), encoding="utf-8")


def small_sizes(config: Any) -> dict[str, Any]:
    """The keys of a text config that make it small; what it does not have stays away."""
    layers = layers_needed(config)
    sizes: dict[str, Any] = {"num_hidden_layers": layers}
    heads, groups = _heads(config)
    head_size = next(size for size in HEAD_SIZES if heads * size % WIDTH == 0 or size == HEAD_SIZES[-1])
    sizes |= {"num_attention_heads": heads, "num_key_value_heads": groups}
    sizes["hidden_size"] = _rounded(heads * head_size * _hidden_per_head(config))
    sizes["intermediate_size"] = 2 * sizes["hidden_size"]
    given = {key: value for key, value in vars(config).items() if value is not None}
    if "kv_lora_rank" in given:
        head_size = 16
        sizes["num_key_value_heads"] = heads
        sizes |= {"kv_lora_rank": WIDTH, "qk_nope_head_dim": 16, "qk_rope_head_dim": 16, "v_head_dim": 16}
        sizes |= {"q_lora_rank": WIDTH} if "q_lora_rank" in given else {}
    if "head_dim" in given:
        sizes["head_dim"] = head_size
        if given.get("query_pre_attn_scalar") == given["head_dim"]:
            sizes["query_pre_attn_scalar"] = head_size
    for key in ("num_local_experts", "num_experts", "n_routed_experts"):
        sizes |= {key: min(EXPERTS, given[key])} if given.get(key) else {}
    for key, most in {"num_experts_per_tok": 2, "n_group": 1, "topk_group": 1}.items():
        sizes |= {key: min(most, given[key])} if given.get(key) else {}
    for key in ("moe_intermediate_size", "shared_expert_intermediate_size", "intermediate_size_mlp"):
        sizes |= {key: WIDTH} if given.get(key) else {}
    return sizes | _per_layer(given, int(given["num_hidden_layers"]), layers) | _rope(given, head_size)


def layers_needed(config: Any) -> int:
    """Two, or as many as bring one layer of a second kind: of attention, of MLP, with or without positions."""
    given = vars(config)
    total = int(given["num_hidden_layers"])
    firsts = [given.get("first_k_dense_replace") or 0]
    for value in given.values():
        if isinstance(value, list) and len(value) == total and total > 1:
            firsts.append(next((at for at, kind in enumerate(value) if kind != value[0]), 0))
    for key in ("cross_attention_layers", "moe_layers", "mlp_only_layers"):
        firsts.append(min((at for at in given.get(key) or () if at), default=0))
    return min(max(FEWEST_LAYERS, *(first + 1 for first in firsts)), MOST_LAYERS, max(total, 1))


def randomise_(model: PreTrainedModel, *, hidden: int) -> None:
    """Weights as large as trained ones: logits far apart, biases and norms that matter."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim < 2:  # around where it begins: Gemma stores the norms as what they differ from 1
                most = 0.5 if "norm" in name and not name.endswith("bias") else 0.3
                parameter.add_(torch.empty_like(parameter).uniform_(-most, most, generator=generator))
            else:
                scale = ROUTER_SCALE if name.endswith(ROUTERS) else 0.8
                parameter.normal_(0, scale / math.sqrt(hidden), generator=generator)


def _build(config: Any, *, trusted: bool) -> PreTrainedModel:
    """As its config names the class: the names of its stored tensors are the base's then, images and all."""
    named = [getattr(transformers, name, None) for name in getattr(config, "architectures", None) or ()]
    known: Any = next((kind for kind in named if kind is not None and issubclass(kind, PreTrainedModel)), None)
    if known is not None and "For" in known.__name__ and not trusted:
        return known(config)
    model: PreTrainedModel = AutoModelForCausalLM.from_config(config, trust_remote_code=trusted)
    return model


def _heads(config: Any) -> tuple[int, int]:
    """Query heads and key/value heads in the base's ratio: two groups, or one where it has one or they are large."""
    heads = int(config.num_attention_heads)
    groups = int(getattr(config, "num_key_value_heads", None) or heads)
    if groups == heads:
        return 4, 4
    ratio = heads // groups
    return (ratio, 1) if groups == 1 or ratio > 8 else (2 * ratio, 2)


def _hidden_per_head(config: Any) -> float:
    """1 where the heads together are as wide as the model; Gemma's and Qwen 3's are not."""
    given = getattr(config, "head_dim", None)
    if not given or getattr(config, "kv_lora_rank", None):
        return 1.0
    return float(config.hidden_size / (config.num_attention_heads * given))


def _rounded(width: float) -> int:
    return max(WIDTH, round(width / WIDTH) * WIDTH)


def _per_layer(given: Mapping[str, Any], total: int, layers: int) -> dict[str, Any]:
    """Lists with an entry a layer are cut; lists of layers keep those that are there."""
    cut = {key: value[:layers] for key, value in given.items() if isinstance(value, list) and len(value) == total > 1}
    for key in ("cross_attention_layers", "moe_layers", "mlp_only_layers"):
        if given.get(key):
            cut[key] = [at for at in given[key] if at < layers]
    dense = given.get("first_k_dense_replace")
    return cut | ({"first_k_dense_replace": min(dense, layers - 1)} if dense else {})


def _rope(given: Mapping[str, Any], head_size: int) -> dict[str, Any]:
    """LongRoPE has a factor for every pair of a head's positions (arXiv:2402.13753)."""
    changed = {}
    for key in ("rope_scaling", "rope_parameters"):
        value = given.get(key)
        if isinstance(value, Mapping) and isinstance(value.get("short_factor"), list):
            share = float(value.get("partial_rotary_factor") or given.get("partial_rotary_factor") or 1.0)
            pairs = int(head_size * share) // 2
            factors = {name: value[name][:pairs] for name in ("short_factor", "long_factor")}
            changed[key] = {**value, **factors}
    return changed


def _small_vision(raw: Mapping[str, Any]) -> dict[str, Any]:
    """One layer of the tower: it is neither trained nor quantised, only carried along."""
    small = {**raw, "num_hidden_layers": 1}
    if "num_global_layers" in raw or "intermediate_layers_indices" in raw:
        kept = raw.get("intermediate_layers_indices") or [3, 7, 15, 23, 30]
        small |= {"num_global_layers": 1, "intermediate_layers_indices": [0] * len(kept)}
    return small
