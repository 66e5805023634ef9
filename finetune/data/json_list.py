"""A JSON list of rows, read through a moving window: chunks of bytes in, rows out, each with the line it starts on."""

from __future__ import annotations

import codecs
import io
import json
import re
from collections.abc import Iterator
from typing import Any

from finetune.data.json_values import SPACE, StrictJson, explain, not_utf8, too_deep
from finetune.data.rows import UNREADABLE
from finetune.data.stream import CHUNK, Damaged, Flaw, Found, too_large

ESCAPED = re.compile("[\udc80-\udcff]")  # bytes that are not UTF-8, as the error handler surrogateescape keeps them
UNSURE = 16  # an error this near to the end of what was read may be none once more is read
REST = "the rest of the file was not read"


class _Window:
    """The part of a text that is looked at: `at` is where the next value starts, what stands before it is let go.

    It grows by at least its own size, so that one very long value costs time in proportion to its length.
    """

    def __init__(self, chunks: Iterator[bytes]) -> None:
        self._chunks = chunks
        self._decoder = codecs.getincrementaldecoder("utf-8")("strict")
        # Line ends become \n here. That changes no row: JSON has none inside a text but as an escape.
        self._text_decoder = io.IncrementalNewlineDecoder(self._decoder, translate=True)
        self.text, self.at = "", 0
        self.ended = False
        self.damage: Damaged | None = None
        self.not_utf8 = False  # whether bytes that are not UTF-8 have been met
        self._line, self._counted = 1, 0
        self._dropped = 0  # characters of the first line that are not in `text` any more

    def grow(self) -> bool:
        """Read on; False where the file ends."""
        self._dropped, self._line, self._counted = self.column(self.at) - 1, self.line(self.at), 0
        parts = [self.text[self.at :]]
        wanted = max(CHUNK, len(parts[0]))
        while wanted > 0 and not self.ended:
            parts.append(self._next())
            wanted -= len(parts[-1])
        self.text, self.at = "".join(parts), 0
        return len(parts) > 1

    def _next(self) -> str:
        try:
            chunk = next(self._chunks, b"")
        except Damaged as damage:
            self.damage, chunk = damage, b""
        self.ended = not chunk
        try:
            return self._text_decoder.decode(chunk, final=self.ended)  # type: ignore[arg-type]
        except UnicodeDecodeError:
            self.not_utf8, self._decoder.errors = True, "surrogateescape"
            return self._text_decoder.decode(chunk, final=self.ended)  # type: ignore[arg-type]

    def mark(self) -> str:
        """The next character that is no white space, not consumed; nothing at the end."""
        while True:
            self.at = SPACE.match(self.text, self.at).end()  # type: ignore[union-attr]
            if self.at < len(self.text) or not self.grow():
                return self.text[self.at : self.at + 1]

    def line(self, position: int) -> int:
        """The line of a position at or behind `at`."""
        self._line += self.text.count("\n", self._counted, self.at)
        self._counted = self.at
        return self._line + self.text.count("\n", self.at, position)

    def column(self, position: int) -> int:
        start = self.text.rfind("\n", 0, position)
        return position - start if start >= 0 else self._dropped + position + 1


def read_list(chunks: Iterator[bytes], *, limit: int) -> Iterator[Found]:
    window, strict = _Window(chunks), StrictJson()
    window.mark()
    window.at += 1
    comma = False
    while True:
        mark = window.mark()
        line = window.line(window.at)
        if mark == "]":
            yield from _after_list(window, comma=comma)
            return
        try:
            yield line, _element(window, strict, limit=limit)
            mark = window.mark()
            if mark not in (",", "]"):
                raise json.JSONDecodeError("Expecting ',' or ']' after a row", window.text, window.at)
        except json.JSONDecodeError as error:
            yield window.line(error.pos), _broken(window, error)
            return
        comma = mark == ","
        window.at += comma


def _element(window: _Window, strict: StrictJson, *, limit: int) -> dict[str, Any] | Flaw:
    """The value at the window's start, which is consumed.

    Raises:
        json.JSONDecodeError: where the file's grammar is broken or the file ends.
    """
    while True:
        try:
            value, end = strict.decode(window.text, window.at)
            if end + 2 < len(window.text) or window.ended:  # else a number may go on, as 1 does in 1e-5
                break
        except RecursionError:
            _skip(window)
            return too_deep()
        except json.JSONDecodeError as error:
            unsure = error.pos >= len(window.text) - UNSURE or error.msg.startswith("Unterminated string")
            if window.ended or not unsure:
                raise
        if len(window.text) - window.at > limit:
            _skip(window)
            return too_large(limit)
        window.grow()
    start, window.at = window.at, end
    if end - start > limit:
        return too_large(limit)
    if window.not_utf8 and (found := ESCAPED.search(window.text, start, end)):
        return not_utf8(ord(found.group()) - 0xDC00, f"column {window.column(found.start())}")
    return strict.flaw(value, window.text, start, end) or value


MARK = re.compile(r'["{}\[\],]')
QUOTED = re.compile(r'(?:[^"\\]++|\\.)*+', re.DOTALL)  # up to the closing quote, or to half an escape


def _skip(window: _Window) -> None:
    """Consume one value without keeping it, looking only at brackets and quotes."""
    depth = 0
    while True:
        found = MARK.search(window.text, window.at)
        if found is None:
            window.at = len(window.text)
            if not window.grow():
                return
            continue
        mark = found.group()
        if depth == 0 and mark in ",]}":
            window.at = found.start()
            return
        window.at = found.end()
        if mark == '"':
            _skip_quoted(window)
        elif mark != ",":
            depth += 1 if mark in "{[" else -1
        if depth == 0:
            return


def _skip_quoted(window: _Window) -> None:
    while True:
        window.at = QUOTED.match(window.text, window.at).end()  # type: ignore[union-attr]
        if window.text[window.at : window.at + 1] == '"' or not window.grow():
            window.at += 1
            return


def _broken(window: _Window, error: json.JSONDecodeError) -> Flaw:
    if window.damage is not None:
        return window.damage.flaw
    if error.pos >= len(window.text):
        return Flaw(UNREADABLE, "file: ends inside the list; complete the cut row and close the list with ]")
    if found := window.not_utf8 and ESCAPED.match(window.text, error.pos):
        flaw = not_utf8(ord(found.group()) - 0xDC00, f"column {window.column(error.pos)}")
        return Flaw(UNREADABLE, f"{flaw.message}; {REST}")
    return Flaw(UNREADABLE, f"line: {explain(window.text, error, column=window.column(error.pos))}; {REST}")


def _after_list(window: _Window, *, comma: bool) -> Iterator[Found]:
    line = window.line(window.at)
    if comma:
        yield line, Flaw(UNREADABLE, "line: a comma stands before the closing ]; remove it")
    window.at += 1
    mark = window.mark()
    if window.damage is not None:
        yield window.line(window.at), window.damage.flaw
    elif mark:
        found = ascii(window.text[window.at : window.at + 12])
        cure = "write all rows in one list, or one row per line"
        yield (
            window.line(window.at),
            Flaw(UNREADABLE, f"file: {found} stands after the end of the list; {cure}; {REST}"),
        )
