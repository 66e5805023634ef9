"""A model's weights part by part: a folder and the model's modules in, the parameters of one layer out.

Stored tensors are renamed, and those that lie one by one in the files and together in the model (experts) are put
together, by transformers' own loader.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from copy import deepcopy
from pathlib import Path
from typing import Any

import torch
import transformers.utils.logging
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    WeightConverter,
    WeightRenaming,
    convert_and_load_state_dict_in_model,
    rename_source_key,
)
from transformers.modeling_utils import LoadStateDictConfig

from finetune.base import TensorEntry
from finetune.errors import Problem, StorageError

Read = Callable[[Sequence[TensorEntry]], Iterable[tuple[TensorEntry, torch.Tensor]]]
Part = tuple[str, int]  # what is in memory together
LAYER, EMBEDDING, HEAD, REST = "layer", "embedding", "head", "rest"


def layer_part(number: int) -> Part:
    """The part that is one decoder layer."""
    return (LAYER, number)


class ModelParts:
    """Where the parameters of a model's parts are stored, and their values when they are asked for."""

    def __init__(
        self,
        folder: Path,
        stored: Sequence[TensorEntry],
        model: PreTrainedModel,
        *,
        read: Read,
        device: str,
    ) -> None:
        transformers.utils.logging.disable_progress_bar()
        self.folder, self.read = folder, read
        self.keeps = False  # whether a part stays in memory once it was loaded
        self.kept: dict[Part, dict[str, torch.Tensor]] = {}
        self.loader = deepcopy(model)  # what is read becomes parameters here
        self.empty = self.loader.state_dict(keep_vars=True)
        mapping: list[Any] = get_model_conversion_mapping(self.loader)
        self.load_config = LoadStateDictConfig(
            device_map={"": device},
            dtype=model.dtype,
            dtype_plan=self.loader._get_dtype_plan(model.dtype),
            weight_mapping=mapping,
        )
        target_of = self._targets(stored, mapping)
        self.stored_as = self._stored_as(set(target_of.values()))
        self.keys: dict[Part, list[str]] = {(EMBEDDING, 0): [], (HEAD, 0): [], (REST, 0): []}
        self.layers = _decoder_layers(model)
        part_of = _part_of(model, self.layers)
        for key in self.empty:
            self.keys.setdefault(part_of(key), []).append(key)
        self.entries: dict[str, list[TensorEntry]] = {}
        for entry in stored:
            self.entries.setdefault(target_of[entry.name], []).append(entry)

    @property
    def but_rest(self) -> list[Part]:
        """All parts that are not in memory all the time."""
        return [part for part in self.keys if part != (REST, 0)]

    def load(self, part: Part) -> dict[str, torch.Tensor]:
        """The values of a part's parameters and stored buffers, by their path in the model.

        Raises:
            StorageError: the files lack one of them, or hold it in another shape.
        """
        if part in self.kept:
            return self.kept[part]
        wanted = {key: self.stored_as.get(key, key) for key in self.keys[part]}
        entries = [entry for stored in wanted.values() for entry in self.entries.get(stored, ())]
        tensors = {entry.name: tensor for entry, tensor in self.read(entries)}
        convert_and_load_state_dict_in_model(self.loader, tensors, self.load_config)
        del tensors
        values = {
            key: self.loader.get_parameter_or_buffer(stored).requires_grad_(False) for key, stored in wanted.items()
        }
        for stored in wanted.values():
            self._forget(stored)
        missing = [key for key, value in values.items() if value.is_meta]
        if missing:
            message = f"its weight files hold no usable {missing[0]}; they are not those of its config.json"
            raise StorageError(Problem(str(self.folder), message))
        if self.keeps:
            self.kept[part] = values
        return values

    def _forget(self, key: str) -> None:
        path, _, name = key.rpartition(".")
        module = self.loader.get_submodule(path)
        if name in module._parameters:
            module._parameters[name] = self.empty[key]

    def _targets(self, stored: Sequence[TensorEntry], mapping: Sequence[object]) -> dict[str, str]:
        """The parameter that each stored tensor becomes, or a part of; the first of several."""
        renamings = [change for change in mapping if isinstance(change, WeightRenaming)]
        converters = [change for change in mapping if isinstance(change, WeightConverter)]
        prefix = self.loader.base_model_prefix
        targets = {}
        for entry in stored:
            name, _ = rename_source_key(entry.name, renamings, converters, prefix, self.empty)
            targets[entry.name] = entry.name if name not in self.empty and entry.name in self.empty else name
        return targets

    def _stored_as(self, stored: set[str]) -> dict[str, str]:
        """Under which name a tied parameter is stored that is not stored under its own."""
        pairs = self.loader.all_tied_weights_keys.items()
        return {
            missing: there
            for pair in pairs
            for missing, there in (pair, pair[::-1])
            if missing not in stored and there in stored
        }


def _part_of(model: PreTrainedModel, layers: torch.nn.ModuleList) -> Callable[[str], Part]:
    paths = {id(module): path for path, module in model.named_modules()}
    embedding, head = paths[id(model.get_input_embeddings())], paths.get(id(model.get_output_embeddings()))
    prefix = paths.get(id(layers), "")

    def part_of(key: str) -> Part:
        path = key.rpartition(".")[0]
        if prefix and key.startswith(f"{prefix}."):
            return layer_part(int(key[len(prefix) + 1 :].split(".", 1)[0]))
        return (EMBEDDING, 0) if path == embedding else (HEAD, 0) if path == head else (REST, 0)

    return part_of


def _decoder_layers(model: PreTrainedModel) -> torch.nn.ModuleList:
    """The list of the decoder's layers; empty where it has none of the length that the config says."""
    count = model.config.get_text_config().num_hidden_layers
    lists = [module for module in model.get_decoder().modules() if isinstance(module, torch.nn.ModuleList)]
    return next((found for found in lists if len(found) == count), torch.nn.ModuleList())
