"""Bad and odd data files, each with what must become of it; docs/bad-data.md is written from this table."""

from __future__ import annotations

import bz2
import gzip
import io
import json
import lzma
import os
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq
import zstandard

LIMIT = 2000  # bytes of a row, in place of 64 MiB


class Case(NamedTuple):
    """A file, its rows, its refusals as (reason, line), words of their messages, and what people are told."""

    holds: str
    does: str
    name: str
    content: bytes | Callable[[Path], None]
    rows: list[dict[str, Any]] = []
    refused: list[tuple[str, int]] = []
    words: tuple[str, ...] = ()


def a(*values: Any) -> list[dict[str, Any]]:
    return [{"a": value} for value in values]


def parquet(**columns: Any) -> bytes:
    out = io.BytesIO()
    pq.write_table(pa.table(columns), out)
    return out.getvalue()


def twice_named() -> bytes:
    out = io.BytesIO()
    pq.write_table(pa.Table.from_arrays([pa.array(["x"]), pa.array(["y"])], names=["a", "a"]), out)
    return out.getvalue()


def not_utf8_in_parquet() -> bytes:
    offsets, data = pa.py_buffer(b"\0\0\0\0\1\0\0\0\2\0\0\0\3\0\0\0"), pa.py_buffer(b"x\xffz")
    return parquet(a=pa.Array.from_buffers(pa.string(), 3, [None, offsets, data]))


def broken_parquet() -> bytes:
    good = parquet(a=["x" * 300])
    return good[:20] + b"\xff" * 40 + good[60:]


def loop(folder: Path) -> None:
    (folder / "in").mkdir(parents=True)
    (folder / "in" / "rows.jsonl").write_text(X)
    (folder / "in" / "back").symlink_to(folder)


def listing(folder: Path) -> None:
    (folder / "b").mkdir(parents=True)
    (folder / ".git").mkdir()
    for name in ("b/2.jsonl", "a.json", "b.csv", "notes.md", ".hidden.jsonl", ".git/x.json"):
        (folder / name).write_text("a\nx\n" if name.endswith("csv") else '{"a": "' + name + '"}\n')


def half_bad(folder: Path) -> None:
    folder.mkdir()
    (folder / "1.jsonl").write_bytes(b"")
    (folder / "2.jsonl").write_text(X)


def unreadable(path: Path) -> None:
    path.write_text(X)
    path.chmod(0)


