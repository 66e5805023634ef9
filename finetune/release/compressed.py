"""A model in 4 bits for vLLM: a model folder in; compressed-tensors' W4A16 form ("pack-quantized") and its proofs out.

Every linear inside the decoder layers becomes codes of 4 bits, rounded to nearest, with a scale for each 128 weights of
a row. Embeddings, head, routers, norms and biases stay as they are stored.
"""

from __future__ import annotations

import importlib.util
import math
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from finetune.artifact import read_json, write_json
from finetune.base import TensorEntry, read_tensor_entries
from finetune.data.examples import Example
from finetune.errors import Problem, UserError, raise_problems
from finetune.machine import GIB, probe_machine
from finetune.release.compressed_layout import Layout, quantization_config, read_layout
from finetune.release.delta import DTYPES, ELEMENTS_AT_ONCE
from finetune.release.fresh import Proof, proof
from finetune.release.int4 import GROUP, count_not_nearest, decode, group_scales, nearest_codes, pack, unpack
from finetune.release.layerwise import LayerwiseModel, Pass
from finetune.release.manifest import CARD, MANIFEST
from finetune.release.measure import (
    deviation,
    largest_difference,
    loss_passes,
    loss_stretches,
    mean_loss_of,
    rms_difference,
)
from finetune.release.parts import Read
from finetune.release.source import read_source
from finetune.release.weights import as_bytes, plan_shards, read_tensors
from finetune.trust import is_trusted

EXTRA = "compressed-tensors"
SHARD_BYTES = 2 * 10**9  # held in memory while a shard is written
WEIGHT_ENDINGS = (".safetensors", ".safetensors.index.json", ".bin", ".bin.index.json", ".pt", ".pth", ".gguf", ".h5")
LOGIT_TOKENS = 64
WHOLE_SHARE = 0.7  # of this computer's memory


def refuse_compressed(model_folder: Path) -> None:
    """Refuse what cannot be written or proven, before anything is written.

    Raises:
        UserError: the library for the proof is missing, or the model cannot be compressed; all problems at once.
    """
    missing = _missing_library()
    try:
        read_layout(model_folder)
    except UserError as error:
        raise UserError([*missing, *error.problems]) from error
    raise_problems(missing)


def compressed_bytes(model_folder: Path) -> int:
    """What the weights will take."""
    layout = read_layout(model_folder)
    return sum(layout.bytes_of(entry) for entry in layout.entries)


def write_compressed(model_folder: Path, folder: Path) -> list[str]:
    """Weights, config and every other file of the model but card and manifest; what a user has to know comes back.

    Raises:
        UserError: the model cannot be compressed, or a weight is not finite.
    """
    layout = read_layout(model_folder)
    entries = {entry.name: entry for entry in layout.entries}
    sizes = [replace(entry, dtype="U8", shape=(layout.bytes_of(entry),)) for entry in layout.entries]
    shards = plan_shards(sizes, shard_bytes=SHARD_BYTES)
    shard_of: dict[str, str] = {}
    for name, members in shards.items():
        tensors: dict[str, torch.Tensor] = {}
        for entry, tensor in read_tensors([entries[member.name] for member in members]):
            tensors |= compress(entry, tensor) if entry.name in layout.packed else {entry.name: tensor}
        save_file(tensors, folder / name, metadata={"format": "pt"})
        shard_of |= dict.fromkeys(tensors, name)
    if len(shards) > 1:
        total = {"total_size": sum(size.bytes for size in sizes)}
        write_json(folder / "model.safetensors.index.json", {"metadata": total, "weight_map": shard_of})
    for file in sorted(model_folder.iterdir()):
        if file.is_file() and not file.name.startswith(".") and not file.name.endswith(WEIGHT_ENDINGS):
            shutil.copyfile(file, folder / file.name)
    for name in (CARD, MANIFEST):
        (folder / name).unlink(missing_ok=True)
    config = read_json(model_folder / "config.json")
    write_json(folder / "config.json", config | {"quantization_config": quantization_config(layout)})
    return list(layout.notes)


