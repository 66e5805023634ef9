"""Merge a trained adapter into its base: a run in, a release folder out that is proven or does not exist."""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from finetune.artifact import read_json, version_of, write_json, write_tokenizer
from finetune.base import TOKENIZER_FILES, sha256_of
from finetune.release.card import write_card
from finetune.release.changes import HEAD
from finetune.release.choice import Choice, Progress, choose_onto
from finetune.release.fresh import Proof, proof_lines, prove_in_fresh_process
from finetune.release.licences import write_licence_files
from finetune.release.manifest import CARD, MANIFEST, as_stored, describe_files, facts_to_tell
from finetune.release.merging import make_merging
from finetune.release.proof import make_onto
from finetune.release.proof_files import base_generation_config, expected_stops, stop_ids
from finetune.release.source import Source, check_base, read_source
from finetune.release.staging import proven_or_reported, publish, refuse_full_disk, work_folder
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
    notes: Sequence[str] = ()  # what its maker has to know before giving it away

    def to_json(self) -> dict[str, Any]:
        return {
            "out": str(self.out),
            "onto": self.onto.chosen,
            "scores": dict(self.onto.scores),
            "choice": self.onto.to_json(),
            "proofs": [found.to_json() for found in self.proofs],
            "files": list(self.files),
            "notes": list(self.notes),
        }


def merge(run_or_adapter: Path, *, out: Path, onto: str = "auto", progress: Progress = lambda line: None) -> Release:
    """Merge, prove in a fresh process, and only then give the folder its name.

    Raises:
        UserError: `out` is not empty, the run is unfinished, the base is another, or the adapter cannot be merged.
        StorageError: not enough room, or a damaged file.
        ProofError: a proof failed; the report lies beside `out`, nothing else is left.
    """
    with work_folder(out) as work:
        release = merge_into(work / "release", read_source(run_or_adapter), out=out, onto=onto, progress=progress)
        publish(work / "release", out)
    return release


def merge_into(
    folder: Path, source: Source, *, out: Path, onto: str = "auto", progress: Progress = lambda line: None
) -> Release:
    """A whole, proven release in `folder`, which does not exist yet; its manifest and problems speak of `out`.

    Raises:
        UserError: the base is another, or the adapter cannot be merged.
        StorageError: not enough room, or a damaged file.
        ProofError: a proof failed; the report lies beside `out`.
    """
    base_sha256 = check_base(source)
    choice = choose_onto(source, onto, progress=progress)
    progress(f"merging onto the {choice.chosen} weights: {choice.reason}")
    folder.mkdir()
    manifest = write_release(folder, source, choice, base_sha256=base_sha256, out=out)
    progress("proving in a fresh process")
    proofs = proven_or_reported(
        out, lambda: prove_in_fresh_process([(folder, source.path)])[0], {"onto": choice.to_json()}
    )
    files = _seal(folder, manifest, proofs, source, name=out.name)
    return Release(out, choice, proofs, files, manifest["notes"])


def release_text(release: Release) -> str:
    """What a person reads of a release: its folder, what it was merged onto, and every proof with its figures."""
    lines = [f"{release.out}: {len(release.files)} files"]
    lines.append(f"merged onto the {release.onto.chosen} weights: {release.onto.reason}")
    lines += [f"note: {note}" for note in release.notes]
    return "\n".join([*lines, *proof_lines(release.proofs)])


def write_release(
    folder: Path, source: Source, choice: Choice, *, base_sha256: Mapping[str, str], out: Path
) -> dict[str, Any]:
    """Every file of a release but its card, with a manifest that holds no proofs yet; the manifest comes back."""
    merging = make_merging(source, make_onto(source, choice.chosen))
    refuse_full_disk(folder, sum(entry.bytes for entry in merging.entries))
    write_shards(folder, merging.entries, merging.tuned, changed=merging.rounded)
    for file in files_that_come_along(source.base.facts.folder):
        shutil.copyfile(file, folder / file.name)
    if HEAD in merging.changes:
        write_untied_config(folder / "config.json")
    write_licence_files(folder, source.base.facts.folder, source.model.base)
    write_tokenizer(folder, source.tokenizer_folder, template_source=source.template.source)
    write_json(folder / "generation_config.json", release_generation_config(source))
    manifest = _manifest(source, choice, base_sha256, out) | {"proofs": [], "files": describe_files(folder)}
    write_json(folder / MANIFEST, manifest)
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
        "base": {"id": source.model.base, "revision": source.model.revision, "sha256": dict(base_sha256)}
        | as_stored(source.base.facts.folder),
        "adapter_sha256": sha256_of(source.adapter / "adapter_model.safetensors"),
        "data_sha256": dict(source.lock["data_sha256"]) if source.lock else {},
        "template_sha256": source.template.sha256,
        "stop_token_ids": sorted(expected_stops(source)),
        "onto": choice.to_json(),
        **facts_to_tell(source.lock, source.base.facts.folder, source.model.base, name=out.name),
        "rows": source.rows.origin,
        "result": read_json(source.path / "result.json") if source.plan else None,
        "recipe": source.recipe_text,
        "plan": plan or None,
    }


def write_untied_config(file: Path) -> None:
    """Let the config say that the head has values of its own."""
    config = read_json(file)
    for part in (config, config.get("text_config", {})):
        if part is config or "tie_word_embeddings" in part:
            part["tie_word_embeddings"] = False
    write_json(file, config)


def _seal(
    folder: Path, manifest: Mapping[str, Any], proofs: Sequence[Proof], source: Source, *, name: str
) -> list[dict[str, Any]]:
    """Write card and final manifest; the files as the manifest lists them come back."""
    card = write_card(manifest, proofs, name=name, base_folder=source.base.facts.folder, folder=folder)
    (folder / CARD).write_text(card, encoding="utf-8")
    # The other hashes are those that the proofs saw: to hash all weights again would take longer than to merge them.
    described = {"name": CARD, "bytes": (folder / CARD).stat().st_size, "sha256": sha256_of(folder / CARD)}
    files = sorted([*manifest["files"], described], key=lambda entry: str(entry["name"]))
    write_json(folder / MANIFEST, {**manifest, "proofs": [found.to_json() for found in proofs], "files": files})
    return files
