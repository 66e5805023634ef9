"""Expressions of Go's text/template: the inside of an action in, a function of dot and the variables out."""

from __future__ import annotations

import operator
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

TOKEN = re.compile(
    r'\s*(?:(?P<string>"(?:\\.|[^"\\\n])*")|(?P<number>\d+)|(?P<path>\$\w*(?:\.\w+)*|(?:\.\w+)+|\.)'
    r"|(?P<word>[A-Za-z]\w*)|(?P<sign>:=|[(),=]))",
)
ESCAPE = re.compile(r"\\(?:x([0-9a-f]{2})|u([0-9a-f]{4})|(.))")
ESCAPES = {"n": b"\n", "t": b"\t", "r": b"\r", "v": b"\v", "f": b"\f", '"': b'"', "\\": b"\\"}

Expression = Callable[[Any, "Scope"], Any]
Operands = Sequence[Callable[[], Any]]  # not evaluated yet: `and` and `or` stop early


class GoTemplateError(ValueError):
    """A template that cannot be read, or values that it cannot be executed with."""


@dataclass
class Scope:
    """The variables that a block sees: its own and those of the blocks around it."""

    values: dict[str, Any]
    parent: Scope | None = None

    def holder(self, name: str) -> dict[str, Any]:
        scope: Scope | None = self
        while scope is not None:
            if name in scope.values:
                return scope.values
            scope = scope.parent
        raise GoTemplateError(f"undefined variable {name}")


def tokens_of(text: str) -> list[tuple[str, str]]:
    """Kind and text of every token of an action."""
    tokens, place = [], 0
    while text[place:].strip():
        found = TOKEN.match(text, place)
        if found is None:
            raise GoTemplateError(f"cannot read {text[place:].strip()!r}")
        tokens.append((str(found.lastgroup), found[found.lastgroup or 0]))
        place = found.end()
    return tokens


def expression_of(tokens: list[tuple[str, str]]) -> Expression:
    """What all of these tokens say together."""
    expression, rest = _command(tokens)
    if rest:
        raise GoTemplateError(f"cannot read {' '.join(text for _, text in rest)!r}")
    return expression


def _command(tokens: list[tuple[str, str]]) -> tuple[Expression, list[tuple[str, str]]]:
    """One operand, or a function with its operands; and what is left."""
    if not tokens:
        raise GoTemplateError("an expression is missing")
    kind, text = tokens[0]
    if kind != "word":
        return _operand(tokens)
    if text not in FUNCTIONS:
        raise GoTemplateError(f"function {text!r} is not known")
    operands, rest = [], tokens[1:]
    while rest and rest[0] != ("sign", ")"):
        operand, rest = _operand(rest)
        operands.append(operand)
    function = FUNCTIONS[text]
    return (lambda dot, scope: function([partial(operand, dot, scope) for operand in operands])), rest


def _operand(tokens: list[tuple[str, str]]) -> tuple[Expression, list[tuple[str, str]]]:
    (kind, text), rest = tokens[0], tokens[1:]
    if (kind, text) == ("sign", "("):
        inner, rest = _command(rest)
        if not rest or rest[0] != ("sign", ")"):
            raise GoTemplateError("a ) is missing")
        return inner, rest[1:]
    if kind == "string":
        value: Any = unquoted(text).encode("utf-8", "surrogateescape")
        return (lambda dot, scope: value), rest
    if kind == "number":
        return (lambda dot, scope: int(text)), rest
    if kind == "path":
        first, *names = text.split(".") if text != "." else [""]
        return (lambda dot, scope: _reached(scope.holder(first)[first] if first else dot, names)), rest
    raise GoTemplateError(f"{text!r} is no value")


def _reached(value: Any, names: Sequence[str]) -> Any:
    for name in names:
        if not isinstance(value, dict) or name not in value:
            raise GoTemplateError(f"there is no field {name}")
        value = value[name]
    return value


def unquoted(text: str) -> str:
    """What a string in double quotes says; bytes that are no UTF-8 as surrogates."""

    def read(found: re.Match[str]) -> bytes:
        if found[1]:
            return bytes.fromhex(found[1])
        if found[2]:
            return chr(int(found[2], 16)).encode()
        if found[3] not in ESCAPES:
            raise GoTemplateError(f"unknown escape {found[0]}")
        return ESCAPES[found[3]]

    parts, place = [], 1
    for found in ESCAPE.finditer(text, 1, len(text) - 1):
        parts += [text[place : found.start()].encode(), read(found)]
        place = found.end()
    return b"".join([*parts, text[place:-1].encode()]).decode("utf-8", "surrogateescape")


def _compared(compare: Callable[[Any, Any], bool], left: Any, right: Any) -> bool:
    if type(left) is not type(right):
        raise GoTemplateError(f"incompatible types for comparison: {left!r}, {right!r}")
    return compare(left, right)


def _and(operands: Operands) -> Any:
    for operand in operands:
        value = operand()
        if not value:
            break
    return value


def _or(operands: Operands) -> Any:
    for operand in operands:
        value = operand()
        if value:
            break
    return value


def _equal(operands: Operands) -> bool:
    left, *others = [operand() for operand in operands]
    return any(_compared(operator.eq, left, other) for other in others)


def _index(operands: Operands) -> Any:
    values, place = [operand() for operand in operands]
    if not isinstance(values, list) or not 0 <= place < len(values):
        raise GoTemplateError(f"index out of range: {place}")
    return values[place]


def _slice(operands: Operands) -> Any:
    value, *places = [operand() for operand in operands]
    start = places[0] if places else 0
    end = places[1] if len(places) > 1 else len(value)
    if not 0 <= start <= end <= len(value):
        raise GoTemplateError(f"slice out of range: {start} to {end} of {len(value)}")
    return value[start:end]


def _two(compare: Callable[[Any, Any], bool]) -> Callable[[Operands], bool]:
    return lambda operands: _compared(compare, *[operand() for operand in operands])


FUNCTIONS: dict[str, Callable[[Operands], Any]] = {
    "and": _and,
    "or": _or,
    "not": lambda operands: not operands[0](),
    "eq": _equal,
    "ne": _two(operator.ne),
    "lt": _two(operator.lt),
    "le": _two(operator.le),
    "gt": _two(operator.gt),
    "ge": _two(operator.ge),
    "len": lambda operands: len(operands[0]()),
    "index": _index,
    "slice": _slice,
}
