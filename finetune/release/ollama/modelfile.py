"""Ollama's Modelfile: instructions in, text out, and back as Ollama's own parser reads it."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from finetune.errors import Problem, UserError

FILE = "Modelfile"
COMMANDS = ("from", "license", "template", "system", "adapter", "parameter")
LINE_END = re.compile(r"[\r\n]")
HEAD = re.compile(r"([A-Za-z]+)[ \t]")
PARAMETER = re.compile(r"(\w+)[ \t]")
SPACES = " \t\r\n"


@dataclass(frozen=True)
class Modelfile:
    """What a Modelfile says; without `template` Ollama chooses one by itself."""

    weights: str  # the name of a file in the same folder
    parameters: Mapping[str, Any]
    stops: Sequence[str]
    template: str | None = None
    system: str | None = None
    licenses: Sequence[str] = ()
    comments: Sequence[str] = field(default=(), compare=False)


def modelfile_text(modelfile: Modelfile) -> str:
    """The file's text.

    Raises:
        UserError: Ollama would read one of the texts in another way than it is.
    """
    lines = [f"# {line}" for comment in modelfile.comments for line in comment.splitlines()]
    lines.append(f"FROM ./{modelfile.weights}")
    lines += [f"PARAMETER {name} {value}" for name, value in modelfile.parameters.items()]
    lines += [f"PARAMETER stop {_quoted(stop)}" for stop in modelfile.stops]
    texts = [("TEMPLATE", modelfile.template), ("SYSTEM", modelfile.system)]
    texts += [("LICENSE", license) for license in modelfile.licenses]
    lines += [f"{command} {_quoted(text)}" for command, text in texts if text is not None]
    text = "\n".join(lines) + "\n"
    if read_modelfile(text) != modelfile:
        message = "holds invisible characters or three double quotes, which a Modelfile cannot; change the text"
        raise UserError(Problem("Modelfile", f"one of system, stop tokens, template and licence {message}"))
    return text


def read_modelfile(text: str) -> Modelfile:
    """A Modelfile as Ollama reads it: characters that are not printable are lost, the first FROM counts.

    Raises:
        ValueError: Ollama refuses it.
    """
    found: dict[str, list[str]] = {name: [] for name in COMMANDS}
    parameters: dict[str, Any] = {}
    stops: list[str] = []
    for command, name, value in _instructions(text):
        if command != "parameter":
            found[command].append(value)
        elif name == "stop":
            stops.append(value)
        else:
            parameters[name] = _number(value)
    if not found["from"]:
        raise ValueError("no FROM line")
    last = {name: (values or [None])[-1] for name, values in found.items()}  # type: ignore[list-item]
    weights = found["from"][0].removeprefix("./")
    return Modelfile(weights, parameters, tuple(stops), last["template"], last["system"], tuple(found["license"]))


def readable(text: str) -> str:
    """A text without what a Modelfile cannot hold: for a licence, where a form feed means nothing."""
    return "".join(sign for sign in text if _stays(sign)).replace('"""', "'''")


def _instructions(text: str) -> list[tuple[str, str, str]]:
    """Command, parameter's name and value, one after the other."""
    instructions: list[tuple[str, str, str]] = []
    place = 0
    while True:
        while place < len(text) and text[place] in SPACES:
            place += 1
        if place == len(text):
            return instructions
        if text[place] == "#":
            place = _line_end(text, place)
            continue
        head = HEAD.match(text, place)
        if head is None or head[1].lower() not in COMMANDS:
            raise ValueError(f"no command: {text[place : place + 20]!r}")
        command, name, place = head[1].lower(), "", head.end()
        if command == "parameter":
            named = PARAMETER.match(text, place)
            if named is None:
                raise ValueError("a parameter without a name or a value")
            name, place = named[1], named.end()
        value, place = _value(text, place)
        instructions.append((command, name, value))


def _value(text: str, place: int) -> tuple[str, int]:
    """The value that begins here: to the end of its line or, in quotes, to quotes before the end of a line."""
    start = place
    while True:
        place = _line_end(text, place)
        said = "".join(sign for sign in text[start:place] if _stays(sign)).strip(SPACES)
        quotes = '"""' if said.startswith('"""') else '"' if said.startswith('"') else ""
        if said.endswith(quotes) and len(said) >= 2 * len(quotes):
            return said[len(quotes) : len(said) - len(quotes)] if quotes else said, place
        if place == len(text):
            raise ValueError("quotes are not closed")
        place += 1


def _line_end(text: str, place: int) -> int:
    found = LINE_END.search(text, place)
    return found.start() if found else len(text)


def _stays(sign: str) -> bool:
    return sign.isprintable() or sign in SPACES


def _quoted(text: str) -> str:
    return f'"""{text}"""' if '"' in text or "\n" in text else f'"{text}"'


def _number(value: str) -> Any:
    return float(value) if "." in value or "e" in value else int(value)
