"""The model card of a release: its manifest, its proofs and its base in, one page of Markdown for the hub out."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from finetune.release.card_parts import PROOFS_MEAN, USE
from finetune.release.fresh import Proof
from finetune.release.licences import Found, find_licence, licence_files

# What the hub writes into its own list of licences; every other one is `other` with a name and a link.
HUB_LICENCES = {"llama2", "llama3", "llama3.1", "llama3.2", "llama3.3", "gemma", "apache-2.0", "mit"}
HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
HUB_CACHE = re.compile(r"(models|datasets)--([^/]+?)--([^/]+)/snapshots/([^/]+)")
LIBRARY = {"gguf": "gguf", "gguf-adapter": "gguf", "ollama": "gguf", "adapter": "peft"}
ADAPTERS = {"adapter", "gguf-adapter"}
ONE_FILE = {"gguf", "gguf-adapter", "ollama"}


def write_card(
    manifest: Mapping[str, Any], proofs: Sequence[Proof], *, name: str, base_folder: Path, folder: Path | None = None
) -> str:
    """README.md of a release of any format; `folder` is where its files lie now."""
    found = find_licence(base_folder, manifest["base"]["id"])
    sections: list[tuple[str, str]] = [
        ("To know before you use it", _list(manifest.get("notes", ()))),
        ("Use", _use(manifest, name, folder)),
        ("Licence", _licence(manifest["base"], found, list(licence_files(base_folder, manifest["base"]["id"])))),
        ("Data", _data(manifest)),
        ("Figures", _figures(manifest)),
        ("Proofs", _proofs(manifest, proofs)),
        ("Recipe", _recipe(manifest)),
    ]
    display = found.licence.display if found.licence else ""
    parts = [front_matter_of(manifest, found), f"# {_text(name)}", *([f"**{display}**"] if display else [])]
    parts += [_origin(manifest), *(f"## {title}\n\n{text}" for title, text in sections if text)]
    return "\n\n".join(parts) + "\n"


def front_matter_of(manifest: Mapping[str, Any], found: Found) -> str:
    """The YAML between the two lines of dashes, as the hub reads it."""
    from huggingface_hub import ModelCardData

    format, base = manifest.get("format", "safetensors"), hub_id_of(manifest["base"]["id"], "models")
    datasets = [hub_id for name in manifest.get("data_sha256", {}) if (hub_id := hub_id_of(name, "datasets"))]
    relation = "adapter" if format in ADAPTERS else "finetune" if manifest.get("plan") else "quantized"
    if manifest.get("adapter_sha256") and format not in ADAPTERS:
        relation = "finetune"
    values: dict[str, Any] = {"base_model": base, "base_model_relation": relation} if base else {}
    values |= _licence_values(found)
    data = ModelCardData(
        **values,
        datasets=list(dict.fromkeys(datasets)) or None,
        library_name=LIBRARY.get(format, "transformers"),
        pipeline_tag="text-generation",
        tags=["finetune", *(["lora"] if manifest.get("adapter_sha256") else [])],
    )
    return f"---\n{data.to_yaml()}\n---"


def hub_id_of(name: str, kind: str) -> str | None:
    """owner/name of a base or a data file: a hub id as it is, or from the path of the hub's cache; else None."""
    if match := HUB_CACHE.search(name):
        return f"{match.group(2)}/{match.group(3)}" if match.group(1) == kind else None
    is_id = kind == "models" and HUB_ID.fullmatch(name) and name[0] not in ".~" and not Path(name).exists()
    return name if is_id else None


def _licence_values(found: Found) -> dict[str, str]:
    if found.declared.get("license"):  # as the base says it; the hub has taken it from there already
        return found.declared
    if found.licence is None:
        return {}
    known = next((each for each in found.licence.ids if each in HUB_LICENCES), None)
    other = {"license": "other", "license_name": found.licence.ids[0], "license_link": found.licence.link}
    return {"license": known} if known else other


def _origin(manifest: Mapping[str, Any]) -> str:
    base, format = _base_link(manifest["base"]), manifest.get("format", "safetensors")
    if format in ADAPTERS:
        return f"An adapter for {base}: what fine-tuning added, without the base's own weights."
    if not manifest.get("adapter_sha256"):
        return f"{base}, not fine-tuned, in another format."
    onto = manifest["onto"]
    weights = "the base's own weights" if onto["chosen"] == "original" else "the weights as the quantised base computes"
    text = f"A fine-tuned version of {base}. Its adapter was merged onto {weights}: {_text(onto['reason'])}."
    quant = f" ({manifest['quant']})" if manifest.get("quant") else ""
    return text if format == "safetensors" else f"{text} Then it was written as {format}{quant}; see the proofs below."


