"""Read a base without its weights: a name or folder in; config, tensor shapes, tokenizer and template out. No torch."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import struct
import subprocess
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from finetune.errors import Problem, StorageError, UserError
from finetune.families import VISION
from finetune.fetch import fetch, local_folder, remote_tensors
from finetune.machine import cache_folder
from finetune.quantised_base import facts_folder, find_stored, is_gguf, listed_tensors, ordinary_folder
from finetune.trust import allowed_commit, check_foreign_code, hand_over_to_child, is_trusted, take_over

if TYPE_CHECKING:
    from tokenizers import Tokenizer

ASSETS = Path(__file__).parent / "assets"
TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "special_tokens_map.json")
# Tokenizer classes that transformers loads from tokenizer.json as it is; all others are rebuilt by AutoTokenizer.
PLAIN_TOKENIZER_CLASS = "PreTrainedTokenizerFast"
PLAIN_TOKENIZER_CLASSES = {PLAIN_TOKENIZER_CLASS, "TokenizersBackend"}
PACKAGE_PARENT = Path(__file__).resolve().parents[1]
CONVERT = "import sys; sys.path.insert(0, sys.argv.pop(1)); "
CONVERT += "from finetune.base import convert_in_child; convert_in_child(*sys.argv[1:])"
# Model types whose tokenizer transformers rebuilds from the vocabulary whatever class is declared
# (models/auto/tokenization_auto.py, MODELS_WITH_INCORRECT_HUB_TOKENIZER_CLASS).
REBUILT_TOKENIZERS = {"qwen2", "qwen3_5", "qwen3_5_moe", "qwen3_5_moe_text", "qwen4_exp", "siglip2"}
REBUILT_TOKENIZERS |= {"hyperclovax_vision_v2"}
EXPERT_BLOCK = 64  # values that share a scale in 4 bits
MOST_OF_ANYTHING = 1 << 31  # layers, sizes, tokens
LONGEST_HEADER = 100_000_000  # bytes, as the safetensors library has it
BYTES_PER_ELEMENT = {"F64": 8, "F32": 4, "BF16": 2, "F16": 2, "I64": 8, "I32": 4, "I8": 1, "U8": 1, "BOOL": 1}
BYTES_PER_ELEMENT |= {"I16": 2, "U16": 2, "U32": 4, "U64": 8, "F8_E4M3": 1, "F8_E5M2": 1}


@dataclass(frozen=True)
class TensorEntry:
    """One stored tensor: where it lies, its safetensors dtype name and its shape."""

    name: str
    file: Path
    dtype: str
    shape: tuple[int, ...]
    start: int = 0  # of its bytes in the file

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
class ExpertShape:
    """All experts of a layer, which transformers holds as one parameter [experts, out, in], however files hold it."""

    parameter: str  # e.g. model.layers.0.mlp.experts.gate_up_proj
    experts: int
    out_features: int
    in_features: int


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
    experts: tuple[ExpertShape, ...] = ()
    image_layers: tuple[int, ...] = ()  # that attend to an image: rows of text pass them by (Llama 3.2 vision)
    has_vision: bool = False  # a tower beside the language model, which is neither quantised nor adapted
    active_experts: int = 0  # of a layer, that a token passes; 0: there are none, or the config does not say


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

    def token_ids(self, tokens: Iterable[str]) -> dict[str, int | None]:
        """The id of each token, None where the tokenizer has no such token."""
        return {token: self.tokenizer.token_to_id(token) for token in tokens}

    def token_id(self, token: str) -> int:
        token_id = self.tokenizer.token_to_id(token)
        if token_id is None:
            raise UserError(Problem(str(self.tokenizer_folder), f"the tokenizer has no token {token!r}"))
        return token_id


def read_base(base: str, *, revision: str | None = None, weights: bool = True, as_stored: bool = False) -> Base:
    """Facts, tokenizer and template of a base, which is fetched if it is not here; without `weights` all but these.

    One that is stored quantised is what its values are in 16 bits (finetune/quantised_base.py), unless it is taken
    `as_stored`.

    Raises:
        UserError: no such base, no weights in safetensors form, a config or tokenizer that cannot be read, or one that
            asks for foreign code.
    """
    if weights or is_here(base, revision=revision):
        folder, tensors = _folder_and_tensors(base, revision, weights=weights, as_stored=as_stored)
    else:
        fetched = fetch(base, revision=revision, weights=False, tell=_tell)
        folder = fetched.folder
        if find_stored(folder):  # its shapes are in its weights
            message = "is stored quantised, so that a plan needs its weights; run `finetune fetch` for it first"
            raise UserError(Problem(base, message))
        remote = remote_tensors(base, fetched.commit)
        tensors = [TensorEntry(name, folder, dtype, shape) for name, dtype, shape in remote]
    config = _read_json(folder / "config.json")
    check_foreign_code(base, folder)
    tokenizer_folder = _plain_tokenizer_folder(folder, model_type=str(config.get("model_type", "?")))
    settings = _read_json(tokenizer_folder / "tokenizer_config.json")
    return Base(
        facts=_facts(base, revision, folder, config, tensors),
        tokenizer_folder=tokenizer_folder,
        bos_token=_token_text(tokenizer_folder, settings, "bos_token"),
        eos_token=_token_text(tokenizer_folder, settings, "eos_token"),
        chat_template=read_chat_template(tokenizer_folder),
    )


def _folder_and_tensors(
    base: str, revision: str | None, *, weights: bool, as_stored: bool
) -> tuple[Path, list[TensorEntry]]:
    if not (weights or as_stored) and (stored := find_stored(path := _path_of(base, revision))):
        check_foreign_code(base, path)
        folder = facts_folder(stored)
        return folder, [TensorEntry(name, folder, dtype, shape) for name, dtype, shape in listed_tensors(folder)]
    folder = _path_of(base, revision) if as_stored else find_base_folder(base, revision=revision)
    return folder, list(read_tensor_entries(folder))


def find_base_folder(base: str, *, revision: str | None = None) -> Path:
    """The folder that holds a base in 16 or 32 bits: one of ours, a path, or a hub id (fetched if it is not here).

    Of a base that is stored quantised it is the folder in the cache with its values, made if it is not there.
    """
    path = _path_of(base, revision)
    if stored := find_stored(path):
        check_foreign_code(base, path)
        return ordinary_folder(stored)
    return path


def _path_of(base: str, revision: str | None) -> Path:
    """Where a base lies, in whatever form."""
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
        if not ((path / "config.json").is_file() or is_gguf(path)):
            message = "not a base folder: it has no config.json, nor one .gguf file; give a folder or a hub id"
            raise UserError(Problem(base, message))
        return path
    return _hub_folder(base, revision)


def is_here(base: str, *, revision: str | None = None) -> bool:
    """Whether a base is a folder, one of ours, or whole in the hub's cache; nothing is fetched."""
    if base.startswith(("builtin:", ".", "/", "~")) or Path(base).expanduser().exists():
        return True
    try:
        folder = local_folder(base, revision or allowed_commit(base))
    except UserError:
        return False
    return folder is not None and _is_whole(folder)


