"""Tiny random bases of every family we release: a name in, a model folder with pocket-llama's tokenizer out."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoTokenizer

from tests.conftest import POCKET

# Widths that 4-bit blocks of 64 values divide; logits far enough apart that two tokens are rarely equally likely.
SHAPE = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4, "num_key_value_heads": 2}
SHAPE |= {"num_hidden_layers": 2, "max_position_embeddings": 512, "initializer_range": 0.1}
GEMMA = {"head_dim": 16, "query_pre_attn_scalar": 16, "sliding_window": 32}


@dataclass(frozen=True)
class Kind:
    """A family as transformers names its classes, and what its config says beside the shape."""

    family: str
    settings: dict[str, Any] = field(default_factory=dict)
    tied: bool = False
    config: str = ""  # where the config's class is not called as the model's

    @property
    def config_class(self) -> Any:
        return getattr(transformers, self.config or f"{self.family}Config")

    @property
    def model_class(self) -> Any:
        return getattr(transformers, f"{self.family}ForCausalLM")


KINDS = {
    "llama": Kind("Llama"),
    "llama, multi-head": Kind("Llama", {"num_key_value_heads": 4}),
    "llama, tied": Kind("Llama", tied=True),
    "llama, biases": Kind("Llama", {"attention_bias": True, "mlp_bias": True}),
    "mistral": Kind("Mistral", {"sliding_window": 32, "head_dim": 32}),
    "qwen2": Kind("Qwen2"),
    "qwen3": Kind("Qwen3", {"head_dim": 32}, tied=True),
    "gemma2": Kind("Gemma2", GEMMA, tied=True),
    "gemma3": Kind("Gemma3", GEMMA, tied=True, config="Gemma3TextConfig"),
    "mixtral": Kind("Mixtral", {"num_local_experts": 4, "num_experts_per_tok": 2}),
    "qwen3_moe": Kind(
        "Qwen3Moe",
        {"head_dim": 32, "num_experts": 8, "num_experts_per_tok": 2, "norm_topk_prob": True}
        | {"moe_intermediate_size": 32},
    ),
}


def make_base(folder: Path, name: str, *, dtype: str, layers: int = 2, seed: int = 0, router: float = 1.0) -> Path:
    """Write a random model of a kind, stored in `dtype`; biases and norms are random too.

    A random router rates all experts alike. With its weights times `router` it is as decided as one that was trained.
    """
    kind = KINDS[name]
    tokenizer = AutoTokenizer.from_pretrained(POCKET)
    ids = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id, "pad_token_id": None}
    settings = SHAPE | ids | {"vocab_size": len(tokenizer), "tie_word_embeddings": kind.tied} | kind.settings
    settings["num_hidden_layers"] = layers
    torch.manual_seed(seed)
    model = kind.model_class(kind.config_class(**settings))
    with torch.no_grad():
        for parameter_name, parameter in model.named_parameters():
            if parameter_name.endswith("bias"):
                parameter.normal_(0, 0.3)
            elif "norm" in parameter_name:
                parameter.uniform_(0.5, 1.5)
            elif parameter_name.endswith("mlp.gate.weight"):
                parameter.mul_(router)
    model.to(getattr(torch, dtype)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
