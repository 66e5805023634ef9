"""What an Ollama folder holds beside its GGUF file: a model's origin in, the Modelfile out, and what it has to be."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from gguf import GGUFReader

from finetune.data.template import Template, parse_date
from finetune.errors import Problem, UserError
from finetune.release.fresh import Proof, proof
from finetune.release.licences import licence_files_of
from finetune.release.ollama.modelfile import FILE, Modelfile, modelfile_text, read_modelfile, readable
from finetune.release.ollama.templates import FILES, Tokens, differing_probes, equal_template
from finetune.release.origin import Origin
from finetune.release.source import DEFAULT_DATE

WITHOUT_TEMPLATE = "--without-template"
DEFAULT_CONTEXT = 4096  # tokens; more takes memory that a laptop may not have
# Ollama's names of generation_config.json's settings; what neither says is Ollama's default, but for repeat_penalty:
# it punishes what was said before, which nothing in training did.
SETTINGS = {
    **{"temperature": "temperature", "top_k": "top_k", "top_p": "top_p", "min_p": "min_p"},
    "repetition_penalty": "repeat_penalty",
}
NO_TEMPLATE = (
    "this Modelfile has no TEMPLATE: Ollama takes one of its own by what the file's chat template looks like, or "
    "passes the prompt as it is; no proof covers what it writes"
)
NO_TOOLS = "the TEMPLATE writes no tools; Ollama refuses requests that have some"


def plan_modelfile(
    origin: Origin, header: Mapping[str, Any], *, weights: str, without_template: bool
) -> tuple[Modelfile, list[str]]:
    """The Modelfile, and notes on it, from the header fields that the GGUF file will have.

    Raises:
        UserError: the chat template has no counterpart in Ollama, or a text cannot stand in a Modelfile.
    """
    vocabulary = header["tokenizer.ggml.tokens"]
    name, template = _template(origin, header) if not without_template else (None, None)
    notes = [NO_TEMPLATE] if template is None else [NO_TOOLS] * (name in ("chatml", "llama3", "mistral"))
    comments = [f"{origin.name}: ollama create NAME -f {FILE}", *notes]
    trained = origin.settings.get("data.max_tokens") or 0
    context = min(origin.base.facts.context_tokens, max(trained, DEFAULT_CONTEXT))
    if context < origin.base.facts.context_tokens:
        comments.append(f"the base reads up to {origin.base.facts.context_tokens} tokens; num_ctx says how much memory")
    modelfile = Modelfile(
        weights,
        {"num_ctx": context, **_sampling(origin.generation_config)},
        tuple(vocabulary[stop] for stop in origin.stop_token_ids),
        template,
        origin.settings.get("data.system"),
        comments=comments,
    )
    modelfile_text(modelfile)  # refuses what cannot be written
    return modelfile, notes


def write_modelfile(folder: Path, modelfile: Modelfile) -> None:
    """The Modelfile, with the licence texts that lie in the folder."""
    text = modelfile_text(replace(modelfile, licenses=_licenses(folder)))
    (folder / FILE).write_text(text, encoding="utf-8")


def describe_modelfile(modelfile: Modelfile, template: Template | None) -> dict[str, Any]:
    """What the manifest says of it, for the proof."""
    return {
        "parameters": dict(modelfile.parameters),
        "system": modelfile.system,
        "template": modelfile.template,
        "bos_token": template.bos_token if template else None,
        "eos_token": template.eos_token if template else None,
    }


def prove_modelfile(folder: Path, manifest: Mapping[str, Any]) -> list[Proof]:
    """The Modelfile against the folder's GGUF file and the manifest; no model is needed.

    The conversations of the probes are written with its TEMPLATE as Ollama writes them, and with the chat template in
    the file's header as training wrote them.
    """
    name = "Modelfile instructions that differ from the manifest"
    try:
        found = read_modelfile((folder / FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return [proof(name, 1, 0)]
    if not (folder / found.weights).is_file():
        return [proof("Modelfile names a file that is not there", 1, 0)]
    fields = {key: field.contents() for key, field in GGUFReader(folder / found.weights).fields.items()}
    wanted = manifest["ollama"]
    vocabulary = fields["tokenizer.ggml.tokens"]
    stops = {vocabulary[stop] for stop in manifest["stop_token_ids"]}
    differing = [
        dict(found.parameters) != wanted["parameters"],
        found.system != wanted["system"],
        found.licenses != _licenses(folder),
        found.template != wanted["template"],
    ]
    proofs = [
        proof(name, sum(differing), 0),
        proof("Modelfile stop tokens that differ", len(stops ^ set(found.stops)), 0),
    ]
    if found.template is not None:
        told = (wanted["bos_token"], wanted["eos_token"], parse_date(DEFAULT_DATE))
        template = Template("trained", fields["tokenizer.chat_template"], *told)
        count = differing_probes(found.template, template, tokens_of(template, fields))
        proofs.append(proof("probes that Ollama's TEMPLATE writes in another way than training", count, 0))
    return proofs


def tokens_of(template: Template, header: Mapping[str, Any]) -> Tokens:
    """bos and eos as the template is told them, and whether Ollama writes bos by itself."""
    return Tokens(template.bos_token or "", template.eos_token or "", bool(header["tokenizer.ggml.add_bos_token"]))


def _licenses(folder: Path) -> tuple[str, ...]:
    files = licence_files_of(folder)
    return tuple(readable(file.read_text(encoding="utf-8", errors="replace")) for file in files)


def _template(origin: Origin, header: Mapping[str, Any]) -> tuple[str, str]:
    """Name and source of the template of ours that writes what the origin's own writes."""
    cure = f"add {WITHOUT_TEMPLATE} and write TEMPLATE by hand, or use --format gguf, which holds the original"
    if origin.template is None:
        raise UserError(Problem(origin.name, f"has no chat template for Ollama's TEMPLATE; {cure}"))
    found = equal_template(origin.template, tokens_of(origin.template, header))
    if found is None:
        message = "its chat template cannot be said in Ollama's language: it writes the probe conversations in another "
        raise UserError(Problem(origin.name, f"{message}way than each of ours does ({', '.join(FILES)}); {cure}"))
    return found


def _sampling(config: Mapping[str, Any]) -> dict[str, Any]:
    """What generation_config.json says about choosing the next token."""
    asked = {ours: config[theirs] for theirs, ours in SETTINGS.items() if isinstance(config.get(theirs), int | float)}
    if not config.get("do_sample"):
        asked = {"temperature": 0} if config.get("do_sample") is False else {}
    return {"repeat_penalty": 1, **asked}
