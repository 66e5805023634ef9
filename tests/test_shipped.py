"""Facts about the shipped recipes: all of them load, and a copy brings everything or nothing."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from finetune.errors import UserError
from finetune.planned import plan_values
from finetune.recipe import load_recipe
from finetune.shipped import ShippedRecipe, copy_recipe, list_recipes, shipped_folder, show_recipe

CHECKOUT = Path(__file__).resolve().parent.parent
RECIPE = """\
# A small one.
# More about it.
version: 1
name: small
model: {base: builtin:pocket-llama}
data: {train: [datasets/a.jsonl, datasets/deep/b.jsonl], eval: datasets/c.jsonl, template: datasets/t.jinja}
"""
FILES = [
    "recipes/llama/small.yaml",
    "datasets/a.jsonl",
    "datasets/deep/b.jsonl",
    "datasets/c.jsonl",
    "datasets/t.jinja",
]


@pytest.fixture
def shipped(tmp_path: Path) -> Path:
    """A folder like ours with one recipe that names four files."""
    root = tmp_path / "shipped"
    for file in FILES:
        (root / file).parent.mkdir(parents=True, exist_ok=True)
        (root / file).write_text(RECIPE if file.endswith(".yaml") else f"the bytes of {file}\n")
    return root


def files_under(folder: Path) -> dict[str, bytes | None]:
    """Every path below a folder; None for a folder."""
    return {
        path.relative_to(folder).as_posix(): path.read_bytes() if path.is_file() else None
        for path in sorted(folder.rglob("*"))
    }


@pytest.mark.parametrize("path", sorted((CHECKOUT / "recipes").rglob("*.yaml")), ids=lambda path: path.stem)
def test_every_shipped_recipe_loads_and_says_in_one_line_what_it_is(path):
    recipe = load_recipe(path)
    assert recipe.name == path.stem
    first = path.read_text(encoding="utf-8").splitlines()[0]
    assert first.startswith("# ")
    assert first[2:] in {shipped.summary for shipped in list_recipes() if shipped.path == path}


FIGURES = re.compile(
    r"# Not run here\. `finetune plan --on (\S+)` estimates (\S+) GiB of weights, (\S+) GiB at the peak with rows of "
    r"full length\.( More than one GPU of the list has\.)?"
)
PUBLISHED = [each for each in list_recipes() if each.name != "quickstart"]


@pytest.mark.parametrize("shipped", PUBLISHED, ids=lambda shipped: shipped.name)
def test_a_header_says_what_the_plan_says(shipped: ShippedRecipe, tmp_path: Path) -> None:
    """Nearly: what a plan estimates is corrected now and then, and the line is for choosing a GPU."""
    (figures,) = [match for line in shipped.path.read_text().splitlines() if (match := FIGURES.fullmatch(line))]
    machine, weights, peak, too_large = figures.groups()
    turns = [{"from": "human", "value": "pear " * 3000}, {"from": "gpt", "value": "plum"}]
    (tmp_path / "sharegpt.json").write_text(json.dumps([{"conversations": turns}] * 40))
    is_own = load_recipe(shipped.path).data.train == "sharegpt.json"
    values = plan_values(shipped.path, [f"data.train={tmp_path}/sharegpt.json"] if is_own else [], on=machine)
    most = max(values["peak_memory_gib"], values["stages_gib"]["load"])
    assert values["weights_gib"] == pytest.approx(float(weights), abs=0.06)
    assert most == pytest.approx(float(peak), rel=0.15)
    assert bool(too_large) == (float(peak) > values["device_memory_gib"])


def test_the_checkout_is_the_shipped_folder_of_a_checkout():
    assert shipped_folder() == CHECKOUT
    assert "quickstart" in {recipe.name for recipe in list_recipes()}
    assert show_recipe("quickstart") == (CHECKOUT / "recipes" / "quickstart.yaml").read_text(encoding="utf-8")


def test_the_data_folder_is_not_a_package():
    assert list((CHECKOUT / "datasets").rglob("*.py")) == []


def test_recipes_are_named_by_their_path(shipped):
    (recipe,) = list_recipes(shipped)
    assert (recipe.name, recipe.summary) == ("llama/small", "A small one.")
    assert show_recipe("llama/small", shipped=shipped) == RECIPE


def test_a_copy_brings_the_recipe_and_every_file_it_names(shipped, tmp_path):
    copied = copy_recipe("llama/small", tmp_path / "new" / "place", shipped=shipped)
    assert copied == [tmp_path / "new" / "place" / file for file in FILES]
    assert files_under(tmp_path / "new" / "place") == files_under(shipped)


def test_copying_twice_changes_nothing(shipped, tmp_path):
    first = copy_recipe("llama/small", tmp_path / "to", shipped=shipped)
    assert copy_recipe("llama/small", tmp_path / "to", shipped=shipped) == first
    assert files_under(tmp_path / "to") == files_under(shipped)


def test_a_different_file_is_never_overwritten_and_then_nothing_is_copied(shipped, tmp_path):
    to = tmp_path / "to"
    (to / "datasets" / "c.jsonl").mkdir(parents=True)
    (to / "datasets" / "a.jsonl").write_text("mine\n")
    (to / "datasets" / "t.jinja").symlink_to("nowhere")
    before = files_under(to)
    with pytest.raises(UserError) as caught:
        copy_recipe("llama/small", to, shipped=shipped)
    assert [problem.where for problem in caught.value.problems] == [
        str(to / "datasets" / name) for name in ("a.jsonl", "c.jsonl", "t.jinja")
    ]
    assert files_under(to) == before


def test_a_copy_that_fails_half_way_leaves_nothing_behind(shipped, tmp_path):
    to = tmp_path / "to"
    to.mkdir()
    (to / "datasets").write_text("a file where a folder must be\n")
    before = files_under(to)
    with pytest.raises(UserError, match="nothing was copied"):
        copy_recipe("llama/small", to, shipped=shipped)
    assert files_under(to) == before


def test_a_missing_shipped_file_is_told_before_anything_is_copied(shipped, tmp_path):
    (shipped / "datasets" / "c.jsonl").unlink()
    with pytest.raises(UserError, match=r"datasets/c\.jsonl: .* missing"):
        copy_recipe("llama/small", tmp_path / "to", shipped=shipped)
    assert not (tmp_path / "to").exists()


@pytest.mark.parametrize("name", ["llama/smal", "../shipped/recipes/llama/small", "", "nothing like it"])
def test_an_unknown_name_is_told_with_what_there_is(shipped, tmp_path, name):
    with pytest.raises(UserError, match="no shipped recipe has this name; .*llama/small") as caught:
        copy_recipe(name, tmp_path / "to", shipped=shipped)
    assert caught.value.code == 2
    assert not (tmp_path / "to").exists()
