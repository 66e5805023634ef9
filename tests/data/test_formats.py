"""Rows become the turns that their raw JSON says, or a refusal that names the reason, the field and the cure."""

from __future__ import annotations

import json
import lzma
import re
import time
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from finetune.data.formats import FORMATS, alpaca_user_text, detect_format, read_conversation
from finetune.data.rows import REASONS, Conversation, Refusal, Row

HALF = "\ud83d"
CALL = {"name": "look", "arguments": {"at": "sky"}}
MESSAGES = [{"role": "user", "content": "Hi?"}, {"role": "assistant", "content": "Ho."}]
SHAREGPT = [{"from": "human", "value": "Hi?"}, {"from": "gpt", "value": "Ho."}]


def user(text: Any = "Hi?", **more: Any) -> dict:
    return {"role": "user", "content": text, **more}


def assistant(text: Any = "Ho.", **more: Any) -> dict:
    return {"role": "assistant", "content": text, **more}


def tool(text: Any = "blue", **more: Any) -> dict:
    return {"role": "tool", "content": text, **more}


def system(text: Any = "Be kind.") -> dict:
    return {"role": "system", "content": text}


def calls(*several: Any, content: Any = None, **more: Any) -> dict:
    return {"role": "assistant", "content": content, "tool_calls": list(several), **more}


def call(id: str | None = None, name: str = "look", arguments: Any = '{"at": "sky"}') -> dict:
    return {"type": "function", "function": {"name": name, "arguments": arguments}} | ({"id": id} if id else {})


def human(text: Any = "Hi?") -> dict:
    return {"from": "human", "value": text}


def gpt(text: Any = "Ho.", **more: Any) -> dict:
    return {"from": "gpt", "value": text, **more}


def read(values: dict, *, format: str | None = None, default_system: str | None = None) -> Conversation | Refusal:
    row = Row(values, "rows.jsonl", 7)
    found = format or detect_format(row)
    return found if isinstance(found, Refusal) else read_conversation(row, format=found, system=default_system)


def conversation(values: dict, **how: Any) -> Conversation:
    result = read(values, **how)
    assert isinstance(result, Conversation), result
    return result


def said(values: dict, **how: Any) -> list[tuple[str, str]]:
    return [(turn.role, turn.text) for turn in conversation(values, **how).turns]


def learned(values: dict, **how: Any) -> list[bool]:
    return [turn.train for turn in conversation(values, **how).turns if turn.role == "assistant"]


# Real files, against a few lines that know only the raw JSON.


def raw_rows(file: Path) -> list[dict]:
    data = file.read_bytes()
    text = (lzma.decompress(data) if file.suffix == ".xz" else data).decode("utf-8")
    return [json.loads(line) for line in text.splitlines()] if file.suffix == ".jsonl" else json.loads(text)


def turns_by_hand(row: dict) -> list[tuple]:
    """(role, text, train, calls) of a row of the real files; a call is (name, arguments)."""
    if "instruction" in row:
        asked = row["instruction"] + ("\n\n### Input:\n" + row["input"] if row["input"] else "")
        return [("user", asked, True, []), ("assistant", row["output"], True, [])]
    words = {"human": "user", "gpt": "assistant", "function_call": "assistant", "observation": "tool"}
    turns = [("system", row["system"], True, [])] if "system" in row else []
    for each in row.get("conversations", row.get("messages")):
        word, text = each.get("from", each.get("role")), each.get("value", each.get("content"))
        if word == "function_call":
            made = json.loads(text)
            made = made if isinstance(made, list) else [made]
            turns.append(("assistant", "", True, [(one["name"], one["arguments"]) for one in made]))
        else:
            turns.append((words.get(word, word), text, not ("chosen" in row and word == "gpt"), []))
    return [*turns, ("assistant", row["chosen"]["value"], True, [])] if "chosen" in row else turns


@pytest.mark.real
@pytest.mark.parametrize(
    ("file", "format", "refused"),
    [
        ("alpaca/alpaca_data.json.xz", "alpaca", {"empty_answer": 28}),
        ("alpaca/alpaca_en_demo.json", "alpaca", {}),
        ("chat/sharegpt_with_system.json", "sharegpt", {}),
        ("chat/openai_messages_fr.jsonl", "messages", {}),
        ("chat/toolcall_sharegpt.json", "sharegpt", {}),
        ("preference/dpo_en_demo.json", "preference", {}),
        ("preference/kto_en_demo.json", "preference", {"undesired_answer": 150}),
    ],
)
def test_every_real_row_says_what_its_json_says(shared: Path, file: str, format: str, refused: dict) -> None:
    reasons: dict[str, int] = {}
    for index, raw in enumerate(raw_rows(shared / file)):
        row = Row(raw, file, index)
        assert detect_format(row) == format
        result = read_conversation(row, format=format, system=None)
        if isinstance(result, Refusal):
            reasons[result.reason] = reasons.get(result.reason, 0) + 1
            assert raw.get("label") is False or raw.get("output") == ""
            continue
        found = [
            (turn.role, turn.text, turn.train, [(one.name, one.arguments) for one in turn.tool_calls])
            for turn in result.turns
        ]
        assert found == turns_by_hand(raw), row.where
        assert [one["function"] for one in result.tools] == json.loads(raw.get("tools", "[]"))
        assert result.row is row
    assert reasons == refused


