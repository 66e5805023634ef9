"""Render conversations: turns in, text and the spans of the assistant's answers out. The only way text is made."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from functools import cached_property
from hashlib import sha256
from pathlib import Path
from typing import Any

import jinja2
import jinja2.ext
import jinja2.sandbox

from finetune.base import Base
from finetune.data.conversations import Turn
from finetune.errors import Problem, UserError

OURS = Path(__file__).parent / "templates"
DATE_FORMATS = ("%d %b %Y", "%Y-%m-%d")


@dataclass(frozen=True)
class Rendered:
    """A conversation as one text; `spans` are the character ranges [start, end) of the assistant's turns."""

    text: str
    spans: tuple[tuple[int, int], ...]


class TemplateProblem(Exception):
    """Why a conversation cannot be rendered, or its answers not be found in the text."""


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

    @cached_property
    def _compiled(self) -> jinja2.Template:
        # The environment of transformers/utils/chat_template_utils.py, so that a released tokenizer renders the same.
        environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=[_GenerationBlock, jinja2.ext.loopcontrols]
        )
        environment.filters["tojson"] = _tojson
        environment.globals["raise_exception"] = _raise_exception
        environment.globals["strftime_now"] = self.date.strftime
        return environment.from_string(self.source)

    def text(self, turns: Sequence[Turn], *, add_generation_prompt: bool) -> str:
        """The turns as text; with `add_generation_prompt` up to where the assistant starts to speak.

        Raises:
            TemplateProblem: the template refuses these turns.
        """
        messages = [{"role": turn.role, "content": turn.text} for turn in turns]
        # A token that the tokenizer lacks is undefined, not None, which a template would write as "None".
        tokens = {"bos_token": self.bos_token, "eos_token": self.eos_token}
        known = {name: token for name, token in tokens.items() if token is not None}
        try:
            return self._compiled.render(messages=messages, add_generation_prompt=add_generation_prompt, **known)
        except (jinja2.TemplateError, TypeError, ValueError, KeyError) as error:
            raise TemplateProblem(str(error)) from error

    def render(self, turns: Sequence[Turn]) -> Rendered:
        """The whole conversation and where the assistant's turns stand in it.

        A turn's span starts where the text that asks for it ends, and ends with what the template writes for the turn.
        Both come from rendering the conversation's beginnings: a template that rewrites its beginnings when more
        turns follow has no such spans and is refused.

        Raises:
            TemplateProblem: the template refuses these turns, or a beginning is not a beginning of the whole.
        """
        whole = self.text(turns, add_generation_prompt=False)
        spans = []
        for index, turn in enumerate(turns):
            if turn.role == "assistant":
                before = self.text(turns[:index], add_generation_prompt=True)
                after = self.text(turns[: index + 1], add_generation_prompt=False)
                if not (after.startswith(before) and whole.startswith(after)):
                    raise TemplateProblem(
                        f"template {self.name}: what it writes for turn {index + 1} changes with what follows, "
                        "so the answer's place cannot be proven; use another template"
                    )
                # What only separates turns (chatml's newline after <|im_end|>) is nothing the model has to say.
                said = after[len(before) :].rstrip()
                spans.append((len(before), len(before) + len(said)))
        return Rendered(whole, tuple(spans))


def choose_template(name: str, base: Base, *, date: str) -> Template:
    """The template a recipe asks for; `auto` is the base's own, else alpaca.

    Raises:
        UserError: an unknown name, a missing file, a template that is not valid Jinja, or a date that is none.
    """
    if name == "auto":
        name, source = ("base", base.chat_template) if base.chat_template else ("alpaca", _ours("alpaca"))
    elif name.endswith(".jinja"):
        source = _read_source(Path(name).expanduser())
    else:
        source = _ours(name)
    template = Template(name, source, base.bos_token, base.eos_token, parse_date(date))
    try:
        template.text([Turn("user", "x")], add_generation_prompt=True)
    except TemplateProblem as error:
        raise UserError(Problem("data.template", f"{name} does not render one user turn: {error}")) from error
    return template


def parse_date(text: str) -> datetime:
    """The day a template is told, from `26 Jul 2024` or `2024-07-26`."""
    for date_format in DATE_FORMATS:
        try:
            return datetime.strptime(text, date_format)
        except ValueError:
            continue
    raise UserError(Problem("data.date", f"not a date: {text!r}; write it as 26 Jul 2024 or 2024-07-26"))


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


def _tojson(value: Any, indent: int | None = None) -> str:
    return json.dumps(value, ensure_ascii=False, indent=indent)


def _raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)


class _GenerationBlock(jinja2.ext.Extension):
    """`{% generation %}...{% endgeneration %}`, which some templates carry, renders its content."""

    tags = {"generation"}

    def parse(self, parser: Any) -> Any:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)