def _hub_folder(base: str, revision: str | None) -> Path:
    """What is whole in the hub's cache is taken as it is, without a look at the network; else it is fetched."""
    commit = allowed_commit(base)  # its code only at the commit that was allowed
    folder = local_folder(base, revision or commit)
    if folder is not None and _is_whole(folder) and not (commit and not list(folder.glob("*.py"))):
        return folder
    return fetch(base, revision=revision or commit, tell=_tell).folder


def _is_whole(folder: Path) -> bool:
    try:
        tokenizers = [folder / name for name in ("tokenizer.json", "tokenizer.model")]
        return bool(weight_files(folder)) and any(file.is_file() for file in tokenizers)
    except UserError:
        return False


def _tell(line: str) -> None:
    sys.stderr.write(f"fetching {line}\n")


def read_tensor_entries(folder: Path) -> Iterator[TensorEntry]:
    """Every stored tensor of a model folder, from the safetensors headers alone, in stored order.

    Raises:
        UserError: there is no safetensors file, or a shard of the index is missing.
        StorageError: a header is damaged, or does not agree with the file's size.
    """
    for file in weight_files(folder):
        yield from read_header(file)


def read_header(file: Path) -> list[TensorEntry]:
    """The tensors of one safetensors file, in stored order; they fill it from the header to its end without a gap.

    Raises:
        StorageError: the header is damaged, or does not agree with the file's size.
    """
    try:
        with file.open("rb") as stream:
            (length,) = struct.unpack("<Q", stream.read(8))
            if length > min(file.stat().st_size, LONGEST_HEADER):
                raise ValueError("the header is longer than the file, or than 100 MB")
            header = json.loads(stream.read(length))
        entries = {
            name: TensorEntry(name, file, entry["dtype"], tuple(entry["shape"]), 8 + length + entry["data_offsets"][0])
            for name, entry in header.items()
            if name != "__metadata__"
        }
        ends = {name: 8 + length + header[name]["data_offsets"][1] for name in entries}
        _refuse_overlaps(entries, ends, 8 + length, file.stat().st_size)
        return list(entries.values())
    except (struct.error, ValueError, KeyError, TypeError, AttributeError, IndexError, RecursionError) as error:
        message = f"damaged or incomplete weights ({error}); fetch the file again"
        raise StorageError(Problem(str(file), message)) from error


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
    names = sorted({str(name) for name in shard_of.values()})
    if outside := [name for name in names if not name or Path(name).name != name]:
        message = f"names a shard outside this folder: {outside[0]!r}; fetch the file again"
        raise UserError(Problem(str(index), message))
    return names


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
        named = [entry for entry in template if isinstance(entry, dict)]
        template = next((entry.get("template") for entry in named if entry.get("name") == "default"), None)
    if template is not None and not isinstance(template, str):
        message = f"chat_template: must be text, got {type(template).__name__}; correct it"
        raise UserError(Problem(str(tokenizer_folder / "tokenizer_config.json"), message))
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

    tokenizer = AutoTokenizer.from_pretrained(str(source), trust_remote_code=is_trusted(source))
    tokenizer.save_pretrained(str(target))
    # transformers 5.23 does not save `legacy` of a LlamaTokenizer (models/llama/tokenization_llama.py) and would
    # rebuild another tokenizer from what it saved: Llama 2's `<s>[INST]` would get other ids. As a plain tokenizer it
    # is loaded as it stands in tokenizer.json.
    settings = _read_json(target / "tokenizer_config.json") | {"tokenizer_class": PLAIN_TOKENIZER_CLASS}
    (target / "tokenizer_config.json").write_text(json.dumps(settings, indent=2, ensure_ascii=False), encoding="utf-8")


