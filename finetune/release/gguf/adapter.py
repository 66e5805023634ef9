"""A LoRA adapter as one GGUF file for llama.cpp's `--lora`: a run in, the file out; and its proof from the file."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gguf import GGUFEndian, GGUFReader, GGUFWriter

from finetune.artifact import read_json
from finetune.base import TensorEntry
from finetune.errors import Problem, StorageError, UserError, raise_problems
from finetune.release.delta import Delta, read_deltas
from finetune.release.fresh import Proof, proof
from finetune.release.gguf.architecture import Model, StoredTensor, permute_rows, read_model
from finetune.release.gguf.mix import Type
from finetune.release.gguf.write import add_fields
from finetune.release.layerwise import LayerwiseModel
from finetune.release.measure import deviation, largest_difference, probe_passes, rms_difference
from finetune.release.parts import Read
from finetune.release.source import Source
from finetune.release.weights import read_tensors

# What PEFT may have trained that is no pair of low-rank matrices beside a matrix of the base, and why that matters.
# llama.cpp reads such pairs and one alpha, nothing else (src/llama-adapter.cpp).
REFUSED = {
    "use_dora": "llama.cpp has no magnitudes, so a DoRA adapter cannot be added to a base as it is",
    "modules_to_save": "whole trained modules have no place in a LoRA file",
    "lora_bias": "trained biases have no place in a LoRA file",
    "target_parameters": "llama.cpp adds no adapter to experts",
    "trainable_token_indices": "trained embeddings have no place in a LoRA file",
    "alora_invocation_tokens": "an adapter that starts at a certain token is not written",
    "layer_replication": "llama.cpp repeats no layers",
}
CURE = "merge it and export that: --format gguf"
# Roundings to float32 on the way from the trained delta to llama.cpp's: alpha, alpha / rank, and B where it is scaled.
ROUNDING = 4 * 2.0**-24


def write_gguf_adapter(source: Source, file: Path, *, name: str) -> list[str]:
    """Write the run's adapter in float32, exactly as it was trained; what its user has to know comes back.

    llama.cpp adds alpha / rank * B * A, with one alpha for the whole file and the rank of each B. Where a module was
    trained with another scale than that gives, the difference goes into its B.

    Raises:
        UserError: something was trained that a LoRA file cannot hold, or a base that GGUF cannot; all at once.
        StorageError: the adapter's file is damaged.
    """
    model = read_model(source.base.facts.folder)
    deltas = _read_plain_deltas(source)
    tensors = _tensors_by_weight(source, model, deltas)
    alpha = alpha_of(deltas)
    writer = GGUFWriter(None, model.family.name, endianess=GGUFEndian.LITTLE)
    add_fields(writer, adapter_fields(name, alpha))
    for weight, delta in deltas.items():
        tensor, rank = tensors[weight], delta.a_RI.shape[0]
        b_OR = (delta.b_OR.double() * (delta.scale * rank / alpha)).float().numpy()
        rows = permute_rows(b_OR, tensor.heads) if tensor.heads else b_OR
        writer.add_tensor(f"{tensor.name}.lora_a", delta.a_RI.float().contiguous().numpy())
        writer.add_tensor(f"{tensor.name}.lora_b", np.ascontiguousarray(rows))
    with closing(writer):
        writer.write_header_to_file(file)
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
    return _notes(source)


def adapter_fields(name: str, alpha: float) -> dict[str, Any]:
    """Every header field but the architecture's name, which the writer sets."""
    return {
        "general.type": "adapter",
        "general.name": name,
        "general.file_type": 0,  # all float32
        "adapter.type": "lora",
        "adapter.lora.alpha": alpha,
    }


def alpha_of(deltas: Mapping[str, Delta]) -> float:
    """The alpha that gives most modules their own scale; alpha * sqrt(rank) for a rank-stabilised adapter."""
    alphas = [delta.scale * delta.a_RI.shape[0] for delta in deltas.values()]
    return max(sorted(set(alphas)), key=alphas.count)


