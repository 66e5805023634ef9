"""Facts about recipes: what is read, with which defaults, and every problem a person gets to see."""

from __future__ import annotations

import json
import string
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from finetune.errors import UserError
from finetune.recipe import Recipe, SourceSection, load_recipe, recipe_schema

MINIMAL = """\
version: 1
name: tiny
model:
  base: builtin:pocket-llama
data:
  train: rows.jsonl
"""

# The documented example: every key that it shows has the default as its value.
DOCUMENTED = """\
version: 1
name: tiny
seed: 17

model:
  base: builtin:pocket-llama        # hub id | folder | builtin:pocket-llama
  revision: null                    # hub commit to pin
  quantization: nf4                 # nf4 | fp4 | int8 | none         (nf4: double quantised, block 64)
  dtype: auto                       # auto | bfloat16 | float16 | float32
  compute: auto                     # auto | int8 | fp8

adapter:
  method: lora                      # lora | dora | rslora | ...
  rank: 16
  alpha: 32
  dropout: 0.0
  targets: all-linear               # all-linear | [q_proj, v_proj]

data:
  train: rows.jsonl
  eval: null                        # fraction | number of rows | path | null
  format: auto
  template: auto
  loss_on: assistant                # assistant | last-assistant | everything
  max_tokens: 2048
  too_long: error
  empty_answer: error               # error | drop
  date: 26 Jul 2024

train:
  objective: sft
  epochs: 3                         # or max_steps
  batch_size: 16                    # examples per optimizer step, all devices together
  tokens_per_pass: auto             # layout only: never changes the training
  recompute: auto                   # layout only: auto | none | all
  learning_rate: 2e-4
  schedule: cosine                  # cosine | linear | constant
  warmup: 0.03                      # fraction of the steps, or a number of steps
  optimizer: adamw                  # adamw | adamw-8bit | paged-adamw-8bit
  weight_decay: 0.0
  max_grad_norm: 1.0

evaluate:
  every_steps: 100

output:
  folder: runs/{name}
  save_every_steps: 200
  keep_checkpoints: 2
  log_to: []                        # tensorboard | wandb | mlflow | trackio (metrics.jsonl always)
"""
WITHOUT_EXAMPLE = {
    "adapter.layers": None, "adapter.rank_by": None, "adapter.alpha_by": None, "adapter.start": "default",
    "adapter.learning_rate_ratio": 1.0, "adapter.block_size": None, "adapter.train_tokens": [],
    "adapter.also_train": [], "adapter.from": None, "data.system": None, "data.truncate": "prompt",
    "train.max_steps": None, "train.speedups": "auto",
    "data.special_tokens": "text", "data.deduplicate": "none", "data.leaked": "keep",
    "data.drop": [], "evaluate.prompts": None, "evaluate.patience": None,
    "output.keep_best": False,
}  # fmt: skip

SECTION_KEYS = {
    "": "version name seed model adapter data train evaluate output",
    "model": "base revision quantization dtype compute",
    "adapter": "method rank alpha dropout targets layers rank_by alpha_by start learning_rate_ratio block_size "
    "train_tokens also_train from",
    "data": "train eval format template loss_on max_tokens too_long truncate empty_answer special_tokens "
    "deduplicate leaked drop system date",
    "train": "objective epochs max_steps batch_size tokens_per_pass recompute speedups learning_rate schedule warmup "
    "optimizer weight_decay max_grad_norm",
    "evaluate": "every_steps prompts patience",
    "output": "folder save_every_steps keep_checkpoints keep_best log_to",
}
EVERY_KEY = [
    f"{section}.{key}" if section else key
    for section, keys in SECTION_KEYS.items()
    for key in keys.split()
    if section or key not in SECTION_KEYS
]


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("recipes")


def load(text: str | bytes, folder: Path, *overrides: str) -> Recipe:
    path = folder / "r.yaml"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return load_recipe(path, overrides)


def problems_of(text: str | bytes, folder: Path, *overrides: str) -> list[str]:
    """Every problem as a person reads it, without the folder."""
    with pytest.raises(UserError) as caught:
        load(text, folder, *overrides)
    assert caught.value.code == 2
    return str(caught.value).replace(f"{folder}/", "").split("\n")


