"""Rehearse a recipe before its base is loaded: recipe and base in; proofs, notes and problems of a small twin out.

The work is done by finetune/rehearse.py in a child process: this one stays light, and a crash there is told here.
What went well is kept, and found again as long as nothing that it depends on changes.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

from finetune.base import TOKENIZER_FILES, Base, sha256_of
from finetune.data.template import choose_template
from finetune.errors import Problem
from finetune.machine import cache_folder, probe_machine
from finetune.recipe import Recipe
from finetune.trust import hand_over_to_child, trusted_code

PACKAGE = Path(__file__).resolve().parent
START = "import sys; sys.path.insert(0, sys.argv.pop(1)); from finetune.rehearse import main; main()"
STEPS, SAVED_AT = 5, 3
ROWS = 32  # the first of each source
MOST_TOKENS = 512  # of a row
EXAMPLES = 4  # of a step
LIBRARIES = ("torch", "transformers", "peft", "bitsandbytes", "accelerate", "trl", "tokenizers", "safetensors", "gguf")
REASONS = ("template_refuses", "template_unproven", "never_stops", "too_long", "no_supervised_token")
Tell = Callable[[str], None]


@dataclass(frozen=True)
class Rehearsed:
    """How a rehearsal went: `state` is done, found (in the cache), failed or left out."""

    state: str
    seconds: Mapping[str, float]  # by stage
    proofs: tuple[Mapping[str, Any], ...]  # name, value, limit
    notes: tuple[str, ...] = ()
    problems: tuple[Problem, ...] = ()
    proof_failed: bool = False

    def to_json(self) -> dict[str, Any]:
        return {"state": self.state, "seconds": dict(self.seconds), "notes": list(self.notes)}


def left_out(reason: str) -> Rehearsed:
    """No rehearsal, and why."""
    return Rehearsed("left out", {}, (), (reason,))


def rehearse(recipe: Recipe, base: Base, *, tell: Tell = lambda line: None) -> Rehearsed:
    """Train, resume, merge and export a twin of the base as the recipe asks, or find that done already.

    Raises:
        UserError: the template cannot be used.
    """
    entry = cache_folder() / "rehearsals" / f"{_key(recipe, base)}.json"
    if entry.is_file():
        kept = json.loads(entry.read_text(encoding="utf-8"))
        return Rehearsed("found", kept["seconds"], tuple(kept["proofs"]), tuple(kept["notes"]))
    with tempfile.TemporaryDirectory(prefix="finetune-rehearsal-") as work:
        done = _in_child(recipe, base, Path(work), tell)
    if done.state == "done" and all(_passed(proof) for proof in done.proofs):
        _keep(entry, done)
    return done


def twin_recipe(recipe: Recipe, work: Path) -> dict[str, Any]:
    """The recipe on a twin: its own first rows, adapter, quantisation, optimizer and schedule, in five steps."""
    values: dict[str, Any] = recipe.model_dump(mode="json", by_alias=True, exclude_unset=True)
    values["model"] |= {"base": str(work / "base"), "revision": None}
    values["adapter"] = recipe.adapter.for_a_twin()
    data, train = values["data"], values.setdefault("train", {})
    sources = [source.model_dump(mode="json") for source in recipe.data.sources]
    data["train"] = [{**source, "rows": min(source["rows"] or ROWS, ROWS)} for source in sources]
    if (held_out := recipe.data.eval_source) is not None:
        data["eval"] = {**held_out.model_dump(mode="json"), "rows": min(held_out.rows or ROWS, EXAMPLES)}
    elif recipe.data.eval is not None:
        data["eval"] = 2
    data["max_tokens"] = min(recipe.data.max_tokens, MOST_TOKENS)
    data |= {"too_long": "truncate", "empty_answer": "drop", "leaked": "keep"}
    data["drop"] = sorted({*recipe.data.drop, *REASONS})
    train.pop("epochs", None)
    train |= {"max_steps": STEPS, "batch_size": min(recipe.train.batch_size, EXAMPLES)}
    train["learning_rate"] = recipe.adapter.twin_learning_rate(recipe.train.learning_rate)
    if isinstance(recipe.train.warmup, int):
        train["warmup"] = min(recipe.train.warmup, 1)
    values["evaluate"] = {"every_steps": SAVED_AT}
    values["output"] = {"folder": str(work / "run"), "save_every_steps": SAVED_AT, "keep_checkpoints": 2}
    return values


def _in_child(recipe: Recipe, base: Base, work: Path, tell: Tell) -> Rehearsed:
    file, errors = work / "recipe.json", work / "errors.txt"
    file.write_text(json.dumps(twin_recipe(recipe, work)), encoding="utf-8")
    facts = base.facts
    arguments = [str(PACKAGE.parent), str(file), str(facts.folder), facts.stored_dtype, str(work), hand_over_to_child()]
    with errors.open("wb") as stream:
        child = subprocess.Popen(
            [sys.executable, "-P", "-c", START, *arguments], stdout=subprocess.PIPE, stderr=stream, text=True
        )
        stage, answer, code = _listen(child, tell)
    if answer is None:
        return _ended_early(stage, code, errors.read_text(encoding="utf-8", errors="replace"))
    problems = tuple(Problem(**problem) for problem in answer["problems"])
    return Rehearsed(
        state="failed" if problems else "done",
        seconds=answer["seconds"],
        proofs=tuple({key: proof[key] for key in ("name", "value", "limit")} for proof in answer["proofs"]),
        notes=tuple(answer["notes"]),
        problems=problems,
        proof_failed=answer["code"] == 6,
    )


def _listen(child: subprocess.Popen[str], tell: Tell) -> tuple[str, dict[str, Any] | None, int]:
    """The last stage that began, the answer if there is one, and how the child ended."""
    assert child.stdout is not None
    stage, answer, started = "start", None, time.perf_counter()
    try:
        for line in child.stdout:
            said = _said(line)
            answer = said.get("answer", answer)
            if "stage" in said:
                stage = said["stage"]
                tell(f"rehearsal on a twin: {stage} ({time.perf_counter() - started:.0f} s)")
        code = child.wait()
    finally:
        child.kill()  # the end of this process, by Ctrl-C say, is its end too
        child.stdout.close()
    return stage, answer, code


def _said(line: str) -> dict[str, Any]:
    """What the child says; a library's own words on stdout are none of it."""
    try:
        found = json.loads(line)
    except ValueError:
        return {}
    said = found.get("rehearsal") if isinstance(found, dict) else None
    return said if isinstance(said, dict) else {}


