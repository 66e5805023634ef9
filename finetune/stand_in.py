"""A stand-in for a published base that is not on this machine: its row of the table in; a config and a tokenizer out.

The config holds the published sizes, everything else is transformers' default of the architecture; the tokenizer is
pocket-llama's with the control tokens of the base and of the template. There are no weights: a twin needs none.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from finetune.base import ASSETS, Base
from finetune.data.template import CONTROL_TOKENS, template_without_base
from finetune.families import Experts, Model, Shape, Vision, find_family
from finetune.recipe import Recipe
from finetune.unseen import nearest_template, table_facts

TOKENIZER = "pocket-llama"
SPARE_ROWS = 64  # of the embedding, as published ones have
CLASSES = {  # of transformers, as config.json names them
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "mixtral": "MixtralForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "qwen3_moe": "Qwen3MoeForCausalLM",
    "gemma2": "Gemma2ForCausalLM",
    "gemma3_text": "Gemma3ForCausalLM",
    "gemma3": "Gemma3ForConditionalGeneration",
    "deepseek_v2": "DeepseekV2ForCausalLM",
    "deepseek_v3": "DeepseekV3ForCausalLM",
    "phi3": "Phi3ForCausalLM",
    "mllama": "MllamaForConditionalGeneration",
    "llama4": "Llama4ForConditionalGeneration",
}
OWN_HEAD_SIZE = {"mistral", "qwen3", "qwen3_moe", "gemma2", "gemma3_text", "gemma3", "llama4"}


def make_stand_in(model: Model, recipe: Recipe, folder: Path) -> Base:
    """Write the stand-in to `folder`, which must be new; `recipe` says which template it has to serve."""
    family = find_family(model.family)
    asked = recipe.data.template
    template = nearest_template(model) if asked == "auto" else asked
    folder.mkdir(parents=True)
    eos_token = family.stop_tokens[-1]
    bos_token, vocabulary = _write_tokenizer(
        folder, eos_token, (*family.stop_tokens, *CONTROL_TOKENS.get(template, ()))
    )
    chat_template = None
    if asked == "auto" and template != "alpaca":  # which is what a base without a template gets
        told = template_without_base(template, bos_token=bos_token, eos_token=eos_token, date=recipe.data.date)
        chat_template = told.source
        (folder / "chat_template.jinja").write_text(chat_template, encoding="utf-8")
    ids = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": None}
    config = config_of(model, vocabulary=vocabulary + SPARE_ROWS, ids=ids)
    (folder / "config.json").write_text(json.dumps(config, indent=2), encoding="utf-8")
    facts = replace(table_facts(model), folder=folder)
    return Base(facts, folder, bos_token, eos_token, chat_template)


def _write_tokenizer(folder: Path, eos_token: str, control: tuple[str, ...]) -> tuple[str, int]:
    """The beginning token, and how many tokens there are."""
    ours = ASSETS / TOKENIZER
    tokenizer = json.loads((ours / "tokenizer.json").read_text(encoding="utf-8"))
    added = tokenizer["added_tokens"]
    total = 1 + max(*tokenizer["model"]["vocab"].values(), *(each["id"] for each in added))
    new = dict.fromkeys(
        token for token in control if token != "eos_token" and token not in {e["content"] for e in added}
    )
    added += [{**added[-1], "id": total + at, "content": token, "special": True} for at, token in enumerate(new)]
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer, ensure_ascii=False), encoding="utf-8")
    settings = json.loads((ours / "tokenizer_config.json").read_text(encoding="utf-8"))
    text = json.dumps({**settings, "eos_token": eos_token}, indent=2, ensure_ascii=False)
    (folder / "tokenizer_config.json").write_text(text, encoding="utf-8")
    shutil.copyfile(ours / "generation_config.json", folder / "generation_config.json")
    return settings["bos_token"], total + len(new)


def config_of(model: Model, *, vocabulary: int, ids: Mapping[str, Any]) -> dict[str, Any]:
    """A config.json of the published sizes; `vocabulary` and the `ids` of its tokens are the stand-in's."""
    kind = find_family(model.family).model_type
    shape = model.shape
    text = _common(shape, kind) | {"vocab_size": vocabulary} | dict(ids)
    text |= _of_experts(shape.experts, kind) if shape.experts else {}
    if shape.latent:
        latent = shape.latent
        text |= {"q_lora_rank": latent.query_rank or None, "kv_lora_rank": latent.key_value_rank}
        text |= {"qk_nope_head_dim": latent.no_rope_size, "qk_rope_head_dim": latent.rope_size}
        text |= {"v_head_dim": latent.value_size}
    top = {"model_type": kind, "architectures": [CLASSES[kind]], "dtype": "bfloat16"}
    if not shape.vision:
        return top | text
    return top | {"text_config": text, "vision_config": _of_vision(shape, shape.vision)}


def _common(shape: Shape, kind: str) -> dict[str, Any]:
    layers = shape.layers + shape.cross_layers
    text: dict[str, Any] = {
        "hidden_size": shape.hidden,
        "intermediate_size": shape.intermediate,
        "num_hidden_layers": layers,
        "num_attention_heads": shape.heads,
        "num_key_value_heads": shape.key_value_heads,
        "tie_word_embeddings": shape.tied,
    }
    if kind in OWN_HEAD_SIZE:
        text["head_dim"] = shape.head
    if shape.cross_layers:  # evenly among the others (transformers, models/mllama)
        every = shape.layers // shape.cross_layers + 1
        text["cross_attention_layers"] = [3 + every * number for number in range(shape.cross_layers)]
    return text


def _of_experts(experts: Experts, kind: str) -> dict[str, Any]:
    shared = experts.shared_intermediate
    if kind == "mixtral":
        return {"num_local_experts": experts.count, "num_experts_per_tok": experts.active}
    if kind == "llama4":
        every = {"interleave_moe_layer_step": experts.every}
        text = {"num_local_experts": experts.count, "num_experts_per_tok": experts.active, **every}
        return text | {"intermediate_size": experts.intermediate, "intermediate_size_mlp": 2 * experts.intermediate}
    more: dict[str, Any] = {"moe_intermediate_size": experts.intermediate, "num_experts_per_tok": experts.active}
    if kind == "qwen3_moe":
        return more | {"num_experts": experts.count}
    more |= {"n_shared_experts": shared // experts.intermediate, "first_k_dense_replace": experts.dense_first}
    return more | {"n_routed_experts": experts.count}


def _of_vision(shape: Shape, vision: Vision) -> dict[str, Any]:
    if shape.cross_layers:
        return {"image_size": vision.image}
    sizes = {"hidden_size": vision.hidden, "intermediate_size": vision.intermediate, "image_size": vision.image}
    sizes |= {"num_hidden_layers": vision.layers, "patch_size": vision.patch}
    more = {"vision_output_dim": 4096} if vision.kind == "llama4" else {"num_attention_heads": 16}
    return sizes | more | ({} if vision.kind == "llama4" else {"vision_use_head": False})