def with_value(key: str, value: Any) -> dict[str, Any]:
    """The minimal recipe as nested values, with one key set."""
    values: dict[str, Any] = {
        "version": 1,
        "name": "tiny",
        "model": {"base": "builtin:pocket-llama"},
        "data": {"train": "rows.jsonl"},
    }
    section, _, name = key.rpartition(".")
    (values.setdefault(section, {}) if section else values)[name] = value
    return values


# --- what is read ---


def test_every_default_is_the_documented_one(folder):
    shortest, documented = load(MINIMAL, folder), load(DOCUMENTED, folder)
    assert shortest == documented
    assert shortest.settings() == documented.settings()
    assert documented.given_keys() == set(EVERY_KEY) - WITHOUT_EXAMPLE.keys()
    assert {key: shortest.settings()[key] for key in WITHOUT_EXAMPLE} == WITHOUT_EXAMPLE
    assert list(shortest.settings()) == EVERY_KEY


def test_given_keys_are_those_a_person_wrote(folder):
    recipe = load(MINIMAL + "train: {epochs: 3}\noutput: {}\n", folder, "adapter.from=old", "seed=1")
    assert recipe.given_keys() == {
        "version", "name", "seed", "model.base", "data.train", "train.epochs", "adapter.from",
    }  # fmt: skip


def test_the_run_folder_carries_the_name(folder):
    recipe = load(MINIMAL, folder, "output.folder=out/{name}-a/{name}")
    assert recipe.run_folder == Path("out/tiny-a/tiny")
    assert recipe.settings()["output.folder"] == "out/tiny-a/tiny"


def test_a_recipe_is_frozen_all_the_way_down(folder):
    recipe = load(MINIMAL, folder, "adapter.targets=[q_proj]", "output.log_to=[wandb]", "data.train=[a, b]")
    hash(recipe)
    assert (recipe.adapter.targets, recipe.output.log_to, recipe.data.sources) == (
        ("q_proj",),
        ("wandb",),
        (SourceSection(source="a"), SourceSection(source="b")),
    )
    with pytest.raises(ValueError):
        recipe.train.epochs = 4


@pytest.mark.parametrize(
    ("written", "read"),
    [
        ("train.learning_rate=2e-4", 0.0002),
        ("train.learning_rate=1", 1.0),
        ("train.warmup=10", 10),
        ("train.warmup=.5", 0.5),
        ("train.warmup=0", 0),
        ("adapter.rank=0x10", 16),
        ("adapter.alpha=8", 8),
        ("adapter.alpha=0.5", 0.5),
        ("data.eval=0.1", 0.1),
        ("data.eval=1", 1),
        ("data.eval=held-out.jsonl", "held-out.jsonl"),
        ("data.eval=~", None),
        ("data.system=no", "no"),
        ("data.system=on", "on"),
        ("data.system=1_000", "1_000"),
        ("data.system=12:30:45", "12:30:45"),
        ("data.system=''", ""),
        ("data.date=2024-07-26", "2024-07-26"),
        ("data.system='010'", "010"),
        ('data.system="\\ud83e\\udd99"', "🦙"),
        ("data.template=mine.jinja", "mine.jinja"),
        ("model.quantization=none", "none"),
        ("model.revision='1234567'", "1234567"),
        ("train.tokens_per_pass=4096", 4096),
        ("train.speedups=none", "none"),
        ("train.speedups=[linears, head]", ["linears", "head"]),
        ("adapter.targets=[q_proj, v_proj]", ["q_proj", "v_proj"]),
    ],
)
def test_a_value_is_read_as_it_looks(folder, written, read):
    found = load(MINIMAL, folder, written).settings()[written.partition("=")[0]]
    assert found == read
    assert type(found) is type(read)


def test_an_override_of_max_steps_takes_the_place_of_epochs(folder):
    recipe = load(MINIMAL + "train: {epochs: 4}\n", folder, "train.max_steps=5")
    assert (recipe.train.max_steps, recipe.settings()["train.epochs"]) == (5, None)
    recipe = load(MINIMAL + "train: {max_steps: 4}\n", folder, "train.epochs=5")
    assert (recipe.train.max_steps, recipe.settings()["train.epochs"]) == (None, 5)


def test_importing_the_recipe_loads_nothing_heavy():
    code = "import sys, finetune.recipe; print({'torch', 'transformers', 'datasets', 'jinja2'} & sys.modules.keys())"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"


# --- JSON is YAML ---

