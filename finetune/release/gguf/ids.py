"""Token ids as llama.cpp makes them: the tokenizer fields of a GGUF file and a text in, ids out.

Written from what llama.cpp does (src/llama-vocab.cpp), and from the file's fields alone: it shares nothing with the
code that writes them but the names of the splits.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from typing import Any

from gguf import TokenType

from finetune.release.gguf.pre_tokenizer import SPACE, SPLITS

SPECIAL = {TokenType.CONTROL, TokenType.USER_DEFINED, TokenType.UNKNOWN}


class FileTokenizer:
    """Reads text as llama.cpp does with these header fields (key -> value)."""

    def __init__(self, fields: Mapping[str, Any]) -> None:
        self.fields = fields
        self.tokens: Sequence[str] = fields["tokenizer.ggml.tokens"]
        self.types: Sequence[int] = fields["tokenizer.ggml.token_type"]
        self.ids = {text: token_id for token_id, text in enumerate(self.tokens)}

    def encode_chat(self, text: str) -> list[int]:
        """Ids of a rendered chat: a bos that the template wrote is taken off where the file says that one is added."""
        bos = self.fields.get("tokenizer.ggml.bos_token_id")
        if self.fields["tokenizer.ggml.add_bos_token"] and bos is not None:
            text = text.removeprefix(self.tokens[bos])
        return self.encode(text)

    def encode(self, text: str) -> list[int]:
        """Ids of a text in which special tokens count, with the bos and eos that the file says are added."""
        fields = self.fields
        ids = [fields["tokenizer.ggml.bos_token_id"]] if fields["tokenizer.ggml.add_bos_token"] else []
        after_special = True
        for part in self._fragments(text):
            if isinstance(part, int):
                ids.append(part)
            elif fields["tokenizer.ggml.model"] == "llama":
                prefix = " " if fields.get("tokenizer.ggml.add_space_prefix", True) and after_special else ""
                ids += self._merge_by_score((prefix + part).replace(" ", SPACE))
            else:
                ids += self._byte_level.encode(part, add_special_tokens=False).ids
            after_special = isinstance(part, int)
        return ids + ([fields["tokenizer.ggml.eos_token_id"]] if fields["tokenizer.ggml.add_eos_token"] else [])

    def _fragments(self, text: str) -> Iterator[str | int]:
        """Stretches of text and the special tokens between them; longer tokens are looked for first."""
        parts: list[str | int] = [text]
        for special in self._special:
            if special in text:
                parts = [piece for part in parts for piece in self._cut(part, special)]
        return iter(parts)

    def _cut(self, part: str | int, special: str) -> Iterator[str | int]:
        if isinstance(part, int):
            yield part
            return
        for place, piece in enumerate(part.split(special)):
            if place:
                yield self.ids[special]
            if piece:
                yield piece

    @cached_property
    def _special(self) -> list[str]:
        found = [text for text, kind in zip(self.tokens, self.types, strict=True) if kind in SPECIAL]
        return sorted(found, key=lambda text: -len(text.encode()))

    def _merge_by_score(self, text: str) -> list[int]:
        """SentencePiece's BPE: of all neighbours that make a token, the highest score first, then the leftmost."""
        scores = self.fields["tokenizer.ggml.scores"]
        pieces: list[str | None] = list(text)
        before, after = list(range(-1, len(pieces) - 1)), list(range(1, len(pieces) + 1))
        queue: list[tuple[float, int, int, str]] = []

        def consider(left: int, right: int) -> None:
            if left >= 0 and right < len(pieces):
                joined = f"{pieces[left]}{pieces[right]}"
                if joined in self.ids:
                    heapq.heappush(queue, (-scores[self.ids[joined]], left, right, joined))

        for place in range(1, len(pieces)):
            consider(place - 1, place)
        while queue:
            _, left, right, joined = heapq.heappop(queue)
            if pieces[left] is None or pieces[right] is None or f"{pieces[left]}{pieces[right]}" != joined:
                continue
            pieces[left], pieces[right] = joined, None
            after[left] = after[right]
            if after[right] < len(pieces):
                before[after[right]] = left
            consider(before[left], left)
            consider(left, after[left])
        return [token_id for piece in pieces if piece is not None for token_id in self._piece_ids(piece)]

    def _piece_ids(self, piece: str) -> list[int]:
        if piece in self.ids:
            return [self.ids[piece]]
        return [self.ids[f"<0x{byte:02X}>"] for byte in piece.encode()]

    @cached_property
    def _byte_level(self) -> Any:
        from tokenizers import Regex, Tokenizer
        from tokenizers.models import BPE
        from tokenizers.pre_tokenizers import ByteLevel, Sequence, Split

        split = SPLITS[self.fields["tokenizer.ggml.pre"]]
        normal = {text: token_id for text, token_id in self.ids.items() if self.types[token_id] == TokenType.NORMAL}
        pairs = [tuple(pair.split(" ", 1)) for pair in self.fields["tokenizer.ggml.merges"]]
        reader = Tokenizer(BPE(vocab=normal, merges=pairs, ignore_merges=split.ignore_merges))
        steps = [Split(Regex(pattern), "isolated") for pattern in split.patterns]
        reader.pre_tokenizer = Sequence([*steps, ByteLevel(add_prefix_space=False, use_regex=False)])
        return reader
