"""Read a base without its weights: a name or folder in; config, tensor shapes, tokenizer and template out. No torch."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import struct
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from finetune.errors import Problem, UserError
from finetune.machine import cache_folder

if TYPE_CHECKING:
    from tokenizers import Tokenizer

ASSETS = Path(__file__).parent / "assets"
TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "special_tokens_map.json")
# Tokenizer classes that transformers loads from tokenizer.json as it is; all others are rebuilt by AutoTokenizer.
PLAIN_TOKENIZER_CLASS = "PreTrainedTokenizerFast"
PLAIN_TOKENIZER_CLASSES = {PLAIN_TOKENIZER_CLASS, "TokenizersBackend"}
BYTES_PER_ELEMENT = {"F64": 8, "F32": 4, "BF16": 2, "F16": 2, "I64": 8, "I32": 4, "I8": 1, "U8": 1, "BOOL": 1}
BYTES_PER_ELEMENT |= {"I16": 2, "U16": 2, "U32": 4, "U64": 8, "F8_E4M3": 1, "F8_E5M2": 1}


@dataclass(frozen=True)
class TensorEntry:
    """One stored tensor: where it lies, its safetensors dtype name and its shape."""

    name: str
    file: Path
    dtype: str
    shape: tuple[int, ...]

    @property
    def elements(self) -> int:
        count = 1
        for size in self.shape:
            count *= size
        return count

    @property
    def bytes(self) -> int:
        return self.elements * BYTES_PER_ELEMENT[self.dtype]


@dataclass(frozen=True)
class LinearShape:
    """A linear module that an adapter can target: its full module path and its weight's shape."""

    module: str  # e.g. model.layers.0.self_attn.q_proj
    out_features: int
    in_features: int

    @property
    def leaf(self) -> str:
        return self.module.rsplit(".", 1)[-1]


@dataclass(frozen=True)
class BaseFacts:
    """What a plan needs to know of a base; plain values only."""

    base: str  # as the recipe writes it
    revision: str | None
    folder: Path
    model_type: str
    layers: int
    hidden_size: int
    vocabulary: int
    context_tokens: int
    tied_embeddings: bool
    stored_dtype: str  # safetensors name: BF16, F16, F32
    parameters: int
    stored_bytes: int
    linears: tuple[LinearShape, ...]
    isolates_by_documents: bool  # plain causal attention in every layer: documents can be attended one by one


@dataclass(frozen=True)
class Base:
    """A base as text sees it: facts, tokenizer and the strings its template may use."""

    facts: BaseFacts
    tokenizer_folder: Path
    bos_token: str | None
    eos_token: str | None
    chat_template: str | None = field(repr=False)

    @cached_property
    def tokenizer(self) -> Tokenizer:
        """The tokenizer, read when it is first asked for: labelled rows that are cached need none."""
        return load_tokenizer(self.tokenizer_folder / "tokenizer.json")

    @cached_property
    def special_tokens(self) -> dict[str, int]:
        """The control tokens and their ids, read without loading the tokenizer.

        Raises:
            UserError: the tokenizer's file is damaged.
        """
        file = self.tokenizer_folder / "tokenizer.json"
        try:
            text = file.read_text(encoding="utf-8")
            # The list stands before the vocabulary, which takes a hundred times as long to read.
            start = text.index("[", text.index('"added_tokens"'))
            added, _ = json.JSONDecoder().raw_decode(text, start)
            return {token["content"]: token["id"] for token in added if token["special"]}
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise UserError(Problem(str(file), f"the tokenizer cannot be read: {_first_line(error)}")) from error

    def token_id(self, token: str) -> int:
        token_id = self.tokenizer.token_to_id(token)
        if token_id is None:
            raise UserError(Problem(str(self.tokenizer_folder), f"the tokenizer has no token {token!r}"))
        return token_id


def read_base(base: str, *, revision: str | None = None) -> Base:
    """Facts, tokenizer and template of a base.

    Raises:
        UserError: no such base, no weights in safetensors form, or a config or tokenizer that cannot be read.
    """
    folder = find_base_folder(base, revision=revision)
    config = _read_json(folder / "config.json")
    tensors = list(read_tensor_entries(folder))
    tokenizer_folder = _plain_tokenizer_folder(folder)
    settings = _read_json(tokenizer_folder / "tokenizer_config.json")
    return Base(
        facts=_facts(base, revision, folder, config, tensors),
        tokenizer_folder=tokenizer_folder,
        bos_token=_token_text(settings.get("bos_token")),
        eos_token=_token_text(settings.get("eos_token")),
        chat_template=read_chat_template(tokenizer_folder),
    )


