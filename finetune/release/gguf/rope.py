"""The rotary embedding as llama.cpp knows it: config.json in, header fields and frequency factors out."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

ROPE_TYPES = ("default", "linear", "dynamic", "llama3", "yarn")


def rope_settings(config: Mapping[str, Any]) -> dict[str, Any]:
    """rope_type, rope_theta and the scaling's own values, as transformers 5 (rope_parameters) or before wrote them."""
    rope = dict(config.get("rope_parameters") or config.get("rope_scaling") or {})
    rope = dict(rope.get("full_attention") or rope)
    rope["rope_type"] = rope.get("rope_type") or rope.pop("type", None) or "default"
    rope["rope_theta"] = rope.get("rope_theta") or config.get("rope_theta") or 10000.0
    return rope


def rope_fields(config: Mapping[str, Any]) -> dict[str, Any]:
    """Base and scaling, by the names that follow the architecture's in a header."""
    rope = rope_settings(config)
    fields: dict[str, Any] = {"rope.freq_base": float(rope["rope_theta"])}
    if rope["rope_type"] in {"linear", "yarn"}:
        fields |= {"rope.scaling.type": rope["rope_type"], "rope.scaling.factor": float(rope["factor"])}
    if rope["rope_type"] == "yarn":
        fields |= _yarn_fields(config, rope)
    return fields


def rope_frequency_factors(config: Mapping[str, Any], *, head_size: int) -> np.ndarray | None:
    """What llama.cpp divides each of the head_size / 2 rotary frequencies by (float32), for Llama 3's scaling only.

    Wavelengths above the original context over low_freq_factor are stretched by `factor`, those below the original
    context over high_freq_factor not at all, the rest in between (transformers, modeling_rope_utils.py).
    """
    rope = rope_settings(config)
    if rope["rope_type"] != "llama3":
        return None
    frequencies = 1.0 / rope["rope_theta"] ** (np.arange(0, head_size, 2, dtype=np.float64) / head_size)
    turns = rope["original_max_position_embeddings"] * frequencies / (2 * math.pi)  # within the original context
    low, high = rope["low_freq_factor"], rope["high_freq_factor"]
    smooth = np.clip((turns - low) / (high - low), 0, 1)
    return (1 / ((1 - smooth) / rope["factor"] + smooth)).astype(np.float32)


def _yarn_fields(config: Mapping[str, Any], rope: Mapping[str, Any]) -> dict[str, Any]:
    original = rope.get("original_max_position_embeddings") or config["max_position_embeddings"]
    fields: dict[str, Any] = {"rope.scaling.original_context_length": int(original)}
    for key, name in (("beta_fast", "yarn_beta_fast"), ("beta_slow", "yarn_beta_slow")):
        if rope.get(key) is not None:
            fields[f"rope.scaling.{name}"] = float(rope[key])
    attention = rope.get("attention_factor")
    if attention is None and rope.get("mscale") and rope.get("mscale_all_dim"):
        attention = yarn_scale(rope, rope["mscale"]) / yarn_scale(rope, rope["mscale_all_dim"])
    if attention is not None:  # llama.cpp multiplies it with its own default
        fields["rope.scaling.attn_factor"] = float(attention) / yarn_scale(rope, 1.0)
    return fields


def yarn_scale(rope: Mapping[str, Any], weight: float) -> float:
    """What yarn multiplies queries and keys with (arXiv:2309.00071, section 3.4)."""
    return 1 + 0.1 * weight * math.log(rope["factor"]) if rope["factor"] > 1 else 1.0
