"""The config that a GGUF file's header stands for: header fields in, config.json of transformers out.

What architecture.py and rope.py write, the other way round.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from finetune.errors import Problem, raise_problems
from finetune.release.gguf.architecture import FAMILIES
from finetune.release.gguf.rope import rope_frequency_factors, yarn_scale

# The model type that a file of each architecture becomes, and its class.
ARCHITECTURES = {
    "llama": ("llama", "LlamaForCausalLM"),
    "qwen2": ("qwen2", "Qwen2ForCausalLM"),
    "qwen3": ("qwen3", "Qwen3ForCausalLM"),
    "gemma2": ("gemma2", "Gemma2ForCausalLM"),
    "gemma3": ("gemma3_text", "Gemma3ForCausalLM"),
}
SCALINGS = ("none", "linear", "yarn")
LARGEST_GEMMAS = {46, 62}  # layers of those whose scores are scaled otherwise
CONTEXTS = tuple(2**power for power in range(6, 21))  # that Llama 3's scaling may have started from


@dataclass(frozen=True)
class Header:
    """A file's fields without its tensors, by name; those of the architecture without its name in front."""

    file: Path
    fields: Mapping[str, Any]
    tensors: Mapping[str, tuple[int, ...]]  # name -> shape, rows first
    rope_factors: np.ndarray | None = None

    @property
    def architecture(self) -> str:
        return str(self.fields.get("general.architecture"))

    def of(self, key: str, default: Any = None) -> Any:
        return self.fields.get(f"{self.architecture}.{key}", default)


