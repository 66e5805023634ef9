"""Run a chat template's Jinja program: its source in, its text out; no clock, no chance, no end of time or memory.

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
import jinja2.visitor

from finetune.data import bounds

# A template comes from somewhere else. For one row it may go round its loops this often, and write this much.
MOST_ROUNDS = 10_000_000
MOST_CHARACTERS = 1 << 25
MOST_SOURCE = 1 << 20  # characters of the template itself
COUNTER = "count a round"  # filters with names that no template can write
WEIGH = "weigh"
JOIN = "join values"


class Program:
    """A compiled template; the same values always give the same text."""

    def __init__(self, source: str, *, date: datetime) -> None:
        self._rounds = 0
        self._out_of_time: bounds.OutOfTime | None = None
        if len(source) > MOST_SOURCE:
            bounds.refuse("its source")
        environment = _Environment(
            trim_blocks=True, lstrip_blocks=True, extensions=[_GenerationBlock, jinja2.ext.loopcontrols]
        )
        environment.filters |= {"tojson": bounds.guarded_filter("tojson", _tojson), "random": _refuse_chance}
        environment.filters |= {COUNTER: self._count_round, WEIGH: bounds.weighed, JOIN: bounds.joined_values}
        environment.globals["raise_exception"] = _raise_exception
        environment.globals["strftime_now"] = date.strftime
        environment.globals["dict"] = _Dict()
        environment.globals["namespace"] = _Namespace
        environment.globals["lipsum"] = _refuse_chance
        with bounds.bounded():
            tree = _with_counted_loops(environment.parse(source), environment)
            self._template = environment.from_string(tree)

    def render(self, values: Mapping[str, Any]) -> str:
        """What the program writes; raises whatever it raises."""
        if self._out_of_time:  # rather than wait as long for every row
            raise self._out_of_time
        self._rounds = 0
        try:
            with bounds.bounded():
                return self._write(values)
        except bounds.OutOfTime as error:
            self._out_of_time = error
            raise
        except MemoryError as error:
            message = f"it takes more than {bounds.MOST_BYTES >> 20} MiB of memory for one conversation"
            raise jinja2.TemplateError(message) from error

    def _write(self, values: Mapping[str, Any]) -> str:
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
        if not self._rounds & 63:
            bounds.check_large()
        if self._rounds > MOST_ROUNDS:
            raise jinja2.TemplateError(f"it goes round its loops more than {MOST_ROUNDS} times for one conversation")


class _Environment(jinja2.sandbox.ImmutableSandboxedEnvironment):
    """Jinja's sandbox, which keeps a template from this program's objects, with bounds on what an operation takes."""

    intercepted_binops = frozenset({"+", "*", "**", "%"})

    def __init__(self, **settings: Any) -> None:
        super().__init__(finalize=bounds.weighed, **settings)
        self.concat = bounds.joined  # type: ignore[assignment]
        self.filters = {name: bounds.guarded_filter(name, run) for name, run in self.filters.items()}
        self.tests = {name: bounds.guarded_test(run) for name, run in self.tests.items()}  # type: ignore[arg-type]

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        if operator == "+" and type(left) is str and type(right) is str and len(left) + len(right) < bounds.LARGE:
            return left + right  # what templates do most
        bounds.check_operation(operator, left, right)
        return self.binop_table[operator](left, right)

    def call(__self, __context: Any, __obj: Any, *args: Any, **kwargs: Any) -> Any:  # noqa: B902, N805
        bounds.check_call(__obj, args, kwargs)
        return super().call(__context, __obj, *args, **kwargs)

    def getitem(self, obj: Any, argument: Any) -> Any:
        if type(argument) is tuple:  # to find a key is to compare it
            bounds.weigh(argument)
        return super().getitem(obj, argument)


def _with_counted_loops(
    tree: jinja2.nodes.Template, environment: jinja2.sandbox.ImmutableSandboxedEnvironment
) -> jinja2.nodes.Template:
    """The same program that counts each round of a loop and each call of a macro, and weighs what it compares."""
    repeated: list[jinja2.nodes.For | jinja2.nodes.Macro] = [*tree.find_all(jinja2.nodes.For)]
    for node in [*repeated, *tree.find_all(jinja2.nodes.Macro)]:
        zero = jinja2.nodes.Const(0, lineno=node.lineno)
        node.body.insert(0, jinja2.nodes.ExprStmt(_filtered(zero, COUNTER), lineno=node.lineno))
    weighing: jinja2.nodes.Template = _Weighing().visit(tree)
    weighing.set_environment(environment)
    return weighing


def _filtered(node: jinja2.nodes.Expr, name: str) -> jinja2.nodes.Filter:
    return jinja2.nodes.Filter(node, name, [], [], None, None, lineno=node.lineno)


def _is_constant(node: jinja2.nodes.Node) -> bool:
    if isinstance(node, (jinja2.nodes.List, jinja2.nodes.Tuple)):
        return all(map(_is_constant, node.items))
    return isinstance(node, jinja2.nodes.Const)


class _Weighing(jinja2.visitor.NodeTransformer):
    """Operations that Jinja has no hook for: `~`, and what compares or hashes two values that are no constants."""

    def visit_Concat(self, node: jinja2.nodes.Concat) -> jinja2.nodes.Node:  # noqa: N802
        self.generic_visit(node)
        return _filtered(jinja2.nodes.List(node.nodes, lineno=node.lineno), JOIN)

    def visit_Compare(self, node: jinja2.nodes.Compare) -> jinja2.nodes.Node:  # noqa: N802
        self.generic_visit(node)
        values = [node.expr, *(operand.expr for operand in node.ops)]
        if sum(map(_is_constant, values)) + 1 < len(values):
            node.expr = _filtered(node.expr, WEIGH)
            for operand in node.ops:
                operand.expr = _filtered(operand.expr, WEIGH)
        return node

    def visit_Pair(self, node: jinja2.nodes.Pair) -> jinja2.nodes.Node:  # noqa: N802
        self.generic_visit(node)
        if not _is_constant(node.key):
            node.key = _filtered(node.key, WEIGH)
        return node


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
