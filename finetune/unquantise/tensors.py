"""What a stored base is made into: tensors with a name, a dtype and a way to compute their values."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from finetune.base import TensorEntry
from finetune.release.weights import TORCH_DTYPES, read_tensor

VALUES_AT_ONCE = 1 << 24
DTYPE_NAMES = {dtype: name for name, dtype in TORCH_DTYPES.items()}


@dataclass(frozen=True)
class Tensor:
    """One tensor of the ordinary base; `read` computes it, once it is wanted."""

    name: str
    dtype: str  # as safetensors names it
    shape: tuple[int, ...]
    read: Callable[[], torch.Tensor] = field(repr=False)

    @property
    def bytes(self) -> int:
        return TensorEntry(self.name, Path(), self.dtype, self.shape).bytes


@dataclass(frozen=True)
class Unquantised:
    """An ordinary base, before its weights are computed."""

    form: str
    bits: float
    config: Mapping[str, Any]
    tensors: Sequence[Tensor]
    copied: Sequence[Path]  # files that come along as they are
    written: Mapping[str, str] = field(default_factory=dict)  # files that are made: name -> text


def as_stored(entry: TensorEntry) -> Tensor:
    """A tensor that was never quantised."""
    return Tensor(entry.name, entry.dtype, entry.shape, lambda: read_tensor(entry))


def dtype_of(config: Mapping[str, Any]) -> torch.dtype:
    """The dtype that a config declares, which transformers computes a quantised model in; bfloat16 where it is mute."""
    return {"float16": torch.float16, "float32": torch.float32}.get(str(_declared(config)), torch.bfloat16)


def _declared(config: Mapping[str, Any]) -> Any:
    return config.get("dtype") or config.get("torch_dtype")


def row_blocks(rows: int, columns: int) -> Iterator[slice]:
    """Rows that are computed together, so that what float32 takes stays small beside the tensor."""
    step = max(1, VALUES_AT_ONCE // max(1, columns))
    for start in range(0, rows, step):
        yield slice(start, min(start + step, rows))
