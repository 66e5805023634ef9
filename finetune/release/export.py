"""Export a model: a run, adapter, merged release or base in; a folder in another format out, proven or not there."""

from __future__ import annotations

import errno
import json
import os
import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

from finetune.artifact import ADAPTER_FILES, read_json, version_of, write_json, write_tokenizer
from finetune.base import Base, read_base, read_chat_template, sha256_of, weight_files
from finetune.errors import Problem, ProofError, StorageError, UserError, raise_problems
from finetune.release.card import LICENSE_FILES, license_of, proof_table, write_card
from finetune.release.choice import Progress
from finetune.release.delta import read_deltas
from finetune.release.fresh import Proof, failed_problems
from finetune.release.gguf.architecture import read_model
from finetune.release.gguf.vocabulary import read_tokenizer
from finetune.release.gguf.write import all_fields, quant_of, weight_bytes, write_gguf
from finetune.release.manifest import CARD, MANIFEST, damaged_files, describe_files, read_manifest
from finetune.release.merge import merge, refuse_content, release_generation_config
from finetune.release.proof_files import base_generation_config, expected_stops, stop_ids
from finetune.release.source import Source, check_base, read_source
from finetune.release.verify import prove_export_in_fresh_process

FORMATS = ("adapter", "gguf", "safetensors")
DEFAULT_QUANT = "q8_0"
ROOM_BYTES = 64 << 20  # for the header, tokenizer, card and manifest


@dataclass(frozen=True)
class Export:
    """A published export, what was proven of it, and what its user has to know."""

    out: Path
    format: str
    proofs: Sequence[Proof]
    files: Sequence[Mapping[str, Any]]
    notes: Sequence[str]

    def to_json(self) -> dict[str, Any]:
        return {
            "out": str(self.out),
            "format": self.format,
            "proofs": [found.to_json() for found in self.proofs],
            "files": list(self.files),
            "notes": list(self.notes),
        }


@dataclass(frozen=True)
class Origin:
    """What is exported: a run or adapter (`source`), a merged release (with its manifest), or a base."""

    name: str
    base: Base  # that of the run, or the model itself
    source: Source | None
    manifest: Mapping[str, Any] | None
    chat_template: str | None
    stop_token_ids: tuple[int, ...]

    @property
    def folder(self) -> Path:
        return self.base.facts.folder


def export(  # noqa: PLR0913  a parameter is an option
    target: str,
    *,
    format: str,
    out: Path,
    quant: str | None = None,
    onto: str = "auto",
    progress: Progress = lambda line: None,
) -> Export:
    """Write, prove in a fresh process, and only then give the folder its name.

    Raises:
        UserError: an unknown format or quantisation, `out` is not empty, or a model that the format cannot hold.
        StorageError: not enough room, or a damaged file.
        ProofError: a proof failed; the report lies beside `out`, nothing else is left.
    """
    _refuse_options(format, quant, onto)
    if out.name in {"", ".."}:
        raise UserError(Problem("--out", f"{str(out)!r} names no new folder; name one"))
    refuse_content(out)
    if format == "gguf":
        return _export_gguf(find_origin(target), out=out, quant=quant or DEFAULT_QUANT, onto=onto, progress=progress)
    path = Path(target).expanduser()
    if format == "adapter":
        return _export_adapter(read_source(path), out=out, progress=progress)
    release = merge(path, out=out, onto=onto, progress=progress)
    return Export(release.out, format, release.proofs, release.files, ())


def export_text(done: Export) -> str:
    """What a person reads of an export: its files with their sizes, what to know, and every proof with its figures."""
    lines = [f"{done.out}: {len(done.files)} files and {MANIFEST}"]
    lines += [f"  {entry['name']}: {entry['bytes']:,} bytes" for entry in done.files]
    lines += [f"note: {note}" for note in done.notes]
    for found in done.proofs:
        limit = "recorded only" if found.limit is None else f"at most {found.limit:.6g}"
        lines.append(f"  {'ok  ' if found.passed else 'FAIL'} {found.name}: {found.value:.6g} ({limit})")
    return "\n".join(lines)