def test_every_real_file_is_in_the_table_above(shared: Path) -> None:
    table = next(
        mark for mark in test_every_real_row_says_what_its_json_says.pytestmark if mark.name == "parametrize"
    ).args[1]
    there = {f"{name}/{file.name}" for name in ("alpaca", "chat", "preference") for file in (shared / name).iterdir()}
    assert there == {file for file, _, _ in table}


def test_alpaca_rows_pass_in_well_under_a_second() -> None:
    values = {"instruction": "Name a fox's colour. " * 4, "input": "", "output": "Rötlich, mostly. " * 12}
    rows = [Row(values, "rows.jsonl", line) for line in range(52_002)]
    start = time.process_time()
    for row in rows:
        assert detect_format(row) == "alpaca"
        read_conversation(row, format="alpaca", system=None)
    assert time.process_time() - start < 2  # 0.5 s where this was measured


# What each format can say.


@pytest.mark.parametrize(
    ("values", "format"),
    [
        ({"instruction": "a", "output": "b"}, "alpaca"),
        ({"instruction": "a", "output": "b", "text": "both in one"}, "alpaca"),
        ({"instruction": "a", "response": "b"}, "alpaca"),
        ({"instruction": "a", "output": None}, "alpaca"),
        ({"prompt": "a", "completion": "b", "id": 3}, "prompt-completion"),
        ({"prompt": "a", "completion": "b", "messages": None}, "prompt-completion"),
        ({"messages": MESSAGES, "prompt": "Hi?"}, "messages"),
        ({"messages": MESSAGES, "label": "spam"}, "messages"),
        ({"messages": MESSAGES, "label": True}, "preference"),
        ({"prompt": "a", "completion": "b", "label": False}, "preference"),
        ({"prompt": "a", "chosen": "b", "rejected": "c", "messages": MESSAGES}, "preference"),
        ({"chosen": MESSAGES, "rejected": MESSAGES}, "preference"),
        ({"conversations": SHAREGPT}, "sharegpt"),
        ({"text": "a", "label": 1}, "text"),
    ],
)
def test_columns_tell_the_format(values: dict, format: str) -> None:
    assert detect_format(Row(values, "rows.jsonl", 1)) == format


def test_alpaca_user_text_has_the_input_under_its_heading() -> None:
    assert alpaca_user_text("Add.", "1, 2") == "Add.\n\n### Input:\n1, 2"
    assert alpaca_user_text("Add.", "") == "Add."


def test_alpaca_with_system_history_and_input() -> None:
    values = {
        "instruction": "Add.",
        "input": "1, 2",
        "output": "3",
        "system": "Count.",
        "history": [["Hi", "Ho"], ["", "So"]],
    }
    assert said(values) == [
        ("system", "Count."),
        ("user", "Hi"),
        ("assistant", "Ho"),
        ("user", ""),
        ("assistant", "So"),
        ("user", "Add.\n\n### Input:\n1, 2"),
        ("assistant", "3"),
    ]


@pytest.mark.parametrize(
    ("values", "asked"),
    [
        ({"instruction": "Add.", "input": None, "output": "3", "response": "3"}, "Add."),
        ({"instruction": "Add.", "output": None, "response": "3"}, "Add."),
        ({"instruction": "Add.", "context": "1, 2", "response": "3", "category": "sum"}, "Add.\n\n### Input:\n1, 2"),
        ({"instruction": "Add.", "context": "elsewhere", "output": "3"}, "Add."),
        ({"instruction": "Add.", "input": "", "context": "elsewhere", "response": "3"}, "Add."),
        ({"instruction": "", "input": "1 + 2", "output": "3", "history": None, "system": ""}, "\n\n### Input:\n1 + 2"),
    ],
)
def test_alpaca_columns_under_other_names(values: dict, asked: str) -> None:
    assert said(values) == [("user", asked), ("assistant", "3")]


def test_only_the_completion_is_learned() -> None:
    prompt = [system(), user(), assistant("Ho."), user("And?")]
    values = {"prompt": prompt, "completion": [assistant("So."), user("More?"), assistant("No.")]}
    assert learned(values) == [False, True, True]
    assert said(values)[0] == ("system", "Be kind.")
    assert learned({"prompt": "Hi?", "completion": "Ho."}) == [True]


@pytest.mark.parametrize(
    ("word", "role"),
    [("system", "system"), ("developer", "system"), ("tool", "tool"), ("ipython", "tool"), ("function", "tool")],
)
def test_messages_roles(word: str, role: str) -> None:
    if role == "system":
        turns = [{"role": word, "content": "x"}, user(), assistant()]
    else:
        turns = [user(), calls(call()), {"role": word, "content": "x"}, assistant()]
    assert (role, "x") in said({"messages": turns})


@pytest.mark.parametrize("word", ["gpt", "assistant", "bot", "chatgpt"])
@pytest.mark.parametrize("asks", ["human", "user"])
def test_sharegpt_roles(asks: str, word: str) -> None:
    turns = [{"from": "system", "value": "s"}, {"from": asks, "value": "q"}, {"from": word, "value": "a"}]
    assert said({"conversations": turns}) == [("system", "s"), ("user", "q"), ("assistant", "a")]


