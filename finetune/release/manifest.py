"""finetune.json, the manifest of a release: what is in the folder, and whether it still is."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from finetune.artifact import read_json
from finetune.base import sha256_of
from finetune.errors import Problem, ProofError, UserError

MANIFEST = "finetune.json"
CARD = "README.md"


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest of a release folder.

    Raises:
        UserError: the folder is no release.
        ProofError: the manifest is damaged.
    """
    if not (folder / MANIFEST).is_file():
        raise UserError(Problem(str(folder), f"no release: it has no {MANIFEST}; make one with finetune merge"))
    try:
        manifest = read_json(folder / MANIFEST)
        missing = {"files", "run", "proofs", "onto"} - set(manifest)
    except (ValueError, TypeError) as error:
        raise ProofError(Problem(str(folder / MANIFEST), f"damaged: {error}; merge again")) from error
    if missing:
        raise ProofError(Problem(str(folder / MANIFEST), f"damaged: {', '.join(sorted(missing))} missing; merge again"))
    return manifest


def describe_files(folder: Path) -> list[dict[str, Any]]:
    """Name, bytes and sha256 of every file of a folder except the manifest, in name order."""
    names = sorted(str(file.relative_to(folder)) for file in folder.rglob("*") if file.is_file())
    return [
        {"name": name, "bytes": (folder / name).stat().st_size, "sha256": sha256_of(folder / name)}
        for name in names
        if name != MANIFEST
    ]


def damaged_files(folder: Path, files: Sequence[Mapping[str, Any]]) -> list[Problem]:
    """Files that are missing, changed, or not in the manifest."""
    found = {entry["name"]: entry for entry in describe_files(folder)}
    problems = []
    for entry in files:
        name = entry["name"]
        here = found.pop(name, None)
        if here is None:
            problems.append(Problem(str(folder / name), "missing"))
        elif here["bytes"] != entry["bytes"]:
            problems.append(Problem(str(folder / name), f"changed: {here['bytes']} bytes, were {entry['bytes']}"))
        elif here["sha256"] != entry["sha256"]:
            problems.append(Problem(str(folder / name), "changed: its sha256 is not the manifest's"))
    return problems + [Problem(str(folder / name), "not in the manifest") for name in found]
