"""Labels are exactly the answer: checked through offsets and tokens, on hand-made and on real rows."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, processors
from transformers import PreTrainedTokenizerBase

from finetune.base import Base, read_base
from finetune.data.conversations import alpaca_user_text, read_conversations
from finetune.data.examples import NOT_LEARNED, Encoder, Example, make_examples
from finetune.data.sources import Row
from finetune.data.template import Template, choose_template
from tests.data.conftest import DATE, conversation, example_of
from tests.data.test_template import CHATML

POCKET = read_base("builtin:pocket-llama")
ALPACA = choose_template("alpaca", POCKET, date=DATE)
REAL_ROWS = 150


def learned_characters(example: Example) -> set[int]:
    """Characters that a supervised token stands for, straddling ones whole."""
    return {
        position
        for (start, end), label in zip(example.offsets, example.labels, strict=True)
        if label != NOT_LEARNED
        for position in range(start, end)
    }


def straddling(example: Example) -> list[tuple[int, int]]:
    """Ranges of supervised tokens that begin before the span they reach into."""
    return [
        offsets
        for offsets, label in zip(example.offsets, example.labels, strict=True)
        if label != NOT_LEARNED and any(offsets[0] < start < offsets[1] for start, _ in example.spans)
    ]


def check_labels(example: Example, answers: list[str], end: str) -> int:
    """The supervised text is each answer and its end token, nothing else; returns the straddling tokens."""
    assert [example.text[start:stop] for start, stop in example.spans] == [answer + end for answer in answers]
    assert example.supervised_text == "".join(answer + end for answer in answers)
    assert len(example.ids) == len(example.labels) == len(example.offsets)
    assert all(label in (NOT_LEARNED, token) for token, label in zip(example.ids, example.labels, strict=True))
    wanted = {position for start, stop in example.spans for position in range(start, stop)}
    crossing = straddling(example)
    before = {position for start, stop in crossing for position in range(start, stop)}
    assert learned_characters(example) - before == wanted - before
    assert wanted <= learned_characters(example)
    assert example.straddling_tokens == len(crossing)
    return len(crossing)


def test_the_answer_and_its_end_token_are_learned_and_nothing_else() -> None:
    example = example_of(conversation("Name a colour.", "Red."), POCKET, ALPACA)
    assert check_labels(example, ["Red."], "</s>") == 0
    learned = [label for label in example.labels if label != NOT_LEARNED]
    assert learned[-1] == POCKET.tokenizer.token_to_id("</s>")
    assert POCKET.tokenizer.decode(learned, skip_special_tokens=False) == "Red.</s>"
    assert example.ids[: -len(learned)] == example.prompt_ids
    assert example.supervised_tokens == len(learned)


def test_a_token_that_straddles_the_start_is_learned_and_counted() -> None:
    """Without markup "ani" + "mal" is the one token "animal"; what it begins with cannot be told apart."""
    template = choose_template("none", POCKET, date=DATE)
    example = example_of(conversation("one ani", "mal"), POCKET, template)
    assert POCKET.tokenizer.encode("one animal", add_special_tokens=False).tokens[-1].endswith("animal")
    assert check_labels(example, ["mal"], "</s>") == example.straddling_tokens == 1
    assert POCKET.tokenizer.decode([x for x in example.labels if x != NOT_LEARNED]).strip() == "animal"
    assert example_of(conversation("one", " animal"), POCKET, template).straddling_tokens == 0


def test_a_post_processor_that_trims_offsets_does_not_hide_a_leading_space() -> None:
    """GPT-2's byte-level post-processor takes the space of " red" out of the token's offsets."""
    tokenizer = Tokenizer.from_str(POCKET.tokenizer.to_str())
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=True)
    trimmed = tokenizer.encode("a red", add_special_tokens=False)
    assert (trimmed.tokens, trimmed.offsets) == (["a", "Ġred"], [(0, 1), (2, 5)])
    example = example_of(conversation("Name a colour.", " red"), replace(POCKET, tokenizer=tokenizer), ALPACA)
    assert check_labels(example, [" red"], "</s>") == 0


@pytest.mark.parametrize(
    ("loss_on", "learned"),
    [
        ("assistant", ["Hello</s>", "Yes</s>"]),
        ("last-assistant", ["Yes</s>"]),
        ("everything", [ALPACA.render(conversation("Hi", "Hello", "More", "Yes").turns).text]),
    ],
)
def test_loss_on(loss_on: str, learned: list[str]) -> None:
    example = example_of(conversation("Hi", "Hello", "More", "Yes"), POCKET, ALPACA, loss_on=loss_on)
    assert [example.text[start:end] for start, end in example.spans] == learned
    decoded = POCKET.tokenizer.decode([x for x in example.labels if x != NOT_LEARNED], skip_special_tokens=False)
    assert decoded == "".join(learned)
    # The first token of a text has no predecessor, so it is never a target.
    assert example.supervised_tokens == sum(x != NOT_LEARNED for x in example.labels) - (loss_on == "everything")


@pytest.mark.parametrize("loss_on", ["assistant", "last-assistant", "everything"])
def test_a_template_that_separates_turns_teaches_to_stop(tmp_path: Path, loss_on: str) -> None:
    file = tmp_path / "chatml.jinja"
    file.write_text(CHATML)
    template = choose_template(str(file), POCKET, date=DATE)
    example = example_of(conversation("Hi", "Hello"), POCKET, template, loss_on=loss_on)
    assert [x for x in example.labels if x != NOT_LEARNED][-1] == POCKET.tokenizer.token_to_id("</s>")
    assert example.text.endswith("</s>\n")


def test_a_template_without_an_end_token_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "endless.jinja"
    file.write_text("{% for message in messages %}{{ message['content'] }}\n{% endfor %}")
    template = choose_template(str(file), POCKET, date=DATE)
    _, (problem,) = make_examples([conversation("Hi", "Hello", line=7)], template, Encoder(POCKET), loss_on="assistant")
    assert problem.where == "rows.jsonl:7"
    assert "the model would never stop; end the assistant's turn with eos_token" in problem.message


@pytest.mark.parametrize("texts", [("say </s> now", "Hello"), ("Hi", "Hello <s>")], ids=["user", "assistant"])
def test_the_text_of_a_special_token_is_refused(texts: tuple[str, str]) -> None:
    rows = [conversation("fine", "yes", line=3), conversation(*texts, line=4)]
    examples, (problem,) = make_examples(rows, ALPACA, Encoder(POCKET), loss_on="assistant")
    assert [example.row.line for example in examples] == [3]
    assert problem.where == "rows.jsonl:4"
    assert "control token; change or remove it in this row" in problem.message


text = st.text(st.characters(exclude_categories=["Cs"]), max_size=40).filter(
    lambda t: "</s>" not in t and "<s>" not in t
)


@settings(max_examples=150, deadline=None)
@given(instruction=text, answer=text)
def test_any_unicode_answer_is_recovered_exactly(instruction: str, answer: str) -> None:
    example = example_of(conversation(instruction, answer), POCKET, ALPACA)
    check_labels(example, [answer], "</s>")
    assert POCKET.tokenizer.decode(list(example.ids), skip_special_tokens=False) == example.text
    assert example.ids.count(POCKET.tokenizer.token_to_id("<s>")) == 1
    assert example.ids.count(POCKET.tokenizer.token_to_id("</s>")) == 1


# --- real tokenizers, real rows ---

END = {"llama2": "</s>", "mistral": "</s>", "llama3.2-instruct": "<|eot_id|>", "pocket": "</s>"}


def answer_as_written(name: str, template: str, output: str) -> str:
    """What the assistant's turn says, by the template's own rules, written out by hand."""
    if template == "alpaca" or name == "pocket":
        return output
    return {"llama2": f" {output.strip()} ", "mistral": f" {output.strip()}"}.get(name, output.strip())


@pytest.fixture(scope="session")
def real_rows(shared: Path) -> list[dict]:
    return json.loads((shared / "alpaca" / "alpaca_en_demo.json").read_text())[:REAL_ROWS]


@pytest.mark.real
@pytest.mark.parametrize(
    ("name", "template"),
    [
        ("pocket", "alpaca"),
        ("llama2", "auto"),
        ("llama2", "alpaca"),
        ("mistral", "auto"),
        ("mistral", "alpaca"),
        ("llama3.2-instruct", "auto"),
    ],
)
def test_labels_of_real_rows(
    real_base: Callable[[str], Base],
    real_rows: list[dict],
    oracle: Callable[[str], PreTrainedTokenizerBase],
    name: str,
    template: str,
) -> None:
    base = POCKET if name == "pocket" else real_base(name)
    chosen: Template = choose_template(template, base, date=DATE)
    rows = [Row(values, "demo.json", line) for line, values in enumerate(real_rows)]
    conversations, misfits = read_conversations(rows, format="alpaca", system=None)
    examples, refused = make_examples(conversations, chosen, Encoder(base), loss_on="assistant")
    assert not misfits
    assert not refused
    tokenizer = oracle(name)
    theirs = tokenizer([example.text for example in examples], add_special_tokens=False)["input_ids"]
    end = tokenizer.convert_tokens_to_ids(END[name])
    crossing = 0
    for example, values, ids in zip(examples, real_rows, theirs, strict=True):
        assert values["instruction"].strip() in example.text
        crossing += check_labels(example, [answer_as_written(name, template, values["output"])], END[name])
        assert list(example.ids) == ids
        assert [label for label in example.labels if label != NOT_LEARNED][-1] == end
        assert example.text.count(tokenizer.bos_token) == 1
        assert example.ids.count(tokenizer.bos_token_id) == 1
        assert example.ids[0] == tokenizer.bos_token_id
    assert crossing == 0


def test_an_alpaca_input_stands_under_its_heading() -> None:
    assert alpaca_user_text("Add.", "1 2") == "Add.\n\n### Input:\n1 2"
    assert alpaca_user_text("Add.", "") == "Add."
