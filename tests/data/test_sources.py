"""Where rows stand, which files a source is made of, and that readers agree with json and csv."""

from __future__ import annotations

import csv
import io
import json
import lzma
import sys
import tracemalloc
from collections.abc import Iterator
from itertools import repeat
from pathlib import Path

import huggingface_hub
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from finetune.data import json_list
from finetune.data.hub import hub_files
from finetune.data.json_rows import read_json
from finetune.data.rows import Refusal, Row
from finetune.data.sources import read_rows, source_files
from finetune.data.stream import LARGEST_ROW, Flaw, Lines
from finetune.data.tables import read_table
from finetune.recipe import SourceSection

MIB = 2**20


def read(path: Path | str, **settings: object) -> list[Row | Refusal]:
    return list(read_rows(SourceSection(source=str(path), **settings)))


def values_of(found: list[Row | Refusal]) -> list[dict]:
    assert [str(each.problem) for each in found if isinstance(each, Refusal)] == []
    return [each.values for each in found]


def pieces(data: bytes, size: int) -> Iterator[bytes]:
    return (data[start : start + size] for start in range(0, len(data), size))


@pytest.mark.parametrize(
    ("content", "lines"),
    [
        ('{"a": 1}\n{"a": 2}\n', [1, 2]),
        ('\n\n{"a": 1}\n   \n{"a": 2}', [3, 5]),
        (b'\xef\xbb\xbf{"a": 1}\r\n\r\n{"a": 2}\r\n', [1, 3]),
        (b'{"a": 1}\r{"a": 2}\r\n\r{"a": 3}', [1, 2, 4]),
        ('{"a": 1}\n{"a": "x\u2028y\x85"}\n{"a": 3}\n', [1, 2, 3]),
        ('[{"a": 1}, {"a": 2}]', [1, 1]),
        ('\n[\n  {\n    "a": 1\n  },\n\n  {\n    "a": 2\n  }\n]\n', [3, 7]),
        (b'\xef\xbb\xbf[\r\n{"a": 1}\r\n,\r\n{"a": "\\n"}]', [2, 4]),
        (b'[\r{"a": 1},\r\r{"a": 2}]', [2, 4]),
    ],
)
@pytest.mark.parametrize("size", [1, 3, 1000])
def test_every_row_knows_its_line(
    content: str | bytes, lines: list[int], size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(json_list, "CHUNK", size)
    data = (content if isinstance(content, bytes) else content.encode()).removeprefix(b"\xef\xbb\xbf")
    found = list(read_json(pieces(data, size), limit=LARGEST_ROW))
    assert [line for line, _ in found] == lines
    assert all(isinstance(row, dict) for _, row in found)


leaves = (
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=6)
)
json_rows = st.dictionaries(
    st.text(max_size=4),
    st.recursive(leaves, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner)),
)


@settings(max_examples=40, deadline=None)
@given(
    rows=st.lists(json_rows, min_size=2, max_size=5),
    indent=st.sampled_from([None, 0, 2]),
    ascii_only=st.booleans(),
    size=st.integers(1, 40),
)
def test_a_list_is_read_as_json_reads_it(rows: list[dict], indent: int | None, ascii_only: bool, size: int) -> None:
    """Also where the window ends inside a number, an escape or a character."""
    content = json.dumps(rows, indent=indent, ensure_ascii=ascii_only)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(json_list, "CHUNK", size)
        found = list(read_json(pieces(content.encode(), size), limit=LARGEST_ROW))
    assert [row for _, row in found] == rows
    decoder, position, starts = json.JSONDecoder(), 1, []
    for _ in rows:
        position += len(content[position:]) - len(content[position:].lstrip())
        starts.append(1 + content.count("\n", 0, position))
        position = decoder.raw_decode(content, position)[1] + 1
    assert [line for line, _ in found] == starts


