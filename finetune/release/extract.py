"""Make a LoRA adapter of the difference of two models: base and tuned folder in, a proven PEFT folder out."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from finetune.artifact import write_json, write_tokenizer
from finetune.base import Base, TensorEntry, find_base_folder, read_base, read_tensor_entries
from finetune.data.template import choose_template
from finetune.errors import Problem, StorageError, UserError, raise_problems
from finetune.release.card import write_card
from finetune.release.choice import Progress
from finetune.release.delta import DTYPES
from finetune.release.fresh import Proof, answer_of, proof_lines
from finetune.release.licences import write_licence_files
from finetune.release.manifest import CARD, MANIFEST, describe_files
from finetune.release.origin import Origin, describe_model, find_origin, seen_from, weights_sha256
from finetune.release.proof_files import base_generation_config
from finetune.release.source import DEFAULT_DATE
from finetune.release.stacked import Pair, write_lora
from finetune.release.staging import proven_or_reported, publish, refuse_full_disk, work_folder
from finetune.release.weights import read_tensor, same_bytes

SMALL = 2048  # rows or columns up to which the decomposition is computed in float64; above, in half the time


@dataclass(frozen=True)
class Extracted:
    """A published adapter, what it misses of the difference, and what was proven of it."""

    out: Path
    errors: Mapping[str, float]  # by module, relative: |difference - B A| / |difference|, Frobenius
    total_error: float
    left_out: Sequence[str]
    proofs: Sequence[Proof]
    files: Sequence[Mapping[str, Any]]
    notes: Sequence[str]

    def to_json(self) -> dict[str, Any]:
        return {
            "out": str(self.out),
            "relative_errors": dict(self.errors),
            "relative_error": self.total_error,
            "left_out": list(self.left_out),
            "proofs": [found.to_json() for found in self.proofs],
            "files": list(self.files),
            "notes": list(self.notes),
        }


@dataclass(frozen=True)
class Difference:
    """What two folders differ in: linears as pairs of stored tensors by name, and the names of all else."""

    linears: Mapping[str, tuple[TensorEntry, TensorEntry]]
    others: Sequence[str]

    def delta(self, name: str) -> torch.Tensor:
        """Tuned minus base, float64 [out, in].

        Raises:
            StorageError: one of the two holds values that are not finite.
        """
        before, after = (read_tensor(entry).double() for entry in self.linears[name])
        for entry, tensor in zip(self.linears[name], (before, after), strict=True):
            if not tensor.isfinite().all():
                message = f"{name} holds values that are not finite; fetch or train this model again"
                raise StorageError(Problem(str(entry.file), message))
        return after - before


def extract(
    base: str,
    tuned: str,
    *,
    rank: int,
    out: Path,
    linears_only: bool = False,
    progress: Progress = lambda line: None,
) -> Extracted:
    """Decompose, write, prove in a fresh process, and only then give the folder its name.

    Raises:
        UserError: not two versions of one model, no difference, one that no LoRA of linears holds, or `out` is taken.
        StorageError: not enough room, or a damaged file.
        ProofError: a proof failed; the report lies beside `out`, nothing else is left.
    """
    before, after = _models(base, tuned)
    difference = find_difference(before, after.base)
    refuse_difference(difference, base, tuned, linears_only=linears_only)
    refuse_full_disk(out, _adapter_bytes(difference, rank))
    with work_folder(out) as work:
        folder = work / "release"
        folder.mkdir()
        pairs, errors = {}, {}
        squares = [0.0, 0.0]
        for name in difference.linears:
            delta_OI = difference.delta(name)
            pairs[name], missed = _measured(delta_OI, low_rank(delta_OI, rank))
            size = delta_OI.norm().item()
            errors[name.removesuffix(".weight")] = missed / size
            squares = [squares[0] + missed**2, squares[1] + size**2]
            progress(f"{name}: {missed / size:.3%} of its change is missed")
        total = (squares[0] / squares[1]) ** 0.5
        told = {"rank": rank, "relative_errors": errors, "relative_error": total, "left_out": list(difference.others)}
        manifest = _describe(before, after, told, out)
        write_lora(folder, pairs, before.facts, revision=before.facts.revision)
        _write_text(folder, before, after, manifest)
        progress("proving in a fresh process")
        models = before.facts.folder, after.folder
        proofs = proven_or_reported(out, lambda: prove_extracted_in_fresh_process(folder, *models), {"extracted": told})
        files = _seal(folder, manifest, proofs, before, out)
        publish(folder, out)
    return Extracted(out, errors, total, difference.others, proofs, files, manifest["notes"])


def extract_text(done: Extracted) -> str:
    """What a person reads of it: what it misses in all and where most, and every proof with its figures."""
    worst = max(done.errors, key=lambda module: done.errors[module])
    lines = [f"{done.out}: {len(done.files)} files"]
    lines.append(f"it misses {done.total_error:.3%} of the difference; most in {worst}: {done.errors[worst]:.3%}")
    lines += [f"note: {note}" for note in done.notes]
    return "\n".join([*lines, *proof_lines(done.proofs)])


def prove_extracted_in_fresh_process(folder: Path, base: Path, tuned: Path) -> list[Proof]:
    """The proofs of an extracted adapter against the two models that it was made of.

    Raises:
        ProofError: the process ended without an answer.
        UserError, StorageError: what the process says of models or folder.
    """
    found = answer_of("finetune.release.extract_proof", [str(folder), str(base), str(tuned)])
    return [Proof(**values) for values in found]


def find_difference(base: Base, tuned: Base) -> Difference:
    """The tensors whose values differ.

    Raises:
        UserError: the two do not hold the same tensors.
    """
    before = {entry.name: entry for entry in read_tensor_entries(base.facts.folder)}
    after = {entry.name: entry for entry in read_tensor_entries(tuned.facts.folder)}
    raise_problems(_misfits(before, after, tuned.facts.folder))
    linears = {f"{linear.module}.weight" for linear in base.facts.linears}
    differing = [name for name in before if _differs(before[name], after[name])]
    pairs = {name: (before[name], after[name]) for name in differing if name in linears}
    return Difference(pairs, [name for name in differing if name not in linears])


def refuse_difference(difference: Difference, base: str, tuned: str, *, linears_only: bool) -> None:
    """Refuse two models between which there is nothing for a LoRA, or more than one can hold.

    Raises:
        UserError: they are such models.
    """
    others = difference.others
    if others and not linears_only:
        named = ", ".join(others[:8]) + (f" and {len(others) - 8} more" if len(others) > 8 else "")
        message = (
            f"differs from {base} in what is no linear: {named}; a LoRA cannot hold it. --linears-only leaves it out"
        )
        raise UserError(Problem(tuned, message))
    if not difference.linears:
        raise UserError(Problem(tuned, f"no linear differs from {base}; there is nothing to extract"))


def low_rank(delta_OI: torch.Tensor, rank: int) -> Pair:
    """The nearest product B A of this rank, float32: U sqrt(S) and sqrt(S) V^T of the largest singular values."""
    dtype = torch.float64 if min(delta_OI.shape) <= SMALL else torch.float32
    left_OK, sizes_K, right_KI = torch.linalg.svd(delta_OI.to(dtype), full_matrices=False)
    kept = min(rank, len(sizes_K))
    roots_R = sizes_K[:kept].sqrt()
    return (roots_R[:, None] * right_KI[:kept]).float(), (left_OK[:, :kept] * roots_R).float()


def models_of(folder: Path, manifest: Mapping[str, Any]) -> tuple[Path, Path]:
    """The base's and the tuned model's folder that an adapter was extracted from.

    Raises:
        UserError: one of them is not there any more, or holds other weights now.
    """
    told = manifest["extracted"]
    base = find_base_folder(manifest["base"]["id"], revision=manifest["base"]["revision"])
    tuned = (folder / told["tuned"]).resolve()
    for model, expected in ((base, manifest["base"]["sha256"]), (tuned, told["tuned_sha256"])):
        if not (model / "config.json").is_file():
            raise UserError(Problem(str(model), "a model that it was extracted from is not there any more"))
        if weights_sha256(model) != dict(expected):
            raise UserError(Problem(str(model), "holds other weights than those it was extracted from"))
    return base, tuned


def _models(base: str, tuned: str) -> tuple[Base, Origin]:
    """Both models; the tuned one with the template that generate and chat would use, if it has none of its own."""
    folder = Path(base).expanduser()
    before = read_base(str(folder.absolute()) if folder.exists() else base)  # the adapter is loaded from anywhere
    after = find_origin(tuned)
    if after.source is not None:
        raise UserError(Problem(tuned, "is an adapter already; extract takes a whole model, such as merge writes"))
    template = after.template or choose_template("auto", after.base, date=DEFAULT_DATE)
    return before, replace(after, template=template)


def _measured(delta_OI: torch.Tensor, pair: Pair) -> tuple[Pair, float]:
    a_RI, b_OR = pair
    return pair, (delta_OI - b_OR.double() @ a_RI.double()).norm().item()


def _differs(before: TensorEntry, after: TensorEntry) -> bool:
    if before.dtype == after.dtype and same_bytes(before, after):
        return False
    return not torch.equal(read_tensor(before).double(), read_tensor(after).double())  # 0 and -0 are no difference


def _misfits(before: Mapping[str, TensorEntry], after: Mapping[str, TensorEntry], folder: Path) -> Iterator[Problem]:
    cure = "extract needs two versions of one model"
    for name in sorted(before.keys() ^ after.keys()):
        yield Problem(f"{folder}: {name}", f"only {'the base' if name in before else 'this model'} holds it; {cure}")
    for name in sorted(before.keys() & after.keys()):
        shapes, dtypes = (before[name].shape, after[name].shape), {before[name].dtype, after[name].dtype}
        if shapes[0] != shapes[1]:
            yield Problem(f"{folder}: {name}", f"is {shapes[1]}, the base's is {shapes[0]}; {cure}")
        elif len(dtypes) > 1 and not dtypes <= DTYPES.keys():
            yield Problem(f"{folder}: {name}", f"is stored as {after[name].dtype}; models of 16 or 32 bits are needed")


def _adapter_bytes(difference: Difference, rank: int) -> int:
    return sum(4 * min(rank, *entry.shape) * sum(entry.shape) for entry, _ in difference.linears.values())


def _describe(before: Base, after: Origin, told: Mapping[str, Any], out: Path) -> dict[str, Any]:
    """The manifest: the base's name and hashes, and the tuned model's."""
    tuned = {"tuned": seen_from(out, after.folder), "tuned_sha256": weights_sha256(after.folder)}
    origin = Origin(out.name, before, None, None, after.template, after.stop_token_ids)
    notes = [f"extracted by SVD with rank {told['rank']}: it misses {told['relative_error']:.3%} of the difference"]
    if told["left_out"]:
        notes.append(f"not in the adapter, though they differ: {', '.join(told['left_out'])}")
    facts = describe_model(origin, out)
    facts.pop("made_of")
    return {
        **facts,
        "run": seen_from(out, after.folder),
        "format": "adapter",
        "notes": [*facts["notes"], *notes],
        "extracted": {**told, **tuned},
    }


def _write_text(folder: Path, before: Base, after: Origin, manifest: Mapping[str, Any]) -> None:
    assert after.template is not None
    write_licence_files(folder, before.facts.folder, before.facts.base)
    write_tokenizer(folder, after.base.tokenizer_folder, template_source=after.template.source)
    write_json(folder / "generation_config.json", base_generation_config(after.folder))
    write_json(folder / MANIFEST, {**manifest, "proofs": [], "files": describe_files(folder)})


def _seal(
    folder: Path, manifest: Mapping[str, Any], proofs: Sequence[Proof], before: Base, out: Path
) -> list[dict[str, Any]]:
    card = write_card(manifest, proofs, name=out.name, base_folder=before.facts.folder, folder=folder)
    (folder / CARD).write_text(card, encoding="utf-8")
    files = describe_files(folder)
    write_json(folder / MANIFEST, {**manifest, "proofs": [found.to_json() for found in proofs], "files": files})
    return files
