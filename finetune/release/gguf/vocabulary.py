"""A tokenizer as llama.cpp sees it: tokenizer.json, chat template and stop tokens in, header fields out.

llama.cpp knows two kinds: "llama" (SentencePiece: the pair whose result has the highest score is merged first) and
"gpt2" (byte-level BPE with ranked merges, after a split by one of the regular expressions it has names for).
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gguf import TokenType

from finetune.artifact import read_json
from finetune.base import read_base
from finetune.errors import Problem, UserError, raise_problems
from finetune.release.gguf.pre_tokenizer import SPACE, SPLITS, space_prefix, split_name

BYTE = re.compile(r"<0x[0-9A-F]{2}>")
LONG_NAMES = {"unk": "unknown", "pad": "padding"}  # in the keys of a header
NO_SCORE = -1e6  # of a token that no merge makes; below every other


@dataclass(frozen=True)
class Tokenizer:
    """A tokenizer.json with the special tokens that its folder names."""

    folder: Path
    json: Mapping[str, Any]
    special: Mapping[str, str]  # bos, eos, unk, pad -> text

    @property
    def ids(self) -> dict[str, int]:
        added = {token["content"]: token["id"] for token in self.json["added_tokens"]}
        return dict(self.json["model"]["vocab"]) | added

    @property
    def adds_bos(self) -> bool:
        """Whether encoding with special tokens writes bos first."""
        return self._adds(0, "bos")

    @property
    def adds_eos(self) -> bool:
        return self._adds(-1, "eos")

    @property
    def composes(self) -> bool:
        """Whether it brings text into Unicode's composed form (NFC) and does nothing else to it."""
        normalizer = self.json.get("normalizer")
        steps = normalizer.get("normalizers", [normalizer]) if normalizer else []
        return bool(steps) and all(step["type"] == "NFC" for step in steps)

    def _adds(self, place: int, name: str) -> bool:
        processor = self.json.get("post_processor") or {}
        for part in processor.get("processors", [processor]):
            single = part.get("single") if part.get("type") == "TemplateProcessing" else None
            if single and single[place].get("SpecialToken", {}).get("id") == self.special.get(name, ""):
                return True
        return False


def read_tokenizer(folder: Path) -> Tokenizer:
    """The tokenizer of a model folder, converted to tokenizer.json where it is stored in another form."""
    source = read_base(str(folder.absolute())).tokenizer_folder
    settings = read_json(source / "tokenizer_config.json")
    named = {name: settings.get(f"{name}_token") for name in ("bos", "eos", "unk", "pad")}
    special = {name: token["content"] if isinstance(token, dict) else token for name, token in named.items() if token}
    return Tokenizer(source, json.loads((source / "tokenizer.json").read_text(encoding="utf-8")), special)


def tokenizer_fields(
    tokenizer: Tokenizer, *, rows: int, chat_template: str | None, stop_token_ids: Sequence[int]
) -> dict[str, Any]:
    """The tokenizer's header fields for an embedding of `rows` rows; rows without a token are marked unused.

    Raises:
        UserError: llama.cpp has no counterpart of this tokenizer.
    """
    model = tokenizer.json["model"]
    raise_problems(_problems(tokenizer, rows))
    is_sentencepiece = bool(model.get("byte_fallback"))
    texts, types = _tokens(tokenizer, rows, is_sentencepiece=is_sentencepiece)
    fields: dict[str, Any] = {"tokenizer.ggml.tokens": texts, "tokenizer.ggml.token_type": types}
    opening = _opening(tokenizer, chat_template) if chat_template else None
    if is_sentencepiece:
        fields |= {"tokenizer.ggml.model": "llama", "tokenizer.ggml.pre": "default"}
        fields["tokenizer.ggml.scores"] = _scores(tokenizer, rows)
        fields["tokenizer.ggml.add_space_prefix"] = _adds_space(tokenizer, opening)
    else:
        fields |= {"tokenizer.ggml.model": "gpt2", "tokenizer.ggml.pre": split_name(tokenizer.json)}
        fields["tokenizer.ggml.merges"] = [" ".join(pair) for pair in merges(tokenizer)]
    fields |= _special_ids(tokenizer, stop_token_ids)
    # With a template llama.cpp adds bos to the rendered text, after it took off the one that the template wrote.
    writes_bos = opening is None or opening.startswith(tokenizer.special.get("bos", "\0"))
    fields["tokenizer.ggml.add_bos_token"] = tokenizer.adds_bos and writes_bos
    fields["tokenizer.ggml.add_eos_token"] = tokenizer.adds_eos and chat_template is None
    if chat_template:
        fields["tokenizer.chat_template"] = chat_template
    return fields


def text_notes(tokenizer: Tokenizer, fields: Mapping[str, Any]) -> list[str]:
    """Where llama.cpp, with these fields, reads text in another way than the tokenizer does."""
    notes = []
    if tokenizer.composes:
        notes.append("text that is not in Unicode's composed form (NFC) is tokenised as it is")
    prefix = fields.get("tokenizer.ggml.add_space_prefix")
    if prefix is False and space_prefix(tokenizer.json) != "never":
        notes.append("chats are exact; plain text starts without the space that the tokenizer puts before it")
    if prefix:
        notes.append("plain text that begins with a space gets one more")
    if tokenizer.adds_bos and not fields["tokenizer.ggml.add_bos_token"]:
        notes.append("chats are exact; plain text starts without bos, which the chat template does not write")
    return notes


def merges(tokenizer: Tokenizer) -> list[tuple[str, str]]:
    """The merges in order of rank, as pairs."""
    return [tuple(pair if isinstance(pair, list) else pair.split(" ")) for pair in tokenizer.json["model"]["merges"]]


