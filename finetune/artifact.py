"""The run folder: created once, written stage by stage, found again later."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import os
import platform
import shutil
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, is_dataclass, replace
from pathlib import Path
from typing import Any

from finetune.base import TOKENIZER_FILES, Base, sha256_of, weight_files
from finetune.data.sources import source_files
from finetune.data.template import Template
from finetune.errors import Problem, StorageError, UserError, raise_problems, storing
from finetune.plan import Plan
from finetune.plan_layout import Lowered
from finetune.quantised_base import stored_as
from finetune.recipe import DataSection, load_recipe
from finetune.resume_keys import Changes, compare_plans
from finetune.trust import OPTION, trusted_code
from finetune.weight_hashes import weight_sha256

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
LOCK = ".running"  # finetune/run_lock.py
BEFORE_A_PLAN = {LOCK, "exit.json", "recipe.yaml", "lock.json", ".lock.json.partial", ".plan.json.partial"}


@dataclass(frozen=True)
class RunFolder:
    """A run's folder; what is in it is listed in the README."""

    path: Path

    @property
    def adapter(self) -> Path:
        return self.path / "adapter"

    @property
    def is_finished(self) -> bool:
        """Whether it has a result; one that a disk has spoilt is written again by the run that goes on."""
        try:
            return "steps" in self.result
        except (OSError, ValueError):
            return False

    @property
    def plan(self) -> dict[str, Any]:
        return read_json(self.path / "plan.json")

    @property
    def result(self) -> dict[str, Any]:
        return read_json(self.path / "result.json")

    def keep_ranks(self, count: int, *, allow_other: bool) -> None:
        """Note how many ranks train; a run goes on with as many as before, or with another number if that is allowed.

        Raises:
            UserError: it is another number.
            StorageError: lock.json cannot be read or written.
        """
        lock = _read_lock(self)
        before = lock.get("world_size", count)
        if before != count and not allow_other:
            message = (
                f"this run began with {before} ranks, now there are {count}; start as many, or add "
                "--allow-change world_size: the same steps up to rounding, with other random numbers for dropout"
            )
            raise UserError(Problem(str(self.path), message))
        if lock.get("world_size") != count:
            with storing(self.path):
                write_json(self.path / "lock.json", {**lock, "world_size": count})

    def keep_speedups(self, record: Mapping[str, Any]) -> list[str]:
        """Note what computes the passes (finetune/model/fast/speed_up.py, record); what is not as it was, in words.

        Names that changed are a changed recipe, which is told elsewhere.
        """
        lock = _read_lock(self)
        before = lock.get("speedups", record)
        if lock.get("speedups") != record:
            with storing(self.path):
                write_json(self.path / "lock.json", {**lock, "speedups": record})
        kernels = before["kernels"].items()
        changed = [(f"the compiled {name}", was, record["kernels"].get(name, was)) for name, was in kernels]
        changed += [(name, was, record["pieces"].get(name, was)) for name, was in before["pieces"].items()]
        return [
            f"{name} was {was!r}, is {now!r}: the same training up to rounding"
            for name, was, now in changed
            if was != now
        ]

    def keep_lowered(self, lowered: Sequence[Lowered]) -> None:
        """Note what became of the passes' layout after out of memory, before a step is computed so.

        Raises:
            StorageError: plan.json cannot be written.
        """
        plan = self.plan
        with storing(self.path / "plan.json"):
            write_json(
                self.path / "plan.json", {**plan, "train": {**plan["train"], "lowered": [*map(asdict, lowered)]}}
            )

    def write_adapter(self, base: Base, template: Template, save: Callable[[Path], None]) -> None:
        """adapter/: PEFT's files, tokenizer and template; complete or not there at all."""
        staging = self.path / ".adapter.partial"
        with storing(self.adapter):
            shutil.rmtree(staging, ignore_errors=True)
            staging.mkdir()
            save(staging)
            write_tokenizer(staging, base.tokenizer_folder, template_source=template.source)
            shutil.rmtree(self.adapter, ignore_errors=True)
            staging.rename(self.adapter)

    def finish(self, result: Any) -> RunFolder:
        """Write result.json, which marks the run as finished."""
        assert is_dataclass(result)
        with storing(self.path / "result.json"):
            write_json(self.path / "result.json", asdict(result))  # type: ignore[arg-type]
        return self


