"""Make an ordinary base of one that is stored quantised, in a process of its own: its path in, a folder out.

What went wrong is answered as a line of JSON, which finetune/quantised_base.py reads. One shard at a time is in memory.
"""

from __future__ import annotations

import json
import shutil
import sys
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from safetensors.torch import save_file

from finetune.artifact import read_json, write_json
from finetune.base import TensorEntry, read_tensor_entries
from finetune.errors import FinetuneError, Problem, StorageError, UserError
from finetune.machine import prepare_libraries
from finetune.quantised_base import CONVERSION, RECORD, TENSORS, find_stored, is_gguf
from finetune.release.staging import publish, refuse_full_disk, work_folder
from finetune.release.weights import plan_shards
from finetune.trust import take_over
from finetune.unquantise import bnb, compressed, fp8, gptq
from finetune.unquantise.tensors import Tensor, Unquantised

SHARD_BYTES = 10**9
WEIGHTS = (".safetensors", ".safetensors.index.json", ".bin", ".bin.index.json", ".gguf", ".pth", ".pt")
Reader = Callable[[Path, Mapping[str, Any], Sequence[TensorEntry]], list[Tensor]]
READERS: dict[str, Reader] = {
    "bitsandbytes": bnb.unquantised,
    "compressed-tensors": compressed.unquantised,
    "gptq": gptq.unquantised,
    "awq": gptq.unquantised,
    "fp8": fp8.unquantised,
}


def main() -> None:
    """Part (facts or weights), the base's path, the folder to make, its files' sha256, allowed code: as arguments."""
    part, path, target, hashes, trusted = sys.argv[1:]
    prepare_libraries()
    take_over(trusted)
    answer: dict[str, Any] = {"code": 0, "problems": []}
    try:
        make_folder(part, read_unquantised(Path(path)), Path(target), json.loads(hashes))
    except FinetuneError as error:
        answer = {"code": error.code, "problems": [asdict(problem) for problem in error.problems]}
    except Exception:  # a bug: the parent cannot show its traceback
        traceback.print_exc()
        answer = {"code": 1, "problems": []}
    sys.stdout.write(json.dumps(answer) + "\n")


def read_unquantised(path: Path) -> Unquantised:
    """What a stored base will be, without its weights' values.

    Raises:
        UserError: a part of it is in a form that is not read.
        StorageError: a damaged file.
    """
    stored = find_stored(path)
    assert stored is not None
    if is_gguf(path):
        from finetune.unquantise import gguf_file  # only now: transformers, which the others do not need

        return gguf_file.unquantised(stored.path, stored.files[1:])
    config = read_json(path / "config.json")
    settings = config.pop("quantization_config")
    method = settings.get("quant_method") or "bitsandbytes"
    entries = list(read_tensor_entries(path))
    tensors = READERS[method](path, {**config, "quantization_config": settings}, entries)
    _refuse_packed(path, tensors, stored.form)
    copied = [file for file in stored.files if not file.name.endswith(WEIGHTS) and file.name != "config.json"]
    return Unquantised(stored.form, _bits(stored.form, settings), config, tensors, copied)


def _bits(form: str, settings: Mapping[str, Any]) -> float:
    groups = settings.get("config_groups") or {}
    packed = [group["weights"]["num_bits"] for group in groups.values() if group.get("weights")]
    if packed:
        return float(min(packed))
    return float(settings.get("bits") or (8 if form.endswith("int8") or form.startswith("FP8") else 4))


def _refuse_packed(path: Path, tensors: Sequence[Tensor], form: str) -> None:
    """What is no number in 16 or 32 bits by now is part of something that was not understood."""
    odd = [tensor for tensor in tensors if tensor.dtype not in {"F32", "F16", "BF16"}]
    if odd:
        message = f"{odd[0].name} is stored as {odd[0].dtype}, which is not read of {form}; name the original model"
        raise UserError(Problem(str(path), message))


def make_folder(part: str, base: Unquantised, target: Path, hashes: Mapping[str, str]) -> None:
    """The folder of a base, whole or without its weights (`part`); it gets its name when all of it is on the disk.

    Raises:
        StorageError: no room for it.
    """
    with work_folder(target) as work:
        folder = work / "base"
        folder.mkdir()
        for file in base.copied:
            shutil.copyfile(file, folder / file.name)
        for name, text in base.written.items():
            (folder / name).write_text(text, encoding="utf-8")
        if part == "facts":
            listed = [[tensor.name, tensor.dtype, list(tensor.shape)] for tensor in base.tensors]
            (folder / TENSORS).write_text(json.dumps(listed), encoding="utf-8")
        else:
            total = sum(tensor.bytes for tensor in base.tensors)
            _refuse_full_disk(target, total)
            _write_weights(folder, base.tensors, total)
            write_json(folder / RECORD, _record(base, hashes))
        write_json(folder / "config.json", dict(base.config))
        publish(folder, target)


def _refuse_full_disk(target: Path, total: int) -> None:
    try:
        refuse_full_disk(target, total)
    except StorageError as error:
        cure = "the 16-bit weights of a quantised base lie in the cache: $XDG_CACHE_HOME names another disk"
        raise StorageError([*error.problems, Problem(str(target.parent), cure)]) from error


def _record(base: Unquantised, hashes: Mapping[str, str]) -> dict[str, Any]:
    kinds = [tensor.dtype for tensor in base.tensors]
    dtype = max(sorted(set(kinds)), key=kinds.count)
    weights = {name: digest for name, digest in hashes.items() if name.endswith(WEIGHTS) and not name.endswith(".json")}
    return {"form": base.form, "bits": base.bits, "dtype": dtype, "sha256": weights, "conversion": CONVERSION}


def _write_weights(folder: Path, tensors: Sequence[Tensor], total: int) -> None:
    """Every tensor in stored order, one shard in memory at a time; what was written is said on stderr."""
    by_name = {tensor.name: tensor for tensor in tensors}
    entries = [TensorEntry(tensor.name, folder, tensor.dtype, tensor.shape) for tensor in tensors]
    shards = plan_shards(entries, shard_bytes=SHARD_BYTES)
    done = 0
    for name, members in shards.items():
        save_file({entry.name: _read(by_name[entry.name]) for entry in members}, folder / name, {"format": "pt"})
        done += sum(entry.bytes for entry in members)
        sys.stderr.write(f"unquantised {done / 1e9:.2f} of {total / 1e9:.2f} GB\n")
    if len(shards) > 1:
        weight_map = {entry.name: name for name, members in shards.items() for entry in members}
        write_json(
            folder / "model.safetensors.index.json", {"metadata": {"total_size": total}, "weight_map": weight_map}
        )


def _read(tensor: Tensor) -> Any:
    found = tensor.read().contiguous()
    assert tuple(found.shape) == tensor.shape, tensor.name
    return found
