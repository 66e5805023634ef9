"""What an adapter changes in a base's files: an adapter folder and a base folder in, changes by stored name out."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from finetune.artifact import read_json
from finetune.base import TensorEntry, read_tensor_entries
from finetune.errors import Problem, StorageError, UserError, raise_problems
from finetune.model.stored_names import StoredNames, pieces_of, read_stored_names
from finetune.release.adapter_file import CURE, Parts, read_config, read_parts, scale_of
from finetune.release.delta import DTYPES, Change, Delta, Kept, Rotated, Shift, Trained
from finetune.release.other_methods import other_changes

HEAD = "lm_head.weight"
EMBEDDING = "embed_tokens.weight"
TOKENS = "token_adapter.trainable_tokens_delta"
LINEAR, EMBEDDED = ("lora_A.weight", "lora_B.weight"), ("lora_embedding_A", "lora_embedding_B")


def read_changes(folder: Path, base_folder: Path) -> dict[str, Change]:
    """Everything an adapter folder changes, by the name that the base's files (or the release's) give the tensor.

    A head that was tied to the embedding and is no longer has an entry of its own.

    Raises:
        UserError: the adapter does something that a merge cannot represent, or does not fit this base.
        StorageError: a file is damaged.
    """
    config, modules = read_config(folder), read_parts(folder)
    files = _Files(base_folder)
    changes: dict[str, Change] = {}
    if config["peft_type"] != "LORA":
        found = other_changes(config, modules, lambda parameter: files.entries.get(_stored(parameter, files)))
        changes = {_stored(parameter, files): change for parameter, change in found}
        modules = {}
    for module, parts in sorted(modules.items()):
        changes.update(_changes_of(module, parts, config, files))
    _untie(changes, config, files)
    raise_problems(_misfits(changes, files))
    return changes


def read_plain_deltas(folder: Path) -> dict[str, Delta]:
    """The changes of an adapter that holds low-rank matrices of linears only; no base is needed to read them."""
    config, modules = read_config(folder), read_parts(folder)
    if config["peft_type"] != "LORA":
        raise UserError(Problem(str(folder), f"{config['peft_type']} is no LoRA; merge it and export that"))
    plain = {"lora_A.weight", "lora_B.weight", "lora_magnitude_vector"}
    odd = [
        module
        for module, parts in modules.items()
        if parts.trained or parts.lora.keys() != {0} or parts.lora[0].keys() - plain
    ]
    raise_problems(Problem(f"{folder}: {module}", "is more than low-rank matrices of a linear") for module in odd)
    return {
        f"{module}.weight": _low_rank(module, parts.lora[0], config, None) for module, parts in sorted(modules.items())
    }


def release_entries(base_folder: Path, changes: Mapping[str, Change]) -> list[TensorEntry]:
    """The tensors of a release: the base's, and a head that is no longer tied, which begins as the embedding."""
    entries = list(read_tensor_entries(base_folder))
    if HEAD not in changes or any(entry.name == HEAD for entry in entries):
        return entries
    return [*entries, replace(_embedding(entries), name=HEAD)]


class _Files:
    """A base's stored tensors; its names are translated only for an adapter that needs it."""

    def __init__(self, base_folder: Path) -> None:
        self.folder = base_folder
        self.entries = {entry.name: entry for entry in read_tensor_entries(base_folder)}

    @cached_property
    def names(self) -> StoredNames:
        return read_stored_names(self.folder, list(self.entries.values()))

    @cached_property
    def says_tied(self) -> bool:
        config = read_json(self.folder / "config.json")
        return bool(config.get("tie_word_embeddings", config.get("text_config", {}).get("tie_word_embeddings")))