_texts = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), max_size=30)
_visible = _texts.map(lambda text: f"a{text}")
_values = {
    "seed": st.integers(0, 2**32 - 1),
    "model.base": _visible,
    "adapter.alpha": st.integers(1, 1000) | st.floats(1e-9, 1e9),
    "adapter.targets": st.just("all-linear") | st.lists(_visible, min_size=1, max_size=4, unique=True),
    "data.train": _visible | st.lists(_visible, min_size=1, max_size=3),
    "data.eval": st.none() | st.integers(1, 99) | st.floats(1e-6, 0.999) | _visible,
    "data.system": st.none() | _texts,
    "train.learning_rate": st.floats(1e-12, 1e3),
    "train.warmup": st.integers(0, 99) | st.floats(0, 0.999),
    "train.max_steps": st.none() | st.integers(1, 10**6),
}


@given(chosen=st.fixed_dictionaries({}, optional=_values), indent=st.sampled_from([None, 2, "\t"]), ascii=st.booleans())
@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_json_and_yaml_are_read_alike_and_nothing_is_changed(folder, chosen, indent, ascii):
    values = with_value("seed", 17)
    for key, value in chosen.items():
        section, _, name = key.rpartition(".")
        (values.setdefault(section, {}) if section else values)[name] = value
    from_json = load(json.dumps(values, indent=indent, ensure_ascii=ascii), folder)
    lines = []
    for name, value in values.items():
        inner = value.items() if isinstance(value, dict) else ()
        lines += [f"{name}:" if inner else f"{name}: {json.dumps(value)}"]
        lines += [f"  {key}: {json.dumps(item)}".replace("\x7f", "\\x7f") for key, item in inner]
    assert load("\n".join(lines), folder) == from_json
    assert {key: from_json.settings()[key] for key in chosen} == chosen


# --- what is refused ---

THREE_MISTAKES = """\
# a header
version: 1
name: bad

model:
  base: builtin:pocket-llama
  quantization: nf4

adapter:
  method: lora

  rnak: 16

data:
  train: rows.jsonl


train:
  epochs: 1
  learning_rate: fast
  schedule: cosine

  batch_size: 0
"""


LOGGERS = "must be tensorboard, wandb, mlflow or trackio"


def test_all_problems_are_reported_at_once_with_their_lines(folder):
    assert problems_of(THREE_MISTAKES, folder, "train.epochs=x", "output.log_to=[wandbb]") == [
        "r.yaml:12: adapter.rnak: unknown key; did you mean 'rank'?",
        "r.yaml:20: train.learning_rate: a number is required, got 'fast'",
        "r.yaml:23: train.batch_size: must be 1 or more, got 0",
        "--set train.epochs=x: a whole number is required, got 'x'",
        f"--set output.log_to=[wandbb]: {LOGGERS}, got 'wandbb'; did you mean 'wandb'?",
    ]


TARGETS = "must be all-linear, attention, mlp, experts, or a list of these and of module names, each once"
SPEEDUPS = "must be auto, none, or a list of attention, linears, weights, layers, head, prefix, each once"
TEMPLATE = "must be auto, none, alpaca, vicuna, llama2, llama3, chatml, mistral, zephyr or a path that ends in .jinja"
SOURCES = "a path, hub:OWNER/NAME, a source with keys (source, rows, weight, columns), or a list of these"
EVAL = "must be a fraction between 0 and 1, a whole number of rows, a path, a source, or null for no evaluation"
NAME = "must be text of at most 100 letters, digits, dots, underscores and hyphens, the first a letter or digit"


