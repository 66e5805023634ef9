"""The recipes that come with finetune: a name in; its text, or a copy of the recipe and its data, out."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path

from finetune.errors import Problem, StorageError, UserError, raise_problems
from finetune.recipe import Recipe, load_recipe
from finetune.recipe_problems import did_you_mean

_USERS_TO_CURE = (PermissionError, FileExistsError, NotADirectoryError)


@dataclass(frozen=True)
class ShippedRecipe:
    """A recipe's name (its path under recipes/, without .yaml), its file, and the first line of its header."""

    name: str
    path: Path
    summary: str


def shipped_folder() -> Path:
    """The folder that holds recipes/ and datasets/: finetune/shipped of a wheel, else the checkout.

    Raises:
        UserError: if neither is there.
    """
    package = Path(__file__).resolve().parent
    for folder in (package / "shipped", package.parent):
        if any((folder / "recipes").rglob("*.yaml")):
            return folder
    raise UserError(Problem("recipes", f"none came with {package}; install finetune-toolkit again"))


def list_recipes(shipped: Path | None = None) -> list[ShippedRecipe]:
    """All shipped recipes in the order of their names; `shipped` is another folder than ours."""
    root = (shipped or shipped_folder()) / "recipes"
    return [
        ShippedRecipe(path.relative_to(root).as_posix().removesuffix(".yaml"), path, _summary(path))
        for path in sorted(root.rglob("*.yaml"))
    ]


def show_recipe(name: str, *, shipped: Path | None = None) -> str:
    """The text of a shipped recipe, comments included.

    Raises:
        UserError: if no shipped recipe has this name.
    """
    return _find(name, shipped or shipped_folder()).path.read_text(encoding="utf-8")


def copy_recipe(name: str, to: Path, *, shipped: Path | None = None) -> list[Path]:
    """Copy a recipe and the data files it names to the same places under `to`; all of them, or none.

    Returns the files under `to`. One that is there already with the same bytes stays as it is.

    Raises:
        UserError: if no shipped recipe has this name, a different file is in the way, or `to` takes no files.
        StorageError: if the disk does not take a file.
    """
    root = shipped or shipped_folder()
    path = _find(name, root).path
    files = [path.relative_to(root), *_files_of(load_recipe(path))]
    raise_problems(problem for file in files if (problem := _obstacle(root / file, to / file)))
    _copy_all_or_none({to / file: root / file for file in files if not (to / file).exists()})
    return [to / file for file in files]


def _find(name: str, root: Path) -> ShippedRecipe:
    recipes = {recipe.name: recipe for recipe in list_recipes(root)}
    wanted = name.removesuffix(".yaml").removeprefix("recipes/")
    if wanted not in recipes:
        hint = did_you_mean(wanted, recipes) or f"; shipped are: {', '.join(recipes)}"
        raise UserError(Problem(name, f"no shipped recipe has this name{hint}"))
    return recipes[wanted]


def _summary(path: Path) -> str:
    with path.open(encoding="utf-8") as lines:
        return next((line.lstrip("# ").rstrip() for line in lines if line.startswith("#")), "")


def _files_of(recipe: Recipe) -> list[Path]:
    template = recipe.data.template if recipe.data.template.endswith(".jinja") else None
    named = [source.source for source in recipe.data.all_sources if not source.source.startswith("hub:")]
    return [Path(file) for file in (*named, template) if file is not None]


def _obstacle(source: Path, target: Path) -> Problem | None:
    """What keeps a file from being copied, if anything."""
    if not source.is_file():
        return Problem(
            str(source), "a shipped recipe names this file and it is missing; install finetune-toolkit again"
        )
    in_the_way = target.exists() or target.is_symlink()
    if in_the_way and not (target.is_file() and target.read_bytes() == source.read_bytes()):
        return Problem(
            str(target), "is there already and differs from the shipped one; move it, or choose another folder"
        )
    return None


def _copy_all_or_none(sources: dict[Path, Path]) -> None:
    """Copy each source to its target, which must be new; on failure remove what was made, folders included."""
    made: list[Path] = []
    try:
        for target, source in sources.items():
            missing = [folder for folder in target.parents if not folder.exists()]
            for folder in reversed(missing):
                folder.mkdir()
                made.append(folder)
            with target.open("xb") as copy, source.open("rb") as original:
                made.append(target)
                shutil.copyfileobj(original, copy)
    except OSError as error:
        for path in reversed(made):
            path.rmdir() if path.is_dir() else path.unlink()
        reason = f"cannot be written: {error.strerror}; nothing was copied"
        kind = UserError if isinstance(error, _USERS_TO_CURE) else StorageError
        raise kind(Problem(str(error.filename or target), reason)) from error
