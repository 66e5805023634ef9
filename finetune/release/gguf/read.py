"""Read a GGUF file as a base: the file in; config, tokenizer and tensors in transformers' names and order out.

The inverse of write.py, whose tables it uses; any block format that gguf can decode is read.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, GGUFReader, get_tensor_name_map, quants
from huggingface_hub.errors import StrictDataclassError

from finetune.errors import Problem, StorageError, UserError, raise_problems
from finetune.model.empty import empty_model
from finetune.release.gguf.architecture import FAMILIES
from finetune.release.gguf.read_config import Header, config_of
from finetune.release.gguf.write import ROPE_FACTORS

Type = GGMLQuantizationType
PLAIN = {Type.F32: "float32", Type.F16: "float16", Type.BF16: "bfloat16"}
VALUES_AT_ONCE = 1 << 24
DAMAGE = (ValueError, LookupError, TypeError, AttributeError, ArithmeticError, MemoryError, StrictDataclassError)


@dataclass(frozen=True)
class FileTensor:
    """One tensor of the model, and what of the file it is made of."""

    name: str  # in transformers
    shape: tuple[int, ...]
    stored: Any = None  # gguf's ReaderTensor
    heads: int | None = None  # whose rows are permuted
    offset: float = 0.0  # that the file's values are larger by

    def read(self, dtype: torch.dtype) -> torch.Tensor:
        """Its values.

        Raises:
            UserError: one that the dtype cannot hold.
        """
        found = torch.empty(self.shape, dtype=dtype)
        for rows, values in self._blocks():
            found[rows] = torch.from_numpy(values).to(dtype)
        if not torch.isfinite(found).all():
            raise UserError(Problem(self.name, "holds weights that 16 bits cannot; name the model it was made from"))
        return found

    def _blocks(self) -> Iterator[tuple[slice, np.ndarray]]:
        step = max(1, VALUES_AT_ONCE // max(1, int(np.prod(self.shape[1:]))))
        if self.heads:
            size = self.shape[0] // self.heads
            step = max(1, step // size) * size  # whole heads
        data = self.stored.data
        for start in range(0, self.shape[0], step):
            rows = slice(start, min(start + step, self.shape[0]))
            values = np.asarray(quants.dequantize(data[rows], self.stored.tensor_type), dtype=np.float32)
            values = values - np.float32(self.offset) if self.offset else values
            yield rows, unpermute_rows(values, values.shape[0] // size) if self.heads else values.copy()


@dataclass(frozen=True)
class FileModel:
    """A GGUF file as transformers would have it."""

    config: Mapping[str, Any]
    fields: Mapping[str, Any]
    tensors: tuple[FileTensor, ...]
    dtype: str
    type: str  # that most matrices have
    bits: float


def read_gguf(file: Path) -> FileModel:
    """The model of a file, without its weights' values.

    Raises:
        UserError: an architecture, setting or block format that is not read.
        StorageError: a damaged file, or one that lacks a tensor.
    """
    with damage_told(file):
        reader = GGUFReader(file)
        fields = {name: field.contents() for name, field in reader.fields.items()}
        stored = {tensor.name: tensor for tensor in reader.tensors}
        shapes = {name: tuple(int(size) for size in reversed(tensor.shape)) for name, tensor in stored.items()}
        _refuse_undecodable(file, stored)
        factors = stored.pop(ROPE_FACTORS, None)
        header = Header(file, fields, shapes, None if factors is None else np.array(factors.data, dtype=np.float32))
        dtype = _dtype(header, stored)
        config = config_of(header, dtype=dtype)
        tensors = tuple(_placed(file, config, stored, shapes))
    kinds = [tensor.tensor_type for tensor in stored.values() if len(tensor.shape) > 1]
    common = max(sorted(set(kinds)), key=kinds.count)
    block, size = GGML_QUANT_SIZES[common]
    return FileModel(config, fields, tensors, dtype, common.name, 8 * size / block)


@contextmanager
def damage_told(file: Path) -> Iterator[None]:
    """What a header of any content can break is told as damage."""
    try:
        yield
    except DAMAGE as error:
        reason = (str(error).splitlines() or [""])[0] or type(error).__name__
        raise StorageError(Problem(str(file), f"damaged or no GGUF file ({reason}); fetch it again")) from error


def unpermute_rows(rows_OI: np.ndarray, heads: int) -> np.ndarray:
    """The inverse of architecture.permute_rows."""
    size = rows_OI.shape[0] // heads
    pairs = rows_OI.reshape(heads, size // 2, 2, *rows_OI.shape[1:])
    return np.ascontiguousarray(pairs.swapaxes(1, 2)).reshape(rows_OI.shape)


def _dtype(header: Header, stored: Mapping[str, Any]) -> str:
    """The file's own where its matrices have one; else float16, whose eleven bits hold a code times a float16 scale
    more closely than bfloat16's eight. A Gemma's activations are too large for float16."""
    kinds = {tensor.tensor_type for tensor in stored.values() if len(tensor.shape) > 1}
    if kinds == {Type.F32}:
        return "float32"
    return "bfloat16" if Type.BF16 in kinds or header.architecture.startswith("gemma") else "float16"


def _refuse_undecodable(file: Path, stored: Mapping[str, Any]) -> None:
    odd = sorted({tensor.tensor_type.name for tensor in stored.values()} - {kind.name for kind in _decodable()})
    cure = "name the model it was made from, or another quantisation of it"
    raise_problems(Problem(str(file), f"its tensors are of type {name}, which is not read; {cure}") for name in odd)


def _decodable() -> list[Type]:
    return [*PLAIN, *quants._type_traits]


def _placed(
    file: Path, config: Mapping[str, Any], stored: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]]
) -> Iterator[FileTensor]:
    """Every tensor that transformers' model of this config has, in its order; all of the file are used."""
    family = FAMILIES[config["model_type"]]
    names = get_tensor_name_map(family.kind, config["num_hidden_layers"])
    heads = {"q_proj": config["num_attention_heads"], "k_proj": config["num_key_value_heads"]}
    problems, left = [], set(stored)
    for name, parameter in _parameters(config):
        there = names.get_name(name, try_suffixes=(".weight", ".bias")) or name
        left.discard(there)
        if there not in stored:
            problems.append(Problem(f"{file}: {there}", f"missing, so that there is no {name}"))
        elif shapes[there] != tuple(parameter.shape):
            told = f"is {shapes[there]}, by its header {tuple(parameter.shape)}"
            problems.append(Problem(f"{file}: {there}", f"{told}; fetch the file again"))
        else:
            permuted = heads.get(name.split(".")[-2]) if family.permutes else None
            offset = family.norm_offset if name.endswith("norm.weight") else 0.0
            yield FileTensor(name, tuple(parameter.shape), stored[there], permuted, offset)
    problems += [Problem(f"{file}: {name}", f"has no place in a {config['model_type']}") for name in sorted(left)]
    raise_problems(problems, error=StorageError)


def _parameters(config: Mapping[str, Any]) -> list[tuple[str, torch.Tensor]]:
    with tempfile.TemporaryDirectory(prefix="finetune-gguf-") as folder:
        (Path(folder) / "config.json").write_text(json.dumps(config), encoding="utf-8")
        found = list(empty_model(Path(folder), dtype=torch.float32).named_parameters())
    return [(name, each) for name, each in found if not (config["tie_word_embeddings"] and name == "lm_head.weight")]
