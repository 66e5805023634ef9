"""Read and write stored weights: tensors by offset from a base's files in, safetensors shards of a release out."""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Callable, Container, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from pathlib import Path
from typing import BinaryIO

import torch

from finetune.artifact import write_json
from finetune.base import TensorEntry
from finetune.errors import Problem, StorageError

SHARD_BYTES = 5 * 10**9
BYTES_AT_ONCE = 8 << 20
TORCH_DTYPES = {
    **{"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "BOOL": torch.bool},
    **{"I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8},
    **{"U64": torch.uint64, "U32": torch.uint32, "U16": torch.uint16, "U8": torch.uint8},
    **{"F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2},
}
Change = Callable[[TensorEntry, torch.Tensor], torch.Tensor]


class Everything:
    """A container of every name."""

    def __contains__(self, name: object) -> bool:
        return True


def write_shards(
    folder: Path,
    entries: Sequence[TensorEntry],
    change: Change,
    *,
    changed: Container[str] | None = None,
    shard_bytes: int = SHARD_BYTES,
) -> None:
    """Every tensor in stored order, in shards as transformers names them; the next is changed while one is written.

    Two changed tensors are in memory at a time. Only the tensors named in `changed` (None: all) are read as tensors and
    given to `change`; of the others the bytes are copied.
    """
    changed = Everything() if changed is None else changed
    shards = plan_shards(entries, shard_bytes=shard_bytes)
    for name, members in shards.items():
        with (folder / name).open("wb") as stream:
            stream.write(_header(members))
            _write_tensors(stream, members, change, [entry for entry in members if entry.name in changed])
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
    """The entries with their stored tensors, one after the other."""
    for entry in entries:
        yield entry, read_tensor(entry)


def read_tensor(entry: TensorEntry) -> torch.Tensor:
    """A stored tensor, in memory of its own: read, not mapped, so that a model larger than the memory can be merged.

    Raises:
        StorageError: the file ends before the tensor does.
    """
    stored = torch.empty(entry.bytes, dtype=torch.uint8)
    descriptor = os.open(entry.file, os.O_RDONLY)
    try:
        _read_into(descriptor, stored.numpy().data, entry, entry.start)
    finally:
        os.close(descriptor)
    return stored.view(TORCH_DTYPES[entry.dtype]).reshape(entry.shape)


def read_blocks(entry: TensorEntry) -> Iterator[memoryview]:
    """A stored tensor's bytes, some megabytes at a time; a block is overwritten by the next one."""
    room = memoryview(bytearray(min(BYTES_AT_ONCE, entry.bytes)))
    descriptor = os.open(entry.file, os.O_RDONLY)
    try:
        for start in range(0, entry.bytes, BYTES_AT_ONCE):
            block = room[: min(BYTES_AT_ONCE, entry.bytes - start)]
            _read_into(descriptor, block, entry, entry.start + start)
            yield block
    finally:
        os.close(descriptor)


def same_bytes(some: TensorEntry, other: TensorEntry) -> bool:
    """Whether two stored tensors are equal, byte for byte."""
    return some.bytes == other.bytes and all(
        one == two for one, two in zip(read_blocks(some), read_blocks(other), strict=True)
    )


def as_bytes(tensor: torch.Tensor) -> torch.Tensor:
    """The elements as they lie in a safetensors file: uint8, one dimension."""
    return tensor.contiguous().reshape(-1).view(torch.uint8)


def _write_tensors(
    stream: BinaryIO, members: Sequence[TensorEntry], change: Change, changed: Sequence[TensorEntry]
) -> None:
    waiting = iter(changed)
    with ThreadPoolExecutor(max_workers=1) as worker:
        ahead = [worker.submit(_changed_bytes, entry, change) for entry in islice(waiting, 1)]
        for entry in members:
            if entry not in changed:
                stream.writelines(read_blocks(entry))
                continue
            ready = ahead.pop().result()
            ahead += [worker.submit(_changed_bytes, following, change) for following in islice(waiting, 1)]
            stream.write(ready)


def _changed_bytes(entry: TensorEntry, change: Change) -> memoryview:
    return as_bytes(change(entry, read_tensor(entry))).numpy().data


def _read_into(descriptor: int, room: memoryview, entry: TensorEntry, start: int) -> None:
    filled = 0
    while filled < len(room):
        count = os.preadv(descriptor, [room[filled:]], start + filled)
        if count == 0:
            message = f"ends inside {entry.name}; it became shorter while it was read, fetch it again"
            raise StorageError(Problem(str(entry.file), message))
        filled += count


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