def open_run_folder(
    plan: Plan, recipe_path: Path, overrides: Sequence[str], base: Base, data: DataSection, *, resume: bool
) -> RunFolder:
    """The run's folder with recipe.yaml, plan.json and lock.json; one that is there already only with `resume`.

    What a recipe may change in a run that goes on is said on stderr and written; see finetune/resume_keys.py.

    Raises:
        UserError: the folder holds another run, this run without `resume`, or something that is no run.
        StorageError: it cannot be written, for want of room or because the disk fails.
    """
    folder = RunFolder(plan.run_folder)
    resolved = plan.to_json()
    refuse_unusable(plan, resume=resume)
    if not is_free(folder.path):
        lock = _lock(recipe_path, overrides, base, data, plan)
        changes = _compare_with_begun(folder, resolved, lock, recipe_path, overrides)
        ended_early = folder.is_finished and folder.result["steps"] < folder.plan["steps"]
        if changes.notes:
            sys.stderr.write("".join(f"{folder.path}: {note}\n" for note in changes.notes))
            with storing(folder.path):
                again = changes.longer or (changes.more_patient and ended_early)
                _rewrite(folder, resolved, recipe_path, lock, again=again)
        return folder
    with storing(folder.path):
        try:
            _create(folder, resolved, recipe_path, _lock(recipe_path, overrides, base, data, plan))
        except (FileExistsError, NotADirectoryError, PermissionError, ValueError) as error:
            message = f"the run folder cannot be written ({error}); name another with --out"
            raise UserError(Problem(str(folder.path), message)) from error
    return folder


def is_free(path: Path) -> bool:
    """Whether a new run may begin in it: it is not there, empty, or holds what a start left that was killed."""
    if not path.is_dir():
        return not path.exists()
    names = {file.name for file in path.iterdir()}
    return names <= {LOCK} or (LOCK in names and names <= BEFORE_A_PLAN)


def _create(folder: RunFolder, plan: dict[str, Any], recipe_path: Path, lock: dict[str, Any]) -> None:
    """plan.json comes last: with it the folder holds a run."""
    folder.path.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(recipe_path, folder.path / "recipe.yaml")
    write_json(folder.path / "lock.json", lock)
    write_json(folder.path / "plan.json", plan)


def _rewrite(folder: RunFolder, plan: dict[str, Any], recipe_path: Path, lock: dict[str, Any], *, again: bool) -> None:
    """The plan that a run goes on with; one that became longer, or more patient, is not finished any more."""
    if again:
        (folder.path / "result.json").unlink(missing_ok=True)
    before = read_json(folder.path / "lock.json")
    staging = folder.path / ".recipe.yaml.partial"
    shutil.copyfile(recipe_path, staging)
    staging.replace(folder.path / "recipe.yaml")
    write_json(folder.path / "lock.json", {**before, **lock})
    write_json(folder.path / "plan.json", plan)


def _compare_with_begun(
    folder: RunFolder, plan: dict[str, Any], lock: dict[str, Any], recipe_path: Path, overrides: Sequence[str]
) -> Changes:
    """What changed since the run began, where all of it is allowed.

    Raises:
        UserError: with everything that has to stay as it was.
    """
    lock_before = _read_lock(folder)
    asked_before = load_recipe(folder.path / "recipe.yaml", lock_before["overrides"]).settings()
    asked_now = load_recipe(recipe_path, overrides).settings()
    changes = compare_plans(_read_plan(folder), plan, asked_before=asked_before, asked_now=asked_now)
    raise_problems([*changes.problems, *_changed_inputs(folder, lock_before, lock)])
    libraries = [
        f"{name} was {lock_before['libraries'].get(name)}, is {version}: the same training up to rounding"
        for name, version in lock["libraries"].items()
        if lock_before["libraries"].get(name) != version
    ]
    return replace(changes, notes=(*changes.notes, *libraries))