def test_either_style_is_read_under_either_column() -> None:
    expected = [("user", "Hi?"), ("assistant", "Ho.")]
    assert said({"conversations": MESSAGES}) == said({"messages": SHAREGPT}) == expected


def test_text_parts_are_joined() -> None:
    parts = [{"type": "text", "text": "Hi"}, {"type": "text", "text": " there?"}]
    assert said({"messages": [user(parts), assistant()]})[0] == ("user", "Hi there?")


@pytest.mark.parametrize("key", [{"train": False}, {"weight": 0}, {"train": False, "weight": 0}, {"weight": 0.0}])
def test_a_turn_can_be_left_out_of_learning(key: dict) -> None:
    turns = [user(), assistant("", **key), user(), assistant("So.", train=True, weight=1)]
    assert learned({"messages": turns}) == [False, True]
    assert learned({"messages": [user(), assistant(train=None, weight=None)]}) == [True]
    assert learned({"conversations": [human(), gpt(**key), human(), gpt()]}) == [False, True]


def test_calls_keep_strict_ids_and_get_new_ones_in_order() -> None:
    turns = [
        user(),
        calls(call("abcDEF123"), call("call_long_one_7"), call("call00000"), content="I look."),
        tool("second", tool_call_id="call_long_one_7"),
        tool("third", tool_call_id="call00000", name="look"),
        tool("first", tool_call_id="abcDEF123"),
        assistant("Now again."),
        user("Again."),
        calls(call(None, "peek"), call(None, "look")),
        tool("by name", name="look"),
        tool("the other"),
        assistant("Done."),
    ]
    found = conversation({"messages": turns}).turns
    assert [made.id for turn in found for made in turn.tool_calls] == [
        "abcDEF123",
        "call00001",
        "call00000",
        "call00002",
        "call00003",
    ]
    answers = {turn.text: turn.tool_call_id for turn in found if turn.role == "tool"}
    assert answers == {
        "second": "call00001",
        "third": "call00000",
        "first": "abcDEF123",
        "by name": "call00003",
        "the other": "call00002",
    }
    assert found[1].text == "I look."
    assert found[1].tool_calls[0].arguments == {"at": "sky"}
    assert found[3].name == "look"


def test_an_id_goes_before_a_name_and_the_order() -> None:
    answers = [tool("second", tool_call_id="x", name="peek"), tool("first")]
    turns = [user(), calls(call(None, "peek"), call("x")), *answers, assistant()]
    found = conversation({"messages": turns}).turns
    assert [turn.tool_call_id for turn in found[2:4]] == ["call00001", "call00000"]


def test_the_old_function_call_key_is_one_call() -> None:
    turns = [user(), assistant(None, function_call=CALL), {"role": "function", "name": "look", "content": "x"}]
    (made,) = conversation({"messages": [*turns, assistant()]}).turns[1].tool_calls
    assert (made.name, made.arguments, made.id) == ("look", {"at": "sky"}, "call00000")


def test_sharegpt_calls_one_or_several_and_a_call_may_be_the_answer() -> None:
    turns = [human(), {"from": "function_call", "value": json.dumps([CALL, CALL])}]
    answers = [{"from": "observation", "value": "blue"}, {"from": "tool", "value": "grey"}]
    found = conversation({"conversations": [*turns, *answers, gpt()]}).turns
    assert [made.id for made in found[1].tool_calls] == ["call00000", "call00001"]
    assert [turn.tool_call_id for turn in found[2:4]] == ["call00000", "call00001"]
    assert conversation({"conversations": turns}).turns[-1].tool_calls


@pytest.mark.parametrize("as_text", [False, True])
def test_tools_are_wrapped(as_text: bool) -> None:
    bare = {"name": "look", "description": "Looks.", "parameters": {"type": "object"}}
    tools: Any = [bare, {"type": "function", "function": bare}, {"type": "function", **bare}]
    found = conversation({"messages": MESSAGES, "tools": json.dumps(tools) if as_text else tools}).tools
    assert found == ({"type": "function", "function": bare},) * 3


@pytest.mark.parametrize("tools", [None, "", " ", "[]", []])
def test_no_tools(tools: Any) -> None:
    assert conversation({"conversations": SHAREGPT, "tools": tools}).tools == ()


@pytest.mark.parametrize("chosen", ["Ho.", gpt(), assistant(), [gpt()], [assistant()], [human(), gpt()]])
@pytest.mark.parametrize("prompt", [{"prompt": "Hi?"}, {"conversations": [human()]}, {"messages": [user()]}])
def test_the_chosen_side_is_learned(prompt: dict, chosen: Any) -> None:
    values = {**prompt, "chosen": chosen, "rejected": "No."}
    assert said(values) == [("user", "Hi?"), ("assistant", "Ho.")]


def test_only_the_chosen_answer_is_learned() -> None:
    values = {"conversations": [human(), gpt("Ho."), human("And?")], "chosen": gpt("So."), "rejected": gpt("No.")}
    assert learned(values) == [False, True]
    assert learned({"chosen": [user(), assistant(), user(), assistant()], "rejected": []}) == [False, True]


