"""Merge a trained adapter into its base: a run in, a release folder out that is proven or does not exist."""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from finetune.artifact import read_json, version_of, write_json, write_tokenizer
from finetune.base import TOKENIZER_FILES, TensorEntry, read_tensor_entries, sha256_of
from finetune.errors import Problem, ProofError, StorageError, UserError, raise_problems
from finetune.release.card import write_card
from finetune.release.choice import Choice, Progress, choose_onto
from finetune.release.delta import DTYPES, Delta, read_deltas, round_tuned
from finetune.release.fresh import Proof, failed_problems, prove_in_fresh_process
from finetune.release.manifest import CARD, MANIFEST, describe_files
from finetune.release.proof import make_onto
from finetune.release.proof_files import base_generation_config, expected_stops, rounded_names, stop_ids
from finetune.release.source import Source, check_base, read_source
from finetune.release.verify import Verification
from finetune.release.weights import write_shards

# Weights in any form, tokenizers (written anew) and what describes the base alone; all other files come along.
WEIGHT_ENDINGS = (".safetensors", ".safetensors.index.json", ".bin", ".bin.index.json", ".pt", ".pth", ".gguf", ".h5")
LEFT_BEHIND = {*TOKENIZER_FILES, "chat_template.jinja", "chat_template.json", "added_tokens.json", "vocab.json"}
LEFT_BEHIND |= {"merges.txt", "generation_config.json", CARD, MANIFEST}


@dataclass(frozen=True)
class Release:
    """A published release and what was proven of it."""

    out: Path
    onto: Choice
    proofs: Sequence[Proof]
    files: Sequence[Mapping[str, Any]]

    def to_json(self) -> dict[str, Any]:
        return {
            "out": str(self.out),
            "onto": self.onto.chosen,
            "scores": dict(self.onto.scores),
            "choice": self.onto.to_json(),
            "proofs": [found.to_json() for found in self.proofs],
            "files": list(self.files),
        }


def merge(run_or_adapter: Path, *, out: Path, onto: str = "auto", progress: Progress = lambda line: None) -> Release:
    """Merge, prove in a fresh process, and only then give the folder its name.

    Raises:
        UserError: `out` is not empty, the run is unfinished, the base is another, or the adapter cannot be merged.
        StorageError: not enough room, or a damaged file.
        ProofError: a proof failed; the report lies beside `out`, nothing else is left.
    """
    refuse_content(out)
    source = read_source(run_or_adapter)
    base_sha256 = check_base(source)
    staging = out.with_name(f".{out.name}.partial")
    shutil.rmtree(staging, ignore_errors=True)
    staging.mkdir(parents=True)
    try:
        choice = choose_onto(source, onto, progress=progress)
        progress(f"merging onto the {choice.chosen} weights: {choice.reason}")
        manifest = write_release(staging, source, choice, base_sha256=base_sha256, out=out)
        progress("proving in a fresh process")
        proofs = _prove_or_report(staging, source, choice, out=out)
        files = _seal(staging, manifest, proofs, source, name=out.name)
        _publish(staging, out)
        _report_of(out).unlink(missing_ok=True)  # of an earlier attempt
    finally:
        shutil.rmtree(staging, ignore_errors=True)
    return Release(out, choice, proofs, files)


def release_text(release: Release | Verification) -> str:
    """What a person reads of a release: its folder, what it was merged onto, and every proof with its figures."""
    lines = [f"{release.out}: {len(release.files)} files"]
    if isinstance(release, Release):
        lines.append(f"merged onto the {release.onto.chosen} weights: {release.onto.reason}")
    elif release.not_proven:
        lines.append(f"only the files were compared: {release.not_proven}")
    for found in release.proofs:
        limit = "recorded only" if found.limit is None else f"at most {found.limit:.6g}"
        lines.append(f"  {'ok  ' if found.passed else 'FAIL'} {found.name}: {found.value:.6g} ({limit})")
    return "\n".join(lines)


def refuse_content(out: Path) -> None:
    """A release takes the name of nothing that is there.

    Raises:
        UserError: `out` exists and is not an empty folder.
    """
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(Problem(str(out), "is there already and not empty; name another folder, or remove it first"))


def write_release(
    folder: Path, source: Source, choice: Choice, *, base_sha256: Mapping[str, str], out: Path
) -> dict[str, Any]:
    """Every file of a release but its card, with a manifest that holds no proofs yet; the manifest comes back."""
    entries = list(read_tensor_entries(source.base.facts.folder))
    deltas = read_deltas(source.adapter)
    _refuse_unknown_targets(entries, deltas)
    _refuse_full_disk(folder, sum(entry.bytes for entry in entries))
    onto = make_onto(source, choice.chosen)
    rounded = rounded_names(source, onto, deltas)

    def change(entry: TensorEntry, tensor: torch.Tensor) -> torch.Tensor:
        if entry.name not in rounded:
            return tensor
        return round_tuned(onto.weight(tensor), deltas.get(entry.name), dtype=tensor.dtype)

    write_shards(folder, entries, change)
    for file in files_that_come_along(source.base.facts.folder):
        shutil.copyfile(file, folder / file.name)
    write_tokenizer(folder, source.tokenizer_folder, template_source=source.template.source)
    write_json(folder / "generation_config.json", release_generation_config(source))
    manifest = _manifest(source, choice, base_sha256, out)
    write_json(folder / MANIFEST, manifest | {"proofs": [], "files": describe_files(folder)})
    return manifest