def find_base_folder(base: str, *, revision: str | None = None) -> Path:
    """The folder that holds a base: one of ours, a path, or a hub id (downloaded if it is not cached yet)."""
    if base.startswith("builtin:"):
        folder = ASSETS / base.removeprefix("builtin:")
        known = sorted(path.parent.name for path in ASSETS.glob("*/config.json"))
        if base.removeprefix("builtin:") not in known:
            there = ", ".join(f"builtin:{name}" for name in known)
            raise UserError(Problem("model.base", f"no builtin base {base!r}; there are: {there}"))
        return folder
    path = Path(base).expanduser()
    if base.startswith((".", "/", "~")) or path.exists():
        if not path.exists():
            raise UserError(Problem(base, "no such folder; correct the path, or give a hub id or builtin:NAME"))
        if not (path / "config.json").is_file():
            raise UserError(Problem(base, "not a base folder: it has no config.json; give a folder or a hub id"))
        return path
    return _hub_folder(base, revision)


def _hub_folder(base: str, revision: str | None) -> Path:
    import huggingface_hub
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

    wanted = ["*.json", "*.safetensors", "tokenizer.model", "*.jinja", "LICENSE*", "README.md"]
    try:
        folder = huggingface_hub.snapshot_download(base, revision=revision, allow_patterns=wanted)
    except HFValidationError as error:
        raise UserError(Problem("model.base", f"{base!r} is neither a folder nor a hub id")) from error
    except LocalEntryNotFoundError as error:
        message = f"{base!r} is not a folder here, not in the hub cache, and the hub cannot be reached; give a folder"
        raise UserError(Problem("model.base", message)) from error
    except (OSError, huggingface_hub.errors.HfHubHTTPError) as error:
        raise UserError(Problem("model.base", f"{base!r} could not be fetched: {_first_line(error)}")) from error
    return Path(folder)


def read_tensor_entries(folder: Path) -> Iterator[TensorEntry]:
    """Every stored tensor of a model folder, from the safetensors headers alone, in stored order.

    Raises:
        UserError: there is no safetensors file, a shard of the index is missing, or a header is damaged.
    """
    for file in weight_files(folder):
        header = _safetensors_header(file)
        for name, entry in header.items():
            if name != "__metadata__":
                yield TensorEntry(name, file, entry["dtype"], tuple(entry["shape"]))


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a model folder, in name order."""
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        names = _shard_names(index)
    else:
        names = ["model.safetensors"]
    missing = [name for name in names if not (folder / name).is_file()]
    if missing:
        others = sorted(path.name for path in folder.glob("*.bin"))
        hint = f" ({others[0]} is a pickle, which is never opened)" if others else ""
        cure = "; put the base's .safetensors files there, or name another base"
        raise UserError(Problem(str(folder), f"no weights: {', '.join(missing)} is missing{hint}{cure}"))
    return [folder / name for name in names]


def _shard_names(index: Path) -> list[str]:
    shard_of = _read_json(index).get("weight_map")
    if not isinstance(shard_of, dict) or not shard_of:
        raise UserError(Problem(str(index), "holds no weight_map, so the shards are not known; fetch the file again"))
    return sorted({str(name) for name in shard_of.values()})


def load_tokenizer(path: Path) -> Tokenizer:
    """A tokenizer from its tokenizer.json.

    Raises:
        UserError: the file is damaged.
    """
    from tokenizers import Tokenizer  # only now: where the rows are cached, nothing is tokenised

    try:
        return Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises bare Exception
        raise UserError(Problem(str(path), f"the tokenizer cannot be read: {_first_line(error)}")) from error


def read_chat_template(tokenizer_folder: Path) -> str | None:
    """The base's own chat template (Jinja source), or None."""
    file = tokenizer_folder / "chat_template.jinja"
    if file.is_file():
        return file.read_text(encoding="utf-8")
    template = _read_json(tokenizer_folder / "tokenizer_config.json").get("chat_template")
    if isinstance(template, list):  # several named templates: the default one is for chatting
        template = next((entry["template"] for entry in template if entry["name"] == "default"), None)
    return template


def sha256_of(*files: Path) -> str:
    """One sha256 (hex) over the bytes of the files, in order."""
    digest = hashlib.sha256()
    for file in files:
        with file.open("rb") as stream:
            while block := stream.read(1 << 20):
                digest.update(block)
    return digest.hexdigest()


def convert_tokenizer(source: Path, target: Path) -> None:
    """Write the tokenizer of `source` as AutoTokenizer loads it, in tokenizer.json form. Imports transformers."""
    from transformers import AutoTokenizer

    AutoTokenizer.from_pretrained(str(source)).save_pretrained(str(target))
    # transformers 5.23 does not save `legacy` of a LlamaTokenizer (models/llama/tokenization_llama.py) and would
    # rebuild another tokenizer from what it saved: Llama 2's `<s>[INST]` would get other ids. As a plain tokenizer it
    # is loaded as it stands in tokenizer.json.
    settings = _read_json(target / "tokenizer_config.json") | {"tokenizer_class": PLAIN_TOKENIZER_CLASS}
    (target / "tokenizer_config.json").write_text(json.dumps(settings, indent=2, ensure_ascii=False), encoding="utf-8")


