"""Turn rows into conversations: a row of any known format in, a list of user and assistant turns out."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from finetune.data.sources import Row
from finetune.errors import Problem, raise_problems

INPUT_HEADING = "\n\n### Input:\n"
ROLES = ("system", "user", "assistant")
LONE_SURROGATE = re.compile("[\ud800-\udfff]")  # JSON can write one as an escape; no tokenizer can read it


@dataclass(frozen=True)
class Turn:
    """One message of a conversation; role is system, user or assistant."""

    role: str
    text: str


@dataclass(frozen=True)
class Conversation:
    """Turns that end in the assistant's answer, and the row they came from."""

    turns: tuple[Turn, ...]
    row: Row

    @property
    def answer(self) -> str:
        return self.turns[-1].text


class RowProblem(Exception):
    """What is wrong with one row; the caller adds where it stands."""


def detect_format(rows: Sequence[Row]) -> str:
    """The one format that fits the first row's columns.

    Raises:
        UserError: no known format has these columns.
    """
    columns = set(rows[0].values)
    for name, needed in COLUMNS.items():
        if set(needed) <= columns:
            return name
    known = "; ".join(f"{name}: {' + '.join(needed)}" for name, needed in COLUMNS.items())
    seen = ", ".join(sorted(columns)) or "none"
    raise_problems([Problem(rows[0].where, f"no known format has these columns: {seen}; rename them ({known})")])
    raise AssertionError("unreachable")


def read_conversations(
    rows: Sequence[Row], *, format: str, system: str | None
) -> tuple[list[Conversation], list[Problem]]:
    """One conversation a row, and every row that does not fit the format; `system` goes before turns without one."""
    conversations: list[Conversation] = []
    problems: list[Problem] = []
    for row in rows:
        try:
            turns = READERS[format](row.values)
        except RowProblem as problem:
            problems.append(Problem(row.where, str(problem)))
            continue
        if system is not None and turns[0].role != "system":
            turns = [Turn("system", system), *turns]
        conversations.append(Conversation(tuple(turns), row))
    return conversations, problems


def alpaca_user_text(instruction: str, input_text: str) -> str:
    """The user's turn of an Alpaca row: the instruction, then the input under its heading if there is one."""
    return f"{instruction}{INPUT_HEADING}{input_text}" if input_text else instruction


def _alpaca(values: dict[str, Any]) -> list[Turn]:
    user = alpaca_user_text(_text(values, "instruction"), _text(values, "input", default=""))
    if not user.strip():
        raise RowProblem("instruction: empty, and there is no input either; write one or delete the row")
    return [Turn("user", user), Turn("assistant", _text(values, "output"))]


def _prompt_completion(values: dict[str, Any]) -> list[Turn]:
    return [Turn("user", _text(values, "prompt")), Turn("assistant", _text(values, "completion"))]


def _messages(values: dict[str, Any]) -> list[Turn]:
    messages = values.get("messages")
    if not isinstance(messages, list) or not messages:
        raise RowProblem('messages: must be a list of {"role", "content"}, and not empty')
    turns = [_message_turn(index, message) for index, message in enumerate(messages)]
    spoken = [turn.role for turn in turns if turn.role != "system"]
    expected = ["user", "assistant"] * (len(spoken) // 2 + 1)
    if not spoken or spoken[-1] != "assistant" or spoken != expected[: len(spoken)]:
        raise RowProblem(f"messages: user and assistant must alternate and end with assistant, got {', '.join(spoken)}")
    if any(turn.role == "system" for turn in turns[1:]):
        raise RowProblem("messages: a system turn is possible only at the start")
    return turns


def _message_turn(index: int, message: Any) -> Turn:
    if not isinstance(message, dict):
        raise RowProblem(f'messages[{index}]: must be an object {{"role", "content"}}, got {type(message).__name__}')
    role = message.get("role")
    if role not in ROLES:
        raise RowProblem(f"messages[{index}].role: must be one of {', '.join(ROLES)}, got {role!r}")
    return Turn(role, _text(message, "content", prefix=f"messages[{index}]."))


def _text(values: dict[str, Any], column: str, *, default: str | None = None, prefix: str = "") -> str:
    value = values.get(column, default)
    if value is None and default is not None:
        value = default
    if column not in values and default is None:
        raise RowProblem(f"{prefix}{column}: this column is missing; the row has: {', '.join(sorted(values))}")
    if not isinstance(value, str):
        raise RowProblem(f"{prefix}{column}: must be text, got {_kind(value)}")
    if half := LONE_SURROGATE.search(value):
        raise RowProblem(f"{prefix}{column}: holds {half[0]!r}, half of a character; write the whole one, or remove it")
    return value


def _kind(value: Any) -> str:
    return "null" if value is None else f"{type(value).__name__} {str(value)[:40]!r}"


COLUMNS: dict[str, tuple[str, ...]] = {
    "alpaca": ("instruction", "output"),
    "messages": ("messages",),
    "prompt-completion": ("prompt", "completion"),
}
READERS: dict[str, Callable[[dict[str, Any]], list[Turn]]] = {
    "alpaca": _alpaca,
    "messages": _messages,
    "prompt-completion": _prompt_completion,
}
