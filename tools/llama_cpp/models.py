"""The models GGUF files are tried on: real ones where they can be had, random ones of every family and rope type."""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

CHECKOUT = Path(__file__).resolve().parents[2]
POCKET = CHECKOUT / "finetune" / "assets" / "pocket-llama"
SHARED = Path(os.environ.get("FINETUNE_SHARED", CHECKOUT.parent / "shared")) / "data"
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 32.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 128,
}
YARN_ROPE = {
    "rope_type": "yarn",
    "rope_theta": 10000.0,
    "factor": 4.0,
    "original_max_position_embeddings": 128,
}
CLASSES: dict[str, tuple[Any, Any]] = {
    "llama": (LlamaConfig, LlamaForCausalLM),
    "mistral": (MistralConfig, MistralForCausalLM),
    "qwen2": (Qwen2Config, Qwen2ForCausalLM),
    "qwen3": (Qwen3Config, Qwen3ForCausalLM),
    "gemma2": (Gemma2Config, Gemma2ForCausalLM),
    "gemma3": (Gemma3TextConfig, Gemma3ForCausalLM),
}
# Rows of 256 and 512, so that K-quants are used; small enough for a second each.
WIDE = {"hidden_size": 256, "intermediate_size": 512, "num_attention_heads": 4, "num_key_value_heads": 2}
NARROW = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4, "num_key_value_heads": 2}
GEMMA = {"head_dim": 64, "query_pre_attn_scalar": 64, "sliding_window": 32}


@dataclass(frozen=True)
class Trial:
    """One model to export: its folder, what chats are written with, and whether its text means anything."""

    name: str
    folder: Path
    chat_template: str | None
    stop_token_ids: tuple[int, ...]
    trained: bool = False
    quants: bool = True


@dataclass(frozen=True)
class Random:
    """A random model of a family: settings of its config over those shared by all."""

    family: str = "llama"
    settings: dict[str, Any] = field(default_factory=dict)
    layers: int = 4
    tied: bool = False
    quants: bool = False


RANDOM = {
    "multi-head": Random(settings={**WIDE, "num_key_value_heads": 4}, layers=8, quants=True),
    "biased": Random(settings={**WIDE, "attention_bias": True, "mlp_bias": True}),
    "unused-rows": Random(settings={**WIDE, "vocab_size": 544}),
    "tied-llama3": Random(settings={**WIDE, "rope_parameters": LLAMA3_ROPE}, layers=8, tied=True, quants=True),
    "head-size": Random(settings={**WIDE, "head_dim": 32}),
    "linear": Random(
        settings={**WIDE, "rope_parameters": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0}}
    ),
    "dynamic": Random(
        settings={**WIDE, "rope_parameters": {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 4.0}}
    ),
    "yarn": Random(settings={**WIDE, "rope_parameters": YARN_ROPE}),
    "yarn-factor": Random(settings={**WIDE, "rope_parameters": {**YARN_ROPE, "attention_factor": 1.3}}),
    "yarn-mscale": Random(settings={**WIDE, "rope_parameters": {**YARN_ROPE, "mscale": 1.5, "mscale_all_dim": 0.5}}),
    "mistral": Random("mistral", {**WIDE, "head_dim": 64, "sliding_window": None}, quants=True),
    "qwen2": Random("qwen2", {**WIDE, "vocab_size": 514}, layers=8, quants=True),  # its tokenizer adds <|endoftext|>
    "qwen3": Random("qwen3", {**WIDE, "head_dim": 32}, tied=True, quants=True),
    "gemma2": Random("gemma2", {**WIDE, **GEMMA}, tied=True, quants=True),
    "gemma3": Random("gemma3", {**WIDE, **GEMMA}, layers=7, tied=True),
}
# name -> model it is for, settings of PEFT's LoraConfig: every linear, the head too; GQA with permuted rows and rows in
# transformers' order; scales that differ from module to module.
ADAPTERS: dict[str, tuple[str, dict[str, Any]]] = {
    "lora": ("biased", {"r": 8, "lora_alpha": 16, "target_modules": "all-linear"}),
    "lora-head": ("unused-rows", {"r": 3, "lora_alpha": 5, "target_modules": ["q_proj", "k_proj", "lm_head"]}),
    "rslora": ("tied-llama3", {"r": 5, "lora_alpha": 7, "use_rslora": True, "target_modules": "all-linear"}),
    "patterns": (
        "multi-head",
        {
            **{"r": 8, "lora_alpha": 16, "target_modules": "all-linear"},
            **{"rank_pattern": {"k_proj": 3}, "alpha_pattern": {"down_proj": 1}},
        },
    ),
    "lora-qwen3": ("qwen3", {"r": 8, "lora_alpha": 16, "target_modules": "all-linear"}),
}
PUBLISHED = {  # tokenizer folder -> rows of the embedding, bos, stop tokens
    "llama2": (32000, 1, (2,)),
    "llama3.2-instruct": (128256, 128000, (128009, 128001, 128008)),
    "mistral": (32768, 1, (2,)),
}


