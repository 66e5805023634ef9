"""Prove an exported folder in a process that has seen nothing but files: folder and source in, proofs out."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Mapping
from hashlib import sha256
from pathlib import Path
from typing import Any

from finetune.base import TOKENIZER_FILES, read_base, read_chat_template
from finetune.data.rows import Turn
from finetune.data.template import Template, TemplateProblem
from finetune.errors import FinetuneError, Problem, ProofError
from finetune.release.fresh import Proof, answer_of, proof
from finetune.release.manifest import damaged_files, read_manifest
from finetune.release.origin import own_template
from finetune.release.source import PROBES, read_source

TEXT_FILES = (*TOKENIZER_FILES, "chat_template.jinja", "generation_config.json")
STOP_FIELDS = tuple(f"tokenizer.ggml.{name}_token_id" for name in ("eos", "eot", "eom"))


def prove_in_fresh_process(folder: Path, against: Path) -> list[Proof]:
    """The proofs of an exported folder against the model or the run that it was made of.

    Raises:
        ProofError: the process ended without an answer.
        UserError, StorageError: what the process says of model, run or folder.
    """
    found = answer_of("finetune.release.export_proof", [str(folder), str(against)])
    return [Proof(**values) for values in found]


def prove_export(folder: Path, against: Path) -> list[Proof]:
    """Every proof of an exported folder, from the files on disk alone; damaged files are not read further."""
    manifest = read_manifest(folder)
    proofs = [proof("files", len(damaged_files(folder, manifest["files"])), 0)]
    if not proofs[0].passed:
        return proofs
    return proofs + prove_alone(folder, manifest) + AGAINST[manifest["format"]](folder, against, manifest)


def prove_alone(folder: Path, manifest: Mapping[str, Any]) -> list[Proof]:
    """What needs nothing but the folder; nothing for a format whose every proof needs what it was made of."""
    proofs: list[Proof] = []
    for prove in ALONE.get(manifest.get("format", ""), ()):
        proofs += prove(folder, manifest)
    return proofs


def prove_gguf_header(folder: Path, manifest: Mapping[str, Any]) -> list[Proof]:
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


def prove_modelfile_alone(folder: Path, manifest: Mapping[str, Any]) -> list[Proof]:
    """Ollama's Modelfile against the folder's own GGUF file."""
    from finetune.release.ollama.folder import prove_modelfile

    return prove_modelfile(folder, manifest)


def prove_gguf_folder(folder: Path, model: Path, manifest: Mapping[str, Any]) -> list[Proof]:
    """The file against the model folder it was written from."""
    from finetune.release.gguf.prove import prove_gguf

    template = own_template(read_base(str(model.absolute())), read_chat_template(model))
    return prove_gguf(
        gguf_file(folder),
        model,
        quant=manifest["quant"],
        chat_template=template.source if template else None,
        stop_token_ids=manifest["stop_token_ids"],
        name=manifest["name"],
        chat_texts=chat_texts(template),
    )


def prove_ollama_folder(folder: Path, model: Path, manifest: Mapping[str, Any]) -> list[Proof]:
    """The file as that of a gguf export; and the tokens with which the Modelfile was compared are the model's."""
    base = read_base(str(model.absolute()))
    told = manifest["ollama"]
    differing = [told["bos_token"] != base.bos_token, told["eos_token"] != base.eos_token]
    proofs = prove_gguf_folder(folder, model, manifest)
    if told["template"] is not None:
        proofs.append(proof("bos or eos that the TEMPLATE was compared with is another", sum(differing), 0))
    return proofs


def prove_compressed_folder(folder: Path, model: Path, manifest: Mapping[str, Any]) -> list[Proof]:
    """The folder against the model folder it was compressed from."""
    from finetune.release.compressed import prove_compressed

    files = [name for name in TEXT_FILES if (model / name).is_file() or (folder / name).is_file()]
    changed = sum(_bytes_of(folder / name) != _bytes_of(model / name) for name in files)
    return [
        proof("tokenizer, template and stop token files that changed", changed, 0),
        *prove_compressed(folder, model),
    ]


def prove_gguf_adapter_folder(folder: Path, run: Path, manifest: Mapping[str, Any]) -> list[Proof]:
    """The file against the run's adapter."""
    from finetune.release.gguf.adapter import prove_gguf_adapter

    return prove_gguf_adapter(gguf_file(folder), read_source(run))


def prove_adapter_of_run(folder: Path, run: Path, manifest: Mapping[str, Any]) -> list[Proof]:
    """Plain PEFT with this folder computes what the base with the run's exact changes computes, without PEFT."""
    from finetune.release.adapter_proof import prove_adapter_folder

    return prove_adapter_folder(folder, read_source(run))


def chat_texts(template: Template | None) -> list[str]:
    """The probe conversations as the template renders them; those that it refuses are left out."""
    if template is None:
        return []
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
    """`python -m finetune.release.export_proof FOLDER AGAINST` prints the JSON list of an exported folder's proofs."""
    from finetune.machine import quiet_libraries

    quiet_libraries()
    try:
        answer: Any = [found.to_json() for found in prove_export(Path(sys.argv[1]), Path(sys.argv[2]))]
    except FinetuneError as error:  # what a user can cause, told as such by the process that asked
        answer = {"code": error.code, "problems": [vars(problem) for problem in error.problems]}
    sys.stdout.write(json.dumps(answer) + "\n")


def _sha256_of_text(text: str | None) -> str | None:
    return None if text is None else sha256(text.encode()).hexdigest()


def _bytes_of(file: Path) -> bytes | None:
    return file.read_bytes() if file.is_file() else None


# What a folder is proven against: the model or the run that it was made of, or nothing but itself.
AGAINST: dict[str, Callable[[Path, Path, Mapping[str, Any]], list[Proof]]] = {
    "adapter": prove_adapter_of_run,
    "gguf": prove_gguf_folder,
    "gguf-adapter": prove_gguf_adapter_folder,
    "ollama": prove_ollama_folder,
    "compressed-tensors": prove_compressed_folder,
}
ALONE: dict[str, tuple[Callable[[Path, Mapping[str, Any]], list[Proof]], ...]] = {
    "gguf": (prove_gguf_header,),
    "ollama": (prove_gguf_header, prove_modelfile_alone),
}
