"""Run a chat template's Jinja program: its source in, its text out; no clock, no chance, no endless loop.

The environment is the one of transformers/utils/chat_template_utils.py, so that a released tokenizer renders the same.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from datetime import datetime
from typing import Any

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.sandbox
import jinja2.utils

# A template comes from somewhere else. For one row it may go round its loops this often, and write this much.
MOST_ROUNDS = 10_000_000
MOST_CHARACTERS = 1 << 28
COUNTER = "count a round"  # a filter's name that no template can write


class Program:
    """A compiled template; the same values always give the same text."""

    def __init__(self, source: str, *, date: datetime) -> None:
        self._rounds = 0
        environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=[_GenerationBlock, jinja2.ext.loopcontrols]
        )
        environment.filters["tojson"] = _tojson
        environment.filters["random"] = _refuse_chance
        environment.filters[COUNTER] = self._count_round
        environment.globals["raise_exception"] = _raise_exception
        environment.globals["strftime_now"] = date.strftime
        environment.globals["dict"] = _Dict()
        environment.globals["namespace"] = _Namespace
        environment.globals["lipsum"] = _refuse_chance
        self._template = environment.from_string(_with_counted_loops(environment.parse(source), environment))

    def render(self, values: Mapping[str, Any]) -> str:
        """What the program writes; raises whatever it raises."""
        self._rounds = 0
        pieces = []
        length = 0
        for piece in self._template.generate(values):
            pieces.append(piece)
            length += len(piece)
            if length > MOST_CHARACTERS:
                raise jinja2.TemplateError(f"it writes more than {MOST_CHARACTERS} characters for one conversation")
        return "".join(pieces)

    @jinja2.pass_context  # so that Jinja does not work it out once, when it compiles
    def _count_round(self, _: Any, __: Any) -> None:
        self._rounds += 1
        if self._rounds > MOST_ROUNDS:
            raise jinja2.TemplateError(f"it goes round its loops more than {MOST_ROUNDS} times for one conversation")


def _with_counted_loops(
    tree: jinja2.nodes.Template, environment: jinja2.sandbox.ImmutableSandboxedEnvironment
) -> jinja2.nodes.Template:
    """The same program that counts each round of a loop and each call of a macro."""
    repeated: list[jinja2.nodes.For | jinja2.nodes.Macro] = [*tree.find_all(jinja2.nodes.For)]
    for node in [*repeated, *tree.find_all(jinja2.nodes.Macro)]:
        zero = jinja2.nodes.Const(0, lineno=node.lineno)
        count = jinja2.nodes.Filter(zero, COUNTER, [], [], None, None, lineno=node.lineno)
        node.body.insert(0, jinja2.nodes.ExprStmt(count, lineno=node.lineno))
    tree.set_environment(environment)
    return tree


def _tojson(
    value: Any, ensure_ascii: bool = False, indent: Any = None, separators: Any = None, sort_keys: bool = False
) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)


def _refuse_chance(*_: Any, **__: Any) -> None:
    raise jinja2.TemplateError("it asks for chance, and the same row must always be the same text")


class _Dict:
    """`dict` without the ways out of the sandbox that the type itself offers."""

    def __call__(self, *args: Any, **kwargs: Any) -> dict[Any, Any]:
        return dict(*args, **kwargs)

    def fromkeys(self, *args: Any) -> dict[Any, Any]:
        return dict.fromkeys(*args)


class _Namespace(jinja2.utils.Namespace):
    """A namespace without names that begin with an underscore."""

    def __init__(*args: Any, **kwargs: Any) -> None:
        self, *rest = args  # so that a template may call one of its values self
        values = dict(*rest, **kwargs)
        for name in values:
            _refuse_underscore(name)
        jinja2.utils.Namespace.__init__(self, values)

    def __setitem__(self, name: str, value: Any) -> None:
        _refuse_underscore(name)
        super().__setitem__(name, value)


def _refuse_underscore(name: Any) -> None:
    if isinstance(name, str) and name.startswith("_"):
        raise jinja2.exceptions.SecurityError(f"a namespace's name begins with an underscore: {name!r}; rename it")


class _GenerationBlock(jinja2.ext.Extension):
    """`{% generation %}...{% endgeneration %}`, which some templates carry, renders its content."""

    tags = {"generation"}

    def parse(self, parser: Any) -> Any:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        # A call block, as in transformers: what the block sets is not seen outside.
        return jinja2.nodes.CallBlock(self.call_method("_content"), [], [], body).set_lineno(line)

    def _content(self, caller: Any) -> Any:
        return caller()
