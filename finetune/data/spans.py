"""Find the assistant's turns in a rendered conversation: its messages and the whole text in, character ranges out.

Nothing is searched for by its wording. A turn starts where the prompt that asks for it ends, and ends with what the
template writes for it; both come from rendering the conversation's beginnings. What cannot be proven is refused.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

Span = tuple[int, int]
Message = Mapping[str, Any]
# Private-use characters of plane 15 around a message's number: before what it says, and after it.
OPEN, CLOSE, END = "\U000f0000", "\U000f0001", "\U000f0002"
MOST_TURNS = 2000  # every beginning is rendered: time grows with the square, to about ten seconds here
MARK = re.compile(f"([{OPEN}{CLOSE}])([0-9]+){END}")


class TemplateProblem(Exception):
    """Why a conversation cannot be rendered, or its answers not be found; `reason` is one of rows.REASONS."""

    def __init__(self, reason: str, message: str) -> None:
        super().__init__(message)
        self.reason = reason
        self.message = message


@dataclass(frozen=True)
class Written:
    """One conversation, the text that the template `name` writes for it, and how to write others with its tools.

    `write(messages, tools, ask)` renders; with `ask` up to where the assistant starts to speak.
    """

    name: str
    messages: Sequence[Message]
    tools: Sequence[Any]
    whole: str
    write: Callable[[Sequence[Message], Sequence[Any], bool], str]

    def problem(self, reason: str, index: int, what: str) -> TemplateProblem:
        """A problem with one turn; `what` ends with the cure."""
        role = self.messages[index]["role"]
        return TemplateProblem(reason, f"template {self.name}: turn {index + 1} ({role}): {what}")

    def unproven(self, index: int, why: str) -> TemplateProblem:
        cure = "so the answer's place cannot be proven; use another template, or data.drop: [template_unproven]"
        return self.problem("template_unproven", index, f"{why}, {cure}")


def find_spans(written: Written) -> tuple[Span, ...]:
    """The ranges [start, end) of the assistant's turns, in order; `end` lies behind the end-of-turn token.

    Raises:
        TemplateProblem: a turn's place cannot be proven, or a turn's text is not inside its own range.
    """
    if len(written.messages) > MOST_TURNS:
        raise written.unproven(MOST_TURNS, f"the conversation has more than {MOST_TURNS} turns")
    spans: list[Span] = []
    marked: Marked | None = None
    for index, message in enumerate(written.messages):
        if message["role"] != "assistant":
            continue
        before, after = _beginnings(written, index)
        if after.startswith(before) and written.whole.startswith(after):
            start, end = len(before), len(after)
        else:
            marked = marked or _mark_whole(written, index)
            start, end = _local_span(written, marked, index, (before, after))
        end = start + _said_length(written.whole[start:end], message["content"])
        if spans and start < spans[-1][1]:
            raise written.unproven(index, "it stands inside an earlier answer")
        for text in texts_of(message):
            if not stands_in(text, written.whole[start:end]):
                raise written.unproven(index, f"{short(text)} does not stand where the answer is asked for")
        spans.append((start, end))
    return tuple(spans)


def _beginnings(written: Written, index: int) -> tuple[str, str]:
    """The conversation up to where a turn is asked for, and up to its end."""
    try:
        before = written.write(written.messages[:index], written.tools, True)
        if index + 1 == len(written.messages):
            return before, written.whole
        return before, written.write(written.messages[: index + 1], written.tools, False)
    except TemplateProblem as problem:
        raise written.unproven(
            index, f"the template does not take the turns up to here ({problem.__cause__})"
        ) from None


def _said_length(said: str, text: str) -> int:
    """How much of what a template writes for a turn the model has to say.

    What only separates turns (chatml's newline after <|im_end|>) is not said, the answer's own white space is.
    """
    stripped = said.rstrip()
    if text not in stripped and text in said:
        return said.rindex(text) + len(text)
    return len(stripped)


# Where a template rewrites its beginnings (tools before the last user turn; earlier <think> parts left out), each turn
# is marked where it stands, and what is written between two marks is compared instead.


@dataclass(frozen=True)
class Marked:
    """A rendering with marks: its text without them, and for each mark its position, kind and message number."""

    text: str
    positions: list[int]
    kinds: list[str]
    numbers: list[int]

    def edge(self, number: int, kind: str) -> int | None:
        """The place among the marks of the first OPEN or the last CLOSE of a message."""
        found = [i for i, mark in enumerate(zip(self.kinds, self.numbers, strict=True)) if mark == (kind, number)]
        return (found[0] if kind == OPEN else found[-1]) if found else None


def _mark_whole(written: Written, index: int) -> Marked:
    if any(OPEN <= character <= END for character in written.whole):
        what = "private-use characters (U+F0000 to U+F0002) stand in this row; remove them"
        raise written.problem("private_characters", index, what)
    marked = _read_marks(written.write(_with_marks(written.messages), written.tools, False))
    if marked.text != written.whole:
        raise written.unproven(index, "what the template writes changes when the turns are marked")
    return marked


def _local_span(written: Written, marked: Marked, index: int, beginnings: tuple[str, str]) -> Span:
    """The range of one turn between the mark before it and the end of what is written for it.

    Two facts are compared: what follows the last mark when this turn is asked for stands before it in the whole, too;
    and what follows this turn's last mark when the conversation ends here follows it in the whole, too.
    """
    messages = _with_marks(written.messages)
    before = _read_marks(written.write(messages[:index], written.tools, True))
    after = _read_marks(written.write(messages[: index + 1], written.tools, False))
    if (before.text, after.text) != beginnings:
        raise written.unproven(index, "what the template writes changes when the turns are marked")
    first, last = marked.edge(index, OPEN), marked.edge(index, CLOSE)
    after_last = after.edge(index, CLOSE)
    if not first or last is None or after_last is None or not before.positions:
        raise written.unproven(index, "it says nothing, and what is written before it changes with what follows")
    if set(marked.numbers[first : last + 1]) != {index} or after_last + 1 != len(after.positions):
        raise written.unproven(index, "the template writes other turns into it")
    asked = before.text[before.positions[-1] :]
    start = marked.positions[first - 1]
    same = (before.numbers[-1], before.kinds[-1]) == (marked.numbers[first - 1], marked.kinds[first - 1])
    if not (same and _between(marked, first - 1, first).startswith(asked)):
        raise written.unproven(index, "what the template writes before it changes with what follows")
    closing = after.text[after.positions[after_last] :]
    end = marked.positions[last]
    if not _between(marked, last, last + 1).startswith(closing):
        raise written.unproven(index, "what the template writes after it changes with what follows")
    return start + len(asked), end + len(closing)


def _between(marked: Marked, one: int, other: int) -> str:
    end = marked.positions[other] if other < len(marked.positions) else len(marked.text)
    return marked.text[marked.positions[one] : end]


def _with_marks(messages: Sequence[Message]) -> list[Message]:
    """The messages with marks around what they say, inside its outer white space, so that trimming does the same."""
    # Equal messages carry equal marks, for a template that compares them; an answer always carries its own.
    numbers = [
        index if message["role"] == "assistant" else messages.index(message) for index, message in enumerate(messages)
    ]
    return [_marked_message(message, number) for message, number in zip(messages, numbers, strict=True)]


def _marked_message(message: Message, number: int) -> Message:
    def around(text: str) -> str:
        core = text.strip()
        return text.replace(core, f"{OPEN}{number}{END}{core}{CLOSE}{number}{END}", 1) if core else text

    marked = {**message, "content": around(message["content"])}
    if "tool_calls" in message:
        marked["tool_calls"] = [
            {**call, "function": {**call["function"], "name": around(call["function"]["name"])}}
            for call in message["tool_calls"]
        ]
    return marked


def _read_marks(rendered: str) -> Marked:
    pieces, positions, kinds, numbers = [], [], [], []
    length = end = 0
    for match in MARK.finditer(rendered):
        pieces.append(rendered[end : match.start()])
        length += len(pieces[-1])
        positions.append(length)
        kinds.append(match[1])
        numbers.append(int(match[2]))
        end = match.end()
    return Marked("".join([*pieces, rendered[end:]]), positions, kinds, numbers)


def stands_in(text: str, rendered: str) -> bool:
    """Whether a text is written, as it is or as JSON writes it."""
    if text in rendered:
        return True
    return json.dumps(text, ensure_ascii=False)[1:-1] in rendered or json.dumps(text)[1:-1] in rendered


def texts_of(message: Message) -> Iterator[str]:
    """What a message says: its text without outer white space, and the names and values of its calls."""
    if core := message["content"].strip():
        yield core
    for call in message.get("tool_calls", ()):
        yield call["function"]["name"]
        yield from values_of(call["function"]["arguments"])


def values_of(value: Any) -> Iterator[str]:
    if isinstance(value, Mapping):
        for item in value.values():
            yield from values_of(item)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from values_of(item)
    elif isinstance(value, str):
        yield value.strip()
    elif value is not None and not isinstance(value, bool):  # whose spelling depends on who writes it
        yield json.dumps(value)


def short(text: str) -> str:
    return repr(text if len(text) <= 40 else text[:37] + "...")
