"""Find and load a target: the name of a run, adapter, merged folder or base in; a model ready to speak out."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from finetune.artifact import read_json
from finetune.base import (
    PLAIN_TOKENIZER_CLASSES,
    Base,
    read_base,
    read_chat_template,
    read_header,
    sha256_of,
    weight_files,
)
from finetune.data.encoder import Encoder
from finetune.data.rows import Turn
from finetune.data.template import Template, TemplateProblem, choose_template, parse_date
from finetune.errors import Problem, UserError
from finetune.machine import probe_machine
from finetune.model.adapter import load_adapter
from finetune.model.load import load_base
from finetune.plan import ModelPlan
from finetune.quantised_base import is_gguf
from finetune.recipe import DataSection
from finetune.train.checkpoints import find_checkpoints
from finetune.trust import check_foreign_code

# The file that makes a folder a target of a kind; the first that is there decides.
MARKS = {"run": "plan.json", "adapter": "adapter_config.json", "model": "config.json"}
DEFAULT_DATE: str = DataSection.model_fields["date"].default
STORED_DTYPES = {"BF16": "bfloat16", "F16": "float16", "F32": "float32"}


@dataclass(frozen=True)
class FoundTarget:
    """A target before its weights are loaded; `base` carries the tokenizer the target itself comes with."""

    name: str
    kind: str  # run, adapter or model
    base: Base
    template: Template | None  # None: a base that was never taught one
    system: str | None  # the system prompt a run put before rows that had none
    stop_token_ids: tuple[int, ...]
    plan: ModelPlan
    adapter: Path | None


@dataclass(frozen=True)
class Target(FoundTarget):
    """A target with its weights loaded, in evaluation mode."""

    model: torch.nn.Module = field(repr=False)

    @property
    def device(self) -> str:
        return self.plan.device

    @property
    def dtype(self) -> str:
        return self.plan.dtype


def load_target(target: str, *, template: str | Template | None = None) -> Target:
    """The target of this name with its weights; see find_target for what is accepted and refused."""
    return open_target(find_target(target, template=template))


def find_target(target: str, *, template: str | Template | None = None) -> FoundTarget:
    """What a name stands for, decided by looking at the folder; `template` takes the place of the target's own.

    Raises:
        UserError: no such target, a folder that is none of the kinds, a run without an adapter yet, an adapter whose
            base is not here, or an unknown template.
    """
    folder = Path(target).expanduser()
    if target.startswith("builtin:") or not (target.startswith((".", "/", "~")) or folder.exists()):
        found = _model(target)
    else:
        found = _FINDERS[_kind_of(folder, target)](target)
    if isinstance(template, str):
        template = choose_template(template, found.base, date=DEFAULT_DATE)
    chosen = template or found.template
    stops = {*found.stop_token_ids, *(closing_token(chosen, found.base) if chosen else ())}
    return replace(found, template=chosen, stop_token_ids=tuple(sorted(stops)))


def open_target(found: FoundTarget) -> Target:
    """Load a found target's weights.

    Raises:
        UserError: the base cannot be loaded, or the adapter does not fit it or asks for foreign code.
        StorageError: the adapter's weights are damaged.
    """
    if found.adapter is not None:
        _check_adapter_files(found.adapter)
    model = load_base(found.plan, keep=True)
    tuned: torch.nn.Module = model
    if found.adapter is not None:
        try:
            tuned = load_adapter(model, found.adapter)
        except (OSError, ValueError, RuntimeError) as error:
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
            message = f"the adapter does not fit its base {found.plan.base}: {reason}"
            raise UserError(Problem(str(found.adapter), message)) from error
    return Target(**{name: getattr(found, name) for name in FoundTarget.__dataclass_fields__}, model=tuned.eval())


def _check_adapter_files(folder: Path) -> None:
    """PEFT would take a pickle where there are no safetensors, or look for the folder's name on the hub."""
    check_foreign_code(str(folder), folder)
    weights = folder / "adapter_model.safetensors"
    if not weights.is_file():
        pickles = sorted(path.name for path in folder.glob("*.bin"))
        hint = f" ({pickles[0]} is a pickle, which is never opened)" if pickles else ""
        message = f"no weights: adapter_model.safetensors is missing{hint}; save the adapter in safetensors form"
        raise UserError(Problem(str(folder), message))
    read_header(weights)