def files_that_come_along(base_folder: Path) -> list[Path]:
    """The base's own files that belong to a release too: config, licence and the like."""
    return [
        file
        for file in sorted(base_folder.iterdir())
        if file.is_file()
        and not file.name.startswith(".")
        and not file.name.endswith(WEIGHT_ENDINGS)
        and file.name not in LEFT_BEHIND
    ]


def release_generation_config(source: Source) -> dict[str, Any]:
    """The base's generation settings, with every stop token: the base's own and those the run trained."""
    config = base_generation_config(source.base.facts.folder)
    ids = stop_ids(config) + sorted(expected_stops(source) - set(stop_ids(config)))
    return config | ({"eos_token_id": ids if len(ids) > 1 else ids[0]} if ids else {})


def _manifest(source: Source, choice: Choice, base_sha256: Mapping[str, str], out: Path) -> dict[str, Any]:
    plan = dict(source.plan or {})
    plan.pop("run_folder", None)
    if plan:
        plan["model"] = {key: value for key, value in plan["model"].items() if key != "folder"}
    return {
        "version": 1,
        "created": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "finetune": version_of("finetune-toolkit"),
        "run": os.path.relpath(source.path.resolve(), out.resolve()),
        "base": {"id": source.model.base, "revision": source.model.revision, "sha256": dict(base_sha256)},
        "adapter_sha256": sha256_of(source.adapter / "adapter_model.safetensors"),
        "data_sha256": dict(source.lock["data_sha256"]) if source.lock else {},
        "template_sha256": source.template.sha256,
        "stop_token_ids": sorted(expected_stops(source)),
        "onto": choice.to_json(),
        "rows": source.rows.origin,
        "result": read_json(source.path / "result.json") if source.plan else None,
        "recipe": source.recipe_text,
        "plan": plan or None,
    }


def _refuse_unknown_targets(entries: Sequence[TensorEntry], deltas: Mapping[str, Delta]) -> None:
    stored = {entry.name: entry for entry in entries}
    problems = []
    for name, delta in deltas.items():
        entry = stored.get(name)
        shape = (delta.b_OR.shape[0], delta.a_RI.shape[1])
        if entry is None:
            problems.append(Problem(name, "the adapter changes this weight, the base's files hold none of this name"))
        elif entry.dtype not in DTYPES:
            problems.append(
                Problem(name, f"stored as {entry.dtype}; a base stored in 16 or 32 bits is needed to merge onto")
            )
        elif entry.shape != shape:
            problems.append(Problem(name, f"the adapter's delta is {shape}, the base's weight is {entry.shape}"))
    raise_problems(problems)


def _refuse_full_disk(folder: Path, weight_bytes: int) -> None:
    free = shutil.disk_usage(folder).free
    needed = weight_bytes + (64 << 20)  # tokenizer, card and manifest
    if free < needed:
        message = f"a release needs {needed / 1e9:.1f} GB, {free / 1e9:.1f} GB are free; make room or name another disk"
        raise StorageError(Problem(str(folder.parent), message))


def _prove_or_report(staging: Path, source: Source, choice: Choice, *, out: Path) -> list[Proof]:
    """The proofs, all passed; a failed one, or none at all, leaves a report beside `out`."""
    proofs: list[Proof] = []
    try:
        proofs = prove_in_fresh_process([(staging, source.path)])[0]
        raise_problems(failed_problems(out, proofs), error=ProofError)
    except ProofError as error:
        problems = [{"where": problem.where, "message": problem.message} for problem in error.problems]
        figures = {"onto": choice.to_json(), "proofs": [found.to_json() for found in proofs], "problems": problems}
        write_json(_report_of(out), figures)
        told = Problem(str(_report_of(out)), "nothing was published; this report holds every figure")
        raise ProofError([*error.problems, told]) from error
    return proofs


def _report_of(out: Path) -> Path:
    return out.with_name(f"{out.name}.failed.json")


def _seal(
    folder: Path, manifest: Mapping[str, Any], proofs: Sequence[Proof], source: Source, *, name: str
) -> list[dict[str, Any]]:
    """Write card and final manifest; the files as the manifest lists them come back."""
    card = write_card(manifest, proofs, name=name, base_folder=source.base.facts.folder)
    (folder / CARD).write_text(card, encoding="utf-8")
    files = describe_files(folder)
    write_json(folder / MANIFEST, {**manifest, "proofs": [found.to_json() for found in proofs], "files": files})
    return files


def _publish(staging: Path, out: Path) -> None:
    for path in [*staging.iterdir(), staging]:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
    if out.exists():
        out.rmdir()
    staging.rename(out)
