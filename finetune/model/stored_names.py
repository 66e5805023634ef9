"""Where a model's parameters lie in its files: a base folder in, stored names of renamed and fused parameters out."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import Concatenate, MergeModulelist, WeightConverter, rename_source_key

from finetune.base import TensorEntry
from finetune.errors import Problem, UserError
from finetune.model.empty import empty_model

EXPERT = re.compile(r"\.experts\.(\d+)\.")


@dataclass(frozen=True)
class Piece:
    """A stored tensor that is a part of a fused parameter [experts, rows, columns]: some rows of one expert."""

    name: str
    expert: int
    rows: slice


@dataclass(frozen=True)
class StoredNames:
    """Stored names by parameter: `renamed` one to one, `fused` in pieces; `parameters` by module in their order."""

    renamed: Mapping[str, str]
    fused: Mapping[str, Sequence[Piece]]
    parameters: Mapping[str, Sequence[str]]
    transposed: frozenset[str]  # modules whose parameters are stored [experts, in, out]


def read_stored_names(base_folder: Path, entries: Sequence[TensorEntry]) -> StoredNames:
    """The names as transformers' own loader translates them (core_model_loading.py, conversion_mapping.py).

    Raises:
        UserError: the folder's config is not known to transformers.
    """
    model: Any = empty_model(base_folder, dtype=torch.float32)
    conversions = get_model_conversion_mapping(model)
    converters = [found for found in conversions if isinstance(found, WeightConverter)]
    renamings: list[Any] = [found for found in conversions if not isinstance(found, WeightConverter)]
    by_pattern = {pattern: found for found in converters for pattern in found.source_patterns}
    here, prefix = model.state_dict(), model.base_model_prefix
    renamed: dict[str, str] = {}
    parts: dict[str, list[tuple[TensorEntry, str]]] = {}
    for entry in entries:
        name, pattern = rename_source_key(entry.name, renamings, converters, prefix, here)
        if pattern is None:
            renamed[name] = entry.name
        else:
            parts.setdefault(name, []).append((entry, pattern))
    fused = {name: _pieces(name, found, by_pattern[found[0][1]]) for name, found in parts.items()}
    parameters = {
        path: [name for name, _ in module.named_parameters(recurse=False)] for path, module in model.named_modules()
    }
    transposed = {path for path, module in model.named_modules() if vars(module).get("is_transposed")}
    return StoredNames(renamed, fused, parameters, frozenset(transposed))


def _pieces(name: str, parts: Sequence[tuple[TensorEntry, str]], converter: WeightConverter) -> list[Piece]:
    """The pieces of one fused parameter, where fusing is stacking experts and laying their matrices on one another."""
    kinds = [(type(operation), vars(operation).get("dim")) for operation in converter.operations]
    stacked = kinds in ([(MergeModulelist, 0)], [(MergeModulelist, 0), (Concatenate, 1)])
    if not stacked or not all(EXPERT.search(entry.name) for entry, _ in parts):
        return []
    pieces = []
    heights = {pattern: entry.shape[0] for entry, pattern in parts}
    for entry, pattern in parts:
        before = converter.source_patterns[: converter.source_patterns.index(pattern)]
        first = sum(heights[other] for other in before)
        found = EXPERT.search(entry.name)
        assert found is not None
        pieces.append(Piece(entry.name, int(found.group(1)), slice(first, first + entry.shape[0])))
    return pieces


def pieces_of(names: StoredNames, parameter: str) -> Sequence[Piece]:
    """The pieces of a fused parameter.

    Raises:
        UserError: the base's files do not hold it in pieces that we know.
    """
    pieces = names.fused.get(parameter, ())
    if not pieces:
        message = (
            "the adapter changes this parameter; how the base's files hold it is not known, so it cannot be merged"
        )
        raise UserError(Problem(parameter, message))
    return pieces
