"""Where answers stand: all templates against transformers, a table written by hand, and sentinels in a turn's place."""

from __future__ import annotations

import json
import lzma
import os
import random
from collections.abc import Callable, Iterator, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerBase

from finetune.data.rows import REASONS, ToolCall, Turn
from finetune.data.template import Template, TemplateProblem, parse_date
from tests.data.conftest import DATE

Talk = tuple[tuple[Turn, ...], tuple[dict[str, Any], ...]]
OURS = ("alpaca", "vicuna", "llama2", "llama3", "chatml", "mistral", "zephyr", "none")
REAL = ("llama2", "llama3.2-instruct", "mistral")
# By hand: what the model says before its text, what ends its turn, and whether its text is trimmed.
EDGES = {
    "alpaca": ("", "</s>", False),
    "vicuna": (" ", "</s>", False),
    "llama2": (" ", " </s>", True),
    "llama3": ("", "<|eot_id|>", True),
    "llama3.2-instruct": ("", "<|eot_id|>", True),
    "chatml": ("", "<|im_end|>", False),
    "mistral": (" ", "</s>", True),
    "zephyr": ("", "</s>", False),
    "none": ("", "</s>", False),
}
# Qwen3's way, shortened: thoughts of earlier answers are left out, the last answer always gets its pair of tags.
THINKING = (
    "{%- for m in messages %}{%- set text = m.content.split('</think>')[-1].lstrip('\n') if m.role == 'assistant' else "
    "m.content %}{{- '<|im_start|>' + m.role + '\n' }}{%- if m.role == 'assistant' and loop.last %}"
    "{{- '<think>\n' + (m.content.split('</think>')[0].split('<think>')[-1].strip('\n') if '</think>' in m.content "
    "else '') + '\n</think>\n\n' }}{%- endif %}{{- text + '<|im_end|>\n' }}{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' }}{%- endif %}"
)


def ours(name: str) -> Template:
    source = (Path("finetune/data/templates") / f"{name}.jinja").read_text()
    return Template(name, source, "<s>", "</s>", parse_date(DATE))


def own(source: str) -> Template:
    return Template("own", source, "<s>", "</s>", parse_date(DATE))


def talk(*texts: str, system: str | None = None) -> tuple[Turn, ...]:
    turns = [Turn("user" if index % 2 == 0 else "assistant", text) for index, text in enumerate(texts)]
    return (*([Turn("system", system)] if system is not None else []), *turns)


def spoken(template: Template, turns: Sequence[Turn], tools: Sequence[Any] = ()) -> list[str]:
    rendered = template.render(turns, tools=tools)
    return [rendered.text[start:end] for start, end in rendered.spans]


def reason_of(template: Template, turns: Sequence[Turn], tools: Sequence[Any] = ()) -> str:
    with pytest.raises(TemplateProblem) as caught:
        template.render(turns, tools=tools)
    assert caught.value.reason in REASONS
    assert str(caught.value).startswith(f"template {template.name}: ")
    assert "; " in str(caught.value)
    return caught.value.reason


# Real rows, read here without the package's own readers.


def alpaca_talk(row: dict[str, Any]) -> Talk:
    user = row["instruction"] + ("\n\n### Input:\n" + row["input"] if row["input"] else "")
    return talk(user, row["output"]), ()


def sharegpt_talk(row: dict[str, Any]) -> Talk:
    turns = [Turn("system", row["system"])] if row.get("system") else []
    for number, said in enumerate([*row["conversations"], *([row["chosen"]] if "chosen" in row else [])]):
        text = said["value"]
        if said["from"] == "function_call":
            call = json.loads(text)
            turns.append(
                Turn("assistant", "", tool_calls=(ToolCall(call["name"], call["arguments"], f"{number:09d}"),))
            )
        elif said["from"] == "observation":
            turns.append(Turn("tool", text, name=turns[-1].tool_calls[0].name, tool_call_id=turns[-1].tool_calls[0].id))
        else:
            turns.append(Turn({"human": "user", "gpt": "assistant", "system": "system"}[said["from"]], text))
    tools = json.loads(row["tools"]) if row.get("tools") else []
    return tuple(turns), tuple({"type": "function", "function": tool} for tool in tools)


