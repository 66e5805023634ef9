"""Evaluate the part of Go's text/template that our Ollama templates are written in: source and values in, text out.

It knows if, with, range, define, template, variables, white-space trimming and the functions of go_expression.py, and
refuses everything else. As in Go a string is its UTF-8 bytes: `len` counts and `slice` cuts bytes.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

from finetune.release.ollama.go_expression import Expression, GoTemplateError, Scope, expression_of, tokens_of, unquoted

ACTION = re.compile(r'\{\{(-(?=\s))?((?:"(?:\\.|[^"\\])*"|`[^`]*`|[^"`])*?)((?<=\s)-)?\}\}', re.DOTALL)
SPACES = b" \t\r\n"


@dataclass(frozen=True)
class Branch:
    """if, with or range, whose `names` are those of index and item."""

    kind: str
    expression: Expression
    names: tuple[str, ...]
    body: Sequence[Any]
    other: Sequence[Any]


@dataclass(frozen=True)
class Call:
    """{{ template "name" value }}"""

    name: str
    expression: Expression


@dataclass(frozen=True)
class Set:
    """{{ $name := value }}, or with `=` where the variable is there already."""

    name: str
    expression: Expression
    is_new: bool


@dataclass(frozen=True)
class GoTemplate:
    """A parsed template and those that it defines."""

    body: Sequence[Any]
    defined: Mapping[str, Sequence[Any]]

    def render(self, values: Mapping[str, Any]) -> str:
        """The text that the template writes; strings in `values` are text.

        Raises:
            GoTemplateError: Go would stop here too.
        """
        out: list[bytes] = []
        data = _as_go(values)
        stack: list[tuple[Iterator[Any], Any, Scope]] = [(iter(self.body), data, Scope({"$": data}))]
        while stack:  # no recursion: a template may call itself once for each byte of a text
            nodes, dot, scope = stack[-1]
            node = next(nodes, None)
            if node is None:
                stack.pop()
            elif isinstance(node, bytes):
                out.append(node)
            elif isinstance(node, Set):
                target = scope.values if node.is_new else scope.holder(node.name)
                target[node.name] = node.expression(dot, scope)
            elif isinstance(node, Call):
                value = node.expression(dot, scope)
                stack.append((iter(self._body_of(node.name)), value, Scope({"$": value})))
            elif isinstance(node, Branch):
                stack += reversed([(iter(body), at, inner) for body, at, inner in _entered(node, dot, scope)])
            else:
                out.append(_printed(node(dot, scope)))
        return b"".join(out).decode(errors="replace")

    def _body_of(self, name: str) -> Sequence[Any]:
        if name not in self.defined:
            raise GoTemplateError(f"template {name!r} is not defined")
        return self.defined[name]


@lru_cache(maxsize=32)
def parse(source: str) -> GoTemplate:
    """The template of a source text.

    Raises:
        GoTemplateError: it is not of the part of the language that this file knows.
    """
    parser = _Parser(_pieces(source))
    body, end = parser.block(())
    assert not end
    return GoTemplate(body, parser.defined)


def _entered(node: Branch, dot: Any, scope: Scope) -> list[tuple[Sequence[Any], Any, Scope]]:
    """The blocks that a branch executes, each with its dot and its variables."""
    value = node.expression(dot, scope)
    if not value:
        return [(node.other, dot, Scope({}, scope))]
    if node.kind == "range":
        if not isinstance(value, list):
            raise GoTemplateError(f"range cannot iterate over {value!r}")
        pairs = list(enumerate(value))
        return [
            (node.body, item, Scope(dict(zip(node.names, pair, strict=False)), scope))
            for pair in pairs
            for item in pair[1:]
        ]
    return [(node.body, value if node.kind == "with" else dot, Scope({}, scope))]


def _pieces(source: str) -> list[bytes | str]:
    """Text as bytes and the insides of actions as str, in order, with the white space that `-` takes away gone."""
    pieces: list[bytes | str] = []
    place, trims = 0, False
    for found in ACTION.finditer(source):
        text = source[place : found.start()].encode()
        text = text.lstrip(SPACES) if trims else text
        pieces.append(text.rstrip(SPACES) if found[1] else text)
        pieces.append(found[2].strip())
        place, trims = found.end(), bool(found[3])
    text = source[place:].encode()
    if b"{{" in text:
        raise GoTemplateError("an action is not closed")
    pieces.append(text.lstrip(SPACES) if trims else text)
    return [piece for piece in pieces if piece != b""]


@dataclass
class _Parser:
    pieces: list[bytes | str]
    place: int = 0
    defined: dict[str, Sequence[Any]] = field(default_factory=dict)

    def block(self, ends: tuple[str, ...]) -> tuple[list[Any], str]:
        """The nodes up to one of the actions named in `ends`, and that action."""
        nodes: list[Any] = []
        while self.place < len(self.pieces):
            piece = self.pieces[self.place]
            self.place += 1
            if isinstance(piece, bytes):
                nodes.append(piece)
                continue
            word, _, rest = piece.partition(" ")
            if word in ends:
                return nodes, piece
            if word in ("if", "with", "range"):
                nodes.append(self.branch(word, rest))
            elif word == "define":
                (name,) = tokens_of(rest)
                self.defined[unquoted(name[1])], _ = self.block(("end",))
            elif not piece.startswith("/*"):
                nodes.append(_simple(word, piece, rest))
        if ends:
            raise GoTemplateError("an end is missing")
        return nodes, ""

    def branch(self, kind: str, rest: str) -> Branch:
        names, expression = _declared(tokens_of(rest)) if kind == "range" else ((), expression_of(tokens_of(rest)))
        body, end = self.block(("else", "end"))
        other: list[Any] = []
        if end.startswith("else "):
            word, _, inner = end.removeprefix("else ").lstrip().partition(" ")
            other = [self.branch(word, inner)]
        elif end == "else":
            other, _ = self.block(("end",))
        return Branch(kind, expression, names, body, other)


def _simple(word: str, piece: str, rest: str) -> Any:
    if word == "template":
        (name, *value) = tokens_of(rest)
        return Call(unquoted(name[1]), expression_of(value))
    tokens = tokens_of(piece)
    if len(tokens) > 1 and tokens[1] in (("sign", ":="), ("sign", "=")):
        return Set(tokens[0][1], expression_of(tokens[2:]), tokens[1][1] == ":=")
    return expression_of(tokens)


def _declared(tokens: list[tuple[str, str]]) -> tuple[tuple[str, ...], Expression]:
    """The variables of a range, in Go's order, and what it goes through."""
    if ("sign", ":=") not in tokens:
        return (), expression_of(tokens)
    cut = tokens.index(("sign", ":="))
    names = tuple(text for kind, text in tokens[:cut] if kind == "path")
    return (names if len(names) == 2 else ("", *names)), expression_of(tokens[cut + 1 :])


def _as_go(value: Any) -> Any:
    if isinstance(value, str):
        return value.encode()
    if isinstance(value, Mapping):
        return {key: _as_go(each) for key, each in value.items()}
    return [_as_go(each) for each in value] if isinstance(value, (list, tuple)) else value


def _printed(value: Any) -> bytes:
    if isinstance(value, bytes):
        return value
    if isinstance(value, bool):
        return b"true" if value else b"false"
    if isinstance(value, int):
        return str(value).encode()
    raise GoTemplateError(f"cannot write {value!r}")
