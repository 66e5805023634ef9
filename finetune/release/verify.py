"""Prove a release folder again: the folder in, what still holds out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from finetune.errors import FinetuneError, ProofError, raise_problems
from finetune.release.fresh import Proof, failed_problems, prove_in_fresh_process
from finetune.release.manifest import damaged_files, read_manifest
from finetune.release.source import check_base, read_source


@dataclass(frozen=True)
class Verification:
    """A folder whose files are the manifest's; its proofs, or why they could not be carried out again."""

    out: Path
    files: Sequence[Mapping[str, Any]]
    proofs: Sequence[Proof]
    not_proven: str | None

    def to_json(self) -> dict[str, Any]:
        return {
            "out": str(self.out),
            "proofs": [found.to_json() for found in self.proofs],
            "files": list(self.files),
            "not_proven": self.not_proven,
        }


def verify(folder: Path) -> Verification:
    """Compare every file with the manifest, then prove the release again if its run and base are still there.

    Raises:
        UserError: the folder has no manifest.
        ProofError: a file is missing, changed or not in the manifest, or a proof fails.
    """
    manifest = read_manifest(folder)
    raise_problems(damaged_files(folder, manifest["files"]), error=ProofError)
    files = Proof("files", 0, 0, passed=True)
    run = (folder / manifest["run"]).resolve()
    try:
        check_base(read_source(run))
    except FinetuneError as error:
        named = ", ".join(entry["name"] for entry in manifest["proofs"] if entry["name"] != "files")
        return Verification(folder, manifest["files"], [files], f"{error.problems[0]}; not proven again: {named}")
    proofs = prove_in_fresh_process([(folder, run)])[0]
    raise_problems(failed_problems(folder, proofs), error=ProofError)
    return Verification(folder, manifest["files"], proofs, None)
