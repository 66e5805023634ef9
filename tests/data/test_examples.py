"""Labels are exactly the answer: walked character by character, on hand-made, invented and real rows."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerBase

from finetune.base import Base, read_base
from finetune.data.encoder import Encoder
from finetune.data.examples import NOT_LEARNED, Rules, TracedExample, label
from finetune.data.formats import detect_format, read_conversation
from finetune.data.rows import REASONS, Conversation, Refusal, Row, ToolCall, Turn
from finetune.data.template import Template, choose_template
from tests.data.conftest import DATE, conversation, example_of

POCKET = read_base("builtin:pocket-llama")
ENCODER = Encoder(POCKET)
ALPACA, NONE = (choose_template(name, POCKET, date=DATE) for name in ("alpaca", "none"))
END = {"llama2": "</s>", "mistral": "</s>", "llama3.2-instruct": "<|eot_id|>", "pocket": "</s>"}
LOSS_ON = ["assistant", "last-assistant", "everything"]


def own(body: str) -> Template:
    """A template that writes `body` for each message."""
    source = "{% for message in messages %}" + body + "{% endfor %}"
    ask = "{% if add_generation_prompt %}<s>assistant\n{% endif %}"
    return Template("own", source + ask, POCKET.bos_token, POCKET.eos_token, ALPACA.date)


CHATML = own("{{ '<s>' + message['role'] + '\\n' + message['content'] + eos_token + '\\n' }}")


def refused(whole: Conversation, template: Template = ALPACA, **rules: Any) -> tuple[str, str]:
    (refusal,) = label([whole], template, ENCODER, Rules(**{"loss_on": "assistant", "max_tokens": 9999} | rules))
    assert isinstance(refusal, Refusal), refusal
    assert refusal.where == whole.row.where
    assert refusal.reason in REASONS
    return refusal.reason, refusal.message


def walked_labels(traced: TracedExample, loss_on: str) -> list[bool]:
    """Which tokens are learned, from the roles of single characters; the answers' places are the template's."""
    turns = [turn for turn in traced.conversation.turns if turn.role == "assistant"]
    spans = CHATML.render(traced.conversation.turns).spans
    role = dict.fromkeys(range(len(traced.text)), "context")
    for index, (turn, span) in enumerate(zip(turns, spans, strict=True)):
        chosen = turn.train and (loss_on != "last-assistant" or index == len(turns) - 1)
        role |= dict.fromkeys(range(*span), "answer" if chosen else "other answer" if turn.train else "never")
    if loss_on == "everything":
        last = max((at for at, name in role.items() if name == "answer"), default=-1)
        role |= {at: "answer" for at, name in role.items() if at <= last and name == "context"}
    tokens = [{role[at] for at in range(*pair)} for pair in traced.offsets.tolist()]
    return ["answer" in names and "never" not in names for names in tokens]


def learned_ids(traced: TracedExample) -> list[int]:
    return [int(x) for x in traced.example.labels if x != NOT_LEARNED]


# --- which tokens are learned ---


def test_the_answer_and_its_end_token_are_learned_and_nothing_else() -> None:
    traced = example_of(conversation("Name a colour.", "Red."), POCKET, ALPACA)
    example, learned = traced.example, learned_ids(traced)
    assert traced.supervised_text == "Red.</s>"
    assert learned[-1] == POCKET.tokenizer.token_to_id("</s>")
    assert POCKET.tokenizer.decode(learned, skip_special_tokens=False) == "Red.</s>"
    prompt = ALPACA.text([Turn("user", "Name a colour.")], add_generation_prompt=True)
    assert POCKET.tokenizer.encode(prompt, add_special_tokens=False).ids == example.prompt_ids.tolist()
    assert [*example.prompt_ids, *learned] == example.ids.tolist()
    assert (example.supervised_tokens, example.cut_tokens, traced.straddling_tokens) == (len(learned), 0, 0)
    assert (example.where, example.tokens, len(traced.kept)) == ("rows.jsonl:1", len(example.ids), len(example.ids))
    assert example.ids.dtype == example.labels.dtype == np.int32
    assert example.learned.dtype == bool


def test_a_token_that_straddles_the_start_is_learned_and_counted() -> None:
    """Without markup "ani" + "mal" is the one token "animal"; what it begins with cannot be told apart."""
    traced = example_of(conversation("one ani", "mal"), POCKET, NONE)
    assert POCKET.tokenizer.encode("one animal", add_special_tokens=False).tokens[-1].endswith("animal")
    assert POCKET.tokenizer.decode(learned_ids(traced)).strip() == "animal"
    assert (traced.supervised_text, traced.straddling_tokens) == ("mal</s>", 1)
    assert example_of(conversation("one", " animal"), POCKET, NONE).straddling_tokens == 0


@pytest.mark.parametrize("texts", [("one ani", "mal", " x"), ("one", " ani", "mal x")], ids=["start", "end"])
def test_a_token_that_is_partly_an_unlearned_answer_is_not_learned(texts: tuple[str, ...]) -> None:
    source = (
        "{% for message in messages %}{{ message['content'] + (eos_token if loop.index == 4 else '') }}{% endfor %}"
    )
    template = Template("silent", source, None, POCKET.eos_token, ALPACA.date)
    traced = example_of(conversation(*texts, "y", train=[False]), POCKET, template, loss_on="everything")
    assert traced.text == "one animal xy</s>"
    assert [traced.text[start:end] for start, end in traced.spans] == [texts[0], f"{texts[2]}y</s>"]
    learned = traced.offsets[traced.example.learned].tolist()
    assert "".join(traced.text[start:end] for start, end in learned) == "one xy</s>"
    assert traced.straddling_tokens == 0


WORDS = ["Hello", "Yes", " animal", "", "👍🏽 日本", "e\u0301", "</s", "<s>assistant\n"]
answers = st.one_of(st.sampled_from(WORDS), st.text(st.characters(exclude_categories=["Cs", "Co"]), max_size=12))


@settings(max_examples=200, deadline=None)
@given(st.lists(st.tuples(answers, answers, st.booleans()), min_size=1, max_size=4), st.sampled_from(LOSS_ON))
def test_labels_are_what_walking_the_characters_gives(rounds: list[tuple[str, str, bool]], loss_on: str) -> None:
    whole = conversation(*[x for ask, say, _ in rounds for x in (ask, say)], train=[train for *_, train in rounds])
    (traced,) = label([whole], CHATML, ENCODER, Rules(loss_on, 9999))
    if isinstance(traced, Refusal):
        asked = [train for *_, train in rounds]
        assert traced.reason == "no_supervised_token"
        assert not any(asked[-1:] if loss_on == "last-assistant" else asked)
        return
    expected = walked_labels(traced, loss_on)
    assert traced.example.learned.tolist() == expected
    assert traced.example.supervised_tokens == sum(expected[1:])
    assert POCKET.tokenizer.decode(traced.example.ids, skip_special_tokens=False) == traced.text
    # One control token is written before a turn and one behind it, whatever the turns say.
    ids = traced.example.ids.tolist()
    assert ids.count(POCKET.tokenizer.token_to_id("<s>")) == ids.count(POCKET.tokenizer.token_to_id("</s>"))
    assert ids.count(POCKET.tokenizer.token_to_id("</s>")) == 2 * len(rounds)


@pytest.mark.parametrize(
    ("loss_on", "learned"),
    [
        ("assistant", ["Hello</s>", "Yes</s>"]),
        ("last-assistant", ["Yes</s>"]),
        ("everything", [ALPACA.text(conversation("Hi", "Hello", "More", "Yes").turns, add_generation_prompt=False)]),
    ],
)
def test_loss_on(loss_on: str, learned: list[str]) -> None:
    traced = example_of(conversation("Hi", "Hello", "More", "Yes"), POCKET, ALPACA, loss_on=loss_on)
    assert [traced.text[start:end] for start, end in traced.spans] == learned
    assert POCKET.tokenizer.decode(learned_ids(traced), skip_special_tokens=False) == "".join(learned)
    # The first token of a text has no predecessor, so it is never a target.
    assert traced.example.supervised_tokens == len(learned_ids(traced)) - (loss_on == "everything")
    assert traced.example.prompt_tokens == traced.example.tokens - len(POCKET.tokenizer.encode("Yes</s>").ids)


@pytest.mark.parametrize(
    ("loss_on", "train", "learned"),
    [
        ("assistant", [False, True], "Yes</s>"),
        ("assistant", [True, False], "Hello</s>"),
        ("last-assistant", [False, True], "Yes</s>"),
        ("everything", [False, True], "<s>user\nHi</s>\n<s>assistant\n\n<s>user\nMore</s>\n<s>assistant\nYes</s>"),
        ("everything", [True, False], "<s>user\nHi</s>\n<s>assistant\nHello</s>"),
    ],
)
def test_a_turn_that_is_not_to_be_trained_is_never_learned(loss_on: str, train: list[bool], learned: str) -> None:
    traced = example_of(conversation("Hi", "Hello", "More", "Yes", train=train), POCKET, CHATML, loss_on=loss_on)
    assert traced.supervised_text == learned
    assert POCKET.tokenizer.decode(learned_ids(traced), skip_special_tokens=False) == learned


@pytest.mark.parametrize(
    ("loss_on", "train"),
    [("assistant", [False, False]), ("last-assistant", [True, False]), ("everything", [False, False])],
)
def test_a_row_of_which_nothing_is_learned_is_refused(loss_on: str, train: list[bool]) -> None:
    reason, message = refused(conversation("Hi", "Hello", "More", "Yes", train=train), loss_on=loss_on)
    assert (reason, message[:40]) == ("no_supervised_token", "row: no token of it would be learned; le")


@pytest.mark.parametrize("loss_on", LOSS_ON)
def test_what_separates_turns_is_behind_the_last_learned_token(loss_on: str) -> None:
    traced = example_of(conversation("Hi", "Hello"), POCKET, CHATML, loss_on=loss_on)
    assert learned_ids(traced)[-1] == POCKET.tokenizer.token_to_id("</s>")
    assert traced.text.endswith("</s>\n")
    assert not traced.example.learned[-1]


def test_an_answer_that_never_stops_is_refused() -> None:
    plain = Template("plain", "{% for m in messages %}{{ m['content'] }}\n{% endfor %}", None, None, ALPACA.date)
    reason, message = refused(conversation("Hi", "Hello", line=7), plain)
    assert reason == "never_stops"
    assert message.endswith("the model would never stop; end the assistant's turn with eos_token")


def test_refusals_and_examples_keep_their_order() -> None:
    texts = ["a", "word " * 50, "b", "word " * 60, "c"]
    rows = [conversation("Hi", text, line=line) for line, text in enumerate(texts)]
    rows.insert(2, Conversation((Turn("tool", "x"), Turn("assistant", "y")), Row({}, "rows.jsonl", 99)))
    labelled = label(rows, ALPACA, ENCODER, Rules("assistant", 80))
    where = [each.where if isinstance(each, Refusal) else each.example.where for each in labelled]
    assert where == [row.row.where for row in rows]
    reasons = [each.reason if isinstance(each, Refusal) else None for each in labelled]
    assert reasons == [None, "too_long", "template_refuses", None, "too_long", None]
    assert label([], ALPACA, ENCODER, Rules("assistant", 80)) == []


# --- the text of a control token inside a row ---


@pytest.mark.parametrize(
    ("texts", "literal"),
    [(("say </s> now", "Hello"), "</s>"), (("Hi", "Hello <s>"), "<s>"), (("</s>", "</s>"), "</s></s>")],
)
def test_the_text_of_a_control_token_is_text_unless_asked_otherwise(texts: tuple[str, str], literal: str) -> None:
    kept = example_of(conversation(*texts), POCKET, ALPACA)
    assert "".join(kept.text[start:end] for start, end in kept.literals) == literal
    control = np.isin(kept.example.ids, list(ENCODER.special_ids))
    assert kept.offsets[control].tolist() == [[0, 3], [len(kept.text) - 4, len(kept.text)]]
    assert kept.supervised_text == f"{texts[1]}</s>"
    raw = example_of(conversation(*texts), POCKET, ALPACA, special_tokens="control")
    assert raw.example.ids.tolist() == POCKET.tokenizer.encode(kept.text, add_special_tokens=False).ids
    assert (raw.literals, raw.text, raw.spans) == ((), kept.text, kept.spans)


# --- rows that are too long ---


def test_too_long_is_refused_with_both_numbers() -> None:
    whole = conversation("Hi", "pear " * 1500)
    tokens = example_of(whole, POCKET, ALPACA).example.tokens
    assert example_of(whole, POCKET, ALPACA, max_tokens=tokens).example.tokens == tokens
    for too_long in ("error", "drop"):
        told = f"row: {tokens:,} tokens, data.max_tokens is {tokens - 1:,}; "
        told += "raise it, shorten the row, or set data.too_long: drop or truncate"
        assert refused(whole, max_tokens=tokens - 1, too_long=too_long) == ("too_long", told)


CUT = {"too_long": "truncate"}
LONG = conversation("one red fox " * 30, "two</s> " * 8 + "end", "three 👍🏽日本 pears " * 20, "four")


@pytest.mark.parametrize("cut", [1, 2, 5, 40, 100])
def test_a_cut_answer_is_the_beginning_of_the_whole(cut: int) -> None:
    whole = example_of(LONG, POCKET, ALPACA, loss_on="everything")
    short = example_of(
        LONG, POCKET, ALPACA, loss_on="everything", max_tokens=whole.example.tokens - cut, **CUT, truncate="answer"
    )
    count = whole.example.tokens - cut
    assert short.example.ids.tolist() == whole.example.ids[:count].tolist()
    assert short.example.learned.tolist() == [True] * count
    assert (short.example.cut_tokens, short.example.tokens) == (cut, count)
    assert short.example.prompt_tokens == min(whole.example.prompt_tokens, count)
    assert short.kept.tolist() == [True] * count + [False] * cut
    assert (short.text, short.spans, short.offsets.tolist()) == (whole.text, whole.spans, whole.offsets.tolist())
    assert short.supervised_text == whole.text[: whole.offsets[count - 1][1]]


def test_a_row_whose_answer_is_cut_off_whole_is_refused() -> None:
    whole = conversation("Hi " * 50, "Hello")
    prompt = example_of(whole, POCKET, ALPACA).example.prompt_tokens
    cut: dict[str, Any] = CUT | {"truncate": "answer"}
    assert example_of(whole, POCKET, ALPACA, max_tokens=prompt + 1, **cut).example.supervised_tokens == 1
    reason, message = refused(whole, max_tokens=prompt, **cut)
    assert reason == "no_supervised_token"
    assert message.endswith("and no answer begins before that; raise it, shorten the row, or set data.truncate: prompt")


def asked_characters(traced: TracedExample) -> set[int]:
    """The characters of the user's and tools' words, found from the end of the text, turn by turn."""
    found, end = set(), len(traced.text)
    for turn in reversed(traced.conversation.turns):
        words = turn.text.strip()
        end = traced.text.rindex(words, 0, end)
        if turn.role in {"user", "tool"}:
            found |= set(range(end, end + len(words)))
    return found


@pytest.mark.parametrize("template", [ALPACA, CHATML], ids=["alpaca", "chatml"])
def test_only_the_oldest_words_of_the_prompt_are_cut(template: Template) -> None:
    whole = example_of(LONG, POCKET, template)
    asked = asked_characters(whole)
    tokens = whole.example.tokens
    for most in range(tokens - 1, 0, -7):
        (short,) = label([LONG], template, ENCODER, Rules("assistant", most, "truncate"))
        removable = [index for index, pair in enumerate(whole.offsets.tolist()) if set(range(*pair)) <= asked]
        if isinstance(short, Refusal):
            assert short.reason == "too_long"
            left = f"and only {len(removable):,} are words of the prompt that can be cut"
            assert left in short.message
            assert tokens - len(removable) > most
            continue
        cut = np.flatnonzero(~short.kept).tolist()
        assert cut == removable[: len(cut)]
        # What is cut is cut exactly to the limit, but for the bytes of one character, which go together.
        shared = [whole.offsets[index].tolist() for index in cut]
        assert 0 <= len(cut) - (tokens - most) <= 3
        assert len(cut) == tokens - most or shared[-1] == shared[-2]
        assert not {tuple(x) for x in shared} & {tuple(x) for x in whole.offsets[short.kept].tolist()}
        assert short.example.tokens == tokens - len(cut) == tokens - short.example.cut_tokens
        assert short.example.ids.tolist() == whole.example.ids[short.kept].tolist()
        assert learned_ids(short) == learned_ids(whole)
        assert short.supervised_text == whole.supervised_text
        assert short.example.tokens - short.example.prompt_tokens == tokens - whole.example.prompt_tokens
        assert "\ufffd" not in POCKET.tokenizer.decode(short.example.ids)


def test_a_learned_prompt_and_the_system_turn_are_never_cut() -> None:
    learned = refused(LONG, loss_on="everything", max_tokens=300, **CUT)
    assert learned[0] == "too_long"
    assert "and only 0 are words of the prompt that can be cut; raise it, shorten the row" in learned[1]
    assert refused(conversation("Hi", "Yes", system="Be brief. " * 99), max_tokens=150, **CUT)[0] == "too_long"


@pytest.mark.parametrize("words", ["a", "Response:", "Write a response"], ids=["letter", "heading", "preamble"])
def test_words_that_the_template_writes_too_are_not_cut(words: str) -> None:
    """Which of the two is the user's is in doubt, so neither is touched."""
    whole = conversation(words, "Yes")
    tokens = example_of(whole, POCKET, ALPACA).example.tokens
    assert "and only 0 are words" in refused(whole, max_tokens=tokens - 1, **CUT)[1]