def convert_in_child(source: str, target: str, trusted: str) -> None:
    """convert_tokenizer, with the foreign code that the parent was allowed."""
    take_over(trusted)
    convert_tokenizer(Path(source), Path(target))


def _plain_tokenizer_folder(folder: Path, *, model_type: str) -> Path:
    """A folder whose tokenizer.json is exactly what AutoTokenizer would load; converted once and cached if needed."""
    settings = _read_json(folder / "tokenizer_config.json")
    kind = str(settings.get("tokenizer_class", ""))
    is_plain = kind in PLAIN_TOKENIZER_CLASSES and model_type not in REBUILT_TOKENIZERS
    if (folder / "tokenizer.json").is_file() and is_plain:
        return folder
    files = [folder / name for name in TOKENIZER_FILES if (folder / name).is_file()]
    if not {"tokenizer.json", "tokenizer.model"} & {file.name for file in files}:
        raise UserError(Problem(str(folder), "no tokenizer: neither tokenizer.json nor tokenizer.model is there"))
    target = cache_folder() / "tokenizers" / f"{sha256_of(*files)[:32]}-{model_type.replace('/', '-')}"
    if not (target / "tokenizer.json").is_file():
        _convert_in_child(folder, target)
    return target


def _convert_in_child(folder: Path, target: Path) -> None:
    # In a child, so that this process never imports torch; renamed, so that a killed conversion leaves no half cache.
    staging = target.with_name(f"{target.name}.{os.getpid()}.partial")
    arguments = [str(PACKAGE_PARENT), str(folder), str(staging), hand_over_to_child()]
    command = [sys.executable, "-P", "-c", CONVERT, *arguments]  # -P: no module of the current folder is imported
    answer = subprocess.run(command, capture_output=True, text=True, check=False)
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
    text = text if isinstance(text, dict) else {}
    missing = [key for key in ("num_hidden_layers", "hidden_size", "vocab_size") if not _is_count(text.get(key))]
    if missing:
        message = f"not the config of a language model: {', '.join(missing)} is missing; name another base"
        raise UserError(Problem(str(folder / "config.json"), message))
    context_tokens = text.get("max_position_embeddings", 2048)
    if not _is_count(context_tokens):
        message = f"max_position_embeddings: a count of tokens is needed, got {str(context_tokens)[:80]!r}; correct it"
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
        context_tokens=context_tokens,
        tied_embeddings=not any(tensor.name.endswith("lm_head.weight") for tensor in tensors),
        stored_dtype=dtypes[0],
        parameters=sum(tensor.elements for tensor in tensors),
        stored_bytes=sum(tensor.bytes for tensor in tensors),
        linears=tuple(_linear_shapes(tensors)),
        experts=tuple(_expert_shapes(tensors)),
        isolates_by_documents=not any(
            text.get(key) for key in ("sliding_window", "attn_logit_softcapping", "attention_chunk_size")
        ),
        image_layers=tuple(text.get("cross_attention_layers") or ()),
        has_vision=any(is_vision(tensor.name) for tensor in tensors),
        active_experts=int(text["num_experts_per_tok"]) if _is_count(text.get("num_experts_per_tok")) else 0,
    )


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 < value < MOST_OF_ANYTHING