@pytest.mark.parametrize("values", [{"messages": MESSAGES}, {"conversations": SHAREGPT}])
def test_a_wanted_answer_is_an_ordinary_row(values: dict) -> None:
    assert said({**values, "label": True}) == said(values)
    assert said({"prompt": "Hi?", "completion": "Ho.", "label": True}) == said(values)


def test_the_default_system_prompt_goes_before_turns_without_one() -> None:
    default = {"default_system": "Default."}
    assert said({"prompt": "Hi?", "completion": "Ho."}, **default)[0] == ("system", "Default.")
    assert said({"messages": [system(), *MESSAGES]}, **default)[:2] == [("system", "Be kind."), ("user", "Hi?")]
    assert said({"conversations": SHAREGPT, "system": "Own."}, **default)[0] == ("system", "Own.")
    assert said({"messages": [system("Own."), *MESSAGES], "system": "Own."})[:2] == [
        ("system", "Own."),
        ("user", "Hi?"),
    ]
    assert said({"text": "Once."}, **default) == [("assistant", "Once.")]


def test_an_empty_user_turn_is_allowed_where_something_else_is_asked() -> None:
    assert len(said({"messages": [user(), assistant(), user(""), assistant()]})) == 4
    assert len(said({"messages": [user(""), assistant(), user(""), assistant()]})) == 4
    assert len(said({"messages": [system(), user(""), assistant()]})) == 3


# What cannot be used: reason, field and a word of the message.


def messages(*turns: Any, **more: Any) -> dict:
    return {"messages": list(turns), **more}


def sharegpt(*turns: Any, **more: Any) -> dict:
    return {"conversations": list(turns), **more}


def with_call(made: Any) -> dict:
    return messages(user(), calls(made), tool(), assistant())