def _changes_of(module: str, parts: Parts, config: Mapping[str, Any], files: _Files) -> Iterator[tuple[str, Change]]:
    """The changes of one module, by stored name."""
    trained = dict(parts.trained)
    targets = _parameters(module, parts, config, files)
    for level, found in parts.lora.items():
        if TOKENS in found:
            yield _stored(f"{module}.weight", files), Trained(found[TOKENS], _token_rows(module, config))
        elif targets[level] == f"{module}.weight":
            delta = _low_rank(module, found, config, trained.pop("weight", None))
            yield _stored(f"{module}.weight", files), delta
        else:
            yield from _fused(targets[level], module, _both(module, found, *LINEAR), config, files)
        if "lora_B.bias" in found:
            shift = Shift(found["lora_B.bias"], scale_of(config, module), trained.pop("bias", None))
            yield _stored(f"{module}.bias", files), shift
    for name, values in trained.items():
        yield from _replaced(f"{module}.{name}", values, files)


def _parameters(module: str, parts: Parts, config: Mapping[str, Any], files: _Files) -> dict[int, str]:
    """Which parameter each level of wrapping adapts: a module's weight, or fused experts, the first one innermost."""
    if not module.endswith("experts"):
        return dict.fromkeys(parts.lora, f"{module}.weight")
    named = [f"{module}.{name}" for name in files.names.parameters.get(module, ())]
    adapted = [name for name in named if _is_targeted(name, config)]
    if len(adapted) != len(parts.lora):
        message = f"{len(parts.lora)} of its parameters are adapted, target_parameters names {len(adapted)}; it {CURE}"
        raise UserError(Problem(module, message))
    return dict(zip(sorted(parts.lora), reversed(adapted), strict=True))


def _is_targeted(parameter: str, config: Mapping[str, Any]) -> bool:
    targets = config.get("target_parameters") or ()
    return any(parameter == target or parameter.endswith(f".{target}") for target in targets)


def _low_rank(
    module: str, found: Mapping[str, torch.Tensor], config: Mapping[str, Any], start: torch.Tensor | None
) -> Delta:
    magnitude, parameter = found.get("lora_magnitude_vector"), f"{module}.weight"
    if any(name in found for name in EMBEDDED):
        a_RO, b_IR = _both(module, found, *EMBEDDED)
        return Delta(b_IR.T, a_RO.T, None, scale_of(config, module, rank=a_RO.shape[0]), magnitude, start)
    a_RI, b_OR = _both(module, found, *LINEAR)
    name = parameter if _is_targeted(parameter, config) else module
    return Delta(a_RI, b_OR, magnitude, scale_of(config, name, rank=a_RI.shape[0]), start=start)


def _fused(
    parameter: str, module: str, pair: Sequence[torch.Tensor], config: Mapping[str, Any], files: _Files
) -> Iterator[tuple[str, Change]]:
    """A change of all experts at once, as PEFT stores it (tuners/lora/layer.py, ParamWrapper.get_delta_weight)."""
    a_RI, b_OR = pair  # the experts' ranks lie one after the other in A, interleaved in B
    whole = _stored(parameter, files)
    pieces = () if whole in files.entries else pieces_of(files.names, parameter)
    experts = 1 + max(piece.expert for piece in pieces) if pieces else files.entries[whole].shape[0]
    rank = a_RI.shape[0] // experts
    scale = scale_of(config, parameter, rank=rank)
    right_ERI = a_RI.reshape(experts, rank, -1)
    left_EOR = b_OR.reshape(b_OR.shape[0], rank, experts).permute(2, 0, 1)
    if module in files.names.transposed:
        left_EOR, right_ERI = right_ERI.transpose(1, 2), left_EOR.transpose(1, 2)
    if not pieces:
        yield whole, Delta(right_ERI, left_EOR, None, scale)
    for piece in pieces:
        yield piece.name, Delta(right_ERI[piece.expert], left_EOR[piece.expert, piece.rows], None, scale)


def _replaced(parameter: str, values: torch.Tensor, files: _Files) -> Iterator[tuple[str, Change]]:
    """Values in the place of a parameter's, which the files may hold in pieces."""
    name = _stored(parameter, files)
    if name in files.entries or name == HEAD or parameter not in files.names.fused:
        yield name, Trained(values)
        return
    for piece in pieces_of(files.names, parameter):
        yield piece.name, Trained(values[piece.expert, piece.rows])


