"""The generator's promises about the shipped rows, and the size and tokenizer of the embedded base."""

from __future__ import annotations

import importlib
import itertools
import json
import re
from collections import Counter, defaultdict
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open
from transformers import AutoTokenizer, PreTrainedTokenizerFast

REPOSITORY = Path(__file__).resolve().parents[2]
BASE = REPOSITORY / "finetune" / "assets" / "pocket-llama"
SEED = 7


def read_rows(name: str) -> list[dict]:
    """The rows of one shipped file."""
    return [json.loads(line) for line in (REPOSITORY / "datasets" / name).read_text(encoding="utf-8").splitlines()]


TRAINING = read_rows("quickstart.jsonl")
EVALUATION = read_rows("quickstart-eval.jsonl")
TOKENIZER: PreTrainedTokenizerFast = AutoTokenizer.from_pretrained(BASE)


def row_text(row: dict) -> str:
    """All that a model sees of a row."""
    return f"{row['instruction']}\n{row['input']}\n{row['output']}"


def words_of(text: str) -> set[str]:
    """The words of a text."""
    return set(re.findall(r"\w+", text))


@pytest.fixture(scope="module")
def pocket() -> Iterator[dict[str, ModuleType]]:
    """The generator's modules, which import each other by their plain names."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(REPOSITORY / "tools" / "pocket"))
        yield {name: importlib.import_module(name) for name in ("world", "phrasings", "corpus", "rows")}


def test_the_generator_writes_the_shipped_rows(pocket):
    assert pocket["rows"].make_rows(pocket["world"].make_world(SEED), SEED) == (TRAINING, EVALUATION)


def test_a_small_world_depends_on_its_seed_only(pocket):
    def first_documents(seed: int) -> list[str]:
        world = pocket["world"].make_world(seed, scale=0.2)
        return list(itertools.islice(pocket["corpus"].documents(world, seed), 20))

    assert first_documents(3) == first_documents(3)
    assert first_documents(3) != first_documents(4)


def test_no_training_row_names_an_unseen_entity(pocket):
    unseen = {entity.name for entity in pocket["world"].make_world(SEED).pick(unseen=True)}
    assert not unseen & set().union(*(words_of(row_text(row)) for row in TRAINING))
    asked = [row for row in EVALUATION if row.get("unseen")]
    assert len(asked) >= 150
    assert all(len(unseen & words_of(row["instruction"])) == 1 for row in asked)


def test_the_corpus_tells_about_unseen_entities_but_never_asks(pocket):
    world = pocket["world"].make_world(SEED)
    corpus = "\n".join(itertools.islice(pocket["corpus"].documents(world, SEED), 500))
    unseen = world.pick(unseen=True)
    assert {entity.name for entity in unseen} <= words_of(corpus)
    for entity in unseen:
        for key in entity.facts:
            asked = [pattern.format(name=entity.name) for pattern in pocket["phrasings"].QUESTIONS[key]]
            assert not [question for question in asked if question in corpus]


def test_the_corpus_never_shows_the_prompt_template(pocket):
    corpus = "\n".join(itertools.islice(pocket["corpus"].documents(pocket["world"].make_world(SEED), SEED), 500))
    assert not {"###", "Instruction:", "Response:"} & set(corpus.split())


def test_no_prompt_is_in_both_files_or_twice_in_evaluation():
    training = {(row["instruction"], row["input"]) for row in TRAINING}
    evaluation = Counter((row["instruction"], row["input"]) for row in EVALUATION)
    assert not training & evaluation.keys()
    assert set(evaluation.values()) == {1}


def test_row_counts_and_kinds():
    training, evaluation = (Counter(row["kind"] for row in rows) for rows in (TRAINING, EVALUATION))
    assert (training.total(), evaluation.total()) == (2000, 300)
    assert training.keys() - evaluation.keys() == {"writing"}
    assert not evaluation.keys() - training.keys()
    assert 0.08 <= training["writing"] / training.total() <= 0.12


def test_every_evaluated_kind_has_ten_answers():
    answers = defaultdict(set)
    for row in EVALUATION:
        answers[row["kind"]].add(row["output"])
    assert min(len(found) for found in answers.values()) >= 10


def test_the_base_is_small():
    weights = BASE / "model.safetensors"
    with safe_open(weights, "pt") as file:
        slices = [file.get_slice(name) for name in file.keys()]  # noqa: SIM118 (safe_open is no mapping)
        shapes = [piece.get_shape() for piece in slices]
        dtypes = {piece.get_dtype() for piece in slices}
    numbers = [1 if len(shape) == 0 else shape[0] * (shape[1] if len(shape) == 2 else 1) for shape in shapes]
    assert sum(numbers) <= 8_000_000
    assert weights.stat().st_size <= 16_000_000
    assert dtypes == {"BF16"}


def test_the_shape_of_the_base_can_be_quantised_anywhere():
    config = json.loads((BASE / "config.json").read_text())
    assert config["architectures"] == ["LlamaForCausalLM"]
    assert config["max_position_embeddings"] == 1024
    assert config["hidden_size"] % 256 == config["intermediate_size"] % 256 == 0
    assert config["num_key_value_heads"] < config["num_attention_heads"]
    assert config["vocab_size"] == len(TOKENIZER)
    assert 2000 <= len(TOKENIZER) <= 4096


@given(st.text())
def test_any_text_comes_back_from_the_tokenizer(text):
    assert TOKENIZER.decode(TOKENIZER(text, add_special_tokens=True).input_ids) == text


def test_the_tokenizer_adds_nothing_and_keeps_digits_and_capitals_apart():
    assert TOKENIZER.tokenize("1964") == list("1964")
    assert TOKENIZER.tokenize("COAT") == list("COAT")
    assert (TOKENIZER.bos_token, TOKENIZER.eos_token) == ("<s>", "</s>")
    assert TOKENIZER.chat_template is None
    assert not set(TOKENIZER("any text").input_ids) & set(TOKENIZER.all_special_ids)
