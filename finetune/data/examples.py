"""Decide which tokens are learned: conversations in, token ids and labels out, or why a row cannot be learned."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from finetune.data.encoder import Encoder, Encoding
from finetune.data.rows import Conversation, Refusal
from finetune.data.template import Rendered, Template, TemplateProblem
from finetune.data.values import Unusable

NOT_LEARNED = -100
Span = tuple[int, int]

# T = tokens of an example, U = its tokens before any was cut


@dataclass(frozen=True, slots=True, eq=False)
class Example:
    """Token ids of one row, int32 [T], and which of them are learned, bool [T]; not shifted (the loss shifts)."""

    ids: np.ndarray
    learned: np.ndarray
    where: str
    prompt_tokens: int  # how many come before the last answer
    cut_tokens: int

    @property
    def tokens(self) -> int:
        return len(self.ids)

    @property
    def labels(self) -> np.ndarray:
        """The id where it is learned, else NOT_LEARNED; int32 [T]."""
        return np.where(self.learned, self.ids, np.int32(NOT_LEARNED))

    @property
    def supervised_tokens(self) -> int:
        """Learned tokens that have a predecessor; the very first token of a text is predicted from nothing."""
        return int(np.count_nonzero(self.learned[1:]))

    @property
    def prompt_ids(self) -> np.ndarray:
        """The ids before the last answer: what a trained model is asked to continue."""
        return self.ids[: self.prompt_tokens]


@dataclass(frozen=True, slots=True, eq=False)
class TracedExample:
    """An example and where it comes from: the whole rendered text, also what was cut of it."""

    example: Example
    text: str
    spans: tuple[Span, ...]  # the learned character ranges of text
    offsets: np.ndarray  # the character range of every token, int32 [U, 2]
    literals: tuple[Span, ...]  # ranges of text that look like control tokens and are none
    conversation: Conversation
    kept: np.ndarray  # bool [U]: the tokens of the example
    straddling_tokens: int  # learned tokens that begin before the span they reach into: a bit of context with them

    @property
    def supervised_text(self) -> str:
        """What is learned, without what was cut off at the end."""
        end = int(self.offsets[self.kept][-1, 1])
        return "".join(self.text[start : min(stop, end)] for start, stop in self.spans)


@dataclass(frozen=True)
class Rules:
    """What of a row is learned and how long it may be, in the recipe's words."""

    loss_on: str  # assistant | last-assistant | everything
    max_tokens: int
    too_long: str = "error"  # error | drop | truncate
    truncate: str = "prompt"  # prompt | answer
    special_tokens: str = "text"  # text | control


def label(
    conversations: Sequence[Conversation], template: Template, encoder: Encoder, rules: Rules
) -> list[TracedExample | Refusal]:
    """The example of each conversation, in order, or why it cannot become one.

    It is refused where the template refuses it, its last learned token is no control token (the model would never
    learn to stop), it is too long, or no token of it would be learned.
    """
    control_texts = encoder.special_texts if rules.special_tokens == "text" else ()
    rendered = [_render(each, template, control_texts) for each in conversations]
    encodings = iter(encoder.encode([each for each in rendered if isinstance(each, Rendered)]))
    return [
        _trace(conversation, each, next(encodings), rules, encoder.special_ids) if isinstance(each, Rendered) else each
        for conversation, each in zip(conversations, rendered, strict=True)
    ]


def _render(conversation: Conversation, template: Template, control_texts: Sequence[str]) -> Rendered | Refusal:
    try:
        return template.render(conversation.turns, tools=conversation.tools, control_texts=control_texts)
    except TemplateProblem as problem:
        return Refusal(problem.reason, conversation.row.where, problem.message)


def _trace(
    conversation: Conversation, rendered: Rendered, encoding: Encoding, rules: Rules, special_ids: frozenset[int]
) -> TracedExample | Refusal:
    where = conversation.row.where
    spans, unlearned = _split_spans(conversation, rendered, rules.loss_on)
    learned, straddling = _learned_tokens(encoding.offsets, spans, unlearned)
    try:
        _refuse_unlearnable(encoding.ids, learned, special_ids)
        kept = _kept_tokens(conversation, rendered, encoding, learned, rules)
    except Unusable as problem:
        return Refusal(problem.reason, where, problem.message)
    prompt = _tokens_before(encoding.offsets, rendered.spans[-1][0])
    cut = len(kept) - np.count_nonzero(kept)
    example = Example(
        ids=encoding.ids[kept] if cut else encoding.ids,
        learned=learned[kept] if cut else learned,
        where=where,
        prompt_tokens=int(np.count_nonzero(kept[:prompt])),
        cut_tokens=int(cut),
    )
    straddling_tokens = sum(bool(kept[index] and learned[index]) for index in straddling)
    return TracedExample(
        example, rendered.text, spans, encoding.offsets, rendered.literals, conversation, kept, straddling_tokens
    )


def _split_spans(
    conversation: Conversation, rendered: Rendered, loss_on: str
) -> tuple[tuple[Span, ...], tuple[Span, ...]]:
    """The learned character ranges, and the answers that are never learned (train: false)."""
    trained = [turn.train for turn in conversation.turns if turn.role == "assistant"]
    answers = tuple(span for span, train in zip(rendered.spans, trained, strict=True) if train)
    unlearned = tuple(span for span, train in zip(rendered.spans, trained, strict=True) if not train)
    if loss_on == "last-assistant":
        return answers[-1:] if trained[-1] else (), unlearned
    if loss_on == "assistant" or not answers:
        return answers, unlearned
    end = answers[-1][1]  # what follows the last end token nobody has to say
    gaps = [span for span in unlearned if span[0] < end]
    starts, stops = [0, *(stop for _, stop in gaps)], [*(start for start, _ in gaps), end]
    return tuple((start, stop) for start, stop in zip(starts, stops, strict=True) if start < stop), unlearned