def compress(entry: TensorEntry, weight_OI: torch.Tensor) -> dict[str, torch.Tensor]:
    """The stored tensors of one linear: packed codes, scales, shape.

    Raises:
        UserError: a weight is not finite.
    """
    words, scales = [], []
    for block in row_blocks(weight_OI):
        if not torch.isfinite(weight_OI[block]).all():
            raise UserError(Problem(entry.name, "holds weights that are not finite; take an earlier checkpoint"))
        scales.append(group_scales(weight_OI[block]))
        words.append(pack(nearest_codes(weight_OI[block], scales[-1])))
    shape = torch.tensor(weight_OI.shape, dtype=torch.int64)
    parts = {"_packed": torch.cat(words), "_scale": torch.cat(scales), "_shape": shape}
    return {entry.name + ending: part for ending, part in parts.items()}


def prove_compressed(folder: Path, model_folder: Path) -> list[Proof]:
    """Every proof of a compressed model, from the files on disk, read by compressed-tensors and by transformers.

    A folder with other tensors or another config than asked for is not read further: only these proofs come back then.

    Raises:
        UserError: the library is missing.
    """
    raise_problems(_missing_library())
    layout = read_layout(model_folder)
    written = {entry.name: entry for entry in read_tensor_entries(folder)}
    proofs = [_prove_names(written, layout), _prove_config(folder, model_folder, layout)]
    if not all(found.passed for found in proofs):
        return proofs
    return proofs + _prove_weights(written, layout) + _prove_model(folder, model_folder, written, layout)


def _missing_library() -> list[Problem]:
    if importlib.util.find_spec("compressed_tensors") is not None:
        return []
    cure = f"pip install 'finetune-toolkit[{EXTRA}]'"
    return [Problem("compressed-tensors", f"is not installed; it reads the result back for the proofs; {cure}")]


