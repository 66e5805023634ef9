"""The same rows give the same tokens: on any day, with any number of workers, from the cache, in any folder."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest

from finetune.base import Base
from tests.conftest import CHECKOUT, POCKET, alpaca_rows
from tests.data.conftest import base_around

SMALL, LARGE = 40, 4500  # rows; the larger file is read by worker processes
DATE = "26 Jul 2024"

# Python runs this at the start of every process, of spawned workers too: its clock then stands on another day.
CLOCK = """
import datetime, os, time
if "TEST_DAY" in os.environ:
    real = time.time
    ahead = datetime.datetime.fromisoformat(os.environ["TEST_DAY"]).timestamp() + 43200 - real()
    time.time = lambda: real() + ahead
    time.time_ns = lambda: int(time.time() * 1e9)
    for name in ("localtime", "gmtime"):
        plain = getattr(time, name)
        setattr(time, name, lambda seconds=None, plain=plain: plain(time.time() if seconds is None else seconds))
    class Day(datetime.datetime):
        @classmethod
        def now(cls, tz=None):
            return cls.fromtimestamp(time.time(), tz)
        @classmethod
        def today(cls):
            return cls.now()
        utcnow = today
    class Date(datetime.date):
        @classmethod
        def today(cls):
            return cls.fromtimestamp(time.time())
    datetime.datetime, datetime.date = Day, Date
"""
STREAM = """
import hashlib, json, sys, datetime

def main():
    from finetune.base import read_base
    from finetune.data.prepare import prepare_data
    from finetune.recipe import DataSection
    train, base, date, workers = sys.argv[1:]
    section = DataSection(train=train, eval=5, date=date)
    data = prepare_data(section, read_base(base), seed=17, workers=int(workers))
    told = hashlib.sha256()
    for examples in (data.train, data.eval):
        for example in examples:
            told.update(len(example.ids).to_bytes(8) + example.ids.tobytes() + example.labels.tobytes())
    texts = {"day": datetime.datetime.now().date().isoformat(), "hash": told.hexdigest()}
    print(json.dumps(texts | {"examples": len(data.train) + len(data.eval)}))

if __name__ == "__main__":
    main()
"""


class Stream(NamedTuple):
    """What one process got."""

    hash: str
    examples: int


Reads = Callable[..., Stream]


@pytest.fixture
def stream(tmp_path: Path) -> Reads:
    """Read a file in a process of its own, with its own day, folder, cache and number of workers."""
    scripts = tmp_path / "scripts"
    scripts.mkdir()
    (scripts / "sitecustomize.py").write_text(CLOCK)
    (scripts / "stream.py").write_text(STREAM)

    def read(
        train: Path | str, base: Path, *, day: str = "2026-01-05", cache: str = "cold", workers: int = 1, **other: str
    ) -> Stream:
        paths = os.pathsep.join([str(scripts), str(CHECKOUT)])
        environment = {"PYTHONPATH": paths, "TEST_DAY": day, "XDG_CACHE_HOME": str(tmp_path / cache)}
        answer = subprocess.run(
            [sys.executable, str(scripts / "stream.py"), str(train), str(base), other.get("date", DATE), str(workers)],
            env=os.environ | environment,
            cwd=other.get("folder", tmp_path),
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )
        assert answer.returncode == 0, answer.stderr
        told = json.loads(answer.stdout)
        assert told["day"] == day, "the clock was not set"
        return Stream(told["hash"], told["examples"])

    return read


@pytest.fixture(scope="module")
def dated_base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Pocket-llama's tokenizer with a template that asks the clock, as that of Llama 3.2 does."""
    folder = tmp_path_factory.mktemp("base") / "dated"
    base_around(POCKET, folder)
    config = json.loads((folder / "tokenizer_config.json").read_text())
    config["chat_template"] = (
        "{{- bos_token + 'Today: ' + strftime_now('%d %b %Y') + '\n' }}"
        "{%- for message in messages %}"
        "{{- message['role'] + ': ' + message['content'] + (eos_token if message['role'] == 'assistant' else '\n') }}"
        "{%- endfor %}{%- if add_generation_prompt %}{{- 'assistant: ' }}{%- endif %}"
    )
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


def write_rows(file: Path, count: int) -> Path:
    rows = [{**row, "output": f"answer {index}"} for index, row in enumerate(alpaca_rows(count))]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def change_row(file: Path, number: int) -> Path:
    """The same file with another letter in one answer."""
    lines = file.read_text().splitlines(keepends=True)
    assert f'"answer {number}"' in lines[number]
    lines[number] = lines[number].replace(f'"answer {number}"', f'"answer {number}!"')
    other = file.with_stem("changed")
    other.write_text("".join(lines))
    return other


@pytest.mark.parametrize("count", [SMALL, LARGE])
def test_a_stream_depends_on_rows_and_date_alone(stream: Reads, dated_base: Path, tmp_path: Path, count: int) -> None:
    rows = write_rows(tmp_path / "rows.jsonl", count)
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    first = stream(rows, dated_base)
    assert first.examples == count
    same = {
        "from the cache, on another day": stream(rows, dated_base, day="2031-12-24"),
        "anew, on another day, by four workers": stream(rows, dated_base, day="2031-12-24", cache="b", workers=4),
        "from the cache of four workers": stream(rows, dated_base, cache="b"),
        "anew, in another folder": stream(rows, dated_base, cache="c", folder=str(elsewhere)),
        "named from another folder": stream("../rows.jsonl", dated_base, cache="d", workers=4, folder=str(elsewhere)),
    }
    assert same == dict.fromkeys(same, first)
    assert stream(rows, dated_base, date="27 Jul 2024").hash != first.hash, "data.date changes nothing"
    assert stream(change_row(rows, count // 2), dated_base).hash != first.hash, "a row changes nothing"


def test_a_row_changed_in_place_is_read_anew(stream: Reads, dated_base: Path, tmp_path: Path) -> None:
    rows = write_rows(tmp_path / "rows.jsonl", SMALL)
    before = stream(rows, dated_base)
    change_row(rows, 7).replace(rows)
    assert stream(rows, dated_base).hash != before.hash


@pytest.mark.real
@pytest.mark.soak  # each process converts the tokenizer anew
def test_the_template_of_llama_3_2_does_not_see_the_day(
    stream: Reads, real_base: Callable[[str], Base], tmp_path: Path
) -> None:
    rows = write_rows(tmp_path / "rows.jsonl", SMALL)
    base = real_base("llama3.2-instruct").facts.folder
    assert "strftime_now" in json.loads((base / "tokenizer_config.json").read_text())["chat_template"]
    first = stream(rows, base, day="2026-01-05")
    assert stream(rows, base, day="2031-12-24", cache="b", workers=4) == first
    assert stream(rows, base, date="27 Jul 2024").hash != first.hash
