"""Two thousand broken recipes: each is read, or refused with the file and line of everything that is wrong."""

from __future__ import annotations

import random
import re
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest

from finetune.errors import UserError
from finetune.recipe import Recipe, load_recipe

EXAMPLE = """\
version: 1
name: alpaca-llama3.2-1b
seed: 17

model:
  base: meta-llama/Llama-3.2-1B     # hub id | folder | builtin:pocket-llama
  revision: null                    # hub commit to pin
  quantization: nf4                 # nf4 | fp4 | int8 | none
  dtype: auto

adapter:
  method: lora
  rank: 16
  alpha: 32
  dropout: 0.0
  targets: all-linear               # all-linear | [q_proj, v_proj]

data:
  train: datasets/quickstart.jsonl  # path, hub:owner/name, or a list of them
  eval: null
  format: auto
  template: auto
  loss_on: assistant
  max_tokens: 2048
  too_long: error
  empty_answer: error
  date: 26 Jul 2024

train:
  objective: sft
  epochs: 3
  batch_size: 16
  tokens_per_pass: auto
  recompute: auto
  learning_rate: 2e-4
  schedule: cosine
  warmup: 0.03
  optimizer: adamw
  weight_decay: 0.0
  max_grad_norm: 1.0

evaluate:
  every_steps: 100

output:
  folder: runs/{name}
  save_every_steps: 200
  keep_checkpoints: 2
  log_to: []
"""
SOURCES = """\
  train:
    - source: datasets/quickstart.jsonl
      rows: 100
      weight: 2.5
      columns: {question: instruction, answer: output}
    - hub:owner/name
    - {source: other.jsonl, weight: 0.5}
"""
COUNT, SEED = 2000, 20240726
SECONDS = 60  # far above what it takes; a recipe that takes minutes is a fault too
PLACED = re.compile(r"^.+:\d+(:\d+)?: .+", re.DOTALL)
VALUES = [
    *["", "null", "~", "true", "no", "0", "-1", "17", "1.5", "-0.0", "1e400", "-.inf", ".nan", "0x1F", "0o17", "1_000"],
    *[
        "9" * 40,
        "9" * 5000,
        "1e-400",
        "2e-4",
        "2E-4",
        "12:30:45",
        "2024-07-26",
        "2024-07-26 10:00:00",
        "''",
        '""',
        "' '",
    ],
    *[
        "[]",
        "{}",
        "[1, [2, [3]]]",
        "[q_proj, q_proj]",
        "[~]",
        "{a: {b: 1}}",
        "{? [1, 2] : 3}",
        "{1: 2}",
        "[tensorboard]",
    ],
    *["!!python/object/apply:os.system [x]", "!!binary aGk=", "!!set {a, b}", "!!int x", "!own tag", "!!float '1'"],
    *["*missing", "&here 5", "*here", "&me [*me]", "<<", "{<<: *missing}", "|", ">-", "- 1", "? x", "%x", "@x", "`x`"],
    *[
        '"unclosed',
        "'unclosed",
        "[unclosed",
        "{unclosed",
        '"\\ud800"',
        '"\\x00"',
        '"\\u202e"',
        "a: b",
        "é中😀",
        "x" * 3000,
    ],
    *["{name}", "{other}", "{", "../..", "/", "builtin:none", "hub:", "hub:a/b:c:d", "auto", "none", "error", "lora"],
    *["[" * 200 + "]" * 200, "{a: " * 200 + "1" + "}" * 200, '"\\xZZ"', "=", "!", "&", "*", "!!null x", "!<tag:x> 1"],
]
BYTES = [
    b"\xff",
    b"\xc3\x28",
    b"\xed\xa0\x80",
    b"\x00",
    b"\x07",
    b"\x1b[31m",
    b"\x7f",
    b"\xef\xbb\xbf",
    b"\xff\xfe",
    b"\r",
]
BYTES += [
    b"\xc2\x85",
    b"\xe2\x80\xa8",
    b"\xef\xbf\xbe",
    b"\x0c",
    b"\t",
    b"\n---\n",
    b"\n...\n",
    b"%YAML 9.9\n",
    b"\xc2\xa0",
]
SNIPPETS = [
    *[
        "name: again",
        "models:",
        "train: {epochs: 1}",
        "  <<: *x",
        "<<: {seed: 3}",
        "? [a]\n: b",
        "? {a: b}\n: c",
        "1: 2",
    ],
    *[
        "null: 1",
        "true: yes",
        "  rank: 8",
        "  max_steps: 5",
        "---",
        "...",
        "- a",
        "text alone",
        "  - x",
        "\tx: 1",
        "#",
        ": 5",
    ],
    *[
        "base: &b\n  rank: 1",
        "again: *b",
        "a: &a [&a [*a]]",
        "&k key: 1",
        "[a, b]: c",
        "!!str seed: 4",
        '"seed": 4',
        "seed : 4",
    ],
    *[
        "x: &x [1,1]\ny: &y [*x,*x,*x]\nz: [*y,*y,*y,*y]",
        "data: *missing",
        "  from: x",
        "adapter:\n  rank: 4",
        "?",
        "-",
    ],
]

