"""Lay `--set section.key=VALUE` over a recipe's values: texts and values in, new values or problems out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pydantic import BaseModel

from finetune.errors import Problem
from finetune.recipe_problems import TOP, find_field, section_keys, unknown_key
from finetune.recipe_yaml import Keys, read_document

# Of these two only one can be given, so an override of one takes the place of the other in the file.
EPOCHS: Keys = ("train", "epochs")
MAX_STEPS: Keys = ("train", "max_steps")


@dataclass(frozen=True)
class Override:
    """One --set: `where` as a person wrote it, (section, key) or (key,), and the value read as YAML."""

    where: str
    keys: Keys
    value: Any


def read_overrides(overrides: Sequence[str], *, recipe: type[BaseModel]) -> tuple[dict[Keys, Override], list[Problem]]:
    """The overrides by their keys, and what is wrong with the way they are written."""
    changes: dict[Keys, Override] = {}
    problems: list[Problem] = []
    for written in overrides:
        override = _read_override(written, recipe=recipe)
        if isinstance(override, Problem):
            problems.append(override)
        elif override.keys in changes:
            problems.append(Problem(override.where, f"repeated key, see {changes[override.keys].where}; keep one"))
        else:
            changes[override.keys] = override
    return changes, problems


def key_of(override: str) -> str:
    """The key that a `--set` names."""
    return override.partition("=")[0].strip()


def _read_override(written: str, *, recipe: type[BaseModel]) -> Override | Problem:
    where = f"--set {written}"
    name, equals, text = written.partition("=")
    section, dot, key = name.strip().partition(".")
    sections = section_keys(recipe)
    if not equals or not text.strip():
        return Problem(where, "a value is required; write section.key=VALUE, as in train.epochs=3 or data.eval=null")
    if section in sections and section != TOP and not key:
        return Problem(where, f"one key at a time; write {section}.KEY=VALUE")
    keys: Keys = (section, key) if section in sections and section != TOP else (section,)
    if (dot and len(keys) == 1) or find_field(recipe, keys) is None:
        return Problem(where, unknown_key(keys, sections))
    document = read_document(text)
    if document.flaws:
        return Problem(where, document.flaws[0].message)
    return Override(where, keys, document.values)


def lay_over(values: Mapping[str, Any], changes: Mapping[Keys, Override], *, recipe: type[BaseModel]) -> dict[str, Any]:
    """The file's values with the overrides in their place and every absent section empty."""
    laid = {name: dict(value) if isinstance(value, dict) else value for name, value in values.items()}
    for section in filter(None, section_keys(recipe)):
        laid.setdefault(section, {})
    for change in changes.values():
        *sections, key = change.keys
        target = laid[str(sections[0])] if sections else laid
        if isinstance(target, dict):
            target[str(key)] = change.value
    for given, replaced in ((EPOCHS, MAX_STEPS), (MAX_STEPS, EPOCHS)):
        is_given = given in changes and changes[given].value is not None
        if is_given and replaced not in changes and isinstance(laid["train"], dict):
            laid["train"].pop(str(replaced[1]), None)
    return laid
