"""The run folder: created once, written stage by stage, found again later."""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import shutil
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, is_dataclass
from pathlib import Path
from typing import Any

from finetune.base import TOKENIZER_FILES, Base, sha256_of, weight_files
from finetune.data.sources import source_files
from finetune.data.template import Template
from finetune.errors import Problem, UserError, raise_problems
from finetune.plan import Plan
from finetune.recipe import DataSection

LIBRARIES = (
    "torch",
    "transformers",
    "peft",
    "bitsandbytes",
    "accelerate",
    "datasets",
    "trl",
    "tokenizers",
    "safetensors",
)


ADAPTER_FILES = ("adapter_config.json", "adapter_model.safetensors")


@dataclass(frozen=True)
class RunFolder:
    """A run's folder; what is in it is listed in the README."""

    path: Path

    @property
    def adapter(self) -> Path:
        return self.path / "adapter"

    @property
    def is_finished(self) -> bool:
        return (self.path / "result.json").is_file()

    @property
    def plan(self) -> dict[str, Any]:
        return read_json(self.path / "plan.json")

    @property
    def result(self) -> dict[str, Any]:
        return read_json(self.path / "result.json")

    def write_adapter(self, base: Base, template: Template, save: Callable[[Path], None]) -> None:
        """adapter/: PEFT's files, tokenizer and template; complete or not there at all."""
        staging = self.path / ".adapter.partial"
        shutil.rmtree(staging, ignore_errors=True)
        staging.mkdir()
        save(staging)
        write_tokenizer(staging, base.tokenizer_folder, template_source=template.source)
        shutil.rmtree(self.adapter, ignore_errors=True)
        staging.rename(self.adapter)

    def finish(self, result: Any) -> RunFolder:
        """Write result.json, which marks the run as finished."""
        assert is_dataclass(result)
        write_json(self.path / "result.json", asdict(result))  # type: ignore[arg-type]
        return self


def open_run_folder(
    plan: Plan, recipe_path: Path, overrides: Sequence[str], base: Base, data: DataSection, *, resume: bool
) -> RunFolder:
    """The run's folder with recipe.yaml, plan.json and lock.json; one that is there already only with `resume`.

    Raises:
        UserError: the folder holds another run, this run without `resume`, or something that is no run.
    """
    folder = RunFolder(plan.run_folder)
    resolved = plan.to_json()
    if folder.path.exists() and (not folder.path.is_dir() or any(folder.path.iterdir())):
        _refuse_other_content(folder, resolved, resume=resume)
        _refuse_other_inputs(folder, _lock(recipe_path, overrides, base, data, plan))
        return folder
    _refuse_no_adapter(plan)
    if folder.path.resolve() == Path.cwd():
        raise UserError(Problem(str(folder.path), "is the current folder; name a new folder with --out"))
    try:
        _create(folder, resolved, recipe_path, _lock(recipe_path, overrides, base, data, plan))
    except (FileExistsError, NotADirectoryError, PermissionError, ValueError) as error:
        message = f"the run folder cannot be written ({error}); name another with --out"
        raise UserError(Problem(str(folder.path), message)) from error
    return folder


def _create(folder: RunFolder, plan: dict[str, Any], recipe_path: Path, lock: dict[str, Any]) -> None:
    staging = folder.path.with_name(f".{folder.path.name}.partial")
    shutil.rmtree(staging, ignore_errors=True)
    staging.mkdir(parents=True)
    shutil.copyfile(recipe_path, staging / "recipe.yaml")
    write_json(staging / "plan.json", plan)
    write_json(staging / "lock.json", lock)
    if folder.path.exists():
        folder.path.rmdir()
    staging.rename(folder.path)


def _refuse_no_adapter(plan: Plan) -> None:
    """Before anything is written; whether the adapter fits the recipe is seen when it is loaded."""
    start = plan.adapter.start_from
    missing = [name for name in ADAPTER_FILES if start is not None and not (start / name).is_file()]
    if missing:
        message = f"{start} is no adapter folder: {', '.join(missing)} is missing; name the adapter/ of a finished run"
        raise UserError(Problem("adapter.from", message))