def plug(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as server:
        here = Path.cwd()
        os.chdir(path.parent)  # a socket's path has at most about 100 characters
        server.bind(path.name)
        os.chdir(here)


def empty_folder(folder: Path) -> None:
    folder.mkdir()
    (folder / "rows.xlsx").write_bytes(b"PK")


X = '{"a": "x"}\n'
LINE = X.encode()
MANY = b"".join(b'{"a": "%d"}\n' % index for index in range(3000))
COUNTED = [{"a": str(index)} for index in range(3000)]
DEEP = b"[" * 150 + b"]" * 150
LONG = b"x" * 5000
BAD, END = "invalid_json", "unreadable"

CASES = [
    # encodings
    Case(
        "UTF-8 with a byte order mark",
        "read; the mark is no part of the rows",
        "mark.jsonl",
        b"\xef\xbb\xbf" + LINE,
        a("x"),
    ),
    Case(
        "UTF-8 mark before a CSV heading",
        "read; the mark is no part of the first name",
        "mark.csv",
        b"\xef\xbb\xbfa\nx\n",
        a("x"),
    ),
    Case(
        "UTF-8 mark in the middle of a file",
        "refuses that line",
        "marks.jsonl",
        LINE + b"\xef\xbb\xbf" + LINE,
        a("x"),
        [(BAD, 2)],
        ("byte order mark",),
    ),
    Case(
        "UTF-16 with a mark",
        "refuses the file",
        "utf16.jsonl",
        X.encode("utf-16"),
        [],
        [(END, 1)],
        ("UTF-16", "save it as UTF-8"),
    ),
    Case(
        "UTF-16 without a mark", "refuses the file", "utf16le.jsonl", X.encode("utf-16-le"), [], [(END, 1)], ("UTF-16",)
    ),
    Case(
        "UTF-16 CSV, as spreadsheets save it",
        "refuses the file",
        "utf16.csv",
        "a,b\nx,y\n".encode("utf-16"),
        [],
        [(END, 1)],
        ("UTF-16",),
    ),
    Case("UTF-32", "refuses the file", "utf32.json", X.encode("utf-32"), [], [(END, 1)], ("UTF-32",)),
    Case(
        "Latin-1 byte in one line",
        "refuses that line, naming byte and place",
        "latin.jsonl",
        LINE + b'{"a": "caf\xe9"}\n' + LINE,
        a("x", "x"),
        [("invalid_text", 2)],
        ("byte 11", "0xe9", "UTF-8"),
    ),
    Case(
        "Latin-1 byte in a list",
        "refuses that row and reads on",
        "latin.json",
        b'[{"a": "x"},\n{"a": "\xe9"},\n{"a": "y"}]',
        a("x", "y"),
        [("invalid_text", 2)],
        ("column 8", "0xe9"),
    ),
    Case(
        "Latin-1 byte in a CSV row",
        "refuses that row and reads on",
        "latin.csv",
        b"a,b\nx,y\n\xe9,y\nz,\n",
        [{"a": "x", "b": "y"}, {"a": "z", "b": ""}],
        [("invalid_text", 3)],
        ("byte 1 of line 3",),
    ),
    Case(
        "Latin-1 byte in a CSV heading",
        "refuses the file",
        "head.csv",
        b"a,\xe9\nx,y\n",
        [],
        [(END, 1)],
        ("UTF-8", "heading"),
    ),
    Case(
        "Latin-1 byte in a paragraph",
        "refuses that paragraph and reads on",
        "latin.txt",
        b"one\n\ntwo\n\xe9\n\nthree\n",
        [{"text": "one"}, {"text": "three"}],
        [("invalid_text", 3)],
        ("line 4",),
    ),
    Case(
        "UTF-8 cut inside a character",
        "refuses that line",
        "cut.jsonl",
        LINE + b'{"a": "\xc3',
        a("x"),
        [("invalid_text", 2)],
        ("0xc3",),
    ),
    Case(
        "surrogates written as bytes (CESU-8)",
        "refuses that line",
        "cesu.jsonl",
        b'{"a": "\xed\xa0\xbd"}\n' + LINE,
        a("x"),
        [("invalid_text", 1)],
        ("0xed",),
    ),
    Case(
        "half a character as an escape",
        "refuses that row, naming the column",
        "half.jsonl",
        b'{"a": "\\ud83d"}\n{"a": "\\ud83d\\ude00"}\n',
        a("😀"),
        [("invalid_text", 1)],
        ("a: holds", "half of a character"),
    ),
    Case(
        "half a character in a list's row",
        "refuses that row",
        "half.json",
        b'[{"b": ["\\uDE00"]}, {"a": "\\\\ud83d"}]',
        a("\\ud83d"),
        [("invalid_text", 1)],
        ("b[0]: ",),
    ),
    Case(
        "raw NUL byte in JSON", "refuses that line", "nul.jsonl", b'{"a": "\0"}\n' + LINE, a("x"), [(BAD, 1)], ("NUL",)
    ),
    Case("NUL written as `\\u0000`", "read as it is", "nul-escape.jsonl", b'{"a": "\\u0000"}\n', a("\0")),
    Case(
        "raw NUL byte in a CSV row",
        "refuses that row",
        "nul.csv",
        b"a\nx\0\ny\n",
        a("y"),
        [("invalid_text", 2)],
        ("NUL", "column 2"),
    ),
    Case(
        "raw NUL byte in a paragraph",
        "refuses that paragraph",
        "nul.txt",
        b"wxyz\0\n\ny\n",
        [{"text": "y"}],
        [("invalid_text", 1)],
        ("NUL",),
    ),
    Case(
        "only NUL bytes (a copy that was cut)",
        "refuses the file",
        "zeros.jsonl",
        b"\0" * 100,
        [],
        [(END, 1)],
        ("NUL", "copy it again"),
    ),
    # lines
    Case("Windows line ends", "read", "crlf.jsonl", b'{"a": "x"}\r\n\r\n{"a": "y"}\r\n', a("x", "y")),
    Case(
        "old Mac line ends (a lone `\\r`)",
        "read; each ends a line",
        "cr.jsonl",
        b'{"a": "x"}\r{"a": "y"}\r',
        a("x", "y"),
    ),
    Case(
        "U+2028 and U+0085 inside a text",
        "read; these end no line",
        "u2028.jsonl",
        '{"a": "\u2028\x85"}\n'.encode(),
        a("\u2028\x85"),
    ),
    Case(
        "blank lines between rows",
        "read; blank lines are no rows",
        "blank.jsonl",
        b"\n" + LINE + b"  \n\t\n" + LINE,
        a("x", "x"),
    ),
    Case("empty file", "refuses the file", "empty.jsonl", b"", [], [(END, 1)], ("holds no rows",)),
    Case("only blank lines", "refuses the file", "blanks.jsonl", b"\n \n\r\n", [], [(END, 1)], ("holds no rows",)),
    Case(
        "only a byte order mark",
        "refuses the file",
        "only-mark.jsonl",
        b"\xef\xbb\xbf",
        [],
        [(END, 1)],
        ("holds no rows",),
    ),
    Case("empty list `[]`", "refuses the file", "empty.json", b"[ ]\n", [], [(END, 1)], ("holds no rows",)),
    Case(
        "a line larger than 64 MiB",
        "refuses that row without keeping it and reads on",
        "long.jsonl",
        LINE + b'{"a": "' + LONG + b'"}\n' + LINE,
        a("x", "x"),
        [("row_too_large", 2)],
        ("larger than",),
    ),
    Case(
        "a list's row larger than 64 MiB",
        "refuses that row and reads on",
        "long.json",
        b'[{"a": "x"},\n{"a": "' + LONG + b'\\"]"},\n{"a": "y"}]',
        a("x", "y"),
        [("row_too_large", 2)],
        ("larger than",),
    ),
    Case(
        "a CSV row larger than 64 MiB",
        "refuses that row and reads on",
        "long.csv",
        b"a\n" + LONG + b'\n"' + LONG + b'\n"\nx\n',
        a("x"),
        [("row_too_large", 2), ("row_too_large", 3)],
        ("larger than",),
    ),
    Case(
        "a paragraph larger than 64 MiB",
        "refuses that paragraph and reads on",
        "long.txt",
        b"xx\n" * 2000 + b"\ny\n",
        [{"text": "y"}],
        [("row_too_large", 1)],
        ("larger than",),
    ),
    Case(
        "a Parquet row larger than 64 MiB",
        "refuses that row and reads on",
        "long.parquet",
        parquet(a=["x", "x" * 5000]),
        a("x"),
        [("row_too_large", 2)],
        ("larger than",),
    ),
    # JSON
    Case(
        "broken JSON in one line",
        "refuses that line, naming the column",
        "broken.jsonl",
        LINE + b'{"a" "x"}\n' + LINE,
        a("x", "x"),
        [(BAD, 2)],
        ("column 6", "':' delimiter"),
    ),
    Case(
        "comma after the last value of a row",
        "refuses that line",
        "comma.jsonl",
        b'{"a": "x",}\n' + LINE,
        a("x"),
        [(BAD, 1)],
        ("comma",),
    ),
    Case(
        "cut last line",
        "refuses that line",
        "cut-line.jsonl",
        LINE + b'{"a": "xy',
        a("x"),
        [(BAD, 2)],
        ("never closed",),
    ),
    Case(
        "last line cut after a colon",
        "refuses that line",
        "cut-colon.jsonl",
        LINE + b'{"a":',
        a("x"),
        [(BAD, 2)],
        ("ends too early",),
    ),
    Case(
        "rows with commas between lines",
        "refuses each such line",
        "commas.jsonl",
        b'{"a": "x"},\n{"a": "y"}\n',
        a("y"),
        [(BAD, 1)],
        ("stands after the row",),
    ),
    Case(
        "two rows on one line",
        "refuses that line",
        "two.jsonl",
        b'{"a": "x"}{"a": "y"}\n' + LINE,
        a("x"),
        [(BAD, 1)],
        ("one row per line",),
    ),
    Case(
        "comment",
        "refuses that line",
        "comment.jsonl",
        b"// rows\n" + LINE + b"# more\n",
        a("x"),
        [(BAD, 1), (BAD, 3)],
        ("no comments",),
    ),
    Case(
        "single quotes (Python's `str`)",
        "refuses that line",
        "single.jsonl",
        b"{'a': 'x'}\n" + LINE,
        a("x"),
        [(BAD, 1)],
        ("json.dumps",),
    ),
    Case(
        "Python's `True`, `None`",
        "refuses that line",
        "python.jsonl",
        b'{"a": True}\n{"a": None}\n' + LINE,
        a("x"),
        [(BAD, 1), (BAD, 2)],
        ("writes true", "writes null"),
    ),
    Case(
        "names without quotes",
        "refuses that line",
        "names.jsonl",
        b'{a: "x"}\n' + LINE,
        a("x"),
        [(BAD, 1)],
        ("property name",),
    ),
    Case(
        "raw line end inside a text",
        "refuses both halves",
        "raw-end.jsonl",
        b'{"a": "x\ny"}\n' + LINE,
        a("x"),
        [(BAD, 1), (BAD, 2)],
        ("never closed",),
    ),
    Case(
        "raw tab inside a text",
        "refuses that line",
        "tab.jsonl",
        b'{"a": "x\ty"}\n' + LINE,
        a("x"),
        [(BAD, 1)],
        ("write \\t",),
    ),
    Case(
        "backslash that starts no escape",
        "refuses that line",
        "slash.jsonl",
        b'{"a": "C:\\dir"}\n' + LINE,
        a("x"),
        [(BAD, 1)],
        ("backslash",),
    ),
    Case(
        "the same key twice in a row",
        "refuses that row, naming the key",
        "keys.jsonl",
        b'{"a": 1, "b": 2, "b": 3}\n' + LINE,
        a("x"),
        [(BAD, 1)],
        ("b: the same key twice",),
    ),
    Case(
        "the same key twice, inside a list's row",
        "refuses that row and reads on",
        "keys.json",
        b'[{"a": {"c": 1, "c": 1}},\n{"a": "x"}]',
        a("x"),
        [(BAD, 1)],
        ("c: the same key twice",),
    ),
    Case(
        "`NaN`, `Infinity`",
        "refuses that row, naming the place",
        "nan.jsonl",
        b'{"a": [1, NaN]}\n{"a": {"b": -Infinity}}\n' + LINE,
        a("x"),
        [(BAD, 1), (BAD, 2)],
        ("a[1]: NaN", "a.b: -Infinity"),
    ),
    Case(
        "`NaN` in a list's row",
        "refuses that row and reads on",
        "nan.json",
        b'[{"a": NaN}, {"a": "x"}]',
        a("x"),
        [(BAD, 1)],
        ("a: NaN",),
    ),
    Case(
        "number beyond the largest, `1e999`",
        "refuses that row",
        "large.jsonl",
        b'{"a": 1e999}\n{"a": -1e-999}\n{"a": 0e5}\n',
        a(0.0),
        [(BAD, 1), (BAD, 2)],
        ("too large to keep", "too small to keep"),
    ),
    Case(
        "whole number of 30 digits",
        "read exactly",
        "digits.jsonl",
        b'{"a": 123456789012345678901234567890}\n',
        a(123456789012345678901234567890),
    ),
    Case(
        "whole number of thousands of digits",
        "refuses that row",
        "digits5000.jsonl",
        b'{"a": ' + b"1" * 1900 + b"}\n" + LINE,
        a("x"),
        [(BAD, 1)],
        ("1,900 digits",),
    ),
    Case(
        "150 levels of nesting",
        "refuses that row",
        "deep.jsonl",
        b'{"a": ' + DEEP + b"}\n" + LINE,
        a("x"),
        [(BAD, 1)],
        ("nested deeper",),
    ),
    Case(
        "thousands of levels of nesting in a list",
        "refuses that row and reads on",
        "deep.json",
        b"[" + b"[" * 9000 + b"]" * 9000 + b',\n{"a": "x"}]',
        a("x"),
        [(BAD, 1)],
        ("nested deeper",),
    ),
    Case(
        "thousands of brackets that are never closed",
        "refuses that line",
        "open.jsonl",
        b'{"a": ' + b"[" * 1500 + b"\n" + LINE,
        a("x"),
        [(BAD, 1)],
        ("nested deeper",),
    ),
    Case(
        "rows that are no objects",
        "refuses each, reads on",
        "kinds.jsonl",
        LINE + b'["x"]\n"x"\nnull\n3\n' + LINE,
        a("x", "x"),
        [("not_an_object", line) for line in (2, 3, 4, 5)],
        ("got list", "got str", "got null", "got int"),
    ),
    Case(
        "list elements that are no objects",
        "refuses each, reads on",
        "kinds.json",
        b'[{"a": "x"},\n3,\n["x"], "x",\n{"a": "y"}]',
        a("x", "y"),
        [("not_an_object", 2), ("not_an_object", 3), ("not_an_object", 3)],
        ("got int",),
    ),
    Case(
        "syntax error inside a list",
        "reads the rows before it, refuses the rest",
        "broken.json",
        b'[{"a": "x"},\n{"a" 2},\n{"a": "y"}]',
        a("x"),
        [(END, 2)],
        ("column 6", "the rest of the file was not read"),
    ),
    Case(
        "comma missing between a list's rows",
        "reads the rows before it, refuses the rest",
        "no-comma.json",
        b'[{"a": "x"}\n{"a": "y"}]',
        a("x"),
        [(END, 2)],
        ("the rest",),
    ),
    Case(
        "comma before the closing `]`",
        "refuses the file after its rows",
        "comma.json",
        b'[{"a": "x"},\n]',
        a("x"),
        [(END, 2)],
        ("comma",),
    ),
    Case(
        "list that is not closed",
        "refuses the file after its rows",
        "open.json",
        b'[{"a": "x"},\n{"a": "y"}\n',
        a("x", "y"),
        [(END, 3)],
        ("ends inside the list",),
    ),
    Case(
        "list cut inside a row",
        "refuses the file after its rows",
        "cut.json",
        b'[{"a": "x"},\n{"a": "y',
        a("x"),
        [(END, 2)],
        ("never closed",),
    ),
    Case(
        "list with a comment",
        "refuses the rest",
        "comment.json",
        b'[\n// first\n{"a": "x"}]',
        [],
        [(END, 2)],
        ("no comments",),
    ),
    Case(
        "two lists one after the other",
        "reads the first, refuses the rest",
        "lists.json",
        b'[{"a": "x"}]\n[{"a": "y"}]',
        a("x"),
        [(END, 2)],
        ("after the end of the list",),
    ),
    Case(
        "list and bytes that are not UTF-8 between rows",
        "refuses the rest",
        "between.json",
        b'[{"a": "x"},\n\xff{"a": "y"}]',
        a("x"),
        [(END, 2)],
        ("0xff",),
    ),
    Case(
        "one object over several lines",
        "refuses the file once",
        "pretty.json",
        json.dumps({"a": "x", "b": "y"}, indent=2).encode(),
        [],
        [(END, 1)],
        ("over several lines", "jq -c '.'"),
    ),
    Case(
        'rows inside an object, `{"data": [...]}`',
        "refuses the file",
        "data.json",
        b'{"version": 1, "data": [{"a": "x"}, {"a": "y"}]}',
        [],
        [(END, 1)],
        ("2 rows", "jq -c '.data[]'"),
    ),
    Case(
        "the same over several lines",
        "refuses the file once",
        "train.json",
        json.dumps({"train": a("x")}, indent=1).encode(),
        [],
        [(END, 1)],
        ("jq -c '.train[]'",),
    ),
    Case(
        "rows of several shapes",
        "read as they are; the format is checked next",
        "mixed.jsonl",
        b'{"a": "x"}\n{"messages": []}\n',
        [{"a": "x"}, {"messages": []}],
    ),
    Case(
        "missing values, `null`, numbers",
        "read as they are; the format is checked next",
        "null.jsonl",
        b'{"a": null}\n{"a": 3}\n{}\n',
        [{"a": None}, {"a": 3}, {}],
    ),
    Case("JSON lines in a file called .json", "read: the content decides", "lines.json", LINE * 2, a("x", "x")),
    Case("a list in a file called .jsonl", "read: the content decides", "list.jsonl", b'[{"a": "x"}]', a("x")),
    Case(
        "HTML in place of data (a failed download)",
        "refuses each line",
        "page.jsonl",
        b"<html>\n</html>\n",
        [],
        [(BAD, 1), (BAD, 2)],
        ("not JSON at column 1",),
    ),
    # CSV
    Case(
        "CSV row with one field too many",
        "refuses that row; nothing is shifted",
        "more.csv",
        b"a,b\nx,y,z\nx,y\n",
        [{"a": "x", "b": "y"}],
        [("invalid_table", 2)],
        ("3 fields, the heading has 2",),
    ),
    Case(
        "CSV row with one field too few",
        "refuses that row",
        "fewer.csv",
        b"a,b\nx\nx,y\n",
        [{"a": "x", "b": "y"}],
        [("invalid_table", 2)],
        ("1 field, the heading has 2",),
    ),
    Case("`NA`, `null`, `nan` in CSV", "read as these texts", "na.csv", b"a\nNA\nnull\nnan\n", a("NA", "null", "nan")),
    Case(
        "`007`, `1.0`, `true` in CSV",
        "read as these texts",
        "numbers.csv",
        b"a\n007\n1.0\ntrue\n",
        a("007", "1.0", "true"),
    ),
    Case(
        "empty field in CSV",
        "read as an empty text",
        "empty-field.csv",
        b'a,b\n,\n"",y\n',
        [{"a": "", "b": ""}, {"a": "", "b": "y"}],
    ),
    Case("spaces around a CSV field", "kept", "spaces.csv", b"a,b\n x , y\n", [{"a": " x ", "b": " y"}]),
    Case(
        "semicolons in a .csv",
        "refuses the file",
        "semicolon.csv",
        b"a;b\nx;y\n",
        [],
        [(END, 1)],
        ("semicolons", "save it with commas"),
    ),
    Case("tabs in a .csv", "refuses the file", "tabs.csv", b"a\tb\nx\ty\n", [], [(END, 1)], ("tabs", ".tsv")),
    Case("commas in a .tsv", "refuses the file", "commas.tsv", b"a,b\nx,y\n", [], [(END, 1)], ("save it with tabs",)),
    Case("tabs in a .tsv", "read", "tabs.tsv", b"a\tb\nx\ty, z\n", [{"a": "x", "b": "y, z"}]),
    Case(
        "two CSV columns of one name",
        "refuses the file",
        "names.csv",
        b"a,a\nx,y\n",
        [],
        [(END, 1)],
        ("a: two columns",),
    ),
    Case(
        "CSV column without a name",
        "refuses the file",
        "no-name.csv",
        b"a,\nx,y\n",
        [],
        [(END, 1)],
        ("column 2 has no name",),
    ),
    Case("CSV heading without rows", "refuses the file", "heading.csv", b"a,b\n", [], [(END, 1)], ("holds no rows",)),
    Case(
        "line ends inside CSV quotes",
        "read; the row's line is its first",
        "quoted.csv",
        b'a,b\n"x\r\ny",1\nz\n',
        [{"a": "x\r\ny", "b": "1"}],
        [("invalid_table", 4)],
        ("1 field",),
    ),
    Case(
        "CSV quotes that are never closed",
        "reads the rows before it, refuses the rest",
        "quote.csv",
        b'a,b\nx,y\n"x,y\nx,y\n',
        [{"a": "x", "b": "y"}],
        [(END, 3)],
        ("never closed", "the rest"),
    ),
    Case(
        "text behind a closing quote in CSV",
        "refuses that row and reads on",
        "behind.csv",
        b'a,b\n"x"z,y\nx,y\n',
        [{"a": "x", "b": "y"}],
        [("invalid_table", 2)],
        ("twice",),
    ),
    Case(
        "a CSV row whose end cannot be known",
        "reads the rows before it, refuses the rest",
        "odd.csv",
        b'a,b\nx,y\n"say "hi",y\nx,y\n',
        [{"a": "x", "b": "y"}],
        [(END, 3)],
        ("twice", "the rest"),
    ),
    Case("quote inside an unquoted CSV field", "kept", "inch.csv", b'a,b\n5" disk,y\n', [{"a": '5" disk', "b": "y"}]),
    Case("blank lines in CSV", "no rows", "blank.csv", b"\na,b\n\nx,y\n\n", [{"a": "x", "b": "y"}]),
    # text
    Case(
        "paragraphs of several lines",
        "one row each; line ends become `\\n`",
        "text.txt",
        b"\n one\r\ntwo\r\n \r\n\r\nthree",
        [{"text": " one\ntwo"}, {"text": "three"}],
    ),
    # compressed files
    Case(
        "`.gz` of several parts",
        "read",
        "parts.jsonl.gz",
        gzip.compress(LINE) + gzip.compress(LINE) + b"\0" * 9,
        a("x", "x"),
    ),
    Case("`.bz2`", "read", "rows.csv.bz2", bz2.compress(b"a\nx\n"), a("x")),
    Case(
        "cut `.gz`",
        "reads the whole lines before the cut, refuses the rest",
        "cut.jsonl.gz",
        gzip.compress(MANY)[:-9],
        COUNTED,
        [(END, 3001)],
        ("ends in the middle",),
    ),
    Case(
        "cut `.xz`",
        "reads the whole rows before the cut, refuses the rest",
        "cut.json.xz",
        lzma.compress(b"[" + MANY.strip().replace(b"\n", b",\n") + b"]")[:-30],
        COUNTED,
        [(END, 3000)],
        ("ends in the middle",),
    ),
    Case(
        "cut `.zst`",
        "reads the whole lines before the cut, refuses the rest",
        "cut.jsonl.zst",
        zstandard.compress(LINE) + zstandard.compress(MANY)[:-3],
        a("x"),
        [(END, 2)],
        ("ends in the middle",),
    ),
    Case(
        "damaged check sum in `.gz`",
        "reads rows to some way before the damage, refuses the rest",
        "sum.jsonl.gz",
        gzip.compress(LINE)[:-8] + b"12345678",
        [],
        [(END, 1)],
        ("damaged",),
    ),
    Case(
        "bytes behind the end of an `.xz`",
        "refuses the file after its rows",
        "behind.jsonl.xz",
        lzma.compress(LINE) + b"more than nothing",
        a("x"),
        [(END, 2)],
        ("damaged",),
    ),
    Case("called `.gz`, but not compressed", "refuses the file", "plain.jsonl.gz", LINE, [], [(END, 1)], ("no .gz",)),
    Case(
        "compressed, but not called so",
        "refuses the file",
        "hidden.jsonl",
        gzip.compress(LINE),
        [],
        [(END, 1)],
        ("gzip", ".gz"),
    ),
    Case(
        "called `.zst`, but not compressed", "refuses the file", "plain.jsonl.zst", LINE, [], [(END, 1)], ("no .zst",)
    ),
    Case("empty `.gz`", "refuses the file", "empty.jsonl.gz", b"", [], [(END, 1)], ("holds no rows",)),
    Case(
        "`.gz` of an empty file",
        "refuses the file",
        "nothing.jsonl.gz",
        gzip.compress(b""),
        [],
        [(END, 1)],
        ("holds no rows",),
    ),
    Case(
        "zip archive called .json",
        "refuses the file",
        "zip.json",
        b"PK\x03\x04" + b"\0" * 50,
        [],
        [(END, 1)],
        ("zip archive",),
    ),
    # Parquet
    Case(
        "Parquet with texts, lists and structs",
        "read",
        "rows.parquet",
        parquet(a=[[{"b": "x"}], None]),
        a([{"b": "x"}], None),
    ),
    Case(
        "Parquet with times",
        "refuses the file, naming the column",
        "times.parquet",
        parquet(a=["x"], when=pa.array([0], pa.timestamp("s"))),
        [],
        [(END, 1)],
        ("when: of the type timestamp",),
    ),
    Case(
        "Parquet with bytes inside a struct",
        "refuses the file, naming the column",
        "bytes.parquet",
        parquet(image=[{"bytes": b"x"}]),
        [],
        [(END, 1)],
        ("image: of the type binary",),
    ),
    Case(
        "Parquet with `NaN`",
        "refuses that row, naming the column",
        "nan.parquet",
        parquet(a=[1.5, float("nan")]),
        a(1.5),
        [("wrong_type", 2)],
        ("a: holds NaN",),
    ),
    Case(
        "Parquet text that is not UTF-8",
        "refuses that row and reads on",
        "latin.parquet",
        not_utf8_in_parquet(),
        a("x", "z"),
        [("invalid_text", 2)],
        ("a: holds bytes",),
    ),
    Case(
        "two Parquet columns of one name",
        "refuses the file",
        "names.parquet",
        twice_named(),
        [],
        [(END, 1)],
        ("a: two columns",),
    ),
    Case(
        "Parquet without rows",
        "refuses the file",
        "none.parquet",
        parquet(a=pa.array([], pa.string())),
        [],
        [(END, 1)],
        ("holds no rows",),
    ),
    Case("called .parquet, but none", "refuses the file", "not.parquet", LINE, [], [(END, 1)], ("no Parquet file",)),
    Case(
        "cut Parquet", "refuses the file", "cut.parquet", parquet(a=["x"])[:-20], [], [(END, 1)], ("no Parquet file",)
    ),
    Case(
        "damaged Parquet",
        "reads the rows before it, refuses the rest",
        "damaged.parquet",
        broken_parquet(),
        [],
        [(END, 1)],
        ("damaged",),
    ),
    Case(
        "compressed Parquet",
        "refuses the file",
        "rows.parquet.gz",
        gzip.compress(parquet(a=["x"])),
        [],
        [(END, 1)],
        ("unpack it",),
    ),
    # what is no file
    Case(
        "missing file",
        "refuses it, naming files nearby",
        "none.jsonl",
        lambda path: (path.parent / "nine.jsonl").write_text(X),
        [],
        [(END, 0)],
        ("no such data file", "nine.jsonl"),
    ),
    Case(
        "name of an unknown kind",
        "refuses it, naming the kinds",
        "rows.xlsx",
        b"PK",
        [],
        [(END, 0)],
        (".jsonl", ".parquet"),
    ),
    Case(
        "folder",
        "its data files, sorted by path; hidden ones and other kinds do not count",
        "folder",
        listing,
        [{"a": "a.json"}, {"a": "b/2.jsonl"}, {"a": "x"}],
    ),
    Case(
        "folder without data files",
        "refuses it, naming the kinds",
        "bare",
        empty_folder,
        [],
        [(END, 0)],
        ("without a data file", ".jsonl"),
    ),
    Case(
        "folder with one bad file",
        "refuses that file, reads the others",
        "half",
        half_bad,
        a("x"),
        [(END, 1)],
        ("holds no rows",),
    ),
    Case("folder with a link back to itself", "each file once", "loop", loop, a("x")),
    Case("link to itself", "refuses it", "self.jsonl", lambda path: path.symlink_to(path), [], [(END, 1)], ("link",)),
    Case(
        "link to nothing",
        "refuses it",
        "dangling.jsonl",
        lambda path: path.symlink_to(path.parent / "gone"),
        [],
        [(END, 1)],
        ("link",),
    ),
    Case("named pipe", "refuses it without waiting", "pipe.jsonl", os.mkfifo, [], [(END, 1)], ("pipe",)),
    Case("socket", "refuses it", "plug.jsonl", plug, [], [(END, 1)], ("socket",)),
    Case("file without permission to read", "refuses it", "secret.jsonl", unreadable, [], [(END, 1)], ("permissions",)),
]

HEAD = """# Bad data files, and what finetune does

Every row that is read is exactly what the file says: no value is guessed, converted, shifted or left out. Everything
else is refused with its file, its line and a way to correct it, all problems at once, before a weight is loaded. Rows
that are refused for one of the reasons below can be dropped and counted instead: name the reason in the recipe's
`data.drop`. `unreadable` cannot be dropped, because nobody knows which rows are lost with it. What a row must hold to
be trained on (columns, turns, an answer) is checked afterwards.

| file | what finetune does | reason |
|---|---|---|
"""


def document() -> str:
    """The text of docs/bad-data.md."""
    lines = []
    for case in CASES:
        reasons = ", ".join(dict.fromkeys(f"`{reason}`" for reason, _ in case.refused))
        lines.append(f"| {case.holds} | {case.does} | {reasons or 'none'} |\n")
    return HEAD + "".join(lines)


if __name__ == "__main__":
    (Path(__file__).parents[2] / "docs" / "bad-data.md").write_text(document(), encoding="utf-8")
