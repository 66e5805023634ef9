"""Each bad or odd file has its documented outcome, and no mutated line ends in a traceback."""

from __future__ import annotations

import gzip
import io
import json
import os
import random
import re
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from finetune.data.rows import REASONS, UNREADABLE, Refusal, Row
from finetune.data.sources import read_rows
from finetune.recipe import SourceSection
from tests.data.bad_files import CASES, LIMIT, Case, document

PROBLEM = re.compile(r"^.+:\d+: [^:]+: .+")


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_a_bad_file_has_its_documented_outcome(case: Case, tmp_path: Path) -> None:
    path = tmp_path / case.name
    if isinstance(case.content, bytes):
        path.write_bytes(case.content)
    else:
        case.content(path)
    if "without permission" in case.holds and os.access(path, os.R_OK):
        pytest.skip("root may read every file")
    found = list(read_rows(SourceSection(source=str(path)), limit=LIMIT))
    assert [row.values for row in found if isinstance(row, Row)] == case.rows
    refused = [each for each in found if isinstance(each, Refusal)]
    assert [(each.reason, line_of(each)) for each in refused] == case.refused
    told = "\n".join(str(each.problem) for each in refused)
    assert [word for word in case.words if word not in told] == []
    for each in refused:
        assert each.reason in REASONS or each.reason == UNREADABLE
        assert re.match(r"[^:]+: .+; .+", each.message), "field: what; cure"


def line_of(refusal: Refusal) -> int:
    last = refusal.where.rsplit(":", 1)[-1]
    return int(last) if last.isdigit() else 0


def test_the_corpus_is_large_and_documented() -> None:
    documented = Path(__file__).parents[2] / "docs" / "bad-data.md"
    assert len(CASES) >= 70
    assert len({case.name for case in CASES}) == len({case.holds for case in CASES}) == len(CASES)
    assert documented.read_text(encoding="utf-8") == document(), "run `python -m tests.data.bad_files`"


def test_an_expected_value_is_what_another_reader_says() -> None:
    """The table's own rows, where json can read the whole file."""
    checked = 0
    for case in CASES:
        if isinstance(case.content, bytes) and not case.refused and case.name.endswith((".json", ".jsonl")):
            text = case.content.decode("utf-8-sig")
            try:
                rows = json.loads(text)
            except ValueError:
                rows = [json.loads(line) for line in re.split(r"\r\n|\r|\n", text) if line.strip()]
            assert case.rows == (rows if isinstance(rows, list) else [rows])
            checked += 1
    assert checked > 10


# --- mutations of good rows ---

GOOD = [
    {"instruction": "Add 2 and 3.", "input": "", "output": "5 — “five”"},
    {"messages": [{"role": "user", "content": "Hi\n😀"}, {"role": "assistant", "content": 'say "yes", \\o/'}]},
    {"prompt": "p", "completion": "c", "score": -1.5e3, "tags": ["x", None, True]},
]
PIECES = [
    b'"',
    b"\\",
    b"{",
    b"}",
    b"[",
    b"]",
    b",",
    b":",
    b"\n",
    b"\r",
    b"\0",
    b"NaN",
    b"1e999",
    b"\\ud800",
    b"\xff",
    b" ",
]
PIECES += [
    b"null",
    b"9" * 700,
    b'"a":1,"a":2',
    b"\xef\xbb\xbf",
    b"'",
    b"//",
    b"\xed\xa0\x80",
    b";",
    b"\t",
    b"[" * 120,
    b"-",
]


def mutated(data: bytes, chance: random.Random) -> bytes:
    for _ in range(chance.randint(1, 3)):
        data = mutated_once(data, chance)
    return data


def mutated_once(data: bytes, chance: random.Random) -> bytes:
    at, end = sorted(chance.choices(range(len(data) + 1), k=2))
    piece = chance.choice([*PIECES, bytes([chance.randrange(256)])])
    changed = {
        "flipped": data[:at] + piece[:1] + data[at + 1 :],
        "cut": data[:at],
        "left out": data[:at] + data[end:],
        "doubled": data[:end] + data[at:],
        "put in": data[:at] + piece + data[at:],
        "replaced": data[:at] + piece + data[end:],
        "keys swapped": data.replace(b'"role"', b'"content"').replace(b"prompt", b"completion"),
        "turned": data[end:] + data[at:end] + data[:at],
    }
    return changed[chance.choice(list(changed))]


def table(separator: str) -> bytes:
    return separator.join(["a", "b"]).encode() + b"\n"


KINDS = {  # what stands before, between and behind the mutated lines
    "jsonl": (b"", b"\n", b"\n"),
    "json": (b"[", b",\n", b"]\n"),
    "csv": (table(","), b"\n", b"\n"),
    "tsv": (table("\t"), b"\n", b"\n"),
    "txt": (b"", b"\n\n", b"\n"),
    "jsonl.gz": (b"", b"\n", b"\n"),
}


@pytest.mark.parametrize("kind", KINDS)
def test_mutated_lines_are_rows_or_told(kind: str, tmp_path: Path) -> None:
    chance = random.Random(f"mutations of {kind}")
    before, between, behind = KINDS[kind]
    path = tmp_path / f"rows.{kind}"
    for _ in range(170):
        lines = [mutated(good_line(kind, chance), chance) for _ in range(5)]
        data = before + between.join(lines) + behind
        path.write_bytes(
            mutated(gzip.compress(data), chance) if kind.endswith("gz") and chance.random() < 0.5 else data
        )
        check(path, data)


def test_mutated_parquet_is_rows_or_told(tmp_path: Path) -> None:
    chance, out = random.Random("mutations of parquet"), io.BytesIO()
    pq.write_table(pa.Table.from_pylist([{"a": "x" * 20, "b": [1.5, None]}] * 5), out)
    for _ in range(200):
        (tmp_path / "rows.parquet").write_bytes(mutated(out.getvalue(), chance))
        check(tmp_path / "rows.parquet", b"")


def good_line(kind: str, chance: random.Random) -> bytes:
    if kind in ("csv", "tsv"):
        return (b"," if kind == "csv" else b"\t").join([b'"say ""yes"", or no"', "café".encode()])
    return json.dumps(chance.choice(GOOD), ensure_ascii=chance.random() < 0.5).encode()


def check(path: Path, data: bytes) -> None:
    """Every record is a row with text for keys or a problem with its place, and there is at least one."""
    found = list(read_rows(SourceSection(source=str(path)), limit=LIMIT))
    assert found, data
    for each in found:
        if isinstance(each, Refusal):
            assert PROBLEM.fullmatch(str(each.problem)), (each, data)
        else:
            assert all(isinstance(key, str) for key in each.values)
            assert json.loads(json.dumps(each.values, allow_nan=False, ensure_ascii=False).encode()) == each.values
            if ".jsonl" in path.name and not data.lstrip().startswith(b"["):
                assert json.loads(data.splitlines()[each.line - 1].decode("utf-8-sig")) == each.values
