"""A base that was quantised to 4 bits, kept on disk: what makes its values in; a sealed folder of safetensors out.

An entry goes by everything that makes its values: the content of the base, the settings, the versions that computed.
Each tensor has its sha256, taken of the bytes in memory: what is used is what was checked.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from hashlib import sha256
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from transformers import BitsAndBytesConfig

from finetune.base import read_tensor_entries, sha256_of, weight_files
from finetune.machine import cache_folder, keeps_4bit, launched_rank
from finetune.model.experts import BLOCK, FOUR_BITS, SCALES_BLOCK, ExpertsConfig
from finetune.plan import ModelPlan
from finetune.weight_hashes import weight_sha256

LAYOUT = 1  # another one where what is written, or what its parts mean, changes
SMALLEST_BYTES = 1 << 28  # of the stored weights; what is smaller is quantised in seconds
LIBRARIES = ("bitsandbytes", "safetensors", "torch", "transformers")
Ingredients = Mapping[str, Any]


class Damaged(BaseException):
    """An entry is not what was written; no `except Exception` on the way through transformers holds it up."""


@dataclass(frozen=True)
class Entry:
    """One base, quantised in one way: where it lies, or would."""

    base: str  # as the recipe writes it
    folder: Path
    ingredients: Ingredients
    stored_bytes: int  # of the base


@dataclass(frozen=True)
class Kept:
    """An entry that is there: what it holds."""

    folder: Path
    tensors: Mapping[str, tuple[str, str]]  # name -> file, sha256
    parts: Mapping[str, tuple[str, ...]]  # parameter -> what is stored of it beside its own name
    same: Mapping[str, str]  # parameter -> the one it is tied to
    bytes: int

    def read(self, name: str) -> torch.Tensor:
        """A tensor on the CPU, in memory of its own.

        Raises:
            Damaged: it is not there, or not as it was written.
        """
        try:
            file, digest = self.tensors[name]
            tensor: torch.Tensor = self._opened[file].get_tensor(name)
        except (KeyError, OSError, SafetensorError) as error:
            raise Damaged(f"{name} cannot be read ({error})") from error
        if digest_of(tensor) != digest:
            raise Damaged(f"{name} is not what was written")
        return tensor

    @cached_property
    def _opened(self) -> dict[str, Any]:
        files = sorted({file for file, _ in self.tensors.values()})
        return {file: safe_open(str(self.folder / file), "pt", device="cpu", backend="pread") for file in files}


def find_entry(plan: ModelPlan, settings: BitsAndBytesConfig) -> Entry | None:
    """Where the base lies in 4 bits, or would; None for one that is not kept."""
    stored_bytes = sum(entry.bytes for entry in read_tensor_entries(plan.folder))
    if plan.quantization not in FOUR_BITS or stored_bytes < SMALLEST_BYTES or not keeps_4bit():
        return None
    ingredients = _ingredients(plan, settings)
    name = sha256(json.dumps(ingredients, sort_keys=True).encode()).hexdigest()[:40]
    return Entry(plan.base, cache_folder() / "4bit" / name, ingredients, stored_bytes)


def _ingredients(plan: ModelPlan, settings: BitsAndBytesConfig) -> dict[str, Any]:
    """Everything that changes a bit of the loaded model."""
    experts = settings.experts if isinstance(settings, ExpertsConfig) else {}
    parts = [[path, [str(part) for part in found]] for path, found in sorted(experts.items())]
    return {
        "layout": LAYOUT,
        "base": weight_sha256(weight_files(plan.folder)),
        "config": sha256_of(plan.folder / "config.json"),
        "quantization": plan.quantization,
        "dtype": plan.dtype,
        "blocks": [BLOCK, SCALES_BLOCK],
        "skipped": settings.llm_int8_skip_modules,
        "experts": sha256(json.dumps(parts).encode()).hexdigest(),
        "versions": {name: version(name) for name in LIBRARIES},
        "computed_by": _computed_by(plan.device),
    }


def _computed_by(device: str) -> list[str | int]:
    """The mean of a tensor's scales is a sum, added up in an order of the threads and vectors that are there."""
    if device == "cpu":
        return ["cpu", torch.get_num_threads(), torch.backends.cpu.get_cpu_capability()]
    return [torch.cuda.get_device_name(device)]


def open_kept(entry: Entry) -> Kept | None:
    """What an entry holds; None if it is not there.

    Raises:
        Damaged: its list is not what was written, or a file has another size.
    """
    if not entry.folder.is_dir():
        return None
    try:
        seal, _, body = (entry.folder / "manifest.json").read_text(encoding="utf-8").partition("\n")
        if sha256(body.encode()).hexdigest() != seal:
            raise Damaged("manifest.json is not what was written")
        facts = json.loads(body)
        if facts["ingredients"] != entry.ingredients:
            raise Damaged("it was made of something else")
        for file, size in facts["files"].items():
            if (entry.folder / file).stat().st_size != size:
                raise Damaged(f"{file} has another size")
    except (OSError, ValueError, KeyError) as error:
        raise Damaged(f"it cannot be read ({error})") from error
    return Kept(
        folder=entry.folder,
        tensors={name: (file, digest) for name, (file, digest) in facts["tensors"].items()},
        parts={path: tuple(found) for path, found in facts["parts"].items()},
        same=facts["same"],
        bytes=sum(facts["files"].values()),
    )


def discard(entry: Entry, damage: Damaged) -> None:
    """Put away what is damaged and say so."""
    tell(f"{entry.folder}: {damage}; it is made again from the base")
    aside = entry.folder.with_name(f"{entry.folder.name}.{os.getpid()}.partial")
    with suppress(OSError):  # another process may be doing the same
        entry.folder.rename(aside)
    shutil.rmtree(aside, ignore_errors=True)


def tell(line: str) -> None:
    if launched_rank()[0] == 0:
        sys.stderr.write(f"{line}\n")


def digest_of(tensor: torch.Tensor) -> str:
    digest = sha256(f"{tensor.dtype} {tuple(tensor.shape)}\n".encode())
    digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()