def test_a_tools_answer_is_cut_where_it_is_written_as_it_is() -> None:
    call = ToolCall("weather", {}, "abcdefghi")
    for text, cuttable in [("sunny day " * 20, True), ('"quoted" day ' * 20, False)]:
        turns = (
            Turn("user", "?!"),
            Turn("assistant", "", tool_calls=(call,)),
            Turn("tool", text, name="weather", tool_call_id=call.id),
            Turn("assistant", "Sunny."),
        )
        body = "{{ '<s>' + message['role'] + '\\n' + (message['content'] | tojson if message['role'] == 'tool' else "
        body += "message['content'] + (message['tool_calls'][0]['function']['name'] if message['tool_calls'] else ''))"
        template = own(body + " + eos_token + '\\n' }}")
        whole = Conversation(turns, Row({}, "rows.jsonl", 1))
        tokens = example_of(whole, POCKET, template).example.tokens
        (short,) = label([whole], template, ENCODER, Rules("assistant", tokens - 10, "truncate"))
        assert isinstance(short, TracedExample) == cuttable


# --- real tokenizers, real rows ---


@pytest.fixture(scope="session")
def real_conversations(shared: Path) -> list[Conversation]:
    """The first 40 rows of every file that a format reads."""
    files = [shared / "alpaca" / "alpaca_en_demo.json"]
    files += [*sorted((shared / "chat").iterdir()), *sorted((shared / "preference").iterdir())]
    found: list[Conversation] = []
    for file in files:
        text = file.read_text()
        values = map(json.loads, text.splitlines()) if file.suffix == ".jsonl" else iter(json.loads(text))
        rows = [Row(each, file.name, line) for line, each in enumerate(islice(values, 40), start=1)]
        row_format = detect_format(rows[0])
        assert isinstance(row_format, str)
        read = [read_conversation(row, format=row_format, system=None) for row in rows]
        found += [each for each in read if isinstance(each, Conversation)]
    return found