@contextmanager
def attention_for_loss(target: Target) -> Iterator[None]:
    """Inside, documents that lie end to end do not see each other, as in training; outside, padding masks work."""
    inner = transformers_model(target.model)
    before = inner.config._attn_implementation
    if target.base.facts.isolates_by_documents:
        inner.set_attn_implementation("documents")
    try:
        yield
    finally:
        inner.set_attn_implementation(before)


def transformers_model(model: Any) -> PreTrainedModel:
    """The transformers model itself, also where an adapter is wrapped around it."""
    return model if isinstance(model, PreTrainedModel) else model.get_base_model()


def _kind_of(folder: Path, target: str) -> str:
    if not folder.exists():
        raise UserError(Problem(target, "no such folder; a target is a run, adapter or model folder, or a hub id"))
    for kind, mark in MARKS.items():
        if (folder / mark).is_file():
            return kind
    if is_gguf(folder):
        return "model"
    if folder.is_file():
        raise UserError(Problem(target, "is a file; a target is a run, adapter or model folder, or a hub id"))
    seen = ", ".join(sorted(path.name for path in folder.iterdir())[:6]) or "nothing"
    looked = "plan.json (a run), adapter_config.json (an adapter) and config.json (a model)"
    raise UserError(Problem(target, f"neither run, adapter nor model: looked for {looked}; it holds {seen}"))


def _run(target: str) -> FoundTarget:
    folder = Path(target).expanduser()
    if not (folder / "adapter" / MARKS["adapter"]).is_file():
        checkpoints = find_checkpoints(folder / "checkpoints")
        hint = f", or name its checkpoint {checkpoints[-1]}" if checkpoints else ""
        message = f"an unfinished run: it has no adapter/ yet; finish it with `finetune train ... --resume`{hint}"
        raise UserError(Problem(target, message))
    return _adapter_of_run(target, folder / "adapter", folder)


def _adapter(target: str) -> FoundTarget:
    folder = Path(target).expanduser()
    for run in (folder.resolve().parent, folder.resolve().parent.parent):  # runs/NAME/adapter, .../checkpoints/step-*
        if (run / MARKS["run"]).is_file():
            return _adapter_of_run(target, folder, run)
    base_name = read_json(folder / MARKS["adapter"]).get("base_model_name_or_path")
    if not base_name:
        raise UserError(Problem(target, f"{MARKS['adapter']} names no base (base_model_name_or_path); write it there"))
    base = _base_with_tokenizer_of(_read_base(target, base_name), folder)
    return FoundTarget(
        name=target,
        kind="adapter",
        base=base,
        template=_own_template(base, folder),
        system=None,
        stop_token_ids=_declared_stops(folder, base),
        plan=_unquantised(base, base_name),
        adapter=folder,
    )


def _adapter_of_run(target: str, folder: Path, run: Path) -> FoundTarget:
    """An adapter with the base as it was trained on: quantised the same way, computing in the same dtype."""
    plan = read_json(run / MARKS["run"])
    trained = plan["model"]
    base = _base_with_tokenizer_of(_read_base(target, trained["base"], trained["revision"]), folder)
    _refuse_another_base(target, base, read_json(run / "lock.json")["base_sha256"])
    device = probe_machine().device
    dtype = "float32" if device == "cpu" and trained["dtype"] == "float16" else trained["dtype"]
    model_plan = ModelPlan(
        base=trained["base"],
        revision=trained["revision"],
        folder=base.facts.folder,
        quantization=trained["quantization"],
        dtype=dtype,
        device=device,
        attention="sdpa",
    )
    return FoundTarget(
        name=target,
        kind="run",
        base=base,
        template=_trained_template(target, base, run, plan),
        system=plan["settings"].get("data.system"),
        stop_token_ids=tuple(plan["stop_token_ids"]),
        plan=model_plan,
        adapter=folder,
    )


def _refuse_another_base(target: str, base: Base, trained_on: dict[str, str]) -> None:
    """A delta on weights it was not trained on still speaks, only wrongly."""
    files = {file.name: file for file in weight_files(base.facts.folder)}
    if files.keys() != trained_on.keys() or any(sha256_of(files[name]) != trained_on[name] for name in files):
        message = (
            f"its base {base.facts.base} has other weights than those it was trained on (lock.json, base_sha256); "
            "restore them, or train again"
        )
        raise UserError(Problem(target, message))


