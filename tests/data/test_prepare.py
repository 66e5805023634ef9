"""Every row is accounted for: trained, held out, dropped with a reason, or refused with its place."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import pytest

from finetune.base import Base
from finetune.data.examples import TracedExample
from finetune.data.prepare import PreparedData, prepare_data, read_data
from finetune.data.rows import REASONS
from finetune.data.template import Template
from finetune.data.trace import find_data_problems, read_eval_examples, trace
from finetune.errors import UserError
from finetune.recipe import DataSection, DropReason, SourceSection
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
    return [int(example.where.rpartition(":")[2]) for example in examples]


@pytest.mark.parametrize("held_out", [None, 0.2, 5])
def test_rows_in_are_trained_and_held_out_and_dropped(pocket: Base, mixed: str, held_out: float | int | None) -> None:
    data = prepare(pocket, train=mixed, eval=held_out, max_tokens=200, too_long="drop", empty_answer="drop")
    assert data.facts.rows_read == 20
    assert data.facts.dropped == {"empty_answer": 1, "too_long": 1}
    assert len(data.train) + len(data.eval) + 2 == 20
    assert sorted(lines(data.train) + lines(data.eval)) == [n for n in range(1, 21) if n - 1 not in (EMPTY, LONG)]
    assert data.facts.train_tokens.tolist() == [example.tokens for example in data.train]
    assert data.facts.eval_tokens.tolist() == [example.tokens for example in data.eval]
    assert data.facts.stop_token_ids == (pocket.tokenizer.token_to_id("</s>"),)


def test_empty_and_long_rows_are_refused_together(pocket: Base, mixed: str) -> None:
    empty, long = problems_of(pocket, train=mixed, max_tokens=200)
    assert empty.startswith(f"{mixed}:{EMPTY + 1}: output: ")
    assert long.startswith(f"{mixed}:{LONG + 1}: row: ")
    assert "tokens, data.max_tokens is 200; raise it, shorten the row, or set data.too_long: drop" in long


def test_problems_of_all_kinds_and_files_are_told_at_once(pocket: Base, mixed: str, tmp_path: Path) -> None:
    bad = tmp_path / "bad.jsonl"
    bad.write_text('{"instruction": "x", "output": "y"}\n{oops\n{"instruction": "x"}\n')
    told = problems_of(pocket, train=(mixed, str(bad)), eval=str(tmp_path / "none.jsonl"), max_tokens=200)
    assert [problem.split(": ")[0] for problem in told] == [
        f"{mixed}:{EMPTY + 1}", f"{mixed}:{LONG + 1}", f"{bad}:2", f"{bad}:3", f"{tmp_path}/none.jsonl"
    ]  # fmt: skip


def test_what_is_wrong_without_a_base_is_found_without_it(mixed: str, tmp_path: Path) -> None:
    section = DataSection(train=mixed, eval=str(tmp_path / "none.jsonl"))
    assert [problem.where for problem in find_data_problems(section)] == [f"{mixed}:4", f"{tmp_path}/none.jsonl"]


def test_a_row_of_exactly_max_tokens_is_kept(pocket: Base, clean: str) -> None:
    longest = int(prepare(pocket, train=clean).facts.train_tokens.max())
    assert len(prepare(pocket, train=clean, max_tokens=longest).train) == 20
    assert problems_of(pocket, train=clean, max_tokens=longest - 1)


def test_nothing_left_is_told_with_the_reasons(pocket: Base, clean: str) -> None:
    told = problems_of(pocket, train=clean, max_tokens=3, too_long="drop")
    assert told == [f"{clean}: no row is left to train on, dropped: 20 too_long"]


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
    assert {example.where.rpartition(":")[0] for example in data.train} == {clean}
    assert {example.where.rpartition(":")[0] for example in data.eval} == {mixed}
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
    with pytest.raises(UserError, match=f"mixed.jsonl:{EMPTY + 1}: output"):
        read_eval_examples(mixed, pocket, alpaca)


# --- copies and leaks ---


def said(*answers: str) -> list[dict]:
    return [{"instruction": "Say it.", "output": answer} for answer in answers]


@pytest.mark.parametrize(
    ("deduplicate", "kept"), [("none", [1, 2, 3, 4, 5]), ("exact", [1, 2, 4, 5]), ("near", [1, 2, 5])]
)
def test_later_copies_are_counted_and_dropped_on_request(
    pocket: Base, tmp_path: Path, deduplicate: str, kept: list[int]
) -> None:
    file = write(tmp_path / "copies.jsonl", said("a pear", "a fig", "a pear", "A  Pear\n", "a pea r"))
    data = prepare(pocket, train=file, deduplicate=deduplicate)
    assert lines(data.train) == kept
    assert data.facts.dropped == ({"duplicate": 5 - len(kept)} if len(kept) < 5 else {})
    if deduplicate == "none":
        assert data.account.duplicates == {"exact": 1, "near": 1}
        assert data.account.first_copies == (
            f"{file}:3 is the same as {file}:1",
            f"{file}:4 is but for case and white space the same as {file}:1",
        )


def test_a_copy_in_another_source_is_one_too(pocket: Base, tmp_path: Path) -> None:
    files = (write(tmp_path / "a.jsonl", said("x", "y")), write(tmp_path / "b.jsonl", said("y", "z")))
    data = prepare(pocket, train=files, deduplicate="exact")
    assert [example.where for example in data.train] == [f"{files[0]}:1", f"{files[0]}:2", f"{files[1]}:2"]
    assert [source.trained for source in data.account.sources] == [2, 1]


def test_leaked_rows_are_counted_dropped_or_refused(pocket: Base, tmp_path: Path) -> None:
    files = {"train": write(tmp_path / "t.jsonl", said("x", "y")), "eval": write(tmp_path / "e.jsonl", said("Y ", "z"))}
    kept = prepare(pocket, **files)
    assert (kept.account.leaked, len(kept.eval), kept.facts.dropped) == (1, 2, {})
    dropped = prepare(pocket, **files, leaked="drop")
    assert (lines(dropped.eval), dropped.facts.dropped) == ([2], {"leaked": 1})
    (told,) = problems_of(pocket, **files, leaked="error")
    assert told.startswith(f"{tmp_path}/e.jsonl:1: row: held out, but a training row says the same")


def test_rows_and_tokens_add_up(pocket: Base, mixed: str, tmp_path: Path) -> None:
    bad = tmp_path / "bad.jsonl"
    bad.write_text('{"instruction": "x", "output": "y"}\n{oops\n{"instruction": "x"}\n[1]\n')
    section = DataSection(train=(mixed, str(bad)), eval=3, max_tokens=100, too_long="truncate", truncate="answer")
    account = read_data(section, pocket, seed=17).account
    assert account.read == 24
    assert account.read == account.trained + account.eval + sum(account.dropped.values()) + sum(
        account.refused.values()
    )
    assert account.refused == {"empty_answer": 1, "invalid_json": 1, "missing_column": 1, "not_an_object": 1}
    assert account.truncated_rows == 1
    whole = read_data(section.model_copy(update={"max_tokens": 5000}), pocket, seed=17).account
    assert account.tokens == whole.tokens  # tokens in = supervised + context + truncated, whatever is cut
    assert sum(count for _, _, count in account.histogram) == account.trained + account.eval


def test_the_first_problems_of_a_kind_are_told_and_all_are_counted(pocket: Base, tmp_path: Path) -> None:
    file = write(tmp_path / "empty.jsonl", said(*["fine"] * 3, *[" "] * 28))
    with pytest.raises(UserError) as caught:
        prepare(pocket, train=file)
    told = [str(problem) for problem in caught.value.problems]
    assert [line.split(": ")[0] for line in told[:5]] == [f"{file}:{n}" for n in range(4, 9)]
    assert told[5] == f"{file}: empty_answer: 23 more rows, 28 in all; to drop them: data.drop: [empty_answer]"
    assert (len(told), caught.value.total) == (6, 28)


@pytest.mark.parametrize("reason", ["empty_answer", "too_long"])
def test_any_reason_can_be_dropped_by_name(pocket: Base, mixed: str, reason: str) -> None:
    account = read_data(DataSection(train=mixed, max_tokens=200, drop=(reason,)), pocket, seed=17).account
    assert account.dropped == {reason: 1}
    assert sum(account.refused.values()) == 1


def test_rows_of_a_source_are_limited_and_renamed(pocket: Base, tmp_path: Path) -> None:
    rows = [{"question": row["instruction"], "reply": row["output"]} for row in said("a", "b", "c")]
    file = write(tmp_path / "renamed.jsonl", rows)
    source = SourceSection(source=file, rows=2, columns={"question": "instruction", "reply": "output"})
    assert lines(prepare(pocket, train=source).train) == [1, 2]


def test_weights_make_the_epoch_longer(pocket: Base, tmp_path: Path) -> None:
    files = (write(tmp_path / "a.jsonl", said("x", "y")), write(tmp_path / "b.jsonl", said("1", "2", "3")))
    sources = tuple(SourceSection(source=file, weight=weight) for file, weight in zip(files, (2.5, 1), strict=True))
    facts = prepare(pocket, train=sources).facts
    assert (facts.source_examples, facts.source_weights) == ((2, 3), (2.5, 1.0))


def test_plain_texts_are_learned_whole_and_closed(pocket: Base, tmp_path: Path) -> None:
    file = tmp_path / "poems.txt"
    file.write_text("A red fox\nsells pears.\n\n\nThe second text.\n")
    data = prepare(pocket, train=str(file))
    assert data.facts.format == "text"
    for example, text in zip(data.train, ("A red fox\nsells pears.", "The second text."), strict=True):
        assert pocket.tokenizer.decode(example.ids.tolist(), skip_special_tokens=False) == f"<s>{text}</s>"
        assert example.supervised_tokens == example.tokens - 1


def test_no_two_sentences_about_reasons_disagree() -> None:
    assert set(get_args(DropReason)) == set(REASONS)


def test_a_place_is_found_however_its_path_is_written(
    pocket: Base, alpaca: Template, clean: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(Path(clean).parent)
    section = DataSection(train="clean.jsonl")
    for place in ("clean.jsonl:3", "./clean.jsonl:3", "x/../clean.jsonl:3", 2):
        traced = trace(section, pocket, alpaca, place)
        assert isinstance(traced, TracedExample)
        assert traced.supervised_text == "answer 2</s>"