def messages_of(whole: Conversation) -> list[dict[str, Any]]:
    messages = []
    for turn in whole.turns:
        message: dict[str, Any] = {"role": turn.role, "content": turn.text}
        if turn.tool_calls:
            calls = [(call.id, {"name": call.name, "arguments": dict(call.arguments)}) for call in turn.tool_calls]
            message["tool_calls"] = [{"id": number, "type": "function", "function": each} for number, each in calls]
        message |= {"name": turn.name} if turn.name is not None else {}
        message |= {"tool_call_id": turn.tool_call_id} if turn.tool_call_id is not None else {}
        messages.append(message)
    return messages


def between_sentinels(template: Template, whole: Conversation, end: str) -> str:
    """What the template writes for the last answer: what differs between two other answers, up to the end token.

    White space that the template puts before the answer, and does not write when asked to prompt for it, is the
    answer's.
    """
    one, two = (
        template.text((*whole.turns[:-1], Turn("assistant", sentinel)), add_generation_prompt=False, tools=whole.tools)
        for sentinel in ("q7Zk", "X9vw")
    )
    text = template.text(whole.turns, add_generation_prompt=False, tools=whole.tools)
    before = len(os.path.commonprefix([one, two]))
    behind = len(os.path.commonprefix([one[::-1], two[::-1]]))
    prompt = template.text(whole.turns[:-1], add_generation_prompt=True, tools=whole.tools)
    assert not text[len(prompt) : before].strip()
    assert text[before : len(text) - behind] == whole.turns[-1].text.strip()
    return text[len(prompt) : text.index(end, len(text) - behind) + len(end)]


