"""The table of published bases against transformers' own modules on the meta device, and against published counts."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
import transformers

from finetune.families import (
    FAMILIES,
    MODELS,
    Model,
    Shape,
    Vision,
    count_parameters,
    find_family,
    find_model,
    has_experts,
)

# As the publishers and the hub's model pages state them.
PUBLISHED = {
    "huggyllama/llama-65b": 65_285_660_672,
    "meta-llama/Llama-2-7b-hf": 6_738_415_616,
    "meta-llama/Llama-2-70b-hf": 68_976_648_192,
    "meta-llama/Llama-3.1-8B": 8_030_261_248,
    "meta-llama/Llama-3.1-70B": 70_553_706_496,
    "meta-llama/Llama-3.1-405B": 405_853_388_800,
    "meta-llama/Llama-3.2-1B": 1_235_814_400,
    "meta-llama/Llama-3.2-3B": 3_212_749_824,
    "meta-llama/Llama-3.2-11B-Vision-Instruct": 10_670_220_835,
    "meta-llama/Llama-4-Scout-17B-16E-Instruct": 108_641_793_536,
    "meta-llama/Llama-4-Maverick-17B-128E-Instruct": 401_583_781_376,
    "TinyLlama/TinyLlama-1.1B-Chat-v1.0": 1_100_048_384,
    "mistralai/Mistral-7B-v0.1": 7_241_732_096,
    "mistralai/Mixtral-8x7B-v0.1": 46_702_792_704,
    "Qwen/Qwen2.5-7B": 7_615_616_512,
    "Qwen/Qwen3-30B-A3B": 30_532_122_624,
    "google/gemma-2-9b": 9_241_705_984,
    "google/gemma-3-4b-it": 4_300_079_472,
    "deepseek-ai/DeepSeek-V2-Lite": 15_706_484_224,
    "deepseek-ai/DeepSeek-V3": 671_026_419_200,
    "microsoft/phi-4": 14_659_507_200,
}


def common(shape: Shape) -> dict[str, Any]:
    return {
        "vocab_size": shape.vocabulary,
        "hidden_size": shape.hidden,
        "intermediate_size": shape.intermediate,
        "num_hidden_layers": shape.layers,
        "num_attention_heads": shape.heads,
        "num_key_value_heads": shape.key_value_heads,
        "tie_word_embeddings": shape.tied,
    }


def with_head(shape: Shape) -> dict[str, Any]:
    return common(shape) | {"head_dim": shape.head}


def mixtral(shape: Shape) -> dict[str, Any]:
    assert shape.experts
    return common(shape) | {"num_local_experts": shape.experts.count}


def qwen3_moe(shape: Shape) -> dict[str, Any]:
    assert shape.experts
    experts = {"num_experts": shape.experts.count, "moe_intermediate_size": shape.experts.intermediate}
    return with_head(shape) | experts


def deepseek(shape: Shape) -> dict[str, Any]:
    assert shape.experts
    assert shape.latent
    return common(shape) | {
        "n_routed_experts": shape.experts.count,
        "moe_intermediate_size": shape.experts.intermediate,
        "n_shared_experts": shape.experts.shared_intermediate // shape.experts.intermediate,
        "first_k_dense_replace": shape.experts.dense_first,
        "num_experts_per_tok": shape.experts.active,
        "q_lora_rank": shape.latent.query_rank or None,
        "kv_lora_rank": shape.latent.key_value_rank,
        "qk_nope_head_dim": shape.latent.no_rope_size,
        "qk_rope_head_dim": shape.latent.rope_size,
        "v_head_dim": shape.latent.value_size,
    }


def phi(shape: Shape) -> dict[str, Any]:
    return common(shape) | {"pad_token_id": 0, "bos_token_id": 0, "eos_token_id": 0}


def gemma3_vision(shape: Shape) -> dict[str, Any]:
    assert shape.vision
    siglip = vision_sizes(shape.vision) | {"num_attention_heads": 16, "vision_use_head": False}
    return {"text_config": with_head(replace(shape, vision=None)), "vision_config": siglip}


def mllama(shape: Shape) -> dict[str, Any]:
    assert shape.vision
    layers, extra = shape.layers + shape.cross_layers, shape.layers // shape.cross_layers + 1
    cross = [3 + extra * number for number in range(shape.cross_layers)]
    text = common(shape) | {"num_hidden_layers": layers, "cross_attention_layers": cross}
    return {"text_config": text, "vision_config": {"image_size": shape.vision.image}}


def llama4(shape: Shape) -> dict[str, Any]:
    assert shape.vision
    assert shape.experts
    text = with_head(shape) | {
        "intermediate_size": shape.experts.intermediate,
        "intermediate_size_mlp": shape.intermediate,
        "num_local_experts": shape.experts.count,
        "interleave_moe_layer_step": shape.experts.every,
    }
    vision = vision_sizes(shape.vision) | {"vision_output_dim": 4096}
    return {"text_config": text, "vision_config": vision}


def vision_sizes(vision: Vision) -> dict[str, int]:
    return {
        "hidden_size": vision.hidden,
        "intermediate_size": vision.intermediate,
        "num_hidden_layers": vision.layers,
        "image_size": vision.image,
        "patch_size": vision.patch,
    }


CONFIGS: dict[str, tuple[str, str, Any]] = {
    "llama": ("LlamaConfig", "LlamaForCausalLM", common),
    "mistral": ("MistralConfig", "MistralForCausalLM", with_head),
    "mixtral": ("MixtralConfig", "MixtralForCausalLM", mixtral),
    "qwen2": ("Qwen2Config", "Qwen2ForCausalLM", common),
    "qwen3": ("Qwen3Config", "Qwen3ForCausalLM", with_head),
    "qwen3_moe": ("Qwen3MoeConfig", "Qwen3MoeForCausalLM", qwen3_moe),
    "gemma2": ("Gemma2Config", "Gemma2ForCausalLM", with_head),
    "gemma3_text": ("Gemma3TextConfig", "Gemma3ForCausalLM", with_head),
    "gemma3": ("Gemma3Config", "Gemma3ForConditionalGeneration", gemma3_vision),
    "deepseek_v2": ("DeepseekV2Config", "DeepseekV2ForCausalLM", deepseek),
    "deepseek_v3": ("DeepseekV3Config", "DeepseekV3ForCausalLM", deepseek),
    "phi3": ("Phi3Config", "Phi3ForCausalLM", phi),
    "mllama": ("MllamaConfig", "MllamaForConditionalGeneration", mllama),
    "llama4": ("Llama4Config", "Llama4ForConditionalGeneration", llama4),
}


def published_config(kind: str, tokenizer: Any) -> Any:
    """The first published config of an architecture, with some embeddings more than this tokenizer has tokens."""
    model = next(model for model in MODELS if find_family(model.family).model_type == kind)
    config_class, model_class, arguments = CONFIGS[kind]
    values = arguments(model.shape)
    ids = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id, "pad_token_id": None}
    values.get("text_config", values).update(ids | {"vocab_size": len(tokenizer) + 64})
    config = getattr(transformers, config_class)(**values)
    config.architectures = [model_class]
    return config


DISTINCT = list({(find_family(model.family).model_type, model.shape): model for model in MODELS}.values())


@pytest.mark.parametrize("model", DISTINCT, ids=lambda model: model.id)
def test_parameters_in_closed_form_are_those_of_the_modules(model: Model) -> None:
    config_class, model_class, arguments = CONFIGS[find_family(model.family).model_type]
    config = getattr(transformers, config_class)(**arguments(model.shape))
    with torch.device("meta"):
        modules = getattr(transformers, model_class)(config)
    buffers = sum(  # DeepSeek V3's router keeps its correction as a buffer that is stored with the weights
        value.numel() for name, value in modules.named_buffers() if name.endswith("e_score_correction_bias")
    )
    assert sum(parameter.numel() for parameter in modules.parameters()) + buffers == count_parameters(model.shape)


@pytest.mark.parametrize("hub_id", PUBLISHED)
def test_parameters_are_those_that_were_published(hub_id: str) -> None:
    model = find_model(hub_id)
    assert model is not None
    assert count_parameters(model.shape) == PUBLISHED[hub_id]


def test_every_model_has_a_family_and_every_family_a_model() -> None:
    assert {model.family for model in MODELS} == {family.name for family in FAMILIES}
    assert len({model.id.lower() for model in MODELS}) == len(MODELS)


def test_models_are_found_whatever_the_case_of_their_letters() -> None:
    found = find_model("META-LLAMA/llama-3.1-8b")
    assert found is not None
    assert found.id == "meta-llama/Llama-3.1-8B"
    assert find_model("someone/else") is None


def test_every_second_layer_of_maverick_has_experts() -> None:
    maverick = find_model("meta-llama/Llama-4-Maverick-17B-128E-Instruct")
    assert maverick is not None
    assert [has_experts(maverick.shape, layer) for layer in range(4)] == [False, True, False, True]