def _problems(tokenizer: Tokenizer, rows: int) -> list[Problem]:
    where, model = str(tokenizer.folder / "tokenizer.json"), tokenizer.json["model"]
    if model["type"] != "BPE":
        return [Problem(where, f"a {model['type']} tokenizer; GGUF is written for BPE and SentencePiece-BPE ones")]
    problems = []
    if max(tokenizer.ids.values()) >= rows:
        problems.append(Problem(where, f"holds id {max(tokenizer.ids.values())}, the embedding has {rows} rows"))
    for token in tokenizer.json["added_tokens"]:
        if token["lstrip"] or token["rstrip"] or token["single_word"]:
            problems.append(Problem(where, f"{token['content']!r} swallows the spaces around it; llama.cpp does not"))
    if model.get("byte_fallback"):
        problems += _sentencepiece_problems(tokenizer, where)
        return problems
    if split_name(tokenizer.json) is None:
        known = ", ".join(SPLITS)
        problems.append(Problem(where, f"its pre-tokenizer is none that llama.cpp has a name for; known are {known}"))
    if tokenizer.json.get("normalizer") and not tokenizer.composes:
        kind = tokenizer.json["normalizer"]["type"]
        problems.append(Problem(where, f"its normalizer {kind} has no counterpart in llama.cpp"))
    return problems


def _sentencepiece_problems(tokenizer: Tokenizer, where: str) -> list[Problem]:
    """Where one score a token cannot say what the ranked merges say, or the spaces are treated in another way."""
    problems = []
    if space_prefix(tokenizer.json) is None:
        problems.append(Problem(where, "its normalizer is none of SentencePiece's; llama.cpp has no counterpart"))
    vocabulary = tokenizer.json["model"]["vocab"]
    pairs = merges(tokenizer)
    ranked = set(pairs)
    results = [left + right for left, right in pairs]
    groups = 1 + sum(a != b for a, b in zip(results, results[1:], strict=False))
    if groups > len(set(results)):
        problems.append(Problem(where, "merges that make the same token have different ranks; one score cannot say so"))
    for text in set(results):
        splits = ((text[:place], text[place:]) for place in range(1, len(text)))
        if any(split not in ranked and split[0] in vocabulary and split[1] in vocabulary for split in splits):
            problems.append(Problem(where, f"{text!r} is not made from all its parts; llama.cpp would make it of any"))
            break
    return problems


def _tokens(tokenizer: Tokenizer, rows: int, *, is_sentencepiece: bool) -> tuple[list[str], list[int]]:
    texts = [f"[PAD{row}]" for row in range(rows)]
    types = [int(TokenType.UNUSED)] * rows
    for text, token_id in tokenizer.json["model"]["vocab"].items():
        is_byte = is_sentencepiece and BYTE.fullmatch(text)
        texts[token_id], types[token_id] = text, int(TokenType.BYTE if is_byte else TokenType.NORMAL)
    for token in tokenizer.json["added_tokens"]:
        kind = TokenType.CONTROL if token["special"] else TokenType.USER_DEFINED
        text = token["content"].replace(SPACE, " ") if is_sentencepiece else token["content"]
        texts[token["id"]], types[token["id"]] = text, int(kind)
    return texts, types


def _scores(tokenizer: Tokenizer, rows: int) -> list[float]:
    """Minus the rank of the first merge that makes a token: SentencePiece's own order, whatever its scores were."""
    scores = [NO_SCORE] * rows
    ids = tokenizer.json["model"]["vocab"]
    for rank, (left, right) in reversed(list(enumerate(merges(tokenizer)))):
        scores[ids[left + right]] = -float(rank)
    return scores


def _adds_space(tokenizer: Tokenizer, opening: str | None) -> bool:
    """llama.cpp's flag puts a space before text after every special token; ours may put one at the very start only.

    Chats of a template that opens with a special token are then right without the flag, plain text with it: a model
    with a template is made for chats.
    """
    scheme = space_prefix(tokenizer.json)
    if scheme != "first" or opening is None:
        return scheme != "never"
    return not any(opening.startswith(token["content"]) for token in tokenizer.json["added_tokens"])


def _opening(tokenizer: Tokenizer, chat_template: str) -> str:
    """What the template writes for a single user turn."""
    from jinja2 import TemplateError
    from transformers.utils.chat_template_utils import render_jinja_template

    turns = [[{"role": "user", "content": "text"}]]
    names: dict[str, Any] = {f"{name}_token": text for name, text in tokenizer.special.items()}
    try:
        return str(render_jinja_template(turns, chat_template=chat_template, add_generation_prompt=True, **names)[0][0])
    except TemplateError as error:
        raise UserError(Problem("chat template", f"cannot write a single user turn: {error}")) from error


def _special_ids(tokenizer: Tokenizer, stop_token_ids: Sequence[int]) -> dict[str, int]:
    """bos, unk and pad as the tokenizer names them; up to three stop tokens as eos, eot and eom, the eos first."""
    ids = tokenizer.ids
    fields = {name: ids[text] for name, text in tokenizer.special.items() if name != "eos" and text in ids}
    eos = ids.get(tokenizer.special.get("eos", ""))
    stops = list(dict.fromkeys(stop_token_ids)) or ([eos] if eos is not None else [])
    stops.sort(key=lambda stop: stop != eos)
    if not stops:
        raise UserError(Problem("stop tokens", "neither model nor tokenizer names one; llama.cpp would take any token"))
    if len(stops) > 3:
        told = ", ".join(map(str, stops))
        raise UserError(Problem("stop tokens", f"a GGUF file names three at most, these are {len(stops)}: {told}"))
    fields |= dict(zip(("eos", "eot", "eom"), stops, strict=False))
    return {f"tokenizer.ggml.{LONG_NAMES.get(name, name)}_token_id": token_id for name, token_id in fields.items()}