@pytest.mark.parametrize("size", range(1, 12))
def test_a_value_that_the_window_cuts_is_one_value(size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(json_list, "CHUNK", size)
    found = list(read_json(pieces(b'[-1234.5e-6 ,true, "\\u0041", 78]', size), limit=LARGEST_ROW))
    assert [row.message.split("got ")[1].split(";")[0] for _, row in found] == ["float", "bool", "str", "int"]


@settings(max_examples=60, deadline=None)
@given(data=st.lists(st.sampled_from([b"a", b"bc", b"\n", b"\r", b"\r\n", b'"']), max_size=12), size=st.integers(1, 5))
def test_lines_are_the_same_however_the_bytes_arrive(data: list[bytes], size: int) -> None:
    whole = b"".join(data)
    assert list(Lines(pieces(whole, size), limit=100)) == whole.splitlines(keepends=True)
    limited = list(Lines(pieces(whole, size), limit=2))
    assert limited == [line if len(line) <= 2 else None for line in whole.splitlines(keepends=True)]


@settings(max_examples=80, deadline=None)
@given(
    rows=st.lists(
        st.tuples(*[st.text(st.characters(codec="utf-8", exclude_characters="\0"), max_size=5)] * 2), max_size=5
    ),
    ends=st.sampled_from(["\n", "\r\n"]),
)
def test_a_table_is_read_as_csv_writes_it(rows: list[tuple[str, str]], ends: str) -> None:
    written = io.StringIO()
    writer = csv.writer(written, quoting=csv.QUOTE_ALL, lineterminator=ends)
    lines = []
    for row in [("a", "b"), *rows]:
        lines.append(1 + len(written.getvalue().encode().splitlines()))
        writer.writerow(row)
    found = list(read_table(pieces(written.getvalue().encode(), 7), delimiter=",", limit=LARGEST_ROW))
    assert found == [(line, {"a": one, "b": two}) for line, (one, two) in zip(lines[1:], rows, strict=True)]


def test_the_window_doubles_while_one_value_goes_on() -> None:
    """What was read is looked at again as often as it doubles: time in proportion to the length."""
    window = json_list._Window(repeat(b"x" * 1000))
    lengths = [window.grow() and len(window.text) for _ in range(6)]
    assert all(after >= 2 * before for before, after in zip(lengths[1:], lengths[2:], strict=False))


@pytest.mark.parametrize(
    ("start", "block", "end"),
    [
        (b"", b'{"a": "%s"}\n' % (b"x" * 200) * 300, b""),
        (b"[", b'{"a": "%s"},\n' % (b"x" * 200) * 300, b'{"a": 1}]'),
        (b'{"a": "', b"x" * 60_000, b'"}\n{"a": 1}'),
        (b'[{"a": "', b"\\n" * 30_000, b'"}, {"a": 1}]'),
    ],
    ids=["lines", "list", "one line", "one element"],
)
def test_memory_does_not_grow_with_the_file(start: bytes, block: bytes, end: bytes) -> None:
    def chunks() -> Iterator[bytes]:
        yield start
        yield from repeat(block, 300)
        yield end

    tracemalloc.start()
    count = sum(1 for _ in read_json(chunks(), limit=MIB))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert count in (90_000, 90_001, 2)
    assert peak < 8 * MIB


def test_a_line_of_a_gigabyte_is_refused_and_the_next_one_read() -> None:
    chunks = iter([b'{"a": "', *repeat(b"x" * MIB, 1024), b'"}\n{"a": 1}\n'])
    (_, large), (line, row) = read_json(chunks, limit=LARGEST_ROW)
    assert isinstance(large, Flaw)
    assert (large.reason, line, row) == ("row_too_large", 2, {"a": 1})
    assert "64 MiB" in large.message


# --- rows and columns ---


@pytest.fixture
def numbered(tmp_path: Path) -> Path:
    path = tmp_path / "rows.jsonl"
    path.write_text('{"q": 1, "r": 1}\n{"q": }\n{"q": 3}\n{"q": 4, "s": 1}\n')
    return path


def test_rows_counts_the_refused_ones_too(numbered: Path) -> None:
    assert [type(each) for each in read(numbered, rows=2)] == [Row, Refusal]
    assert [each.where for each in read(numbered, rows=4)] == [f"{numbered}:{line}" for line in (1, 2, 3, 4)]
    assert [each.where for each in read(numbered.parent, rows=1)] == [f"{numbered}:1"]


def test_columns_are_renamed_all_at_once(numbered: Path) -> None:
    first, _, third, fourth = read(numbered, columns={"q": "r", "r": "q"})
    assert (first.values, third.values, fourth.values) == ({"r": 1, "q": 1}, {"r": 3}, {"r": 4, "s": 1})
    assert list(first.values) == ["r", "q"]


def test_a_renamed_column_that_no_row_has_is_told(numbered: Path) -> None:
    *rows, refusal = read(numbered, columns={"t": "prompt", "s": "score"})
    assert len(rows) == 4
    assert (refusal.reason, refusal.where) == ("missing_column", f"{numbered}:1")
    assert refusal.message.startswith("t: ")
    assert "the first row has: q, r" in refusal.message
    assert [each.reason for each in read(numbered, columns={"s": "x"}, rows=3)[-1:]] == ["missing_column"]


def test_a_rename_onto_a_column_that_is_there_is_refused(numbered: Path) -> None:
    (refusal,) = read(numbered, columns={"q": "r"})
    assert (refusal.reason, refusal.where) == ("unreadable", f"{numbered}:1")
    assert "q and r" in refusal.message


# --- which files ---


def test_a_folder_is_its_data_files_in_order(tmp_path: Path) -> None:
    for name in ("b/2.jsonl", "b/10.jsonl.xz", "a.csv", "c.txt.gz", "b.json", "README.md", ".cache/x.json", ".x.json"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(lzma.compress(b'{"a": "x"}') if name.endswith("xz") else b'{"a": "x"}\n')
    source = SourceSection(source=f"{tmp_path}/")
    expected = ["a.csv", "b/10.jsonl.xz", "b/2.jsonl", "b.json", "c.txt.gz"]
    assert [path.relative_to(tmp_path).as_posix() for path in source_files(source)] == expected
    places = [each.where for each in read_rows(source)]
    assert places == [f"{tmp_path}/{name}:1" for name in expected]


def test_a_row_carries_the_name_that_the_recipe_gives(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "rows.json").write_text('[{"a": 1}]')
    assert [read(name)[0].where for name in ("rows.json", "./rows.json", "~/rows.json", ".")] == [
        "rows.json:1", "./rows.json:1", "~/rows.json:1", "./rows.json:1",
    ]  # fmt: skip
    assert source_files(SourceSection(source="~/rows.json")) == [tmp_path / "rows.json"]


def test_a_missing_file_is_told_with_what_is_there(tmp_path: Path) -> None:
    (tmp_path / "row.jsonl").write_text("{}")
    source = SourceSection(source=f"{tmp_path}/rows.jsonl")
    (refusal,) = read_rows(source)
    assert refusal.where == source.source
    assert refusal.message.endswith("in the same folder: row.jsonl")
    assert source_files(source) == []
    assert "cannot look at" in read("x" * 5000 + ".json")[0].message
    assert [each.reason for each in read("x\0.json")] == ["unreadable"]


def test_zstd_without_its_package_names_the_cure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "zstandard", None)
    (tmp_path / "rows.jsonl.zst").write_bytes(b"\x28\xb5\x2f\xfd")
    (refusal,) = read(tmp_path / "rows.jsonl.zst")
    assert "pip install zstandard" in refusal.message


# --- the hub, from its cache ---


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The files of me/set, as huggingface_hub keeps them."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    folder = tmp_path / "datasets--me--set"
    files = folder / "snapshots" / "0123456789012345678901234567890123456789"
    files.mkdir(parents=True)
    (folder / "refs").mkdir()
    (folder / "refs" / "main").write_text(files.name)
    hub_files.cache_clear()
    yield files
    hub_files.cache_clear()


def put(folder: Path, *names: str) -> None:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text('{"a": 1}\n')


@pytest.mark.parametrize(
    ("names", "split", "read_names"),
    [
        (
            ["data/train-0.jsonl", "data/train-1.jsonl", "data/test-0.jsonl"],
            "",
            ["data/train-0.jsonl", "data/train-1.jsonl"],
        ),
        (["data/train-0.jsonl", "data/test-0.jsonl", "latest.jsonl"], ":test", ["data/test-0.jsonl"]),
        (["train_sft.json", "train.json", "pretrain.json"], "", ["train.json"]),
        (["train_sft.json", "train_gen.json"], ":train_sft", ["train_sft.json"]),
        (["alpaca.json", "dataset_infos.json", ".hidden.json", "README.md"], "", ["alpaca.json"]),
    ],
)
def test_a_hub_data_set_is_the_files_of_its_split(
    hub: Path, names: list[str], split: str, read_names: list[str]
) -> None:
    put(hub, *names)
    source = SourceSection(source=f"hub:me/set{split}")
    assert [each.where for each in read_rows(source)] == [f"hub:me/set/{name}:1" for name in read_names]
    assert source_files(source) == [hub / name for name in read_names]


@pytest.mark.parametrize(
    ("source", "told"),
    [
        ("hub:me/set:dev", "no data file has 'dev' in its path; there are test.json, train.json, train.parquet"),
        ("hub:me/set", "as .json and as .parquet"),
        ("hub:me/other", "--offline"),
        ("hub:set", "hub:OWNER/NAME"),
        ("hub:../../etc", "hub:OWNER/NAME"),
    ],
)
def test_a_hub_data_set_that_cannot_be_had_is_told(hub: Path, source: str, told: str) -> None:
    put(hub, "train.json", "train.parquet", "test.json")
    (refusal,) = read(source)
    assert (refusal.reason, refusal.where) == ("unreadable", source)
    assert told in refusal.message


# --- the real data ---


@pytest.mark.real
@pytest.mark.parametrize(
    "name",
    [
        "alpaca/alpaca_data.json.xz", "alpaca/alpaca_en_demo.json", "chat/sharegpt_with_system.json",
        "chat/openai_messages_fr.jsonl", "chat/toolcall_sharegpt.json", "preference/dpo_en_demo.json",
        "preference/kto_en_demo.json", "questions/question.jsonl", "questions/self_instruct_seed_tasks.jsonl",
    ],
)  # fmt: skip
def test_real_files_are_read_as_json_reads_them(shared: Path, name: str) -> None:
    data = (shared / name).read_bytes()
    text = (lzma.decompress(data) if name.endswith(".xz") else data).decode()
    rows = [json.loads(line) for line in text.splitlines()] if ".jsonl" in name else json.loads(text)
    assert values_of(read(shared / name)) == rows