@pytest.mark.parametrize(
    ("key", "written", "message"),
    [
        ("version", "2", "must be 1, got 2"),
        ("version", "true", "must be 1, got true"),
        ("name", "a b", f"{NAME}, got 'a b'"),
        ("name", "..", f"{NAME}, got '..'"),
        ("name", "2024", f"{NAME}, got 2024"),
        ("seed", "-1", "must be 0 or more, got -1"),
        ("seed", "4294967296", "must be 4294967295 or less, got 4294967296"),
        ("seed", "true", "a whole number is required, got true"),
        ("model.base", "' '", "must not be blank, got ' '"),
        ("model.base", "null", "text is required, got nothing"),
        ("model.revision", "1234567", "text is required, got 1234567; put it in quotes"),
        ("model.quantization", "null", "must be nf4, fp4, int8 or none, got nothing; did you mean 'none'?"),
        ("model.quantization", "NF4", "must be nf4, fp4, int8 or none, got 'NF4'; did you mean 'nf4'?"),
        ("model.dtype", "32", "must be auto, bfloat16, float16 or float32, got 32"),
        ("adapter.rank", "'16'", "a whole number is required, got '16'"),
        ("adapter.rank", "16.0", "a whole number is required, got 16.0"),
        ("adapter.alpha", "0", "must be a number above 0, got 0"),
        ("adapter.dropout", "1", "must be less than 1, got 1"),
        ("adapter.dropout", "-0.5", "must be 0 or more, got -0.5"),
        ("adapter.targets", "all_linear", f"{TARGETS}, got 'all_linear'; did you mean 'all-linear'?"),
        ("adapter.targets", "[]", f"{TARGETS}, got []"),
        ("adapter.targets", "[q_proj, q_proj]", f'{TARGETS}, got ["q_proj", "q_proj"]'),
        ("data.train", "[]", f"must be {SOURCES}, got []"),
        ("data.eval", "0", f"{EVAL}, got 0"),
        ("data.eval", "1.0", f"{EVAL}, got 1.0"),
        ("data.template", "alpacca", f"{TEMPLATE}, got 'alpacca'; did you mean 'alpaca'?"),
        ("data.system", "no: yes", "text is required, got keys of its own"),
        ("data.max_tokens", "1e3", "a whole number is required, got 1000.0"),
        ("data.max_tokens", "010", "010 is 8-based to some readers; write 10 for the number, '010' for the text"),
        ("train.learning_rate", "0", "must be more than 0, got 0"),
        ("train.learning_rate", ".inf", "a number is required, got '.inf'"),
        ("train.learning_rate", "1e999", "a finite number is required, got inf"),
        ("train.learning_rate", "true", "a number is required, got true"),
        ("train.tokens_per_pass", "0", "must be auto or a whole number, 1 or more, got 0"),
        ("train.speedups", "[]", f"{SPEEDUPS}, got []"),
        ("train.speedups", "[linear]", f'{SPEEDUPS}, got ["linear"]'),
        ("train.speedups", "[head, head]", f'{SPEEDUPS}, got ["head", "head"]'),
        ("train.warmup", "1.0", "must be a fraction of the steps (0 or more, less than 1) or a whole number of steps, "
         "got 1.0"),
        ("evaluate.every_steps", "{a: 1}", "a whole number is required, got keys of its own"),
        ("output.folder", "runs/{nmae}", "only {name} can stand in braces, got 'runs/{nmae}'"),
        ("output.keep_best", "1", "true or false is required, got 1"),
        ("output.log_to", "wandb", "a list is required, got 'wandb'; did you mean [wandb]?"),
        ("version", "1.0", "must be 1, got 1.0"),
        ("output.log_to", "[wandb, wandb]", "'wandb' stands in the list twice"),
        ("train.seed", "1", "unknown key; 'seed' belongs at the top level"),
        ("train.rank", "1", "unknown key; 'rank' belongs under adapter"),
        ("model.adapter", "{}", "unknown key; 'adapter' belongs at the top level"),
        ("model.ranks", "1", "unknown key; did you mean adapter.rank?"),
        ("evaluate.zzz", "1", "unknown key; possible here: every_steps, prompts, patience"),
    ],
)  # fmt: skip
def test_a_wrong_value_is_told_in_plain_words(folder, key, written, message):
    assert problems_of(MINIMAL, folder, f"{key}={written}") == [f"--set {key}={written}: {message}"]


def test_a_wrong_value_has_the_same_wording_in_a_file(folder):
    text = MINIMAL.replace("rows.jsonl", "[]") + "  eval: 0\nadapter:\n  targets:\n  - q_proj\n  - 3\noutput:\n"
    assert problems_of(text + "  log_to:\n  - wandb\n  - wandbb\n", folder) == [
        f"r.yaml:6: data.train: must be {SOURCES}, got []",
        f"r.yaml:7: data.eval: {EVAL}, got 0",
        f'r.yaml:9: adapter.targets: {TARGETS}, got ["q_proj", 3]',
        f"r.yaml:15: output.log_to: {LOGGERS}, got 'wandbb'; did you mean 'wandb'?",
    ]


