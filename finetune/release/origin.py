"""What is exported: a target in; where its model, template and stop tokens are, and what its manifest says, out."""

from __future__ import annotations

import os
import time
from collections.abc import Mapping
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

from finetune.artifact import read_json, version_of
from finetune.base import Base, read_base, read_chat_template, sha256_of, weight_files
from finetune.data.template import Template, parse_date
from finetune.errors import Problem, StorageError, UserError, raise_problems
from finetune.release.manifest import MANIFEST, as_stored, damaged_files, facts_to_tell, read_manifest
from finetune.release.merge import release_generation_config
from finetune.release.proof_files import base_generation_config, expected_stops, stop_ids
from finetune.release.source import DEFAULT_DATE, Source, read_source


@dataclass(frozen=True)
class Origin:
    """What is exported: a run or adapter (`source`), a merged release (with its manifest), or a base."""

    name: str
    base: Base  # that of the run, or the model itself
    source: Source | None
    manifest: Mapping[str, Any] | None
    template: Template | None
    stop_token_ids: tuple[int, ...]

    @property
    def folder(self) -> Path:
        """The folder of the base's weights, or of the release's."""
        return self.base.facts.folder

    @property
    def chat_template(self) -> str | None:
        return self.template.source if self.template else None

    @property
    def settings(self) -> Mapping[str, Any]:
        """The recipe's keys and values where a run is known, else nothing."""
        plan = self.source.plan if self.source else (self.manifest or {}).get("plan")
        return (plan or {}).get("settings", {})

    @property
    def generation_config(self) -> dict[str, Any]:
        return release_generation_config(self.source) if self.source else base_generation_config(self.folder)


def find_origin(target: str) -> Origin:
    """What a target is, decided by looking at the folder.

    Raises:
        UserError: none of the kinds, or an export.
        StorageError: a release whose files changed.
    """
    path = Path(target).expanduser()
    if (path / "plan.json").is_file() or (path / "adapter_config.json").is_file():
        refuse_export(path)
        source = read_source(path)
        stops = tuple(sorted(expected_stops(source)))
        return Origin(source.path.resolve().name, source.base, source, None, source.template, stops)
    manifest = None
    if (path / MANIFEST).is_file():
        refuse_export(path)
        manifest = read_manifest(path)
        raise_problems(damaged_files(path, manifest["files"]), error=StorageError)
    base = read_base(target)
    folder = base.facts.folder
    stops = tuple(manifest["stop_token_ids"] if manifest else stop_ids(base_generation_config(folder)))
    name = target.removeprefix("builtin:").rstrip("/").rsplit("/", 1)[-1]
    name = path.resolve().name if path.exists() else name
    return Origin(name, base, None, manifest, own_template(base, read_chat_template(folder)), stops)


def own_template(base: Base, source: str | None) -> Template | None:
    """The template that a model folder comes with."""
    if source is None:
        return None
    return Template("own", source, base.bos_token, base.eos_token, parse_date(DEFAULT_DATE))


def refuse_export(path: Path) -> None:
    """An export is made of a run or a release, not of an export.

    Raises:
        UserError: `path` is one.
    """
    if (path / MANIFEST).is_file():
        format = read_manifest(path).get("format", "safetensors")
        if format != "safetensors":
            raise UserError(Problem(str(path), f"is {_a(format)} export; name the run or release that it came from"))


def describe_origin(origin: Origin, base_sha256: Mapping[str, str], out: Path) -> dict[str, Any]:
    """The manifest of an export that was not merged."""
    source, base = origin.source, origin.base.facts
    id = source.model.base if source else base.base
    facts: dict[str, Any] = {
        "version": 1,
        "created": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "finetune": version_of("finetune-toolkit"),
        "run": seen_from(out, source.path) if source else None,
        "base": {"id": id, "revision": source.model.revision if source else base.revision, "sha256": dict(base_sha256)}
        | as_stored(base.folder),
        "onto": None,
        "template_sha256": sha256(origin.chat_template.encode()).hexdigest() if origin.chat_template else None,
        "stop_token_ids": list(origin.stop_token_ids),
        **facts_to_tell(source.lock if source else None, base.folder, id, name=out.name),
    }
    if source is None:
        return facts
    plan = {key: value for key, value in (source.plan or {}).items() if key != "run_folder"}
    if plan:
        plan["model"] = {key: value for key, value in plan["model"].items() if key != "folder"}
    return facts | {
        "plan": plan or None,
        "adapter_sha256": sha256_of(source.adapter / "adapter_model.safetensors"),
        "data_sha256": dict(source.lock["data_sha256"]) if source.lock else {},
        "result": read_json(source.path / "result.json") if source.plan else None,
        "recipe": source.recipe_text,
    }


def describe_merged(origin: Origin, merged: Path, out: Path) -> dict[str, Any]:
    """The manifest of an export whose model was merged for it only."""
    assert origin.source is not None
    made_of = {"path": None, "is_folder": False, "sha256": weights_sha256(merged)}
    return read_json(merged / MANIFEST) | {"run": seen_from(out, origin.source.path), "made_of": made_of}


def describe_model(origin: Origin, out: Path) -> dict[str, Any]:
    """The manifest of an export of a release or base."""
    folder, id = origin.folder, origin.base.facts.base
    is_folder = not id.startswith("builtin:") and Path(id).expanduser().exists()
    hashes = weights_sha256(folder)
    made_of = {"path": seen_from(out, folder) if is_folder else id, "is_folder": is_folder, "sha256": hashes}
    if origin.manifest is None:
        return describe_origin(origin, hashes, out) | {"made_of": made_of}
    run = (folder / origin.manifest["run"]).resolve()
    changed = {"run": seen_from(out, run), "made_of": made_of, "merge_proofs": origin.manifest["proofs"]}
    return {**origin.manifest, **changed}


def weights_sha256(model: Path) -> dict[str, str]:
    """sha256 of the weight files by name: which model an export was made of."""
    return {file.name: sha256_of(file) for file in weight_files(model)}


def seen_from(out: Path, path: Path) -> str:
    return os.path.relpath(path.resolve(), out.resolve())


def _a(format: str) -> str:
    return f"an {format}" if format[0] in "aeiou" else f"a {format}"