def prove_gguf_adapter(file: Path, source: Source) -> list[Proof]:
    """Every module is there, its delta is the trained one, and base + delta computes what base + PEFT computes.

    The file is read with gguf's own reader and scaled as llama.cpp scales. A file with other tensors or header fields
    than the run asks for is not read further: only these proofs come back then.

    Raises:
        StorageError: not a whole GGUF file.
    """
    try:
        reader = GGUFReader(file)
    except (ValueError, IndexError, KeyError) as error:
        raise StorageError(Problem(str(file), f"not a whole GGUF file ({error}); export again")) from error
    model, deltas = read_model(source.base.facts.folder), read_deltas(source.adapter)
    stored = {tensor.entry.name: tensor for tensor in model.tensors}
    fields = {key: field.contents() for key, field in reader.fields.items()}
    proofs = [_prove_fields(fields, model, deltas), _prove_names(reader, stored, deltas)]
    if not all(found.passed for found in proofs):
        return proofs
    arrays = {tensor.name: np.asarray(tensor.data) for tensor in reader.tensors}
    alpha = np.float32(fields["adapter.lora.alpha"])
    beyond = sum(_count_beyond(_read_delta(arrays, stored[weight], alpha), delta) for weight, delta in deltas.items())
    proofs.append(proof("delta elements beyond float32 rounding", beyond, 0))

    def read(entries: Sequence[TensorEntry]) -> Iterator[tuple[TensorEntry, torch.Tensor]]:
        for entry, tensor in read_tensors(entries):
            if entry.name in deltas:
                tensor = (tensor.double() + _read_delta(arrays, stored[entry.name], alpha)).float()  # noqa: PLW2901
            yield entry, tensor

    return proofs + _prove_logits(source, read)


def _read_plain_deltas(source: Source) -> dict[str, Delta]:
    """The deltas, if pairs of matrices are all that was trained."""
    config_file = source.adapter / "adapter_config.json"
    config = read_json(config_file)
    odd = [(key, config[key], reason) for key, reason in REFUSED.items() if config.get(key)]
    if config.get("bias", "none") != "none":
        odd.append(("bias", config["bias"], REFUSED["lora_bias"]))
    raise_problems(Problem(f"{config_file}: {key}", f"{value!r}: {reason}; {CURE}") for key, value, reason in odd)
    deltas = read_deltas(source.adapter)
    if not deltas or not any(delta.scale for delta in deltas.values()):
        raise UserError(Problem(str(source.adapter), "the adapter changes nothing: there is nothing to export"))
    return deltas


def _tensors_by_weight(source: Source, model: Model, weights: Mapping[str, Delta]) -> dict[str, StoredTensor]:
    """The base file's tensor of every trained weight, by the weight's stored name."""
    stored = {tensor.entry.name: tensor for tensor in model.tensors}
    problems = []
    for weight, delta in weights.items():
        shape = (delta.b_OR.shape[0], delta.a_RI.shape[1])
        if weight not in stored:
            reason = f"{source.model.base}'s GGUF form holds no tensor of this name (a tied output is its embedding)"
            problems.append(Problem(weight, f"{reason}; {CURE}"))
        elif stored[weight].entry.shape != shape:
            there = stored[weight].entry.shape
            problems.append(Problem(weight, f"the adapter's delta is {shape}, the base's weight is {there}"))
    raise_problems(problems)
    return {weight: stored[weight] for weight in weights}


def _notes(source: Source) -> list[str]:
    notes = [
        "llama.cpp takes tokenizer, chat template and stop tokens from the base's file, not from this one: "
        f"give the run's template ({source.template.name}, sha256 {source.template.sha256[:12]}) with "
        "--chat-template-file where the base's is another"
    ]
    if source.model.quantization != "none":
        notes.append(f"trained on {source.model.quantization} weights; llama.cpp adds it to those of the base's file")
    return notes


def _prove_fields(fields: Mapping[str, Any], model: Model, deltas: Mapping[str, Delta]) -> Proof:
    """It is a LoRA adapter for the base's architecture, and alpha over rank is the scale of most modules."""
    wanted = {"general.type": "adapter", "adapter.type": "lora", "general.architecture": model.family.name}
    odd = sum(fields.get(key) != value for key, value in wanted.items())
    scales = sorted({delta.scale * delta.a_RI.shape[0] for delta in deltas.values()})
    alpha = fields.get("adapter.lora.alpha")
    return proof("header fields that differ from the run", odd + all(alpha != np.float32(one) for one in scales), 0)


