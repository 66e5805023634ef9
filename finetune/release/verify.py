"""Prove a release folder again, whatever its format: the folder in, what still holds out."""

from __future__ import annotations

import json
import math
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

from finetune.base import (
    Base,
    find_base_folder,
    read_base,
    read_chat_template,
    read_tensor_entries,
    sha256_of,
    weight_files,
)
from finetune.data.rows import Turn
from finetune.data.template import Template, TemplateProblem, parse_date
from finetune.errors import FinetuneError, Problem, ProofError, UserError, raise_problems
from finetune.release.fresh import PACKAGE_PARENT, Proof, failed_problems, proof, prove_in_fresh_process
from finetune.release.manifest import damaged_files, read_manifest
from finetune.release.source import DEFAULT_DATE, PROBES, check_base, read_source

START = "import sys; sys.path.insert(0, sys.argv.pop(1)); from finetune.release.verify import main; main()"
STOP_FIELDS = tuple(f"tokenizer.ggml.{name}_token_id" for name in ("eos", "eot", "eom"))


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
    """Compare every file with the manifest, then prove the release again if what it was made of is still there.

    Raises:
        UserError: the folder has no manifest.
        ProofError: a file is missing, changed or not in the manifest, or a proof fails.
    """
    manifest = read_manifest(folder)
    raise_problems(damaged_files(folder, manifest["files"]), error=ProofError)
    alone = [Proof("files", 0, 0, passed=True)]
    if manifest.get("format") == "gguf":
        alone += prove_file_alone(folder, manifest)
    raise_problems(failed_problems(folder, alone), error=ProofError)
    try:
        proofs = AGAIN[manifest.get("format", "safetensors")](folder, manifest)
    except ProofError:
        raise
    except (FinetuneError, OSError) as error:  # the last where there is no room to merge the run once more
        reason = error.problems[0] if isinstance(error, FinetuneError) else error
        again = {found.name for found in alone}
        named = ", ".join(entry["name"] for entry in manifest["proofs"] if entry["name"] not in again)
        return Verification(folder, manifest["files"], alone, f"{reason}; not proven again: {named}")
    repeated = {found.name for found in alone}
    proofs = [*alone, *(found for found in proofs if found.name not in repeated or not found.passed)]
    raise_problems(failed_problems(folder, proofs), error=ProofError)
    return Verification(folder, manifest["files"], proofs, None)


