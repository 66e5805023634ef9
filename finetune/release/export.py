"""Export a model: a run, adapter, merged release or base in; a folder in another format out, proven or not there."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from finetune.artifact import write_json
from finetune.quantised_base import stored_notes
from finetune.release.card import write_card
from finetune.release.choice import Progress
from finetune.release.export_proof import prove_in_fresh_process
from finetune.release.formats import FORMATS, MERGED, Order, chosen_order, refuse_options, refuse_target
from finetune.release.fresh import Proof, proof_lines
from finetune.release.licences import licence_notes, write_licence_files
from finetune.release.manifest import CARD, MANIFEST, describe_files
from finetune.release.merge import merge, merge_into
from finetune.release.origin import describe_merged, describe_model, describe_origin, find_origin
from finetune.release.source import check_base
from finetune.release.staging import proven_or_reported, publish, refuse_content, refuse_full_disk, work_folder


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
class Input:
    """What a folder is written from and proven against: its path, what the manifest says of it, its own proofs."""

    path: Path
    manifest: dict[str, Any]
    proofs: Sequence[Proof]


def export(  # noqa: PLR0913  a parameter is an option
    target: str,
    *,
    format: str,
    out: Path,
    quant: str | None = None,
    onto: str = "auto",
    without_template: bool = False,
    progress: Progress = lambda line: None,
) -> Export:
    """Write, prove in a fresh process, and only then give the folder its name.

    Raises:
        UserError: an unknown format or quantisation, `out` is not empty, or a model that the format cannot hold.
        StorageError: not enough room, or a damaged file.
        ProofError: a proof failed; the report lies beside `out`, nothing else is left.
    """
    refuse_options(format, quant=quant, onto=onto, without_template=without_template)
    refuse_content(out)
    if format == MERGED:
        release = merge(Path(target).expanduser(), out=out, onto=onto, progress=progress)
        return Export(release.out, format, release.proofs, release.files, release.notes)
    order = chosen_order(find_origin(target), format, quant=quant, without_template=without_template)
    refuse_target(order, target, onto=onto)
    # What a merge of an hour would only find out at its end: a model that the format cannot hold, a disk that is full.
    refuse_full_disk(out, FORMATS[format].refuse(order) + _merged_bytes(order))
    with work_folder(out) as work:
        made_of = _input(order, work, out=out, onto=onto, progress=progress)
        done = _write_and_prove(order, made_of, work / "release", out=out, progress=progress)
        publish(work / "release", out)
    return done


def export_text(done: Export) -> str:
    """What a person reads of an export: its files with their sizes, what to know, and every proof with its figures."""
    lines = [f"{done.out}: {len(done.files)} files and {MANIFEST}"]
    lines += [f"  {entry['name']}: {entry['bytes']:,} bytes" for entry in done.files]
    lines += [f"note: {note}" for note in done.notes]
    return "\n".join([*lines, *proof_lines(done.proofs)])


def _merged_bytes(order: Order) -> int:
    is_merged = order.origin.source is not None and FORMATS[order.format].made_of == "model"
    return order.origin.base.facts.stored_bytes if is_merged else 0


def _input(order: Order, work: Path, *, out: Path, onto: str, progress: Progress) -> Input:
    """The run, the run merged for this export only, or the model that is there."""
    origin = order.origin
    if origin.source is None:
        return Input(origin.folder, describe_model(origin, out), ())
    if FORMATS[order.format].made_of == "adapter":
        return Input(origin.source.path, describe_origin(origin, check_base(origin.source), out), ())
    merged = work / "merged"
    release = merge_into(merged, origin.source, out=out, onto=onto, progress=progress)
    proofs = [Proof(f"merge: {found.name}", found.value, found.limit, found.passed) for found in release.proofs]
    return Input(merged, describe_merged(origin, merged, out), proofs)


def _write_and_prove(order: Order, made_of: Input, folder: Path, *, out: Path, progress: Progress) -> Export:
    """The whole folder, proven, with card and manifest."""
    origin, manifest = order.origin, dict(made_of.manifest)
    folder.mkdir()
    write_licence_files(folder, origin.folder, manifest["base"]["id"])  # first: Ollama's Modelfile holds them too
    progress(f"writing {order.format}")
    facts = FORMATS[order.format].write(order, made_of.path, folder)
    notes = [*licence_notes(origin.folder, manifest["base"]["id"], out.name), *facts.pop("notes", ())]
    notes += stored_notes(manifest["base"].get("stored"))
    manifest |= {"format": order.format, "name": origin.name, **facts, "notes": notes}
    write_json(folder / MANIFEST, manifest | {"proofs": [], "files": describe_files(folder)})
    progress("proving in a fresh process")
    proofs = proven_or_reported(out, lambda: [*made_of.proofs, *prove_in_fresh_process(folder, made_of.path)], {})
    card = write_card(manifest, proofs, name=out.name, base_folder=origin.folder, folder=folder)
    (folder / CARD).write_text(card, encoding="utf-8")
    files = describe_files(folder)
    write_json(folder / MANIFEST, manifest | {"proofs": [found.to_json() for found in proofs], "files": files})
    return Export(out, order.format, proofs, files, notes)
