"""Read data files: paths in, rows out, each with the file and line it stands on."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from finetune.errors import Problem


@dataclass(frozen=True)
class Row:
    """One raw record and where it stands."""

    values: dict[str, Any]
    file: str
    line: int

    @property
    def where(self) -> str:
        return f"{self.file}:{self.line}"


def read_rows(paths: Iterable[str]) -> tuple[list[Row], list[Problem]]:
    """All rows of the files, in order, and every unreadable file, invalid JSON line and row that is no object."""
    rows: list[Row] = []
    problems: list[Problem] = []
    for path in paths:
        for found in _read_file(Path(path).expanduser(), path):
            (rows if isinstance(found, Row) else problems).append(found)  # type: ignore[arg-type]
    return rows, problems


def _read_file(path: Path, name: str) -> Iterator[Row | Problem]:
    if path.is_dir():
        yield Problem(name, "is a folder; name a .json or .jsonl file in it")
        return
    if not path.is_file():
        nearby = ", ".join(sorted(other.name for other in path.parent.glob("*.json*"))[:5])
        hint = f"; in the same folder: {nearby}" if nearby else ""
        yield Problem(name, f"no such data file; correct the path, which starts at the current folder{hint}")
        return
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        yield Problem(name, f"not UTF-8 text at byte {error.start}; save the file as UTF-8")
        return
    if not text.strip():
        yield Problem(name, "the file is empty; it needs at least one row")
        return
    entries = list(_array_entries(text) if text.lstrip().startswith("[") else _line_entries(text))
    if not entries:
        yield Problem(name, "holds no rows; it needs at least one")
    for line, entry in entries:
        if isinstance(entry, ValueError):
            yield Problem(f"{name}:{line}", f"invalid JSON: {entry}")
        elif not isinstance(entry, dict):
            yield Problem(f"{name}:{line}", f'a row must be an object {{"...": ...}}, got {type(entry).__name__}')
        else:
            yield Row(entry, name, line)


def _line_entries(text: str) -> Iterator[tuple[int, Any]]:
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            try:
                yield number, json.loads(line)
            except (ValueError, RecursionError) as error:
                yield number, _reason(error)


def _array_entries(text: str) -> Iterator[tuple[int, Any]]:
    """(line, element) of a JSON array, read element by element so that every row keeps its line."""
    decoder = json.JSONDecoder()
    position = text.index("[") + 1
    line, counted = 1, 0
    after_comma = False
    while True:
        position = _skip(text, position, " \t\r\n")
        line, counted = line + text.count("\n", counted, position), position
        if text[position : position + 1] == "]":
            if after_comma:
                yield line, ValueError("a comma stands before the closing ]; remove it")
            rest = text[position + 1 :].strip()
            if rest:
                yield line, ValueError(f"text after the end of the array: {rest[:20]!r}")
            return
        try:
            entry, position = decoder.raw_decode(text, position)
        except (ValueError, RecursionError) as error:
            at = error.lineno if isinstance(error, json.JSONDecodeError) else line
            yield at, ValueError(f"{_reason(error)}; the rest of the file was not read")
            return
        yield line, entry
        position = _skip(text, position, " \t\r\n")
        after_comma = text[position : position + 1] == ","
        if after_comma:
            position += 1
        elif text[position : position + 1] != "]":
            at = line + text.count("\n", counted, position)
            yield at, ValueError("expected ',' or ']' after a row; the rest of the file was not read")
            return


def _skip(text: str, position: int, characters: str) -> int:
    while position < len(text) and text[position] in characters:
        position += 1
    return position


def _reason(error: ValueError | RecursionError) -> ValueError:
    if isinstance(error, json.JSONDecodeError):
        return ValueError(f"{error.msg} at column {error.colno}")
    return ValueError("nested too deep" if isinstance(error, RecursionError) else str(error))