HEADLESS = "r.yaml:1: a recipe is a mapping of sections (version, name, model, data, ...); "
KEYLESS = "a section with keys is required, got nothing; write its keys under it, or remove the line"


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("", [HEADLESS + "the file is empty"]),
        ("# only\n", [HEADLESS + "the file is empty"]),
        ("- a\n", [HEADLESS + 'found ["a"]']),
        (f"{MINIMAL}---\n{MINIMAL}", ["r.yaml:7: a second document starts here; one file is one recipe"]),
        (f"{MINIMAL}train:\n\tepochs: 1\n", ["r.yaml:8:1: not readable as YAML: a tab cannot indent; use spaces"]),
        (b"version: 1\nname: caf\xe9\n", ["r.yaml:2: not UTF-8 text; save the recipe as UTF-8"]),
        ("version: 1\nname: a\x07b\n", ["r.yaml:2: holds a control character; remove it"]),
        ("[" * 100_000, ["r.yaml:1:17: not readable as YAML: nested too deeply"]),
        (
            f"{MINIMAL}seed: 1\nmodel: {{}}\nseed: 2\n",
            [
                "r.yaml:8: model: repeated key, first written on line 3; keep one of the two",
                "r.yaml:9: seed: repeated key, first written on line 7; keep one of the two",
            ],
        ),
        (
            "version: 1\nmodel:\n  revision: a\ndata:\n",
            [
                "r.yaml:1: name: is required: the name of the run: letters, digits, dots, underscores and hyphens",
                "r.yaml:2: model.base: is required: the base model: a hub id, a folder, or builtin:NAME",
                f"r.yaml:4: data: {KEYLESS}",
            ],
        ),
        (f"{MINIMAL}train: fast\n", ["r.yaml:7: train: a section with keys is required, got 'fast'"]),
        (
            f"{MINIMAL}train:\n  epochs: 1\n  max_steps: 5\n",
            ["r.yaml:9: train.max_steps: stands beside train.epochs; keep one of the two"],
        ),
        (
            f"{MINIMAL}  system: !!python/object/apply:os.getcwd []\n  date: &a b\n  format: *a\n",
            [
                "r.yaml:7: data.system: the tag !!python/object/apply:os.getcwd is not read in a recipe; "
                "write the value itself",
                "r.yaml:8: data.date: the anchor &a is not read in a recipe; write the value itself",
                "r.yaml:9: data.format: the alias *a is not read in a recipe; write the value itself",
            ],
        ),
        (f"{MINIMAL}  <<: {{date: x}}\n", ["r.yaml:7: data.<<: unknown key; possible here: "
         + ", ".join(SECTION_KEYS["data"].split())]),
        (f"{MINIMAL}? [a, b]\n: 1\n", ["r.yaml:7: a key must be one plain word"]),
        (f'{MINIMAL}  system: "\\0"\n', ["r.yaml:7: data.system: text must not hold the character NUL"]),
        (f'{MINIMAL}  system: "\\ud83e"\n', ["r.yaml:7: data.system: text holds half a character (a lone surrogate)"]),
        (f"{MINIMAL}seed: {'1' * 5000}\n", ["r.yaml:7: seed: a number of more than 30 digits; put it in quotes if it "
         "is text"]),
    ],
)  # fmt: skip
def test_a_wrong_text_is_told_with_its_line(folder, text, told):
    assert problems_of(text, folder) == told


def test_a_file_that_is_no_recipe_is_told(folder):
    (folder / "big.yaml").write_bytes(b"#" * (2**20 + 1))
    for name, told in {
        "none.yaml": "no such file; `finetune recipes` lists",
        ".": "a recipe is a file, this is a folder",
        "big.yaml": "too large for a recipe",
        "\0": "cannot be read: ",
    }.items():
        with pytest.raises(UserError, match="(?s).") as caught:
            load_recipe(folder / name)
        (problem,) = caught.value.problems
        assert problem.where == str(folder / name)
        assert problem.message.startswith(told)


def test_a_bomb_of_aliases_does_not_explode(folder):
    lines = ["a0: &a0 [x, x]"] + [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]" for i in range(1, 30)]
    started = time.monotonic()
    assert len(problems_of("\n".join(lines), folder)) > 30
    assert time.monotonic() - started < 5


@pytest.mark.parametrize(
    ("override", "told"),
    [
        ("train.epochs", "a value is required; write section.key=VALUE, as in train.epochs=3 or data.eval=null"),
        ("train.epochs=", "a value is required; write section.key=VALUE, as in train.epochs=3 or data.eval=null"),
        ("train={epochs: 3}", "one key at a time; write train.KEY=VALUE"),
        ("trian.epochs=3", "unknown key; did you mean 'train'?"),
        ("rank=3", "unknown key; 'rank' belongs under adapter"),
        ("seed.a=3", "unknown key; did you mean 'seed'?"),
        ("model.bsae=3", "unknown key; did you mean 'base'?"),
        ("=3", "unknown key; possible here: version, name, seed, model, adapter, data, train, evaluate, output"),
    ],
)
def test_a_badly_written_override_is_told(folder, override, told):
    assert problems_of(MINIMAL, folder, override) == [f"--set {override}: {told}"]


