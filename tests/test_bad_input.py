"""Bad input through the real command line: told in one line each, at once, with the cure; nothing is left behind."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from tests.conftest import CHECKOUT, alpaca_rows

RECIPE = """\
version: 1
name: tiny
model:
  base: builtin:pocket-llama
data:
  train: rows.jsonl
output:
  folder: out
"""
GOOD = [{**row, "output": f"answer {index}"} for index, row in enumerate(alpaca_rows(8))]
CONFIG = {"model_type": "llama", "num_hidden_layers": 1, "hidden_size": 32, "vocab_size": 300}


@pytest.fixture(scope="module")
def here(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with one good recipe and one of everything that can be wrong."""
    folder = tmp_path_factory.mktemp("bad")
    recipes = {
        "good.yaml": RECIPE,
        "broken.yaml": RECIPE + "train: [1, 2\n",
        "unknown.yaml": RECIPE + "adapter:\n  rnak: 8\ntrain:\n  batch_size: many\n  learning_rate: -1\n",
        "repeated.yaml": RECIPE + "model:\n  base: builtin:pocket-llama\n",
        "words.yaml": "just words\n",
    }
    for name, text in recipes.items():
        (folder / name).write_text(text)
    data = {
        "rows.jsonl": "".join(json.dumps(row) + "\n" for row in GOOD),
        "columns.jsonl": '{"question": "x", "answer": "y"}\n',
        "later.jsonl": json.dumps(GOOD[0]) + '\n{"instruction": "x"}\n' + json.dumps(GOOD[1]) + '\n{"output": 3}\n',
        "broken.jsonl": json.dumps(GOOD[0]) + '\n{"instruction": \n\n[1]\n' + json.dumps(GOOD[1]) + "\n{]\n",
        "none.jsonl": "",
        "array.json": "[]",
        "answers.jsonl": "".join(json.dumps({**row, "output": row["output"] if i != 4 else " "}) + "\n"
                                 for i, row in enumerate(GOOD)),
    }  # fmt: skip
    for name, text in data.items():
        (folder / name).write_text(text)
    for name in ("weightless", "truncated", "foreign", "other-run"):
        (folder / name).mkdir()
    for name in ("weightless", "truncated"):
        (folder / name / "config.json").write_text(json.dumps(CONFIG))
    weights = folder / "truncated" / "model.safetensors"
    save_file({"model.embed_tokens.weight": np.zeros((300, 32), np.float32)}, weights)
    weights.write_bytes(weights.read_bytes()[:-100])
    (folder / "foreign" / "thesis.tex").write_text("my work")
    plan = {"settings": {"version": 1, "name": "other"}, "template_sha256": "", "tokens": 1, "supervised_tokens": 1}
    (folder / "other-run" / "plan.json").write_text(json.dumps(plan))
    (folder / "a-file").write_text("")
    return folder


def finetune(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"PYTHONPATH": str(CHECKOUT), "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-m", "finetune", *arguments]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)


def content(folder: Path) -> dict[str, tuple[int, int]]:
    """Everything below a folder with its size and the time of its last change, folders too."""
    stats = {str(path.relative_to(folder)): path.stat() for path in folder.rglob("*")}
    return {name: (stat.st_size, stat.st_mtime_ns) for name, stat in stats.items()}


