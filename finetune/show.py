"""What `finetune show` answers: a recipe in, one row, one step or the page of all rows out."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from finetune.base import read_base
from finetune.data.cached import Progress
from finetune.data.page import write_page
from finetune.data.prepare import PreparedData, read_data
from finetune.data.show import find_row, find_step
from finetune.data.show_text import row_text, step_text
from finetune.errors import Problem, StorageError, UserError
from finetune.machine import probe_machine
from finetune.plan import make_plan
from finetune.recipe import Recipe, load_recipe

Answer = tuple[dict[str, Any], str]  # for programs, for people


def show_row(data: PreparedData, row: str, *, split: str | None, colour: bool) -> Answer:
    """One row, by its number or file:line, also where other rows are wrong."""
    shown = find_row(data, row, split=split)
    return shown.to_json(), row_text(shown, colour=colour)


def show_step(recipe: Recipe, data: PreparedData, step: int, *, colour: bool) -> Answer:
    """All rows of an optimizer step as they are laid out into passes.

    Raises:
        UserError: there is no such step, or the run cannot be planned.
    """
    if data.account.problems:
        raise UserError(data.account.problems, total=data.account.total_problems)
    token_ids = data.base.token_ids(recipe.adapter.train_tokens)
    plan = make_plan(recipe, probe_machine(), data.base.facts, data.facts, token_ids=token_ids)
    shown = find_step(data, plan.train, step)
    return shown.to_json(), step_text(shown, colour=colour)


def show_page(recipe: Recipe, data: PreparedData, file: Path, *, rows: int) -> Answer:
    """Write the page and say so.

    Raises:
        UserError, StorageError: the page cannot be written there.
    """
    problems, plan = list(data.account.problems), None
    token_ids = data.base.token_ids(recipe.adapter.train_tokens)
    if not problems:
        try:
            plan = make_plan(recipe, probe_machine(), data.base.facts, data.facts, token_ids=token_ids).train
        except UserError as error:
            problems += error.problems
    page = write_page(data, name=recipe.name, plan=plan, problems=problems, rows=rows).encode(errors="backslashreplace")
    try:
        file.write_bytes(page)
    except (FileNotFoundError, IsADirectoryError, PermissionError) as error:
        raise UserError(Problem("--html", f"{file} cannot be written: {error.strerror}; name another file")) from error
    except OSError as error:
        raise StorageError(Problem(str(file), f"the page cannot be written: {error.strerror}")) from error
    text = f"{file}: open it in a browser ({len(page) / 1e6:.1f} MB)"
    return {"file": str(file), "bytes": len(page), "problems": len(problems)}, text


def read_recipe_data(
    recipe_path: Path, overrides: Sequence[str] = (), *, progress: Progress | None = None
) -> tuple[Recipe, PreparedData]:
    """The recipe and its rows; what is wrong with single rows stays in the account."""
    recipe = load_recipe(recipe_path, overrides)
    base = read_base(recipe.model.base, revision=recipe.model.revision)
    return recipe, read_data(recipe.data, base, seed=recipe.seed, progress=progress)