def prove_file_alone(folder: Path, manifest: Mapping[str, Any]) -> list[Proof]:
    """What a GGUF file must hold whatever it was made of: finite weights, the manifest's template and stop tokens."""
    import numpy as np
    from gguf import GGUFReader, quants

    try:
        reader = GGUFReader(gguf_file(folder))
    except (ValueError, IndexError, KeyError) as error:
        raise ProofError(Problem(str(folder), f"its GGUF file cannot be read ({error}); export again")) from error
    fields = {key: field.contents() for key, field in reader.fields.items()}
    template = fields.get("tokenizer.chat_template")
    stops = {fields[key] for key in STOP_FIELDS if key in fields}
    types: dict[str, int] = {}
    broken = 0
    for tensor in reader.tensors:
        types[tensor.tensor_type.name] = types.get(tensor.tensor_type.name, 0) + 1
        rows = tensor.data.reshape(-1, tensor.data.shape[-1])
        step = max(1, (1 << 22) // rows.shape[1])
        for start in range(0, rows.shape[0], step):
            values = quants.dequantize(rows[start : start + step], tensor.tensor_type)
            broken += int((~np.isfinite(values)).sum())
    return [
        proof("template differs", int(_sha256_of_text(template) != manifest["template_sha256"]), 0),
        proof("stop tokens that differ", len(stops ^ set(manifest["stop_token_ids"])), 0),
        proof("tensor types that differ from the manifest", int(types != manifest["tensor_types"]), 0),
        proof("weights that are not finite", broken, 0),
    ]


def prove_export_in_fresh_process(folder: Path, source: Path) -> list[Proof]:
    """The proofs of an exported folder against the model (gguf) or run (adapter) it was made of.

    Raises:
        ProofError: the process ended without an answer.
    """
    command = [sys.executable, "-c", START, str(PACKAGE_PARENT), str(folder), str(source)]
    answer = subprocess.run(command, capture_output=True, text=True, check=False)
    lines = answer.stdout.strip().splitlines()
    if answer.returncode or not lines:
        reason = (answer.stderr.strip().splitlines() or ["it gave no reason"])[-1]
        raise ProofError(Problem(str(folder), f"the proof could not be carried out: {reason}"))
    return [Proof(**values) for values in json.loads(lines[-1])]


def prove_export(folder: Path, source: Path) -> list[Proof]:
    """Every proof of an exported folder, from the files on disk alone; damaged files are not read further."""
    manifest = read_manifest(folder)
    proofs = [proof("files", len(damaged_files(folder, manifest["files"])), 0)]
    return proofs + PROVERS[manifest["format"]](folder, source, manifest) if proofs[0].passed else proofs


def prove_gguf_folder(folder: Path, model: Path, manifest: Mapping[str, Any]) -> list[Proof]:
    """The file against the model folder it was written from."""
    from finetune.release.gguf.prove import prove_gguf

    template = read_chat_template(model)
    against = prove_gguf(
        gguf_file(folder),
        model,
        quant=manifest["quant"],
        chat_template=template,
        stop_token_ids=manifest["stop_token_ids"],
        name=manifest["name"],
        chat_texts=chat_texts(read_base(str(model.absolute())), template),
    )
    return prove_file_alone(folder, manifest) + against


def prove_adapter_folder(folder: Path, run: Path, manifest: Mapping[str, Any]) -> list[Proof]:
    """Plain PEFT with this folder computes what the base with the run's exact delta computes, without PEFT."""
    import torch

    from finetune.model.adapter import load_adapter
    from finetune.model.load import load_base
    from finetune.release.delta import read_deltas, round_tuned
    from finetune.release.proof import LOGITS_LIMIT, NO_OP_LIMIT, PROBE_TOKENS, load_plain, probe_logits
    from finetune.release.proof_files import prove_text
    from finetune.release.weights import read_tensors
    from finetune.train.trainer import autocast

    source = read_source(run)
    probes = [ids[:PROBE_TOKENS] for ids in source.probe_ids()]
    base_folder, deltas = source.base.facts.folder, read_deltas(source.adapter)
    reference = load_plain(base_folder, source.model.device)
    base = torch.cat(probe_logits(reference, probes))
    for entry, tensor in read_tensors([e for e in read_tensor_entries(base_folder) if e.name in deltas]):
        exact = round_tuned(tensor, deltas[entry.name], dtype=torch.float32)
        reference.get_parameter(entry.name).data.copy_(exact)
    exact_logits = torch.cat(probe_logits(reference, probes))
    del reference
    loaded = load_adapter(load_plain(base_folder, source.model.device), folder)
    logits = torch.cat(probe_logits(loaded, probes))
    del loaded
    as_run = []
    for adapter in (source.adapter, folder):
        with autocast(source.model.device, source.model.dtype):
            as_run.append(torch.cat(probe_logits(load_adapter(load_base(source.model), adapter), probes)))
    scale, limit = exact_logits.std().item(), LOGITS_LIMIT["F32"] * math.sqrt(source.base.facts.layers)
    effect = (exact_logits - base).square().mean().sqrt().item()
    missed = (logits - exact_logits).square().mean().sqrt().item()
    return [
        *prove_text(folder, source),
        proof("logits with plain peft against base + delta", _largest(logits, exact_logits) / scale, limit),
        proof("no-op", missed / effect if effect else math.inf, NO_OP_LIMIT),
        proof("logits on the run's base against the run's", _largest(*as_run) / scale, limit),
    ]


def chat_texts(base: Base, template_source: str | None) -> list[str]:
    """The probe conversations as the template renders them; those that it refuses are left out."""
    if template_source is None:
        return []
    template = Template("own", template_source, base.bos_token, base.eos_token, parse_date(DEFAULT_DATE))
    texts = []
    for probe in PROBES:
        turns = [Turn("assistant" if place % 2 else "user", text) for place, text in enumerate(probe)]
        try:
            texts.append(template.text(turns, add_generation_prompt=True))
        except TemplateProblem:
            continue
    return texts


def gguf_file(folder: Path) -> Path:
    """The one GGUF file of an exported folder."""
    files = sorted(folder.glob("*.gguf"))
    if len(files) != 1:
        raise ProofError(Problem(str(folder), f"holds {len(files)} .gguf files, one is expected; export again"))
    return files[0]


def main() -> None:
    """`python -m finetune.release.verify FOLDER SOURCE` prints the JSON list of an exported folder's proofs."""
    from finetune.machine import quiet_libraries

    quiet_libraries()
    proofs = prove_export(Path(sys.argv[1]), Path(sys.argv[2]))
    sys.stdout.write(json.dumps([found.to_json() for found in proofs]) + "\n")


def _merged_again(folder: Path, manifest: Mapping[str, Any]) -> list[Proof]:
    run = (folder / manifest["run"]).resolve()
    check_base(read_source(run))
    return prove_in_fresh_process([(folder, run)])[0]


def _adapter_again(folder: Path, manifest: Mapping[str, Any]) -> list[Proof]:
    run = (folder / manifest["run"]).resolve()
    check_base(read_source(run))
    return prove_export_in_fresh_process(folder, run)


def _gguf_again(folder: Path, manifest: Mapping[str, Any]) -> list[Proof]:
    """Against the model folder, or against the run merged once more: its weights must be those that were exported."""
    made_of = manifest["made_of"]
    if made_of["path"] is not None:
        is_near = made_of["is_folder"]
        model = (folder / made_of["path"]).resolve() if is_near else find_base_folder(made_of["path"])
        return [_same_weights(model, made_of["sha256"]), *prove_export_in_fresh_process(folder, model)]
    from finetune.release.choice import Choice
    from finetune.release.merge import write_release  # it imports this file

    run = (folder / manifest["run"]).resolve()
    source = read_source(run)
    base_sha256 = check_base(source)
    with tempfile.TemporaryDirectory(prefix=f".{folder.name}.", dir=folder.resolve().parent) as name:
        write_release(Path(name), source, Choice(**manifest["onto"]), base_sha256=base_sha256, out=folder)
        return [_same_weights(Path(name), made_of["sha256"]), *prove_export_in_fresh_process(folder, Path(name))]


def _same_weights(model: Path, expected: Mapping[str, str]) -> Proof:
    """One failed proof says more than a hundred thousand differing weights."""
    if not (model / "config.json").is_file():
        raise UserError(Problem(str(model), "the model that was exported is not there any more"))
    found = {file.name: sha256_of(file) for file in weight_files(model)}
    return proof("weight files that are not those exported", int(found != dict(expected)), 0)


def _sha256_of_text(text: str | None) -> str | None:
    return None if text is None else sha256(text.encode()).hexdigest()


def _largest(some: Any, others: Any) -> float:
    return float((some - others).abs().max())


PROVERS: dict[str, Callable[[Path, Path, Mapping[str, Any]], list[Proof]]] = {
    "gguf": prove_gguf_folder,
    "adapter": prove_adapter_folder,
}
AGAIN: dict[str, Callable[[Path, Mapping[str, Any]], list[Proof]]] = {
    "safetensors": _merged_again,
    "adapter": _adapter_again,
    "gguf": _gguf_again,
}
