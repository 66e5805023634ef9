"""Every real row, through real tokenizers and templates, against an oracle that knows nothing of ours.

The oracle reads the row's raw JSON, renders it with plain jinja2, finds what the template writes for an answer by
rendering two other answers in its place, and takes ids and offsets from transformers.
"""

from __future__ import annotations

import json
import lzma
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from functools import cache, cached_property
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
from jinja2 import Template as JinjaTemplate
from jinja2.ext import loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment
from transformers import PreTrainedTokenizerBase

from finetune.base import Base
from finetune.data.encoder import Encoder
from finetune.data.examples import Rules, TracedExample, label
from finetune.data.formats import detect_format, read_conversation
from finetune.data.rows import Conversation, Refusal, Row
from finetune.data.sources import read_rows
from finetune.data.template import choose_template
from finetune.recipe import SourceSection
from tests.conftest import CHECKOUT

DATE = "14 Mar 2025"  # not the one that templates fall back to
FILES = {
    "alpaca/alpaca_data.json.xz": 400,
    "alpaca/alpaca_en_demo.json": 40,
    "chat/openai_messages_fr.jsonl": 7,
    "chat/sharegpt_with_system.json": 15,
    "chat/toolcall_sharegpt.json": 15,
    "preference/dpo_en_demo.json": 15,
    "preference/kto_en_demo.json": 15,
}  # the step of the sample
ROWS = {"alpaca/alpaca_data.json.xz": 52_002, "chat/toolcall_sharegpt.json": 300}
COMBINATIONS = [
    *[("llama2", name) for name in ("auto", "alpaca", "vicuna", "zephyr")],
    *[("llama3.2-instruct", name) for name in ("auto", "alpaca", "llama3", "zephyr")],
    *[("mistral", name) for name in ("auto", "alpaca", "vicuna", "zephyr")],
    *[("pocket", name) for name in ("alpaca", "vicuna", "zephyr")],
]
SENTINELS = ("QZXSENTINELQZX", "Another sentinel, of several words: 4711 & ZXQ")
NEIGHBOURS = 3  # tokens on either side of a literal that may join with a part of it
ROLES = {"human": "user", "gpt": "assistant", "observation": "tool", "function_call": "assistant"}

pytestmark = pytest.mark.real

Messages = list[dict[str, Any]]
Span = tuple[int, int]


# --- the oracle ---


class TemplateRaises(Exception):
    """What a template says when it refuses."""


