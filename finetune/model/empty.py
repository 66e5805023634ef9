"""A model without its weights, which come and go piece by piece: a base folder in, modules on the meta device out."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from safetensors import SafetensorError
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel
from transformers.initialization import no_init_weights

from finetune.errors import Problem, StorageError, UserError
from finetune.model.attention import DOCUMENTS, register_attention
from finetune.trust import is_trusted


def empty_model(folder: Path, *, dtype: torch.dtype, attention: str | None = None) -> PreTrainedModel:
    """The model of a folder in evaluation mode: parameters have shape and dtype only, computed buffers are real.

    Raises:
        UserError: transformers does not know the folder's config.
    """
    register_attention()
    trusted = is_trusted(folder)
    try:
        config = AutoConfig.from_pretrained(str(folder), trust_remote_code=trusted)
        kind: Any = AutoModelForCausalLM._model_mapping.get(type(config), None)
        chosen = {"attn_implementation": attention} if attention == DOCUMENTS else {}
        with init_empty_weights(include_buffers=False), no_init_weights():
            if kind is not None and kind.config_class is config.sub_configs.get("text_config"):
                # The text part of a model of text and images, as from_pretrained does.
                model = kind._from_config(config.get_text_config(), dtype=dtype, **chosen)
            else:
                model = AutoModelForCausalLM.from_config(config, dtype=dtype, trust_remote_code=trusted, **chosen)
    except (OSError, ValueError, KeyError) as error:
        first_line = (str(error).splitlines() or [""])[0]
        raise UserError(Problem(str(folder), f"transformers cannot build this model: {first_line}")) from error
    return model.eval().requires_grad_(False)


def attach_saved_adapter(model: PreTrainedModel, folder: Path, *, device: str) -> PeftModel:
    """The empty model with a saved adapter whose own weights are real; the base's modules stay the objects they were.

    Raises:
        StorageError: the adapter's file is damaged, or lacks a weight of the adapter.
    """
    places = [
        (module, name, found)
        for module in model.modules()
        for name, found in module._parameters.items()
        if found is not None
    ]
    for module, name, found in places:
        # PEFT puts an adapter where the base's weights are; these are somewhere, and one number large.
        module._parameters[name] = torch.nn.Parameter(torch.zeros(()).to(device).expand(found.shape), False)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # of weights that are missing, which is an error below
            warnings.filterwarnings("ignore", message="The following (rank|alpha)_pattern keys")  # it follows them
            tuned = PeftModel.from_pretrained(model, str(folder), is_trainable=False, low_cpu_mem_usage=True)
    except (SafetensorError, OSError, RuntimeError, KeyError, ValueError) as error:
        first_line = (str(error).splitlines() or [""])[0]
        raise StorageError(
            Problem(str(folder), f"the adapter cannot be loaded: {first_line}; train it again")
        ) from error
    for module, name, found in places:
        module._parameters[name] = found
    of_base = {id(found) for _, _, found in places}
    empty = [name for name, found in tuned.named_parameters() if found.is_meta and id(found) not in of_base]
    if empty:
        raise StorageError(Problem(str(folder), f"holds no {empty[0]}; the adapter is incomplete, train it again"))
    return tuned.eval().requires_grad_(False)


@contextmanager
def adapter_switched_off(modules: Iterable[torch.nn.Module]) -> Iterator[None]:
    """These modules compute without their adapter for a while.

    PEFT's disable_adapter asks every module of the model several times, which with a hundred layers takes longer than
    one of them computes.
    """
    adapted: list[Any] = [found for found in modules if isinstance(found, (BaseTunerLayer, AuxiliaryTrainingWrapper))]
    for module in adapted:
        module.enable_adapters(False)
    try:
        yield
    finally:
        for module in adapted:
            module.enable_adapters(True)
