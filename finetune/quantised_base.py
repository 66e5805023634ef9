"""Bases that are stored quantised: a folder or .gguf file in; a folder of 16-bit weights in the cache out. No torch.

It is made once, by a child process (finetune/unquantise), under a name that is made of the original's content. From
there on it is a base like any other: what is planned, trained, merged and proven are these values.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from fnmatch import fnmatch
from hashlib import sha256
from pathlib import Path
from typing import Any

from finetune.errors import FinetuneError, OutOfMemoryError, Problem, StorageError, UserError
from finetune.machine import cache_folder
from finetune.trust import hand_over_to_child
from finetune.weight_hashes import weight_sha256

CONVERSION = 1  # raised when the same files would give other values: older folders are not used any more
RECORD, TENSORS = ".unquantised.json", ".tensors.json"
# Beside a .gguf file: a tokenizer that takes the place of the one inside, the licence, the card.
BESIDE_GGUF = ("tokenizer*", "special_tokens_map.json", "*.jinja", "README.md", "LICENSE*", "NOTICE*", "USE_POLICY*")
PACKED_FORMATS = ("pack-quantized", "int-quantized", "naive-quantized", "float-quantized")
METHODS = ("bitsandbytes", "compressed-tensors", "gptq", "awq", "fp8")
ERRORS: dict[int, type[FinetuneError]] = {kind.code: kind for kind in (UserError, StorageError, OutOfMemoryError)}
PARENT = Path(__file__).resolve().parents[1]
START = "import sys; sys.path.insert(0, sys.argv.pop(1)); from finetune.unquantise.convert import main; main()"


@dataclass(frozen=True)
class Stored:
    """A base as it is stored: how, and every file that its values depend on or that comes along."""

    path: Path  # a folder, or one .gguf file
    form: str
    files: tuple[Path, ...]


def is_gguf(path: Path) -> bool:
    """Whether a path is a .gguf file, or a folder that holds such files and no weights in safetensors form."""
    if path.is_file():
        return path.suffix == ".gguf"
    return any(path.glob("*.gguf")) and not any(path.glob("*.safetensors"))


def find_stored(path: Path) -> Stored | None:
    """How a base is quantised; None for one that is not.

    Raises:
        UserError: in a form that is not read.
    """
    if is_gguf(path):
        return _stored_gguf(path)
    try:
        config = json.loads((path / "config.json").read_text(encoding="utf-8"))
        settings = config.get("quantization_config")
    except (OSError, ValueError, AttributeError, RecursionError):
        return None  # told where the config is read
    if not settings:
        return None
    form, reason = _form_of(settings)
    if reason:
        message = f"{reason}; name the model that it was made from, with model.quantization: nf4 if it is to be small"
        raise UserError(Problem(f"{path / 'config.json'}: quantization_config", message))
    files = sorted(file for file in path.iterdir() if file.is_file() and not file.name.startswith("."))
    return Stored(path, form, tuple(files))


def ordinary_folder(stored: Stored) -> Path:
    """The folder in the cache with this base's values in 16 bits, made if it is not there; said on stderr.

    Raises:
        UserError: a part of it is in a form that is not read.
        StorageError: a damaged file, or no room.
        OutOfMemoryError: the process that makes it was killed.
    """
    hashes = weight_sha256(stored.files)
    target = _root() / _digest([CONVERSION, hashes])
    if not (target / "config.json").is_file():
        sys.stderr.write(f"{stored.path}: stored as {stored.form}; made into 16-bit weights once, kept in the cache\n")
        _in_child("weights", stored, target)
    return target


def facts_folder(stored: Stored) -> Path:
    """A folder in the cache with all of `ordinary_folder` but its weights, of which it lists names and shapes."""
    target = _root() / f"facts-{_digest([CONVERSION, _look_of(stored)])}"
    if not (target / TENSORS).is_file():
        _in_child("facts", stored, target)
    return target


def listed_tensors(facts: Path) -> list[tuple[str, str, tuple[int, ...]]]:
    """Name, safetensors dtype and shape of every tensor that a facts folder lists."""
    return [(name, dtype, tuple(shape)) for name, dtype, shape in json.loads((facts / TENSORS).read_text())]


def stored_as(folder: Path) -> Mapping[str, Any] | None:
    """What a folder of ours was made from: form, bits, sha256 of the original's weight files; None for any other."""
    file = folder / RECORD
    return json.loads(file.read_text(encoding="utf-8")) if file.is_file() else None


