"""Prove a release folder again, whatever its format: the folder in, what still holds out."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from finetune.base import find_base_folder
from finetune.errors import FinetuneError, Problem, ProofError, UserError, raise_problems
from finetune.release.choice import Choice
from finetune.release.combined import prove_combined_in_fresh_process, runs_of
from finetune.release.export_proof import prove_alone
from finetune.release.export_proof import prove_in_fresh_process as prove_export_in_fresh_process
from finetune.release.extract import models_of, prove_extracted_in_fresh_process
from finetune.release.fresh import Proof, failed_problems, proof, proof_lines, prove_in_fresh_process
from finetune.release.manifest import damaged_files, read_manifest
from finetune.release.merge import write_release
from finetune.release.origin import weights_sha256
from finetune.release.source import Source, check_base, read_source
from finetune.release.staging import refuse_full_disk, work_folder


@dataclass(frozen=True)
class Verification:
    """A folder whose files are the manifest's; its proofs, or why they could not be carried out again."""

    out: Path
    files: Sequence[Mapping[str, Any]]
    proofs: Sequence[Proof]
    not_proven: str | None  # why, and which proofs were made before publishing and not again

    def to_json(self) -> dict[str, Any]:
        return {
            "out": str(self.out),
            "proofs": [found.to_json() for found in self.proofs],
            "files": list(self.files),
            "not_proven": self.not_proven,
        }


def verify(folder: Path) -> Verification:
    """Compare every file with the manifest, then prove the release again if what it was made of is still there.

    Raises:
        UserError: the folder has no manifest.
        ProofError: a file is missing, changed or not in the manifest, or a proof fails.
    """
    manifest = read_manifest(folder)
    raise_problems(damaged_files(folder, manifest["files"]), error=ProofError)
    alone = [Proof("files", 0, 0, passed=True), *prove_alone(folder, manifest)]
    raise_problems(failed_problems(folder, alone), error=ProofError)
    try:
        proofs = AGAIN[_kind(manifest)](folder, manifest)
    except ProofError:
        raise
    except (FinetuneError, OSError) as error:
        reason = error.problems[0] if isinstance(error, FinetuneError) else error
        again = {found.name for found in alone}
        named = ", ".join(entry["name"] for entry in manifest["proofs"] if entry["name"] not in again)
        return Verification(folder, manifest["files"], alone, f"{reason}; not proven again: {named}")
    repeated = {found.name for found in alone}
    proofs = [*alone, *(found for found in proofs if found.name not in repeated or not found.passed)]
    raise_problems(failed_problems(folder, proofs), error=ProofError)
    return Verification(folder, manifest["files"], proofs, None)


def verify_text(again: Verification) -> str:
    """What a person reads: what was proven again and what was not, and every proof with its figures."""
    same = f"{again.out}: its {len(again.files)} files are the manifest's, byte for byte"
    if again.not_proven is None:
        lines = [same, "proven again from what it was made of:"]
    elif len(again.proofs) > 1:
        lines = [same, f"ONLY the files were compared and read by themselves: {again.not_proven}"]
    else:
        lines = [same, f"ONLY the files were compared: {again.not_proven}"]
    return "\n".join([*lines, *proof_lines(again.proofs)])


def _kind(manifest: Mapping[str, Any]) -> str:
    """The format, or for what is made of several adapters or of two models: which of them."""
    format = manifest.get("format", "safetensors")
    if format in ("safetensors", "adapter"):
        return next((kind for kind in ("combined", "extracted") if kind in manifest), format)
    return format


def _merged_again(folder: Path, manifest: Mapping[str, Any]) -> list[Proof]:
    source = _run_of(folder, manifest)
    check_base(source)
    return prove_in_fresh_process([(folder, source.path)])[0]


def _adapter_again(folder: Path, manifest: Mapping[str, Any]) -> list[Proof]:
    source = _run_of(folder, manifest)
    check_base(source)
    return prove_export_in_fresh_process(folder, source.path)


def _combined_again(folder: Path, manifest: Mapping[str, Any]) -> list[Proof]:
    return prove_combined_in_fresh_process(folder, runs_of(folder, manifest))


def _extracted_again(folder: Path, manifest: Mapping[str, Any]) -> list[Proof]:
    base, tuned = models_of(folder, manifest)
    return prove_extracted_in_fresh_process(folder, base, tuned)


def _model_again(folder: Path, manifest: Mapping[str, Any]) -> list[Proof]:
    """Against the model folder, or against the run merged once more: its weights must be those that were exported."""
    made_of = manifest["made_of"]
    if made_of["path"] is not None:
        is_near = made_of["is_folder"]
        model = (folder / made_of["path"]).resolve() if is_near else find_base_folder(made_of["path"])
        return [_same_weights(model, made_of["sha256"]), *prove_export_in_fresh_process(folder, model)]
    source = _run_of(folder, manifest)
    base_sha256 = check_base(source)
    again = folder.resolve().with_name(f"{folder.resolve().name}.verified")  # never published
    refuse_full_disk(again, source.base.facts.stored_bytes)
    with work_folder(again) as work:
        merged = work / "merged"
        merged.mkdir()
        write_release(merged, source, Choice(**manifest["onto"]), base_sha256=base_sha256, out=folder)
        return [_same_weights(merged, made_of["sha256"]), *prove_export_in_fresh_process(folder, merged)]


def _run_of(folder: Path, manifest: Mapping[str, Any]) -> Source:
    """The run that the release was made of.

    Raises:
        UserError: it is not where the manifest says.
    """
    run = (folder / manifest["run"]).resolve()
    if not run.is_dir():
        raise UserError(Problem(str(run), "the run that it was made of is not there any more"))
    return read_source(run)


def _same_weights(model: Path, expected: Mapping[str, str]) -> Proof:
    """One failed proof says more than a hundred thousand differing weights."""
    if not (model / "config.json").is_file():
        raise UserError(Problem(str(model), "the model that was exported is not there any more"))
    return proof("weight files that are not those exported", int(weights_sha256(model) != dict(expected)), 0)


AGAIN: dict[str, Callable[[Path, Mapping[str, Any]], list[Proof]]] = {
    "safetensors": _merged_again,
    "adapter": _adapter_again,
    "combined": _combined_again,
    "extracted": _extracted_again,
    "gguf-adapter": _adapter_again,
    "gguf": _model_again,
    "ollama": _model_again,
    "compressed-tensors": _model_again,
}
