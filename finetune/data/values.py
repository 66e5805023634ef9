"""One value of a row in, checked text or JSON out, or what is wrong with it in words anyone can print."""

from __future__ import annotations

import difflib
import json
import math
from collections.abc import Mapping
from typing import Any, NoReturn

LONGEST_SHOWN = 40  # characters of a value, and names of columns, that a message repeats
DEEPEST = 100  # levels inside a tool or the arguments of a call
Values = Mapping[str, Any]


class Unusable(Exception):
    """Why a row cannot be used: a name of REASONS and `field: what is wrong, got ...; what to do`."""

    def __init__(self, reason: str, message: str) -> None:
        super().__init__(message)
        self.reason = reason
        self.message = message


def text_of(value: Any, field: str) -> str:
    if not isinstance(value, str):
        raise Unusable("wrong_type", f"{field}: must be text, {got(value)}; write it as text")
    if not value.isascii():
        _check_whole_characters(value, field)
    return value


def has_media(field: str, what: str) -> Unusable:
    """Why a row with an image, a sound or a video is not trained on, and what to do."""
    cure = "delete the row, describe what is seen or heard as text, or drop such rows with data.drop: [has_media]"
    return Unusable("has_media", f"{field}: must not be there, {what}: only text is trained on; {cure}")


def _check_whole_characters(text: str, field: str) -> None:
    """No half of a surrogate pair: JSON can write one as an escape, and no tokenizer can read it."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        half = text[error.start]
        message = f"{field}: must be whole characters, got {half!r}, half of one; write the whole one, or remove it"
        raise Unusable("invalid_text", message) from None


def optional_text(values: Values, key: str, field: str, *, reason: str = "wrong_type") -> str | None:
    value = values.get(key)
    if value is None:
        return None
    if not isinstance(value, str):
        raise Unusable(reason, f"{field}.{key}: must be text, {got(value)}; write it as text")
    return text_of(value, f"{field}.{key}")


def list_of(value: Any, field: str) -> list[Any]:
    if not isinstance(value, list):
        raise Unusable("wrong_type", f"{field}: must be a list, {got(value)}; write its items in [ ]")
    return value


def needed_value(values: Values, key: str, field: str, *, reason: str = "missing_column") -> Any:
    if key not in values:
        near = near_name(values, key)
        cure = f"did you mean this by {shown(near)}?" if near else "add it"
        raise Unusable(reason, f"{field}: this key is missing, got {names_of(values)}; {cure}")
    return values[key]


def from_json(text: str, field: str) -> Any:
    try:
        return json.loads(text, object_pairs_hook=_each_key_once, parse_constant=_no_such_number)
    except (ValueError, RecursionError) as error:
        why = str(error) if len(str(error)) < 80 else "it cannot be read"
        cure = "write it as one JSON value"
        raise Unusable("bad_tool_call", f"{field}: must be JSON text, {got(text)} ({why}); {cure}") from None


def _each_key_once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) < len(pairs):
        raise ValueError("a repeated key")
    return values


def _no_such_number(word: str) -> NoReturn:
    raise ValueError(f"{word} is no number in JSON")


def check_json(value: Any, field: str) -> None:
    """Nothing but JSON inside, no half characters, and no nesting that would end a template's recursion."""
    left = [(value, 0)]
    while left:
        item, depth = left.pop()
        if depth > DEEPEST:
            what = f"must be nested at most {DEEPEST} deep, got more"
            raise Unusable("bad_tool_call", f"{field}: {what}; write it flatter")
        if isinstance(item, str):
            text_of(item, field)
        elif isinstance(item, dict):
            left.extend((each, depth + 1) for pair in item.items() for each in pair)
        elif isinstance(item, list):
            left.extend((each, depth + 1) for each in item)
        elif not _is_plain(item):
            raise Unusable("bad_tool_call", f"{field}: must be what JSON can say, {got(item)}; write it as text")


def _is_plain(item: Any) -> bool:
    return isinstance(item, bool | int | None) or (isinstance(item, float) and math.isfinite(item))


def got(value: Any) -> str:
    """`got ...` for a message: short, printable, whatever the value is."""
    if value is None or isinstance(value, bool):
        return f"got {json.dumps(value)}"
    if isinstance(value, str):
        return f"got {shown(value)}" if value else "got empty text"
    if isinstance(value, int):
        return f"got {value}" if value.bit_length() <= 64 else "got a very large number"
    if isinstance(value, float):
        return f"got {value}"
    if isinstance(value, list):
        return f"got a list of {len(value)}"
    return f"got an object of {names_of(value)}" if isinstance(value, dict) else f"got {type(value).__name__}"


def shown(text: str) -> str:
    return repr(text) if len(text) <= LONGEST_SHOWN else f"{text[:LONGEST_SHOWN]!r}..."


def names_of(values: Values) -> str:
    names = [str(name) for name in list(values)[:LONGEST_SHOWN]]
    plain = [name if name.isprintable() and 0 < len(name) <= LONGEST_SHOWN else shown(name) for name in names]
    more = f" and {len(values) - len(names)} more" if len(values) > len(names) else ""
    return ", ".join(sorted(plain)) + more if plain else "no keys"


def near_name(values: Values, wanted: str) -> str | None:
    names = [name for name in list(values)[:LONGEST_SHOWN] if isinstance(name, str) and len(name) <= LONGEST_SHOWN]
    return next(iter(difflib.get_close_matches(wanted, names, n=1)), None)