def config_of(header: Header, *, dtype: str) -> dict[str, Any]:
    """config.json of the model.

    Raises:
        UserError: an architecture or setting that is not read; all problems at once.
    """
    raise_problems(Problem(str(header.file), f"{reason}; name the model it was made from") for reason in _odd(header))
    model_type, kind = ARCHITECTURES[header.architecture]
    heads, hidden = int(header.of("attention.head_count")), int(header.of("embedding_length"))
    head_size = int(header.of("attention.key_length", hidden // heads))
    config: dict[str, Any] = {
        "architectures": [kind],
        "model_type": model_type,
        "dtype": dtype,
        "num_hidden_layers": int(header.of("block_count")),
        "hidden_size": hidden,
        "intermediate_size": int(header.of("feed_forward_length")),
        "num_attention_heads": heads,
        "num_key_value_heads": int(header.of("attention.head_count_kv", heads)),
        "head_dim": head_size,
        "rms_norm_eps": _short(header.of("attention.layer_norm_rms_epsilon")),
        "vocab_size": header.tensors["token_embd.weight"][0],
        "max_position_embeddings": int(header.of("context_length")),
        "tie_word_embeddings": "output.weight" not in header.tensors,
    }
    activation = FAMILIES[model_type].activation
    config["hidden_activation" if model_type.startswith("gemma") else "hidden_act"] = activation
    if model_type == "llama":
        config["attention_bias"] = "blk.0.attn_q.bias" in header.tensors
        config["mlp_bias"] = "blk.0.ffn_up.bias" in header.tensors
    rope = _rope(header, head_size)
    if FAMILIES[model_type].full_attention_every > 1:
        config |= _gemma(header, config)
    if model_type == "gemma3_text":
        local = {"rope_type": "default", "rope_theta": _short(header.of("rope.freq_base_swa", 10000.0))}
        config["rope_parameters"] = {"full_attention": rope, "sliding_attention": local}
    else:
        config["rope_parameters"] = rope
    return config | token_ids_of(header.fields)


def token_ids_of(fields: Mapping[str, Any]) -> dict[str, Any]:
    """bos, eos (all that end a turn) and pad, as config.json and generation_config.json name them."""
    named = {name: fields.get(f"tokenizer.ggml.{name}_token_id") for name in ("bos", "eos", "eot", "eom")}
    stops = [int(token) for name, token in named.items() if name != "bos" and token is not None]
    pad = fields.get("tokenizer.ggml.padding_token_id")
    found: dict[str, Any] = {} if named["bos"] is None else {"bos_token_id": int(named["bos"])}
    if stops:
        found["eos_token_id"] = stops[0] if len(set(stops)) == 1 else list(dict.fromkeys(stops))
    return found if pad is None else found | {"pad_token_id": int(pad)}


def _odd(header: Header) -> list[str]:
    """What the config could not express, or what is not there."""
    if header.architecture not in ARCHITECTURES:
        return [f"a GGUF file of {header.architecture!r} is not read; those of {', '.join(ARCHITECTURES)} are"]
    keys = ("block_count", "embedding_length", "feed_forward_length", "attention.head_count", "context_length")
    found = [f"{key} is no number" for key in keys if not isinstance(header.of(key), int)]
    if "token_embd.weight" not in header.tensors:
        found.append("holds no token_embd.weight")
    if not found and header.of("block_count") > len(header.tensors):
        found.append(f"says {header.of('block_count')} layers and holds {len(header.tensors)} tensors")
    if header.of("expert_count"):
        found.append(f"a mixture of {header.of('expert_count')} experts is not read from GGUF")
    kind = header.of("rope.scaling.type") or "none"
    if kind not in SCALINGS:
        found.append(f"rope scaling {kind!r} is not read; {', '.join(SCALINGS)} are")
    if found:
        return found
    head_size = header.of("attention.key_length", header.of("embedding_length") // header.of("attention.head_count"))
    if header.of("attention.value_length", head_size) != head_size:
        found.append("its values are not as wide as its keys")
    if header.of("rope.dimension_count", head_size) != head_size:
        found.append("it rotates a part of each head only")
    return [*found, *_other_sizes(header, head_size)]


def _other_sizes(header: Header, head_size: int) -> list[str]:
    """Tensors of another size than the header's numbers give, before a model of those numbers is built."""
    heads, hidden = header.of("attention.head_count"), header.of("embedding_length")
    wide = {"attn_q": heads * head_size, "attn_k": header.of("attention.head_count_kv", heads) * head_size}
    wide["ffn_up"] = header.of("feed_forward_length")
    wanted = {f"blk.0.{part}.weight": (rows, hidden) for part, rows in wide.items()}
    wanted["token_embd.weight"] = (header.tensors["token_embd.weight"][0], hidden)
    return [
        f"{name} is {header.tensors.get(name)}, by its header {shape}"
        for name, shape in wanted.items()
        if header.tensors.get(name) != shape
    ]


def _rope(header: Header, head_size: int) -> dict[str, Any]:
    rope: dict[str, Any] = {"rope_type": "default", "rope_theta": _short(header.of("rope.freq_base", 10000.0))}
    kind = header.of("rope.scaling.type") or "none"
    if header.rope_factors is not None:
        return _llama3(header, rope, head_size)
    if kind == "none":
        return rope
    rope |= {"rope_type": kind, "factor": _short(header.of("rope.scaling.factor"))}
    if kind == "yarn":
        rope["original_max_position_embeddings"] = int(header.of("rope.scaling.original_context_length"))
        for key, name in (("beta_fast", "yarn_beta_fast"), ("beta_slow", "yarn_beta_slow")):
            if (value := header.of(f"rope.scaling.{name}")) is not None:
                rope[key] = _short(value)
        if (factor := header.of("rope.scaling.attn_factor")) is not None:
            rope["attention_factor"] = float(factor) * yarn_scale(rope, 1.0)
    return rope


def _llama3(header: Header, rope: Mapping[str, Any], head_size: int) -> dict[str, Any]:
    """The scaling whose factors are those of the file; the two that Llama 3 published differ in `factor` only."""
    factors = header.rope_factors
    assert factors is not None
    base = {**rope, "rope_type": "llama3", "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    for context in CONTEXTS:
        tried = base | {"factor": _short(factors.max()), "original_max_position_embeddings": context}
        made = rope_frequency_factors({"rope_parameters": tried}, head_size=head_size)
        if made is not None and made.shape == factors.shape and np.allclose(made, factors, rtol=1e-5):
            return tried
    reason = "its rope_freqs.weight are the factors of no scaling of Llama 3"
    raise_problems([Problem(str(header.file), f"{reason}; name the model it was made from")])
    raise AssertionError


def _gemma(header: Header, config: Mapping[str, Any]) -> dict[str, Any]:
    largest = config["num_hidden_layers"] in LARGEST_GEMMAS
    scale = config["hidden_size"] // config["num_attention_heads"] if largest else config["head_dim"]
    found = {"query_pre_attn_scalar": scale, "sliding_window": int(header.of("attention.sliding_window", 4096))}
    for key in ("attn_logit_softcapping", "final_logit_softcapping"):
        value = header.of(key)
        found[key] = _short(value) if value else None
    return found


def _short(value: Any) -> float:
    """The shortest decimal that is this float32: 1e-05, not 9.999999747378752e-06."""
    return float(str(np.float32(value)))
