"""Write one GGUF file: a model folder in Hugging Face form in, a file that llama.cpp loads out."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from gguf import GGUFEndian, GGUFWriter
from safetensors import safe_open

from finetune.base import TensorEntry
from finetune.errors import Problem, UserError
from finetune.release.gguf.architecture import (
    Model,
    StoredTensor,
    header_fields,
    permute_rows,
    read_model,
)
from finetune.release.gguf.mix import ENCODERS, QUANTS, Quant, Type, block_size, encoded_bytes, tensor_type
from finetune.release.gguf.rope import rope_frequency_factors
from finetune.release.gguf.vocabulary import Tokenizer, read_tokenizer, text_notes, tokenizer_fields

ELEMENTS_AT_ONCE = 1 << 16  # what the encoders do fits a core's cache then
ROPE_FACTORS = "rope_freqs.weight"
QUANTIZATION_VERSION = 2  # of ggml's block formats


@dataclass(frozen=True)
class WrittenTensor:
    """One tensor of the file; the shape is (rows, columns), as stored."""

    name: str
    type: str
    shape: tuple[int, ...]
    bytes: int


@dataclass(frozen=True)
class GgufReport:
    """What was written."""

    file: Path
    quant: str
    bytes: int
    tensors: Sequence[WrittenTensor]
    notes: Sequence[str]  # what a user of the file has to know

    def types(self) -> dict[str, int]:
        """How many tensors there are of each type."""
        kinds = [tensor.type for tensor in self.tensors]
        return {kind: kinds.count(kind) for kind in sorted(set(kinds))}


def write_gguf(
    folder: Path, target: Path, *, quant: str, chat_template: str | None, stop_token_ids: Sequence[int], name: str
) -> GgufReport:
    """The model of `folder` as one GGUF file, written tensor by tensor, one of them in memory at a time.

    Raises:
        UserError: an unknown quantisation, or a model or tokenizer that a GGUF file cannot hold.
    """
    chosen = quant_of(quant)
    model = read_model(folder)
    tokenizer = read_tokenizer(folder)
    fields = all_fields(
        model, tokenizer, quant=chosen, chat_template=chat_template, stop_token_ids=stop_token_ids, name=name
    )
    writer = GGUFWriter(None, model.family.name, endianess=GGUFEndian.LITTLE)
    add_fields(writer, fields)
    written = [_announce(writer, tensor, chosen, model) for tensor in model.tensors]
    factors = rope_frequency_factors(model.config, head_size=model.head_size)
    if factors is not None:
        writer.add_tensor_info(ROPE_FACTORS, factors.shape, factors.dtype, factors.nbytes)
        written.append(WrittenTensor(ROPE_FACTORS, Type.F32.name, factors.shape, factors.nbytes))
    with closing(writer):
        writer.write_header_to_file(target)
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for tensor in model.tensors:
            writer.write_tensor_data(encode_tensor(tensor, file_type_of(tensor.name, tensor.entry, chosen, model)))
        if factors is not None:
            writer.write_tensor_data(factors)
    notes = [*model.notes, *text_notes(tokenizer, fields)]
    return GgufReport(target, quant, target.stat().st_size, written, notes)


def weight_bytes(folder: Path, quant: str) -> int:
    """What the tensors of `write_gguf`'s file will take; the header adds a few megabytes at most."""
    model, chosen = read_model(folder), quant_of(quant)
    kinds = (
        (file_type_of(tensor.name, tensor.entry, chosen, model), tensor.entry.elements) for tensor in model.tensors
    )
    return sum(encoded_bytes(kind, elements) for kind, elements in kinds)


def quant_of(name: str) -> Quant:
    if name not in QUANTS:
        raise UserError(Problem("--quant", f"{name!r} is not possible; write one of {', '.join(QUANTS)}"))
    return QUANTS[name]


def all_fields(
    model: Model,
    tokenizer: Tokenizer,
    *,
    quant: Quant,
    chat_template: str | None,
    stop_token_ids: Sequence[int],
    name: str,
) -> dict[str, Any]:
    """Every header field but the architecture's name, which the writer sets."""
    general = {
        "general.type": "model",
        "general.name": name,
        "general.file_type": int(quant.file_type),
        "general.quantization_version": QUANTIZATION_VERSION,
    }
    text = tokenizer_fields(
        tokenizer, rows=model.vocabulary, chat_template=chat_template, stop_token_ids=stop_token_ids
    )
    return general | header_fields(model) | text


def add_fields(writer: GGUFWriter, fields: Mapping[str, Any]) -> None:
    add: dict[type, Callable[[str, Any], None]] = {
        bool: writer.add_bool,
        int: writer.add_uint32,
        float: writer.add_float32,
        str: writer.add_string,
        list: writer.add_array,
    }
    for key, value in fields.items():
        add[type(value)](key, value)


def encode_tensor(tensor: StoredTensor, kind: Type) -> np.ndarray:
    """The tensor's bytes as `kind`, uint8, one dimension.

    Raises:
        UserError: a weight is not finite, or too large for float16.
    """
    encode, width = ENCODERS[kind], block_size(kind)
    encoded = np.empty(encoded_bytes(kind, tensor.entry.elements), dtype=np.uint8)
    start = 0
    for rows in read_rows(tensor):
        if kind == Type.F16 and np.abs(rows).max(initial=0) > np.finfo(np.float16).max:
            raise UserError(Problem(tensor.entry.name, "holds weights above 65504, too large for f16; take bf16"))
        if not np.isfinite(rows).all():
            raise UserError(Problem(tensor.entry.name, "holds weights that are not finite; take an earlier checkpoint"))
        part = encode(rows.reshape(-1, width)).reshape(-1)
        encoded[start : start + part.size] = part
        start += part.size
    return encoded


def read_rows(tensor: StoredTensor) -> Iterator[np.ndarray]:
    """The stored values in the file's order of rows, float32, some rows at a time."""
    import torch

    entry = tensor.entry
    step = max(1, ELEMENTS_AT_ONCE * entry.shape[0] // max(1, entry.elements))
    if tensor.heads:
        size = entry.shape[0] // tensor.heads
        step = max(1, step // size) * size  # whole heads
    with safe_open(str(entry.file), framework="pt") as stored:
        part = stored.get_slice(entry.name)
        for start in range(0, entry.shape[0], step):
            rows = part[start : start + step].to(torch.float32).numpy() + np.float32(tensor.offset)
            yield permute_rows(rows, rows.shape[0] // size) if tensor.heads else rows


def _announce(writer: GGUFWriter, tensor: StoredTensor, quant: Quant, model: Model) -> WrittenTensor:
    kind = file_type_of(tensor.name, tensor.entry, quant, model)
    size = encoded_bytes(kind, tensor.entry.elements)
    writer.add_tensor_info(tensor.name, tensor.entry.shape, np.dtype(np.float32), size, raw_dtype=kind)
    return WrittenTensor(tensor.name, kind.name, tensor.entry.shape, size)


def file_type_of(name: str, entry: TensorEntry, quant: Quant, model: Model) -> Type:
    return tensor_type(name, entry.shape, quant=quant, model=model.shape)