def _stored(parameter: str, files: _Files) -> str:
    """The stored name of a parameter that the files hold as one tensor."""
    if parameter in files.entries or parameter == HEAD:
        return parameter
    return files.names.renamed.get(parameter, parameter)


def _both(module: str, found: Mapping[str, torch.Tensor], *names: str) -> list[torch.Tensor]:
    for name in names:
        if name not in found:
            raise StorageError(Problem(module, f"{name} is missing; the adapter is incomplete"))
    return [found[name] for name in names]


def _token_rows(module: str, config: Mapping[str, Any]) -> tuple[int, ...]:
    indices = config.get("trainable_token_indices")
    if isinstance(indices, dict):
        indices = next((rows for name, rows in indices.items() if module == name or module.endswith(f".{name}")), None)
    if not isinstance(indices, list):
        raise UserError(Problem(module, "trainable_token_indices does not name its rows; train it again"))
    return tuple(indices)


def _untie(changes: dict[str, Change], config: Mapping[str, Any], files: _Files) -> None:
    """Give the head values of its own where base + adapter compute with other ones than the embedding's.

    PEFT adapts a tied head and its embedding apart, but for trained rows of the embedding, which both share
    (utils/other.py, set_additional_trainable_modules). Its merge_and_unload, which merges a delta of one of them into
    both, is not what base + adapter compute.
    """
    entry = next((entry for entry in files.entries.values() if entry.name.endswith(EMBEDDING)), None)
    head, embedding = changes.get(HEAD), changes.get(entry.name if entry else EMBEDDING)
    if entry is None or (head is None and embedding is None):
        return
    if HEAD in files.entries:
        if files.says_tied:
            message = "the base stores a head and says that it is tied to the embedding; correct its config.json"
            raise UserError(Problem(HEAD, message))
    elif config.get("ensure_weight_tying") and (isinstance(head, Delta) or isinstance(embedding, Delta)):
        raise UserError(Problem("ensure_weight_tying", f"with low-rank matrices of the embedding it {CURE}"))
    elif head is None:
        if not (isinstance(embedding, Trained) and embedding.rows is not None):
            changes[HEAD] = Kept(entry.shape)
    elif isinstance(head, Trained) and isinstance(embedding, Trained) and _are_equal(head, embedding):
        del changes[HEAD]


def _are_equal(some: Trained, other: Trained) -> bool:
    return some.rows == other.rows and torch.equal(some.values, other.values)


def _misfits(changes: Mapping[str, Change], files: _Files) -> Iterator[Problem]:
    for name, change in changes.items():
        entry = files.entries.get(name) or (_embedding(list(files.entries.values())) if name == HEAD else None)
        if entry is None:
            yield Problem(name, "the adapter changes this tensor, the base's files hold none of this name")
        elif entry.dtype not in DTYPES:
            message = f"stored as {entry.dtype}; a base stored in 16 or 32 bits is needed to merge onto"
            yield Problem(name, message)
        elif isinstance(change, Trained) and change.rows is not None:
            if change.values.shape != (len(change.rows), entry.shape[1]) or max(change.rows) >= entry.shape[0]:
                yield Problem(name, f"the adapter trained rows that the base's {entry.shape} does not have")
        elif isinstance(change, Rotated):
            if change.width != entry.shape[-1]:
                message = f"the adapter turns {change.width} inputs, the base's {entry.shape} has others"
                yield Problem(name, f"{message}: not the base it was trained on")
        else:
            start = change.shape if change.start is None else tuple(change.start.shape)
            odd = [shape for shape in (change.shape, start) if shape != entry.shape]
            message = f"the adapter's is {odd}, the base's {entry.shape}: not the base it was trained on"
            yield from [Problem(name, message)] if odd else []


def _embedding(entries: Sequence[TensorEntry]) -> TensorEntry:
    return next(entry for entry in entries if entry.name.endswith(EMBEDDING))
