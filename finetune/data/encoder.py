"""Turn rendered text into tokens: texts in, ids and character offsets out. The only place where finetune tokenises."""

from __future__ import annotations

import json
import re
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate, chain, pairwise
from typing import TYPE_CHECKING, Any

import numpy as np

from finetune.base import Base
from finetune.data.template import Rendered
from finetune.errors import Problem, UserError

if TYPE_CHECKING:
    import tokenizers

FIRST_PRIVATE, LAST_PRIVATE = 0x100000, 0x10FFFD  # plane 16: characters that mean nothing to anybody

# N = texts, T = tokens of one of them


@dataclass(frozen=True, slots=True, eq=False)
class Encoding:
    """Token ids, int32 [T], and the character range [start, end) that each token stands for, int32 [T, 2].

    Ranges never go backwards; the tokens that one character becomes (the bytes of an emoji) share it.
    """

    ids: np.ndarray
    offsets: np.ndarray


class Encoder:
    """A base's tokenizer as training uses it: control tokens stand where the template writes them, none are added."""

    def __init__(self, base: Base) -> None:
        self._folder = base.tokenizer_folder
        self._tokenizer = _bare(base.tokenizer.to_str())
        added = self._tokenizer.get_added_tokens_decoder()
        self.special_ids = frozenset(index for index, token in added.items() if token.special)
        special_texts = (token.content for token in added.values() if token.special)
        self.special_texts = tuple(sorted(special_texts, key=len, reverse=True))

    def encode(self, rendered: Sequence[Rendered | str]) -> list[Encoding]:
        """One encoding a text, in order; what stands in a Rendered's literals becomes ordinary tokens.

        Raises:
            UserError: this tokenizer cannot keep literals apart, or its offsets go backwards.
        """
        texts = [each if isinstance(each, str) else each.text for each in rendered]
        found = self._tokenizer.encode_batch(texts, add_special_tokens=False)
        for index, each in enumerate(rendered):
            if not isinstance(each, str) and each.literals:
                found[index] = self._renamed.encode(each.text, each.literals)
        ids, offsets, bounds = _flatten(found)
        if goes_backwards(offsets, bounds):
            why = "its tokens go back and forth in the text, so that labels cannot be proven; name another base"
            raise UserError(Problem(str(self._folder), why))
        return [Encoding(ids[start:end], offsets[start:end]) for start, end in pairwise(bounds)]

    @cached_property
    def _renamed(self) -> _RenamedTokenizer:
        """Made for the first row with literals: most data has none."""
        renamed = _rename_special_tokens(self._tokenizer)
        for text in self.special_texts:
            if not self._is_apart(text, renamed):
                why = f"its control token {text!r} cannot be told from the same text inside a row; "
                cure = "set data.special_tokens: control, or name another base"
                raise UserError(Problem(str(self._folder), why + cure))
        return renamed

    def _is_apart(self, special: str, renamed: _RenamedTokenizer) -> bool:
        """Whether a special token's new name is the token, and its text is not, nor any other control token."""
        as_text = set(renamed.tokenizer.encode(special, add_special_tokens=False).ids) - renamed.unknown_ids
        same_id = renamed.tokenizer.token_to_id(renamed.names[special]) == self._tokenizer.token_to_id(special)
        return same_id and as_text.isdisjoint(self.special_ids)


@dataclass(frozen=True)
class _RenamedTokenizer:
    """The same tokenizer, same ids, whose special tokens have private names: their texts are text like any other."""

    tokenizer: tokenizers.Tokenizer
    names: Mapping[str, str]  # by special text, as long as it is: every offset stays valid
    special: re.Pattern[str]  # special texts, as the tokenizer finds them
    unknown_ids: frozenset[int]  # what a character becomes that the tokenizer has no token for

    def encode(self, text: str, literals: Sequence[tuple[int, int]]) -> tokenizers.Encoding:
        """The text with a control token where one is written, but for the literals."""
        assert max(text) < chr(FIRST_PRIVATE), "the template refuses rows with literals and private characters"
        ends = [end for _, end in literals]

        def renamed(match: re.Match[str]) -> str:
            nearest = bisect_right(ends, match.start())  # the first literal that ends behind where the match begins
            is_literal = nearest < len(literals) and literals[nearest][0] < match.end()
            return match[0] if is_literal else self.names[match[0]]

        return self.tokenizer.encode(self.special.sub(renamed, text), add_special_tokens=False)