def _learned_tokens(
    offsets: np.ndarray, spans: Sequence[Span], unlearned: Sequence[Span]
) -> tuple[np.ndarray, list[int]]:
    """Every token that shares a character with a learned span and with no unlearned one: bool [U].

    And the tokens that straddle the start of a learned span.
    """
    learned = np.zeros(len(offsets), bool)
    firsts = []
    for start, stop in spans:
        first = _tokens_before(offsets, start)
        learned[first : _tokens_starting_before(offsets, stop)] = True
        firsts.append((first, start))
    for start, stop in unlearned:
        learned[_tokens_before(offsets, start) : _tokens_starting_before(offsets, stop)] = False
    return learned, [first for first, start in firsts if first < len(offsets) and offsets[first, 0] < start]


def _tokens_before(offsets: np.ndarray, character: int) -> int:
    """How many tokens end at or before a character; offsets never go backwards."""
    return int(offsets[:, 1].searchsorted(character, "right"))


def _tokens_starting_before(offsets: np.ndarray, character: int) -> int:
    return int(offsets[:, 0].searchsorted(character, "left"))


def _refuse_unlearnable(ids: np.ndarray, learned: np.ndarray, special_ids: frozenset[int]) -> None:
    if not np.count_nonzero(learned[1:]):
        message = "row: no token of it would be learned; let one of the assistant's turns be learned, or drop the row"
        raise Unusable("no_supervised_token", message)
    if int(ids[learned.nonzero()[0][-1]]) not in special_ids:
        message = "data.template: the answer does not end in a control token, so the model would never stop; "
        raise Unusable("never_stops", message + "end the assistant's turn with eos_token")


# --- rows of more than max_tokens ---


def _kept_tokens(
    conversation: Conversation, rendered: Rendered, encoding: Encoding, learned: np.ndarray, rules: Rules
) -> np.ndarray:
    """Which tokens stay, so that there are no more than max_tokens: bool [U]."""
    tokens, most = len(learned), rules.max_tokens
    if tokens <= most:
        return np.ones(tokens, bool)
    too_long = f"row: {tokens:,} tokens, data.max_tokens is {most:,}"
    if rules.too_long != "truncate":
        cure = "raise it, shorten the row, or set data.too_long: drop or truncate"
        raise Unusable("too_long", f"{too_long}; {cure}")
    if rules.truncate == "answer":
        if not learned[1:most].any():
            cure = "raise it, shorten the row, or set data.truncate: prompt"
            raise Unusable("no_supervised_token", f"{too_long}, and no answer begins before that; {cure}")
        return np.arange(tokens) < most
    removable = _tokens_within(encoding.offsets, _ranges_asked(conversation, rendered)) & ~learned
    kept = _without_oldest(encoding.offsets, removable, tokens - most)
    if np.count_nonzero(kept) > most:
        left = f"and only {tokens - np.count_nonzero(kept):,} are words of the prompt that can be cut"
        raise Unusable("too_long", f"{too_long}, {left}; raise it, shorten the row, or set data.truncate: answer")
    return kept


def _ranges_asked(conversation: Conversation, rendered: Rendered) -> list[Span]:
    """Where in the text the words of the user and of the tools stand; those whose place is in doubt are left out.

    A turn's words stand between the answers before and after it. Words that the template changed (a tool's result
    written as JSON) or that stand there twice are not to be found for sure.
    """
    ranges = []
    answers = iter((*rendered.spans, (len(rendered.text), len(rendered.text))))
    position, (stop, behind) = 0, next(answers)
    for turn in conversation.turns:
        if turn.role == "assistant":
            position = behind
            stop, behind = next(answers)
            continue
        words = turn.text.strip()
        start = rendered.text.find(words, position, stop)
        certain = words and start >= 0 and rendered.text.find(words, start + 1, stop) < 0
        if certain and turn.role in {"user", "tool"}:
            ranges.append((start, start + len(words)))
    return ranges


def _tokens_within(offsets: np.ndarray, ranges: Sequence[Span]) -> np.ndarray:
    """The tokens that lie wholly inside one of the ranges: bool [U]."""
    within = np.zeros(len(offsets), bool)
    for start, stop in ranges:
        within[_tokens_starting_before(offsets, start) : _tokens_before(offsets, stop)] = True
    return within


def _without_oldest(offsets: np.ndarray, removable: np.ndarray, count: int) -> np.ndarray:
    """All tokens but the first `count` removable ones, or all removable ones where they are fewer: bool [U].

    The tokens of one character stay or go together, so that up to three more than `count` may go.
    """
    begins = np.concatenate([[True], offsets[1:, 0] >= offsets[:-1, 1]])  # shares no character with the one before
    group = np.cumsum(begins) - 1
    sizes = np.bincount(group)
    removable_groups = np.bincount(group, weights=removable) == sizes
    removed = np.cumsum(np.where(removable_groups, sizes, 0))  # tokens that are gone when the group is
    last = np.searchsorted(removed, count)
    kept: np.ndarray = ~removable_groups[group] | (group > last)
    return kept