@dataclass
class Oracle:
    """A tokenizer of transformers and a template's source."""

    tokenizer: PreTrainedTokenizerBase
    source: str | None  # None: the tokenizer's own
    tails: dict[tuple, str] = field(default_factory=dict)

    @cached_property
    def program(self) -> JinjaTemplate:
        def refuse(message: str) -> None:
            raise TemplateRaises(message)

        environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols])
        environment.filters["tojson"] = lambda value, indent=None: json.dumps(value, ensure_ascii=False, indent=indent)
        environment.globals["raise_exception"] = refuse
        day = datetime.strptime(DATE, "%d %b %Y")
        environment.globals["strftime_now"] = day.strftime
        return environment.from_string(self.source or self.tokenizer.chat_template)

    @cached_property
    def control_text(self) -> re.Pattern[str]:
        texts = sorted(self.tokenizer.get_added_vocab(), key=len, reverse=True)
        return re.compile("|".join(map(re.escape, texts)))

    def render(self, messages: Messages, tools: Any, *, ask: bool = False) -> str:
        tokens = {"bos_token": self.tokenizer.bos_token, "eos_token": self.tokenizer.eos_token}
        return self.program.render(messages=messages, tools=tools, add_generation_prompt=ask, **tokens)

    def turn_span(self, messages: Messages, tools: Any, number: int, text: str) -> Span:
        """Where the turn stands: what comes behind the prompt, up to and with the first control token behind it."""
        around = set()
        for sentinel in SENTINELS:
            other = [*messages[:number], with_sentinel(messages[number], sentinel), *messages[number + 1 :]]
            before, after = self.render(other, tools).split(sentinel)
            around.add((before, after))
        ((before, after),) = around
        assert text.startswith(before), "the template writes something else before another answer"
        assert text.endswith(after), "the template writes something else behind another answer"
        assert len(before) + len(after) <= len(text)
        stop = self.control_text.search(after)
        assert stop, "no control token behind the answer"
        return len(before) - self.written_unasked(messages, tools, number), len(text) - len(after) + stop.end()

    def written_unasked(self, messages: Messages, tools: Any, number: int) -> int:
        """How much the template writes between the generation prompt and the turn's own text."""
        shape = tuple((message["role"], "tool_calls" in message) for message in messages[: number + 1])
        key = (shape, bool(tools))
        if key not in self.tails:
            last, now = "LASTSENTINEL", "NOWSENTINEL"
            asked = [*messages[: number - 1], with_sentinel(messages[number - 1], last)]
            said = [*asked, with_sentinel(messages[number], now)]
            prompt = self.render(asked, tools, ask=True).split(last)[1]
            between = self.render(said, tools).split(last)[1].split(now)[0]
            assert between.startswith(prompt), (prompt, between)
            self.tails[key] = between.removeprefix(prompt)
        return len(self.tails[key])

    def writes_calls_and_tools(self, messages: Messages, tools: Any) -> bool:
        """Whether another name of a call or a tool is seen in the text."""
        sentinel = SENTINELS[0]
        calling = [number for number, message in enumerate(messages) if "tool_calls" in message]
        changed = [([*messages[:n], with_sentinel(messages[n], sentinel), *messages[n + 1 :]], tools) for n in calling]
        for number, tool in enumerate(tools or ()):
            other = {**tool, "function": {**tool["function"], "name": sentinel}}
            changed.append((messages, [*tools[:number], other, *tools[number + 1 :]]))
        return all(sentinel in self.render(*each) for each in changed)

    def encodings(self, conversations: Sequence[tuple[Messages, Any]]) -> list[tuple[list[int], list[Span]]]:
        """Ids and offsets as apply_chat_template gives them; one call for all that have no tools."""
        found: list[Any] = [None] * len(conversations)
        plain = [number for number, (_, tools) in enumerate(conversations) if tools is None]
        groups = [(plain, None)] * bool(plain)
        groups += [([number], tools) for number, (_, tools) in enumerate(conversations) if tools is not None]
        for numbers, tools in groups:
            given = self.tokenizer.apply_chat_template(
                [conversations[number][0] for number in numbers],
                tools=tools,
                chat_template=self.source,
                return_dict=True,
                tokenizer_kwargs={"return_offsets_mapping": True},
                date_string=DATE,
            )
            for number, ids, offsets in zip(numbers, given["input_ids"], given["offset_mapping"], strict=True):
                found[number] = (ids, offsets)
        return found


def with_sentinel(message: Mapping[str, Any], sentinel: str) -> dict[str, Any]:
    """The message with another text; of a call, with another function's name."""
    if "tool_calls" not in message:
        return {**message, "content": sentinel}
    first, *others = message["tool_calls"]
    return {**message, "tool_calls": [{**first, "function": {**first["function"], "name": sentinel}}, *others]}