def _linear_shapes(tensors: list[TensorEntry]) -> Iterator[LinearShape]:
    """The 2-D weights inside the decoder layers; embeddings and the head lie outside, norms have one dimension.

    A vision tower has layers, too; its linears stay as they are.

    The experts of a mixture and their router are no linear modules: transformers holds all experts of a layer as one
    parameter (models/mixtral/modeling_mixtral.py), which bitsandbytes leaves in 16 bits.
    """
    with_experts = {tensor.name.partition(".experts.")[0] for tensor in tensors if ".experts." in tensor.name}
    routers = {f"{module}.{router}.weight" for module in with_experts for router in ("gate", "router")}
    for tensor in tensors:
        if len(tensor.shape) != 2 or ".layers." not in tensor.name or not tensor.name.endswith(".weight"):
            continue
        if ".experts." not in tensor.name and tensor.name not in routers and not is_vision(tensor.name):
            yield LinearShape(tensor.name.removesuffix(".weight"), *tensor.shape)


def is_vision(name: str) -> bool:
    """Whether a tensor or module belongs to what sees images, by a part of its path."""
    return any(part in VISION for part in name.split("."))


def _expert_shapes(tensors: list[TensorEntry]) -> Iterator[ExpertShape]:
    """Fused parameters, from files that hold them whole or expert by expert (Mixtral's w1 and w3 lie in one, w2 apart).

    Whole ones may be stored [experts, in, out]: the sum of both, which counts an adapter's parameters, is the same.
    """
    rows: dict[str, dict[tuple[str, str], TensorEntry]] = {}
    for tensor in tensors:
        layer, found, rest = tensor.name.partition(".experts.")
        number, leaf = (rest.removesuffix(".weight").split(".") + [""])[:2]
        if not found or ".layers." not in layer or len(tensor.shape) != (2 if leaf else 3):
            continue
        if not leaf and number in ("gate_up_proj", "down_proj"):
            yield ExpertShape(f"{layer}.experts.{number}", *tensor.shape)
        elif leaf in ("w1", "w3", "gate_proj", "up_proj", "w2", "down_proj"):
            fused = "down_proj" if leaf in ("w2", "down_proj") else "gate_up_proj"
            rows.setdefault(f"{layer}.experts.{fused}", {})[number, leaf] = tensor
    for parameter, pieces in rows.items():
        count, width = len({number for number, _ in pieces}), next(iter(pieces.values())).shape[1]
        yield ExpertShape(parameter, count, sum(piece.shape[0] for piece in pieces.values()) // count, width)


def is_quantizable_expert(tensor: TensorEntry) -> bool:
    """Whether a stored tensor is an expert's matrix, or all experts' of a layer, whose rows are whole 4-bit blocks.

    Where they are not, bitsandbytes' CPU code takes another value's scale (backends/cpu/ops.py, dequantize_4bit).
    """
    is_expert = bool(list(_expert_shapes([tensor]))) and not is_vision(tensor.name)
    return is_expert and tensor.shape[-1] % EXPERT_BLOCK == 0


def _refuse_overlaps(entries: dict[str, TensorEntry], ends: dict[str, int], first: int, size: int) -> None:
    """The format allows neither holes nor overlaps (huggingface.co/docs/safetensors, "Format")."""
    if not entries:
        raise ValueError("it holds no tensor")
    unknown = {entry.dtype for entry in entries.values()} - set(BYTES_PER_ELEMENT)
    if unknown:
        raise ValueError(f"unknown element type {', '.join(sorted(unknown))}")
    end = max(ends.values())
    if end != size:
        raise ValueError(f"{end} bytes expected, {size} found")
    position = first
    for entry in sorted(entries.values(), key=lambda entry: (entry.start, ends[entry.name])):
        if any(not isinstance(count, int) or count < 0 for count in (*entry.shape, entry.start)):
            raise ValueError(f"{entry.name} has a size that is no count")
        if entry.start != position:
            raise ValueError(f"{entry.name} does not begin where the tensor before it ends")
        position = ends[entry.name]
        if position - entry.start != entry.bytes:
            raise ValueError(f"{entry.name} has {position - entry.start} bytes, its shape needs {entry.bytes}")


def _read_json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise UserError(Problem(str(path.parent), f"not a complete base: {path.name} is missing"))
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise UserError(Problem(str(path), f"invalid JSON: {_first_line(error)}; fetch the file again")) from error
    if not isinstance(values, dict):
        raise UserError(Problem(str(path), f"must hold a JSON object, got {type(values).__name__}; fetch it again"))
    return values


def _token_text(folder: Path, settings: dict[str, Any], name: str) -> str | None:
    token = settings.get(name)
    text = token.get("content") if isinstance(token, dict) else token
    if token is not None and not isinstance(text, str):
        message = f"{name}: must be a token's text, got {str(token)[:80]!r}; correct it"
        raise UserError(Problem(str(folder / "tokenizer_config.json"), message))
    return text


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