def find_origin(target: str) -> Origin:
    """What a target is, decided by looking at the folder.

    Raises:
        UserError: none of the kinds, or an export.
        StorageError: a release whose files changed.
    """
    path = Path(target).expanduser()
    if (path / "plan.json").is_file() or (path / "adapter_config.json").is_file():
        source = read_source(path)
        stops = tuple(sorted(expected_stops(source)))
        return Origin(source.path.resolve().name, source.base, source, None, source.template.source, stops)
    manifest = None
    if (path / MANIFEST).is_file():
        manifest = read_manifest(path)
        if manifest.get("format", "safetensors") != "safetensors":
            raise UserError(Problem(target, f"is a {manifest['format']} export; name the run or release it came from"))
        raise_problems(damaged_files(path, manifest["files"]), error=StorageError)
    base = read_base(target)
    folder = base.facts.folder
    stops = tuple(manifest["stop_token_ids"] if manifest else stop_ids(base_generation_config(folder)))
    name = target.removeprefix("builtin:").rstrip("/").rsplit("/", 1)[-1]
    name = path.resolve().name if path.exists() else name
    return Origin(name, base, None, manifest, read_chat_template(folder), stops)


def _refuse_options(format: str, quant: str | None, onto: str) -> None:
    if format not in FORMATS:
        raise UserError(Problem("--format", f"{format!r} is not possible; write one of {', '.join(FORMATS)}"))
    if quant is not None and format != "gguf":
        raise UserError(Problem("--quant", f"only --format gguf is quantised, this is {format}; leave it out"))
    if onto != "auto" and format == "adapter":
        raise UserError(Problem("--onto", "an adapter is not merged; leave it out"))
    quant_of(quant or DEFAULT_QUANT)


def _export_gguf(origin: Origin, *, out: Path, quant: str, onto: str, progress: Progress) -> Export:
    _refuse_before_writing(origin, out, quant)
    with _work_folder(out) as work:
        model, manifest, proofs = _model_of(origin, work, out=out, onto=onto, progress=progress)
        folder = work / "release"
        folder.mkdir()
        _copy_license(origin.folder, folder)
        progress(f"writing {origin.name}-{quant}.gguf")
        report = write_gguf(
            model,
            folder / f"{origin.name}-{quant}.gguf",
            quant=quant,
            chat_template=origin.chat_template,
            stop_token_ids=origin.stop_token_ids,
            name=origin.name,
        )
        manifest |= {"format": "gguf", "quant": quant, "name": origin.name, "notes": list(report.notes)}
        manifest |= {"tensor_types": report.types()}
        files = _prove_and_seal(folder, manifest, model, proofs, origin.folder, out=out, progress=progress)
        publish(folder, out)
    return Export(out, "gguf", proofs, files, report.notes)


def _export_adapter(source: Source, *, out: Path, progress: Progress) -> Export:
    base_folder = source.base.facts.folder
    base_sha256 = check_base(source)
    read_deltas(source.adapter)  # refuses what could not be proven
    _refuse_full_disk(out, sum((source.adapter / name).stat().st_size for name in ADAPTER_FILES))
    with _work_folder(out) as work:
        folder = work / "release"
        folder.mkdir()
        for name in ADAPTER_FILES:
            shutil.copyfile(source.adapter / name, folder / name)
        _copy_license(base_folder, folder)
        write_tokenizer(folder, source.tokenizer_folder, template_source=source.template.source)
        write_json(folder / "generation_config.json", release_generation_config(source))
        manifest = _described(source.base, source, base_sha256, out)
        manifest |= {"format": "adapter", "name": source.path.resolve().name, "notes": []}
        proofs: list[Proof] = []
        files = _prove_and_seal(folder, manifest, source.path, proofs, base_folder, out=out, progress=progress)
        publish(folder, out)
    return Export(out, "adapter", proofs, files, ())


@contextmanager
def _work_folder(out: Path) -> Iterator[Path]:
    """A hidden folder beside `out`, on the same file system; gone afterwards, however it ends.

    Raises:
        UserError: it cannot be made.
        StorageError: the disk became full.
    """
    work = out.with_name(f".{out.name}.partial")
    shutil.rmtree(work, ignore_errors=True)
    try:
        work.mkdir(parents=True)
    except OSError as error:
        raise UserError(Problem(str(out), f"cannot be written ({error.strerror}); name another folder")) from error
    try:
        yield work
    except OSError as error:
        if error.errno not in {errno.ENOSPC, errno.EDQUOT}:
            raise
        message = "the disk became full; nothing was published; make room or name another disk"
        raise StorageError(Problem(str(out.parent), message)) from error
    finally:
        shutil.rmtree(work, ignore_errors=True)


