"""Load a frozen base: a plan in, a transformers model in 4-bit, 8-bit or 16-bit out."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import transformers.utils.logging
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    BitsAndBytesConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from finetune.errors import Problem, UserError
from finetune.families import VISION
from finetune.model.attention import register_attention
from finetune.model.experts import FOUR_BITS, ExpertsConfig, experts_to_quantize
from finetune.model.from_cache import load_kept
from finetune.model.keep import write_entry
from finetune.model.quantised_cache import Damaged, Entry, discard, find_entry, open_kept, tell
from finetune.model.streamed import can_stream, load_streamed, stored_tensors
from finetune.plan import ModelPlan
from finetune.trust import is_trusted

BLOCK_SIZE = 64  # bitsandbytes' block for nf4 and fp4


def load_base(plan: ModelPlan, *, keep: bool = False) -> PreTrainedModel:
    """The frozen base in evaluation mode, quantised as planned, no parameter requiring a gradient.

    With `keep`, one in 4 bits is kept on disk and taken from there the next time, bit by bit the same; what proves
    something reads the base itself.

    Raises:
        UserError: transformers cannot load the folder.
    """
    register_attention()
    transformers.utils.logging.disable_progress_bar()
    dtype = getattr(torch, plan.dtype)
    trusted = is_trusted(plan.folder)
    try:
        config = AutoConfig.from_pretrained(str(plan.folder), trust_remote_code=trusted)
        beside_vision = getattr(config, "vision_config", None) is not None
        settings = quantization_config(plan.quantization, dtype, beside_vision=beside_vision)
        model = _load(plan, config, _with_experts(settings, plan), trusted=trusted, keep=keep)
    except (OSError, ValueError, KeyError) as error:
        first_line = (str(error).splitlines() or [""])[0]
        raise UserError(Problem(str(plan.folder), f"transformers cannot load this base: {first_line}")) from error
    model.requires_grad_(False)
    keep_4bit_weights_unpacked(model)
    return model


def _load(
    plan: ModelPlan, config: PreTrainedConfig, settings: BitsAndBytesConfig | None, *, trusted: bool, keep: bool
) -> PreTrainedModel:
    options: dict[str, Any] = {
        "dtype": getattr(torch, plan.dtype),
        # sdpa where the family can: Gemma 2 caps its attention scores, so that transformers computes them eagerly.
        "attn_implementation": None if plan.attention == "sdpa" else plan.attention,
        "device_map": {"": plan.device},
    }
    if settings is not None and can_stream(config, trusted=trusted):
        entry = find_entry(plan, settings) if keep else None
        if entry is None:
            return load_streamed(plan.folder, config, settings, stored_tensors(plan.folder), **options)
        return _load_through(entry, plan, config, settings, options)
    options |= {"use_safetensors": True, "quantization_config": settings}
    model = AutoModelForCausalLM.from_pretrained(str(plan.folder), config=config, trust_remote_code=trusted, **options)
    if settings is not None and plan.device == "cpu":
        leave_file_(model)
    return model


def _load_through(
    entry: Entry, plan: ModelPlan, config: PreTrainedConfig, settings: BitsAndBytesConfig, options: dict[str, Any]
) -> PreTrainedModel:
    """From the cache where it is there and whole, else from the base, which is kept then."""
    try:
        if kept := open_kept(entry):
            tell(f"{plan.base}: read in 4 bits from {kept.folder}, {kept.bytes / 1e9:.2f} GB")
            return load_kept(plan.folder, config, settings, kept, **options)
    except Damaged as damage:
        discard(entry, damage)
        damage.__traceback__ = None  # it holds on to half a model
    tell(f"{plan.base}: quantised to {plan.quantization} while it is read, {entry.stored_bytes / 1e9:.2f} GB")
    model = load_streamed(plan.folder, config, settings, stored_tensors(plan.folder), **options)
    write_entry(entry, model)
    return model


def leave_file_(model: PreTrainedModel) -> None:
    """Copy what was not quantised out of the mapped file: as long as one tensor lies there, so do the pages of all
    others that were read, which counts as memory of this process."""
    for parameter in model.parameters():
        if parameter.is_floating_point():
            parameter.data = parameter.data.clone()


def quantization_config(
    quantization: str, dtype: torch.dtype, *, beside_vision: bool = False
) -> BitsAndBytesConfig | None:
    """What transformers needs to quantise while loading; None for unquantised weights. What sees images stays."""
    if quantization == "none":
        return None
    # A list takes the place of the default, which is the head.
    skipped = ["lm_head", *(rf"(.*\.)?{part}" for part in VISION)] if beside_vision else None
    if quantization == "int8":
        return BitsAndBytesConfig(load_in_8bit=True, llm_int8_skip_modules=skipped)
    return BitsAndBytesConfig(
        llm_int8_skip_modules=skipped,
        load_in_4bit=True,
        bnb_4bit_quant_type=quantization,
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
    )


def _with_experts(settings: BitsAndBytesConfig | None, plan: ModelPlan) -> BitsAndBytesConfig | None:
    """The settings that take fused experts, too, where the base has them and they become 4 bits."""
    if plan.quantization not in FOUR_BITS or not (experts := experts_to_quantize(plan.folder)):
        return settings
    assert settings is not None
    return ExpertsConfig(experts, **settings.to_dict())


def keep_4bit_weights_unpacked(model: torch.nn.Module) -> None:
    """Stop bitsandbytes from repacking 4-bit weights in place at the first evaluation forward.

    On CPUs with AVX512-BF16, bitsandbytes 0.50 repacks the weight of a Linear4bit for inference and never unpacks it:
    from then on no gradient flows through the base, and dequantising gives garbage
    (bitsandbytes/nn/modules.py, Linear4bit.forward; a neighbouring report: bitsandbytes pull request 2083).
    """
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False  # type: ignore[assignment]


def dequantize_like_base(weight: torch.Tensor, *, quantization: str, dtype: torch.dtype) -> torch.Tensor:
    """The values of a stored weight [out, in] once load_base has quantised it for a run that computes in `dtype`.

    In `dtype` from 4 bits; in float32 from 8, whose products are scaled after they are summed (bitsandbytes,
    int8_mixed_scaled_mm).
    """
    import bitsandbytes.functional as bnb

    if quantization == "int8":
        quantized, scale, _ = bnb.int8_vectorwise_quant(weight.to(dtype).to(torch.float16))
        return bnb.int8_vectorwise_dequant(quantized, scale)
    packed, state = bnb.quantize_4bit(
        weight.to(dtype).contiguous(), blocksize=BLOCK_SIZE, compress_statistics=True, quant_type=quantization
    )
    return bnb.dequantize_4bit(packed, state).to(dtype)


def load_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    """The tokenizer of a base, adapter or release folder, as any transformers user gets it."""
    return AutoTokenizer.from_pretrained(str(folder), trust_remote_code=is_trusted(folder))
