"""A model in 4 bits as data: a model folder in; which weights become codes, and config.json's word for it, out."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from finetune.artifact import read_json
from finetune.base import TensorEntry, read_tensor_entries
from finetune.errors import Problem, UserError, raise_problems
from finetune.release.delta import DTYPES
from finetune.release.int4 import GROUP

VERSION = "0.20.0"  # of compressed-tensors, whose form this is
EXPERT = re.compile(r"\.experts\.\d+\.")
ROUTERS = {"gate", "router", "shared_expert_gate"}  # vLLM computes them in 16 bits
SCHEME = {
    "num_bits": 4,
    "type": "int",
    "symmetric": True,
    "strategy": "group",
    "group_size": GROUP,
    "dynamic": False,
    "actorder": None,
    "observer": "memoryless_minmax",
}


@dataclass(frozen=True)
class Layout:
    """What becomes of every stored tensor."""

    entries: Sequence[TensorEntry]
    packed: frozenset[str]  # weights that become codes
    ignore: Sequence[str]  # linear modules that stay in 16 bits
    notes: Sequence[str]

    def bytes_of(self, entry: TensorEntry) -> int:
        """What the tensor takes in the compressed model: codes, scales and two sizes, or as it is."""
        if entry.name not in self.packed:
            return entry.bytes
        return entry.elements // 2 + entry.bytes // GROUP + 16


def read_layout(folder: Path) -> Layout:
    """Which weights become codes, and which modules stay as they are.

    Raises:
        UserError: a model that this form cannot hold; all problems at once.
    """
    if read_json(folder / "config.json").get("quantization_config"):
        cure = "name the run, or a release in 16 bits"
        raise UserError(Problem(f"{folder / 'config.json'}: quantization_config", f"is quantised already; {cure}"))
    entries = list(read_tensor_entries(folder))
    stored = {entry.name: entry for entry in entries}
    linears = _linear_modules(folder)
    inside = [name for name in linears if ".layers." in name and name.rsplit(".", 1)[-1] not in ROUTERS]
    unstored = [name for name in inside if f"{name}.weight" not in stored]
    problems = _problem(unstored, "linear modules have no stored weight of their name: not a text model")
    experts = [entry for entry in entries if EXPERT.search(entry.name) and len(entry.shape) == 2]
    problems += _odd_experts(entries, experts)
    candidates = [stored[f"{name}.weight"] for name in inside if f"{name}.weight" in stored]
    packed = [entry for entry in candidates if entry.shape[1] % GROUP == 0] + experts
    odd = [f"{entry.name} ({entry.dtype})" for entry in packed if entry.dtype not in DTYPES]
    problems += _problem(odd, "weights are not stored in F32, F16 or BF16")
    narrow = [entry for entry in candidates if entry.shape[1] % GROUP]
    if not packed and not problems:
        widths = ", ".join(f"{leaf} ({width})" for leaf, width in _widths(narrow)) or "there are no linear modules"
        problems.append(Problem(str(folder), f"no module's rows are a multiple of {GROUP}: {widths}; export gguf"))
    raise_problems(problems)
    names = frozenset(entry.name for entry in packed)
    routers = {f"{entry.name.partition('.experts.')[0]}.gate" for entry in experts}
    ignore = sorted({name for name in linears if f"{name}.weight" not in names} | routers)
    return Layout(entries, names, ignore, _notes(narrow))


def quantization_config(layout: Layout) -> dict[str, Any]:
    """config.json's entry, as compressed-tensors, transformers and vLLM read it."""
    group = {"targets": ["Linear"], "weights": SCHEME, "format": "pack-quantized"}
    return {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "quantization_status": "compressed",
        "version": VERSION,
        "config_groups": {"group_0": group | {"input_activations": None, "output_activations": None}},
        "ignore": list(layout.ignore),
        "kv_cache_scheme": None,
        "global_compression_ratio": None,
    }


def _linear_modules(folder: Path) -> list[str]:
    from finetune.model.empty import empty_model

    model = empty_model(folder, dtype=torch.float32)
    return [name for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)]


def _odd_experts(entries: Sequence[TensorEntry], experts: Sequence[TensorEntry]) -> list[Problem]:
    """Experts that vLLM could not read: all of a layer in one tensor, or rows that groups do not fill."""
    fused = [entry.name for entry in entries if ".experts." in entry.name and len(entry.shape) == 3]
    narrow = [f"{leaf} ({width})" for leaf, width in _widths([e for e in experts if e.shape[1] % GROUP])]
    problems = _problem(fused, "tensors hold all experts of a layer: vLLM reads 4-bit experts one by one")
    return problems + _problem(narrow, f"modules of experts have rows that are no multiple of {GROUP}")


def _problem(names: Sequence[str], what: str) -> list[Problem]:
    """One problem for all of a kind, or none."""
    return [Problem(names[0], f"{len(names)} {what}, this one first; export gguf or safetensors")] if names else []


def _widths(entries: Sequence[TensorEntry]) -> list[tuple[str, int]]:
    """Module name and row length of each, once."""
    return sorted({(entry.name.split(".")[-2], entry.shape[1]) for entry in entries})


def _notes(narrow: Sequence[TensorEntry]) -> list[str]:
    notes = ["weights are rounded to nearest, without calibration"]
    if narrow:
        widths = ", ".join(f"{leaf} ({width})" for leaf, width in _widths(narrow))
        notes.append(f"{len(narrow)} modules stay in 16 bits, as their rows are no multiple of {GROUP}: {widths}")
    return notes
