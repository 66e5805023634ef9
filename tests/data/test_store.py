"""Labelled rows are kept: found again when nothing changed, made again when anything did, and never half there."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from finetune.base import Base, read_base
from finetune.data import cached
from finetune.data.prepare import PreparedData, prepare_data, read_data
from finetune.data.store import ARRAYS, open_store
from finetune.recipe import DataSection
from tests.conftest import POCKET, alpaca_rows


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "finetune" / "tokens"


@pytest.fixture
def labelled(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """The sources that were really labelled, in order: nothing else than a call of the function that does it."""
    made: list[str] = []
    real = cached._label

    def label(section: Any, *arguments: Any, **named: Any) -> Any:
        made.append(section.source)
        return real(section, *arguments, **named)

    monkeypatch.setattr(cached, "_label", label)
    return made


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    file = tmp_path / "rows.jsonl"
    write(file, [{**row, "output": f"answer {index}"} for index, row in enumerate(alpaca_rows(30))])
    return file


@pytest.fixture
def base(tmp_path: Path) -> Base:
    """A copy of pocket-llama that may be changed."""
    shutil.copytree(POCKET, tmp_path / "base")
    return read_base(str(tmp_path / "base"))


def write(file: Path, rows: list[dict]) -> None:
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))


def prepare(base: Base, rows: Path, workers: int | None = None, **section: Any) -> PreparedData:
    return prepare_data(DataSection(train=str(rows), **section), base, seed=17, workers=workers)


def stream_of(data: PreparedData) -> str:
    """One hash over all token ids and labels, in order."""
    digest = sha256()
    for example in data.train:
        digest.update(np.asarray(example.ids, "<i8").tobytes() + np.asarray(example.labels, "<i8").tobytes())
    return digest.hexdigest()


def test_the_second_time_nothing_is_labelled(base: Base, rows: Path, labelled: list[str]) -> None:
    first, second = prepare(base, rows), prepare(base, rows)
    assert labelled == [str(rows)]
    assert stream_of(first) == stream_of(second)
    assert first.account == second.account


def change(ingredient: str, base: Base, rows: Path) -> dict[str, Any]:
    """Change one thing on disk, or name one key of the recipe that is another."""
    folder = base.tokenizer_folder
    if ingredient == "data":
        rows.write_text(rows.read_text().replace("answer 7", "answer 8"))
    elif ingredient == "tokenizer":
        tokenizer = json.loads((folder / "tokenizer.json").read_text())
        tokenizer["model"]["merges"].pop()
        (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    elif ingredient == "template":
        (folder / "chat_template.jinja").write_text("{% for m in messages %}{{ m.content }}{{ eos_token }}{% endfor %}")
    else:
        return json.loads(ingredient)
    return {}


@pytest.mark.parametrize(
    "ingredient",
    [
        "data",
        "tokenizer",
        "template",
        '{"template": "none"}',
        '{"date": "1 Jan 2000"}',
        '{"system": "Be brief."}',
        '{"loss_on": "everything"}',
        '{"max_tokens": 1000}',
        '{"too_long": "drop"}',
        '{"special_tokens": "control"}',
        '{"format": "alpaca"}',
    ],
)
def test_whatever_may_change_the_tokens_makes_them_anew(
    base: Base, rows: Path, labelled: list[str], ingredient: str
) -> None:
    prepare(base, rows)
    keys = change(ingredient, base, rows)
    prepare(read_base(base.facts.base), rows, **keys)
    assert len(labelled) == 2


def test_the_code_that_makes_tokens_is_an_ingredient(
    base: Base, rows: Path, labelled: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    prepare(base, rows)
    code = tmp_path / "data"
    shutil.copytree(Path(cached.__file__).parent, code)
    (code / "examples.py").write_text((code / "examples.py").read_text() + "\n# changed\n")
    monkeypatch.setattr("finetune.data.store.__file__", str(code / "store.py"))
    prepare(base, rows)
    assert len(labelled) == 2


@pytest.mark.parametrize("name", [*ARRAYS, "store.json"])
def test_one_flipped_bit_is_seen_and_mended(
    base: Base, rows: Path, cache: Path, labelled: list[str], name: str
) -> None:
    before = stream_of(prepare(base, rows))
    (folder,) = cache.iterdir()
    file = folder / (name if name == "store.json" else f"{name}.bin")
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 4
    file.write_bytes(content)
    assert open_store(folder) is None
    assert stream_of(prepare(base, rows)) == before
    assert len(labelled) == 2
    assert open_store(folder) is not None


@pytest.mark.parametrize(
    ("written", "other"), [('"format": "alpaca"', '"format": "blpaca"'), ("rows.jsonl", "rows.jsonk")]
)
def test_a_changed_word_about_a_store_is_seen(base: Base, rows: Path, cache: Path, written: str, other: str) -> None:
    prepare(base, rows)
    (folder,) = cache.iterdir()
    facts = (folder / "store.json").read_text()
    assert written in facts
    (folder / "store.json").write_text(facts.replace(written, other))
    assert open_store(folder) is None


@pytest.mark.parametrize("damage", ["cut", "emptied", "removed"])
def test_a_damaged_store_is_made_anew(base: Base, rows: Path, cache: Path, damage: str) -> None:
    before = stream_of(prepare(base, rows))
    (folder,) = cache.iterdir()
    file = folder / "ids.bin"
    if damage == "removed":
        file.unlink()
    else:
        file.write_bytes(file.read_bytes()[:-4] if damage == "cut" else b"")
    assert stream_of(prepare(base, rows)) == before


def test_a_killed_run_leaves_no_store_and_no_litter(base: Base, rows: Path, cache: Path) -> None:
    gone = subprocess.run([sys.executable, "-c", "import os; print(os.getpid())"], capture_output=True, check=True)
    litter = cache / f"0123.{int(gone.stdout)}.partial"
    litter.mkdir(parents=True)
    (litter / "ids.bin").write_bytes(b"half")
    yesterday = time.time() - 25 * 3600
    os.utime(litter, (yesterday, yesterday))
    prepare(base, rows)
    assert [folder.name.count(".") for folder in cache.iterdir()] == [0]


def test_runs_that_start_together_share_one_store(base: Base, rows: Path, cache: Path, tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.json"
    model = {"base": base.facts.base}
    recipe.write_text(json.dumps({"version": 1, "name": "x", "model": model, "data": {"train": str(rows)}}))
    command = [sys.executable, "-m", "finetune", "plan", str(recipe), "--json"]

    def plan(number: int) -> str:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout

    with ThreadPoolExecutor(4) as pool:
        answers = set(pool.map(plan, range(4)))
    assert len(answers) == 1
    (folder,) = cache.iterdir()
    assert open_store(folder) is not None


def test_the_number_of_workers_changes_nothing(
    base: Base, tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("finetune.data.labelling.ROWS_WITHOUT_WORKERS", 50)
    monkeypatch.setattr("finetune.data.labelling.ROWS_AT_ONCE", 20)
    rows = tmp_path / "many.jsonl"
    many = [{**row, "output": f"answer {index % 70}"} for index, row in enumerate(alpaca_rows(170))]
    many[33]["output"], many[160]["output"] = "", 3  # two that are refused keep their places
    write(rows, many)
    prepared = []
    for workers in (1, 4):
        prepared.append(read_data(DataSection(train=str(rows)), base, seed=17, workers=workers))
        shutil.rmtree(cache)
    one, four = prepared
    assert one.account == four.account
    assert one.account.refused == {"empty_answer": 1, "wrong_type": 1}


def test_a_cache_that_cannot_be_written_is_done_without(
    base: Base, rows: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    before = stream_of(prepare(base, rows))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert stream_of(prepare(base, rows)) == before
