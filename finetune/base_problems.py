"""What is wrong with a base or a starting adapter and would be seen only late: files in, problems out. No torch.

What no base can be read with is refused by finetune/base.py; this is what can be read and would go wrong later.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np

from finetune.base import Base, TensorEntry, read_header, read_tensor_entries, weight_files
from finetune.errors import Problem, StorageError, UserError
from finetune.machine import cache_folder

# Types of rotary positions that transformers computes (modeling_rope_utils.py, ROPE_INIT_FUNCTIONS), `su` an old name.
ROPE_TYPES = {"default", "linear", "dynamic", "yarn", "longrope", "su", "llama3", "proportional", "mrope"}
TRAINABLE = {"F32", "F16", "BF16"}
# A number that is infinite or NaN has all bits of its exponent set.
EXPONENTS = {"F32": (np.uint32, 0x7F800000), "F16": (np.uint16, 0x7C00), "BF16": (np.uint16, 0x7F80)}
BYTES_AT_ONCE = 1 << 22
CONTROLS = ("bos_token", "eos_token", "pad_token", "unk_token")


def find_base_problems(base: Base) -> list[Problem]:
    """Everything that is wrong with a base's config, tokenizer and weights; each weight is read once."""
    folder = base.facts.folder
    config = _json(folder / "config.json")
    entries = list(read_tensor_entries(folder))
    return [
        *_config_problems(folder / "config.json", config),
        *_head_problems(folder, config, entries),
        *_token_problems(base),
        *_generation_problems(folder, base.facts.vocabulary),
        *_dtype_problems(base, entries),
        *_infinite_weights(folder),
    ]


def find_adapter_problems(start_from: Path, base: Base) -> list[Problem]:
    """Tensors of an adapter to start from that this base has no place for, or another one."""
    file = start_from / "adapter_model.safetensors"
    if not file.is_file():
        return []  # told where the plan is made
    try:
        entries = read_header(file)
    except (UserError, StorageError) as error:
        return list(error.problems)
    places = {linear.module: linear for linear in base.facts.linears}
    problems = []
    for entry in entries:
        module, _, part = entry.name.removeprefix("base_model.model.").partition(".lora_")
        if part not in ("A.weight", "B.weight"):
            continue
        linear = places.get(module)
        if linear is None:
            problems.append(f"holds weights for {module}, which {base.facts.base} does not have")
        else:
            found, needed = (
                (entry.shape[1], linear.in_features) if part[0] == "A" else (entry.shape[0], linear.out_features)
            )
            if found != needed:
                problems.append(f"{entry.name} is {found} wide, {module} of {base.facts.base} is {needed}")
    if not problems:
        return []
    more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
    return [Problem("adapter.from", f"{start_from} {problems[0]}{more}; name an adapter of this very base, or none")]


def _config_problems(file: Path, config: Mapping[str, Any]) -> Iterator[Problem]:
    text = config["text_config"] if isinstance(config.get("text_config"), dict) else config
    for key in ("rope_scaling", "rope_parameters"):
        given = text.get(key)
        nested = [given, *given.values()] if isinstance(given, dict) else []
        for value in nested:
            kind = value.get("rope_type", value.get("type")) if isinstance(value, dict) else None
            if kind is not None and kind not in ROPE_TYPES:
                known = ", ".join(sorted(ROPE_TYPES))
                message = f"{key}: {kind!r} is no kind of rotary positions that transformers knows, which are {known}"
                yield Problem(str(file), f"{message}; fetch the base's own config.json")


def _head_problems(folder: Path, config: Mapping[str, Any], entries: list[TensorEntry]) -> Iterator[Problem]:
    """The head and what config.json says of it: transformers believes the config."""
    head = next((entry for entry in entries if entry.name.endswith("lm_head.weight")), None)
    embedding = next((entry for entry in entries if entry.name.endswith("embed_tokens.weight")), None)
    tied = config.get("tie_word_embeddings")
    where = str(folder / "config.json")
    if tied is False and head is None and embedding is not None:
        message = "tie_word_embeddings is false, but no lm_head.weight is stored: the head would be random numbers; "
        yield Problem(where, message + "write true if the embedding is the head, else fetch the base again")
    elif tied is True and head is not None and embedding is not None and _digest(head) != _digest(embedding):
        message = f"tie_word_embeddings is true, but another head is stored ({head.name} of {head.file.name}), which "
        yield Problem(where, message + "would be left out; write false, or fetch the base's own config.json")


