"""JSON files, rows on lines or in one list: chunks of bytes in, rows out, each with the line it starts on."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from itertools import chain
from typing import Any

from finetune.data.json_list import read_list
from finetune.data.json_values import SPACE, StrictJson, explain, not_utf8, too_deep
from finetune.data.rows import UNREADABLE
from finetune.data.stream import Damaged, Flaw, Found, Lines, too_large

WRAPPERS = {"data", "train", "rows", "examples", "records", "items", "dataset", "instances", "samples"}


def read_json(chunks: Iterator[bytes], *, limit: int) -> Iterator[Found]:
    """The rows of a .json or .jsonl file; its first character, not its name, says which it is."""
    head = []
    for chunk in chunks:
        head.append(chunk)
        if chunk.strip():
            break
    start = b"".join(head).lstrip()
    whole = chain(head, chunks)
    if start.startswith(b"["):
        yield from read_list(whole, limit=limit)
    elif key := _spread_out(start):
        cure = f"write the rows one per line (jq -c {key!r} FILE > rows.jsonl), or as a list [{{...}}, {{...}}]"
        yield 1, Flaw(UNREADABLE, f"file: one JSON object over several lines, not rows; {cure}")
    else:
        yield from _read_lines(whole, limit=limit)


# --- one row per line ---


def _read_lines(chunks: Iterator[bytes], *, limit: int) -> Iterator[Found]:
    lines, strict = Lines(chunks, limit=limit), StrictJson()
    first: Found | None = None  # held back until it is known whether it is the only one
    count = 0
    try:
        for line in lines:
            if line is not None and not line.strip():
                continue
            found = lines.number, too_large(limit) if line is None else _row(line, strict)
            count += 1
            if count == 1:
                first = found
                continue
            if first is not None:
                yield first
                first = None
            yield found
    except Damaged:
        if first is not None:
            yield first
        raise
    if first is not None:
        yield _unwrapped(first)


def _row(line: bytes, strict: StrictJson) -> dict[str, Any] | Flaw:
    try:
        text = line.decode().strip(" \t\r\n")
    except UnicodeDecodeError as error:
        return not_utf8(line[error.start], f"byte {error.start + 1} of the line")
    try:
        value, end = strict.decode(text, 0)
        if end != len(text):
            raise json.JSONDecodeError("Extra data", text, SPACE.match(text, end).end())  # type: ignore[union-attr]
    except json.JSONDecodeError as error:
        return Flaw("invalid_json", f"line: {explain(text, error, column=_indent(line) + error.pos + 1)}")
    except RecursionError:
        return too_deep()
    return strict.flaw(value, text, 0, end) or value


def _indent(line: bytes) -> int:
    return len(line) - len(line.lstrip(b" \t\r\n"))


def _unwrapped(only: Found) -> Found:
    """The only row of a file, or a flaw where it is an object around the rows."""
    line, row = only
    if isinstance(row, dict):
        for key in WRAPPERS & row.keys():
            rows = row[key]
            if isinstance(rows, list) and rows and all(_looks_like_row(each) for each in rows):
                cure = f"keep the list alone (jq -c '.{key}[]' FILE > rows.jsonl)"
                what = f"file: the {len(rows)} rows are inside an object, under {key!r}"
                return line, Flaw(UNREADABLE, f"{what}; {cure}")
    return only


def _looks_like_row(value: Any) -> bool:
    return isinstance(value, dict) and not {"role", "from"} & value.keys()


def _spread_out(start: bytes) -> str | None:
    """What jq makes rows of, if the file starts with an object that goes on over several lines."""
    first, _, rest = start.partition(b"\n")
    following = rest.lstrip()[:1]
    if not first.startswith(b"{") or not following:
        return None
    text = first.decode(errors="replace").rstrip()
    try:
        json.loads(text)
    except RecursionError:
        return None
    except ValueError as error:
        cut = (
            isinstance(error, json.JSONDecodeError)
            and error.pos >= len(text) - 1
            and error.msg[:3] not in ("Unt", "Inv")
        )
        if not cut or (following not in b'"}]' and not text.endswith("[")):
            return None
        key = re.search(rb'"(\w+)"\s*:\s*\[\s*\{', start)
        return f".{key.group(1).decode()}[]" if key and key.group(1).decode() in WRAPPERS else "."
    return None
