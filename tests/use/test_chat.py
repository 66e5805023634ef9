"""Facts about chat: what has been said is remembered, can be taken back, and never outgrows the context."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

import pytest

from finetune.errors import UserError
from finetune.use import chat as module
from finetune.use.chat import chat
from finetune.use.generate import stream
from finetune.use.target import Target

from .conftest import CONTEXT


@pytest.fixture
def talk(tiny: Target, monkeypatch: pytest.MonkeyPatch) -> Callable[..., tuple[str, list[str]]]:
    """Types lines into a chat whose model says "ok"; returns what was written, and the text of every prompt."""

    def run(*lines: str, answer: Sequence[str] = ("o", "k"), interrupt: bool = False) -> tuple[str, list[str]]:
        prompts: list[str] = []
        waiting, written = iter(lines), []

        def say(target: Target, prompt: Sequence[int], **kwargs: object) -> Iterator[str]:
            prompts.append(target.base.tokenizer.decode(list(prompt), skip_special_tokens=False))
            yield from answer
            if interrupt:
                raise KeyboardInterrupt

        def read_line() -> str:
            try:
                return next(waiting)
            except StopIteration:
                raise EOFError from None

        monkeypatch.setattr(module, "stream", say)
        chat(tiny, max_new_tokens=8, read_line=read_line, write=written.append)
        return "".join(written), prompts

    return run


def test_what_was_said_is_in_the_next_prompt(talk: Callable) -> None:
    written, prompts = talk("one", "", "two")
    assert prompts == ["<s>one", "<s>oneok</s>two"]
    assert "ok\nok\n" in written


def test_commands_take_back_what_was_said(talk: Callable) -> None:
    written, prompts = talk("one", "two", "/undo", "three", "/reset", "four", "/help", "/quit", "never")
    assert prompts == ["<s>one", "<s>oneok</s>two", "<s>oneok</s>three", "<s>four"]
    assert "(no command /help; there are /reset, /undo, /quit)" in written


def test_an_interrupted_answer_is_kept_as_far_as_it_came(talk: Callable) -> None:
    written, prompts = talk("one", "two", interrupt=True)
    assert prompts[1] == "<s>oneok</s>two"
    assert "ok (stopped)\n" in written


def test_an_answer_that_never_came_leaves_no_trace(talk: Callable) -> None:
    assert talk("one", "two", answer=(), interrupt=True)[1] == ["<s>one", "<s>two"]


def test_a_line_that_cannot_be_asked_changes_nothing(talk: Callable) -> None:
    written, prompts = talk("one", "a</s>b", "word " * CONTEXT, "two")
    assert prompts == ["<s>one", "<s>oneok</s>a</s>b", "<s>oneok</s>a</s>bok</s>two"]
    assert f"this line alone fills the {CONTEXT} tokens" in written


def test_a_full_context_leaves_out_the_oldest_turns(talk: Callable) -> None:
    lines = [f"{number} " + "7 " * 12 for number in range(6)]
    written, prompts = talk(*lines)
    assert "oldest turns are left out" in written
    assert all(prompt.endswith(line.strip()) for prompt, line in zip(prompts, lines, strict=True))
    assert prompts[-1].startswith("<s>")
    assert not prompts[-1].startswith("<s>0 ")


def test_a_real_answer_is_streamed(tiny: Target) -> None:
    lines, written = iter(["hello", "/quit"]), []
    chat(tiny, max_new_tokens=5, read_line=lambda: next(lines), write=written.append)
    ids = tiny.base.tokenizer.encode("<s>hello", add_special_tokens=False).ids
    expected = list(stream(tiny, ids, max_new_tokens=5))
    assert written[-1 - len(expected) : -1] == expected


def test_a_base_without_a_template_is_refused_before_the_first_line(tiny: Target) -> None:
    with pytest.raises(UserError, match="add `--template alpaca`, or continue text with `generate --raw`"):
        chat(replace(tiny, template=None), read_line=lambda: "never", write=lambda text: None)