def messages_talk(row: dict[str, Any]) -> Talk:
    return tuple(Turn(message["role"], message["content"]) for message in row["messages"]), ()


def seed_talk(row: dict[str, Any]) -> Talk:
    return alpaca_talk({"instruction": row["instruction"], **row["instances"][0]})


READ: dict[str, Callable[[dict[str, Any]], Talk]] = {
    "alpaca/alpaca_data.json.xz": alpaca_talk,
    "alpaca/alpaca_en_demo.json": alpaca_talk,
    "chat/openai_messages_fr.jsonl": messages_talk,
    "chat/sharegpt_with_system.json": sharegpt_talk,
    "chat/toolcall_sharegpt.json": sharegpt_talk,
    "preference/dpo_en_demo.json": sharegpt_talk,
    "preference/kto_en_demo.json": messages_talk,
    "questions/self_instruct_seed_tasks.jsonl": seed_talk,
}


def rows_of(file: Path) -> list[dict[str, Any]]:
    raw = lzma.decompress(file.read_bytes()) if file.suffix == ".xz" else file.read_bytes()
    return json.loads(raw) if ".json" in file.suffixes else [json.loads(line) for line in raw.splitlines()]


def talks_of(shared: Path, file: str, *, sample: int | None) -> Iterator[Talk]:
    rows = rows_of(shared / file)
    chosen = rows if sample is None else random.Random(5).sample(rows, min(sample, len(rows)))
    for row in chosen:
        turns, tools = READ[file](row)
        if turns[-1].role == "assistant":
            yield turns, tools


def their_messages(turns: Sequence[Turn]) -> list[dict[str, Any]]:
    return [
        {
            "role": turn.role,
            "content": turn.text,
            "tool_calls": [
                {"id": call.id, "type": "function", "function": {"name": call.name, "arguments": call.arguments}}
                for call in turn.tool_calls
            ]
            or None,
            "tool_call_id": turn.tool_call_id,
            "name": turn.name,
        }
        for turn in turns
    ]


def their_text(tokenizer: PreTrainedTokenizerBase, turns: Sequence[Turn], tools: Sequence[Any], **more: Any) -> str:
    text = tokenizer.apply_chat_template(their_messages(turns), tools=list(tools) or None, tokenize=False, **more)
    return str(text).replace(f"Today Date: {datetime.now():%d %b %Y}", f"Today Date: {DATE}")


def check_against_transformers(template: Template, tokenizer: PreTrainedTokenizerBase, whole: Talk) -> str:
    """The outcome of one row, after its text and spans are compared with what transformers and the table say."""
    turns, tools = whole
    try:
        rendered = template.render(turns, tools=tools)
    except TemplateProblem as problem:
        if problem.reason == "template_refuses":
            with pytest.raises(Exception, match="."):
                their_text(tokenizer, turns, tools)
        return problem.reason
    assert rendered.text == their_text(tokenizer, turns, tools)
    lead, closing, trims = EDGES[template.name]
    answers = [turn for turn in turns if turn.role == "assistant"]
    for turn, (start, end) in zip(answers, rendered.spans, strict=True):
        said = rendered.text[start:end]
        if turn.tool_calls:
            assert json.dumps(turn.tool_calls[0].arguments, ensure_ascii=False) in said
            assert said.endswith(closing.strip())
            assert said.startswith(("{", "[TOOL_CALLS]", "<tool_call>"))
        else:
            assert said == lead + (turn.text.strip() if trims else turn.text) + closing
    last = max(index for index, turn in enumerate(turns) if turn.role == "assistant")
    if not tools:
        prompt = their_text(tokenizer, turns[:last], tools, add_generation_prompt=True)
        assert rendered.text[: rendered.spans[-1][0]] == prompt
    return "rendered"


def tokenizer_with(tokenizer: PreTrainedTokenizerBase, template: Template) -> PreTrainedTokenizerBase:
    tokenizer.chat_template = template.source
    return tokenizer