def _copy_license(base_folder: Path, folder: Path) -> None:
    for file in [base_folder / name for name in LICENSE_FILES]:
        if file.is_file():
            shutil.copyfile(file, folder / file.name)


def _refuse_before_writing(origin: Origin, out: Path, quant: str) -> None:
    """What a merge of an hour would only find out at its end: a model that GGUF cannot hold, a disk that is full."""
    all_fields(
        read_model(origin.folder),
        read_tokenizer(origin.folder),
        quant=quant_of(quant),
        chat_template=origin.chat_template,
        stop_token_ids=origin.stop_token_ids,
        name=origin.name,
    )
    merged_bytes = origin.base.facts.stored_bytes if origin.source else 0
    _refuse_full_disk(out, weight_bytes(origin.folder, quant) + merged_bytes)


def _refuse_full_disk(out: Path, weights: int) -> None:
    there = next(folder for folder in out.absolute().parents if folder.exists())
    free, needed = shutil.disk_usage(there).free, weights + ROOM_BYTES
    if free < needed:
        message = f"this export needs {needed / 1e9:.1f} GB for a while, {free / 1e9:.1f} GB are free; "
        raise StorageError(Problem(str(out.parent), message + "make room or name another disk"))


def _model_of(
    origin: Origin, work: Path, *, out: Path, onto: str, progress: Progress
) -> tuple[Path, dict[str, Any], list[Proof]]:
    """The model folder to write from, its manifest seen from `out`, and what was proven of it now."""
    if origin.source is not None:
        merged = work / "merged"
        try:
            release = merge(origin.source.path, out=merged, onto=onto, progress=progress)
        except ProofError as error:
            raise _told_of(out, merged, error) from error
        manifest = read_json(merged / MANIFEST) | {"made_of": _made_of(merged, None, is_folder=False)}
        manifest["run"] = _seen_from(out, origin.source.path)
        merge_proofs = [
            Proof(f"merge: {found.name}", found.value, found.limit, found.passed) for found in release.proofs
        ]
        return merged, manifest, merge_proofs
    folder = origin.folder
    is_folder = not origin.base.facts.base.startswith("builtin:") and Path(origin.base.facts.base).expanduser().exists()
    made_of = _made_of(folder, _seen_from(out, folder) if is_folder else origin.base.facts.base, is_folder=is_folder)
    if origin.manifest is not None:
        run = (folder / origin.manifest["run"]).resolve()
        changed = {"run": _seen_from(out, run), "made_of": made_of, "merge_proofs": origin.manifest["proofs"]}
        return folder, {**origin.manifest, **changed}, []
    sha256_of_template = sha256(origin.chat_template.encode()).hexdigest() if origin.chat_template else None
    manifest = _described(origin.base, None, made_of["sha256"], out) | {"made_of": made_of}
    manifest |= {"template_sha256": sha256_of_template, "stop_token_ids": list(origin.stop_token_ids)}
    return folder, manifest, []


def _told_of(out: Path, merged: Path, error: ProofError) -> ProofError:
    """A failed merge as a failed export: its report beside `out`, no word of the folder that is gone."""
    names = {f"{merged}.failed.json": str(_report_of(out)), str(merged): str(out)}

    def renamed(text: str) -> str:
        for name, other in names.items():
            text = text.replace(name, other)
        return text

    report = merged.with_name(f"{merged.name}.failed.json").read_text(encoding="utf-8")
    write_json(_report_of(out), json.loads(renamed(report)))
    return ProofError(Problem(renamed(problem.where), renamed(problem.message)) for problem in error.problems)


def _made_of(model: Path, path: str | None, *, is_folder: bool) -> dict[str, Any]:
    """Which model a GGUF file was written from; no path where it was merged for the export only."""
    hashes = {file.name: sha256_of(file) for file in weight_files(model)}
    return {"path": path, "is_folder": is_folder, "sha256": hashes}


def _seen_from(out: Path, path: Path) -> str:
    return os.path.relpath(path.resolve(), out.resolve())


