"""Say in plain words what a recipe's values got wrong: pydantic's errors in, (keys, message) pairs out."""

from __future__ import annotations

import difflib
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from finetune.recipe_yaml import Keys

SOURCE = "SourceSection"  # the part of a pydantic location that says: inside a source written out with keys
SOURCE_KEYS = ("source", "rows", "weight", "columns")
TOP = ""  # stands for the top level where sections are counted by name


@dataclass(frozen=True)
class Expects:
    """What a key of several types takes, in words; stands in the key's annotation."""

    words: str


# pydantic error type -> our words; {got} is the value as a person wrote it, the other names come from the error.
WORDING = {
    "missing": "is required: {description}",
    "model_type": "a section with keys is required, got {got}",
    "string_type": "text is required, got {got}",
    "int_type": "a whole number is required, got {got}",
    "int_from_float": "a whole number is required, got {got}",
    "bool_type": "true or false is required, got {got}",
    "float_type": "a number is required, got {got}",
    "finite_number": "a finite number is required, got {got}",
    "tuple_type": "a list is required, got {got}",
    "literal_error": "must be {choices}, got {got}",
    "greater_than": "must be more than {gt}, got {got}",
    "greater_than_equal": "must be {ge} or more, got {got}",
    "less_than": "must be less than {lt}, got {got}",
    "less_than_equal": "must be {le} or less, got {got}",
    "string_pattern_mismatch": "must not be blank, got {got}",
    "repeated_item": "{item!r} stands in the list twice",
    "refused": "{value} {reason}",
    "unknown_placeholder": "only {{name}} can stand in braces, got {got}",
}


def explain(
    errors: Iterable[Mapping[str, Any]], *, values: Mapping[str, Any], recipe: type[BaseModel]
) -> Iterator[tuple[Keys, str]]:
    """One (keys, message) for each thing that is wrong with the values; the several errors of a union are one."""
    seen: set[Keys] = set()
    errors = list(errors)
    inner = dict(_inside_sources(errors, values))
    for error in errors:
        loc = error["loc"]
        keys: Keys = loc[:2]
        field = find_field(recipe, keys)
        expects = _expects(field)
        if field is None:
            yield keys, unknown_key(keys, section_keys(recipe))
        elif keys in inner:
            if keys not in seen:
                seen.add(keys)
                yield from inner[keys]
        elif expects is None or error["type"] == "missing":
            yield keys + tuple(part for part in loc[2:] if isinstance(part, int)), _say(error, field)
        elif keys not in seen:
            seen.add(keys)
            yield keys, _say_expected(expects, field, _value_at(values, keys))


def _inside_sources(
    errors: Sequence[Mapping[str, Any]], values: Mapping[str, Any]
) -> Iterator[tuple[Keys, list[tuple[Keys, str]]]]:
    """For each key that holds sources written out with keys: what is wrong inside those, instead of with the whole."""
    for keys in dict.fromkeys(error["loc"][:2] for error in errors):
        found = []
        for error in errors:
            loc = error["loc"]
            if loc[:2] != keys or SOURCE not in loc or loc[-1] == SOURCE:
                continue
            path = keys + tuple(part for part in loc[2:] if isinstance(part, int))
            if isinstance(_value_at(values, path), dict):
                found.append((path + loc[loc.index(SOURCE) + 1 :][:1], _say_in_source(error)))
        if found:
            yield keys, found


def _say_in_source(error: Mapping[str, Any]) -> str:
    if error["type"] == "extra_forbidden":
        near = did_you_mean(str(error["loc"][-1]), SOURCE_KEYS)
        return "unknown key" + (near or f"; possible here: {', '.join(SOURCE_KEYS)}")
    if error["type"] == "missing":
        return "is required: a file, a folder of files, or hub:OWNER/NAME"
    words = {"got": show(error["input"])} | dict(error.get("ctx", {}))
    return WORDING.get(error["type"], "cannot be read, got {got}").format(**words)


def _value_at(values: Any, keys: Keys) -> Any:
    for key in keys:
        values = values[key]
    return values


def _say_expected(expects: Expects, field: FieldInfo, value: Any) -> str:
    return f"must be {expects.words}, got {show(value)}{_hint('', value, list(_choices(field.annotation)))}"


