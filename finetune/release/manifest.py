"""finetune.json, the manifest of a release: what is in the folder, and whether it still is."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from finetune.artifact import read_json
from finetune.base import sha256_of
from finetune.errors import Problem, ProofError, UserError
from finetune.quantised_base import stored_as, stored_notes
from finetune.release.licences import data_licences, licence_notes

MANIFEST = "finetune.json"
CARD = "README.md"
OF_THE_HUB = (".gitattributes", ".cache/huggingface/")  # a downloaded release has them beside its own files


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


def facts_to_tell(lock: Mapping[str, Any] | None, base_folder: Path, base_id: str, *, name: str) -> dict[str, Any]:
    """What card and manifest say besides the plan: `--set`, software, the data's licences, notes on the base's."""
    return {
        "overrides": list(lock["overrides"]) if lock else [],
        "libraries": dict(lock["libraries"]) if lock else {},
        "data_licences": data_licences(lock["data_sha256"]) if lock else {},
        "notes": [*licence_notes(base_folder, base_id, name), *stored_notes(stored_as(base_folder))],
    }


def as_stored(base_folder: Path) -> dict[str, Any]:
    """The manifest's word for how the base was stored, where that was quantised: form, bits, its files' sha256."""
    record = stored_as(base_folder)
    return {"stored": dict(record)} if record else {}


def describe_files(folder: Path) -> list[dict[str, Any]]:
    """Name, bytes and sha256 of every file of a folder, in name order; not the manifest, nor what a hub adds."""
    names = sorted(file.relative_to(folder).as_posix() for file in folder.rglob("*") if file.is_file())
    names = [name for name in names if name != MANIFEST and not name.startswith(OF_THE_HUB)]
    with ThreadPoolExecutor() as pool:  # hashing lets go of the interpreter's lock
        hashes = pool.map(sha256_of, [folder / name for name in names])
        return [
            {"name": name, "bytes": (folder / name).stat().st_size, "sha256": digest}
            for name, digest in zip(names, hashes, strict=True)
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
