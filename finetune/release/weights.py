"""Write merged weights shard by shard: a base's tensors and a function of each in, safetensors files out."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch
from safetensors import safe_open

from finetune.artifact import write_json
from finetune.base import TensorEntry

SHARD_BYTES = 5 * 10**9


def write_shards(
    folder: Path,
    entries: Sequence[TensorEntry],
    change: Callable[[TensorEntry, torch.Tensor], torch.Tensor],
    *,
    shard_bytes: int = SHARD_BYTES,
) -> None:
    """Every tensor, changed, in stored order, in shards as transformers names them; one tensor in memory at a time."""
    shards = plan_shards(entries, shard_bytes=shard_bytes)
    for name, members in shards.items():
        with (folder / name).open("wb") as stream:
            stream.write(_header(members))
            for entry, tensor in read_tensors(members):
                stream.write(as_bytes(change(entry, tensor)).numpy().data)
    if len(shards) > 1:
        weight_map = {entry.name: name for name, members in shards.items() for entry in members}
        total = {"total_size": sum(entry.bytes for entry in entries)}
        write_json(folder / "model.safetensors.index.json", {"metadata": total, "weight_map": weight_map})


def plan_shards(entries: Sequence[TensorEntry], *, shard_bytes: int) -> dict[str, list[TensorEntry]]:
    """File names and what goes into each; a shard exceeds the limit only if one tensor alone does."""
    shards: list[list[TensorEntry]] = [[]]
    for entry in entries:
        if shards[-1] and sum(member.bytes for member in shards[-1]) + entry.bytes > shard_bytes:
            shards.append([])
        shards[-1].append(entry)
    if len(shards) == 1:
        return {"model.safetensors": shards[0]}
    count = len(shards)
    return {f"model-{number:05d}-of-{count:05d}.safetensors": members for number, members in enumerate(shards, 1)}


def read_tensors(entries: Sequence[TensorEntry]) -> Iterator[tuple[TensorEntry, torch.Tensor]]:
    """The entries with their stored tensors, one file open at a time."""
    position = 0
    while position < len(entries):
        file = entries[position].file
        with safe_open(str(file), framework="pt") as stored:
            while position < len(entries) and entries[position].file == file:
                entry = entries[position]
                yield entry, stored.get_tensor(entry.name)
                position += 1


def as_bytes(tensor: torch.Tensor) -> torch.Tensor:
    """The elements as they lie in a safetensors file: uint8, one dimension."""
    return tensor.contiguous().reshape(-1).view(torch.uint8)


def _header(members: Sequence[TensorEntry]) -> bytes:
    # The format of safetensors: eight bytes of length, then JSON padded to a multiple of eight.
    described: dict[str, object] = {"__metadata__": {"format": "pt"}}
    start = 0
    for entry in members:
        end = start + entry.bytes
        described[entry.name] = {"dtype": entry.dtype, "shape": list(entry.shape), "data_offsets": [start, end]}
        start = end
    text = json.dumps(described, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text
