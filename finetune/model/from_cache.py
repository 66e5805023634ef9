"""Take a base's 4-bit weights from the cache: transformers loads the model as ever, only the values come from there."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from bitsandbytes.functional import QuantState
from bitsandbytes.nn.modules import Params4bit
from transformers import BitsAndBytesConfig, PreTrainedConfig, PreTrainedModel
from transformers.core_model_loading import ConversionOps
from transformers.quantizers.auto import AutoHfQuantizer, register_quantizer
from transformers.quantizers.quantizers_utils import get_module_from_name

from finetune.model.experts import BLOCK, SCALES_BLOCK, ExpertsConfig, ExpertsIn4Bit, ExpertsQuantizer
from finetune.model.quantised_cache import Kept
from finetune.model.streamed import load_streamed, unread_tensors

METHOD = "bitsandbytes_from_cache"


def load_kept(
    folder: Path, config: PreTrainedConfig, settings: BitsAndBytesConfig, kept: Kept, **options: Any
) -> PreTrainedModel:
    """What loading the base with these settings gives, bit by bit; of the base's own files only headers are read.

    Raises:
        Damaged: the entry is not what was written.
    """
    (device,) = options["device_map"].values()
    model = load_streamed(folder, config, KeptConfig(settings, kept, device), unread_tensors(folder), **options)
    # From here on nothing tells where the values came from.
    taken: Any = model.hf_quantizer
    usual: Any = AutoHfQuantizer.from_config(settings, pre_quantized=False)
    usual.modules_to_not_convert = taken.modules_to_not_convert
    if isinstance(usual, ExpertsQuantizer):
        usual.found = taken.found
    model.hf_quantizer = usual
    return model


class KeptConfig(BitsAndBytesConfig):
    """bitsandbytes' settings, and where their result lies."""

    def __init__(self, settings: BitsAndBytesConfig, kept: Kept, device: str) -> None:
        super().__init__(**settings.to_dict())
        self.quant_method: Any = METHOD
        self.settings, self.kept, self.device = settings, kept, device


class _TakeKept(ConversionOps):
    """In the place of quantising a loaded parameter: what the entry holds of it."""

    def __init__(self, quantizer: KeptQuantizer) -> None:
        self.quantizer = quantizer

    def convert(self, input_dict: dict[str, Any], *args: Any, model: Any = None, **kwargs: Any) -> dict[str, Any]:  # noqa: ARG002
        shapes = {path: (given[0] if isinstance(given, list) else given).shape for path, given in input_dict.items()}
        return {path: self.quantizer.take(path, model, shape) for path, shape in shapes.items()}


@register_quantizer(METHOD)
class KeptQuantizer(ExpertsQuantizer):
    """transformers' quantiser for bitsandbytes, to which every parameter is one to be quantised."""

    def __init__(self, config: KeptConfig, **kwargs: Any) -> None:
        super().__init__(config.settings, **kwargs)
        self.kept, self.device = config.kept, config.device

    def param_needs_quantization(self, model: Any, param_name: str, **kwargs: Any) -> bool:  # noqa: ARG002
        return True

    def get_quantize_ops(self) -> ConversionOps:
        return _TakeKept(self)

    def take(self, path: str, model: Any, shape: torch.Size) -> torch.Tensor:
        """The parameter as quantising gives it, on its device.

        Raises:
            Damaged: the entry does not hold it as it was written.
        """
        path_kept = self.kept.same.get(path, path)
        tensor = self.kept.read(path_kept).to(self.device)
        beside = {name: self.kept.read(f"{path_kept}.{name}") for name in self.kept.parts.get(path_kept, ())}
        module, _ = get_module_from_name(model, path)
        settings = self.quantization_config
        if isinstance(settings, ExpertsConfig) and path in settings.experts:
            self.found[path] = self._experts(path, {name: part.to(self.device) for name, part in beside.items()}, shape)
        elif beside:
            tensor = Params4bit.from_prequantized(
                tensor, quantized_stats=beside, requires_grad=False, device=self.device, module=module
            )
        else:
            return tensor
        module._is_hf_initialized = True
        return tensor

    def _experts(self, path: str, parts: dict[str, torch.Tensor], shape: torch.Size) -> ExpertsIn4Bit:
        settings: Any = self.quantization_config
        states = [
            QuantState(
                absmax=scales,
                code=parts["code"],
                blocksize=BLOCK,
                quant_type=settings.bnb_4bit_quant_type,
                dtype=settings.bnb_4bit_compute_dtype,
                offset=offset,
                state2=QuantState(absmax=of_scales, code=parts["scales_code"], blocksize=SCALES_BLOCK),
            )
            for scales, of_scales, offset in zip(
                parts["scales"], parts["scales_of_scales"], parts["offsets"], strict=True
            )
        ]
        names = [part if isinstance(part, str) else part.name for part in settings.experts[path]]
        return ExpertsIn4Bit(states, shape, names)
