"""Merge a trained adapter into its base: a run in, a release folder out that is proven or does not exist."""

from __future__ import annotations

import gc
import os
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from finetune.artifact import read_json, version_of, write_json, write_tokenizer
from finetune.base import TOKENIZER_FILES, TensorEntry, read_tensor_entries, sha256_of
from finetune.errors import Problem, ProofError, StorageError, UserError, raise_problems
from finetune.model.load import load_base
from finetune.release.card import write_card
from finetune.release.delta import DTYPES, Delta, read_deltas, round_tuned
from finetune.release.fresh import Proof, failed_problems, prove_in_fresh_process
from finetune.release.manifest import CARD, MANIFEST, describe_files
from finetune.release.proof import linear_entries, make_onto
from finetune.release.proof_files import base_generation_config, expected_stops, rounded_names, stop_ids
from finetune.release.source import Source, check_base, read_source
from finetune.release.weights import read_tensors, write_shards
from finetune.train.trainer import mean_loss

Progress = Callable[[str], None]
ONTO = ("auto", "original", "dequantized")
# Weights in any form, tokenizers (written anew) and what describes the base alone; all other files come along.
WEIGHT_ENDINGS = (".safetensors", ".safetensors.index.json", ".bin", ".bin.index.json", ".pt", ".pth", ".gguf", ".h5")
LEFT_BEHIND = {*TOKENIZER_FILES, "chat_template.jinja", "chat_template.json", "added_tokens.json", "vocab.json"}
LEFT_BEHIND |= {"merges.txt", "generation_config.json", CARD, MANIFEST}


@dataclass(frozen=True)
class Choice:
    """Which base values were merged onto, why, and the losses that decided, in nats a supervised token."""

    asked: str
    chosen: str
    reason: str
    scores: Mapping[str, float]
    rows: int
    rows_from: str | None

    def to_json(self) -> dict[str, Any]:
        return {**vars(self), "scores": dict(self.scores)}


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
        proofs = prove_in_fresh_process([(staging, source.path)])[0]
        _refuse_failed(out, choice, proofs)
        files = _seal(staging, manifest, proofs, source, name=out.name)
        _publish(staging, out)
    finally:
        shutil.rmtree(staging, ignore_errors=True)
    return Release(out, choice, proofs, files)


def refuse_content(out: Path) -> None:
    """A release takes the name of nothing that is there.

    Raises:
        UserError: `out` exists and is not an empty folder.
    """
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(Problem(str(out), "is there already and not empty; name another folder, or remove it first"))


def choose_onto(source: Source, asked: str, *, progress: Progress = lambda line: None) -> Choice:
    """Measure both candidates as they would be published, and take the one with the lower loss.

    Raises:
        UserError: `asked` is none of auto, original, dequantized.
    """
    if asked not in ONTO:
        raise UserError(Problem("--onto", f"{asked!r} is not possible; write one of {', '.join(ONTO)}"))
    if source.model.quantization == "none":
        return Choice(asked, "original", "the run did not quantise its base", {}, 0, None)
    if asked != "auto":
        return Choice(asked, asked, "as asked", {}, 0, None)
    rows = source.rows
    if not rows.examples:
        return Choice(asked, "original", f"could not be measured, rows to score on: {rows.origin}", {}, 0, None)
    progress(f"scoring two candidates on {len(rows.examples)} {rows.origin}")
    scores = score_candidates(source)
    best = min(scores, key=lambda name: scores[name])
    reason = f"loss {scores[best]:.4f} over {len(rows.examples)} {rows.origin}, against {max(scores.values()):.4f}"
    return Choice(asked, best, reason, scores, len(rows.examples), rows.origin)


def score_candidates(source: Source) -> dict[str, float]:
    """Mean loss over the source's rows of each candidate, rounded as published, computed in float32."""
    deltas = read_deltas(source.adapter)
    model = load_base(replace(source.model, quantization="none", dtype="float32"))
    scores = {}
    for name in ("original", "dequantized"):
        onto = make_onto(source, name)
        for entry, tensor in read_tensors(linear_entries(source)):
            merged = round_tuned(onto.weight(tensor), deltas.get(entry.name), dtype=tensor.dtype)
            model.get_parameter(entry.name).data.copy_(merged)
        scores[name] = mean_loss(model, source.rows.examples, tokens_per_pass=2048)
    del model
    gc.collect()
    return scores


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


def _refuse_failed(out: Path, choice: Choice, proofs: Sequence[Proof]) -> None:
    problems = failed_problems(out, proofs)
    if problems:
        report = out.with_name(f"{out.name}.failed.json")
        write_json(report, {"onto": choice.to_json(), "proofs": [found.to_json() for found in proofs]})
        raise ProofError([*problems, Problem(str(report), "nothing was published; this report holds every figure")])


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