def _token_problems(base: Base) -> Iterator[Problem]:
    settings = _json(base.tokenizer_folder / "tokenizer_config.json")
    for name in CONTROLS:
        token = settings.get(name)
        text = token.get("content") if isinstance(token, dict) else token
        if not isinstance(text, str):
            continue
        known = base.special_tokens  # read without loading the tokenizer
        token_id = known[text] if text in known else base.tokenizer.token_to_id(text)
        where = str(base.facts.folder / "tokenizer_config.json")
        if token_id is None:
            message = f"{name}: {text!r} is not one token of the tokenizer; write one that is, or fetch the file again"
            yield Problem(where, message)
        elif token_id >= base.facts.vocabulary:
            message = f"{name}: {text!r} is token {token_id}, the base has {base.facts.vocabulary} embeddings"
            yield Problem(where, f"{message}; name a token that it has, or fetch its own tokenizer")


def _generation_problems(folder: Path, vocabulary: int) -> Iterator[Problem]:
    file = folder / "generation_config.json"
    if not file.is_file():
        return
    try:
        values = _json(file)
    except ValueError:
        yield Problem(str(file), "is no JSON object; fetch the file again, or delete it")
        return
    for key in ("bos_token_id", "eos_token_id", "pad_token_id"):
        given = values.get(key)
        for token_id in given if isinstance(given, list) else [given]:
            known = token_id is None or (type(token_id) is int and -1 <= token_id < vocabulary)
            if not known:
                message = (
                    f"{key}: {token_id!r} is none of the base's {vocabulary} tokens; correct it, or delete the key"
                )
                yield Problem(str(file), message)


def _dtype_problems(base: Base, entries: list[TensorEntry]) -> Iterator[Problem]:
    modules = {f"{linear.module}.weight" for linear in base.facts.linears}
    kinds = sorted({entry.dtype for entry in entries if entry.name in modules} - TRAINABLE)
    if kinds:
        message = f"its weights are stored in {', '.join(kinds)}, quantised already; an adapter is merged into weights "
        yield Problem(str(base.facts.folder), message + f"in {', '.join(sorted(TRAINABLE))}: name the base before that")


def _infinite_weights(folder: Path) -> Iterator[Problem]:
    """Weights that are NaN or infinite; a file that was found sound is not read again until it changes."""
    for file in weight_files(folder):
        state = file.stat()
        known = sha256(f"{file.resolve()}\n{state.st_size}\n{state.st_mtime_ns}".encode()).hexdigest()[:40]
        entry = cache_folder() / "bases" / known
        if entry.is_file():
            continue
        wrong = [(tensor.name, count) for tensor in read_header(file) if (count := _count_infinite(tensor))]
        if wrong:
            name, count = wrong[0]
            more = f", and {len(wrong) - 1} more tensors" if len(wrong) > 1 else ""
            message = f"{name} has {count:,} weights that are NaN or infinite{more}; fetch the file again"
            yield Problem(str(file), message)
        else:
            entry.parent.mkdir(parents=True, exist_ok=True)
            entry.touch()


def _count_infinite(entry: TensorEntry) -> int:
    if entry.dtype not in EXPONENTS:
        return 0
    kind, exponent = EXPONENTS[entry.dtype]
    mask = kind(exponent)
    count = 0
    for block in _blocks(entry):
        bits = np.frombuffer(block, kind)
        count += int(np.count_nonzero((bits & mask) == mask))
    return count


def _digest(entry: TensorEntry) -> str:
    digest = sha256(entry.dtype.encode())
    for block in _blocks(entry):
        digest.update(block)
    return digest.hexdigest()


def _blocks(entry: TensorEntry) -> Iterator[bytes]:
    left = entry.bytes
    with entry.file.open("rb") as stream:
        stream.seek(entry.start)
        while left and (block := stream.read(min(left, BYTES_AT_ONCE))):
            left -= len(block)
            yield block


def _json(file: Path) -> dict[str, Any]:
    values = json.loads(file.read_text(encoding="utf-8"))
    if not isinstance(values, dict):
        raise ValueError(file)
    return values