def _plain_tokenizer_folder(folder: Path) -> Path:
    """A folder whose tokenizer.json is exactly what AutoTokenizer would load; converted once and cached if needed."""
    settings = _read_json(folder / "tokenizer_config.json")
    kind = str(settings.get("tokenizer_class", ""))
    if (folder / "tokenizer.json").is_file() and kind in PLAIN_TOKENIZER_CLASSES:
        return folder
    files = [folder / name for name in TOKENIZER_FILES if (folder / name).is_file()]
    if not {"tokenizer.json", "tokenizer.model"} & {file.name for file in files}:
        raise UserError(Problem(str(folder), "no tokenizer: neither tokenizer.json nor tokenizer.model is there"))
    target = cache_folder() / "tokenizers" / f"{sha256_of(*files)[:32]}-plain"
    if not (target / "tokenizer.json").is_file():
        _convert_in_child(folder, target)
    return target


def _convert_in_child(folder: Path, target: Path) -> None:
    # In a child, so that this process never imports torch; renamed, so that a killed conversion leaves no half cache.
    staging = target.with_name(f"{target.name}.{os.getpid()}.partial")
    command = [sys.executable, "-c", "import sys, pathlib, finetune.base as base; base.convert_tokenizer("]
    command[-1] += "pathlib.Path(sys.argv[1]), pathlib.Path(sys.argv[2]))"
    answer = subprocess.run([*command, str(folder), str(staging)], capture_output=True, text=True, check=False)
    if answer.returncode:
        shutil.rmtree(staging, ignore_errors=True)
        reason = answer.stderr.strip().splitlines()[-1:] or ["no reason given"]
        raise UserError(Problem(str(folder), f"the tokenizer cannot be converted: {reason[0]}"))
    target.parent.mkdir(parents=True, exist_ok=True)
    if not target.exists():
        staging.rename(target)


def _facts(
    base: str, revision: str | None, folder: Path, config: dict[str, Any], tensors: list[TensorEntry]
) -> BaseFacts:
    text = config.get("text_config", config)
    missing = [key for key in ("num_hidden_layers", "hidden_size", "vocab_size") if not isinstance(text.get(key), int)]
    if missing:
        message = f"not the config of a language model: {', '.join(missing)} is missing; name another base"
        raise UserError(Problem(str(folder / "config.json"), message))
    dtypes = sorted({tensor.dtype for tensor in tensors}, key=lambda dtype: -sum(t.dtype == dtype for t in tensors))
    return BaseFacts(
        base=base,
        revision=revision,
        folder=folder.absolute(),  # found again from any current folder
        model_type=str(config.get("model_type", "?")),
        layers=int(text["num_hidden_layers"]),
        hidden_size=int(text["hidden_size"]),
        vocabulary=int(text["vocab_size"]),
        context_tokens=int(text.get("max_position_embeddings", 2048)),
        tied_embeddings=not any(tensor.name.endswith("lm_head.weight") for tensor in tensors),
        stored_dtype=dtypes[0],
        parameters=sum(tensor.elements for tensor in tensors),
        stored_bytes=sum(tensor.bytes for tensor in tensors),
        linears=tuple(_linear_shapes(tensors)),
        isolates_by_documents=not any(
            text.get(key) for key in ("sliding_window", "attn_logit_softcapping", "attention_chunk_size")
        ),
    )


def _linear_shapes(tensors: list[TensorEntry]) -> Iterator[LinearShape]:
    """The 2-D weights inside the decoder layers; embeddings and the head lie outside, norms have one dimension."""
    for tensor in tensors:
        if len(tensor.shape) == 2 and ".layers." in tensor.name and tensor.name.endswith(".weight"):
            yield LinearShape(tensor.name.removesuffix(".weight"), *tensor.shape)


def _safetensors_header(file: Path) -> dict[str, Any]:
    try:
        with file.open("rb") as stream:
            (length,) = struct.unpack("<Q", stream.read(8))
            if length > file.stat().st_size:
                raise ValueError("the header is longer than the file")
            header = json.loads(stream.read(length))
            unknown = {entry["dtype"] for key, entry in header.items() if key != "__metadata__"} - set(
                BYTES_PER_ELEMENT
            )
            if unknown:
                raise ValueError(f"unknown element type {', '.join(sorted(unknown))}")
            end = 8 + length + max((entry["data_offsets"][1] for k, entry in header.items() if k != "__metadata__"))
            if end != file.stat().st_size:
                raise ValueError(f"{end} bytes expected, {file.stat().st_size} found")
            return header
    except (struct.error, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(Problem(str(file), f"damaged or incomplete weights ({error}); fetch the file again")) from error


def _read_json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise UserError(Problem(str(path.parent), f"not a complete base: {path.name} is missing"))
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(Problem(str(path), f"invalid JSON: {error}; fetch the file again")) from error
    if not isinstance(values, dict):
        raise UserError(Problem(str(path), f"must hold a JSON object, got {type(values).__name__}; fetch it again"))
    return values


def _token_text(token: Any) -> str | None:
    return token["content"] if isinstance(token, dict) else token


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