PART = "messages[0].content[0]"
CALL_FIELD = "messages[1].tool_calls[0]"
PICTURE = {"type": "image_url", "image_url": {"url": "data:image/png;base64,AA=="}}
BAD_ROWS: list[tuple[str, dict, str, str, str]] = [
    ("messages", messages(user("What?"), assistant(), images=["fox.png"]), "has_media", "images", "a list of 1"),
    (
        "sharegpt",
        sharegpt({"from": "human", "value": "Hi?"}, {"from": "gpt", "value": "Ho."}, image="fox.png"),
        "has_media",
        "image",
        "got 'fox.png'",
    ),
    ("alpaca", {"instruction": "a", "output": "b", "videos": ["c.mp4"]}, "has_media", "videos", "only text"),
    ("text", {"text": "a fox", "image": {"bytes": "AA=="}}, "has_media", "image", "an object of bytes"),
    ("messages", messages(user([PICTURE]), assistant()), "has_media", "messages[0].content[0].type", "got 'image_url'"),
    ("messages", messages(user("<image>\nWhat?"), assistant()), "has_media", "messages[0].content", "got '<image>'"),
    ("messages", messages(user([{"type": "refusal"}]), assistant()), "wrong_type", f"{PART}.type", "got 'refusal'"),
    ("messages", messages(user("<|image|>What?"), assistant()), "has_media", "messages[0].content", "data.drop"),
    ("alpaca", {"instruction": 3, "output": "b"}, "wrong_type", "instruction", "got 3"),
    ("alpaca", {"instruction": "a", "output": None}, "wrong_type", "output", "got null"),
    ("alpaca", {"instruction": "a", "output": ["b"]}, "wrong_type", "output", "a list of 1"),
    ("alpaca", {"instruction": "a", "input": {"x": 1}, "output": "b"}, "wrong_type", "input", "an object of x"),
    ("alpaca", {"instruction": "a", "output": "b", "response": "c"}, "wrong_type", "response", "keep one"),
    ("alpaca", {"instruction": "a", "output": ""}, "empty_answer", "output", "data.drop"),
    ("alpaca", {"instruction": "a", "response": " \n"}, "empty_answer", "response", "data.drop"),
    ("alpaca", {"instruction": " ", "input": "", "output": "b"}, "empty_prompt", "instruction", "no input either"),
    ("alpaca", {"instruction": "a", "output": HALF}, "invalid_text", "output", r"'\ud83d'"),
    ("alpaca", {"instruction": "a", "output": "b", "system": 1}, "wrong_type", "system", "got 1"),
    ("alpaca", {"instruction": "a", "output": "b", "system": HALF}, "invalid_text", "system", "half"),
    ("alpaca", {"instruction": "a", "output": "b", "history": "x"}, "wrong_type", "history", "a list"),
    ("alpaca", {"instruction": "a", "output": "b", "history": [["x"]]}, "wrong_type", "history[0]", "two texts"),
    ("alpaca", {"instruction": "a", "output": "b", "history": [["x", 2]]}, "wrong_type", "history[0][1]", "got 2"),
    ("alpaca", {"instruction": "a", "output": "b", "history": [["x", ""]]}, "empty_answer", "history[0][1]", "answer"),
    ("alpaca", {"instrution": "a", "output": "b"}, "missing_column", "instruction", "'instruction' by 'instrution'"),
    ("alpaca", {"instruction": "a"}, "missing_column", "output", "got instruction"),
    ("alpaca", {}, "missing_column", "instruction", "no keys"),
    ("alpaca", {"conversations": SHAREGPT}, "other_format", "columns", "looks like sharegpt"),
    ("alpaca", {"instruction": None, "output": None, "text": "x"}, "other_format", "columns", "looks like text"),
    ("messages", {"prompt": "a", "completion": "b"}, "other_format", "columns", "read as messages"),
    ("preference", {"messages": MESSAGES}, "other_format", "columns", "looks like messages"),
    ("prompt-completion", {"prompt": "a", "completion": ""}, "empty_answer", "completion", "data.drop"),
    ("prompt-completion", {"prompt": "", "completion": "b"}, "empty_prompt", "prompt", "nothing is asked"),
    ("prompt-completion", {"prompt": "a", "completion": 4.5}, "wrong_type", "completion", "got 4.5"),
    ("prompt-completion", {"prompt": MESSAGES[:1], "completion": "b"}, "wrong_type", "completion", "list of messages"),
    ("prompt-completion", {"prompt": "a", "completion": MESSAGES[1:]}, "wrong_type", "completion", "list of 1"),
    ("prompt-completion", {"prompt": [user()], "completion": [user()]}, "bad_turns", "completion[0].role", "join"),
    ("prompt-completion", {"prompt": [user()], "completion": []}, "bad_turns", "completion", "empty list"),
    (
        "prompt-completion",
        {"prompt": [user()], "completion": [assistant(train=False)]},
        "no_supervised_token",
        "completion[0].train",
        "one assistant turn",
    ),
    ("messages", {"messages": None}, "wrong_type", "messages", "got null"),
    ("messages", {"messages": "Hi"}, "wrong_type", "messages", "got 'Hi'"),
    ("messages", messages(), "bad_turns", "messages", "empty list"),
    ("messages", messages("Hi"), "wrong_type", "messages[0]", "got 'Hi'"),
    (
        "messages",
        messages(*MESSAGES, {"role": "usr", "content": "x"}),
        "bad_turns",
        "messages[2].role",
        "'usr'; did you mean 'user'",
    ),
    ("messages", messages({"role": "Human", "content": "x"}), "bad_turns", "messages[0].role", "did you mean 'user'"),
    ("messages", messages({"role": 3, "content": "x"}), "wrong_type", "messages[0].role", "got 3"),
    ("messages", messages({"role": ["user"], "content": "x"}), "wrong_type", "messages[0].role", "a list of 1"),
    ("messages", messages({"rolle": "user", "content": "x"}), "missing_column", "messages[0].role", "'rolle'"),
    ("messages", messages({"role": "user"}), "missing_column", "messages[0].content", "got role"),
    ("messages", messages(user(None), assistant()), "wrong_type", "messages[0].content", "got null"),
    ("messages", messages(user(), assistant(None)), "wrong_type", "messages[1].content", "got null"),
    ("messages", messages(user(), assistant(None, tool_calls=[])), "wrong_type", "messages[1].content", "got null"),
    (
        "messages",
        messages(user([{"type": "image"}]), assistant()),
        "has_media",
        "messages[0].content[0].type",
        "image",
    ),
    ("messages", messages(user(["x"]), assistant()), "wrong_type", "messages[0].content[0].type", "got 'x'"),
    ("messages", messages(user([{"type": "text"}])), "missing_column", "messages[0].content[0].text", "missing"),
    (
        "messages",
        messages(user([{"type": "text", "text": HALF}])),
        "invalid_text",
        "messages[0].content[0].text",
        "half",
    ),
    ("messages", messages(user(), assistant(HALF)), "invalid_text", "messages[1].content", "half"),
    ("messages", messages(user(), assistant("")), "empty_answer", "messages[1].content", "data.drop"),
    ("messages", messages(user(), assistant(""), *MESSAGES), "empty_answer", "messages[1].content", "data.drop"),
    ("messages", messages(user(" "), assistant()), "empty_prompt", "messages[0].content", "nothing is asked"),
    ("messages", messages(user()), "bad_turns", "messages[0].role", "must be the assistant's"),
    ("messages", messages(system()), "bad_turns", "messages[0].role", "must be the assistant's"),
    ("messages", messages(*MESSAGES, user()), "bad_turns", "messages[2].role", "must be the assistant's"),
    ("messages", messages(user(), user(), assistant()), "bad_turns", "messages[1].role", "join the two"),
    ("messages", messages(user(), assistant(), assistant()), "bad_turns", "messages[2].role", "join the two"),
    ("messages", messages(assistant()), "bad_turns", "messages[0].role", "before the user's first"),
    ("messages", messages(user(), system(), assistant()), "bad_turns", "messages[1].role", "only at the start"),
    ("messages", messages(system(), system(), *MESSAGES), "bad_turns", "messages[1].role", "only at the start"),
    ("messages", messages(user(), tool(), assistant()), "bad_turns", "messages[1].role", "call before it"),
    ("messages", messages(*MESSAGES, tool(), assistant()), "bad_turns", "messages[2].role", "call before it"),
    ("messages", messages(user(), calls(call()), user()), "bad_turns", "messages[2].role", "after a tool call"),
    ("messages", messages(user(), calls(call()), assistant()), "bad_turns", "messages[2].role", "after a tool call"),
    (
        "messages",
        messages(user(), calls(call()), tool(), *MESSAGES),
        "bad_turns",
        "messages[3].role",
        "after a tool's answer",
    ),
    ("messages", messages(user(), calls(call()), tool()), "bad_turns", "messages[2].role", "must be the assistant's"),
    ("messages", messages(user(), assistant(train=1)), "wrong_type", "messages[1].train", "got 1"),
    ("messages", messages(user(), assistant(weight=0.5)), "wrong_type", "messages[1].weight", "got 0.5"),
    ("messages", messages(user(), assistant(weight=True)), "wrong_type", "messages[1].weight", "got true"),
    ("messages", messages(user(), assistant(train=True, weight=0)), "wrong_type", "messages[1].weight", "train true"),
    ("messages", messages(user(train=False), assistant()), "wrong_type", "messages[0].train", "turn of user"),
    ("messages", messages(user(weight=1), assistant()), "wrong_type", "messages[0].weight", "turn of user"),
    ("messages", messages(user(), assistant(train=False)), "no_supervised_token", "messages[1].train", "learned"),
    ("messages", messages(user(tool_calls=[call()]), assistant()), "bad_tool_call", "messages[0].tool_calls", "user"),
    ("messages", messages(user(), assistant(tool_calls=CALL)), "bad_tool_call", "messages[1].tool_calls", "a list"),
    ("messages", with_call("x"), "bad_tool_call", CALL_FIELD, "got 'x'"),
    ("messages", with_call({"function": 3}), "bad_tool_call", f"{CALL_FIELD}.function", "got 3"),
    ("messages", with_call({"function": {}}), "bad_tool_call", f"{CALL_FIELD}.function.name", "missing"),
    ("messages", with_call({"name": "look"}), "bad_tool_call", f"{CALL_FIELD}.arguments", "missing"),
    ("messages", with_call(call(name="")), "bad_tool_call", f"{CALL_FIELD}.function.name", "empty text"),
    ("messages", with_call(call(name=HALF)), "invalid_text", f"{CALL_FIELD}.function.name", "half"),
    ("messages", with_call(call(arguments="{")), "bad_tool_call", f"{CALL_FIELD}.function.arguments", "JSON"),
    ("messages", with_call(call(arguments="[1]")), "bad_tool_call", f"{CALL_FIELD}.function.arguments", "list of 1"),
    ("messages", with_call(call(arguments='{"a": NaN}')), "bad_tool_call", f"{CALL_FIELD}.function.arguments", "NaN"),
    (
        "messages",
        with_call(call(arguments='{"a": 1, "a": 2}')),
        "bad_tool_call",
        f"{CALL_FIELD}.function.arguments",
        "repeated key",
    ),
    (
        "messages",
        with_call(call(arguments='{"a": "\\ud83d"}')),
        "invalid_text",
        f"{CALL_FIELD}.function.arguments",
        "half",
    ),
    (
        "messages",
        with_call(call(arguments={"a": [{HALF: 1}]})),
        "invalid_text",
        f"{CALL_FIELD}.function.arguments",
        "half",
    ),
    (
        "messages",
        with_call(call(arguments='{"a": ' + "[" * 200 + "]" * 200 + "}")),
        "bad_tool_call",
        f"{CALL_FIELD}.function.arguments",
        "at most 100",
    ),
    (
        "messages",
        with_call(call(arguments="[" * 100_000)),
        "bad_tool_call",
        f"{CALL_FIELD}.function.arguments",
        "JSON text",
    ),
    (
        "messages",
        with_call(call(arguments={"a": float("inf")})),
        "bad_tool_call",
        f"{CALL_FIELD}.function.arguments",
        "got inf",
    ),
    ("messages", with_call({"id": 5, **CALL}), "bad_tool_call", f"{CALL_FIELD}.id", "got 5"),
    (
        "messages",
        messages(user(), calls(call("one"), call("one")), tool(), assistant()),
        "bad_tool_call",
        "messages[1].tool_calls",
        "'one' twice",
    ),
    (
        "messages",
        messages(user(), calls(call()), tool(), tool(), assistant()),
        "bad_tool_call",
        "messages[3].role",
        "no call left",
    ),
    (
        "messages",
        messages(user(), calls(call("one")), tool(tool_call_id="two"), assistant()),
        "bad_tool_call",
        "messages[2].tool_call_id",
        "('one'), got 'two'",
    ),
    (
        "messages",
        messages(user(), calls(call()), tool(tool_call_id=5), assistant()),
        "wrong_type",
        "messages[2].tool_call_id",
        "got 5",
    ),
    (
        "messages",
        messages(user(), calls(call()), tool(name=HALF), assistant()),
        "invalid_text",
        "messages[2].name",
        "half",
    ),
    ("messages", messages(*MESSAGES, tools="{"), "bad_tool_call", "tools", "JSON text"),
    ("messages", messages(*MESSAGES, tools={"name": "look"}), "bad_tool_call", "tools", "a list"),
    ("messages", messages(*MESSAGES, tools=["look"]), "bad_tool_call", "tools[0]", "got 'look'"),
    ("messages", messages(*MESSAGES, tools=[{}]), "bad_tool_call", "tools[0].name", "missing"),
    ("messages", messages(*MESSAGES, tools=[{"function": None}]), "bad_tool_call", "tools[0].function", "got null"),
    ("messages", messages(*MESSAGES, tools=[{"function": {}}]), "bad_tool_call", "tools[0].function.name", "missing"),
    ("messages", messages(*MESSAGES, tools=[{"name": " "}]), "bad_tool_call", "tools[0].name", "name of a tool"),
    ("messages", messages(*MESSAGES, tools=[{"name": "x", "d": HALF}]), "invalid_text", "tools[0]", "half"),
    (
        "messages",
        messages(*MESSAGES, tools=[{"type": "code", "function": {"name": "x"}}]),
        "bad_tool_call",
        "tools[0].type",
        "got 'code'",
    ),
    ("messages", messages(*MESSAGES, tools=[{"name": "x", "d": {1j}}]), "bad_tool_call", "tools[0]", "got set"),
    ("messages", messages(*MESSAGES, label=False), "undesired_answer", "label", "data.drop"),
    ("sharegpt", sharegpt(gpt(), human(), gpt()), "bad_turns", "conversations[0].from", "before the user's first"),
    ("sharegpt", sharegpt({"from": "system", "value": "s"}, gpt()), "bad_turns", "conversations[1].from", "'gpt'"),
    ("sharegpt", sharegpt({"from": "hman", "value": "x"}), "bad_turns", "conversations[0].from", "mean 'human'"),
    ("sharegpt", sharegpt({"value": "x"}), "missing_column", "conversations[0].from", "missing"),
    ("sharegpt", sharegpt(human(), {"from": "gpt"}), "missing_column", "conversations[1].value", "missing"),
    ("sharegpt", sharegpt(human(), gpt(7)), "wrong_type", "conversations[1].value", "got 7"),
    (
        "sharegpt",
        sharegpt(human(), {"from": "function_call", "value": "look()"}),
        "bad_tool_call",
        "conversations[1].value",
        "JSON text",
    ),
    (
        "sharegpt",
        sharegpt(human(), {"from": "function_call", "value": "[]"}),
        "bad_tool_call",
        "conversations[1].value",
        "a list of 0",
    ),
    (
        "sharegpt",
        sharegpt(human(), {"from": "function_call", "value": '[{"name": "x"}]'}),
        "bad_tool_call",
        "conversations[1].value[0].arguments",
        "missing",
    ),
    (
        "sharegpt",
        sharegpt({"from": "system", "value": "s"}, human(), gpt(), system="t"),
        "bad_turns",
        "system",
        "keep one of the two",
    ),
    ("preference", {"prompt": "a", "chosen": "", "rejected": "b"}, "empty_answer", "chosen", "data.drop"),
    ("preference", {"prompt": "a", "chosen": None, "rejected": "b"}, "wrong_type", "chosen", "got null"),
    ("preference", {"prompt": "a", "chosen": 5, "rejected": "b"}, "wrong_type", "chosen", "got 5"),
    ("preference", {"prompt": "a", "chosen": [], "rejected": []}, "bad_turns", "chosen", "empty list"),
    ("preference", {"prompt": "a", "chosen": user()}, "bad_turns", "chosen.role", "after a user turn"),
    ("preference", {"prompt": "a", "chosen": MESSAGES}, "bad_turns", "chosen[0].role", "join the two"),
    ("preference", {"chosen": "a", "rejected": "b"}, "missing_column", "prompt", "got chosen, rejected"),
    ("preference", {"messages": MESSAGES, "label": False}, "undesired_answer", "label", "data.drop"),
    ("preference", {"messages": MESSAGES, "label": None}, "wrong_type", "label", "got null"),
    ("preference", {"prompt": "a", "completion": "b", "label": 1}, "wrong_type", "label", "got 1"),
    ("text", {"text": " "}, "empty_answer", "text", "white space"),
    ("text", {"text": 3}, "wrong_type", "text", "got 3"),
    ("text", {"text": HALF}, "invalid_text", "text", "half"),
    ("text", {"txt": "x"}, "missing_column", "text", "'text' by 'txt'"),
]