def _base_link(base: Mapping[str, Any]) -> str:
    hub_id, revision = hub_id_of(base["id"], "models"), base.get("revision")
    cached = HUB_CACHE.search(base["id"])
    revision = revision or (cached.group(4) if cached else None)
    at = f", revision {_code(revision)}" if revision else ""
    if hub_id:
        return f"[{_text(hub_id)}](https://huggingface.co/{hub_id}{f'/tree/{revision}' if revision else ''}){at}"
    return _code(base["id"] if base["id"].startswith("builtin:") else Path(base["id"]).name) + at


def _use(manifest: Mapping[str, Any], name: str, folder: Path | None) -> str:
    format = manifest.get("format", "safetensors")
    files = sorted(file.name for file in folder.glob("*.gguf")) if folder else []
    words = {
        "name": name,
        "base": hub_id_of(manifest["base"]["id"], "models") or "BASE",
        "file": (files or ["FILE"])[0],
    }
    blocks = [_fenced(text.format(**words), language) for language, text in USE.get(format, USE["safetensors"])]
    return "\n\n".join([*blocks, _list(_chat_facts(manifest, folder)), *_one_file(manifest, folder, files)])


def _chat_facts(manifest: Mapping[str, Any], folder: Path | None) -> Iterable[str]:
    plan = manifest.get("plan") or {}
    settings = plan.get("settings", {})
    if plan.get("template"):
        yield f"Chat template: {_code(plan['template'])}, the very one of training (it comes with the tokenizer)."
    if stops := manifest.get("stop_token_ids"):
        yield f"It stops at token id {' or '.join(map(str, stops))}."
    if settings:
        system = settings.get("data.system")
        yield (
            f"System prompt of the rows that had none: {_quoted(system)}."
            if system
            else ("Training added no system prompt to its rows.")
        )
    if settings and _may_ask_the_date(folder):
        yield (
            f"Where the template asks for the date, it was told {settings.get('data.date')} while training and proving;"
            " a server tells it its own."
        )


def _may_ask_the_date(folder: Path | None) -> bool:
    """False only where the template lies there and has no word of a date."""
    file = folder / "chat_template.jinja" if folder else None
    return file is None or not file.is_file() or bool(re.search("date|strftime", file.read_text(encoding="utf-8")))


def _one_file(manifest: Mapping[str, Any], folder: Path | None, files: Sequence[str]) -> list[str]:
    if manifest.get("format") not in ONE_FILE or not folder or not files:
        return []
    types = ", ".join(f"{count} {kind}" for kind, count in manifest.get("tensor_types", {}).items())
    quant = f"{manifest['quant']}, " if manifest.get("quant") else ""
    size = f"{(folder / files[0]).stat().st_size:,} bytes"
    return [f"The file {_code(files[0])}: {quant}{size}" + (f", tensors: {types}." if types else ".")]


def _licence(base: Mapping[str, Any], found: Found, files: Sequence[str]) -> str:
    licence, declared = found.licence, found.declared
    if licence is None:
        said = declared.get("license_name") or declared.get("license")
        link = f" ({declared['license_link']})" if declared.get("license_link") else ""
        told = (
            f"The base's, which its card calls {_code(said)}{link}." if said else "The base's, which it does not state."
        )
        return f"{told} In this folder: {_codes(files)}." if files else f"{told} See {_base_link(base)}."
    lines = [f"That of the base: [{licence.name}]({licence.link}), known by {found.by}."]
    duties = [
        *([f"Show “{licence.display}” in the documentation, as above."] if licence.display else []),
        *([f"Let the model's name begin with “{licence.prefix}”."] if licence.prefix else []),
        *([f"Keep the file NOTICE: “{licence.notice}”"] if licence.notice else []),
        *licence.duties,
    ]
    lines.append("It asks of whoever gives this model, or one made from it, to others:")
    lines.append(_list(duties))
    lines.append("" if found.has_text else "The base's folder held no copy of it.")
    lines.append(f"In this folder: {_codes(files)}." if files else "")
    return "\n\n".join(line for line in lines if line)


def _codes(names: Sequence[str]) -> str:
    return ", ".join(map(_code, names))


def _data(manifest: Mapping[str, Any]) -> str:
    if not manifest.get("data_sha256"):
        return "" if not manifest.get("adapter_sha256") else "Not known: the adapter came without its run."
    licences = manifest.get("data_licences", {})
    rows = []
    for name, digest in manifest["data_sha256"].items():
        hub_id = hub_id_of(name, "datasets")
        link = f" of [{_text(hub_id)}](https://huggingface.co/datasets/{hub_id})" if hub_id else ""
        rows.append((_code(Path(name).name) + link, _text(licences.get(name) or "not stated"), _code(digest)))
    return _table(("file", "licence", "sha256"), rows)