@pytest.mark.real
@pytest.mark.parametrize("name", ["llama2", "mistral", "llama3.2-instruct"])
def test_labels_of_real_rows(
    real_base: Callable[[str], Base],
    real_conversations: list[Conversation],
    oracle: Callable[[str], PreTrainedTokenizerBase],
    name: str,
) -> None:
    base, tokenizer = real_base(name), oracle(name)
    template = choose_template("auto", base, date=DATE)
    labelled = label(real_conversations, template, Encoder(base), Rules("last-assistant", 100_000))
    traced = [each for each in labelled if isinstance(each, TracedExample)]
    assert len(traced) > 0.6 * len(labelled)
    refusals = {each.reason for each in labelled if isinstance(each, Refusal)}
    assert refusals <= {"template_refuses", "template_drops_turn", "template_unproven"}
    for each in traced:
        example = each.example
        theirs = tokenizer.apply_chat_template(
            messages_of(each.conversation), tools=list(each.conversation.tools) or None, date_string=DATE
        )["input_ids"]
        if not each.literals:
            assert example.ids.tolist() == theirs
        assert each.supervised_text == between_sentinels(template, each.conversation, END[name])
        assert example.ids[example.learned][-1] == tokenizer.convert_tokens_to_ids(END[name])
        assert example.ids.tolist().count(tokenizer.bos_token_id) == each.text.count(tokenizer.bos_token)
        assert example.ids[0] == tokenizer.bos_token_id != example.ids[1]
        ranges = each.offsets[example.learned].tolist()
        (span,) = each.spans
        straddles = ranges[0][0] < span[0]
        assert {at for pair in ranges for at in range(*pair)} == set(range(ranges[0][0], span[1]))
        assert ranges[0][0] <= span[0] < ranges[0][1]
        assert each.straddling_tokens == straddles


def test_the_labels_do_not_depend_on_the_batch(real_conversations: Sequence[Conversation]) -> None:
    rows = [row for row in real_conversations if not row.tools][:30]
    together = label(rows, ALPACA, ENCODER, Rules("assistant", 300, "truncate"))
    for row, each in zip(rows, together, strict=True):
        (alone,) = label([row], ALPACA, ENCODER, Rules("assistant", 300, "truncate"))
        if isinstance(each, Refusal) or isinstance(alone, Refusal):
            assert each == alone
        else:
            assert each.example.ids.tolist() == alone.example.ids.tolist()
            assert each.example.labels.tolist() == alone.example.labels.tolist()