Mutation = Callable[[random.Random, bytes], bytes]


def of_lines(change: Callable[[random.Random, list[bytes], int], None]) -> Mutation:
    """A mutation of one line, chosen at random, among all lines."""

    def mutate(chance: random.Random, text: bytes) -> bytes:
        lines = text.split(b"\n")
        change(chance, lines, chance.randrange(len(lines)))
        return b"\n".join(lines)

    mutate.__name__ = change.__name__
    return mutate


@of_lines
def delete_lines(chance: random.Random, lines: list[bytes], at: int) -> None:
    del lines[at : at + chance.choice([1, 1, 1, 3, 12])]


@of_lines
def repeat_lines(chance: random.Random, lines: list[bytes], at: int) -> None:
    some = lines[at : at + chance.choice([1, 1, 5])]
    place = chance.choice([at, chance.randrange(len(lines))])
    lines[place:place] = some


@of_lines
def swap_lines(chance: random.Random, lines: list[bytes], at: int) -> None:
    other = chance.randrange(len(lines))
    lines[at], lines[other] = lines[other], lines[at]


@of_lines
def change_indentation(chance: random.Random, lines: list[bytes], at: int) -> None:
    lines[at] = chance.choice([b"", b" ", b"   ", b"    ", b"\t", b"  \t", b"        "]) + lines[at].lstrip()


@of_lines
def other_value(chance: random.Random, lines: list[bytes], at: int) -> None:
    key, colon, _ = lines[at].partition(b":")
    lines[at] = key + (colon or b":") + b" " + chance.choice(VALUES).encode()


@of_lines
def typo(chance: random.Random, lines: list[bytes], at: int) -> None:
    key, colon, rest = lines[at].partition(b":")
    place = chance.randrange(len(key) + 1)
    letter = chance.choice([b"", b"x", b"-", b"A", b" ", b"_", b"'", b'"', b":", b"#", b"&", b"*", b"!", b"\xc3\xa9"])
    lines[at] = key[:place] + letter + key[place + chance.randrange(2) :] + colon + rest


@of_lines
def insert_lines(chance: random.Random, lines: list[bytes], at: int) -> None:
    lines.insert(at, chance.choice(SNIPPETS).encode())


@of_lines
def anchor_and_alias(chance: random.Random, lines: list[bytes], at: int) -> None:
    key, _, value = lines[at].partition(b":")
    lines[at] = key + b": &it" + (value or b" 1")
    other = chance.randrange(len(lines))
    lines[other] = lines[other].partition(b":")[0] + b": *it"


def insert_bytes(chance: random.Random, text: bytes) -> bytes:
    place = chance.choice([0, chance.randrange(len(text) + 1)])
    return text[:place] + chance.choice(BYTES) + text[place:]


def cut_short(chance: random.Random, text: bytes) -> bytes:
    return text[: chance.randrange(len(text) + 1)]


def change_byte(chance: random.Random, text: bytes) -> bytes:
    place = chance.randrange(len(text) + 1)
    return text[:place] + bytes([chance.randrange(256)]) + text[place + 1 :]


def sources_with_keys(chance: random.Random, text: bytes) -> bytes:
    train = re.compile(rb"^  train: .*\n", re.MULTILINE)
    return train.sub(lambda _: SOURCES.encode(), text, count=1)


def whole_encoding(chance: random.Random, text: bytes) -> bytes:
    decoded = text.decode("utf-8", "replace")
    return decoded.encode(chance.choice(["utf-16", "utf-16-le", "utf-32", "utf-8-sig", "cp037"]), "replace")