def _figures(manifest: Mapping[str, Any]) -> str:
    result, onto, plan = manifest.get("result"), manifest.get("onto") or {}, manifest.get("plan") or {}
    rows: list[tuple[str, str, str]] = []
    if result:
        last = min(20, result["steps"])
        how = f"mean of the last {last} of {result['steps']} steps; {result['examples']:,} examples"
        rows.append(("training loss", f"{result['train_loss']:.4f}", how))
    if result and result.get("eval_loss") is not None:
        held_out = plan.get("eval_examples")
        when = f"after step {result['adapter_step']}" if result.get("adapter_step") else "after the last step"
        how = f"{when}, over {held_out:,} held-out rows" if held_out else when
        rows.append(("held-out loss", f"{result['eval_loss']:.4f}", how + ", base and adapter as trained"))
    for candidate, loss in onto.get("scores", {}).items():
        how = f"over {onto['rows']} {onto['rows_from']}, weights rounded as published, computed in float32"
        what = "this release" if manifest.get("format", "safetensors") == "safetensors" else "what this was made of"
        chosen = f", {what}" if candidate == onto["chosen"] else ""
        rows.append((f"loss merged onto the {candidate} weights{chosen}", f"{loss:.4f}", how))
    if not rows:
        return ""
    return _table(("figure", "value", "how it was measured"), rows) + "\n\n" + _measured_with(manifest, plan)


def _measured_with(manifest: Mapping[str, Any], plan: Mapping[str, Any]) -> str:
    text = "Losses are in nats a learned token and hold for these rows, no others."
    model = plan.get("model")
    if model:
        stored = "" if model["quantization"] == "none" else f", base stored as {model['quantization']}"
        text += f" Trained on {model['device']}, computing in {model['dtype']}{stored}"
        versions = ", ".join(f"{name} {number}" for name, number in manifest.get("libraries", {}).items() if number)
        text += f", with {versions}." if versions else "."
    return text


def _proofs(manifest: Mapping[str, Any], proofs: Sequence[Proof]) -> str:
    said = (
        "Made by a fresh process from the files of this folder before it got its name; `finetune verify` repeats them."
    )
    mean = PROOFS_MEAN.get(manifest.get("format", "safetensors"), PROOFS_MEAN["safetensors"])
    return f"{said}\n\n{mean}\n\n{proof_table(proofs)}"


def proof_table(proofs: Sequence[Proof]) -> str:
    """The proofs as a Markdown table."""
    rows = [
        (_text(found.name), f"{found.value:.6g}", "recorded only" if found.limit is None else f"{found.limit:.6g}")
        for found in proofs
    ]
    return _table(("what", "measured", "at most"), rows, align=("---", "--:", "--:"))


def _recipe(manifest: Mapping[str, Any]) -> str:
    changed = [f"Changed on the command line: {_code(each)}." for each in manifest.get("overrides", ())]
    recipe = _fenced(manifest.get("recipe"), "yaml")
    return "\n\n".join([recipe, *changed]) if recipe else ""


def _table(heads: Sequence[str], rows: Iterable[Sequence[str]], *, align: Sequence[str] = ()) -> str:
    lines = [heads, align or ["---"] * len(heads), *([_cell(cell) for cell in row] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _cell(text: str) -> str:
    """A bar would end the cell, also inside of code."""
    return re.sub(r"\\*\|", r"\\|", " ".join(text.split()))


def _list(items: Iterable[str]) -> str:
    return "\n".join(f"- {item}" for item in items)


def _code(text: str) -> str:
    """A code span, whatever signs are in the text."""
    text = " ".join(text.split())
    ticks = "`" * (max(map(len, re.findall("`+", text)), default=0) + 1)
    space = " " if text.startswith("`") or text.endswith("`") else ""
    return f"{ticks}{space}{text}{space}{ticks}"


def _quoted(text: str) -> str:
    return _code(text if len(text) < 400 else text[:400] + " ...")


def _text(text: str) -> str:
    """Words of others that are no Markdown."""
    return re.sub(r"([\\`*_<>\[\]|#~])", r"\\\1", " ".join(text.split()))


def _fenced(text: str | None, language: str) -> str:
    if not text:
        return ""
    ticks = "`" * max(3, max(map(len, re.findall("`+", text)), default=0) + 1)
    return f"{ticks}{language}\n{text.strip()}\n{ticks}"