@pytest.mark.real
@pytest.mark.parametrize("name", REAL)
@pytest.mark.parametrize("file", READ)
def test_a_bases_own_template_on_real_rows(
    shared: Path, oracle: Callable[[str], PreTrainedTokenizerBase], name: str, file: str
) -> None:
    tokenizer = oracle(name)
    template = Template(name, tokenizer.chat_template, tokenizer.bos_token, tokenizer.eos_token, parse_date(DATE))
    talks = list(talks_of(shared, file, sample=15))
    for turns, tools in talks:
        outcome = check_against_transformers(template, tokenizer, (turns, tools))
        if tools:  # Llama 2's knows none; the others put them somewhere, but not into every conversation
            assert outcome in ("rendered", "template_drops_turn", "template_refuses")
        else:
            drops = name == "mistral" and turns[0].role == "system"
            assert outcome == ("template_drops_turn" if drops else "rendered")


@pytest.mark.real
@pytest.mark.parametrize("name", OURS)
def test_our_templates_on_real_rows(
    shared: Path, oracle: Callable[[str], PreTrainedTokenizerBase], name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    template, tokenizer = ours(name), oracle("pocket")
    monkeypatch.setattr(tokenizer, "chat_template", template.source)
    for file in READ:
        for whole in talks_of(shared, file, sample=6):
            outcome = check_against_transformers(template, tokenizer, whole)
            takes_tools = name in ("llama3", "chatml", "mistral")
            assert outcome == "rendered" or (whole[1] and not takes_tools), (file, outcome)


@pytest.mark.soak
@pytest.mark.real
@pytest.mark.parametrize("name", [*REAL, *OURS])
def test_every_template_on_every_real_row(
    shared: Path, oracle: Callable[[str], PreTrainedTokenizerBase], name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if name in REAL:
        tokenizer = oracle(name)
        template = Template(name, tokenizer.chat_template, tokenizer.bos_token, tokenizer.eos_token, parse_date(DATE))
    else:
        template, tokenizer = ours(name), oracle("pocket")
        monkeypatch.setattr(tokenizer, "chat_template", template.source)
    for file in READ:
        outcomes = [
            check_against_transformers(template, tokenizer, whole) for whole in talks_of(shared, file, sample=None)
        ]
        assert "template_unproven" not in outcomes


# The second oracle: put two different texts into a turn, and see what of the whole moves.


def moving_part(template: Template, turns: Sequence[Turn], index: int, tools: Sequence[Any]) -> tuple[str, int, int]:
    """The text with one sentinel in a turn, and the range that another sentinel changes."""
    texts = []
    for sentinel in ("\u2e28one", "\u2e29two"):
        changed = Turn(turns[index].role, sentinel)
        texts.append(
            template.text([*turns[:index], changed, *turns[index + 1 :]], add_generation_prompt=False, tools=tools)
        )
    start = len(os.path.commonprefix(texts))
    behind = len(os.path.commonprefix([text[::-1] for text in texts]))
    return texts[0], start, len(texts[0]) - behind


def assert_spans_hold_sentinels(template: Template, turns: Sequence[Turn], tools: Sequence[Any] = ()) -> None:
    lead, closing, _ = EDGES[template.name]
    answers = [index for index, turn in enumerate(turns) if turn.role == "assistant"]
    for place, index in enumerate(answers):
        if turns[index].tool_calls:
            continue
        text, start, end = moving_part(template, turns, index, tools)
        changed = [*turns[:index], Turn("assistant", "\u2e28one"), *turns[index + 1 :]]
        rendered = template.render(changed, tools=tools)
        assert rendered.text == text
        assert rendered.spans[place] == (start - len(lead), end + len(closing))


ADVERSARIAL = st.one_of(
    st.sampled_from(
        [
            "</s>", "<s>", "[/INST] x", "<|eot_id|>", "<|im_end|>\n<|im_start|>assistant\n", "### Response:\nno",
            "USER: a ASSISTANT: b</s>", "👍🏽", "שלום עולם", "</think>x", "<|eot_", "assistant", "A", "a" * 3000, "\n",
        ]
    ),
    st.text(st.characters(exclude_categories=["Cs", "Co"]), min_size=1, max_size=30),
)  # fmt: skip


@settings(max_examples=40, deadline=None)
@given(texts=st.lists(ADVERSARIAL, min_size=2, max_size=6), system=st.none() | ADVERSARIAL, name=st.sampled_from(OURS))
def test_spans_are_what_moves_whatever_the_turns_say(texts: list[str], system: str | None, name: str) -> None:
    turns = talk(*texts[: len(texts) // 2 * 2], system=system)
    template = ours(name)
    assert_spans_hold_sentinels(template, turns)
    lead, closing, trims = EDGES[name]
    expected = [
        lead + (turn.text.strip() if trims else turn.text) + closing for turn in turns if turn.role == "assistant"
    ]
    assert spoken(template, turns) == expected


@pytest.mark.parametrize("name", OURS)
def test_a_very_long_turn_and_an_empty_one(name: str) -> None:
    lead, closing, trims = EDGES[name]
    long = "word " * 20_000
    assert spoken(ours(name), talk(long, "yes", long, long)) == [
        f"{lead}yes{closing}",
        lead + (long.strip() if trims else long) + closing,
    ]
    empty = spoken(ours(name), talk("Hi", "", "Hi", "x"))
    assert empty[0].split() == [closing.strip()]


@pytest.mark.real
@pytest.mark.parametrize("name", ["mistral", "llama3", "chatml"])
def test_calls_are_learned_and_tool_results_are_not(
    oracle: Callable[[str], PreTrainedTokenizerBase], name: str
) -> None:
    call = ToolCall("weather", {"town": "Köln"}, "abcdef123")
    turns = (
        Turn("user", "Weather?"),
        Turn("assistant", "", tool_calls=(call,)),
        Turn("tool", '"rain"', name="weather", tool_call_id=call.id),
        Turn("assistant", "Rain."),
        Turn("user", "Thanks"),
        Turn("assistant", "Bye."),
    )
    tools = ({"type": "function", "function": {"name": "weather", "description": "Says it.", "parameters": {}}},)
    wanted = {
        "mistral": '[TOOL_CALLS] [{"name": "weather", "arguments": {"town": "Köln"}, "id": "abcdef123"}]</s>',
        "llama3": '{"name": "weather", "parameters": {"town": "Köln"}}<|eot_id|>',
        "chatml": '<tool_call>\n{"name": "weather", "arguments": {"town": "Köln"}}\n</tool_call><|im_end|>',
    }[name]
    templates = [ours(name)]
    if name == "mistral":
        # The published one writes the tools before the last user turn only: its beginnings change.
        templates.append(Template(name, oracle(name).chat_template, "<s>", "</s>", parse_date(DATE)))
    lead, closing, _ = EDGES[name]
    for template in templates:
        assert spoken(template, turns, tools) == [wanted, f"{lead}Rain.{closing}", f"{lead}Bye.{closing}"]
        assert_spans_hold_sentinels(template, turns, tools)


# Templates that rewrite, drop, or do not ask.


def test_earlier_answers_of_a_thinking_template_end_where_they_end() -> None:
    assert spoken(own(THINKING), talk("Hi", "Hello", "More", "Yes")) == [
        "Hello<|im_end|>",
        "<think>\n\n</think>\n\nYes<|im_end|>",
    ]


def test_an_earlier_thought_that_is_left_out_is_told() -> None:
    assert spoken(own(THINKING), talk("Hi", "<think>\na\n</think>\n\nHello")) == [
        "<think>\na\n</think>\n\nHello<|im_end|>"
    ]
    turns = talk("Hi", "<think>\na\n</think>\n\nHello", "More", "Yes")
    assert reason_of(own(THINKING), turns) == "template_drops_turn"


@pytest.mark.real
def test_mistral_drops_a_system_turn(oracle: Callable[[str], PreTrainedTokenizerBase]) -> None:
    template = Template("mistral", oracle("mistral").chat_template, "<s>", "</s>", parse_date(DATE))
    with pytest.raises(TemplateProblem, match=r"turn 1 \(system\): .*leaves out 'Be brief.'.*data.drop") as caught:
        template.render(talk("Hi", "Hello", system="Be brief."))
    assert caught.value.reason == "template_drops_turn"
    # Also where the same words stand elsewhere, so that looking for them alone would find them.
    assert reason_of(template, talk("Be brief.", "Hello", system="Be brief.")) == "template_drops_turn"
    assert reason_of(template, talk("Hi", "Hello", system="H")) == "template_drops_turn"


@pytest.mark.parametrize(
    ("source", "reason"),
    [
        ("{% for m in messages %}{{ m.role + ': ' + m.content + eos_token }}{% endfor %}", "template_unproven"),
        (
            "{% for m in messages %}{{ m.content + eos_token }}{% endfor %}"
            "{% if add_generation_prompt %}<think>{% endif %}",
            "template_unproven",
        ),
        (
            "{{ messages | length }}{% for m in messages %}"
            "{{ '(' + m.content + ')' + (eos_token if loop.last else '') }}{% endfor %}",
            "template_unproven",
        ),
        ("{% for m in messages[:-1] %}{{ m.content }}{% endfor %}", "template_drops_turn"),
        ("{% for m in messages %}{{ m.content[:2] }}{% endfor %}", "template_drops_turn"),
        ("{{ messages[0].content / 2 }}", "template_refuses"),
        ("{{ messages[9].content }}", "template_refuses"),
        ("{% for m in messages %}{{ [m.content, 'x'] | random }}{% endfor %}", "template_refuses"),
        ("{{ now() }}", "template_refuses"),
        ("{{ datetime.now() }}", "template_refuses"),
        ("{% set ns = namespace(_x=1) %}", "template_refuses"),
        ("{% macro again(x) %}{{ again(x) }}{{ again(x) }}{% endmacro %}{{ again(1) }}", "template_refuses"),
    ],
)
def test_what_cannot_be_proven_is_refused(source: str, reason: str) -> None:
    assert reason_of(own(source), talk("Hello you", "Good day", "Again please", "No thanks")) == reason


@pytest.mark.parametrize(
    ("source", "texts", "why"),
    [
        (
            "{% for m in messages %}{{ '[' + ('me' if loop.last else m.role) + ']' + m.content + eos_token }}"
            "{% endfor %}{% if add_generation_prompt %}[me]{% endif %}",
            ("Hi", "Hello", "More", "Yes"),
            "what the template writes before it changes with what follows",
        ),
        (
            "{% for m in messages %}{{ m.content + ('!</s>' if loop.last else '</s>') }}{% endfor %}",
            ("Hi", "Hello", "More", "Yes"),
            "what the template writes before it changes with what follows|after it changes with what follows",
        ),
        (
            "{% for m in messages %}{{ m.content }}{{ '!' if loop.last and m.role == 'assistant' }}{% endfor %}",
            ("Hi", "Hello", "More", "Yes"),
            "what the template writes after it changes with what follows",
        ),
        (
            "{% for m in messages %}{{ m.content + eos_token }}{% endfor %}{% if add_generation_prompt %}A:{% endif %}",
            ("Hi", "A: yes"),
            "'A: yes' does not stand where the answer is asked for",
        ),
        (
            "{{ '?' if messages[-1].role == 'user' }}"
            "{% for m in messages %}{{ ('!' if m.content.startswith('H') else '') + m.content + eos_token }}"
            "{% endfor %}",
            ("Hi", "Hello", "More", "Yes"),
            "changes when the turns are marked",
        ),
    ],
)
def test_each_step_of_the_proof_can_fail(source: str, texts: tuple[str, ...], why: str) -> None:
    with pytest.raises(TemplateProblem, match=why) as caught:
        own(source).render(talk(*texts))
    assert caught.value.reason == "template_unproven"


TOOL = {"type": "function", "function": {"name": "weather", "description": "Says it.", "parameters": {}}}


def test_a_template_that_leaves_out_the_tools_is_told() -> None:
    plain = own("{% for m in messages %}{{ m.content + eos_token }}{% endfor %}")
    for asked in ("Hi", "Is weather a word?"):
        with pytest.raises(TemplateProblem, match="leaves out the tool 'weather'") as caught:
            plain.render(talk(asked, "Yes"), tools=(TOOL,))
        assert caught.value.reason == "template_drops_turn"


@pytest.mark.real
def test_users_who_say_the_same_twice_and_tools_before_the_last(
    oracle: Callable[[str], PreTrainedTokenizerBase],
) -> None:
    """Mistral's template compares messages to find the last user turn, so marks must not make equal ones unequal."""
    template = Template("mistral", oracle("mistral").chat_template, "<s>", "</s>", parse_date(DATE))
    turns = talk("First?", "No.", "Again?", "One.", "Again?", "Two.")
    assert spoken(template, turns, (TOOL,)) == [" No.</s>", " One.</s>", " Two.</s>"]
    assert template.render(turns, tools=(TOOL,)).text.count("[AVAILABLE_TOOLS]") == 2


def test_an_endless_template_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("finetune.data.sandbox.MOST_ROUNDS", 20_000)
    monkeypatch.setattr("finetune.data.sandbox.MOST_CHARACTERS", 200_000)
    loops = "{% for a in range(9999) %}{% for b in range(9999) %}{% set c = 1 %}{% endfor %}{% endfor %}"
    with pytest.raises(TemplateProblem, match="goes round its loops more than 20000 times"):
        own(loops).text(talk("x"), add_generation_prompt=True)
    with pytest.raises(TemplateProblem, match="writes more than 200000 characters"):
        own("{% for a in range(9999) %}{{ messages[0].content }}{% endfor %}").text(
            talk("x" * 1000), add_generation_prompt=True
        )
    tree = "{% macro twice(n) %}{% if n %}{{ twice(n - 1) }}{{ twice(n - 1) }}{% endif %}{% endmacro %}{{ twice(15) }}"
    with pytest.raises(TemplateProblem, match="goes round its loops more than 20000 times"):
        own(tree).text(talk("x"), add_generation_prompt=True)
    # The count is of one conversation, not of all.
    plain = own("{% for m in messages %}{{ m.content }}{% endfor %}")
    for _ in range(300):
        plain.text(talk(*"x" * 100), add_generation_prompt=True)


def test_the_generation_tag_changes_nothing() -> None:
    tagged = (
        "{% for m in messages %}{% if m.role == 'assistant' %}{% generation %}{{ m.content + eos_token }}"
        "{% endgeneration %}{% else %}{{ '[' + m.content + ']' }}{% endif %}{% endfor %}"
    )
    assert spoken(own(tagged), talk("Hi", "Hello", "More", "Yes")) == ["Hello</s>", "Yes</s>"]


def test_an_answer_to_nothing_is_refused_where_the_template_cannot_ask_for_it() -> None:
    turns = (Turn("assistant", "Hello"), *talk("Hi", "Yes"))
    assert reason_of(ours("llama3"), turns) == "template_unproven"
    assert spoken(ours("none"), turns) == ["Hello</s>", "Yes</s>"]


def test_a_call_nested_without_end_is_refused() -> None:
    arguments: dict[str, Any] = {}
    for _ in range(3000):
        arguments = {"in": arguments}
    turns = (Turn("user", "Hi"), Turn("assistant", "", tool_calls=(ToolCall("dig", arguments, "abcdef123"),)))
    for source in ("{{ messages[0].content }} dig", "{{ messages | tojson }}"):
        assert reason_of(own(source), turns) == "template_refuses"


def test_a_conversation_that_would_take_minutes_is_refused() -> None:
    assert reason_of(ours("none"), talk(*["x"] * 2002)) == "template_unproven"
    assert len(spoken(ours("none"), talk(*["x"] * 100))) == 50


def test_equal_turns_are_told_apart() -> None:
    for name in OURS:
        lead, closing, _ = EDGES[name]
        assert spoken(ours(name), talk("yes", "yes", "yes", "yes")) == [f"{lead}yes{closing}"] * 2
    assert spoken(own(THINKING), talk("yes", "yes", "yes", "yes"))[0] == "yes<|im_end|>"


def test_the_answers_own_white_space_is_not_cut() -> None:
    open_ended = own("{% for m in messages %}{{ m.content }}{% endfor %}")
    assert spoken(open_ended, talk("Hi", "Hello \n")) == ["Hello \n"]


# A row's own text is text.


def literal_texts(template: Template, turns: Sequence[Turn], controls: Sequence[str], **more: Any) -> list[str]:
    rendered = template.render(turns, control_texts=controls, **more)
    plain = template.render(turns, **more)
    assert (rendered.text, rendered.spans) == (plain.text, plain.spans)
    return [rendered.text[start:end] for start, end in rendered.literals]


CONTROLS = ("<s>", "</s>", "<|eot_id|>", "<|start_header_id|>", "<|end_header_id|>", "[INST]", "[/INST]")


@pytest.mark.parametrize("name", ["llama3", "mistral", "chatml", "none", "alpaca"])
def test_a_control_token_in_a_row_is_marked_and_the_templates_own_is_not(name: str) -> None:
    turns = talk(" </s> and <|eot_id|>[INST]", "No</s>", "a < b > c", "x")
    assert literal_texts(ours(name), turns, CONTROLS) == ["</s>", "<|eot_id|>", "[INST]", "</s>"]
    assert literal_texts(ours(name), talk("a < b", "> c"), CONTROLS) == []
    assert ours(name).render(turns).literals == ()


def test_a_control_token_that_rendering_puts_together_is_marked() -> None:
    assert literal_texts(ours("none"), talk("<|eot_", "id|>"), CONTROLS) == ["<|eot_id|>"]
    assert literal_texts(ours("none"), talk("a </", "s> b"), CONTROLS) == ["</s>"]
    bracket = own("{% for m in messages %}{{ '<|' + (m.content | trim) + '|>' + eos_token }}{% endfor %}")
    assert bracket.render_prompt(talk(" eot_id "), control_texts=CONTROLS).literals == ((0, 10),)
    closing = own("{% for m in messages %}{{ '</' + m.content }}{% endfor %}")
    assert closing.render_prompt(talk("s> b"), control_texts=CONTROLS).literals == ((0, 4),)
    joined = own("{% for m in messages %}{{ m.content | trim + 'id|>' }}{% endfor %}")
    assert joined.render_prompt(talk("x<|eot_ \n"), control_texts=CONTROLS).literals == ((1, 11),)


def test_calls_results_and_tools_are_text_too() -> None:
    call = ToolCall("look", {"where": ["</s>", {"<s>": "x"}]}, "abcdef123")
    turns = (
        Turn("user", "Hi"),
        Turn("assistant", "", tool_calls=(call,)),
        Turn("tool", "[INST]", name="look", tool_call_id=call.id),
        Turn("assistant", "Ok"),
    )
    tools = ({"type": "function", "function": {"name": "look", "description": "[/INST] see"}},)
    assert literal_texts(ours("mistral"), turns, CONTROLS, tools=tools) == ["[/INST]", "</s>", "<s>", "[INST]"]


def test_private_characters_beside_control_tokens_are_refused() -> None:
    assert literal_texts(ours("alpaca"), talk("\U00100000", "x"), CONTROLS) == []
    with pytest.raises(TemplateProblem, match="private-use") as caught:
        ours("alpaca").render(talk("\U00100000 </s>", "x"), control_texts=CONTROLS)
    assert caught.value.reason == "private_characters"


def test_a_template_that_looks_at_a_control_token_in_a_turn_is_refused() -> None:
    nosy = own("{% for m in messages %}{{ ('!' if '</s>' in m.content else '') + m.content + eos_token }}{% endfor %}")
    with pytest.raises(TemplateProblem) as caught:
        nosy.render_prompt(talk("a</s>"), control_texts=CONTROLS)
    assert caught.value.reason == "template_unproven"


@settings(max_examples=60, deadline=None)
@given(
    texts=st.lists(
        st.lists(
            st.sampled_from(["<", "/", "s", ">", "<|", "eot_id", "|>", "[INST", "]", " ", "a", "</s>"]), max_size=6
        ),
        min_size=2,
        max_size=4,
    ),
    name=st.sampled_from(["llama3", "mistral", "none", "llama2", "alpaca"]),
)
def test_template_tokens_left_are_those_of_a_harmless_row(texts: list[list[str]], name: str) -> None:
    """Without the marked ranges, the control tokens are exactly those that the template writes for other words."""
    turns = talk(*("".join(pieces) or "q" for pieces in texts[: len(texts) // 2 * 2]))
    turns = tuple(Turn(turn.role, turn.text if turn.text.strip() else "q") for turn in turns)
    harmless = tuple(Turn(turn.role, "q") for turn in turns)
    rendered = ours(name).render(turns, control_texts=CONTROLS)
    left = list(rendered.text)
    for start, end in rendered.literals:
        left[start:end] = "\0" * (end - start)
    assert controls_in("".join(left)) == controls_in(ours(name).render(harmless).text)


def controls_in(text: str) -> list[str]:
    """Control tokens from left to right, the longest first, written out as a plain loop."""
    found, place = [], 0
    while place < len(text):
        here = [control for control in CONTROLS if text.startswith(control, place)]
        found += here[:1]
        place += len(here[0]) if here else 1
    return found