TRAIN = ("train", "good.yaml")
# what is wrong -> the command line, and (where, what the message holds) of every problem
CASES: dict[str, tuple[tuple[str, ...], list[tuple[str, str]]]] = {
    "no recipe": (("train", "none.yaml"), [("none.yaml", "no such file")]),
    "a recipe that is a folder": (("train", "foreign"), [("foreign", "is a folder")]),
    "bad YAML": (("train", "broken.yaml"), [("broken.yaml:10", "not readable as YAML")]),
    "no mapping": (("train", "words.yaml"), [("words.yaml:1", "a recipe is a mapping of sections")]),
    "three keys": (
        ("train", "unknown.yaml"),
        [
            ("unknown.yaml:10: adapter.rnak", "did you mean 'rank'"),
            ("unknown.yaml:12: train.batch_size", "got 'many'"),
            ("unknown.yaml:13: train.learning_rate", "got -1"),
        ],
    ),
    "a repeated key": (("train", "repeated.yaml"), [("repeated.yaml:9: model", "repeated key")]),
    "bad overrides": (
        (*TRAIN, "--set", "train.epoch=3", "--set", "seed", "--set", "train.epochs=no"),
        [
            ("--set train.epoch=3", "did you mean 'epochs'"),
            ("--set seed", "a value is required"),
            ("--set train.epochs=no", "whole number"),
        ],
    ),
    "no data file": ((*TRAIN, "--set", "data.train=row.jsonl"), [("row.jsonl", "in the same folder: ")]),
    "wrong columns": (
        (*TRAIN, "--set", "data.train=columns.jsonl"),
        [
            (
                "columns.jsonl:1",
                "columns: no known format has these, got answer, question; rename its columns, or map them",
            )
        ],
    ),
    "columns missing later": (
        (*TRAIN, "--set", "data.train=later.jsonl"),
        [
            ("later.jsonl:2", "output: this column of alpaca is missing, got instruction; rename"),
            ("later.jsonl:4", "instruction: this column of alpaca is missing, got output; rename"),
        ],
    ),
    "lines that are no JSON": (
        (*TRAIN, "--set", "data.train=broken.jsonl"),
        [
            ("broken.jsonl:2", "line: not JSON at column 16, the row ends too early; complete or delete it"),
            ("broken.jsonl:4", 'row: an object {"column": ...} is needed'),
            ("broken.jsonl:6", "line: not JSON at column 2"),
        ],
    ),
    "no rows": (
        (*TRAIN, "--set", "data.train=[none.jsonl, array.json]"),
        [("none.jsonl", "holds no rows"), ("array.json", "holds no rows")],
    ),
    "an empty answer": (
        (*TRAIN, "--set", "data.train=answers.jsonl"),
        [
            (
                "answers.jsonl:5",
                "output: must be an answer, got ' '; write the answer, delete the row, or drop such rows",
            )
        ],
    ),
    "rows over max_tokens and an empty answer": (
        (*TRAIN, "--set", "data.train=[answers.jsonl, rows.jsonl]", "--set", "data.max_tokens=64"),
        [(f"answers.jsonl:{n}", "data.max_tokens is 64; raise it, shorten the row") for n in (1, 4)]
        + [("answers.jsonl:5", "output: must be an answer"), ("answers.jsonl:7", "data.max_tokens is 64; raise it")]
        + [(f"rows.jsonl:{n}", "data.max_tokens is 64; raise it, shorten the row") for n in (1, 4, 7)],
    ),
    "a base without weights and bad data": (
        (*TRAIN, "--set", "model.base=weightless", "--set", "data.train=broken.jsonl"),
        [
            ("weightless", "no weights: model.safetensors is missing; put the base's .safetensors files there"),
            ("broken.jsonl:2", "line: not JSON"),
            ("broken.jsonl:4", 'row: an object {"column": ...} is needed'),
            ("broken.jsonl:6", "line: not JSON"),
        ],
    ),
    "no base": ((*TRAIN, "--set", "model.base=./nowhere"), [("./nowhere", "no such folder; correct the path")]),
    "a folder that is no base": ((*TRAIN, "--set", "model.base=./foreign"), [("./foreign", "it has no config.json")]),
    "truncated weights": (
        (*TRAIN, "--set", "model.base=truncated"),
        [("truncated/model.safetensors", "damaged or incomplete weights")],
    ),
    "no such builtin": (
        (*TRAIN, "--set", "model.base=builtin:pocket-lama"),
        [("model.base", "there are: builtin:pocket-llama")],
    ),
    "targets, dtype": (
        (*TRAIN, "--set", "adapter.targets=[query_proj]", "--set", "model.dtype=float16"),
        [("adapter.targets", "no linear module is called 'query_proj'"), ("model.dtype", "float16 is for GPUs")],
    ),
    "no adapter to start from": (
        (*TRAIN, "--set", "adapter.from=foreign"),
        [("adapter.from", "foreign is no adapter folder: adapter_config.json, adapter_model.safetensors is missing")],
    ),
    "another run in the folder": (
        (*TRAIN, "--out", "other-run"),
        [("other-run", "holds another run: name was 'other', is 'tiny'; name another folder with --out")],
    ),
    "another run, resumed": ((*TRAIN, "--out", "other-run", "--resume"), [("other-run", "holds another run")]),
    "foreign files in the folder": (
        (*TRAIN, "--out", "foreign"),
        [("foreign", "this folder is not empty and holds no run; name another folder with --out")],
    ),
    "a file in place of the folder": ((*TRAIN, "--out", "a-file"), [("a-file", "is a file; name another folder")]),
    "a file above the folder": ((*TRAIN, "--out", "a-file/run"), [("a-file/run", "cannot be written")]),
    "the current folder": (
        ("train", "../good.yaml", "--set", "data.train=../rows.jsonl", "--out", "."),
        [(".", "is the current folder; name a new folder with --out")],
    ),
    "a row that is not there": (
        ("show", "good.yaml", "--row", "8"),
        [("--row", "there is no row 8; rows are counted from 0 to 7")],
    ),
    "a line that is not there": (
        ("show", "good.yaml", "--row", "rows.jsonl:9"),
        [("--row", "there is no row rows.jsonl:9; write FILE:LINE")],
    ),
    "nothing to generate with": (("generate", "./nowhere", "--prompt", "x"), [("./nowhere", "no such folder")]),
    "nothing to evaluate": (("evaluate", "./nowhere", "--data", "rows.jsonl"), [("./nowhere", "no such folder")]),
    "nothing to merge": (("merge", "nowhere", "--out", "release"), [("nowhere", "no such folder")]),
    "no shipped recipe": (("recipes", "show", "quickstrat"), [("", "quickstart")]),
}


