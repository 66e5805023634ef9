"""What templates write: the Alpaca prompt to the letter, the bases' own as transformers renders them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from datetime import datetime
from pathlib import Path
from types import SimpleNamespace

import pytest
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from finetune.base import Base
from finetune.data.rows import ToolCall, Turn
from finetune.data.template import Template, TemplateProblem, choose_template, parse_date
from finetune.errors import UserError
from tests.data.conftest import DATE

# Stanford Alpaca, train.py, PROMPT_DICT, copied by hand.
NO_INPUT = (
    "Below is an instruction that describes a task. "
    "Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Response:\n"
)
WITH_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides further context. "
    "Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:\n"
)
CHATML = (
    "{%- for message in messages %}"
    "{{ '<s>' + message['role'] + '\\n' + message['content'] + eos_token + '\\n' }}"
    "{%- endfor %}{%- if add_generation_prompt %}{{ '<s>assistant\\n' }}{%- endif %}"
)


def talk(*texts: str, system: str | None = None) -> tuple[Turn, ...]:
    turns = [Turn("user" if index % 2 == 0 else "assistant", text) for index, text in enumerate(texts)]
    return (*([Turn("system", system)] if system is not None else []), *turns)


def text_of(template: Template, *texts: str, system: str | None = None) -> str:
    return template.render(talk(*texts, system=system)).text


def test_alpaca_without_input_is_the_published_prompt(alpaca: Template) -> None:
    expected = "<s>" + NO_INPUT.format(instruction="Name a colour.") + "Red.</s>"
    assert text_of(alpaca, "Name a colour.", "Red.") == expected


def test_alpaca_with_input_is_the_published_prompt(alpaca: Template) -> None:
    expected = "<s>" + WITH_INPUT.format(instruction="Translate.", input="Haus") + "house</s>"
    assert text_of(alpaca, "Translate.\n\n### Input:\nHaus", "house") == expected


def test_a_system_turn_takes_the_place_of_the_preamble(alpaca: Template) -> None:
    expected = "<s>Be brief.\n\n### Instruction:\nHi\n\n### Response:\nHello</s>"
    assert text_of(alpaca, "Hi", "Hello", system="Be brief.") == expected


def test_later_rounds_repeat_the_two_headings(alpaca: Template) -> None:
    first = "<s>" + NO_INPUT.format(instruction="Hi") + "Hello</s>"
    second = "\n\n### Instruction:\nAgain\n\n### Response:\nYes</s>"
    assert text_of(alpaca, "Hi", "Hello", "Again", "Yes") == first + second


def test_the_prompt_is_the_beginning_of_the_training_text(alpaca: Template) -> None:
    prompt = alpaca.text([Turn("user", "Hi")], add_generation_prompt=True)
    assert prompt == "<s>" + NO_INPUT.format(instruction="Hi")


def test_none_writes_the_turns_one_after_the_other(pocket: Base) -> None:
    assert text_of(choose_template("none", pocket, date=DATE), "Once upon", " a time.") == "<s>Once upon a time.</s>"


@pytest.mark.parametrize("turns", [("Hi", "Hello"), ("Hi", "Hello", "More\n\n### Input:\nx", " yes ")])
@pytest.mark.parametrize("system", [None, "Be brief."])
def test_an_installed_alpaca_template_renders_the_same_in_transformers(
    pocket: Base, alpaca: Template, turns: tuple[str, ...], system: str | None
) -> None:
    tokenizer = AutoTokenizer.from_pretrained(pocket.facts.folder)
    tokenizer.chat_template = alpaca.source
    whole = talk(*turns, system=system)
    messages = [{"role": turn.role, "content": turn.text} for turn in whole]
    assert alpaca.render(whole).text == tokenizer.apply_chat_template(messages, tokenize=False)
    prompt = tokenizer.apply_chat_template(messages[:-1], tokenize=False, add_generation_prompt=True)
    assert alpaca.text(whole[:-1], add_generation_prompt=True) == prompt


@pytest.mark.real
@pytest.mark.parametrize("name", ["mistral", "llama2", "llama3.2-instruct"])
@pytest.mark.parametrize(
    ("turns", "system"),
    [(("Hi", "Hello"), None), (("Hi ", " Hello\n"), "Be brief."), (("Hi", "Hello", "Straße?", "Ja 👍"), None)],
    ids=["plain", "system", "rounds"],
)
def test_a_bases_own_template_renders_as_in_transformers(
    real_base: Callable[[str], Base],
    oracle: Callable[[str], PreTrainedTokenizerBase],
    name: str,
    turns: tuple[str, ...],
    system: str | None,
) -> None:
    base = real_base(name)
    template = choose_template("auto", base, date=DATE)
    tokenizer = oracle(name)
    whole = talk(*turns, system=system)
    messages = [{"role": turn.role, "content": turn.text} for turn in whole]
    theirs = tokenizer.apply_chat_template(messages, tokenize=False).replace(f"{datetime.now():%d %b %Y}", DATE)
    assert template.text(whole, add_generation_prompt=False) == theirs
    if name == "llama3.2-instruct":
        assert f"Today Date: {DATE}\n" in theirs


@pytest.mark.real
def test_the_date_of_the_recipe_is_what_a_template_is_told(real_base: Callable[[str], Base]) -> None:
    base = real_base("llama3.2-instruct")
    template = choose_template("auto", base, date="2019-02-03")
    assert "Today Date: 03 Feb 2019\n" in text_of(template, "Hi", "Hello")


def test_what_only_separates_turns_is_not_learned(pocket: Base, tmp_path: Path) -> None:
    file = tmp_path / "chatml.jinja"
    file.write_text(CHATML)
    rendered = choose_template(str(file), pocket, date=DATE).render(talk("Hi", "Hello", "More", "Yes"))
    assert [rendered.text[start:end] for start, end in rendered.spans] == ["Hello</s>", "Yes</s>"]
    assert rendered.text.endswith("Yes</s>\n")


def test_a_token_the_tokenizer_lacks_is_not_written_as_none(alpaca: Template) -> None:
    none = Template("none", "{{ bos_token }}{{ messages[0]['content'] }}", None, None, alpaca.date)
    assert none.text([Turn("user", "Hi")], add_generation_prompt=True) == "Hi"
    with pytest.raises(TemplateProblem, match="eos_token"):
        Template("alpaca", alpaca.source, None, None, alpaca.date).render(talk("Hi", "Hello"))


@pytest.mark.parametrize(
    ("source", "said"),
    [
        ("{% if %}", "does not render one user turn: Expected an expression"),
        ("{{ messages[0] + 1 }}", "does not render one user turn: unsupported operand"),
        ("{{ raise_exception('no') }}", "does not render one user turn: no"),
        (b"\xff\xfe", "is not UTF-8 text at byte 0"),
        (None, "no such file"),
    ],
    ids=["syntax", "type", "refuses", "bytes", "missing"],
)
def test_a_bad_template_file_is_told(pocket: Base, tmp_path: Path, source: str | bytes | None, said: str) -> None:
    file = tmp_path / "own.jinja"
    if source is not None:
        file.write_bytes(source if isinstance(source, bytes) else source.encode())
    with pytest.raises(UserError, match=said):
        choose_template(str(file), pocket, date=DATE)


def test_a_bad_date_is_told(pocket: Base) -> None:
    with pytest.raises(UserError, match="data.date: not a date: '26.7.2024'; write it as"):
        choose_template("auto", pocket, date="26.7.2024")


# The published formats, copied by hand: a system turn, two rounds.
PUBLISHED = {
    "vicuna": "<s>Be brief. USER: Hi ASSISTANT: Hello</s>USER: More ASSISTANT: Yes</s>",
    "llama2": "<s>[INST] <<SYS>>\nBe brief.\n<</SYS>>\n\nHi [/INST] Hello </s><s>[INST] More [/INST] Yes </s>",
    "llama3": "<s><|start_header_id|>system<|end_header_id|>\n\nBe brief.<|eot_id|>"
    "<|start_header_id|>user<|end_header_id|>\n\nHi<|eot_id|>"
    "<|start_header_id|>assistant<|end_header_id|>\n\nHello<|eot_id|>"
    "<|start_header_id|>user<|end_header_id|>\n\nMore<|eot_id|>"
    "<|start_header_id|>assistant<|end_header_id|>\n\nYes<|eot_id|>",
    "chatml": "<s><|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n"
    "<|im_start|>assistant\nHello<|im_end|>\n<|im_start|>user\nMore<|im_end|>\n<|im_start|>assistant\nYes<|im_end|>\n",
    "mistral": "<s>[INST] Be brief.\n\nHi[/INST] Hello</s>[INST] More[/INST] Yes</s>",
    "zephyr": "<s><|system|>\nBe brief.</s>\n<|user|>\nHi</s>\n<|assistant|>\nHello</s>\n"
    "<|user|>\nMore</s>\n<|assistant|>\nYes</s>\n",
    "none": "<s>Be brief.HiHello</s>MoreYes</s>",
}


def named(name: str) -> Template:
    source = (Path("finetune/data/templates") / f"{name}.jinja").read_text()
    return Template(name, source, "<s>", "</s>", parse_date(DATE))


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_named_template_writes_the_published_format(name: str) -> None:
    assert text_of(named(name), "Hi", "Hello", "More", "Yes", system="Be brief.") == PUBLISHED[name]


def test_vicuna_opens_with_its_own_sentence() -> None:
    opening = "A chat between a curious user and an artificial intelligence assistant. "
    opening += "The assistant gives helpful, detailed, and polite answers to the user's questions. "
    assert text_of(named("vicuna"), "Hi", "Hello") == f"<s>{opening}USER: Hi ASSISTANT: Hello</s>"


@pytest.mark.parametrize("name", [*PUBLISHED, "alpaca"])
def test_a_named_templates_prompt_is_the_beginning_of_its_training_text(name: str) -> None:
    template, turns = named(name), talk("Hi", "Hello", "More", "Yes")
    prompt = template.render_prompt(turns[:3])
    assert template.render(turns).text.startswith(prompt.text)
    assert prompt.spans == ()


@pytest.mark.parametrize("name", ["alpaca", "vicuna", "llama2", "zephyr"])
def test_a_template_without_tools_says_so(name: str) -> None:
    call = ToolCall("look", {}, "abcdef123")
    calling = (Turn("user", "Hi"), Turn("assistant", "", tool_calls=(call,)))
    tool = {"type": "function", "function": {"name": "look"}}
    for turns, tools in ((calling, ()), (talk("Hi", "Hello"), (tool,))):
        with pytest.raises(TemplateProblem, match="has no way to write tool.*use llama3, chatml or mistral"):
            named(name).render(turns, tools=tools)
    with pytest.raises(TemplateProblem, match="knows a system turn at the start.*got tool"):
        named(name).render((Turn("user", "Hi"), Turn("tool", "4"), Turn("assistant", "x")))


def test_a_template_is_refused_where_the_tokenizer_lacks_its_tokens(pocket: Base) -> None:
    with pytest.raises(
        UserError, match=r"chatml writes control tokens .* <\|im_start\|>, <\|im_end\|>; templates that"
    ):
        choose_template("chatml", pocket, date=DATE)
    with pytest.raises(
        UserError, match="work with it: alpaca, llama2, mistral, none, vicuna, zephyr, or a .jinja file"
    ):
        choose_template("llama3", pocket, date=DATE)
    for name in ("alpaca", "llama2", "mistral", "none", "vicuna", "zephyr"):
        assert choose_template(name, pocket, date=DATE).name == name
    without = replace(pocket, eos_token=None, chat_template=None)
    for name in ("alpaca", "auto", "zephyr"):
        with pytest.raises(UserError, match=r"eos_token \(it names none\); templates that work with it: none of ours"):
            choose_template(name, without, date=DATE)


@pytest.mark.real
def test_every_named_template_of_a_llama_3_base(real_base: Callable[[str], Base]) -> None:
    base = real_base("llama3.2-instruct")
    assert text_of(choose_template("llama3", base, date=DATE), "Hi", "Hello").startswith(
        "<|begin_of_text|><|start_head"
    )
    assert text_of(choose_template("zephyr", base, date=DATE), "Hi", "Hello").endswith("Hello<|eot_id|>\n")
    with pytest.raises(UserError, match="work with it: alpaca, llama2, llama3, mistral, none, vicuna, zephyr"):
        choose_template("chatml", base, date=DATE)


def test_what_is_not_there_is_none_or_undefined_as_in_transformers(pocket: Base) -> None:
    """Templates test `tools is none`, `documents is defined` and whether a message has a key."""
    source = (
        "{{ tools is none }} {{ documents is none }} {{ custom_tools is defined }} {{ now is defined }} "
        "{{ messages[0].tool_calls is defined }} {{ messages[0].name is defined }} {{ strftime_now('%Y') }} "
        "{{ {'a': ['é<', 1.0, none]} | tojson }} {{ {'b': 1, 'a': 2} | tojson(sort_keys=true, separators=(',', ':')) }}"
    )
    tokenizer = AutoTokenizer.from_pretrained(pocket.facts.folder)
    tokenizer.chat_template = source
    theirs = tokenizer.apply_chat_template([{"role": "user", "content": "x"}], tokenize=False)
    mine = Template("own", source, "<s>", "</s>", datetime.now()).text(talk("x"), add_generation_prompt=False)
    assert mine == theirs
    assert mine.startswith("True True False False False False 20")


def test_a_turn_of_role_and_text_alone_is_enough(alpaca: Template) -> None:
    turns = [SimpleNamespace(role="user", text="Hi"), SimpleNamespace(role="assistant", text="Hello")]
    assert alpaca.render(turns).text == text_of(alpaca, "Hi", "Hello")  # type: ignore[arg-type]