def messages_of(values: Mapping[str, Any]) -> Messages:
    """What a raw row says; calls have no id yet."""
    if "instruction" in values:
        user = values["instruction"] + (f"\n\n### Input:\n{values['input']}" if values["input"] else "")
        return [{"role": "user", "content": user}, {"role": "assistant", "content": values["output"]}]
    said = values.get("conversations") or values["messages"]
    said = said + ([values["chosen"]] if "chosen" in values else [])
    messages = [{"role": "system", "content": values["system"]}] if values.get("system") else []
    for turn in said:
        word = turn.get("from") or turn["role"]
        message = {"role": ROLES.get(word, word), "content": turn.get("value", turn.get("content"))}
        if word == "function_call":
            call = json.loads(message["content"])
            arguments = call["arguments"]
            arguments = json.loads(arguments) if isinstance(arguments, str) else arguments
            function = {"name": call["name"], "arguments": arguments}
            message |= {"content": "", "tool_calls": [{"id": "", "type": "function", "function": function}]}
        messages.append(message)
    return messages


def tools_of(values: Mapping[str, Any]) -> list[dict[str, Any]] | None:
    tools = json.loads(values.get("tools") or "[]")
    return [{"type": "function", "function": tool} for tool in tools] or None


def with_ids(messages: Messages, conversation: Conversation) -> Messages:
    """Calls and their answers get the ids that were made up, once these are seen to fit each other."""
    asked: list[str] = []
    for message, turn in zip(messages, conversation.turns, strict=True):
        if turn.tool_calls:
            asked = [call.id for call in turn.tool_calls]
            assert all(re.fullmatch("[A-Za-z0-9]{9}", name) for name in asked)
            for call, name in zip(message["tool_calls"], asked, strict=True):
                call["id"] = name
        elif turn.role == "tool":
            assert turn.tool_call_id == asked.pop(0)
            message["tool_call_id"] = turn.tool_call_id
    return messages


# --- the rows ---


@dataclass
class RealRow:
    """A row's raw values beside what finetune reads of it."""

    name: str  # file[index]
    values: Mapping[str, Any]
    read: Conversation | Refusal

    @cached_property
    def messages(self) -> Messages:
        messages = messages_of(self.values)
        return with_ids(messages, self.read) if isinstance(self.read, Conversation) else messages

    @cached_property
    def tools(self) -> Any:
        return tools_of(self.values)


def raw_values(path: Path) -> list[dict[str, Any]]:
    if path.suffix == ".xz":
        return json.loads(lzma.decompress(path.read_bytes()))
    if path.suffix == ".jsonl":
        return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    return json.loads(path.read_text(encoding="utf-8"))


@cache
def rows_of(path: Path) -> list[tuple[dict[str, Any], Row | Refusal]]:
    """Every row of a file, raw and as read; the two readers must count alike."""
    return list(zip(raw_values(path), read_rows(SourceSection(source=str(path))), strict=True))


def real_rows(shared: Path, *, every: bool) -> Iterator[RealRow]:
    for file, step in FILES.items():
        rows = rows_of(shared / file)
        assert len(rows) == ROWS.get(file, len(rows))
        for index in range(0, len(rows), 1 if every else step):
            values, row = rows[index]
            assert isinstance(row, Row)
            assert row.values == values
            layout = detect_format(row)
            assert isinstance(layout, str)
            yield RealRow(f"{file}[{index}]", values, read_conversation(row, format=layout, system=None))


# --- the comparison ---


@dataclass
class Tally:
    """What was seen, so that a comparison of nothing fails."""

    counts: Counter[str] = field(default_factory=Counter)
    differences: list[str] = field(default_factory=list)

    def check(self, row: RealRow, examine: Callable[..., None], *given: Any) -> None:
        try:
            examine(row, *given)
        except (AssertionError, ValueError, IndexError) as error:
            self.differences.append(f"{row.name}: {type(error).__name__}: {error}"[:600])


def refusal_is_true(row: RealRow, refusal: Refusal, oracle: Oracle) -> None:
    """The reason, seen without finetune; a reason that is not listed here is a difference."""
    answer, reason = row.messages[-1], refusal.reason
    if reason == "undesired_answer":
        assert row.values["label"] is False
    elif reason == "empty_answer":
        assert "tool_calls" not in answer
        assert not answer["content"].strip()
    elif reason == "template_refuses":
        with pytest.raises(TemplateRaises):
            oracle.render(row.messages, row.tools)
    elif reason == "template_drops_turn":
        text = oracle.render(row.messages, row.tools)
        said = any(is_missing(message, text) for message in row.messages)
        assert said or not oracle.writes_calls_and_tools(row.messages, row.tools), f"all is in the text: {refusal}"
    else:
        raise AssertionError(f"refused for a reason that the oracle cannot see: {refusal}")


