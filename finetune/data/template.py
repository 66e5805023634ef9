"""Render conversations: turns in, text and the spans of the assistant's answers out. The only way text is made."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime
from functools import cached_property
from hashlib import sha256
from pathlib import Path
from typing import Any

from finetune.base import Base
from finetune.data.dropped import refuse_dropped
from finetune.data.literals import controls_of, find_literals
from finetune.data.rows import Turn
from finetune.data.sandbox import Program
from finetune.data.spans import Message, Span, TemplateProblem, Written, find_spans
from finetune.errors import Problem, UserError

__all__ = ["Rendered", "Template", "TemplateProblem", "choose_template", "parse_date"]

OURS = Path(__file__).parent / "templates"
DATE_FORMATS = ("%d %b %Y", "%Y-%m-%d")
# What each of ours writes that a tokenizer must have as one token; eos_token stands for the base's own.
CONTROL_TOKENS = {
    "alpaca": ("eos_token",),
    "chatml": ("<|im_start|>", "<|im_end|>"),
    "llama2": ("eos_token",),
    "llama3": ("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
    "mistral": ("eos_token",),  # [INST] is one token since v0.3, plain text before
    "none": ("eos_token",),
    "vicuna": ("eos_token",),
    "zephyr": ("eos_token",),
}


@dataclass(frozen=True)
class Rendered:
    """A conversation as one text.

    `spans` are the character ranges [start, end) of the assistant's turns; `literals` those that read like control
    tokens but are a row's own words, to be tokenised as ordinary text.
    """

    text: str
    spans: tuple[Span, ...]
    literals: tuple[Span, ...] = ()


@dataclass(frozen=True)
class Template:
    """A Jinja chat template with the tokens and the date it is told."""

    name: str
    source: str
    bos_token: str | None
    eos_token: str | None
    date: datetime

    @property
    def sha256(self) -> str:
        return sha256(self.source.encode()).hexdigest()

    def text(self, turns: Sequence[Turn], *, add_generation_prompt: bool, tools: Sequence[Any] = ()) -> str:
        """The turns as text; with `add_generation_prompt` up to where the assistant starts to speak.

        Raises:
            TemplateProblem: the template refuses these turns.
        """
        return self._write(_messages(turns), tools, add_generation_prompt)

    def render(
        self, turns: Sequence[Turn], *, tools: Sequence[Any] = (), control_texts: Sequence[str] = ()
    ) -> Rendered:
        """The whole conversation and where the assistant's turns stand in it.

        A turn's span starts where the text that asks for it ends, and ends with what the template writes for the turn.

        Raises:
            TemplateProblem: the template refuses these turns or leaves out what one says, or a turn's place or the
                place of a control token's text cannot be proven.
        """
        with _refusing_deep_values(self.name):
            messages = _messages(turns)
            whole = self._write(messages, tools, False)
            written = Written(self.name, messages, tools, whole, self._write)
            refuse_dropped(written, self._proven_shapes)
            if self._writes_unasked_header:
                message = (
                    f"template {self.name}: it writes a heading before the assistant's text but not when it is asked "
                )
                message += "to prompt for it, so the model would have to write the heading; let it look at "
                raise TemplateProblem("template_unproven", message + "add_generation_prompt")
            return Rendered(whole, find_spans(written), self._literals(written, control_texts, ask=False))

    def render_prompt(
        self, turns: Sequence[Turn], *, tools: Sequence[Any] = (), control_texts: Sequence[str] = ()
    ) -> Rendered:
        """The turns up to where the assistant starts to speak; no spans.

        Raises:
            TemplateProblem: the template refuses these turns, or the place of a control token's text is not proven.
        """
        with _refusing_deep_values(self.name):
            messages = _messages(turns)
            whole = self._write(messages, tools, True)
            written = Written(self.name, messages, tools, whole, self._write)
            return Rendered(whole, (), self._literals(written, control_texts, ask=True))

    def _literals(self, written: Written, control_texts: Sequence[str], *, ask: bool) -> tuple[Span, ...]:
        if not control_texts:
            return ()
        controls = controls_of(tuple(control_texts))
        # The role is ours, not the row's, and stays as it is.
        if not any(
            controls.touches(value) for message in written.messages for key, value in message.items() if key != "role"
        ) and not controls.touches(written.tools):
            return ()
        said = [{key: value for key, value in message.items() if key != "role"} for message in written.messages]

        def render(change: Callable[[Any], Any]) -> str:
            messages = [
                {"role": message["role"], **change(rest)} for message, rest in zip(written.messages, said, strict=True)
            ]
            return self._write(messages, change(written.tools), ask)

        return find_literals(written.whole, [said, written.tools], controls, render, name=self.name)

    @cached_property
    def _proven_shapes(self) -> set[Any]:
        return set()

    @cached_property
    def _writes_unasked_header(self) -> bool:
        """Whether an answer begins with a heading that the prompt for it does not write."""
        asking = [{"role": "user", "content": "x"}]
        try:
            asked, unasked = self._write(asking, (), True), self._write(asking, (), False)
            whole = self._write([*asking, {"role": "assistant", "content": "\U000f0000"}], (), False)
        except TemplateProblem:
            return False  # a template for other conversations than this one
        if asked != unasked or not whole.startswith(asked):
            return False
        return bool(whole[len(asked) :].partition("\U000f0000")[0].strip())

    def _write(self, messages: Sequence[Message], tools: Sequence[Any], ask: bool) -> str:
        # A token that the tokenizer lacks is undefined, not None, which a template would write as "None"; tools and
        # documents that are not there are None, as in transformers.
        tokens = {"bos_token": self.bos_token, "eos_token": self.eos_token}
        known: dict[str, Any] = {name: token for name, token in tokens.items() if token is not None}
        known |= {"messages": messages, "tools": list(tools) or None, "documents": None, "add_generation_prompt": ask}
        try:
            return self._program.render(known)
        except Exception as error:  # the template is somebody's program: whatever it raises is its answer to this row
            said = str(error).strip() or type(error).__name__
            cure = "change the row, use another template, or data.drop: [template_refuses]"
            message = f"template {self.name}: it does not take this conversation: {said}; {cure}"
            raise TemplateProblem("template_refuses", message) from error

    @cached_property
    def _program(self) -> Program:
        return Program(self.source, date=self.date)


def choose_template(name: str, base: Base, *, date: str) -> Template:
    """The template a recipe asks for; `auto` is the base's own, else alpaca.

    Raises:
        UserError: an unknown name, a missing file, a template that is not valid Jinja, control tokens that the base's
            tokenizer does not have, or a date that is none.
    """
    if name == "auto" and base.chat_template:
        name, source = "base", base.chat_template
    else:
        name = "alpaca" if name == "auto" else name
        source = _named_source(name)
        if not name.endswith(".jinja"):
            _refuse_missing_tokens(name, base)
    template = Template(name, source, base.bos_token, base.eos_token, parse_date(date))
    try:
        template.text([Turn("user", "x")], add_generation_prompt=True)
    except TemplateProblem as error:
        message = f"{name} does not render one user turn: {error.__cause__}; correct it, or choose another"
        raise UserError(Problem("data.template", message)) from error
    return template


def template_without_base(name: str, *, bos_token: str, eos_token: str, date: str) -> Template:
    """One of ours or a file's, told these tokens; for estimating, because no tokenizer says whether it has them.

    Raises:
        UserError: an unknown name, a missing file, or a date that is none.
    """
    return Template(name, _named_source(name), bos_token, eos_token, parse_date(date))


def _refuse_missing_tokens(name: str, base: Base) -> None:
    missing = _missing_tokens(name, base)
    if not missing:
        return
    working = ", ".join(each for each in CONTROL_TOKENS if not _missing_tokens(each, base)) or "none of ours"
    what = ", ".join("eos_token (it names none)" if token == "eos_token" else token for token in missing)
    message = f"{name} writes control tokens that this base's tokenizer does not have as one token: {what}"
    raise UserError(Problem("data.template", f"{message}; templates that work with it: {working}, or a .jinja file"))


def _missing_tokens(name: str, base: Base) -> list[str]:
    known = {"eos_token": base.eos_token}
    wanted = {token: known.get(token, token) for token in CONTROL_TOKENS[name]}
    return [
        token
        for token, text in wanted.items()
        if text is None or (text not in base.special_tokens and base.tokenizer.token_to_id(text) is None)
    ]


def parse_date(text: str) -> datetime:
    """The day a template is told, from `26 Jul 2024` or `2024-07-26`."""
    for date_format in DATE_FORMATS:
        try:
            return datetime.strptime(text, date_format)
        except ValueError:
            continue
    raise UserError(Problem("data.date", f"not a date: {text!r}; write it as 26 Jul 2024 or 2024-07-26"))


def _named_source(name: str) -> str:
    return _read_source(Path(name).expanduser()) if name.endswith(".jinja") else _ours(name)


def _read_source(file: Path) -> str:
    if not file.is_file():
        raise UserError(Problem("data.template", f"no such file: {file}"))
    try:
        return file.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise UserError(Problem("data.template", f"{file} is not UTF-8 text at byte {error.start}")) from error


def _ours(name: str) -> str:
    file = OURS / f"{name}.jinja"
    if not file.is_file():
        known = ", ".join(sorted(path.stem for path in OURS.glob("*.jinja")))
        raise UserError(Problem("data.template", f"unknown template {name!r}; ours: {known}; or give a .jinja file"))
    return file.read_text(encoding="utf-8")


@contextmanager
def _refusing_deep_values(name: str) -> Iterator[None]:
    try:
        yield
    except RecursionError as error:
        message = f"template {name}: a tool or call is nested too deeply; flatten it, or data.drop: [template_refuses]"
        raise TemplateProblem("template_refuses", message) from error


def _messages(turns: Sequence[Turn]) -> list[Message]:
    """The turns as transformers hands messages to a template; what a turn does not have is no key."""
    return [_message(turn) for turn in turns]


def _message(turn: Turn) -> Message:
    if not isinstance(turn, Turn) or not (turn.tool_calls or turn.name or turn.tool_call_id):
        return {"role": turn.role, "content": turn.text}
    message: dict[str, Any] = {"role": turn.role, "content": turn.text}
    if turn.tool_calls:
        message["tool_calls"] = [
            {"id": call.id, "type": "function", "function": {"name": call.name, "arguments": call.arguments}}
            for call in turn.tool_calls
        ]
    if turn.tool_call_id is not None:
        message["tool_call_id"] = turn.tool_call_id
    if turn.name is not None:
        message["name"] = turn.name
    return message
