"""CSV and plain text: chunks of bytes in, rows out, every value the text that the file holds."""

from __future__ import annotations

import csv
from collections.abc import Iterator, Sequence
from typing import Any

from finetune.data.json_values import field_name, not_utf8
from finetune.data.rows import UNREADABLE
from finetune.data.stream import LARGEST_ROW, Flaw, Found, Lines, too_large

REST = "the rest of the file was not read"
DELIMITERS = {",": "commas", ";": "semicolons", "\t": "tabs", "|": "bars"}


# --- CSV ---


class _TooLarge(Exception):
    """A record that goes on for longer than a row may."""


class _Record:
    """Feeds lines to csv.reader; remembers what that cannot tell: where a record starts, bytes that are no text."""

    def __init__(self, lines: Lines, *, limit: int) -> None:
        self._lines, self._limit = lines, limit
        self._iterator = iter(lines)
        self.ended = False
        self.start()

    def start(self) -> None:
        self.line, self.quotes, self._bytes = 0, 0, 0
        self.flaw: Flaw | None = None

    def __iter__(self) -> Iterator[str]:
        return self

    def __next__(self) -> str:
        line = self._take()
        self._bytes += len(line or b"")
        if line is None or self._bytes > self._limit:
            self._skip_the_rest()
            raise _TooLarge
        try:
            text = line.decode()
        except UnicodeDecodeError as error:
            self.flaw = self.flaw or not_utf8(line[error.start], f"byte {error.start + 1} of line {self._lines.number}")
            return line.decode(errors="surrogateescape")
        if "\0" in text:
            place = f"a NUL byte in line {self._lines.number} at column {text.index(chr(0)) + 1}"
            self.flaw = self.flaw or Flaw("invalid_text", f"line: {place}; remove it, or copy the file again")
        return text

    def _take(self) -> bytes | None:
        try:
            line = next(self._iterator)
        except StopIteration:
            self.ended = True
            raise
        self.line = self.line or self._lines.number
        self.quotes += line.count(b'"') if line is not None else self._lines.quotes
        return line

    def _skip_the_rest(self) -> None:
        """A record ends with a line after which every quotation mark has its partner."""
        try:
            while self.quotes % 2:
                self._take()
        except StopIteration:
            pass


def read_table(chunks: Iterator[bytes], *, delimiter: str, limit: int) -> Iterator[Found]:
    """The rows of a table with a heading; every value is text, and no value is guessed."""
    lines = Lines(chunks, limit=limit)
    record = _Record(lines, limit=limit)
    # The bound on a field is one for the whole process; `limit` keeps rows below it.
    csv.field_size_limit(max(LARGEST_ROW, limit))
    reader = csv.reader(record, delimiter=delimiter, strict=True)
    heading: list[str] | None = None
    while (fields := _next_record(reader, record, limit=limit)) is not None:
        if heading is None and fields:
            if flaw := _heading_flaw(fields, delimiter):
                yield record.line, flaw
                return
            heading = fields if isinstance(fields, list) else None
        elif isinstance(fields, Flaw):
            yield record.line, fields
            if fields.reason == UNREADABLE:
                return
        elif heading and fields:
            yield record.line, _table_row(heading, fields)


def _next_record(reader: Any, record: _Record, *, limit: int) -> list[str] | Flaw | None:
    """The next record's fields ([] for a blank line), or its flaw; None at the end of the file."""
    record.start()
    try:
        fields = next(reader)
    except StopIteration:
        return None
    except _TooLarge:
        return too_large(limit) if record.quotes % 2 == 0 else _open_quote()
    except csv.Error as error:
        if record.ended:
            return _open_quote()
        if record.quotes % 2:  # where this record ends is anybody's guess
            return Flaw(UNREADABLE, f"row: {error}; write a quotation mark inside a value twice; {REST}")
        return record.flaw or Flaw("invalid_table", f"row: {error}; write a quotation mark inside a value twice")
    return record.flaw or fields


def _open_quote() -> Flaw:
    return Flaw(UNREADABLE, f"row: a quotation mark opens a value here that is never closed; close it; {REST}")


def _heading_flaw(fields: list[str] | Flaw, delimiter: str) -> Flaw | None:
    if isinstance(fields, Flaw):
        return Flaw(UNREADABLE, f"{fields.message}; without its heading {REST}")
    others = [name for sign, name in DELIMITERS.items() if sign != delimiter and len(fields) == 1 and sign in fields[0]]
    if others:
        cure = f"save it with {DELIMITERS[delimiter]}" + (", or let its name end in .tsv" if others == ["tabs"] else "")
        return Flaw(UNREADABLE, f"heading: one column with {others[0]} in its name, {ascii(fields[0][:40])}; {cure}")
    if "" in fields:
        return Flaw(UNREADABLE, f"heading: column {fields.index('') + 1} has no name; name or delete it")
    if repeated := [name for index, name in enumerate(fields) if name in fields[:index]]:
        return Flaw(UNREADABLE, f"{field_name(repeated[0])}: two columns have this name; rename or delete one")
    return None


def _table_row(heading: Sequence[str], fields: Sequence[str]) -> dict[str, Any] | Flaw:
    if len(fields) == len(heading):
        return dict(zip(heading, fields, strict=True))
    count = f"{len(fields)} fields" if len(fields) > 1 else "1 field"
    cure = "put quotation marks around a value that holds the separator, or correct the row"
    return Flaw("invalid_table", f"row: {count}, the heading has {len(heading)}; {cure}")


# --- plain text ---


def read_paragraphs(chunks: Iterator[bytes], *, limit: int) -> Iterator[Found]:
    """One row {"text": ...} for each block between blank lines; its lines are joined by \\n."""
    lines = Lines(chunks, limit=limit)
    texts: list[str] = []
    start, size, flaw = 0, 0, None
    for line in lines:
        if line is not None and not line.strip():
            if start:
                yield start, flaw or {"text": "\n".join(texts)}
            texts, start, size, flaw = [], 0, 0, None
            continue
        start = start or lines.number
        size += len(line or b"")
        flaw = flaw or (too_large(limit) if line is None or size > limit else _line_flaw(line, lines.number))
        if line is not None and flaw is None:
            texts.append(line.decode().rstrip("\r\n"))
    if start:
        yield start, flaw or {"text": "\n".join(texts)}


def _line_flaw(line: bytes, number: int) -> Flaw | None:
    try:
        column = line.decode().find("\0") + 1
    except UnicodeDecodeError as error:
        return not_utf8(line[error.start], f"byte {error.start + 1} of line {number}")
    cure = "remove it, or copy the file again"
    return Flaw("invalid_text", f"line: a NUL byte in line {number} at column {column}; {cure}") if column else None
