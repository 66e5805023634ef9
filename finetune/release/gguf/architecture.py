"""A model folder as llama.cpp sees it: config.json and stored tensors in, header fields and renamed tensors out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gguf
import numpy as np

from finetune.artifact import read_json
from finetune.base import TensorEntry, read_tensor_entries
from finetune.errors import Problem, UserError, raise_problems
from finetune.release.gguf.mix import ModelShape
from finetune.release.gguf.rope import ROPE_TYPES, rope_fields, rope_settings

READABLE = {"F32", "F16", "BF16"}
IGNORED = (".rotary_emb.inv_freq",)  # computed from the config


@dataclass(frozen=True)
class Family:
    """How llama.cpp names an architecture, and where its tensors are not those of transformers."""

    name: str
    kind: gguf.MODEL_ARCH
    permutes: bool = False  # its rotary embedding pairs neighbouring rows of q and k
    norm_offset: float = 0.0  # what transformers adds to the weight of a norm when it computes
    activation: str = "silu"
    full_attention_every: int = 1  # layers; the others look back over a window


GELU = "gelu_pytorch_tanh"
FAMILIES = {
    "llama": Family("llama", gguf.MODEL_ARCH.LLAMA, permutes=True),
    "mistral": Family("llama", gguf.MODEL_ARCH.LLAMA, permutes=True),
    "qwen2": Family("qwen2", gguf.MODEL_ARCH.QWEN2),
    "qwen3": Family("qwen3", gguf.MODEL_ARCH.QWEN3),
    "gemma2": Family("gemma2", gguf.MODEL_ARCH.GEMMA2, norm_offset=1.0, activation=GELU, full_attention_every=2),
    "gemma3_text": Family("gemma3", gguf.MODEL_ARCH.GEMMA3, norm_offset=1.0, activation=GELU, full_attention_every=6),
}


@dataclass(frozen=True)
class StoredTensor:
    """One tensor of the file: its name there, the stored tensor it is made of, and what changes on the way."""

    name: str
    entry: TensorEntry
    heads: int | None  # the rows of each are permuted; None: rows stay as they are
    offset: float  # added to each weight


@dataclass(frozen=True)
class Model:
    """Everything of a model folder but its tokenizer and its weights' values."""

    family: Family
    config: Mapping[str, Any]
    tensors: Sequence[StoredTensor]
    notes: Sequence[str]

    @property
    def layers(self) -> int:
        return int(self.config["num_hidden_layers"])

    @property
    def heads(self) -> int:
        return int(self.config["num_attention_heads"])

    @property
    def kv_heads(self) -> int:
        return int(self.config.get("num_key_value_heads") or self.heads)

    @property
    def head_size(self) -> int:
        return int(self.config.get("head_dim") or self.config["hidden_size"] // self.heads)

    @property
    def vocabulary(self) -> int:
        return next(tensor.entry.shape[0] for tensor in self.tensors if tensor.name == "token_embd.weight")

    @property
    def shape(self) -> ModelShape:
        has_output = any(tensor.name == "output.weight" for tensor in self.tensors)
        grouped = self.family.name == "qwen2" or self.heads != self.kv_heads  # llama.cpp calls any such qwen2 a 70B
        is_70b = self.layers == 80 and self.family.name in {"llama", "qwen2"} and grouped
        return ModelShape(layers=self.layers, has_output=has_output, is_70b=is_70b)


def read_model(folder: Path) -> Model:
    """The model of a folder in Hugging Face form.

    Raises:
        UserError: a family, a setting or a tensor that cannot be written as GGUF; all problems at once.
    """
    config = read_json(folder / "config.json")
    kind = config.get("model_type")
    if kind not in FAMILIES:
        there = ", ".join(sorted(FAMILIES))
        raise UserError(Problem(str(folder / "config.json"), f"GGUF is written for {there}; not for {kind!r} yet"))
    raise_problems(_odd_settings(folder, config, FAMILIES[kind]))
    entries = [entry for entry in read_tensor_entries(folder) if not entry.name.endswith(IGNORED)]
    notes = _notes(config)
    if is_tied(config) and any(entry.name == "lm_head.weight" for entry in entries):
        entries = [entry for entry in entries if entry.name != "lm_head.weight"]
        notes.append("lm_head.weight is stored but tied to the embedding by the config: the embedding is written")
    model = Model(FAMILIES[kind], config, _named(folder, FAMILIES[kind], config, entries), notes)
    _refuse_missing(folder, model)
    return model


def header_fields(model: Model) -> dict[str, Any]:
    """The fields of the architecture: int as uint32, float as float32."""
    config, arch = model.config, model.family.name
    fields: dict[str, Any] = {
        "block_count": model.layers,
        "context_length": context_tokens(config),
        "embedding_length": int(config["hidden_size"]),
        "feed_forward_length": int(config["intermediate_size"]),
        "attention.head_count": model.heads,
        "attention.head_count_kv": model.kv_heads,
        "attention.layer_norm_rms_epsilon": float(config["rms_norm_eps"]),
        "attention.key_length": model.head_size,
        "attention.value_length": model.head_size,
        "rope.dimension_count": model.head_size,
        "vocab_size": model.vocabulary,
    }
    fields |= rope_fields(config)
    if model.family.full_attention_every > 1:
        fields |= _gemma_fields(config)
    return {f"{arch}.{key}": value for key, value in fields.items()}


def context_tokens(config: Mapping[str, Any]) -> int:
    """The context up to which llama.cpp computes the same: the config's, or a window that it does not know."""
    longest = int(config.get("max_position_embeddings", 2048))
    return min(longest, int(config["sliding_window"])) if _has_window(config) else longest


def permute_rows(rows_OI: np.ndarray, heads: int) -> np.ndarray:
    """Rows of q or k reordered within each head: those that rotate together become neighbours.

    transformers rotates row i with row i + half of a head, llama.cpp's "llama" rotates 2i with 2i + 1.
    """
    size = rows_OI.shape[0] // heads
    halves = rows_OI.reshape(heads, 2, size // 2, *rows_OI.shape[1:])
    return np.ascontiguousarray(halves.swapaxes(1, 2)).reshape(rows_OI.shape)


def is_tied(config: Mapping[str, Any]) -> bool:
    """Whether the embedding is the output as well; a Gemma's config says so by leaving it out."""
    return bool(config.get("tie_word_embeddings", str(config.get("model_type")).startswith("gemma")))


def _gemma_fields(config: Mapping[str, Any]) -> dict[str, Any]:
    """Window, soft caps, and the base of the rotary embedding in layers with a window."""
    sliding = (config.get("rope_parameters") or {}).get("sliding_attention", {})
    base = sliding.get("rope_theta") or config.get("rope_local_base_freq") or rope_settings(config)["rope_theta"]
    fields: dict[str, Any] = {"attention.sliding_window": int(config["sliding_window"])}
    fields["rope.freq_base_swa"] = float(base)
    for key in ("attn_logit_softcapping", "final_logit_softcapping"):
        if config.get(key):
            fields[key] = float(config[key])
    return fields


def _odd_settings(folder: Path, config: Mapping[str, Any], family: Family) -> list[Problem]:
    """Settings that the file could not express."""
    rope = rope_settings(config)
    found = []
    if rope["rope_type"] not in ROPE_TYPES:
        found.append(("rope_type", rope["rope_type"], f"possible are {', '.join(ROPE_TYPES)}"))
    if rope["rope_type"] == "yarn" and rope.get("truncate") is False:
        found.append(("rope_parameters.truncate", False, "has no counterpart in llama.cpp"))
    activation = config.get("hidden_activation") or config.get("hidden_act") or family.activation
    if activation != family.activation:
        found.append(("hidden_act", activation, f"llama.cpp computes this family with {family.activation}"))
    if family.full_attention_every > 1:
        found += _odd_attention(config, family)
    if (config.get("partial_rotary_factor") or rope.get("partial_rotary_factor") or 1.0) != 1.0:
        found.append(("partial_rotary_factor", config.get("partial_rotary_factor"), "only whole heads are rotated"))
    if config.get("quantization_config"):
        found.append(("quantization_config", "...", "merge or dequantise first: weights in 16 or 32 bits are needed"))
    if config.get("num_local_experts"):
        found.append(("num_local_experts", config["num_local_experts"], "mixtures of experts are not written yet"))
    return [Problem(f"{folder / 'config.json'}: {key}", f"{value!r}: {reason}") for key, value, reason in found]


def _odd_attention(config: Mapping[str, Any], family: Family) -> list[tuple[str, Any, str]]:
    """What llama.cpp takes for granted of a Gemma's attention: where windows are, and how scores are scaled."""
    found: list[tuple[str, Any, str]] = []
    layers, every = int(config["num_hidden_layers"]), family.full_attention_every
    kinds = ["sliding_attention" if (layer + 1) % every else "full_attention" for layer in range(layers)]
    if config.get("layer_types", kinds) != kinds:
        found.append(("layer_types", "...", f"llama.cpp takes every layer but each {every}. for one with a window"))
    largest = layers in {46, 62}  # the 27B models
    scale = config["hidden_size"] // config["num_attention_heads"] if largest else config["head_dim"]
    if config.get("query_pre_attn_scalar", scale) != scale:
        found.append(("query_pre_attn_scalar", config["query_pre_attn_scalar"], f"llama.cpp scales with {scale}"))
    return found


def _notes(config: Mapping[str, Any]) -> list[str]:
    notes = []
    if rope_settings(config)["rope_type"] == "dynamic":
        notes.append("rope type dynamic: the same as without scaling up to the context length that the file declares")
    if _has_window(config):
        notes.append(f"sliding window: the file declares a context of {context_tokens(config)} tokens, the window")
    return notes


def _has_window(config: Mapping[str, Any]) -> bool:
    if FAMILIES[config["model_type"]].full_attention_every > 1:
        return False  # llama.cpp computes it
    uses = config.get("use_sliding_window", config["model_type"] == "mistral")
    return bool(uses and config.get("sliding_window"))


def _named(
    folder: Path, family: Family, config: Mapping[str, Any], entries: Sequence[TensorEntry]
) -> tuple[StoredTensor, ...]:
    names = gguf.get_tensor_name_map(family.kind, int(config["num_hidden_layers"]))
    heads = {"q_proj": config["num_attention_heads"]}
    heads["k_proj"] = config.get("num_key_value_heads") or config["num_attention_heads"]
    tensors, problems = [], []
    for entry in entries:
        name = names.get_name(entry.name, try_suffixes=(".weight", ".bias"))
        if name is None:
            problems.append(Problem(f"{folder}: {entry.name}", f"llama.cpp's {family.name!r} has no such tensor"))
        elif entry.dtype not in READABLE:
            problems.append(Problem(f"{folder}: {entry.name}", f"stored as {entry.dtype}; F32, F16 or BF16 is needed"))
        else:
            permuted = heads.get(entry.name.split(".")[-2]) if family.permutes else None
            offset = family.norm_offset if entry.name.endswith("norm.weight") else 0.0
            tensors.append(StoredTensor(name, entry, permuted, offset))
    raise_problems(problems)
    return tuple(sorted(tensors, key=lambda tensor: _position(tensor.name)))


def _position(name: str) -> tuple[int, int, str]:
    """Embedding first, layers in order, then the rest: the order in which a model is read."""
    if name.startswith("blk."):
        return 1, int(name.split(".")[1]), name
    return (0 if name.startswith("token_embd") else 2), 0, name


def _refuse_missing(folder: Path, model: Model) -> None:
    there = {tensor.name for tensor in model.tensors}
    parts = ["attn_norm", "attn_q", "attn_k", "attn_v", "attn_output", "ffn_norm", "ffn_gate", "ffn_up", "ffn_down"]
    parts += ["post_attention_norm", "post_ffw_norm"] if model.family.norm_offset else []
    needed = {f"blk.{layer}.{part}.weight" for layer in range(model.layers) for part in parts}
    needed |= {"token_embd.weight", "output_norm.weight"}
    needed |= set() if is_tied(model.config) else {"output.weight"}
    raise_problems(Problem(f"{folder}: {name}", "missing in the stored weights") for name in sorted(needed - there))
