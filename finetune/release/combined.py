"""Publish several adapters as one: runs of the same base and a formula in, a proven release or adapter folder out."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from finetune.artifact import write_json, write_tokenizer
from finetune.base import sha256_of
from finetune.errors import Problem, UserError, raise_problems
from finetune.release.algebra import Combining, Formula, make_combining, refuse_unknown_form
from finetune.release.card import write_card
from finetune.release.changes import HEAD
from finetune.release.choice import ONTO, Choice, Progress
from finetune.release.fresh import Proof, answer_of, proof_lines
from finetune.release.licences import write_licence_files
from finetune.release.manifest import CARD, MANIFEST, describe_files
from finetune.release.merge import (
    Release,
    files_that_come_along,
    release_generation_config,
    release_text,
    write_untied_config,
)
from finetune.release.origin import Origin, describe_origin, seen_from
from finetune.release.proof import make_onto
from finetune.release.proof_files import expected_stops
from finetune.release.source import Source, check_base, read_source
from finetune.release.stacked import write_stacked
from finetune.release.staging import proven_or_reported, publish, refuse_full_disk, work_folder
from finetune.release.weights import write_shards


def merge_combined(  # noqa: PLR0913  a parameter is an option
    runs: Sequence[Path],
    formula: Formula,
    *,
    out: Path,
    onto: str = "auto",
    form: str = "weights",
    progress: Progress = lambda line: None,
) -> Release:
    """Combine, write, prove in a fresh process, and only then give the folder its name.

    Raises:
        UserError: the runs do not fit together, one cannot be merged, or `out` is not empty.
        StorageError: not enough room, or a damaged file.
        ProofError: a proof failed; the report lies beside `out`, nothing else is left.
    """
    refuse_unknown_form(form, formula.method)
    sources = [read_source(path) for path in runs]
    base_sha256 = agreed_base(sources)
    choice = chosen_onto(sources, onto, formula, form=form)
    with work_folder(out) as work:
        folder = work / "release"
        folder.mkdir()
        progress(f"combining onto the {choice.chosen} weights: {choice.reason}")
        manifest = describe_combined(sources, formula, choice, base_sha256, out, form=form)
        write_combined(folder, sources, manifest)
        progress("proving in a fresh process")
        proofs = proven_or_reported(
            out, lambda: prove_combined_in_fresh_process(folder, runs), {"formula": formula.to_json()}
        )
        release = _seal(folder, manifest, proofs, sources[0], choice, out)
        publish(folder, out)
    return release


def combined_text(release: Release, *, form: str) -> str:
    """What a person reads of it: folder, formula, and every proof with its figures."""
    if form == "weights":
        return release_text(release)
    lines = [f"{release.out}: {len(release.files)} files", f"one LoRA adapter: {release.onto.reason}"]
    lines += [f"note: {note}" for note in release.notes]
    return "\n".join([*lines, *proof_lines(release.proofs)])


def prove_combined_in_fresh_process(folder: Path, runs: Sequence[Path]) -> list[Proof]:
    """The proofs of a combined folder against the runs it was made of, in the order of its formula.

    Raises:
        ProofError: the process ended without an answer.
        UserError, StorageError: what the process says of runs, base or folder.
    """
    found = answer_of("finetune.release.combined_proof", [str(folder), *map(str, runs)])
    return [Proof(**values) for values in found]


def write_combined(folder: Path, sources: Sequence[Source], manifest: Mapping[str, Any]) -> None:
    """Every file but the card, with a manifest that holds no proofs yet."""
    first, formula = sources[0], formula_of(manifest)
    base_folder = first.base.facts.folder
    if manifest["format"] == "adapter":
        write_stacked(folder, sources, formula)
    else:
        combining = make_combining(sources, formula, make_onto(first, manifest["onto"]["chosen"]))
        _write_weights(folder, base_folder, combining)
    write_licence_files(folder, base_folder, first.model.base)
    write_tokenizer(folder, first.tokenizer_folder, template_source=first.template.source)
    write_json(folder / "generation_config.json", release_generation_config(first))
    write_json(folder / MANIFEST, {**manifest, "proofs": [], "files": describe_files(folder)})


def agreed_base(sources: Sequence[Source]) -> dict[str, str]:
    """sha256 of the base's weight files, after everything that the runs must have in common was compared.

    Raises:
        UserError: two runs differ in base, chat template, tokenizer or stop tokens; both are named.
    """
    first, found = sources[0], check_base(sources[0])
    problems = []
    for other in sources[1:]:
        differing = [what for what, of in IN_COMMON.items() if of(first) != of(other)]
        if check_base(other) != found:
            differing.insert(0, "base")
        problems += [
            Problem(f"{first.path} and {other.path}", f"they have not the same {what}; combine runs that agree in it")
            for what in differing
        ]
    raise_problems(problems)
    return found


def chosen_onto(sources: Sequence[Source], asked: str, formula: Formula, *, form: str) -> Choice:
    """The base's values that the combined delta is added to: as stored, or as asked.

    Raises:
        UserError: `asked` is unknown, does nothing, or the runs computed with different values.
    """
    if asked not in ONTO:
        raise UserError(Problem("--onto", f"{asked!r} is not possible; write one of {', '.join(ONTO)}"))
    if form == "adapter" and asked != "auto":
        raise UserError(Problem("--onto", "nothing is merged for --as adapter; leave it out"))
    kinds = {(source.model.quantization, source.model.dtype) for source in sources}
    if asked == "dequantized" and (len(kinds) > 1 or sources[0].model.quantization == "none"):
        told = ", ".join(f"{source.path}: {source.model.quantization}" for source in sources)
        message = f"the runs did not train on the same quantised base ({told}); write --onto original"
        raise UserError(Problem("--onto", message))
    names = [source.path.resolve().name for source in sources]
    terms = " + ".join(f"{weight:g} x {name}" for weight, name in zip(formula.weights, names, strict=True))
    return Choice(
        asked, "dequantized" if asked == "dequantized" else "original", f"{formula.method} of {terms}", {}, 0, None
    )


def formula_of(manifest: Mapping[str, Any]) -> Formula:
    """The formula that a manifest says a folder was made by."""
    told = manifest["combined"]["formula"]
    return Formula(told["method"], tuple(told["weights"]), told["density"], told["seed"])


def runs_of(folder: Path, manifest: Mapping[str, Any]) -> list[Path]:
    """The runs that a combined folder was made of, in the order of its weights.

    Raises:
        UserError: one is not where the manifest says.
    """
    runs = [(folder / entry["path"]).resolve() for entry in manifest["combined"]["runs"]]
    message = "a run that it was made of is not there any more"
    raise_problems(Problem(str(run), message) for run in runs if not run.is_dir())
    return runs


def describe_combined(  # noqa: PLR0913  what the manifest names
    sources: Sequence[Source],
    formula: Formula,
    choice: Choice,
    base_sha256: Mapping[str, str],
    out: Path,
    *,
    form: str,
) -> dict[str, Any]:
    """The manifest but for proofs and files: all runs with their weights, and what they were trained on together."""
    first = sources[0]
    stops = tuple(sorted(expected_stops(first)))
    origin = Origin(out.name, first.base, first, None, first.template, stops)
    runs = [
        {
            "path": seen_from(out, source.path),
            "weight": weight,
            "adapter_sha256": sha256_of(source.adapter / "adapter_model.safetensors"),
        }
        for source, weight in zip(sources, formula.weights, strict=True)
    ]
    data: dict[str, str] = {}
    licences: dict[str, Any] = {}
    for source in sources:
        told = describe_origin(Origin(out.name, source.base, source, None, source.template, stops), base_sha256, out)
        data |= told["data_sha256"]
        licences |= told["data_licences"]
    of_no_single_run: dict[str, Any] = {"plan": None, "recipe": None, "result": None, "overrides": []}
    return {
        **describe_origin(origin, base_sha256, out),
        **of_no_single_run,
        "format": "adapter" if form == "adapter" else "safetensors",
        "onto": None if form == "adapter" else choice.to_json(),
        "adapter_sha256": [run["adapter_sha256"] for run in runs],
        "data_sha256": data,
        "data_licences": licences,
        "combined": {"formula": formula.to_json(), "runs": runs},
    }


def _write_weights(folder: Path, base_folder: Path, combining: Combining) -> None:
    refuse_full_disk(folder, sum(entry.bytes for entry in combining.entries))
    write_shards(folder, combining.entries, combining.tuned, changed=combining.rounded)
    for file in files_that_come_along(base_folder):
        shutil.copyfile(file, folder / file.name)
    if any(HEAD in changes for changes in combining.changes):
        write_untied_config(folder / "config.json")


def _seal(
    folder: Path, manifest: Mapping[str, Any], proofs: Sequence[Proof], first: Source, choice: Choice, out: Path
) -> Release:
    card = write_card(manifest, proofs, name=out.name, base_folder=first.base.facts.folder, folder=folder)
    (folder / CARD).write_text(card, encoding="utf-8")
    files = describe_files(folder)
    write_json(folder / MANIFEST, {**manifest, "proofs": [found.to_json() for found in proofs], "files": files})
    return Release(out, choice, proofs, files, manifest["notes"])


def _tokenizer(source: Source) -> Any:
    # Parsed: the same tokenizer may have been written twice.
    return json.loads((source.tokenizer_folder / "tokenizer.json").read_text(encoding="utf-8"))


IN_COMMON: dict[str, Callable[[Source], Any]] = {
    "chat template": lambda source: source.template.sha256,
    "tokenizer": _tokenizer,
    "stop tokens": expected_stops,
}