@pytest.mark.parametrize(("format", "values", "reason", "field", "word"), BAD_ROWS)
def test_a_bad_row_is_refused_by_name_and_field(format: str, values: dict, reason: str, field: str, word: str) -> None:
    result = read(values, format=format)
    assert isinstance(result, Refusal), result
    assert (result.reason, result.message.partition(": ")[0]) == (reason, field), result.message
    assert word in result.message
    assert result.where == "rows.jsonl:7"
    check_message(result)


def check_message(refusal: Refusal) -> None:
    """A known reason, then `field: what is wrong, got ...; what to do` on one line that any terminal can print."""
    assert refusal.reason in REASONS
    assert re.fullmatch(r"[^:\n]+: .+, got .+; .+", refusal.message), refusal.message
    assert refusal.message.encode()
    assert len(refusal.message) < 2000


@pytest.mark.parametrize(
    ("values", "reason", "word"),
    [
        ({}, "missing_column", "no keys"),
        ({"instrution": "a", "output": "b"}, "missing_column", "'instruction' by 'instrution'"),
        ({HALF: "a", "a\nb": 1}, "missing_column", r"'\ud83d'"),
        ({"x" * 10_000: 1}, "missing_column", "alpaca: instruction + output"),
        ({str(number): 1 for number in range(9_000)}, "missing_column", "more"),
        ({"instruction": "a", "output": "b", "messages": MESSAGES}, "other_format", "alpaca and messages"),
    ],
)
def test_columns_that_tell_no_format(values: dict, reason: str, word: str) -> None:
    result = detect_format(Row(values, "rows.jsonl", 1))
    assert isinstance(result, Refusal)
    assert result.reason == reason
    assert word in result.message
    check_message(result)


