"""Foreign code: whether a base may bring Python of its own. A base's files in; a refusal, or the word to load it, out.

Only the command line allows any, as `--trust-remote-code NAME@PIN`: a hub repository at a commit (40 hex digits), or a
folder whose .py files have this sha256 (64). What is allowed is kept in this module, like the environment a fact of the
whole process, so that nothing which is read from a file (a recipe, a plan, a config) could ever carry it.
"""

from __future__ import annotations

import importlib.util
import json
import re
from collections.abc import Iterator, Mapping
from hashlib import sha256
from pathlib import Path
from typing import Any

from finetune.errors import Problem, UserError, raise_problems

OPTION = "--trust-remote-code"
PERMISSION = re.compile(r"(.+)@([0-9a-f]{40}|[0-9a-f]{64})")
HUB_TOKEN = re.compile(r"\bhf_[A-Za-z0-9]{16,}")
COMMIT = re.compile(r"[0-9a-f]{40}")
# Files of a model folder that libraries read settings from.
SETTINGS = (
    "config.json",
    "generation_config.json",
    "tokenizer_config.json",
    "adapter_config.json",
    "processor_config.json",
    "preprocessor_config.json",
)
# Keys that would make a library fetch or import code from somewhere else; no model needs one of them to be loaded.
FORBIDDEN = ("trust_remote_code", "parent_library", "custom_generate", "kernel_config", "use_kernels")
IMPLEMENTATION = re.compile(r"_?(attn|experts)_implementation(_internal|_autoset)?")
BUILT_IN = re.compile(r"[a-z0-9_]+")  # a name of another form is a repository to fetch a kernel from

_pins: dict[str, str] = {}  # what the command line allows: name -> commit or sha256
_code: dict[str, str] = {}  # what may run therefore: sha256 of .py files -> NAME@PIN


def allow_foreign_code(permission: str | None) -> None:
    """Allow this process what the command line says; None allows nothing.

    Raises:
        UserError: it is not of the form NAME@PIN.
    """
    _pins.clear()
    _code.clear()
    if permission is None:
        return
    match = PERMISSION.fullmatch(permission)
    if match is None:
        forms = "REPO@<commit, 40 hex digits>, or FOLDER@<sha256 of its .py files, 64>"
        message = f"{permission!r} names no code; write {forms}"
        raise UserError(Problem(OPTION, message))
    _pins[match[1]] = match[2]


def allowed_commit(base: str) -> str | None:
    """The commit of a hub repository whose code is allowed, or None."""
    pin = _pins.get(base)
    return pin if pin and len(pin) == 40 else None


def check_foreign_code(base: str, folder: Path) -> None:
    """Refuse a base whose files ask for code that is not allowed.

    Raises:
        UserError: code of its own without the option, code of somebody else, or settings that would fetch some.
    """
    settings = dict(_settings(folder))
    raise_problems(problem for file, values in settings.items() for problem in _forbidden(file, values))
    config = settings.get(folder / "config.json")
    kind = config.get("model_type") if isinstance(config, dict) else None
    reason = _asks_for_code(settings, kind)
    if reason is None:
        return
    digest = code_sha256(folder)
    is_snapshot = folder.parent.name == "snapshots" and COMMIT.fullmatch(folder.name)
    pin = folder.name if is_snapshot else digest
    if digest is not None and (digest in _code or _pins.get(base) == pin):
        _code.setdefault(digest, f"{base}@{pin}")
        return
    raise UserError(Problem(base, f"{reason}; {_cure(base, pin, kind)}"))


def is_trusted(folder: Path) -> bool:
    """Whether the Python files of this folder are, to the byte, those that were allowed and asked for."""
    return bool(_code) and code_sha256(folder) in _code


def trusted_code() -> dict[str, str]:
    """What this process was allowed and asked for: NAME@PIN -> sha256 of its .py files."""
    return {permission: digest for digest, permission in _code.items()}