def _model(target: str) -> FoundTarget:
    base = _read_base(target, target)
    return FoundTarget(
        name=target,
        kind="model",
        base=base,
        template=_own_template(base, base.facts.folder),
        system=None,
        stop_token_ids=_declared_stops(base.facts.folder, base),
        plan=_unquantised(base, target),
        adapter=None,
    )


_FINDERS = {"run": _run, "adapter": _adapter, "model": _model}


def _read_base(target: str, base_name: str, revision: str | None = None) -> Base:
    # A quantised model that is asked itself answers as it is stored; a GGUF file only in 16 bits.
    itself = base_name == target and not is_gguf(Path(target).expanduser())
    try:
        return read_base(base_name, revision=revision, as_stored=itself)
    except UserError as error:
        its = "" if base_name == target else f"its base {base_name} cannot be read: "
        raise UserError(Problem(target, its + problem.message) for problem in error.problems) from error


def _base_with_tokenizer_of(base: Base, folder: Path) -> Base:
    """The base, as the adapter's own tokenizer sees it where the folder has one in the form we write."""
    settings_file = folder / "tokenizer_config.json"
    if not ((folder / "tokenizer.json").is_file() and settings_file.is_file()):
        return base
    settings = read_json(settings_file)
    if settings.get("tokenizer_class") not in PLAIN_TOKENIZER_CLASSES:
        return base
    return replace(
        base,
        tokenizer_folder=folder,
        chat_template=read_chat_template(folder) or base.chat_template,
    )


def _own_template(base: Base, folder: Path) -> Template | None:
    file = folder / "chat_template.jinja"
    source = file.read_text(encoding="utf-8") if file.is_file() else base.chat_template
    if not source:
        return None
    return Template("own", source, base.bos_token, base.eos_token, parse_date(DEFAULT_DATE))


def _trained_template(target: str, base: Base, run: Path, plan: dict[str, Any]) -> Template:
    """The template that wrote the training texts, told the run's date."""
    date = read_json(run / "lock.json").get("date", DEFAULT_DATE)
    file = run / "adapter" / "chat_template.jinja"
    if file.is_file():
        source = file.read_text(encoding="utf-8")
        return Template(plan["template"], source, base.bos_token, base.eos_token, parse_date(date))
    template = choose_template("auto" if plan["template"] == "base" else plan["template"], base, date=date)
    if template.sha256 != plan["template_sha256"]:
        message = f"the template {plan['template']} is not the one that trained this run any more; restore it"
        raise UserError(Problem(target, message))
    return template


def _declared_stops(folder: Path, base: Base) -> tuple[int, ...]:
    """generation_config.json's eos_token_id, of the target or of its base; else the tokenizer's eos."""
    for file in (folder / "generation_config.json", base.facts.folder / "generation_config.json"):
        declared = read_json(file).get("eos_token_id") if file.is_file() else None
        if declared is not None:
            return tuple(declared) if isinstance(declared, list) else (declared,)
    return (base.token_id(base.eos_token),) if base.eos_token else ()


def closing_token(template: Template, base: Base) -> tuple[int, ...]:
    """The special token a template ends an answer with: what a model that was trained on it stops on."""
    encoder = Encoder(base)
    try:
        rendered = template.render([Turn("user", "x"), Turn("assistant", "y")])
    except TemplateProblem:
        return ()
    last = int(encoder.encode([rendered.text[: rendered.spans[-1][1]]])[0].ids[-1])
    return (last,) if last in encoder.special_ids else ()


def _unquantised(base: Base, name: str) -> ModelPlan:
    """The stored dtype, where this machine computes in it."""
    machine = probe_machine()
    dtype = STORED_DTYPES.get(base.facts.stored_dtype, "float32")
    if (dtype == "bfloat16" and not machine.computes_bfloat16) or (dtype == "float16" and machine.device == "cpu"):
        dtype = "float32"
    return ModelPlan(
        base=name,
        revision=base.facts.revision,
        folder=base.facts.folder,
        quantization="none",
        dtype=dtype,
        device=machine.device,
        attention="sdpa",
    )
