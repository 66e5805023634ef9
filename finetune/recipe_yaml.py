"""Read the text of a recipe: YAML or JSON in; plain values, the line of every key and everything wrong with it out."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from finetune.errors import Problem, UserError

Keys = tuple[str | int, ...]  # ("train", "epochs"), or ("output", "log_to", 1) for one item of a list

LARGEST_RECIPE_BYTES = 2**20
DEEPEST_NESTING = 16  # a recipe needs 3; the limit keeps "[[[[..." from reaching Python's own


@dataclass(frozen=True)
class Flaw:
    """Something wrong at a place of the text.

    `column` is 0 where the line says enough; `unread` means that the value there stands as None.
    """

    line: int
    keys: Keys
    message: str
    column: int = 0
    unread: bool = False


@dataclass(frozen=True)
class Document:
    """One YAML document as plain values, with the line of each key (of each item, in a list)."""

    values: Any
    lines: dict[Keys, int] = field(default_factory=dict)
    flaws: tuple[Flaw, ...] = ()


def read_recipe_file(path: Path) -> str:
    """The text of a recipe.

    Raises:
        UserError: if there is no such file, or it is not a small UTF-8 text.
    """
    try:
        if path.is_dir():
            raise UserError(Problem(str(path), "a recipe is a file, this is a folder; name the .yaml file in it"))
        if path.stat().st_size > LARGEST_RECIPE_BYTES:
            raise UserError(Problem(str(path), "too large for a recipe (over 1 MiB); name a recipe, not a data file"))
        raw = path.read_bytes()
    except FileNotFoundError:
        cure = "`finetune recipes` lists the shipped recipes, `finetune recipes copy NAME` brings one here"
        raise UserError(Problem(str(path), f"no such file; {cure}")) from None
    except (OSError, ValueError) as error:  # ValueError: a NUL in the path
        raise UserError(Problem(str(path), f"cannot be read: {getattr(error, 'strerror', None) or error}")) from None
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        raise UserError(Problem(f"{path}:{line}", "not UTF-8 text; save the recipe as UTF-8")) from None


# --- YAML 1.2 core, not the YAML 1.1 that PyYAML speaks: `2e-4` is a number; no, on and 2024-07-26 stay text ---

_REFUSED = "refused:"
_INT, _FLOAT, _BOOL, _NULL, _STR = (f"tag:yaml.org,2002:{name}" for name in ("int", "float", "bool", "null", "str"))
_CORE = [
    (_NULL, re.compile(r"(?:~|null|Null|NULL|)\Z")),
    (_BOOL, re.compile(r"(?:true|True|TRUE|false|False|FALSE)\Z")),
    (_INT, re.compile(r"(?:[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+)\Z")),
    (_FLOAT, re.compile(r"[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?\Z")),
]


class _RecipeLoader(yaml.SafeLoader):
    """SafeLoader with the core schema; tags, anchors and aliases become nodes with a refused tag."""

    yaml_implicit_resolvers: dict[Any, Any] = {None: _CORE}  # None: whatever the first character is
    depth = 0

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        event = self.peek_event()  # type: ignore[no-untyped-call]  # here and below: types-PyYAML is incomplete
        if isinstance(event, yaml.AliasEvent):
            self.get_event()  # type: ignore[no-untyped-call]
            tag = f"{_REFUSED}the alias *{event.anchor}"
            return yaml.ScalarNode(tag, "", event.start_mark, event.end_mark)  # type: ignore[arg-type]
        if event.anchor is not None:
            event.tag, event.anchor = f"{_REFUSED}the anchor &{event.anchor}", None
        elif event.tag is not None:
            event.tag = f"{_REFUSED}the tag {event.tag.replace('tag:yaml.org,2002:', '!!')}"
        self.depth += 1
        if self.depth > DEEPEST_NESTING:
            raise yaml.MarkedYAMLError(problem="nested too deeply", problem_mark=event.start_mark)
        node = super().compose_node(parent, index)
        self.depth -= 1
        return node


_PLAIN_WORDING = {
    "mapping values are not allowed here": "a second `: ` on this line, or a wrong indentation; "
    "put a value that holds `: ` in quotes",
    "found character '\\t' that cannot start any token": "a tab cannot indent; use spaces",
    "could not find expected ':'": "a `:` is missing after a key",
    "expected <block end>, but found '<block mapping start>'": "this line is indented unlike the lines above it",
}


def read_document(text: str) -> Document:
    """The values of a YAML or JSON text that holds one document; an empty text is None."""
    try:
        loader = _RecipeLoader(_yaml_of_json(text))
        node = loader.get_node() if loader.check_node() else None
        if loader.check_node():
            line = loader.peek_event().start_mark.line + 1  # type: ignore[no-untyped-call]
            return Document(None, flaws=(Flaw(line, (), "a second document starts here; one file is one recipe"),))
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        assert mark is not None
        reason = _PLAIN_WORDING.get(error.problem or "", error.problem)
        return Document(None, flaws=(Flaw(mark.line + 1, (), f"not readable as YAML: {reason}", mark.column + 1),))
    except yaml.reader.ReaderError as error:
        line = text.count("\n", 0, error.position) + 1
        return Document(None, flaws=(Flaw(line, (), "holds a control character; remove it"),))
    if node is None:
        return Document(None)
    lines: dict[Keys, int] = {}
    flaws: list[Flaw] = []
    return Document(_values(node, (), lines, flaws), lines, tuple(flaws))


def _yaml_of_json(text: str) -> str:
    """JSON in the spelling PyYAML reads the same way; any other text as it is.

    In valid JSON a tab stands only between tokens, and a character outside ASCII only inside a string.
    """
    if not text.lstrip().startswith("{"):
        return text
    try:
        json.loads(text)
    except (ValueError, RecursionError):
        return text
    return text.replace("\t", " ").replace("\x7f", "\\x7f").encode("ascii", "backslashreplace").decode("ascii")


def _values(node: yaml.Node, keys: Keys, lines: dict[Keys, int], flaws: list[Flaw]) -> Any:
    """Plain values of a node; fills `lines` and `flaws`."""
    lines.setdefault(keys, node.start_mark.line + 1)
    try:
        if node.tag.startswith(_REFUSED):
            raise ValueError(f"{node.tag.removeprefix(_REFUSED)} is not read in a recipe; write the value itself")
        if isinstance(node, yaml.MappingNode):
            return _mapping(node, keys, lines, flaws)
        if isinstance(node, yaml.SequenceNode):
            return [_values(item, (*keys, i), lines, flaws) for i, item in enumerate(node.value)]
        return _scalar(node.tag, node.value)
    except ValueError as error:
        flaws.append(Flaw(node.start_mark.line + 1, keys, str(error), unread=True))
        return None


def _mapping(node: yaml.MappingNode, keys: Keys, lines: dict[Keys, int], flaws: list[Flaw]) -> dict[str, Any]:
    values: dict[str, Any] = {}
    for key_node, value_node in node.value:
        line = key_node.start_mark.line + 1
        if not isinstance(key_node, yaml.ScalarNode) or key_node.tag.startswith(_REFUSED):
            flaws.append(Flaw(line, keys, "a key must be one plain word"))
            continue
        key = key_node.value
        here = (*keys, key)
        if key in values:
            flaws.append(Flaw(line, here, f"repeated key, first written on line {lines[here]}; keep one of the two"))
            continue
        lines[here] = line
        values[key] = _values(value_node, here, lines, flaws)
    return values


def _scalar(tag: str, text: str) -> None | bool | int | float | str:
    """Raises ValueError, with the reason in plain words, for a value that two readers would take differently."""
    if tag == _NULL:
        return None
    if tag == _BOOL:
        return text.lower() == "true"
    if tag == _FLOAT:
        return float(text)
    if tag == _STR:
        return _text(text)
    if re.match(r"[-+]?0[0-9]", text):
        meant = text.lstrip("+-0") or "0"
        raise ValueError(f"{text} is 8-based to some readers; write {meant} for the number, '{text}' for the text")
    if len(text) > 30:
        raise ValueError("a number of more than 30 digits; put it in quotes if it is text")
    return int(text, 0)


def _text(text: str) -> str:
    """JSON writes one emoji as two surrogate escapes; PyYAML leaves them apart."""
    if "\0" in text:
        raise ValueError("text must not hold the character NUL")
    try:
        return text.encode("utf-16", "surrogatepass").decode("utf-16")
    except UnicodeDecodeError:
        raise ValueError("text holds half a character (a lone surrogate)") from None
