"""Read the turns of a row: role/content or from/value objects in, turns that know where they stand in the row out."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any, NamedTuple

from finetune.data.rows import Turn
from finetune.data.tool_calls import FUNCTION_CALL, calls_in_text, calls_of
from finetune.data.values import (
    LONGEST_SHOWN,
    Unusable,
    Values,
    got,
    has_media,
    list_of,
    needed_value,
    optional_text,
    text_of,
)

# Of OpenAI's and transformers' typed parts.
MEDIA_PARTS = ("image", "image_url", "input_image", "video", "video_url", "audio", "input_audio", "audio_url", "file")


class Spoken(NamedTuple):
    """A turn, where its role and its text stand in the row, and the role in the row's own word."""

    turn: Turn
    role_field: str
    text_field: str
    word: str


class Style(NamedTuple):
    """The keys of a turn, and what each word for a role means."""

    role: str
    text: str
    roles: Mapping[str, str]


MESSAGES = Style(
    "role",
    "content",
    {
        "system": "system",
        "developer": "system",
        "user": "user",
        "assistant": "assistant",
        "tool": "tool",
        "ipython": "tool",
        "function": "tool",
    },
)
SHAREGPT = Style(
    "from",
    "value",
    {
        "system": "system",
        "human": "user",
        "user": "user",
        "gpt": "assistant",
        "assistant": "assistant",
        "bot": "assistant",
        "chatgpt": "assistant",
        FUNCTION_CALL: "assistant",
        "observation": "tool",
        "tool": "tool",
    },
)


def turns_of(value: Any, field: str, style: Style) -> list[Spoken]:
    if not list_of(value, field):
        raise Unusable("bad_turns", f"{field}: must hold turns, got an empty list; write them or delete the row")
    return [turn_of(said, f"{field}[{index}]", style) for index, said in enumerate(value)]


def turn_of(said: Any, field: str, style: Style) -> Spoken:
    if not isinstance(said, dict):
        shape = f'{{"{style.role}", "{style.text}"}}'
        raise Unusable("wrong_type", f"{field}: must be an object {shape}, {got(said)}; write it so")
    other = SHAREGPT if style is MESSAGES else MESSAGES
    if style.role not in said and other.role in said:
        style = other  # both styles are met under either column
    role_field, text_field = f"{field}.{style.role}", f"{field}.{style.text}"
    word = _role_word(said, role_field, style)
    role = style.roles[word]
    if word == FUNCTION_CALL:
        text, calls = "", calls_in_text(needed_value(said, style.text, text_field), text_field)
    else:
        calls = calls_of(said, field, role)
        text = _content(said, style.text, text_field, optional=bool(calls))
    turn = Turn(
        role,
        text,
        _train(said, field, role) if "train" in said or "weight" in said else True,
        calls,
        optional_text(said, "name", field) if role == "tool" else None,
        optional_text(said, "tool_call_id", field) if role == "tool" else None,
    )
    return Spoken(turn, role_field, text_field, word)


def plain_turn(role: str, text: Any, field: str) -> Spoken:
    return Spoken(Turn(role, text_of(text, field)), field, field, role)


def _role_word(said: Values, field: str, style: Style) -> str:
    word = needed_value(said, style.role, field)
    known = ", ".join(style.roles)
    if not isinstance(word, str):
        raise Unusable("wrong_type", f"{field}: must be the name of a role, {got(word)}; write one of {known}")
    if word in style.roles:
        return word
    near = _near_role(word.lower(), style) if len(word) <= LONGEST_SHOWN else None
    cure = f"did you mean '{near}'?" if near else "write one of them"
    raise Unusable("bad_turns", f"{field}: must be one of {known}, {got(word)}; {cure}")


def _near_role(word: str, style: Style) -> str | None:
    """The role that the other style calls so, else the most similar word."""
    meant = MESSAGES.roles.get(word, SHAREGPT.roles.get(word))
    if meant in style.roles:
        return meant
    return next(iter(difflib.get_close_matches(word, style.roles, n=1, cutoff=0.5)), None)


def _content(said: Values, key: str, field: str, *, optional: bool) -> str:
    """The text of a turn; typed parts are joined, and a turn that calls tools may have none."""
    if optional and said.get(key) is None:
        return ""
    content = needed_value(said, key, field)
    if not isinstance(content, list):
        return text_of(content, field)
    texts = []
    for index, part in enumerate(content):
        kind = part.get("type") if isinstance(part, dict) else None
        if kind in MEDIA_PARTS:
            raise has_media(f"{field}[{index}].type", got(kind))
        if kind != "text":
            what = got(part if kind is None else kind)
            cure = "only text can be learned: write the others as text, or delete the row"
            raise Unusable("wrong_type", f"{field}[{index}].type: must be 'text', {what}; {cure}")
        texts.append(text_of(needed_value(part, "text", f"{field}[{index}].text"), f"{field}[{index}].text"))
    return "".join(texts)


def _train(said: Values, field: str, role: str) -> bool:
    """Whether an assistant's turn is learned, by its own word; null is no word."""
    train, weight = said.get("train"), said.get("weight")
    given = "weight" if train is None else "train"
    if train is None and weight is None:
        return True
    if role != "assistant":
        what = "only an assistant's turn is learned or not"
        raise Unusable("wrong_type", f"{field}.{given}: {what}, got it on a turn of {role}; delete this key")
    if not isinstance(train, bool | None):
        raise Unusable("wrong_type", f"{field}.train: must be true or false, {got(train)}; write one of them")
    if weight is not None and (isinstance(weight, bool) or not isinstance(weight, int | float) or weight not in (0, 1)):
        raise Unusable("wrong_type", f"{field}.weight: must be 0 or 1, {got(weight)}; write one of them")
    if None not in (train, weight) and train != bool(weight):
        what = f"must say the same as train, {got(weight)} beside train {got(train)[4:]}"
        raise Unusable("wrong_type", f"{field}.weight: {what}; keep one of the two keys")
    return bool(weight if train is None else train)


def unlearned(spoken: Iterable[Spoken]) -> list[Spoken]:
    return [
        said._replace(turn=replace(said.turn, train=False)) if said.turn.role == "assistant" else said
        for said in spoken
    ]