def _say(error: Mapping[str, Any], field: FieldInfo) -> str:
    value, choices = error["input"], list(_choices(field.annotation))
    words = {
        "got": show(value),
        "choices": " or ".join(filter(None, [", ".join(choices[:-1]), *choices[-1:]])),
        "description": _lower_first(field.description or ""),
    }
    template = WORDING.get(error["type"], "cannot be read, got {got}")
    limits = {name: f"{limit:g}" if isinstance(limit, float) else limit for name, limit in error.get("ctx", {}).items()}
    return template.format(**words | limits) + _hint(error["type"], value, choices)


def _hint(error_type: str, value: Any, choices: list[str]) -> str:
    """The cure, where the value gives one away."""
    if value is None and "none" in choices:
        return "; did you mean 'none'?"
    if error_type == "tuple_type" and value in choices:
        return f"; did you mean [{value}]?"
    if isinstance(value, str) and choices:
        return did_you_mean(value, choices)
    if error_type == "string_type" and isinstance(value, bool | int | float):
        return "; put it in quotes"
    if error_type == "model_type" and value is None:
        return "; write its keys under it, or remove the line"
    return ""


def unknown_key(keys: Keys, sections: Mapping[str, tuple[str, ...]]) -> str:
    """What an unknown key may have meant: the same key elsewhere, a similar one here, a similar one elsewhere."""
    key, here = str(keys[-1]), str(keys[0]) if len(keys) > 1 else TOP
    hints = [
        f"'{key}' belongs {_under(section)}" for section, known in sections.items() if section != here and key in known
    ]
    near = did_you_mean(key, sections[here], cutoff=0.75 if hints else 0.6)
    if near or hints:
        return "; ".join(["unknown key", *hints]) + near
    elsewhere = {f"{section}.{name}": name for section, names in sections.items() if section for name in names}
    match = difflib.get_close_matches(key, elsewhere.values(), n=1)
    if match:
        return f"unknown key; did you mean {next(full for full, name in elsewhere.items() if name == match[0])}?"
    return f"unknown key; possible here: {', '.join(sections[here])}"


def _under(section: str) -> str:
    return f"under {section}" if section != TOP else "at the top level"


def did_you_mean(word: str, possible: Iterable[str], *, cutoff: float = 0.6) -> str:
    """`; did you mean 'rank'?`, or nothing if no possible word is near."""
    lower = {known.lower(): known for known in possible}
    match = difflib.get_close_matches(word.lower(), lower, n=1, cutoff=cutoff)
    return f"; did you mean '{lower[match[0]]}'?" if match else ""


def section_keys(recipe: type[BaseModel]) -> dict[str, tuple[str, ...]]:
    """The keys a person can write: those of the top level under TOP, then those of each section."""
    sections = {TOP: tuple(field.alias or name for name, field in recipe.model_fields.items())}
    for name, field in recipe.model_fields.items():
        if is_section(field):
            assert field.annotation is not None
            sections[name] = tuple(inner.alias or key for key, inner in field.annotation.model_fields.items())
    return sections


def is_section(field: FieldInfo) -> bool:
    return isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel)


def find_field(recipe: type[BaseModel], keys: Keys) -> FieldInfo | None:
    """The field behind ("train",) or ("train", "epochs"); None for an unknown key."""
    field: FieldInfo | None = None
    fields = recipe.model_fields
    for key in keys:
        field = next((known for name, known in fields.items() if key == (known.alias or name)), None)
        if field is None:
            return None
        fields = field.annotation.model_fields if is_section(field) and field.annotation else {}
    return field


def _expects(field: FieldInfo | None) -> Expects | None:
    return next((extra for extra in field.metadata if isinstance(extra, Expects)), None) if field else None


def _choices(annotation: Any) -> Iterator[str]:
    """Every value a Literal anywhere in the annotation allows."""
    for part in get_args(annotation):
        if get_origin(annotation) is Literal:
            yield str(part)
        else:
            yield from _choices(part)


def show(value: Any) -> str:
    """A value as a person would write it in a recipe, cut where it is long."""
    if value is None:
        return "nothing"
    if isinstance(value, dict):
        return "keys of its own" if value else "{}"
    text = repr(value) if isinstance(value, str | int | float) and not isinstance(value, bool) else json.dumps(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _lower_first(text: str) -> str:
    return text[:1].lower() + text[1:]
