"""A base and an adapter by transformers, PEFT and bitsandbytes alone: the reference that none of our code touches."""

from __future__ import annotations

import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from finetune.resolve import Resolved


def plain_model(resolved: Resolved, dtype: torch.dtype) -> torch.nn.Module:
    """The base in `dtype` (nf4 weights are dequantised to it) with a LoRA in float32, drawn as PEFT draws it."""
    plan = resolved.plan
    quantized = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
    )
    # Quantised from the stored bfloat16, as a training run does; what is not quantised is then widened.
    model = AutoModelForCausalLM.from_pretrained(
        plan.model.folder,
        dtype=torch.bfloat16 if plan.model.quantization == "nf4" else dtype,
        quantization_config=quantized if plan.model.quantization == "nf4" else None,
        attn_implementation="sdpa",
    )
    model.requires_grad_(False)
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False  # repacks weights for inference, after which gradients are wrong
    for parameter in model.parameters():
        if parameter.is_floating_point():
            parameter.data = parameter.data.to(dtype)
    config = LoraConfig(r=plan.adapter.rank, lora_alpha=plan.adapter.alpha, target_modules=sorted(plan.adapter.targets))
    tuned = get_peft_model(model, config)
    for parameter in tuned.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    return tuned.train()