def stored_notes(record: Mapping[str, Any] | None) -> list[str]:
    """What a user of a model made from a base has to know, by what `stored_as` says of the base."""
    if record is None:
        return []
    return [
        f"the base was stored in {record['bits']:g} bits ({record['form']}); its weights here are those values in "
        f"{record['dtype']}, not those of the model that was quantised to it"
    ]


def _form_of(settings: Any) -> tuple[str, str | None]:
    """A name for how the weights are stored; a reason where that is not read."""
    known = f"read are {', '.join(METHODS)} and GGUF"
    if not isinstance(settings, dict):
        return "", f"must be an object, got {type(settings).__name__}"
    method = settings.get("quant_method") or ("bitsandbytes" if "load_in_4bit" in settings else "")
    if method == "bitsandbytes":
        kind = settings.get("bnb_4bit_quant_type", "fp4") if settings.get("load_in_4bit") else "int8"
        is_read = kind in ("nf4", "fp4", "int8")
        return f"bitsandbytes {kind}", None if is_read else "4 bits of bitsandbytes are read as nf4 and fp4 only"
    if method == "compressed-tensors":
        form = str(settings.get("format"))
        reason = f"its format {form!r} is not read, only {', '.join(PACKED_FORMATS)} are"
        return f"compressed-tensors {form}", None if form in PACKED_FORMATS else reason
    if method == "gptq":
        bits = settings.get("bits")
        return f"GPTQ {bits} bits", None if bits in (2, 4, 8) else f"GPTQ in {bits!r} bits is not read: 2, 4 and 8 are"
    if method == "awq":
        bits, version = settings.get("bits", 4), str(settings.get("version", "gemm")).lower()
        is_read = bits == 4 and version == "gemm"
        return "AWQ 4 bits", None if is_read else f"AWQ {version!r} in {bits!r} bits is not read: 'gemm' in 4 bits is"
    if method == "fp8":
        block = settings.get("weight_block_size")
        is_read = isinstance(block, list) and len(block) == 2 and all(type(size) is int and size > 0 for size in block)
        return "FP8 in blocks", None if is_read else "FP8 without weight_block_size, two sizes, is not read"
    return "", f"stored as {method or 'an unnamed method'!r}, which is not read; {known}"


def _stored_gguf(path: Path) -> Stored:
    found = [path] if path.is_file() else sorted(path.glob("*.gguf"))
    if len(found) > 1:
        names = ", ".join(file.name for file in found[:4]) + (", ..." if len(found) > 4 else "")
        raise UserError(Problem(str(path), f"holds {len(found)} .gguf files ({names}); name one of them"))
    beside = sorted(
        file
        for file in found[0].parent.iterdir()
        if file.is_file() and any(fnmatch(file.name, pattern) for pattern in BESIDE_GGUF)
    )
    return Stored(found[0], "GGUF", (found[0], *beside))


def _root() -> Path:
    return cache_folder() / "unquantised"


def _look_of(stored: Stored) -> list[tuple[object, ...]]:
    """What changes when a file does; no program can set the last time."""
    states = [(str(file.resolve()), file.stat()) for file in stored.files]
    return [(path, state.st_size, state.st_ino, state.st_mtime_ns, state.st_ctime_ns) for path, state in states]


def _digest(value: Any) -> str:
    return sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:32]


def _in_child(part: str, stored: Stored, target: Path) -> None:
    """In a child, so that this process never imports torch, and gives back what memory the work took."""
    target.parent.mkdir(parents=True, exist_ok=True)
    hashes = json.dumps(weight_sha256(stored.files) if part == "weights" else {})
    arguments = [str(PARENT), part, str(stored.path), str(target), hashes, hand_over_to_child()]
    command = [sys.executable, "-P", "-c", START, *arguments]  # -P: no module of the current folder is imported
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode < 0:
        message = (
            f"the process that unquantises it was ended by signal {-done.returncode}; if memory ran out, free some"
        )
        raise OutOfMemoryError(Problem(str(stored.path), message))
    answer: dict[str, Any] = (
        json.loads(done.stdout.splitlines()[-1]) if done.stdout.strip() else {"code": 1, "problems": []}
    )
    if answer["code"]:
        problems = [Problem(each["where"], each["message"]) for each in answer["problems"]]
        unknown = Problem(str(stored.path), "cannot be unquantised, for the reason above; a bug, please report it")
        raise ERRORS.get(answer["code"], UserError)(problems or [unknown])
