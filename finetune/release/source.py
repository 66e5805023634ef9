"""What is merged: a run folder or an adapter folder in; base, template, stop tokens and scoring rows out."""

from __future__ import annotations

import json
import random
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from finetune.artifact import RunFolder, read_json
from finetune.base import Base, read_base, sha256_of, weight_files
from finetune.data.encoder import Encoder
from finetune.data.examples import Example
from finetune.data.prepare import prepare_data
from finetune.data.rows import Turn
from finetune.data.template import Template, TemplateProblem, choose_template, parse_date
from finetune.errors import Problem, UserError, raise_problems
from finetune.machine import probe_machine
from finetune.plan import ModelPlan
from finetune.recipe import load_recipe

HELD_OUT_ROWS = 256  # scored at most; enough for a mean loss, little enough for a CPU
TRAINING_ROWS = 64
DEFAULT_DATE = "26 Jul 2024"
PROBES = (
    ("What is the capital of France?",),
    ("Write a short story about a dog.", "Once there was a dog.", "Go on."),
    ("Add 17 and 25.\n\n### Input:\n17 + 25",),
    ("  two spaces before, a tab\tinside, two newlines after\n\n",),
    ("Übersetze: Straße, naïve café, façade, Ångström.",),
    ("日本語の文章と한국어 문장과 العربية וגם עברית",),
    ("👩‍👩‍👧‍👦 🇪🇺 🏳️‍🌈 zero\u200bwidth, e\u0301 is not é, \u202eright to left",),
    ("def f(x):\n    return {'a': [1, 2.5e-3], \"b\": x ** 2}  # <tag> & |pipe|",),
    ("Hello.", "Hello! How can I help?", "Tell me a joke.", "No.", "Please."),
    ("x",),
)


@dataclass(frozen=True)
class Rows:
    """Examples to score on, and in words where they come from; no examples if they cannot be had."""

    examples: Sequence[Example] = field(repr=False)
    origin: str


@dataclass(frozen=True)
class Source:
    """A trained adapter with everything its release depends on."""

    path: Path  # the run folder, or an adapter folder that belongs to none
    adapter: Path
    base: Base
    model: ModelPlan  # how the base was loaded to train, on the device of this machine
    plan: Mapping[str, Any] | None
    lock: Mapping[str, Any] | None
    template: Template
    tokenizer_folder: Path

    @property
    def stop_token_ids(self) -> tuple[int, ...]:
        """The ids the run was trained to stop on; none are known of an adapter without its run."""
        return tuple(self.plan["stop_token_ids"]) if self.plan else ()

    @property
    def recipe_text(self) -> str | None:
        return (self.path / "recipe.yaml").read_text(encoding="utf-8") if self.plan else None

    @cached_property
    def rows(self) -> Rows:
        """The run's held-out rows, else a fixed sample of its training rows, read again from unchanged files."""
        if self.lock is None:
            return Rows((), "none: an adapter without its run names no data")
        for name, sha256 in self.lock["data_sha256"].items():
            file = Path(name).expanduser()
            if not file.is_file() or sha256_of(file) != sha256:
                return Rows((), f"none: {name} is {'changed since' if file.is_file() else 'not there since'} training")
        try:
            recipe = load_recipe(self.path / "recipe.yaml", self.lock["overrides"])
            data = prepare_data(recipe.data, self.base, seed=recipe.seed)
        except UserError as error:  # a template file that is gone, for one; the adapter folder still has the template
            return Rows((), f"none: {error.problems[0]}")
        if len(data.eval):
            return Rows(data.eval[:HELD_OUT_ROWS], "held-out rows")
        chosen = random.Random(f"{recipe.seed}/release").sample(range(len(data.train)), k=len(data.train))
        return Rows([data.train[index] for index in sorted(chosen[:TRAINING_ROWS])], "a sample of the training rows")

    def probe_conversations(self) -> list[tuple[Turn, ...]]:
        """The probe conversations that the template can write, each ending in a user's turn."""
        return [turns for turns in map(_turns, PROBES) if self._writes(turns)]

    def probe_texts(self) -> list[str]:
        return [self.template.text(turns, add_generation_prompt=True) for turns in self.probe_conversations()]

    def probe_ids(self) -> list[list[int]]:
        """Token ids of the probe conversations, as training's encoder makes them."""
        return [encoding.ids.tolist() for encoding in Encoder(self.base).encode(self.probe_texts())]

    def _writes(self, turns: Sequence[Turn]) -> bool:
        try:
            self.template.text(turns, add_generation_prompt=True)
        except TemplateProblem:
            return False
        return True