def _bare(description: str) -> tokenizers.Tokenizer:
    import tokenizers  # only now: where the rows are cached, nothing is tokenised

    tokenizer = tokenizers.Tokenizer.from_str(description)
    # Post-processors add tokens and trim the offsets of leading spaces; rendered text needs neither.
    tokenizer.post_processor = tokenizers.processors.Sequence([])  # type: ignore[assignment]
    tokenizer.no_padding()
    tokenizer.no_truncation()
    return tokenizer


def _flatten(found: Sequence[tokenizers.Encoding]) -> tuple[np.ndarray, np.ndarray, list[int]]:
    """All ids, all offsets, and where each text's begin: N + 1 bounds.

    One pass over generators, so that each list of pairs is gone before the next: three times as fast as np.array.
    """
    bounds = list(accumulate((len(each) for each in found), initial=0))
    ids = np.fromiter(chain.from_iterable(each.ids for each in found), np.int32, bounds[-1])
    pairs = chain.from_iterable(each.offsets for each in found)
    offsets = np.fromiter(chain.from_iterable(pairs), np.int32, 2 * bounds[-1]).reshape(-1, 2)
    return ids, offsets, bounds


def goes_backwards(offsets: np.ndarray, bounds: Sequence[int]) -> bool:
    """Whether a token starts or ends before the one in front of it in the same text."""
    backwards = np.any(offsets[1:] < offsets[:-1], axis=1)
    first_tokens = np.asarray([bound for bound in bounds if 0 < bound < len(offsets)], np.int64)
    backwards[first_tokens - 1] = False
    return bool(backwards.any())


def _rename_special_tokens(tokenizer: tokenizers.Tokenizer) -> _RenamedTokenizer:
    description = json.loads(tokenizer.to_str())
    added: list[dict[str, Any]] = description["added_tokens"]
    special = sorted((token for token in added if token["special"]), key=lambda token: -len(token["content"]))
    # One character each, repeated: no name is the beginning of another.
    letters = map(chr, range(FIRST_PRIVATE, LAST_PRIVATE + 1))
    names = {token["content"]: letter * len(token["content"]) for token, letter in zip(special, letters, strict=False)}
    either = "|".join(map(_pattern, special))  # longest first, as the tokenizer matches
    _rename_in_model(description["model"], names)
    for token in added:
        token["content"] = names.get(token["content"], token["content"])
    renamed = _bare(json.dumps(description))
    unknown = renamed.token_to_id(description["model"].get("unk_token") or "")
    unknown_ids = frozenset() if unknown is None else frozenset({unknown})
    return _RenamedTokenizer(renamed, names, re.compile(either), unknown_ids)


def _pattern(token: Mapping[str, Any]) -> str:
    text = re.escape(token["content"])
    return rf"(?<!\w){text}(?!\w)" if token["single_word"] else text


def _rename_in_model(model: dict[str, Any], names: Mapping[str, str]) -> None:
    """Put the names in the special texts' places of the vocabulary, so that no merge of pieces can reach their ids."""
    if isinstance(model["vocab"], list):  # Unigram: pieces and scores
        model["vocab"] = [[names.get(piece, piece), score] for piece, score in model["vocab"]]
        return
    model["vocab"] = {names.get(piece, piece): index for piece, index in model["vocab"].items()}
    if model.get("unk_token") in names:
        model["unk_token"] = names[model["unk_token"]]
    if "merges" in model:
        model["merges"] = [pair for pair in model["merges"] if names.keys().isdisjoint((*pair, "".join(pair)))]