def _ended_early(stage: str, code: int, errors: str) -> Rehearsed:
    lines = errors.strip().splitlines() or ["it gave no reason"]
    message = f"the process ended with code {code}: {lines[-1]}; as training, merging or exporting would have"
    return Rehearsed("failed", {}, (), (), (Problem(f"rehearsal: {stage}", message),))


def _passed(proof: Mapping[str, Any]) -> bool:
    return proof["limit"] is None or proof["value"] <= proof["limit"]


def _keep(entry: Path, done: Rehearsed) -> None:
    entry.parent.mkdir(parents=True, exist_ok=True)
    staging = entry.with_suffix(f".{os.getpid()}.partial")
    values = {"seconds": dict(done.seconds), "proofs": list(done.proofs), "notes": list(done.notes)}
    staging.write_text(json.dumps(values), encoding="utf-8")
    staging.replace(entry)


def _key(recipe: Recipe, base: Base) -> str:
    """sha256 over all that the outcome depends on; of the weights and the rows no more than names and shapes."""
    folder = base.facts.folder
    tokenizer = [base.tokenizer_folder / name for name in TOKENIZER_FILES]
    shapes = sorted((linear.module, linear.out_features, linear.in_features) for linear in base.facts.linears)
    parts = {
        "base": [sha256_of(folder / "config.json"), base.facts.parameters, base.facts.stored_dtype, shapes],
        "tokenizer": sha256_of(*(file for file in tokenizer if file.is_file())),
        "template": choose_template(recipe.data.template, base, date=recipe.data.date).sha256,
        "recipe": twin_recipe(recipe, Path("work")),
        "code": _code_sha256(),
        "trusted": trusted_code(),
        "device": probe_machine().device_name,
    }
    return sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:40]


def _code_sha256() -> str:
    files = sorted([*PACKAGE.rglob("*.py"), *PACKAGE.rglob("*.c")])
    versions = [importlib.metadata.version(name) for name in LIBRARIES]
    return sha256(f"{sha256_of(*files)} {versions}".encode()).hexdigest()