def read_source(path: Path) -> Source:
    """The run of a run folder or of the adapter folder inside one, or an adapter folder by itself.

    Raises:
        UserError: neither of them, an unfinished run, or a base that is not there.
    """
    if path.name == "adapter" and (path.parent / "plan.json").is_file():
        path = path.parent
    if (path / "plan.json").is_file():
        return _run_source(RunFolder(path))
    if (path / "adapter_config.json").is_file():
        return _adapter_source(path)
    raise UserError(Problem(str(path), "neither a run folder (plan.json) nor an adapter folder (adapter_config.json)"))


def check_base(source: Source) -> dict[str, str]:
    """sha256 of the base's weight files, by name.

    Raises:
        UserError: a file is not the one the run was trained on.
    """
    files = weight_files(source.base.facts.folder)
    with ThreadPoolExecutor() as pool:  # hashing lets go of the interpreter's lock
        found = dict(zip((file.name for file in files), pool.map(sha256_of, files), strict=True))
    trained = source.lock["base_sha256"] if source.lock else found
    raise_problems(
        Problem(
            f"{source.base.facts.folder}/{name}", "not the weights this run was trained on; fetch those, or train again"
        )
        for name in sorted(set(found) | set(trained))
        if found.get(name) != trained.get(name)
    )
    return found


def _run_source(run: RunFolder) -> Source:
    if not (run.is_finished and (run.adapter / "adapter_config.json").is_file()):
        raise UserError(Problem(str(run.path), "this run is not finished; finish it with finetune train --resume"))
    plan, lock = run.plan, read_json(run.path / "lock.json")
    folder = Path(plan["model"]["folder"])
    name = str(folder) if (folder / "config.json").is_file() else plan["model"]["base"]
    base = read_base(name, revision=plan["model"]["revision"])
    settings = plan["model"] | {"folder": base.facts.folder, "device": probe_machine().device}
    text = (run.adapter / "chat_template.jinja").read_text(encoding="utf-8")
    template = Template(plan["template"], text, base.bos_token, base.eos_token, parse_date(lock["date"]))
    return Source(run.path, run.adapter, base, ModelPlan(**settings), plan, lock, template, run.adapter)


def _adapter_source(folder: Path) -> Source:
    config = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
    name = config.get("base_model_name_or_path")
    if not name:
        raise UserError(Problem(str(folder), "the adapter does not name its base; set base_model_name_or_path"))
    base = read_base(name, revision=config.get("revision"))
    model = ModelPlan(
        name, config.get("revision"), base.facts.folder, "none", "float32", probe_machine().device, "sdpa"
    )
    template_file = folder / "chat_template.jinja"
    template = choose_template(str(template_file) if template_file.is_file() else "auto", base, date=DEFAULT_DATE)
    own_tokenizer = (folder / "tokenizer.json").is_file() and (folder / "tokenizer_config.json").is_file()
    return Source(folder, folder, base, model, None, None, template, folder if own_tokenizer else base.tokenizer_folder)


def _turns(texts: Sequence[str]) -> tuple[Turn, ...]:
    return tuple(Turn("assistant" if index % 2 else "user", text) for index, text in enumerate(texts))
