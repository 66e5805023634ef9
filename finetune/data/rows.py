"""What passes between the rooms of data/: a row, the turns it says, and the reason why a row cannot be used."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from finetune.errors import Problem

# Why a row cannot be trained on. `data.drop` takes any of these names; an unreadable file cannot be dropped.
REASONS = {
    "invalid_json": "the line is no JSON, or JSON that reads in more than one way (a repeated key, NaN)",
    "invalid_text": "text that is not UTF-8, or holds half of a character",
    "invalid_table": "a line of a table with more or fewer fields than its heading",
    "row_too_large": "one row of more than 64 MiB",
    "not_an_object": "a row that is no object of columns",
    "other_format": "a row shaped unlike the first row of its source",
    "missing_column": "a column or key that the format needs is not there",
    "wrong_type": "a value of another type than the format needs",
    "bad_turns": "turns that do not alternate, or do not end with the assistant",
    "has_media": "the row has an image, a sound or a video, and only text is trained on",
    "bad_tool_call": "a tool call or a tool that cannot be read",
    "empty_prompt": "nothing is asked",
    "empty_answer": "the answer is empty",
    "undesired_answer": "the row's own label says that its answer is not wanted",
    "template_refuses": "the chat template refuses these turns",
    "template_drops_turn": "the chat template leaves out what a turn says",
    "template_unproven": "where the answer stands in the rendered text cannot be proven",
    "private_characters": "private-use characters beside the text of a control token",
    "never_stops": "the answer does not end in a control token, so the model would never stop",
    "too_long": "more tokens than data.max_tokens",
    "no_supervised_token": "no token of the row would be learned",
}
UNREADABLE = "unreadable"
DUPLICATE, LEAKED = "duplicate", "leaked"  # dropped only: data.deduplicate, data.leaked


@dataclass(frozen=True, slots=True)
class Row:
    """One raw record and where it stands."""

    values: dict[str, Any]
    file: str
    line: int

    @property
    def where(self) -> str:
        return f"{self.file}:{self.line}"


@dataclass(frozen=True, slots=True)
class Refusal:
    """A row (`unreadable`: the rest of a file) that cannot be used; `message` is `field: why; cure`."""

    reason: str
    where: str
    message: str

    @property
    def problem(self) -> Problem:
        return Problem(self.where, self.message)


@dataclass(frozen=True, slots=True)
class ToolCall:
    """A call that the assistant makes; `id` is nine letters or digits, as the strictest template wants it."""

    name: str
    arguments: Mapping[str, Any]
    id: str


@dataclass(frozen=True, slots=True)
class Turn:
    """One message; role is system, user, assistant or tool. `train` says whether an assistant's turn is learned."""

    role: str
    text: str
    train: bool = True
    tool_calls: tuple[ToolCall, ...] = ()
    name: str | None = None  # of the tool that answers
    tool_call_id: str | None = None  # of the call it answers


@dataclass(frozen=True, slots=True)
class Conversation:
    """Turns that end in the assistant's answer, the tools it may call, and the row they came from."""

    turns: tuple[Turn, ...]
    row: Row
    tools: tuple[Mapping[str, Any], ...] = field(default=())

    @property
    def answer(self) -> str:
        return self.turns[-1].text
