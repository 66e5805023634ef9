"""Fused experts in 4 bits, which bitsandbytes leaves in 16 (transformers/integrations/bitsandbytes.py, replace_with_
bnb_linear takes linears only): a loaded parameter [experts, rows, columns] in, packed bytes and their scales out.

What the files hold as one tensor is quantised as one, so that a merge can do it again to each stored tensor by itself.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import bitsandbytes.functional as bnb
import torch
from peft.tuners.lora.layer import ParamWrapper, _LoraFactorsProxy
from torch.nn.utils import parametrize
from transformers import BitsAndBytesConfig
from transformers.core_model_loading import ConversionOps
from transformers.quantizers.auto import register_quantizer
from transformers.quantizers.quantizer_bnb_4bit import Bnb4BitHfQuantizer
from transformers.quantizers.quantizers_utils import get_module_from_name

from finetune.base import is_quantizable_expert, read_tensor_entries
from finetune.model.stored_names import Piece, read_stored_names

METHOD = "bitsandbytes_with_experts"
FOUR_BITS = ("nf4", "fp4")
BLOCK, SCALES_BLOCK = 64, 256  # bitsandbytes': values to a scale, scales to a scale of theirs


class ExpertsIn4Bit(torch.nn.Module):
    """Gives the parameter its values whenever it is read; torch's parametrization of the packed bytes."""

    def __init__(self, states: Sequence[bnb.QuantState], shape: torch.Size, names: Sequence[str]) -> None:
        super().__init__()
        self.shape, self.names = shape, tuple(names)
        first = states[0]
        self.kind, self.dtype, self.code = first.quant_type, first.dtype, first.code
        self.scales_code = first.state2.code
        self.scales = torch.stack([state.absmax for state in states])  # uint8 [pieces, blocks]
        self.scales_of_scales = torch.stack([state.state2.absmax for state in states])
        self.offsets = torch.stack([state.offset for state in states])

    @property
    def stored_bytes(self) -> int:
        """What one pair of packed bytes and scales takes."""
        held = (self.scales, self.scales_of_scales, self.offsets)
        return self.shape.numel() // 2 + sum(each.numel() * each.element_size() for each in held)

    @torch.no_grad()
    def forward(self, packed: torch.Tensor) -> torch.Tensor:
        """The values [experts, rows, columns], bit by bit what dequantising each stored tensor gives."""
        scales = torch.stack([self._scales_of(piece) for piece in range(len(self.names))])
        state = bnb.QuantState(
            absmax=scales.flatten(), shape=self.shape, code=self.code, blocksize=BLOCK, quant_type=self.kind,
            dtype=self.dtype,
        )  # fmt: skip
        return bnb.dequantize_4bit(packed, state)

    def _scales_of(self, piece: int) -> torch.Tensor:
        found = bnb.dequantize_blockwise(
            self.scales[piece], absmax=self.scales_of_scales[piece], code=self.scales_code, blocksize=SCALES_BLOCK
        )
        return found + self.offsets[piece]

    def stored(self, values: torch.Tensor) -> Mapping[str, torch.Tensor]:
        """The values by the names of the stored tensors."""
        rows = values.reshape(len(self.names), -1, self.shape[-1])
        return {self.names[0]: values} if len(self.names) == 1 else dict(zip(self.names, rows, strict=True))


def experts_to_quantize(folder: Path) -> dict[str, list[Piece | str]]:
    """By path of the model's parameter, where its stored tensors lie in it; empty for a base without experts.

    A parameter whose pieces are not known, or are not of one size, stays in 16 bits.
    """
    entries = [entry for entry in read_tensor_entries(folder) if is_quantizable_expert(entry)]
    if not entries:
        return {}
    known = {entry.name for entry in entries}
    names = read_stored_names(folder, entries)
    found: dict[str, list[Piece | str]] = {path: [stored] for path, stored in names.renamed.items() if stored in known}
    for path, pieces in names.fused.items():
        heights = {piece.rows.stop - piece.rows.start for piece in pieces}
        if len(heights) == 1:
            in_order: list[Piece] = sorted(pieces, key=lambda piece: (piece.expert, piece.rows.start))
            found[path] = [*in_order]
    return found


def quantized_expert_tensors(folder: Path) -> frozenset[str]:
    """The stored names of the experts that load_base quantises to 4 bits."""
    parts = experts_to_quantize(folder).values()
    return frozenset(part if isinstance(part, str) else part.name for found in parts for part in found)


