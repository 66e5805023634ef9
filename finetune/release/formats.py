"""The formats of an export: for each, what it is made of, what it refuses beforehand, and how it is written."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from finetune.artifact import ADAPTER_FILES, write_json, write_tokenizer
from finetune.errors import Problem, UserError, raise_problems
from finetune.release.changes import read_changes
from finetune.release.compressed import compressed_bytes, refuse_compressed, write_compressed
from finetune.release.gguf.adapter import write_gguf_adapter
from finetune.release.gguf.architecture import read_model
from finetune.release.gguf.mix import QUANTS
from finetune.release.gguf.vocabulary import read_tokenizer
from finetune.release.gguf.write import all_fields, quant_of, weight_bytes, write_gguf
from finetune.release.ollama.folder import WITHOUT_TEMPLATE, describe_modelfile, plan_modelfile, write_modelfile
from finetune.release.origin import Origin
from finetune.release.source import Source

MERGED = "safetensors"  # what finetune merge writes
DEFAULT_QUANT = "q8_0"


@dataclass(frozen=True)
class Order:
    """What is to be written of what."""

    origin: Origin
    format: str
    quant: str
    without_template: bool

    @property
    def source(self) -> Source:
        """The run or adapter, of a format that is made of one."""
        assert self.origin.source is not None
        return self.origin.source

    @property
    def gguf_name(self) -> str:
        return f"{self.origin.name}-{self.quant}.gguf"


@dataclass(frozen=True)
class Format:
    """How one format is written.

    `refuse` raises for what the format cannot hold and gives the bytes that the weights will take; `write` fills a
    folder from the model (or, made of an adapter, from the run) and gives what the manifest says more, notes included.
    """

    made_of: Literal["model", "adapter"]
    refuse: Callable[[Order], int]
    write: Callable[[Order, Path, Path], dict[str, Any]]
    has_quants: bool = False


def chosen_order(target: Origin, format: str, *, quant: str | None, without_template: bool) -> Order:
    """The order, with the defaults in the place of what was not said."""
    return Order(target, format, quant or DEFAULT_QUANT, without_template)


def refuse_options(format: str, *, quant: str | None, onto: str, without_template: bool) -> None:
    """Refuse options that are unknown, or that would do nothing; all problems at once.

    Raises:
        UserError: there is one.
    """
    known = (MERGED, *FORMATS)
    if format not in known:
        raise UserError(Problem("--format", f"{format!r} is not possible; write one of {', '.join(known)}"))
    chosen = FORMATS.get(format)
    problems = []
    if quant is not None and not (chosen and chosen.has_quants):
        told = " or ".join(name for name, each in FORMATS.items() if each.has_quants)
        problems.append(Problem("--quant", f"{format} has none, it is for {told}; leave it out"))
    elif quant is not None and quant not in QUANTS:
        problems.append(Problem("--quant", f"{quant!r} is not possible; write one of {', '.join(QUANTS)}"))
    if onto != "auto" and chosen is not None and chosen.made_of == "adapter":
        problems.append(Problem("--onto", f"nothing is merged for {format}; leave it out"))
    if without_template and format != "ollama":
        problems.append(Problem(WITHOUT_TEMPLATE, f"only ollama's Modelfile has one, this is {format}; leave it out"))
    raise_problems(problems)


def refuse_target(order: Order, target: str, *, onto: str) -> None:
    """Refuse a target that the format is not made of.

    Raises:
        UserError: it is one.
    """
    if order.origin.source is None and FORMATS[order.format].made_of == "adapter":
        raise UserError(Problem(target, f"holds no adapter, and {order.format} is made of one; name a run or adapter"))
    if order.origin.source is None and onto != "auto":
        raise UserError(Problem("--onto", f"{target} is merged already; leave it out"))


def _refuse_adapter(order: Order) -> int:
    read_changes(order.source.adapter, order.origin.folder)  # refuses what could not be proven
    return _adapter_bytes(order.source)


def _write_adapter(order: Order, run: Path, folder: Path) -> dict[str, Any]:
    source = order.source
    for name in ADAPTER_FILES:
        shutil.copyfile(source.adapter / name, folder / name)
    write_tokenizer(folder, source.tokenizer_folder, template_source=source.template.source)
    write_json(folder / "generation_config.json", order.origin.generation_config)
    return {}


def _refuse_gguf_adapter(order: Order) -> int:
    read_model(order.origin.folder)
    return 2 * _adapter_bytes(order.source)  # written in float32


def _write_gguf_adapter(order: Order, run: Path, folder: Path) -> dict[str, Any]:
    name = order.origin.name
    return {"notes": write_gguf_adapter(order.source, folder / f"{name}-lora-f32.gguf", name=name)}


def _refuse_gguf(order: Order) -> int:
    _header(order)
    return weight_bytes(order.origin.folder, order.quant)


def _write_gguf(order: Order, model: Path, folder: Path) -> dict[str, Any]:
    origin = order.origin
    report = write_gguf(
        model,
        folder / order.gguf_name,
        quant=order.quant,
        chat_template=origin.chat_template,
        stop_token_ids=origin.stop_token_ids,
        name=origin.name,
    )
    return {"quant": order.quant, "tensor_types": report.types(), "notes": list(report.notes)}


def _refuse_ollama(order: Order) -> int:
    bytes_ = _refuse_gguf(order)
    plan_modelfile(order.origin, _header(order), weights=order.gguf_name, without_template=order.without_template)
    return bytes_


def _write_ollama(order: Order, model: Path, folder: Path) -> dict[str, Any]:
    facts = _write_gguf(order, model, folder)
    modelfile, notes = plan_modelfile(
        order.origin, _header(order), weights=order.gguf_name, without_template=order.without_template
    )
    write_modelfile(folder, modelfile)
    told = describe_modelfile(modelfile, order.origin.template)
    return {**facts, "ollama": told, "notes": [*facts["notes"], *notes]}


def _refuse_compressed(order: Order) -> int:
    refuse_compressed(order.origin.folder)
    return compressed_bytes(order.origin.folder)


def _write_compressed(order: Order, model: Path, folder: Path) -> dict[str, Any]:
    return {"notes": write_compressed(model, folder)}


def _adapter_bytes(source: Source) -> int:
    return sum((source.adapter / name).stat().st_size for name in ADAPTER_FILES)


def _header(order: Order) -> Mapping[str, Any]:
    """The GGUF header's fields, but the architecture's name; refuses a model that it cannot describe."""
    origin = order.origin
    return all_fields(
        read_model(origin.folder),
        read_tokenizer(origin.folder),
        quant=quant_of(order.quant),
        chat_template=origin.chat_template,
        stop_token_ids=origin.stop_token_ids,
        name=origin.name,
    )


# What each of them proves stands in export_proof.py, under the same names.
FORMATS: dict[str, Format] = {
    "adapter": Format("adapter", _refuse_adapter, _write_adapter),
    "gguf": Format("model", _refuse_gguf, _write_gguf, has_quants=True),
    "gguf-adapter": Format("adapter", _refuse_gguf_adapter, _write_gguf_adapter),
    "ollama": Format("model", _refuse_ollama, _write_ollama, has_quants=True),
    "compressed-tensors": Format("model", _refuse_compressed, _write_compressed),
}