@pytest.mark.parametrize("case", CASES)
def test_bad_input_is_told_with_its_cure_and_leaves_nothing_behind(here: Path, case: str) -> None:
    arguments, expected = CASES[case]
    folder = here
    if case == "the current folder":
        folder = here / "empty"
        folder.mkdir()
    before = content(here)
    done = finetune(folder, *arguments, "--json")
    code = 3 if case == "truncated weights" else 2  # a damaged file is the storage's
    assert done.returncode == code, done.stderr
    assert content(here) == before
    assert "Traceback" not in done.stderr
    error = json.loads(done.stdout)["error"]
    assert error["code"] == code
    told = [(problem["where"], problem["message"]) for problem in error["problems"]]
    assert len(told) == len(expected), told
    for (where, message), (place, words) in zip(told, expected, strict=True):
        assert where.startswith(place)
        assert words in message
        assert len(message.splitlines()) == 1
    lines = done.stderr.splitlines()
    assert lines[: len(told)] == [f"{where}: {message}" for where, message in told]
    assert lines[len(told) :] == ([f"{len(told)} problems"] if len(told) > 1 else [])


def test_an_empty_answer_is_dropped_and_counted_where_the_recipe_says_so(here: Path) -> None:
    done = finetune(
        here, "plan", "good.yaml", "--json", "--set", "data.train=answers.jsonl", "--set", "data.empty_answer=drop"
    )
    assert done.returncode == 0, done.stderr
    values = json.loads(done.stdout)
    assert (values["examples"], values["rows_read"], values["dropped"]) == (7, 8, {"empty_answer": 1})


def test_a_command_line_that_cannot_be_read_prints_its_json_object_too(here: Path) -> None:
    done = finetune(here, "plan", "good.yaml", "--nonsense", "--json")
    assert done.returncode == 2
    assert "No such option: --nonsense" in done.stderr
    assert json.loads(done.stdout)["error"]["code"] == 2


def test_bad_data_is_told_before_anything_heavy_is_imported(here: Path) -> None:
    code = (
        "import sys; from finetune.cli import main\n"
        "sys.argv = ['finetune', 'train', 'good.yaml', '--set', 'data.train=answers.jsonl']\n"
        "try: main()\n"
        "except SystemExit as end: assert end.code == 2, end.code\n"
        "assert 'torch' not in sys.modules and 'transformers' not in sys.modules"
    )
    environment = os.environ | {"PYTHONPATH": str(CHECKOUT)}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=here, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("failure", "code", "words"),
    [("KeyboardInterrupt()", 130, "interrupted"), ("MemoryError()", 5, "tokens_per_pass"), ("KeyError('x')", 1, "bug")],
)
def test_every_failure_prints_its_json_object(failure: str, code: int, words: str) -> None:
    program = (
        "import sys, finetune.cli as cli\n"
        f"def broken(): raise {failure}\n"
        "cli.app = broken\n"
        "sys.argv = ['finetune', 'plan', 'x', '--json']\n"
        "cli.main()"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == code
    error = json.loads(done.stdout)["error"]
    assert error["code"] == code
    assert words in error["problems"][0]["message"]
