"""Keep a base that was quantised to 4 bits: a loaded model in, its entry in the cache out, whole or not at all."""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Iterator
from contextlib import suppress
from hashlib import sha256
from pathlib import Path

import torch
from bitsandbytes.nn.modules import Params4bit
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch.nn.utils.parametrize import ParametrizationList
from transformers import PreTrainedModel

from finetune.machine import launched_rank
from finetune.model.experts import ExpertsIn4Bit
from finetune.model.quantised_cache import Entry, Ingredients, digest_of, tell

SHARD_BYTES = 1 << 30
LEFT_FREE = 4  # times the entry: as much as a merged release of it takes
LITTER_SECONDS = 24 * 3600
EXPERT_PARTS = ("scales", "scales_of_scales", "offsets", "code", "scales_code")


def write_entry(entry: Entry, model: PreTrainedModel) -> None:
    """Write an entry if there is room; whatever the disk says, the model is loaded and the command goes on."""
    if launched_rank()[0] != 0 or entry.folder.exists():
        return
    _sweep(entry.folder.parent)
    staging = entry.folder.with_name(f"{entry.folder.name}.{os.getpid()}.partial")
    try:
        staging.mkdir(parents=True)
        needed = sum({id(tensor): _bytes(tensor) for _, tensor, _ in _held(model)}.values())
        free = shutil.disk_usage(staging).free
        if free < (1 + LEFT_FREE) * needed:
            message = f"{needed / 1e9:.2f} GB, and {LEFT_FREE} times as much for a release, of {free / 1e9:.2f} GB free"
            tell(f"{entry.base}: not kept in 4 bits for the next start, for want of room ({message})")
            return
        size = _write(staging, entry.ingredients, model)
        staging.rename(entry.folder)
        _sync(entry.folder.parent)
        tell(f"{entry.base}: kept in 4 bits for the next start, {size / 1e9:.2f} GB in {entry.folder}")
    except (OSError, SafetensorError) as error:
        if not entry.folder.exists():  # else another process was faster
            tell(f"{entry.base}: not kept in 4 bits for the next start ({error})")
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def _write(folder: Path, ingredients: Ingredients, model: PreTrainedModel) -> int:
    """All tensors in shards, and last the sealed list of them; the bytes of the shards."""
    tensors: dict[str, tuple[str, str]] = {}
    parts: dict[str, list[str]] = {}
    same: dict[str, str] = {}
    first: dict[int, str] = {}
    shard: dict[str, torch.Tensor] = {}

    def close() -> None:
        file = f"weights-{len(list(folder.iterdir())):05d}.safetensors"
        save_file(shard, folder / file)
        _sync(folder / file)
        tensors.update({name: (file, digest_of(tensor)) for name, tensor in shard.items()})
        shard.clear()

    for path, tensor, module in _held(model):
        if (known := first.setdefault(id(tensor), path)) != path:
            same[path] = known
            continue
        found = _parts(path, tensor, module)
        parts[path] = [name.removeprefix(f"{path}.") for name in found if name != path]
        shard.update({name: part.detach().cpu().contiguous() for name, part in found.items()})
        if sum(map(_bytes, shard.values())) >= SHARD_BYTES:
            close()
    close()
    files = {file.name: file.stat().st_size for file in folder.iterdir()}
    facts = {"ingredients": ingredients, "files": files, "tensors": tensors, "parts": parts, "same": same}
    body = json.dumps(facts)
    (folder / "manifest.json").write_text(f"{sha256(body.encode()).hexdigest()}\n{body}", encoding="utf-8")
    _sync(folder / "manifest.json")
    _sync(folder)
    return sum(files.values())


def _held(model: PreTrainedModel) -> Iterator[tuple[str, torch.Tensor, torch.nn.Module]]:
    """Everything that comes from a base's files: the parameter's path, its tensor and the module it lies in."""
    for prefix, module in model.named_modules():
        for name, tensor in [*module._parameters.items(), *module._buffers.items()]:
            if tensor is None or name in module._non_persistent_buffers_set:
                continue
            if isinstance(module, ParametrizationList):
                yield prefix.replace(".parametrizations.", "."), tensor, module
            else:
                yield f"{prefix}.{name}" if prefix else name, tensor, module


def _parts(path: str, tensor: torch.Tensor, module: torch.nn.Module) -> dict[str, torch.Tensor]:
    """What is stored of a parameter: itself, and beside 4-bit values what dequantises them."""
    if isinstance(tensor, Params4bit):
        beside = tensor.quant_state.as_dict(packed=True)
    elif isinstance(module, ParametrizationList) and isinstance(experts := module[0], ExpertsIn4Bit):
        beside = {name: getattr(experts, name) for name in EXPERT_PARTS}
    else:
        beside = {}
    # Copied where they are small: bitsandbytes lets all weights share one table of values, a file must not.
    return {path: tensor.data, **{f"{path}.{name}": part.clone() for name, part in beside.items()}}


def _bytes(tensor: torch.Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _sweep(root: Path) -> None:
    """Remove what a killed process left behind more than a day ago."""
    for folder in root.glob("*.partial"):
        with suppress(OSError):
            if time.time() - folder.stat().st_mtime > LITTER_SECONDS:
                shutil.rmtree(folder, ignore_errors=True)