def is_missing(message: Mapping[str, Any], text: str) -> bool:
    content = message["content"].strip()
    return content not in text and json.dumps(content, ensure_ascii=False)[1:-1] not in text


def example_is_true(row: RealRow, traced: TracedExample, oracle: Oracle, theirs: tuple[list[int], list[Span]]) -> None:
    messages, tools = row.messages, row.tools
    text = oracle.render(messages, tools)
    assert row.values.get("label", True) is True
    assert not any(is_missing(message, text) for message in messages), "a turn is missing and the row was taken"
    assert oracle.writes_calls_and_tools(messages, tools), "a call or a tool is missing and the row was taken"
    assert traced.text == text, first_difference(traced.text, text)
    answers = [number for number, message in enumerate(messages) if message["role"] == "assistant"]
    answers = answers[-1:] if "chosen" in row.values else answers  # only the chosen answer was judged
    spans = [oracle.turn_span(messages, tools, number, text) for number in answers]
    ours, expected = [text[a:b] for a, b in traced.spans], [text[a:b] for a, b in spans]
    assert ours == expected, f"supervised: {ours[-1]!r:.200} and {expected[-1]!r:.200}"
    assert [tuple(span) for span in traced.spans] == spans
    assert traced.supervised_text == "".join(expected)
    if said_control_texts(messages, tools, oracle):
        only_literals_differ(traced.example.ids.tolist(), theirs, row, oracle, text)
        return
    ids, offsets = theirs
    assert traced.example.ids.tolist() == ids, "other ids than apply_chat_template gives"
    learned = [any(start < b and end > a for a, b in spans) for start, end in offsets]
    unlike = [place for place, (a, b) in enumerate(zip(traced.example.learned, learned, strict=True)) if a != b]
    assert not unlike, [(place, ids[place], offsets[place], learned[place]) for place in unlike][:4]


def said_control_texts(messages: Messages, tools: Any, oracle: Oracle) -> int:
    """How many texts of control tokens the row's own words hold."""
    calls = [message["tool_calls"] for message in messages if "tool_calls" in message]
    words = [message["content"] for message in messages] + [json.dumps(each, ensure_ascii=False) for each in calls]
    if tools:
        words.append(json.dumps(tools, ensure_ascii=False))
    return sum(len(oracle.control_text.findall(word)) for word in words)


def only_literals_differ(
    ours: list[int], theirs: tuple[list[int], list[Span]], row: RealRow, oracle: Oracle, text: str
) -> None:
    """No control token comes from the row's own words, and what stands around those words has their ids."""
    ids, offsets = theirs
    said = literal_spans(row, oracle, text)
    control = set(oracle.tokenizer.get_added_vocab().values())
    written = len(oracle.control_text.findall(text))
    assert sum(each in control for each in ours) == written - len(said), "control tokens from the row's own words"
    before = sum(end <= said[0][0] for _, end in offsets)
    behind = sum(start >= said[-1][1] for start, _ in offsets)
    assert common(ours, ids) >= before - NEIGHBOURS, "other ids before these words"
    assert common(ours[::-1], ids[::-1]) >= behind - NEIGHBOURS, "other ids behind these words"


