"""Where rows stand, and that every bad line is told with its own number."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from finetune.data.conversations import Turn, detect_format, read_conversations
from finetune.data.sources import Row, read_rows
from finetune.errors import UserError


def read(folder: Path, content: str | bytes, name: str = "rows.json") -> tuple[list[tuple[int, dict]], list[str]]:
    """(line, row) of what was read, and the problems without the folder."""
    file = folder / name
    file.write_bytes(content if isinstance(content, bytes) else content.encode())
    rows, problems = read_rows([str(file)])
    return [(row.line, row.values) for row in rows], [str(problem).replace(f"{folder}/", "") for problem in problems]


@pytest.mark.parametrize(
    ("content", "lines"),
    [
        ('{"a": 1}\n{"a": 2}\n', [1, 2]),
        ('\n\n{"a": 1}\n   \n{"a": 2}', [3, 5]),
        (b'\xef\xbb\xbf{"a": 1}\r\n\r\n{"a": 2}\r\n', [1, 3]),
        ('{"a": 1}\n{"a": "x\u2028y\x85"}\n{"a": 3}\n', [1, 2, 3]),
        ('[{"a": 1}, {"a": 2}]', [1, 1]),
        ('\n[\n  {\n    "a": 1\n  },\n\n  {\n    "a": 2\n  }\n]\n', [3, 7]),
        (b'\xef\xbb\xbf[\r\n{"a": 1}\r\n,\r\n{"a": "\\n"}]', [2, 4]),
    ],
    ids=["lines", "blank lines", "mark and crlf", "unicode separators", "array", "pretty array", "crlf array"],
)
def test_every_row_knows_its_line(tmp_path: Path, content: str | bytes, lines: list[int]) -> None:
    rows, problems = read(tmp_path, content)
    assert not problems
    assert [line for line, _ in rows] == lines


values = st.fixed_dictionaries({"instruction": st.text(max_size=8), "output": st.text(max_size=8)})


@settings(max_examples=60, deadline=None)
@given(rows=st.lists(values, min_size=1, max_size=5), indent=st.sampled_from([None, 0, 2]), ascii_only=st.booleans())
def test_an_array_is_read_as_json_reads_it(
    tmp_path_factory: pytest.TempPathFactory, rows: list[dict], indent: int | None, ascii_only: bool
) -> None:
    content = json.dumps(rows, indent=indent, ensure_ascii=ascii_only)
    content = content.encode("utf-8", "surrogatepass").decode("utf-8", "replace")
    found, problems = read(tmp_path_factory.mktemp("rows"), content)
    assert not problems
    assert [row for _, row in found] == json.loads(content)
    starts = [line for line, text in enumerate(content.split("\n"), start=1) if text.strip().endswith("{")]
    assert [line for line, _ in found] == (starts if indent is not None else [1] * len(rows))


@pytest.mark.parametrize(
    ("content", "problems"),
    [
        (
            '{"a": 1}\n{"a": }\n[1]\n{"a": 2}\n"x"\n{"a"\n',
            [
                "rows.json:2: invalid JSON: Expecting value at column 7",
                'rows.json:3: a row must be an object {"...": ...}, got list',
                'rows.json:5: a row must be an object {"...": ...}, got str',
                "rows.json:6: invalid JSON: Expecting ':' delimiter at column 5",
            ],
        ),
        (
            '[\n{"a": 1},\n3,\n{"a" 2}\n]',
            [
                'rows.json:3: a row must be an object {"...": ...}, got int',
                "rows.json:4: invalid JSON: Expecting ':' delimiter at column 6; the rest of the file was not read",
            ],
        ),
        (
            '[{"a": 1}\n{"a": 2}]',
            ["rows.json:2: invalid JSON: expected ',' or ']' after a row; the rest of the file was not read"],
        ),
        ('[{"a": 1},\n]', ["rows.json:2: invalid JSON: a comma stands before the closing ]; remove it"]),
        (
            '[{"a": 1}',
            ["rows.json:1: invalid JSON: expected ',' or ']' after a row; the rest of the file was not read"],
        ),
        ('[{"a": 1}]\n{}', ["rows.json:1: invalid JSON: text after the end of the array: '{}'"]),
        ("[]", ["rows.json: holds no rows; it needs at least one"]),
        ("", ["rows.json: the file is empty; it needs at least one row"]),
        (" \n\n", ["rows.json: the file is empty; it needs at least one row"]),
        (b'{"a": "\xff"}', ["rows.json: not UTF-8 text at byte 7; save the file as UTF-8"]),
        ('{"a": 1}\n{"a": ' + "[" * 100_000, ["rows.json:2: invalid JSON: nested too deep"]),
    ],
    ids=lambda value: "" if isinstance(value, list) else repr(value[:12]),
)
def test_every_bad_place_is_told(tmp_path: Path, content: str | bytes, problems: list[str]) -> None:
    assert read(tmp_path, content)[1] == problems


def test_a_number_of_thousands_of_digits_is_told(tmp_path: Path) -> None:
    _, (problem,) = read(tmp_path, '{"a": ' + "1" * 5000 + "}")
    assert problem.startswith("rows.json:1: invalid JSON: Exceeds the limit")


def test_missing_files_and_folders_are_told_together_with_what_is_there(tmp_path: Path) -> None:
    (tmp_path / "row.jsonl").write_text("{}")
    _, problems = read_rows([str(tmp_path / "rows.jsonl"), str(tmp_path)])
    assert [problem.where for problem in problems] == [f"{tmp_path}/rows.jsonl", str(tmp_path)]
    assert "no such data file" in problems[0].message
    assert problems[0].message.endswith("in the same folder: row.jsonl")
    assert "is a folder; name a .json or .jsonl file in it" in problems[1].message


def rows_of(*values: dict) -> list[Row]:
    return [Row(value, "rows.jsonl", line) for line, value in enumerate(values, start=1)]


@pytest.mark.parametrize(
    ("columns", "expected"),
    [
        (("instruction", "input", "output"), "alpaca"),
        (("instruction", "output"), "alpaca"),
        (("id", "messages"), "messages"),
        (("prompt", "completion"), "prompt-completion"),
    ],
)
def test_the_format_shows_in_the_columns(columns: tuple[str, ...], expected: str) -> None:
    assert detect_format(rows_of(dict.fromkeys(columns, ""))) == expected


def test_unknown_columns_are_told_with_the_known_ones() -> None:
    with pytest.raises(UserError) as caught:
        detect_format(rows_of({"question": "", "answer": ""}))
    assert str(caught.value) == (
        "rows.jsonl:1: no known format has these columns: answer, question; rename them (alpaca: instruction + output; "
        "messages: messages; prompt-completion: prompt + completion)"
    )


def problems_of(format_name: str, *values: dict) -> list[str]:
    return [str(problem) for problem in read_conversations(rows_of(*values), format=format_name, system=None)[1]]


def test_every_row_that_does_not_fit_is_told() -> None:
    good = {"instruction": "Hi", "output": "Hello"}
    assert problems_of(
        "alpaca", good, {"instruction": "Hi"}, {**good, "output": 3}, good, {**good, "output": None},
        {**good, "instruction": " "}, {**good, "input": ["x"]}, {**good, "output": "\ud83d"},
    ) == [
        "rows.jsonl:2: output: this column is missing; the row has: instruction",
        "rows.jsonl:3: output: must be text, got int '3'",
        "rows.jsonl:5: output: must be text, got null",
        "rows.jsonl:6: instruction: empty, and there is no input either; write one or delete the row",
        "rows.jsonl:7: input: must be text, got list \"['x']\"",
        "rows.jsonl:8: output: holds '\\ud83d', half of a character; write the whole one, or remove it",
    ]  # fmt: skip


@pytest.mark.parametrize("values", [{"input": None}, {"input": ""}, {}])
def test_no_input_is_an_empty_input(values: dict) -> None:
    (found,), problems = read_conversations(
        rows_of({"instruction": "Hi", "output": "Hello", **values}), format="alpaca", system=None
    )
    assert not problems
    assert found.turns == (Turn("user", "Hi"), Turn("assistant", "Hello"))


def message(role: str) -> dict[str, str]:
    return {"role": role, "content": "x"}


@pytest.mark.parametrize(
    ("messages", "told"),
    [
        ([], "must be a list of"),
        ("x", "must be a list of"),
        ([message("user")], "must alternate and end with assistant, got user"),
        ([message("system")], "must alternate and end with assistant, got "),
        ([message("assistant")], "must alternate and end with assistant, got assistant"),
        ([message("user"), message("user"), message("assistant")], "must alternate and end with assistant"),
        ([message("user"), message("assistant"), message("user")], "must alternate and end with assistant"),
        ([message("user"), message("system"), message("assistant")], "a system turn is possible only at the start"),
        ([message("user"), message("tool")], "messages[1].role: must be one of system, user, assistant, got 'tool'"),
        ([message("user"), "x"], "messages[1]: must be an object"),
        ([message("user"), {"role": "assistant"}], "messages[1].content: this column is missing"),
        ([message("user"), {"role": "assistant", "content": None}], "messages[1].content: must be text, got null"),
    ],
)
def test_messages_that_are_no_conversation_are_told(messages: object, told: str) -> None:
    (problem,) = problems_of("messages", {"messages": messages})
    assert problem.startswith("rows.jsonl:1: messages")
    assert told in problem


def test_the_recipes_system_text_goes_before_rows_without_one() -> None:
    own = {"messages": [{"role": "system", "content": "own"}, message("user"), message("assistant")]}
    without = {"messages": [message("user"), message("assistant")]}
    found, problems = read_conversations(rows_of(own, without), format="messages", system="ours")
    assert not problems
    assert [conversation.turns[0] for conversation in found] == [Turn("system", "own"), Turn("system", "ours")]