def _prove_names(reader: GGUFReader, stored: Mapping[str, StoredTensor], deltas: Mapping[str, Delta]) -> Proof:
    """Both matrices of every trained module once, in float32; ggml writes shapes the other way round."""
    wanted: dict[str, tuple[int, ...]] = {}
    for weight, delta in deltas.items():
        name = stored[weight].name if weight in stored else weight
        wanted[f"{name}.lora_a"], wanted[f"{name}.lora_b"] = tuple(delta.a_RI.shape), tuple(delta.b_OR.shape)
    found = {tensor.name: tuple(tensor.shape.tolist()[::-1]) for tensor in reader.tensors}
    odd = [name for name in wanted.keys() | found.keys() if wanted.get(name) != found.get(name)]
    odd += [tensor.name for tensor in reader.tensors if tensor.tensor_type != Type.F32]
    return proof("modules that are missing, or differ in shape", len(odd) + len(reader.tensors) - len(found), 0)


def _read_delta(arrays: Mapping[str, np.ndarray], tensor: StoredTensor, alpha: np.float32) -> torch.Tensor:
    """What llama.cpp adds to the weight, float64, rows in the order of transformers."""
    a_RI = torch.from_numpy(np.array(arrays[f"{tensor.name}.lora_a"], dtype=np.float64))
    b_OR = torch.from_numpy(np.array(arrays[f"{tensor.name}.lora_b"], dtype=np.float64))
    if tensor.heads:  # row 2i and 2i + 1 of a head in the file are rows i and i + half of the source
        b_OR = b_OR.unflatten(0, (tensor.heads, -1, 2)).transpose(1, 2).reshape(b_OR.shape)
    return float(alpha / np.float32(b_OR.shape[1])) * (b_OR @ a_RI)


def _count_beyond(read_OI: torch.Tensor, delta: Delta) -> int:
    """Elements farther from the trained delta than the roundings of its terms allow."""
    a_RI, b_OR = delta.a_RI.double(), delta.b_OR.double()
    exact, terms = delta.scale * (b_OR @ a_RI), abs(delta.scale) * (b_OR.abs() @ a_RI.abs())
    return int((~((read_OI - exact).abs() <= ROUNDING * terms)).sum())


def _prove_logits(source: Source, read: Read) -> list[Proof]:
    """The base with the file's deltas, as `read` gives it, computes what base + PEFT computes, in float32."""
    from finetune.release.proof import NO_OP_LIMIT, PROBE_TOKENS, fine_limit

    def read_rounded(entries: Sequence[TensorEntry]) -> Iterator[tuple[TensorEntry, torch.Tensor]]:
        to = torch.float16 if source.base.facts.stored_dtype == "F16" else torch.bfloat16
        yield from ((entry, tensor.to(to)) for entry, tensor in read(entries))

    facts, device = source.base.facts, source.model.device
    probes = [ids[:PROBE_TOKENS] for ids in source.probe_ids()]
    with_adapter = probe_passes(probes, vocabulary=facts.vocabulary)
    without = probe_passes(probes, vocabulary=facts.vocabulary, adapted=False)
    model = LayerwiseModel(facts.folder, adapter=source.adapter, device=device)
    both = [found.cpu() for found in model.logits([*with_adapter, *without])]
    trained, base = both[: len(probes)], both[len(probes) :]
    logits, rounded = (
        [
            found.cpu()
            for found in LayerwiseModel(facts.folder, read=reading, device=device).logits(
                probe_passes(probes, vocabulary=facts.vocabulary, follow=[one.route for one in with_adapter])
            )
        ]
        for reading in (read, read_rounded)
    )
    limit = fine_limit(facts, rounded, logits)
    effect, missed, scale = rms_difference(trained, base), rms_difference(logits, trained), deviation(trained)
    return [
        proof("logits of base + file against base + adapter", largest_difference(logits, trained) / scale, limit),
        proof("no-op", missed / effect if effect else math.inf, NO_OP_LIMIT),
    ]
