"""The weights a quantised model computes with, read back from its loaded modules: a model in, plain tensors out."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch


def quantized_weights(model: torch.nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """Module path and dequantised weight [out, in] of every 4-bit or 8-bit linear of a model, adapters not counted."""
    import bitsandbytes.functional as functional
    from bitsandbytes.nn.modules import Linear4bit, Linear8bitLt

    for path, module in model.named_modules():
        name = path.removeprefix("base_model.model.").removesuffix(".base_layer")
        weight: Any = module.weight if isinstance(module, (Linear4bit, Linear8bitLt)) else None
        if isinstance(module, Linear4bit):
            yield name, functional.dequantize_4bit(weight.data, weight.quant_state)
        elif isinstance(module, Linear8bitLt):
            # The first forward moves both from the weight to the module's state.
            holder: Any = weight if weight.SCB is not None else module.state
            yield name, functional.int8_vectorwise_dequant(holder.CB, holder.SCB)
