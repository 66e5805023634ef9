"""Check a recipe whose base is not on this machine, with a stand-in of its published shape: proofs and problems out."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from finetune.base import Base, is_here
from finetune.errors import Problem, UserError
from finetune.families import Model, find_model
from finetune.machine import is_offline, probe_machine
from finetune.plan import make_plan, memory_problem
from finetune.recipe import Recipe
from finetune.rehearsal import Rehearsed, left_out
from finetune.shipped import shipped_folder
from finetune.stand_in import TOKENIZER, make_stand_in
from finetune.unseen import find_facts

ROWS = "datasets/quickstart.jsonl"


def unseen_model(recipe: Recipe) -> Model | None:
    """The row of the table of a base that is neither here nor to be had now; None for every other base."""
    model = find_model(recipe.model.base)
    return model if model and is_offline() and not is_here(model.id, revision=recipe.model.revision) else None


def check_unseen(
    recipe: Recipe, model: Model, rehearse: Callable[[Recipe, Base], Rehearsed] | None
) -> tuple[tuple[Problem, ...], Rehearsed]:
    """Problems of the rows and the plan, and a rehearsal whose notes say what stood in for what."""
    try:
        facts, data, assumed = find_facts(recipe, model)
        rows = {token: row for row, token in enumerate(recipe.adapter.train_tokens)}
        plan = make_plan(recipe, probe_machine(), facts, data, token_ids=rows)
    except UserError as error:
        return error.problems, left_out("it comes when the problems found before it are solved")
    notes = [
        f"{model.id} is not on this machine: the twin has its published shape, transformers' defaults for the rest",
        f"stand-ins: the tokenizer ({TOKENIZER}'s with the control tokens), and the base's own template if it has one",
        f"not checked: the base's files, its tokenizer on your rows, labels; finetune fetch {model.id} brings them",
    ]
    if recipe.adapter.train_tokens:
        return (), left_out(f"adapter.train_tokens needs the base's own tokenizer; finetune fetch {model.id} brings it")
    if problem := memory_problem(plan, probe_machine()):
        notes.append(f"on this machine: {problem.message}")
    if assumed:
        notes.append(f"{assumed[0].partition(':')[0]}: the twin learns {ROWS}")
        recipe = _with_our_rows(recipe)
    if rehearse is None:
        return (), left_out(notes[0])
    with tempfile.TemporaryDirectory(prefix="finetune-stand-in-") as folder:
        base = make_stand_in(model, recipe, Path(folder) / "base")
        done = rehearse(recipe, base)
    return done.problems, replace(done, notes=(*notes, *done.notes))


def _with_our_rows(recipe: Recipe) -> Recipe:
    held_out = None if recipe.data.eval is None else 2
    changed = {"train": str(shipped_folder() / ROWS), "format": "alpaca", "eval": held_out}
    return recipe.model_copy(update={"data": recipe.data.model_copy(update=changed)})