# Any JSON in any place.

KEYS = (
    ["role", "content", "from", "value", "train", "weight", "name", "id", "type", "text", "tool_call_id"]
    + ["tool_calls", "function_call", "function", "arguments"]
    + sorted({column for format in FORMATS.values() for columns in format.columns for column in columns})
    + ["input", "response", "context", "history", "system", "tools", "rejected"]
)
WORDS = ["user", "assistant", "system", "tool", "human", "gpt", "function_call", "observation", "function", "text"]
leaves = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.sampled_from([*WORDS, "", "{", "[]", HALF, json.dumps(CALL), "[" * 9_999])
    | st.text(st.characters(exclude_categories=()), max_size=5)
)
anything = st.recursive(
    leaves,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.sampled_from(KEYS) | st.text(), inner, max_size=5),
    max_leaves=12,
)
VALID = [
    {"instruction": "a", "input": "b", "output": "c", "history": [["d", "e"]], "system": "f"},
    {"prompt": [user(), assistant(), user()], "completion": [assistant()], "label": True},
    messages(system(), user(), calls(call("one")), tool(tool_call_id="one"), assistant(weight=1), tools=[CALL]),
    sharegpt(human(), {"from": "function_call", "value": [CALL]}, {"from": "observation", "value": "x"}, gpt()),
    {"conversations": [human()], "chosen": [gpt(train=True)], "rejected": gpt()},
    {"text": "a"},
]