def as_json(chance: random.Random, text: bytes) -> bytes:
    pairs = zip((b"version", b"seed"), chance.sample(VALUES, 2), strict=True)
    values = b", ".join(b'"%s": %s' % (key, value.encode()) for key, value in pairs)
    return b'{"name": "x", "model": {"base": "b"}, "data": {"train": "t"}, ' + values + b"}"


MUTATIONS: list[Mutation] = [delete_lines, repeat_lines, swap_lines, change_indentation, other_value, other_value]
MUTATIONS += [typo, insert_lines, anchor_and_alias, insert_bytes, change_byte, sources_with_keys]
RARE: list[Mutation] = [cut_short, whole_encoding, as_json]


def mutant(number: int) -> tuple[bytes, list[str]]:
    """The text of one broken recipe, and the names of what was done to it."""
    chance = random.Random(SEED + number)
    text, done = EXAMPLE.encode(), []
    for _ in range(chance.choice([1, 1, 1, 2, 3, 6])):
        mutation = chance.choice(RARE) if chance.random() < 0.04 else chance.choice(MUTATIONS)
        if mutation is not sources_with_keys and not done and chance.random() < 0.2:
            text = sources_with_keys(chance, text)
        text = mutation(chance, text)
        done.append(mutation.__name__)
    return text, done


def outcome(path: Path) -> tuple[str, str]:
    """`read` or `refused`, or what else happened; and what is wrong with it."""
    try:
        recipe = load_recipe(path)
    except UserError as error:
        wrong = [str(each) for each in error.problems if not well_placed(str(each), path)]
        return (
            ("refused", "") if error.problems and not wrong else ("badly told", "; ".join(wrong) or "no problem told")
        )
    except BaseException as error:
        return type(error).__name__, str(error)
    return ("read", "") if isinstance(recipe, Recipe) else ("no Recipe", repr(recipe))


def well_placed(problem: str, path: Path) -> bool:
    """`file:line: what`, of a line that the file has; on one line, without control characters."""
    if not PLACED.match(problem) or not problem.startswith(f"{path}:"):
        return False
    line = int(problem.removeprefix(f"{path}:").partition(":")[0])
    rest = problem.removeprefix(f"{path}:{line}:").strip()
    return (
        1 <= line <= len(path.read_bytes().splitlines()) + 1
        and bool(rest)
        and problem.replace("\xa0", " ").isprintable()
    )


@pytest.fixture(scope="module")
def example(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("recipes") / "example.yaml"
    path.write_text(EXAMPLE)
    return path


def test_the_example_is_read(example: Path) -> None:
    assert outcome(example) == ("read", "")
    written_out = example.with_name("sources.yaml")
    written_out.write_bytes(sources_with_keys(random.Random(0), EXAMPLE.encode()))
    assert [source.source for source in load_recipe(written_out).data.sources] == [
        "datasets/quickstart.jsonl",
        "hub:owner/name",
        "other.jsonl",
    ]


def test_a_broken_recipe_is_read_or_refused_with_its_lines(tmp_path: Path) -> None:
    path, seen, wrong = tmp_path / "recipe.yaml", Counter(), []
    started = time.perf_counter()
    for number in range(COUNT):
        text, done = mutant(number)
        path.write_bytes(text)
        what, why = outcome(path)
        seen[what] += 1
        if what not in ("read", "refused"):
            wrong.append(f"mutant({number}) {done}: {what}: {why[:300]!r}")
    assert wrong == [], f"{len(wrong)} of {COUNT}"
    assert time.perf_counter() - started < SECONDS
    assert seen["read"] > COUNT / 20, "hardly any is read: the mutations are too coarse to try anything"
    assert seen["refused"] > COUNT / 2


@pytest.mark.parametrize(
    "text",
    [
        EXAMPLE.replace("rank: 16", "rnak: 16").encode(),
        EXAMPLE.replace("seed: 17", "seed: [*me]").encode(),
        EXAMPLE.encode().replace(b"name: ", b"name: \xff"),
        EXAMPLE.replace("  method", "\tmethod").encode(),
        b"",
    ],
    ids=["typo", "alias", "not-utf-8", "tab", "empty"],
)
def test_the_command_line_refuses_it_without_a_traceback(tmp_path: Path, text: bytes) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_bytes(text)
    answer = subprocess.run(
        [sys.executable, "-m", "finetune", "plan", str(path)], capture_output=True, text=True, timeout=60, check=False
    )
    assert answer.returncode == 2, answer.stderr
    assert "Traceback" not in answer.stderr + answer.stdout
    assert f"{path}:" in answer.stderr