def hand_over_to_child() -> str:
    """One word for the arguments of a child process, which takes it with `take_over`."""
    return json.dumps(_code)


def take_over(word: str) -> None:
    """In a child process: allow what the parent was allowed."""
    _code.update(json.loads(word))


def code_sha256(folder: Path) -> str | None:
    """sha256 over the names and contents of a folder's .py files, or None where there are none."""
    files = sorted(file for file in folder.rglob("*.py") if file.is_file())
    digest = sha256()
    for file in files:
        content = file.read_bytes()
        digest.update(f"{file.relative_to(folder).as_posix()}\n{len(content)}\n".encode() + content)
    return digest.hexdigest() if files else None


def without_passwords(text: str) -> str:
    """The text with `***` for what stands before the @ of an address, and for a token of the hub."""
    return HUB_TOKEN.sub("hf_***", re.sub(r"(\w://)[^/\s@]+@", r"\1***@", text))


def _settings(folder: Path) -> Iterator[tuple[Path, Any]]:
    for name in SETTINGS:
        file = folder / name
        if file.is_file():
            try:
                yield file, json.loads(file.read_text(encoding="utf-8"))
            except (ValueError, RecursionError) as error:
                message = f"invalid JSON: {str(error).splitlines()[0]}; fetch the file again"
                raise UserError(Problem(str(file), message)) from error


def _forbidden(file: Path, values: Any) -> Iterator[Problem]:
    for key, value in _entries(values):
        if key in FORBIDDEN and value:
            yield Problem(str(file), f"{key}: would let a library run code from elsewhere; delete this key")
        elif IMPLEMENTATION.fullmatch(key):
            names = value.values() if isinstance(value, Mapping) else [value]
            if any(isinstance(name, str) and not BUILT_IN.fullmatch(name) for name in names):
                yield Problem(str(file), f"{key}: {value!r} would be fetched and run; delete this key")
        elif key == "auto_map":
            foreign = [text for text in _texts(value) if "--" in text]
            if foreign:
                message = f"auto_map: {foreign[0]!r} is the code of another repository, which is never run; "
                yield Problem(str(file), message + "copy that code beside the model, and name it without `--`")


def _asks_for_code(settings: Mapping[Path, Any], kind: Any) -> str | None:
    for file, values in settings.items():
        if any(key == "auto_map" and value for key, value in _entries(values)):
            return f"{file.name} asks for Python code of its own (auto_map)"
    if isinstance(kind, str) and not _is_known(kind):
        return f"transformers knows no model_type {kind!r}"
    return None


def _is_known(model_type: str) -> bool:
    """Whether transformers has this architecture itself, read from its tables without importing it."""
    found = importlib.util.find_spec("transformers")
    folders = found.submodule_search_locations if found else None
    tables = [Path(folder) / "models" / "auto" for folder in folders or ()]
    files = [folder / name for folder in tables for name in ("auto_mappings.py", "configuration_auto.py")]
    texts = [file.read_text(encoding="utf-8") for file in files if file.is_file()]
    return not texts or any(f'"{model_type}"' in text for text in texts)


def _cure(base: str, pin: str | None, kind: Any) -> str:
    other = "name another base"
    if isinstance(kind, str) and _is_known(kind):
        other = f"delete auto_map, for transformers has {kind} itself; or name another base"
    if pin is None:
        return f"there is no .py file that could be allowed; {other}"
    return f"read that code, then allow it with {OPTION} {base}@{pin}; or {other}"


def _entries(values: Any) -> Iterator[tuple[str, Any]]:
    """Every key and value, however deep."""
    waiting = [values]
    while waiting:
        value = waiting.pop()
        if isinstance(value, dict):
            yield from value.items()
            waiting += value.values()
        elif isinstance(value, list):
            waiting += value


def _texts(value: Any) -> Iterator[str]:
    """Every string of a value, however deep."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, (dict, list)):
        for inner in value.values() if isinstance(value, dict) else value:
            yield from _texts(inner)