def literal_spans(row: RealRow, oracle: Oracle, text: str) -> list[Span]:
    """Where the row's own control texts stand: what changes when each gives way to a word of its length."""

    def blank(value: Any) -> Any:
        if isinstance(value, str):
            return oracle.control_text.sub(lambda match: "x" * len(match.group()), value)
        if isinstance(value, dict):
            return {key: blank(inner) for key, inner in value.items()}
        return [blank(inner) for inner in value] if isinstance(value, list) else value

    blanked = oracle.render(blank(row.messages), blank(row.tools))
    assert len(blanked) == len(text)
    return [m.span() for m in oracle.control_text.finditer(text) if blanked[m.start() : m.end()] != m.group()]


def common(one: Sequence[int], other: Sequence[int]) -> int:
    return next(
        (place for place, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other))
    )


def first_difference(one: str, other: str) -> str:
    place = next((i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))
    return f"texts part at {place}: {one[place - 30 : place + 60]!r} and {other[place - 30 : place + 60]!r}"


def compare(rows: Iterator[RealRow], base: Base, tokenizer: PreTrainedTokenizerBase, name: str) -> Tally:
    template, encoder = choose_template(name, base, date=DATE), Encoder(base)
    ours = (CHECKOUT / "finetune" / "data" / "templates" / f"{name}.jinja").read_text() if name != "auto" else None
    oracle, rules, tally = Oracle(tokenizer, ours), Rules("assistant", max_tokens=10**6), Tally()
    while some := list(islice(rows, 500)):
        taken = [row for row in some if isinstance(row.read, Conversation)]
        found = label([row.read for row in taken], template, encoder, rules)
        labelled = dict(zip((row.name for row in taken), found, strict=True))
        outcomes = [labelled.get(row.name, row.read) for row in some]
        accepted = [row for row, each in zip(some, outcomes, strict=True) if isinstance(each, TracedExample)]
        encodings = iter(oracle.encodings([(row.messages, row.tools) for row in accepted]))
        for row, outcome in zip(some, outcomes, strict=True):
            if isinstance(outcome, TracedExample):
                tally.counts["examples"] += 1
                tally.counts["with control texts"] += bool(said_control_texts(row.messages, row.tools, oracle))
                tally.check(row, example_is_true, outcome, oracle, next(encodings))
            else:
                tally.counts[outcome.reason] += 1
                tally.check(row, refusal_is_true, outcome, oracle)
    return tally


@pytest.mark.soak
@pytest.mark.parametrize(("tokenizer", "template"), COMBINATIONS)
def test_every_real_row(real_base, pocket, oracle, shared, tokenizer, template) -> None:
    base = pocket if tokenizer == "pocket" else real_base(tokenizer)
    tally = compare(real_rows(shared, every=True), base, oracle(tokenizer), template)
    assert tally.differences == []
    assert tally.counts["examples"] > 53_000


@pytest.mark.parametrize(("tokenizer", "template"), COMBINATIONS)
def test_a_sample_of_the_real_rows(real_base, pocket, oracle, shared, tokenizer, template) -> None:
    base = pocket if tokenizer == "pocket" else real_base(tokenizer)
    tally = compare(real_rows(shared, every=False), base, oracle(tokenizer), template)
    assert tally.differences == []
    assert tally.counts["examples"] > 200


@pytest.mark.parametrize(("tokenizer", "template"), [("llama2", "auto"), ("mistral", "auto"), ("pocket", "vicuna")])
def test_a_row_that_speaks_of_control_tokens(real_base, pocket, oracle, tokenizer, template) -> None:
    """No real row does."""
    base = pocket if tokenizer == "pocket" else real_base(tokenizer)
    rows = []
    for words in ("see </s> here", "a<s>b</s>c", "</s>", "first <s> and then </s> again"):
        values = {"instruction": f"Say {words} now.", "input": "", "output": f"Yes: {words}."}
        rows.append(
            RealRow(words, values, read_conversation(Row(values, "rows.jsonl", 1), format="alpaca", system=None))
        )
    tally = compare(iter(rows), base, oracle(tokenizer), template)
    assert tally.differences == []
    assert tally.counts == {"examples": 4, "with control texts": 4}
