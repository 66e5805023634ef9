"""Decide which tokens are learned: conversations in, token ids and labels out."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import tokenizers

from finetune.base import Base
from finetune.data.conversations import Conversation
from finetune.data.sources import Row
from finetune.data.template import Rendered, Template, TemplateProblem
from finetune.errors import Problem

NOT_LEARNED = -100
Span = tuple[int, int]


@dataclass(frozen=True)
class Example:
    """Token ids and labels of one conversation, both of length T; labels are *not* shifted (the loss shifts them)."""

    ids: tuple[int, ...]
    labels: tuple[int, ...]
    text: str
    spans: tuple[Span, ...]  # the learned character ranges of text
    offsets: tuple[Span, ...]  # the character range of every token
    conversation: Conversation

    @property
    def row(self) -> Row:
        return self.conversation.row

    @property
    def tokens(self) -> int:
        return len(self.ids)

    @property
    def supervised_tokens(self) -> int:
        """Learned tokens that have a predecessor; the very first token of a text is predicted from nothing."""
        return sum(label != NOT_LEARNED for label in self.labels[1:])

    @property
    def straddling_tokens(self) -> int:
        """Learned tokens that begin before the span they reach into, so that a bit of context is learned with them."""
        before = [bisect_left(self.offsets, (start, 0)) - 1 for start, _ in self.spans]
        return sum(
            self.offsets[index][1] > start for index, (start, _) in zip(before, self.spans, strict=True) if index >= 0
        )

    @property
    def supervised_text(self) -> str:
        return "".join(self.text[start:end] for start, end in self.spans)

    @property
    def prompt_ids(self) -> tuple[int, ...]:
        """The ids before the last answer: what a trained model is asked to continue."""
        start = self.spans[-1][0] if self.spans else len(self.text)
        return self.ids[: self.tokens_before(start)]

    def tokens_before(self, character: int) -> int:
        """How many of the leading tokens end at or before a character of the text."""
        return sum(end <= character for _, end in self.offsets)


class Encoder:
    """A base's tokenizer as training uses it: rendered text in, ids and character offsets out."""

    def __init__(self, base: Base) -> None:
        self._tokenizer = tokenizers.Tokenizer.from_str(base.tokenizer.to_str())
        # Post-processors add tokens and trim the offsets of leading spaces; rendered text needs neither.
        self._tokenizer.post_processor = tokenizers.processors.Sequence([])  # type: ignore[assignment]
        self._tokenizer.no_padding()
        self._tokenizer.no_truncation()
        added = self._tokenizer.get_added_tokens_decoder()
        self.special_ids = frozenset(index for index, token in added.items() if token.special)
        self.special_texts = tuple(token.content for token in added.values() if token.special)

    def encode(self, texts: Sequence[str]) -> list[tokenizers.Encoding]:
        """Encodings of rendered texts; the only place where finetune tokenises, with add_special_tokens=False."""
        return self._tokenizer.encode_batch(list(texts), add_special_tokens=False)


def make_examples(
    conversations: Sequence[Conversation], template: Template, encoder: Encoder, *, loss_on: str
) -> tuple[list[Example], list[Problem]]:
    """One example a conversation, in order, and every row that cannot become one.

    Such a row is refused by the template, its text holds a special token, or its answer does not end in one (the model
    would never learn to stop).
    """
    rendered: list[tuple[Conversation, Rendered]] = []
    problems: list[Problem] = []
    for conversation in conversations:
        try:
            _refuse_special_text(conversation, encoder)
            rendered.append((conversation, template.render(conversation.turns)))
        except TemplateProblem as problem:
            problems.append(Problem(conversation.row.where, str(problem)))
    examples = []
    encodings = encoder.encode([whole.text for _, whole in rendered])
    for (conversation, whole), encoding in zip(rendered, encodings, strict=True):
        spans = _learned_spans(whole, loss_on)
        example = _example(conversation, whole.text, spans, encoding)
        if example.labels[-1 - _trailing_context(example)] not in encoder.special_ids:
            message = f"template {template.name}: the answer does not end in a special token, so the model would never "
            problems.append(Problem(conversation.row.where, message + "stop; end the assistant's turn with eos_token"))
        examples.append(example)
    return examples, problems


def _example(conversation: Conversation, text: str, spans: tuple[Span, ...], encoding: tokenizers.Encoding) -> Example:
    offsets = tuple(encoding.offsets)
    learned = _overlaps(offsets, spans)
    ids = tuple(encoding.ids)
    labels = tuple(token if keep else NOT_LEARNED for token, keep in zip(ids, learned, strict=True))
    return Example(ids, labels, text, spans, offsets, conversation)


def _overlaps(offsets: Iterable[Span], spans: Sequence[Span]) -> list[bool]:
    """For each token whether it shares a character with a span; a token that straddles a span's start does."""
    return [any(start < stop and end > begin for begin, stop in spans) for start, end in offsets]


def _learned_spans(rendered: Rendered, loss_on: str) -> tuple[Span, ...]:
    if loss_on == "everything":
        return ((0, rendered.spans[-1][1]),)  # what follows the last end token nobody has to say
    return rendered.spans if loss_on == "assistant" else rendered.spans[-1:]


def _trailing_context(example: Example) -> int:
    count = 0
    while count < example.tokens - 1 and example.labels[-1 - count] == NOT_LEARNED:
        count += 1
    return count


def _refuse_special_text(conversation: Conversation, encoder: Encoder) -> None:
    # A user's "</s>" would become the real token and close a turn; until it can be kept as plain text, it is refused.
    for turn in conversation.turns:
        for special in encoder.special_texts:
            if special in turn.text:
                raise TemplateProblem(
                    f"the {turn.role}'s text contains {special!r}, which this tokenizer reads as a control token; "
                    "change or remove it in this row"
                )