def places(value: Any, path: tuple = ()) -> list[tuple]:
    """The path of every value inside a JSON value."""
    pairs = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [inner for key, each in pairs for inner in ((*path, key), *places(each, (*path, key)))]


PLACES = [(number, path) for number, row in enumerate(VALID) for path in places(row)]


def put(value: Any, path: tuple, new: Any) -> Any:
    copy = dict(value) if isinstance(value, dict) else list(value)
    copy[path[0]] = put(value[path[0]], path[1:], new) if path[1:] else new
    return copy


def check_never_raises(values: dict) -> None:
    row = Row(values, "rows.jsonl", 1)
    found = detect_format(row)
    assert isinstance(found, Refusal) or found in FORMATS
    results = [found, *(read_conversation(row, format=format, system="s") for format in FORMATS)]
    for result in results:
        if isinstance(result, Refusal):
            check_message(result)
        elif isinstance(result, Conversation):
            check_conversation(result)


def check_conversation(result: Conversation) -> None:
    """What a template may rely on."""
    assert all(turn.role in ("system", "user", "assistant", "tool") for turn in result.turns)
    assert result.turns[-1].role == "assistant"
    assert result.turns[-1].text.strip() or result.turns[-1].tool_calls
    assert any(turn.train for turn in result.turns if turn.role == "assistant")
    json.dumps([result.tools, *(made.arguments for turn in result.turns for made in turn.tool_calls)], allow_nan=False)
    for turn in result.turns:
        turn.text.encode()
        assert all(re.fullmatch("[A-Za-z0-9]{9}", made.id) for made in turn.tool_calls)


def test_the_valid_rows_are_valid() -> None:
    assert [type(read(row)) for row in VALID] == [Conversation] * len(VALID)


@settings(max_examples=300, deadline=None)
@given(st.sampled_from(PLACES), anything)
def test_any_value_in_any_place_never_raises(place: tuple[int, tuple], value: Any) -> None:
    number, path = place
    check_never_raises(put(VALID[number], path, value))


@settings(max_examples=200, deadline=None)
@given(st.dictionaries(st.sampled_from(KEYS) | st.text(max_size=3), anything, max_size=5))
def test_any_row_never_raises(values: dict) -> None:
    check_never_raises(values)


@pytest.mark.parametrize(
    "row",
    [
        messages(user(), assistant(), images=[], image=None, audio=""),
        messages(user("Close this tag:\n<image>\n<url>fox.png</url>\n</image>"), assistant()),
        messages(user(), assistant("Write it as\n<image>")),
        messages(user("What does <image> mean here?"), assistant()),
    ],
)
def test_a_row_without_an_image_is_none_of_those(row: dict) -> None:
    """An empty column, markup, and an answer that speaks of the placeholder."""
    assert not isinstance(read_conversation(Row(row, "rows.jsonl", 1), format="messages", system=None), Refusal)
