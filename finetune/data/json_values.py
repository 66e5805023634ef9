"""JSON with one meaning: a text in, its value out, and what about it could be read in more than one way."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterator
from typing import Any

from finetune.data.stream import Flaw

DEEPEST = 100  # levels; Python itself gives up at about 1,000
MOST_DIGITS = 640  # of a whole number; the lowest bound that Python can be set to

SPACE = re.compile(r"[ \t\r\n]*")
HALF = re.compile("[\ud800-\udfff]")
UNCLEAN = re.compile(r"[^\w .\-\[\]]")

# What stands where the JSON ends to be JSON, and what to do about it.
CURES = {
    "'": "JSON has double quotes only; write the rows with json.dumps, not with str",
    "True": "JSON writes true",
    "False": "JSON writes false",
    "None": "JSON writes null",
    "undefined": "JSON writes null",
    "//": "JSON has no comments; delete it",
    "/*": "JSON has no comments; delete it",
    "#": "JSON has no comments; delete it",
    "}": "remove the comma before it",
    "]": "remove the comma before it",
    ",": "remove the comma, or write what is missing",
    "<": "this is a page of the web, not data; download the file itself",
    "\ufeff": "a byte order mark inside the file; remove it",
    "\0": "a NUL byte; the file is damaged, copy it again",
    "\t": "a tab inside a text; write \\t",
    "\n": "a line end inside a text; write \\n, or close the quotes",
    "\r": "a line end inside a text; write \\n, or close the quotes",
}


# What to do where that says nothing.
LAST_CURES = {
    "property name": "write each column's name in double quotes",
    "':'": "write a colon between name and value",
    "after a row": "write a comma between two rows",
    "','": "write a comma between two values, or close the bracket",
    "control character": "write it as an escape, or remove it",
    "": "write a text in double quotes, a number, true, false or null",
}


class _Odd:
    """Stands in a value for what cannot be kept as it is written."""

    def __init__(self, what: str) -> None:
        self.what = what


class StrictJson:
    """Decodes values one by one; after each, `flaw` says what is wrong with it beyond its grammar.

    A repeated key or a NaN must not end the decoding: only the decoder knows where the value ends.
    """

    def __init__(self) -> None:
        self._repeated: list[str] = []
        self._odd = False
        self._decoder = json.JSONDecoder(
            object_pairs_hook=self._object,
            parse_constant=self._constant,
            parse_int=self._whole,
            parse_float=self._float,
        )

    def decode(self, text: str, start: int) -> tuple[Any, int]:
        """The value that starts there, and where it ends.

        Raises:
            json.JSONDecodeError, RecursionError: as json does.
        """
        self._repeated.clear()
        self._odd = False
        return self._decoder.raw_decode(text, start)

    def flaw(self, value: Any, text: str, start: int, end: int) -> Flaw | None:
        """What is wrong with the value decoded last, which stands in text[start:end]."""
        if text.count("{", start, end) + text.count("[", start, end) > DEEPEST and _depth(value) > DEEPEST:
            return too_deep()
        if self._repeated:
            key = field_name(self._repeated[0])
            return Flaw("invalid_json", f"{key}: the same key twice in one object; remove one")
        if self._odd:
            path, odd = next((path, item) for path, item, _ in _places(value) if isinstance(item, _Odd))
            return Flaw("invalid_json", f"{field_name(path)}: {odd.what}")
        # The two halves of a character may be written as two escapes; a single one is no text.
        if text.find("\\ud", start, end) >= 0 or text.find("\\uD", start, end) >= 0:
            return half_character(value)
        return None if isinstance(value, dict) else not_an_object(value)

    def _object(self, pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        values = dict(pairs)
        if len(values) != len(pairs) and not self._repeated:
            self._repeated.append(Counter(key for key, _ in pairs).most_common(1)[0][0])
        return values

    def _strange(self, what: str) -> _Odd:
        self._odd = True
        return _Odd(what)

    def _constant(self, name: str) -> _Odd:
        return self._strange(f"{name} is no JSON; write a number, null or a text")

    def _whole(self, digits: str) -> int | _Odd:
        if len(digits) > MOST_DIGITS:
            return self._strange(f"a whole number of {len(digits):,} digits; write it as a text")
        return int(digits)

    def _float(self, digits: str) -> float | _Odd:
        number = float(digits)
        if abs(number) == float("inf"):
            return self._strange("a number too large to keep; write it as a text")
        if number == 0 and re.match(r"[^eE]*[1-9]", digits):
            return self._strange("a number too small to keep; write it as a text")
        return number


def too_deep() -> Flaw:
    return Flaw("invalid_json", f"row: nested deeper than {DEEPEST} levels; flatten or delete it")


def not_an_object(value: Any) -> Flaw | None:
    """The flaw of a value that has no columns; half a character in it does not matter then."""
    if isinstance(value, dict):
        return None
    kind = "null" if value is None else type(value).__name__
    return Flaw("not_an_object", f'row: an object {{"column": ...}} is needed, got {kind}; write one or delete the row')


def half_character(value: Any) -> Flaw | None:
    """The first text, name of a column included, that no UTF-8 file can hold; else as not_an_object."""
    for path, item, _ in _places(value):
        texts = list(item) if isinstance(item, dict) else [item] if isinstance(item, str) else []
        for found in filter(None, map(HALF.search, texts)):
            what = f"holds {ascii(found.group())}, half of a character; write the whole one, or remove it"
            return Flaw("invalid_text", f"{field_name(path)}: {what}")
    return not_an_object(value)


def not_utf8(byte: int, place: str) -> Flaw:
    return Flaw("invalid_text", f"line: {place}, 0x{byte:02x}, is not UTF-8; save the file as UTF-8")


def explain(text: str, error: json.JSONDecodeError, *, column: int) -> str:
    """`not JSON at column N, ...; cure`, for the place where the decoder gave up."""
    what = f"not JSON at column {column}, "
    if error.msg == "Extra data":
        return f"{what}{ascii(text[error.pos : error.pos + 12])} stands after the row; write one row per line"
    if error.msg.startswith("Unterminated string"):
        return f"{what}a text starts that is never closed; close its quotes, or delete the cut row"
    if error.msg.startswith("Invalid \\"):
        return f"{what}a backslash that starts no escape; write \\\\ for a backslash"
    if error.msg.startswith("Illegal trailing comma"):
        return f"{what}a comma before the closing bracket; remove it"
    here = text[error.pos : error.pos + 12]
    if not here.strip("\r\n") and not error.msg.startswith("Invalid control"):
        return f"{what}the row ends too early; complete or delete it"
    cure = next((cure for start, cure in CURES.items() if here.startswith(start)), "")
    cure = cure or next(cure for words, cure in LAST_CURES.items() if words in error.msg)
    return f"{what}{error.msg.removesuffix(' at').lower()}, got {ascii(here)}; {cure}"


def field_name(path: str) -> str:
    """The path of a value as a message shows it: short, printable and without a colon."""
    clean = UNCLEAN.sub(lambda match: f"\\u{ord(match.group()):04x}", path)
    if not clean.strip():
        return "row"
    return clean if len(clean) <= 80 else f"{clean[:77]}..."


def _places(value: Any) -> Iterator[tuple[str, Any, int]]:
    """Every value inside a value, with its path and its depth, in the order of the text."""
    stack = [("row", value, 1)]
    while stack:
        path, item, depth = stack.pop()
        yield path, item, depth
        if isinstance(item, dict):
            inner = [(key if depth == 1 else f"{path}.{key}", each, depth + 1) for key, each in item.items()]
        elif isinstance(item, list):
            inner = [(f"{path}[{index}]", each, depth + 1) for index, each in enumerate(item)]
        else:
            continue
        stack.extend(reversed(inner))


def _depth(value: Any) -> int:
    return max(depth for _, item, depth in _places(value) if isinstance(item, (dict, list)))