def test_a_key_is_overridden_once(folder):
    assert problems_of(MINIMAL, folder, "seed=1", "seed=2") == [
        "--set seed=2: repeated key, see --set seed=1; keep one"
    ]


def test_an_override_cures_what_the_file_got_wrong(folder):
    assert load(MINIMAL + "seed: -1\n", folder, "seed=3").seed == 3
    recipe = load(MINIMAL.replace("  train: rows.jsonl", "  eval: 3"), folder, "data.train=a")
    assert recipe.data.sources == (SourceSection(source="a"),)


def one_letter_typos(word: str) -> set[str]:
    cuts = range(len(word))
    missing = {word[:i] + word[i + 1 :] for i in cuts}
    swapped = {word[:i] + word[i + 1] + word[i] + word[i + 2 :] for i in cuts[:-1]}
    changed = {word[:i] + letter + word[i + 1 :] for i in cuts for letter in string.ascii_lowercase + "_"}
    return (missing | swapped | changed) - {word}


@pytest.mark.parametrize("section", SECTION_KEYS)
def test_every_one_letter_typo_of_a_key_is_refused_and_the_key_suggested(folder, section):
    meant = {typo: key for key in SECTION_KEYS[section].split() for typo in one_letter_typos(key)}
    values: dict[str, Any] = with_value("seed", 17)
    typos = dict.fromkeys(meant, 1)
    told = problems_of(
        json.dumps(values | {section: values.get(section, {}) | typos} if section else values | typos), folder
    )
    assert len(told) == len(meant)
    for problem in told:
        typo = problem.split(": ")[1].rpartition(".")[2]
        assert problem.endswith(f"; did you mean '{meant[typo]}'?"), problem
        assert ": unknown key; " in problem


_anything = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | _texts,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(_texts, inner, max_size=2),
    max_leaves=5,
)


@given(key=st.sampled_from([*EVERY_KEY, "model", "adapter", "train"]), value=_anything)
@settings(max_examples=400, deadline=None)
def test_whatever_stands_at_a_key_is_read_or_refused_in_plain_words(folder, key, value):
    words = [word for word in ("Input", "pydantic", "validation", "Error") if word not in json.dumps(value)]
    try:
        load(json.dumps(with_value(key, value)), folder)
    except UserError as error:
        for problem in error.problems:
            assert problem.where.startswith(f"{folder}/r.yaml:1: {key}")
            assert "cannot be read" not in problem.message
            assert not any(word in problem.message for word in words)


# --- the schema ---


def test_the_schema_is_closed_and_describes_every_key():
    schema = recipe_schema()
    assert schema["$schema"] == "https://json-schema.org/draft/2020-12/schema"
    assert (schema["required"], schema["additionalProperties"]) == (["version", "name", "model", "data"], False)
    for section, keys in SECTION_KEYS.items():
        part = schema["$defs"][f"{section.title()}Section"] if section else schema
        assert list(part["properties"]) == keys.split()
        assert part["additionalProperties"] is False
        assert part["description"]
        leaves = [leaf for leaf in part["properties"].items() if section or leaf[0] not in SECTION_KEYS]
        assert [key for key, leaf in leaves if not leaf["description"]] == []


def test_the_schema_states_the_defaults_that_are_used(folder):
    schema, used = recipe_schema(), load(MINIMAL, folder, "output.folder='runs/{name}'").settings()
    required = ["model.base", "data.train"]
    for key in EVERY_KEY[3:]:
        section, _, name = key.partition(".")
        leaf = schema["$defs"][f"{section.title()}Section"]["properties"][name]
        if key in required:
            assert "default" not in leaf
        elif key != "output.folder":
            assert leaf["default"] == used[key]


def test_a_key_with_an_invisible_character_shows_it(folder):
    path = folder / "nbsp.yaml"
    path.write_text(MINIMAL.replace("version", "\u00a0version", 1), encoding="utf-8")
    with pytest.raises(UserError, match=r"nbsp.yaml:1: \\xa0version: unknown key"):
        load_recipe(path)
