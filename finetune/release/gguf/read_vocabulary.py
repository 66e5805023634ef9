"""The tokenizer of a GGUF file: header fields in, tokenizer.json and tokenizer_config.json out.

What vocabulary.py writes, the other way round: it gives the ids that llama.cpp does.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from gguf import TokenType

from finetune.errors import Problem, UserError
from finetune.release.gguf.pre_tokenizer import GPT2_SPLIT, SPACE, SPLITS

ALIASES = {"llama-v3": "llama-bpe", "llama3": "llama-bpe", "gpt2": "gpt-2"}
ADDED = {int(TokenType.CONTROL), int(TokenType.USER_DEFINED)}
HELD = ADDED | {int(TokenType.NORMAL), int(TokenType.BYTE), int(TokenType.UNKNOWN)}
PREFIX = "tokenizer.ggml.add_space_prefix"
CURE = "put the tokenizer of its base (tokenizer.json, tokenizer_config.json) beside it"
NAMES = {"bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding"}


def tokenizer_files(file: Path, fields: Mapping[str, Any]) -> dict[str, str]:
    """Name and text of the tokenizer's files, the chat template among them.

    Raises:
        UserError: the header says too little of how text is cut; a tokenizer has to lie beside the file.
    """
    texts, types = tokens_of(file, fields)
    special = special_tokens(fields, texts)
    kind = fields.get("tokenizer.ggml.model")
    if kind == "gpt2":
        parts = _byte_level(file, fields, texts, types)
    elif kind == "llama":
        parts = _sentencepiece(file, fields, texts, types, special)
    else:
        raise UserError(Problem(str(file), f"its tokenizer is a {kind!r}; read are 'gpt2' and 'llama'; {CURE}"))
    added = [
        {"id": number, "content": _content(texts[number], kind), **_PLAIN, "special": held == int(TokenType.CONTROL)}
        for number, held in enumerate(types)
        if held in ADDED
    ]
    adds_bos = bool(fields.get("tokenizer.ggml.add_bos_token", kind == "llama")) and "bos" in special
    processor = _bos_first(special["bos"], texts.index(special["bos"])) if adds_bos else None
    head = {"version": "1.0", "truncation": None, "padding": None, "added_tokens": added}
    settings: dict[str, Any] = {f"{name}_token": text for name, text in special.items()}
    settings |= {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}
    files = {
        "tokenizer.json": json.dumps({**head, **parts, "post_processor": processor}, ensure_ascii=False),
        "tokenizer_config.json": json.dumps(settings, indent=2, ensure_ascii=False),
    }
    return files | template_file(fields)


def template_file(fields: Mapping[str, Any]) -> dict[str, str]:
    """The chat template as a file, where there is one."""
    template = fields.get("tokenizer.chat_template")
    return {"chat_template.jinja": template} if isinstance(template, str) else {}


def tokens_of(file: Path, fields: Mapping[str, Any]) -> tuple[Sequence[str], Sequence[int]]:
    """Text and type of every row of the embedding."""
    texts = fields.get("tokenizer.ggml.tokens")
    if not isinstance(texts, list):
        raise UserError(Problem(str(file), f"holds no tokenizer; {CURE}"))
    types = fields.get("tokenizer.ggml.token_type") or [int(TokenType.NORMAL)] * len(texts)
    return texts, types


def special_tokens(fields: Mapping[str, Any], texts: Sequence[str]) -> dict[str, str]:
    """The texts of bos, eos, unk and pad, as far as the header names them."""
    ids = {name: fields.get(f"tokenizer.ggml.{long}_token_id") for name, long in NAMES.items()}
    return {name: texts[number] for name, number in ids.items() if number is not None and number < len(texts)}


def differing_token(vocabulary: Mapping[str, int], file: Path, fields: Mapping[str, Any]) -> str | None:
    """A token of the file that another tokenizer lacks or counts otherwise; None where they agree."""
    texts, types = tokens_of(file, fields)
    for number, (text, held) in enumerate(zip(texts, types, strict=True)):
        if held in HELD and number not in {vocabulary.get(text), vocabulary.get(text.replace(" ", SPACE))}:
            return text
    return None


_PLAIN = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}


def _content(text: str, kind: str) -> str:
    return text.replace(" ", SPACE) if kind == "llama" else text


def _bos_first(text: str, number: int) -> dict[str, Any]:
    first, rest = {"SpecialToken": {"id": text, "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}
    pair = [first, rest, {"SpecialToken": {"id": text, "type_id": 1}}, {"Sequence": {"id": "B", "type_id": 1}}]
    known = {text: {"id": text, "ids": [number], "tokens": [text]}}
    return {"type": "TemplateProcessing", "single": [first, rest], "pair": pair, "special_tokens": known}


def _byte_level(file: Path, fields: Mapping[str, Any], texts: Sequence[str], types: Sequence[int]) -> dict[str, Any]:
    name = str(fields.get("tokenizer.ggml.pre"))
    split = SPLITS.get(ALIASES.get(name, name))
    if split is None:
        raise UserError(Problem(str(file), f"cuts text as {name!r}; read are {', '.join(SPLITS)}; {CURE}"))
    steps: list[dict[str, Any]] = []
    for pattern in split.patterns[: -1 if split.patterns[-1] == GPT2_SPLIT else None]:
        if pattern == r"\p{N}":
            steps.append({"type": "Digits", "individual_digits": True})
        else:
            steps.append({"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False})
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True}
    steps.append(byte_level | {"use_regex": split.patterns[-1] == GPT2_SPLIT})
    merges = [merge.split(" ") for merge in fields.get("tokenizer.ggml.merges") or ()]
    vocabulary = {text: number for number, text in enumerate(texts) if types[number] in HELD}
    return {
        # Qwen's own tokenizers compose text (NFC), which no header says.
        "normalizer": {"type": "NFC"} if name == "qwen2" else None,
        "pre_tokenizer": steps[0] if len(steps) == 1 else {"type": "Sequence", "pretokenizers": steps},
        "decoder": byte_level | {"use_regex": True},
        "model": _bpe(vocabulary, merges, ignore_merges=split.ignore_merges),
    }


def _sentencepiece(
    file: Path, fields: Mapping[str, Any], texts: Sequence[str], types: Sequence[int], special: Mapping[str, str]
) -> dict[str, Any]:
    """As Gemma's, which never puts a space before text. Of others the header does not say whether one comes first
    only, or after each special token, too; every chat's ids depend on it."""
    if not str(fields.get("general.architecture")).startswith("gemma") or fields.get(PREFIX, True):
        message = "does not say where its tokenizer puts spaces before text (at the start, after special tokens)"
        raise UserError(Problem(str(file), f"{message}; {CURE}"))
    scores = fields.get("tokenizer.ggml.scores")
    if not isinstance(scores, list) or len(scores) != len(texts):
        raise UserError(Problem(str(file), f"its tokenizer has no scores; {CURE}"))
    vocabulary = {_content(text, "llama"): number for number, text in enumerate(texts) if types[number] in HELD}
    decoders = [{"type": "Replace", "pattern": {"String": SPACE}, "content": " "}, {"type": "ByteFallback"}]
    return {
        "normalizer": {"type": "Replace", "pattern": {"String": " "}, "content": SPACE},
        "pre_tokenizer": None,
        "decoder": {"type": "Sequence", "decoders": [*decoders, {"type": "Fuse"}]},
        "model": _bpe(vocabulary, _merges(vocabulary, scores, types), unknown=special.get("unk"), byte_fallback=True),
    }


def _merges(vocabulary: Mapping[str, int], scores: Sequence[float], types: Sequence[int]) -> list[list[str]]:
    """Every pair that makes a token, those of the highest score first, as SentencePiece merges them."""
    normal = {text: number for text, number in vocabulary.items() if types[number] == int(TokenType.NORMAL)}
    found = []
    for text, number in normal.items():
        for place in range(1, len(text)):
            pair = text[:place], text[place:]
            if pair[0] in normal and pair[1] in normal:
                found.append((-scores[number], normal[pair[0]], normal[pair[1]], pair))
    return [list(pair) for *_, pair in sorted(found)]


def _bpe(
    vocabulary: Mapping[str, int], merges: Sequence[Sequence[str]], *, unknown: str | None = None,
    byte_fallback: bool = False, ignore_merges: bool = False,
) -> dict[str, Any]:  # fmt: skip
    head: dict[str, Any] = {"type": "BPE", "dropout": None, "unk_token": unknown, "continuing_subword_prefix": None}
    head |= {"end_of_word_suffix": None, "fuse_unk": byte_fallback, "byte_fallback": byte_fallback}
    return head | {"ignore_merges": ignore_merges, "vocab": dict(vocabulary), "merges": [list(pair) for pair in merges]}
