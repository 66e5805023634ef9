"""Load a base one tensor at a time: its folder in, a transformers model out, never more of a file in memory than one
tensor.

transformers maps the files of a base, and every page that was read stays in the memory of the process until the last
file is closed (modeling_utils.py, _load_pretrained_model): all of a base in 16 bits, while it becomes 4.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, GenerationConfig, PreTrainedConfig, PreTrainedModel

from finetune.base import read_tensor_entries, weight_files
from finetune.machine import return_freed_memory

BYTES_BETWEEN = 1 << 28


class StoredTensor:
    """What transformers takes for a tensor of a file; it is read when asked for, and into memory of its own."""

    def __init__(self, files: _OpenFiles, file: Path, name: str) -> None:
        self._files, self._file, self._name = files, file, name

    def __getitem__(self, _everything: Any) -> torch.Tensor:
        return self._files.read(self._file, self._name)


class _OpenFiles:
    """The files of a base. Between the packed weights, which stay, what quantising them took leaves holes, which C's
    allocator keeps: half of what a model takes if nobody gives them back on the way."""

    def __init__(self, files: Sequence[Path]) -> None:
        self._opened = {file: safe_open(str(file), "pt", device="cpu", backend="pread") for file in files}
        self._bytes = 0  # since memory was given back

    def names(self, file: Path) -> list[str]:
        return list(self._opened[file].keys())

    def read(self, file: Path, name: str) -> torch.Tensor:
        # Not a slice: safetensors 0.8 holds one twice while it is read.
        tensor: torch.Tensor = self._opened[file].get_tensor(name)
        self._bytes += tensor.numel() * tensor.element_size()
        if self._bytes > BYTES_BETWEEN:
            self._bytes = 0
            return_freed_memory()
        return tensor


class UnreadTensor:
    """What stands for a tensor of a file where nobody needs its values: a shape, on the meta device."""

    def __init__(self, shape: tuple[int, ...]) -> None:
        self._shape = shape

    def __getitem__(self, _everything: Any) -> UnreadTensor:
        return self

    def to(self, device: Any = None, dtype: torch.dtype | None = None) -> torch.Tensor:  # noqa: ARG002 - as torch has it
        return torch.empty(self._shape, dtype=dtype, device="meta")


def stored_tensors(folder: Path) -> dict[str, StoredTensor]:
    """Every tensor of a base by its stored name; its files stay open as long as one of these is there."""
    files = weight_files(folder)
    opened = _OpenFiles(files)
    return {name: StoredTensor(opened, file, name) for file in files for name in opened.names(file)}


def unread_tensors(folder: Path) -> dict[str, UnreadTensor]:
    return {entry.name: UnreadTensor(entry.shape) for entry in read_tensor_entries(folder)}


def can_stream(config: PreTrainedConfig, *, trusted: bool) -> bool:
    """Whether the model's class is transformers' own and its weights are not quantised already."""
    return not trusted and getattr(config, "quantization_config", None) is None and _kind(config) is not None


def load_streamed(
    folder: Path,
    config: PreTrainedConfig,
    settings: BitsAndBytesConfig,
    tensors: Mapping[str, StoredTensor] | Mapping[str, UnreadTensor],
    **options: Any,
) -> PreTrainedModel:
    """What AutoModelForCausalLM.from_pretrained makes of the folder, from these tensors."""
    kind = _kind(config)
    assert kind is not None
    if kind.config_class is config.sub_configs.get("text_config"):
        config = config.get_text_config()  # the text part of a model of text and images, as from_pretrained does
    model: PreTrainedModel = kind.from_pretrained(
        None, config=config, state_dict=dict(tensors), quantization_config=settings, **options
    )
    model.config.name_or_path = model.name_or_path = str(folder)
    model.generation_config = _generation_config(folder)
    return model


def _kind(config: PreTrainedConfig) -> Any:
    """The model's class; None where the config alone does not say."""
    found = AutoModelForCausalLM._model_mapping.get(type(config), None)
    return found if isinstance(found, type) else None


def _generation_config(folder: Path) -> GenerationConfig:
    """As transformers finds it (generation/utils.py, adjust_generation_fn)."""
    try:
        return GenerationConfig.from_pretrained(str(folder))
    except OSError:
        return GenerationConfig.from_pretrained(str(folder), config_file_name="config.json", _from_model_config=True)
