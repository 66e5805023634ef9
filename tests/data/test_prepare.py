"""Every row is accounted for: trained, held out, dropped with a reason, or refused with its place."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from finetune.base import Base
from finetune.data.prepare import PreparedData, find_data_problems, prepare_data, read_eval_examples
from finetune.data.show import find_example, row_text
from finetune.data.template import Template
from finetune.errors import UserError
from finetune.recipe import DataSection
from tests.conftest import alpaca_rows

EMPTY, LONG = 3, 7  # rows of `mixed`


@pytest.fixture
def mixed(tmp_path: Path) -> str:
    """Twenty rows, one without an answer, one of about a thousand tokens."""
    rows = alpaca_rows(20)
    rows = [{**row, "output": f"answer {index}"} for index, row in enumerate(rows)]
    rows[EMPTY]["output"] = " \n"
    rows[LONG]["output"] = "pear " * 1000
    return write(tmp_path / "mixed.jsonl", rows)


@pytest.fixture
def clean(tmp_path: Path) -> str:
    return write(tmp_path / "clean.jsonl", [{**row, "output": f"answer {i}"} for i, row in enumerate(alpaca_rows(20))])


def write(file: Path, rows: list[dict]) -> str:
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(file)


def prepare(base: Base, seed: int = 17, **section: Any) -> PreparedData:
    return prepare_data(DataSection(**section), base, seed=seed)


def problems_of(base: Base, **section: Any) -> list[str]:
    with pytest.raises(UserError) as caught:
        prepare(base, **section)
    return [str(problem) for problem in caught.value.problems]


def lines(examples: list) -> list[int]:
    return [example.row.line for example in examples]


@pytest.mark.parametrize("held_out", [None, 0.2, 5])
def test_rows_in_are_trained_and_held_out_and_dropped(pocket: Base, mixed: str, held_out: float | int | None) -> None:
    data = prepare(pocket, train=mixed, eval=held_out, max_tokens=200, too_long="drop", empty_answer="drop")
    assert data.facts.rows_read == 20
    assert data.facts.dropped == {"empty answer": 1, "too long": 1}
    assert len(data.train) + len(data.eval) + 2 == 20
    assert sorted(lines(data.train) + lines(data.eval)) == [n for n in range(1, 21) if n - 1 not in (EMPTY, LONG)]
    assert data.facts.train_tokens == tuple(example.tokens for example in data.train)
    assert data.facts.eval_tokens == tuple(example.tokens for example in data.eval)
    assert data.facts.stop_token_ids == (pocket.tokenizer.token_to_id("</s>"),)


def test_empty_and_long_rows_are_refused_together(pocket: Base, mixed: str) -> None:
    long, empty = sorted(problems_of(pocket, train=mixed, max_tokens=200), key=len, reverse=True)
    assert empty == f"{mixed}:{EMPTY + 1}: the answer is empty; write one, or set data.empty_answer: drop"
    assert long.startswith(f"{mixed}:{LONG + 1}: ")
    assert long.endswith("tokens, data.max_tokens is 200; raise it, shorten the row, or set data.too_long: drop")


def test_problems_of_all_kinds_and_files_are_told_at_once(pocket: Base, mixed: str, tmp_path: Path) -> None:
    bad = tmp_path / "bad.jsonl"
    bad.write_text('{"instruction": "x", "output": "y"}\n{oops\n{"instruction": "x"}\n')
    told = problems_of(pocket, train=(mixed, str(bad)), eval=str(tmp_path / "none.jsonl"), max_tokens=200)
    assert [problem.split(": ")[0] for problem in told] == [
        f"{bad}:2", f"{bad}:3", f"{mixed}:{EMPTY + 1}", f"{mixed}:{LONG + 1}", f"{tmp_path}/none.jsonl"
    ]  # fmt: skip


def test_what_is_wrong_without_a_base_is_found_without_it(mixed: str, tmp_path: Path) -> None:
    section = DataSection(train=mixed, eval=str(tmp_path / "none.jsonl"))
    assert [problem.where for problem in find_data_problems(section)] == [f"{mixed}:4", f"{tmp_path}/none.jsonl"]


def test_a_row_of_exactly_max_tokens_is_kept(pocket: Base, clean: str) -> None:
    longest = max(prepare(pocket, train=clean).facts.train_tokens)
    assert len(prepare(pocket, train=clean, max_tokens=longest).train) == 20
    assert problems_of(pocket, train=clean, max_tokens=longest - 1)


def test_nothing_left_is_told_with_the_reasons(pocket: Base, clean: str) -> None:
    told = problems_of(pocket, train=clean, max_tokens=3, too_long="drop")
    assert told == [f"{clean}: none of its 20 rows is left, dropped: 20 too long"]


@pytest.mark.parametrize(("share", "count"), [(0.25, 5), (0.01, 1), (7, 7), (19, 19)])
def test_held_out_rows_are_drawn_by_the_seed(pocket: Base, clean: str, share: float | int, count: int) -> None:
    first, again, other = (prepare(pocket, seed=seed, train=clean, eval=share) for seed in (1, 1, 2))
    assert len(first.eval) == count
    assert not set(lines(first.train)) & set(lines(first.eval))
    assert sorted(lines(first.train) + lines(first.eval)) == list(range(1, 21))
    assert (lines(first.train), lines(first.eval)) == (lines(again.train), lines(again.eval))
    assert lines(first.eval) != lines(other.eval)
    assert lines(first.eval) == sorted(lines(first.eval))


def test_a_file_of_its_own_is_held_out_whole(pocket: Base, clean: str, mixed: str) -> None:
    data = prepare(pocket, train=clean, eval=mixed, max_tokens=2000, empty_answer="drop")
    assert {example.row.file for example in data.train} == {clean}
    assert {example.row.file for example in data.eval} == {mixed}
    assert data.facts.rows_read == len(data.train) + len(data.eval) + 1 == 40


@pytest.mark.parametrize("count", [20, 21])
def test_holding_out_everything_is_refused(pocket: Base, clean: str, count: int) -> None:
    told = problems_of(pocket, train=clean, eval=count)
    assert told == [f"data.eval: {count} rows are to be held out of 20; at least one must be left to train on"]


def test_a_tokenizer_of_another_base_is_refused(pocket: Base, clean: str) -> None:
    small = replace(pocket, facts=replace(pocket.facts, vocabulary=300))
    (told,) = problems_of(small, train=clean)
    assert "the base has 300 embeddings; give the base the tokenizer it was trained with" in told


def test_evaluation_reads_every_row_or_says_why_not(pocket: Base, alpaca: Template, clean: str, mixed: str) -> None:
    assert len(read_eval_examples(clean, pocket, alpaca)) == 20
    with pytest.raises(UserError, match=f"mixed.jsonl:{EMPTY + 1}: the answer is empty"):
        read_eval_examples(mixed, pocket, alpaca)


# --- finetune show ---


def test_a_row_is_counted_as_it_was_read(pocket: Base, mixed: str) -> None:
    data = prepare(pocket, train=mixed, eval=0.5, max_tokens=200, too_long="drop", empty_answer="drop")
    for number in set(range(20)) - {EMPTY, LONG}:
        shown = find_example(data, str(number)).to_json()
        assert shown["source"] == f"{mixed}:{number + 1}"
        assert shown["supervised_text"] == f"answer {number}</s>"
        assert shown == find_example(data, f"{mixed}:{number + 1}").to_json()


def test_a_row_of_the_other_split_or_of_none_is_told(pocket: Base, mixed: str) -> None:
    data = prepare(pocket, train=mixed, eval=0.5, max_tokens=200, too_long="drop", empty_answer="drop")
    held, trained = data.eval[0].row, data.train[0].row
    for row, split, told in [
        (str(held.line - 1), "train", f"--row: {held.where} is in the other split; write --split eval"),
        (trained.where, "eval", f"--row: {trained.where} is in the other split; write --split train"),
        (str(EMPTY), None, f"--row: {mixed}:{EMPTY + 1} was dropped: empty answer"),
        (str(LONG), None, f"--row: {mixed}:{LONG + 1} was dropped: too long"),
        ("20", None, f"--row: 20 is too large; {mixed} has 20 rows, counted from 0"),
        ("x:1", None, f"--row: no row stands at x:1; rows stand from {mixed}:1 to {mixed}:20"),
        ("-1", None, f"--row: no row stands at -1; rows stand from {mixed}:1 to {mixed}:20"),
        ("0", "test", "--split: 'test' is not possible; write train or eval"),
    ]:
        with pytest.raises(UserError) as caught:
            find_example(data, row, split=split)
        assert str(caught.value) == told


def test_rows_of_an_evaluation_file_are_counted_on_their_own(pocket: Base, clean: str, mixed: str) -> None:
    data = prepare(pocket, train=clean, eval=mixed, max_tokens=2000, empty_answer="drop")
    assert find_example(data, "4", split="eval").example.row.where == f"{mixed}:5"
    assert find_example(data, "4").example.row.where == f"{clean}:5"


def test_learned_text_is_marked_for_people(pocket: Base, clean: str) -> None:
    shown = find_example(prepare(pocket, train=clean), "2")
    plain = row_text(shown, colour=False)
    assert "### Response:\n[[answer 2</s>]]\n" in plain
    assert plain.endswith(f"{clean}:3: {shown.example.tokens} tokens, {shown.example.supervised_tokens} supervised")
    assert "\x1b[32manswer 2</s>\x1b[0m" in row_text(shown, colour=True)
