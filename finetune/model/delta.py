"""The weights a quantised model computes with, read back from its loaded modules: a model in, plain tensors out."""

from __future__ import annotations

from collections.abc import Iterator

import torch


def quantized_weights(model: torch.nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """Module path and dequantised weight [out, in] of every 4-bit or 8-bit linear of a model, adapters not counted."""
    import bitsandbytes as bnb
    import bitsandbytes.functional as functional

    for path, module in model.named_modules():
        name = path.removeprefix("base_model.model.").removesuffix(".base_layer")
        if isinstance(module, bnb.nn.Linear4bit):
            yield name, functional.dequantize_4bit(module.weight.data, module.weight.quant_state)
        elif isinstance(module, bnb.nn.Linear8bitLt):
            scale = module.state.SCB if module.weight.SCB is None else module.weight.SCB
            rows = module.state.CB if module.weight.CB is None else module.weight.CB
            yield name, functional.int8_vectorwise_dequant(rows, scale)
