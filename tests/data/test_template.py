"""What templates write: the Alpaca prompt to the letter, the bases' own as transformers renders them."""

from __future__ import annotations

from collections.abc import Callable
from datetime import datetime
from pathlib import Path

import pytest
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from finetune.base import Base
from finetune.data.conversations import Turn, alpaca_user_text
from finetune.data.template import Template, TemplateProblem, choose_template
from finetune.errors import UserError
from tests.data.conftest import DATE, conversation

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


def text_of(template: Template, *texts: str, system: str | None = None) -> str:
    return template.render(conversation(*texts, system=system).turns).text


def test_alpaca_without_input_is_the_published_prompt(alpaca: Template) -> None:
    expected = "<s>" + NO_INPUT.format(instruction="Name a colour.") + "Red.</s>"
    assert text_of(alpaca, alpaca_user_text("Name a colour.", ""), "Red.") == expected


def test_alpaca_with_input_is_the_published_prompt(alpaca: Template) -> None:
    expected = "<s>" + WITH_INPUT.format(instruction="Translate.", input="Haus") + "house</s>"
    assert text_of(alpaca, alpaca_user_text("Translate.", "Haus"), "house") == expected


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
    whole = conversation(*turns, system=system)
    messages = [{"role": turn.role, "content": turn.text} for turn in whole.turns]
    assert alpaca.render(whole.turns).text == tokenizer.apply_chat_template(messages, tokenize=False)
    prompt = tokenizer.apply_chat_template(messages[:-1], tokenize=False, add_generation_prompt=True)
    assert alpaca.text(whole.turns[:-1], add_generation_prompt=True) == prompt


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
    whole = conversation(*turns, system=system)
    messages = [{"role": turn.role, "content": turn.text} for turn in whole.turns]
    theirs = tokenizer.apply_chat_template(messages, tokenize=False).replace(f"{datetime.now():%d %b %Y}", DATE)
    assert template.text(whole.turns, add_generation_prompt=False) == theirs
    if name == "llama3.2-instruct":
        assert f"Today Date: {DATE}\n" in theirs


@pytest.mark.real
def test_the_date_of_the_recipe_is_what_a_template_is_told(real_base: Callable[[str], Base]) -> None:
    base = real_base("llama3.2-instruct")
    template = choose_template("auto", base, date="2019-02-03")
    assert "Today Date: 03 Feb 2019\n" in text_of(template, "Hi", "Hello")


@pytest.mark.real
def test_a_template_that_rewrites_its_beginnings_is_refused(real_base: Callable[[str], Base]) -> None:
    """Mistral's writes the system text into the last user's turn: the first answer's place changes afterwards."""
    template = choose_template("auto", real_base("mistral"), date=DATE)
    with pytest.raises(TemplateProblem, match="what it writes for turn 3 changes with what follows"):
        template.render(conversation("Hi", "Hello", "More", "Yes", system="Be brief.").turns)


def test_what_only_separates_turns_is_not_learned(pocket: Base, tmp_path: Path) -> None:
    file = tmp_path / "chatml.jinja"
    file.write_text(CHATML)
    rendered = choose_template(str(file), pocket, date=DATE).render(conversation("Hi", "Hello", "More", "Yes").turns)
    assert [rendered.text[start:end] for start, end in rendered.spans] == ["Hello</s>", "Yes</s>"]
    assert rendered.text.endswith("Yes</s>\n")


def test_a_token_the_tokenizer_lacks_is_not_written_as_none(alpaca: Template) -> None:
    none = Template("none", "{{ bos_token }}{{ messages[0]['content'] }}", None, None, alpaca.date)
    assert none.text([Turn("user", "Hi")], add_generation_prompt=True) == "Hi"
    with pytest.raises(TemplateProblem, match="eos_token"):
        Template("alpaca", alpaca.source, None, None, alpaca.date).render(conversation("Hi", "Hello").turns)


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