def held_experts(model: torch.nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """Stored name and dequantised values of every expert's tensor that the model holds in 4 bits."""
    for module in model.modules():
        for chain in getattr(module, "parametrizations", {}).values():
            if isinstance(chain[0], ExpertsIn4Bit):
                yield from chain[0].stored(chain[0](chain.original)).items()


@contextmanager
def experts_shown_whole(model: torch.nn.Module) -> Iterator[None]:
    """Experts in 4 bits look like the parameters they stand for while PEFT attaches an adapter to a model.

    PEFT wraps several parameters of a module in another order where they are parametrizations already, and its files
    say nothing of the order (tuners/tuners_utils.py, _inject_parameters): the adapter would fit 4-bit bases only.
    """
    places = [
        (module, name, chain[0], chain.original)
        for module in model.modules()
        for name, chain in getattr(module, "parametrizations", {}).items()
        if isinstance(chain[0], ExpertsIn4Bit)
    ]
    for module, name, values, packed in places:
        parametrize.remove_parametrizations(module, name, leave_parametrized=False)
        one_number = torch.zeros((), dtype=values.dtype, device=packed.device)
        module._parameters[name] = torch.nn.Parameter(one_number.expand(values.shape), requires_grad=False)
    try:
        yield
    finally:
        for module, name, values, packed in places:
            module._parameters[name] = packed
            parametrize.register_parametrization(module, name, values, unsafe=True)
        for module in model.modules():
            if isinstance(module, ParamWrapper) and hasattr(module.get_base_layer(), "parametrizations"):
                module.get_param = partial(_stand_in, module)  # type: ignore[method-assign]
                module._activate_lora = partial(_activate, module)  # type: ignore[method-assign]


def _stand_in(wrapper: ParamWrapper) -> torch.Tensor:
    """What PEFT asks of a parameter is its shape, dtype and device: no reason to dequantise it."""
    chain: Any = wrapper.get_base_layer().parametrizations[wrapper.parameter_name]  # type: ignore[index]
    return torch.zeros((), dtype=chain[0].dtype, device=chain.original.device).expand(chain[0].shape)


@contextmanager
def _activate(wrapper: ParamWrapper, active_adapters: Sequence[str]) -> Iterator[None]:
    """PEFT's own way of adding a delta for one forward, on top of the 4-bit values.

    PEFT 0.21 loses deltas there: registering one reads the parameter, which torch's cache of parametrizations keeps
    without it, and afterwards it does not find the delta to take it off (tuners/lora/layer.py, ParamWrapper).
    """
    adapters = [adapter for adapter in active_adapters if adapter in wrapper.lora_A]
    chain: Any = wrapper.get_base_layer().parametrizations[wrapper.parameter_name]  # type: ignore[index]
    for adapter in adapters:
        chain.append(_LoraFactorsProxy(*wrapper.get_delta_factors(adapter)))
    try:
        with parametrize.cached():
            yield
    finally:
        for _ in adapters:
            del chain[-1]


class ExpertsConfig(BitsAndBytesConfig):
    """bitsandbytes' settings, and which parameters are experts."""

    def __init__(self, experts: Mapping[str, Sequence[Piece | str]], **settings: Any) -> None:
        super().__init__(**settings)
        self.quant_method: Any = METHOD
        self.experts = experts


class _QuantizeExperts(ConversionOps):
    """One loaded parameter becomes packed bytes; what else it needs waits at the quantiser."""

    def __init__(self, quantizer: Any) -> None:
        self.hf_quantizer = quantizer
        self.linears = Bnb4BitHfQuantizer.get_quantize_ops(quantizer)

    def convert(self, input_dict: dict[str, Any], *args: Any, model: Any = None, **kwargs: Any) -> dict[str, Any]:
        settings = self.hf_quantizer.quantization_config
        result: dict[str, torch.Tensor] = {}
        for path, given in input_dict.items():
            values = given[0] if isinstance(given, list) else given
            if path not in settings.experts:
                result |= self.linears.convert({path: values}, *args, model=model, **kwargs)
                continue
            parts = settings.experts[path]
            tensors = [values if isinstance(part, str) else values[part.expert, part.rows] for part in parts]
            done = [
                bnb.quantize_4bit(
                    tensor.to(settings.bnb_4bit_compute_dtype).contiguous(), blocksize=BLOCK, compress_statistics=True,
                    quant_type=settings.bnb_4bit_quant_type,
                )
                for tensor in tensors
            ]  # fmt: skip
            names = [part if isinstance(part, str) else part.name for part in parts]
            self.hf_quantizer.found[path] = ExpertsIn4Bit([state for _, state in done], values.shape, names)
            get_module_from_name(model, path)[0]._is_hf_initialized = True
            result[path] = torch.cat([packed.flatten() for packed, _ in done])[:, None]
        return result


@register_quantizer(METHOD)
class ExpertsQuantizer(Bnb4BitHfQuantizer):
    """transformers' quantiser for bitsandbytes, which takes the experts, too, tensor by tensor as they are read."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.found: dict[str, ExpertsIn4Bit] = {}

    def param_needs_quantization(self, model: Any, param_name: str, **kwargs: Any) -> bool:
        settings: Any = self.quantization_config
        return param_name in settings.experts or super().param_needs_quantization(model, param_name)

    def get_quantize_ops(self) -> ConversionOps:
        return _QuantizeExperts(self)

    def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        # In the model's order, not the files': it is the order in which PEFT wraps them.
        for path in [path for path, _ in model.named_parameters() if path in self.found]:
            values = self.found[path]
            module, name = get_module_from_name(model, path)
            parametrize.register_parametrization(module, name, values, unsafe=True)
        return super()._process_model_after_weight_loading(model, **kwargs)