def _described(base: Base, source: Source | None, base_sha256: Mapping[str, str], out: Path) -> dict[str, Any]:
    """The manifest of an export that was not merged."""
    facts: dict[str, Any] = {
        "version": 1,
        "created": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "finetune": version_of("finetune-toolkit"),
        "run": None,
        "base": {"id": base.facts.base, "revision": base.facts.revision, "sha256": dict(base_sha256)},
        "onto": None,
    }
    if source is None:
        return facts
    plan = dict(source.plan or {})
    plan.pop("run_folder", None)
    if plan:
        plan["model"] = {key: value for key, value in plan["model"].items() if key != "folder"}
    return facts | {
        "plan": plan or None,
        "run": _seen_from(out, source.path),
        "base": {"id": source.model.base, "revision": source.model.revision, "sha256": dict(base_sha256)},
        "adapter_sha256": sha256_of(source.adapter / "adapter_model.safetensors"),
        "data_sha256": dict(source.lock["data_sha256"]) if source.lock else {},
        "template_sha256": source.template.sha256,
        "stop_token_ids": sorted(expected_stops(source)),
        "result": read_json(source.path / "result.json") if source.plan else None,
        "recipe": source.recipe_text,
    }


def _prove_and_seal(  # noqa: PLR0913  what is proven, against what, and where it will lie
    folder: Path,
    manifest: dict[str, Any],
    against: Path,
    proofs: list[Proof],
    base_folder: Path,
    *,
    out: Path,
    progress: Progress,
) -> list[dict[str, Any]]:
    """Append to `proofs`, write card and final manifest; the files as the manifest lists them come back."""
    write_json(folder / MANIFEST, manifest | {"proofs": [], "files": describe_files(folder)})
    progress("proving in a fresh process")
    try:
        proofs += prove_export_in_fresh_process(folder, against)
        raise_problems(failed_problems(out, proofs), error=ProofError)
    except ProofError as error:
        problems = [{"where": problem.where, "message": problem.message} for problem in error.problems]
        write_json(_report_of(out), {"proofs": [found.to_json() for found in proofs], "problems": problems})
        told = Problem(str(_report_of(out)), "nothing was published; this report holds every figure")
        raise ProofError([*error.problems, told]) from error
    (folder / CARD).write_text(_card(folder, manifest, proofs, base_folder), encoding="utf-8")
    files = describe_files(folder)
    write_json(folder / MANIFEST, manifest | {"proofs": [found.to_json() for found in proofs], "files": files})
    _report_of(out).unlink(missing_ok=True)  # of an earlier attempt
    return files


def _card(folder: Path, manifest: Mapping[str, Any], proofs: Sequence[Proof], base_folder: Path) -> str:
    """The merged release's card, or a short one, and a section on what lies in this folder."""
    name, base = manifest["name"], manifest["base"]["id"]
    if manifest["onto"] is not None:
        card = write_card(manifest, proofs, name=name, base_folder=base_folder)
        card = card.replace("library_name: transformers", "library_name: gguf", 1)
    else:
        license_name = license_of(base_folder)
        front = [f"library_name: {'gguf' if manifest['format'] == 'gguf' else 'peft'}"]
        front += [f"license: {license_name}"] if license_name else []
        front += [] if Path(base).exists() else [f"base_model: {base}"]
        what = f"`{base}` in GGUF form." if manifest["format"] == "gguf" else f"An adapter for `{base}`."
        licence = f"The base's: {license_name}." if license_name else f"See the base, `{base}`."
        parts = ["---\n" + "\n".join(front) + "\n---", f"# {name}", what, "## Licence\n\n" + licence]
        parts.append("## Proofs\n\nMade by a fresh process from the files of this folder before it got its name.")
        card = "\n\n".join([*parts, proof_table(proofs)]) + "\n"
    if manifest["format"] != "gguf":
        return card
    (file,) = folder.glob("*.gguf")
    types = ", ".join(f"{count} {kind}" for kind, count in manifest["tensor_types"].items())
    lines = [f"- `{file.name}`: {manifest['quant']}, {file.stat().st_size:,} bytes, tensors: {types}"]
    return card + "\n## The file\n\n" + "\n".join([*lines, *(f"- {note}" for note in manifest["notes"])]) + "\n"


def publish(folder: Path, out: Path) -> None:
    """Every file on disk first, then the name."""
    for path in [*folder.iterdir(), folder]:
        _sync(path)
    if out.exists():
        out.rmdir()
    folder.rename(out)
    _sync(out.parent)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _report_of(out: Path) -> Path:
    return out.with_name(f"{out.name}.failed.json")