def _prove_names(written: Mapping[str, TensorEntry], layout: Layout) -> Proof:
    """Three tensors for each weight that became codes, and every other tensor as it was."""
    wanted: dict[str, tuple[str, tuple[int, ...]]] = {}
    for entry in layout.entries:
        if entry.name not in layout.packed:
            wanted[entry.name] = (entry.dtype, entry.shape)
            continue
        rows, columns = entry.shape
        wanted[f"{entry.name}_packed"] = ("I32", (rows, columns // 8))
        wanted[f"{entry.name}_scale"] = (entry.dtype, (rows, columns // GROUP))
        wanted[f"{entry.name}_shape"] = ("I64", (2,))
    found = {name: (entry.dtype, entry.shape) for name, entry in written.items()}
    odd = [name for name in wanted.keys() | found.keys() if wanted.get(name) != found.get(name)]
    return proof("tensor names, shapes and dtypes", len(odd), 0)


def _prove_config(folder: Path, model_folder: Path, layout: Layout) -> Proof:
    """The model's config with one entry more, in which compressed-tensors reads its own preset W4A16."""
    from compressed_tensors.quantization import QuantizationConfig, preset_name_to_scheme

    found, wanted = read_json(folder / "config.json"), read_json(model_folder / "config.json")
    read = QuantizationConfig.model_validate(found.pop("quantization_config", None) or {"config_groups": {}})
    scheme = read.config_groups.get("group_0")
    preset = preset_name_to_scheme("W4A16", ["Linear"])
    odd = [key for key in found.keys() | wanted.keys() if found.get(key) != wanted.get(key)]
    odd += ["config_groups"] * (len(read.config_groups) != 1 or scheme is None or scheme.targets != preset.targets)
    if scheme is not None and scheme.weights is not None and preset.weights is not None:
        ours, theirs = scheme.weights.model_dump(), preset.weights.model_dump()
        odd += [key for key in theirs if ours[key] != theirs[key] and key != "observer"]
    odd += ["format"] * (read.format != "pack-quantized")
    odd += ["ignore"] * (sorted(read.ignore or ()) != sorted(layout.ignore))
    return proof("config entries that differ", len(odd), 0)


def _prove_weights(written: Mapping[str, TensorEntry], layout: Layout) -> list[Proof]:
    """Scales are their groups', codes the nearest, compressed-tensors decodes the same, and the rest is unchanged."""
    broken = other_scales = not_nearest = decoded_otherwise = changed = 0
    error = size = 0.0
    for entry, tensor in read_tensors(layout.entries):
        if entry.name not in layout.packed:
            ((_, copy),) = read_tensors([written[entry.name]])
            changed += not torch.equal(as_bytes(tensor), as_bytes(copy))
            continue
        parts = dict(_parts(written, entry))
        theirs = _decoded_by_library(parts)
        code_OI, scale_OG = unpack(parts["weight_packed"]), parts["weight_scale"]
        decoded_otherwise += parts["weight_shape"].tolist() != list(tensor.shape)
        broken += int((~(torch.isfinite(scale_OG) & (scale_OG > 0))).sum())
        for block in row_blocks(tensor):
            values, weight = decode(code_OI[block], scale_OG[block]), tensor[block]
            not_nearest += count_not_nearest(weight, code_OI[block], scale_OG[block])
            decoded_otherwise += int((values != theirs[block]).sum())
            other_scales += _count_other_scales(weight, scale_OG[block])
            error += (values.double() - weight.double()).square().sum().item()
            size += weight.double().square().sum().item()
    return [
        proof("scales that are zero, negative or not finite", broken, 0),
        proof("scales that are not their group's largest weight over 7.5", other_scales, 0),
        proof("codes that are not the nearest for their scale", not_nearest, 0),
        proof("weights that compressed-tensors decodes otherwise", decoded_otherwise, 0),
        proof("other tensors that changed", changed, 0),
        proof("quantisation error, share of the weights' size", math.sqrt(error / size), None),
    ]


def _parts(written: Mapping[str, TensorEntry], entry: TensorEntry) -> Iterator[tuple[str, torch.Tensor]]:
    for ending in ("_packed", "_scale", "_shape"):
        ((_, tensor),) = read_tensors([written[entry.name + ending]])
        yield f"weight{ending}", tensor


def _decoded_by_library(parts: Mapping[str, torch.Tensor]) -> torch.Tensor:
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization import preset_name_to_scheme

    compressor = BaseCompressor.get_value_from_registry("pack-quantized")
    return compressor.decompress(dict(parts), preset_name_to_scheme("W4A16", ["Linear"]))["weight"]


def _count_other_scales(weight_OI: torch.Tensor, scale_OG: torch.Tensor) -> int:
    """Scales farther from the largest weight over 7.5 than rounding to their dtype allows; of zeros any is right."""
    largest_OG = weight_OI.double().abs().reshape(*scale_OG.shape, GROUP).max(dim=2).values
    exact_OG, info = largest_OG / 7.5, torch.finfo(scale_OG.dtype)
    near = (scale_OG.double() - exact_OG).abs() <= torch.maximum(
        exact_OG * info.eps, torch.tensor(info.tiny * info.eps)
    )
    return int((~(near | (exact_OG < info.tiny * info.eps))).sum())


def _prove_model(folder: Path, model_folder: Path, written: Mapping[str, TensorEntry], layout: Layout) -> list[Proof]:
    """transformers with compressed-tensors computes what the model computes with our decoded weights, in its own dtype.

    Equal weights give equal logits: in float32 transformers would decode some weights in float32, others in 16 bits.
    It cannot read this form layer by layer: its logits are compared where the whole model fits in memory.
    """
    from finetune.release.proof import LOGITS_LIMIT

    config = read_json(model_folder / "config.json")
    dtype = next(DTYPES[entry.dtype] for entry in layout.entries if entry.name in layout.packed)
    ids = torch.randint(config["vocab_size"], (1, LOGIT_TOKENS), generator=torch.Generator().manual_seed(0))
    rows = _held_out_rows(model_folder)
    original, loss = _computed(LayerwiseModel(model_folder, dtype=dtype), ids, rows)
    read = _read_decoded(written, layout)
    decoded, compressed_loss = _computed(LayerwiseModel(model_folder, read=read, dtype=dtype), ids, rows)
    scale, limit = deviation([original]), LOGITS_LIMIT["F32"] * math.sqrt(config["num_hidden_layers"])
    proofs = [
        proof("logits against the model, root mean square", rms_difference([decoded], [original]) / scale, None),
    ]
    if fits_whole(sum(entry.bytes for entry in layout.entries)):
        loaded, missed = _load(folder, dtype)
        with torch.no_grad():
            logits = loaded(input_ids=ids, use_cache=False).logits[0].float()
        difference = largest_difference([logits], [decoded]) / scale
        first = proof("weights that transformers misses or does not know", missed, 0)
        proofs = [first, proof("logits as transformers reads the folder", difference, limit), *proofs]
    if loss is not None and compressed_loss is not None:
        proofs.append(proof("loss on the run's rows", compressed_loss, None))
        proofs.append(proof("loss of the model on the run's rows", loss, None))
    return proofs


def fits_whole(bytes_stored: int) -> bool:
    """Whether this computer has the memory that transformers takes to decode the whole model while it loads it."""
    return 2 * bytes_stored < WHOLE_SHARE * probe_machine().memory_gib * GIB


def _computed(model: LayerwiseModel, ids: torch.Tensor, rows: Sequence[Example]) -> tuple[torch.Tensor, float | None]:
    """Logits of some tokens, and the loss on rows if there are any."""
    stretches = loss_stretches(rows, device=model.device)
    logits = model.logits([Pass(ids), *loss_passes(stretches)])
    return next(logits), mean_loss_of(stretches, logits) if rows else None


def _load(folder: Path, dtype: torch.dtype) -> tuple[Any, int]:
    """A model as any transformers user loads it, and how many of its weights were not where they should be."""
    from transformers import AutoModelForCausalLM

    loaded: Any = AutoModelForCausalLM.from_pretrained(
        str(folder), dtype=dtype, output_loading_info=True, trust_remote_code=is_trusted(folder)
    )
    model, told = loaded
    kinds = ("missing_keys", "unexpected_keys", "mismatched_keys")
    return model.requires_grad_(False), sum(len(told[kind]) for kind in kinds)


def _read_decoded(written: Mapping[str, TensorEntry], layout: Layout) -> Read:
    """Read the model's tensors as the compressed folder holds them, with the codes' values for its weights."""

    def read(entries: Sequence[TensorEntry]) -> Iterator[tuple[TensorEntry, torch.Tensor]]:
        for entry in entries:
            if entry.name in layout.packed:
                parts = dict(_parts(written, entry))
                yield entry, decode(unpack(parts["weight_packed"]), parts["weight_scale"])
            else:
                ((_, tensor),) = read_tensors([written[entry.name]])
                yield entry, tensor

    return read


def _held_out_rows(model_folder: Path) -> Sequence[Example]:
    """Rows of the run that a release was made of, where manifest and run are there; held-out ones if it has some.

    A manifest tells the way to the run from where its folder will lie; while an export is made, that is one level up.
    """
    manifest = model_folder / MANIFEST
    run = read_json(manifest).get("run") if manifest.is_file() else None
    for place in (model_folder, model_folder.parent):
        if run is not None and (place / run / "plan.json").is_file():
            return read_source((place / run).resolve()).rows.examples
    return ()


def row_blocks(weight_OI: torch.Tensor) -> Iterator[slice]:
    """Some rows at a time, so that float64 copies stay small."""
    step = max(1, ELEMENTS_AT_ONCE // weight_OI.shape[1])
    for start in range(0, weight_OI.shape[0], step):
        yield slice(start, min(start + step, weight_OI.shape[0]))
