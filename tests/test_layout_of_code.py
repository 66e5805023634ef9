"""The shape of the repository: imports point one way, each library has one door, light commands stay light."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "finetune"

# A room may import itself and the rooms named here.
FACTS = {"errors", "machine", "trust", "quantised_base", "base", "recipe", "layout", "adapter_plan", "plan"}
FACTS |= {"calibration"}
ALLOWED = {
    "errors": set(),
    "machine": {"errors"},
    "layout": set(),
    "recipe_yaml": {"errors"},
    "recipe_problems": {"recipe_yaml"},
    "recipe_overrides": {"errors", "recipe_yaml", "recipe_problems"},
    "recipe_types": {"recipe_problems"},
    "recipe_adapter": {"recipe_problems", "recipe_types"},
    "recipe": {"errors", "recipe_yaml", "recipe_problems", "recipe_overrides", "recipe_types", "recipe_adapter"},
    "shipped": {"errors", "recipe", "recipe_problems"},
    "trust": {"errors"},
    "fetch": {"errors", "machine", "trust"},
    "quantised_base": {"errors", "machine", "trust", "weight_hashes"},
    "weight_hashes": {"machine"},
    "base": {"errors", "machine", "trust", "fetch", "families", "quantised_base"},
    "unquantise": FACTS | {"artifact", "model", "release"},
    "adapter_plan": {"recipe", "recipe_adapter", "base"},
    "adapter_problems": {"errors", "recipe", "recipe_adapter", "base", "adapter_plan"},
    "calibration": {"errors", "machine"},
    "calibrate": {"machine", "model", "train"},
    "plan_layout": {"errors", "recipe", "base"},
    "compute_problems": {"adapter_plan", "base", "errors", "machine", "plan_layout", "recipe"},
    "plan_lowered": {"plan_layout", "plan"},
    "plan_cost": {"base", "calibration", "layout", "machine"},
    "plan": {"errors", "machine", "recipe", "base", "layout", "adapter_plan", "adapter_problems", "plan_layout"}
    | {"plan_cost", "calibration", "plan_stages", "compute_problems"},
    "plan_stages": {"base", "calibration", "machine", "plan_cost"},
    "named_machines": {"errors", "calibration", "machine", "recipe_problems"},
    "fit": {"errors", "machine", "plan", "plan_layout"},
    "planned": FACTS | {"data", "families", "unseen", "named_machines", "fit", "recipe_overrides"},
    "plan_text": {"fit"},
    "doctor": {"machine", "calibration"},
    "data": FACTS,
    "model": FACTS | {"families", "weight_hashes", "plan_cost"},
    "train": FACTS | {"data", "model", "stop", "plan_layout", "plan_lowered"},
    "stop": {"errors"},
    "run_lock": {"errors"},
    "resume_keys": {"errors"},
    "disk": {"errors", "machine", "plan"},
    "artifact": FACTS | {"data", "resume_keys", "plan_layout", "weight_hashes"},
    "unseen": FACTS | {"data", "families"},
    "resolve": FACTS | {"data", "artifact", "plan_lowered"},
    "release": FACTS | {"data", "model", "train", "artifact", "resolve"},
    "use": FACTS | {"data", "model", "train", "artifact", "resolve"},
    "run": FACTS | {"data", "model", "train", "artifact", "resolve", "stop", "run_lock", "disk", "use"},
    "show": FACTS | {"data"},
    "base_problems": FACTS,
    "twin": FACTS,
    "rehearsal": FACTS | {"data"},
    "rehearse": FACTS | {"artifact", "twin", "rehearsal", "run", "release"},
    "stand_in": FACTS | {"data", "families", "unseen"},
    "check_unseen": FACTS | {"families", "unseen", "stand_in", "rehearsal", "shipped"},
    "check": FACTS | {"check_unseen", "data", "artifact", "disk", "base_problems", "rehearsal"},
    "cache": {"errors", "machine"},
    "cli_text": set(),
    "cli": {"errors", "machine", "trust", "base", "run", "use", "release", "shipped", "recipe", "doctor", "cli_text"}
    | {"resolve", "planned", "plan_text", "show", "check", "rehearsal", "fetch", "cache", "stop"},
    "__main__": {"cli"},
    "__init__": set(),
    "assets": set(),
    "families": set(),
}
DOORS = {
    "peft": {"model"},
    "bitsandbytes": {"model"},
    "trl": {"train"},
    "datasets": {"data"},
    "typer": {"cli"},
    "yaml": {"recipe_yaml"},
    "pydantic": {"recipe", "recipe_adapter", "recipe_problems", "recipe_overrides", "recipe_types"},
    "matplotlib": {"train"},
    "gguf": {"release"},
    "pyarrow": {"data"},
    "zstandard": {"data"},
}


def room_of(file: Path) -> str:
    return file.relative_to(PACKAGE).with_suffix("").parts[0]


def imported_modules(file: Path) -> set[str]:
    names = set()
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names.add(node.module)
    return names


SOURCES = sorted(PACKAGE.rglob("*.py"))


@pytest.mark.parametrize("file", SOURCES, ids=lambda file: str(file.relative_to(PACKAGE)))
def test_imports_point_one_way(file: Path) -> None:
    room = room_of(file)
    ours = {name.split(".")[1] for name in imported_modules(file) if name.startswith("finetune.")}
    assert ours - {room} <= ALLOWED[room]


@pytest.mark.parametrize("file", SOURCES, ids=lambda file: str(file.relative_to(PACKAGE)))
def test_each_library_has_one_door(file: Path) -> None:
    for name in imported_modules(file):
        library = name.split(".")[0]
        assert room_of(file) in DOORS.get(library, {room_of(file)}), f"{library} is imported in {file}"


def test_the_layout_test_sees_a_wrong_import(tmp_path: Path) -> None:
    wrong = tmp_path / "wrong.py"
    wrong.write_text("def f():\n    from finetune.train.loss import lay_end_to_end\n    import peft.tuners\n")
    assert {"finetune.train.loss", "peft.tuners"} <= imported_modules(wrong)


def test_datasets_holds_no_python() -> None:
    assert not list((ROOT / "datasets").rglob("*.py"))


@pytest.mark.parametrize(
    "command",
    [["--help"], ["recipes"], ["schema"], ["doctor"], ["plan", "recipes/quickstart.yaml"]],
    ids=lambda command: command[0],
)
def test_light_commands_never_import_torch(command: list[str]) -> None:
    code = (
        "import sys; from finetune.cli import main\n"
        f"sys.argv = ['finetune', *{command!r}]\n"
        "try: main()\n"
        "except SystemExit as end: assert not end.code, end.code\n"
        "assert 'torch' not in sys.modules and 'transformers' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_nothing_pickled_or_evaluated() -> None:
    forbidden = {"eval", "exec"}
    for file in SOURCES:
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
                assert node.func.id not in forbidden, f"{node.func.id} in {file}:{node.lineno}"
        assert not {"pickle", "cloudpickle", "dill"} & imported_modules(file)