def make_trials(work: Path) -> list[Trial]:
    """Every model as a folder; those that need the real data are left out where it is not there, which is said."""
    alpaca = (CHECKOUT / "finetune" / "data" / "templates" / "alpaca.jinja").read_text(encoding="utf-8")
    trials = [Trial("pocket-llama", POCKET, alpaca, (1,), trained=True)]
    for name, random in RANDOM.items():
        folder = make_random(work / name, random)
        trials.append(Trial(name, folder, None, (1,), quants=random.quants))
    if not SHARED.is_dir():
        print(f"left out, {SHARED} is not there: stories260K, {', '.join(PUBLISHED)}")
        return trials
    trials.append(Trial("stories260K", SHARED / "weights" / "stories260K", None, (2,), trained=True))
    for name, (rows, bos, stops) in PUBLISHED.items():
        folder = make_published(work / f"tokenizer-{name}", SHARED / "tokenizers" / name, rows=rows, bos=bos)
        settings = json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8"))
        quants = name == "llama3.2-instruct"  # rows of 64: every K-quant falls back to a type of smaller blocks
        trials.append(Trial(f"tokenizer-{name}", folder, settings["chat_template"], stops, quants=quants))
    return trials


def make_random(folder: Path, random: Random) -> Path:
    """A random model with the first 512 tokens of pocket-llama's tokenizer and one that is no control token."""
    settings = {"num_hidden_layers": random.layers, "tie_word_embeddings": random.tied, "vocab_size": 513}
    settings |= {"bos_token_id": 0, "eos_token_id": 1, "max_position_embeddings": 512}
    save_random(folder, random.family, settings | random.settings)
    shorten_tokenizer(POCKET, folder, tokens=512)
    return folder


def make_adapter(folder: Path, base: Path, settings: dict[str, Any]) -> Path:
    """An adapter of random numbers, large enough to change what the model says."""
    torch.manual_seed(3)
    model = AutoModelForCausalLM.from_pretrained(str(base), dtype=torch.float32)
    tuned = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", **settings))
    for name, weight in tuned.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(weight, std=0.05)
    tuned.peft_config["default"].base_model_name_or_path = str(base)
    tuned.save_pretrained(folder, save_embedding_layers=False)
    return folder


def make_published(folder: Path, tokenizer: Path, *, rows: int, bos: int) -> Path:
    """A small random model with a published tokenizer."""
    settings = NARROW | {"num_hidden_layers": 2, "vocab_size": rows, "max_position_embeddings": 512}
    save_random(folder, "llama", settings | {"bos_token_id": bos, "tie_word_embeddings": False})
    for file in tokenizer.iterdir():
        shutil.copyfile(file, folder / file.name)
    return folder


def save_random(folder: Path, family: str, settings: dict[str, Any]) -> None:
    """Random weights in float32; wide enough that the logits of two tokens are rarely close. Biases are random too."""
    config_class, model_class = CLASSES[family]
    torch.manual_seed(0)
    model = model_class(config_class(**settings, initializer_range=0.08))
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if name.endswith("bias"):
                weight.normal_(0, 0.3)
            elif "norm" in name:
                weight.uniform_(0.5, 1.5)
    model.save_pretrained(folder)


def shorten_tokenizer(source: Path, folder: Path, *, tokens: int) -> None:
    """The first tokens of a byte-level BPE tokenizer, with the merges that make them, and the added token <tool>."""
    stored = json.loads((source / "tokenizer.json").read_text(encoding="utf-8"))
    vocabulary = {text: token_id for text, token_id in stored["model"]["vocab"].items() if token_id < tokens}
    pairs = [pair if isinstance(pair, list) else pair.split(" ") for pair in stored["model"]["merges"]]
    stored["model"] |= {"vocab": vocabulary, "merges": [pair for pair in pairs if "".join(pair) in vocabulary]}
    stored["added_tokens"].append(stored["added_tokens"][0] | {"id": tokens, "content": "<tool>", "special": False})
    (folder / "tokenizer.json").write_text(json.dumps(stored), encoding="utf-8")
    shutil.copyfile(source / "tokenizer_config.json", folder / "tokenizer_config.json")