def _refuse_other_content(folder: RunFolder, plan: dict[str, Any], *, resume: bool) -> None:
    where = str(folder.path)
    if not (folder.path / "plan.json").is_file():
        what = "this folder is not empty and holds no run" if folder.path.is_dir() else "is a file"
        raise UserError(Problem(where, f"{what}; name another folder with --out"))
    before = _read_plan(folder)
    changed = [key for key in plan["settings"] if before["settings"].get(key) != plan["settings"][key]]
    changed += [key for key in ("template_sha256", "tokens", "supervised_tokens") if before[key] != plan[key]]
    if changed:
        key = changed[0]
        was, now = (side["settings"].get(key, side.get(key)) for side in (before, plan))
        message = f"holds another run: {key} was {was!r}, is {now!r}; name another folder with --out"
        raise UserError(Problem(where, message))
    if not resume:
        state = "a finished" if folder.is_finished else "an unfinished"
        raise UserError(Problem(where, f"holds {state} run of this recipe; add --resume, or name another with --out"))


def _refuse_other_inputs(folder: RunFolder, now: dict[str, Any]) -> None:
    """A run goes on only with the very bytes it began with; the plan alone would not see a changed word."""
    before = read_json(folder.path / "lock.json")
    raise_problems(
        Problem(str(folder.path), f"{name} has changed since this run began; restore it, or name another with --out")
        for kind in ("base_sha256", "tokenizer_sha256", "data_sha256")
        for name in sorted(before[kind].keys() | now[kind].keys())
        if before[kind].get(name) != now[kind].get(name)
    )


def _read_plan(folder: RunFolder) -> dict[str, Any]:
    try:
        plan = folder.plan
        known = {"settings", "template_sha256", "tokens", "supervised_tokens"} <= plan.keys()
    except (ValueError, AttributeError):
        known = False
    if not known:
        raise UserError(Problem(str(folder.path), "its plan.json is none of ours; name another folder with --out"))
    return plan


def write_tokenizer(folder: Path, tokenizer_folder: Path, *, template_source: str) -> None:
    """Tokenizer files and the one template that trained; tokenizer_config.json carries no second template."""
    for name in TOKENIZER_FILES:
        if (tokenizer_folder / name).is_file():
            shutil.copyfile(tokenizer_folder / name, folder / name)
    config = read_json(folder / "tokenizer_config.json")
    config.pop("chat_template", None)
    write_json(folder / "tokenizer_config.json", config)
    (folder / "chat_template.jinja").write_text(template_source, encoding="utf-8")


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file."""
    return json.loads(path.read_text(encoding="utf-8"))


def write_json(path: Path, value: dict[str, Any]) -> None:
    """Write a JSON object so that the file is complete or not there."""
    staging = path.with_name(f".{path.name}.partial")
    with staging.open("w", encoding="utf-8") as stream:
        stream.write(json.dumps(value, indent=2, ensure_ascii=False) + "\n")
        stream.flush()
        os.fsync(stream.fileno())
    staging.replace(path)


def _lock(recipe_path: Path, overrides: Sequence[str], base: Base, data: DataSection, plan: Plan) -> dict[str, Any]:
    """Everything the run depends on: versions of the software, sha256 of every input."""
    sections = [*data.sources, *([data.eval_source] if data.eval_source else [])]
    files = dict.fromkeys(file for section in sections for file in source_files(section))
    tokenizer_files = [base.tokenizer_folder / name for name in TOKENIZER_FILES]
    return {
        "finetune": version_of("finetune-toolkit"),
        "python": platform.python_version(),
        "libraries": {name: version_of(name) for name in LIBRARIES},
        "recipe_sha256": sha256_of(recipe_path),
        "overrides": list(overrides),
        "base": base.facts.base,
        "base_sha256": {file.name: sha256_of(file) for file in weight_files(base.facts.folder)},
        "tokenizer_sha256": {file.name: sha256_of(file) for file in tokenizer_files if file.is_file()},
        "data_sha256": {str(file): sha256_of(file) for file in files},
        "template_sha256": plan.template_sha256,
        "date": data.date,
        "device": plan.model.device,
    }


def version_of(package: str) -> str | None:
    """The installed version of a distribution, or None."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None