def refuse_unusable(plan: Plan, *, resume: bool = True) -> None:
    """Refuse what no run can begin with, before anything is written: a folder, an adapter to start from, a logger.

    Whether the adapter fits the recipe is seen when it is loaded.
    """
    missing = [name for name in plan.train.log_to if importlib.util.find_spec(name) is None]
    raise_problems(
        Problem("output.log_to", f"{name} is not installed; pip install {name}, or leave it out") for name in missing
    )
    path = plan.run_folder
    if not is_free(path):
        if not (path / "plan.json").is_file():
            what = "this folder is not empty and holds no run" if path.is_dir() else "is a file"
            raise UserError(Problem(str(path), f"{what}; name another folder with --out"))
        _refuse_other_run(RunFolder(path), plan.name, resume=resume)
        return
    if path.resolve() == Path.cwd():
        raise UserError(Problem(str(path), "is the current folder; name a new folder with --out"))
    start = plan.adapter.start_from
    absent = [name for name in ADAPTER_FILES if start is not None and not (start / name).is_file()]
    if absent:
        message = f"{start} is no adapter folder: {', '.join(absent)} is missing; name the adapter/ of a finished run"
        raise UserError(Problem("adapter.from", message))


def _refuse_other_run(folder: RunFolder, name: str, *, resume: bool) -> None:
    before = _read_plan(folder)["settings"].get("name")
    if before != name:
        message = f"holds another run: name was {before!r}, is {name!r}; name another folder with --out"
        raise UserError(Problem(str(folder.path), message))
    if not resume:
        state = "a finished" if folder.is_finished else "an unfinished"
        message = f"holds {state} run; add --resume to go on with it, or name another with --out"
        raise UserError(Problem(str(folder.path), message))


def _changed_inputs(folder: RunFolder, before: dict[str, Any], now: dict[str, Any]) -> list[Problem]:
    """A run goes on only with the very bytes it began with; the plan alone would not see a changed word."""
    return [
        Problem(str(folder.path), f"{name} has changed since this run began; restore it, or name another with --out")
        for kind in ("base_sha256", "tokenizer_sha256", "data_sha256")
        for name in sorted(before[kind].keys() | now[kind].keys())
        if before[kind].get(name) != now[kind].get(name)
    ] + _other_code(before.get("foreign_code", now["foreign_code"]), now["foreign_code"])


def _other_code(before: Mapping[str, str], now: Mapping[str, str]) -> list[Problem]:
    """Foreign code that computes something else than it did may not go on with a run, nor may its absence."""
    if before == now:
        return []
    was, is_now = (_code_text(allowed) for allowed in (before, now))
    message = f"the base's own Python was {was} when this run began, is {is_now}; restore that code and allow it again"
    return [Problem(OPTION, f"{message}, or name another folder with --out")]


def _code_text(allowed: Mapping[str, str]) -> str:
    """NAME@PIN, with the sha256 of its files where the pin is a commit; `none` where nothing was allowed."""
    words = [name if digest in name else f"{name} (sha256 {digest})" for name, digest in sorted(allowed.items())]
    return ", ".join(words) or "none"


def plan_begun_with(path: Path) -> dict[str, Any] | None:
    """The plan.json of the run in a folder; None if there is no run.

    Raises:
        UserError: its plan.json is none of ours.
    """
    return _read_plan(RunFolder(path)) if (path / "plan.json").is_file() else None


def _read_plan(folder: RunFolder) -> dict[str, Any]:
    try:
        plan = folder.plan
        known = {"settings", "template_sha256", "tokens", "supervised_tokens"} <= plan.keys()
    except (ValueError, AttributeError):
        known = False
    if not known:
        raise UserError(Problem(str(folder.path), "its plan.json is none of ours; name another folder with --out"))
    return plan


def _read_lock(folder: RunFolder) -> dict[str, Any]:
    try:
        return read_json(folder.path / "lock.json")
    except (OSError, ValueError) as error:
        message = f"its lock.json cannot be read ({error}); put it back, or name another folder with --out"
        raise StorageError(Problem(str(folder.path), message)) from error


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
        "base_sha256": weight_sha256(weight_files(base.facts.folder)),
        "base_stored": stored_as(base.facts.folder),
        "tokenizer_sha256": {file.name: sha256_of(file) for file in tokenizer_files if file.is_file()},
        "data_sha256": {str(file): sha256_of(file) for file in files},
        "foreign_code": trusted_code(),
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
