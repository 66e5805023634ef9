"""What `finetune check` proves: an account that adds up, counted anew here, and every problem at once."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from finetune.base import read_base
from finetune.check import check, prove
from finetune.cli_text import check_text
from finetune.data.pool import Examples, Pool
from finetune.data.prepare import PreparedData
from finetune.data.rows import Turn
from finetune.errors import ProofError, UserError
from tests.conftest import CHECKOUT, alpaca_rows, write_recipe

POCKET = "builtin:pocket-llama"
PROOFS = [
    "rows that do not add up",
    "tokens that do not add up",
    "examples without a supervised token",
    "uncut examples that do not end in a stop token",
]
STAGES = ("names", "twin", "train", "resume", "merge", "gguf")
FOUND = "  (done before, nothing it depends on has changed)"


@pytest.fixture
def rows() -> list[dict]:
    """Twenty-two rows: two answers are empty, one row is long, one a copy, and one holds a control token's text."""
    rows = [{**row, "output": f"answer {index}"} for index, row in enumerate(alpaca_rows(21))]
    rows[3]["output"] = rows[8]["output"] = " "
    rows[7]["output"] = "pear " * 1000
    rows[9]["instruction"] = "What is </s>?"
    return [*rows, dict(rows[5])]


DROPPING = {
    "data__max_tokens": 200, "data__too_long": "drop", "data__empty_answer": "drop", "data__deduplicate": "exact",
    "data__eval": 4,
}  # fmt: skip


def finetune(*arguments: object, cache: Path) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"XDG_CACHE_HOME": str(cache)}
    command = [sys.executable, "-m", "finetune", *map(str, arguments)]
    return subprocess.run(command, cwd=CHECKOUT, env=environment, capture_output=True, text=True, check=False)


def test_every_row_and_token_is_accounted_for(tmp_path: Path, rows: list[dict]) -> None:
    checked = check(write_recipe(tmp_path, POCKET, rows, **DROPPING))
    values = checked.to_json()
    dropped = {"empty_answer": 2, "too_long": 1, "duplicate": 1}
    assert values["rows"] == {"read": 22, "trained": 14, "eval": 4, "dropped": dropped, "refused": {}}
    assert values["rows_with_control_texts"] == 1
    # Counted anew from the rows, with the tokenizer itself.
    base, template = read_base(POCKET), checked.data.template if checked.data else None
    assert template is not None
    kept = [row for row in rows[:-1] if row["output"].strip() and len(row["output"]) < 1000]
    total = supervised = 0
    for row in kept:
        user = row["instruction"] + (f"\n\n### Input:\n{row['input']}" if row["input"] else "")
        text = template.text([Turn("user", user), Turn("assistant", row["output"])], add_generation_prompt=False)
        if "</s>?" in text:  # the row's own, tokenised as text: apart from what stands beside it
            before, after = text.split("</s>", 1)
            pieces = [before, "<", "/", "s", ">", after]
        else:
            pieces = [text]
        total += sum(len(base.tokenizer.encode(piece, add_special_tokens=False).ids) for piece in pieces)
        supervised += len(base.tokenizer.encode(row["output"] + "</s>", add_special_tokens=False).ids)
    counts = {"total": total, "supervised": supervised, "context": total - supervised, "truncated": 0}
    assert values["tokens"] == counts
    assert [proof["name"] for proof in values["proofs"]] == PROOFS
    assert all(proof["passed"] and proof["value"] == proof["limit"] == 0 for proof in values["proofs"])
    assert values["problems"] == []
    assert checked.error() is None
    assert sum(count for _, _, count in values["histogram"]) == 18


def test_truncated_tokens_are_counted(tmp_path: Path, rows: list[dict]) -> None:
    settings = {**DROPPING, "data__too_long": "truncate", "data__truncate": "answer"}
    values = check(write_recipe(tmp_path, POCKET, rows, **settings)).to_json()
    assert values["truncated_rows"] == 1
    whole = check(write_recipe(tmp_path, POCKET, rows, **{**settings, "data__max_tokens": 2000})).to_json()
    assert values["tokens"]["truncated"] > 0
    assert values["tokens"]["total"] == whole["tokens"]["total"]
    assert all(proof["passed"] for proof in values["proofs"])


def test_the_first_token_of_a_text_is_predicted_from_nothing(tmp_path: Path) -> None:
    values = check(write_recipe(tmp_path, POCKET, alpaca_rows(5), data__loss_on="everything")).to_json()
    assert values["tokens"]["context"] == 5
    assert all(proof["passed"] for proof in values["proofs"])


def test_packing_is_the_share_of_the_passes_that_holds_tokens(tmp_path: Path, rows: list[dict]) -> None:
    settings = {**DROPPING, "train__max_steps": 100, "train__tokens_per_pass": 220, "data__eval": None}
    checked = check(write_recipe(tmp_path, POCKET, rows, **settings))
    assert checked.packing is not None
    passes = round(checked.packing.passes_per_step * 5)  # eighteen rows are five steps of four
    assert checked.packing.share == pytest.approx(checked.to_json()["tokens"]["total"] / (passes * 220))
    assert passes > 5
    assert 0.4 < checked.packing.share <= 1


@pytest.mark.parametrize(("only", "known"), [("recipe", False), ("data", True), (None, True)])
def test_only_what_is_asked_for_is_checked(tmp_path: Path, rows: list[dict], only: str | None, known: bool) -> None:
    base = tmp_path / "no-base" if only == "recipe" else POCKET
    wrong_target = {"adapter__targets": ["query"]} if only == "data" else {}  # a matter of the plan
    checked = check(write_recipe(tmp_path, base, rows, **DROPPING, **wrong_target), only=only)
    assert checked.problems == ()
    assert (checked.to_json()["rows"] is not None) is known
    assert (checked.plan is not None) is (only is None)


def test_another_part_is_refused(tmp_path: Path, rows: list[dict]) -> None:
    with pytest.raises(UserError, match="--only: 'rows' is not possible; write recipe, data or rehearsal"):
        check(write_recipe(tmp_path, POCKET, rows), only="rows")


def test_problems_of_rows_and_plan_are_told_at_once(tmp_path: Path, rows: list[dict]) -> None:
    recipe = write_recipe(tmp_path, POCKET, rows, data__max_tokens=200, adapter__targets=["query"])
    error = check(recipe).error()
    assert isinstance(error, UserError)
    told = [problem.where for problem in error.problems]
    assert {f"{tmp_path}/rows.jsonl:{line}" for line in (4, 8, 9)} | {"adapter.targets"} == set(told)
    assert error.total == 4
    assert error.answer["rows"] == {
        "read": 22, "trained": 19, "eval": 0, "dropped": {}, "refused": {"empty_answer": 2, "too_long": 1}
    }  # fmt: skip


def test_a_missing_base_does_not_hide_wrong_rows(tmp_path: Path, rows: list[dict]) -> None:
    error = check(write_recipe(tmp_path, tmp_path / "none", rows)).error()
    assert error is not None
    assert [problem.where for problem in error.problems] == [
        str(tmp_path / "none"), f"{tmp_path}/rows.jsonl:4", f"{tmp_path}/rows.jsonl:9"
    ]  # fmt: skip
    assert error.answer["rows"] is None


def with_arrays(data: PreparedData, **arrays: np.ndarray) -> PreparedData:
    """The same data with other stored arrays."""
    (store,) = data.train.pool.stores
    pool = Pool((replace(store, arrays={**store.arrays, **arrays}),))
    return replace(data, train=Examples(pool, data.train.chosen), eval=Examples(pool, data.eval.chosen))


def test_each_proof_sees_what_it_is_for(tmp_path: Path, rows: list[dict]) -> None:
    checked = check(write_recipe(tmp_path, POCKET, rows, **DROPPING))
    data = checked.data
    assert data is not None
    (store,) = data.train.pool.stores
    first = int(data.train.chosen[2])
    start, end = store.starts[first : first + 2]
    learned, ids = np.array(store.arrays["learned"]), np.array(store.arrays["ids"])
    learned[start:end] = False
    ids[end - 1] = ids[end - 2]
    count = int(store.arrays["supervised_tokens"][first])
    early = np.array(store.arrays["learned"])
    early[end - 1] = False
    broken: dict[str, tuple[PreparedData, list[int]]] = {
        "a row too many": (
            replace(data, account=replace(data.account, trained=data.account.trained + 1)),
            [1, 0, 0, 0],
        ),
        "a row too few": (replace(data, account=replace(data.account, dropped={})), [4, 0, 0, 0]),
        "a label lost": (with_arrays(data, learned=early), [0, 2, 0, 1]),
        "no label": (with_arrays(data, learned=learned), [0, 2 * count, 1, 1]),
        "no end": (with_arrays(data, ids=ids), [0, 0, 0, 1]),
    }
    for name, (wrong, values) in broken.items():
        assert [proof.value for proof in prove(wrong)] == values, name
        error = replace(checked, proofs=tuple(prove(wrong))).error()
        assert isinstance(error, ProofError), name
        assert error.code == 6


def test_the_account_is_told_to_people(tmp_path: Path, rows: list[dict]) -> None:
    values: dict[str, Any] = check(write_recipe(tmp_path, POCKET, rows, **DROPPING)).to_json()
    text = check_text(values, colour=False)
    assert "22 = 14 trained + 4 held out + 4 dropped + 0 refused" in text
    assert "2 empty_answer, 1 too_long, 1 duplicate" in text
    assert f"{values['tokens']['supervised']:,} supervised" in text
    assert "rows with text that looks like a control token, kept as ordinary text: 1\n" in text
    assert text.count("\n  ok   ") == 4
    assert "\x1b" not in text
    bars = [line.count("\u2588") for line in text.splitlines() if " - " in line]
    counts = [count for _, _, count in values["histogram"]]
    counts = counts[next(at for at, count in enumerate(counts) if count) :]  # the empty beginning is left out
    assert len(bars) == len(counts)
    assert np.argmax(bars) == np.argmax(counts)
    assert max(bars) == 40


def test_a_failing_check_still_prints_what_it_knows(tmp_path: Path, rows: list[dict]) -> None:
    recipe = write_recipe(tmp_path, POCKET, rows, data__empty_answer="drop", data__max_tokens=200)
    done = finetune("check", recipe, "--json", cache=tmp_path / "cache")
    assert done.returncode == 2
    values = json.loads(done.stdout)
    assert values["rows"]["refused"] == {"too_long": 1}
    assert values["error"]["code"] == 2
    assert values["problems"] == values["error"]["problems"]
    assert [problem["where"] for problem in values["problems"]] == [f"{tmp_path}/rows.jsonl:8"]
    assert done.stderr.startswith(f"{tmp_path}/rows.jsonl:8: row: ")
    told = finetune("check", recipe, cache=tmp_path / "cache")
    assert told.returncode == 2
    assert told.stdout.startswith("Rows and tokens\n")
    assert told.stderr == done.stderr


def test_a_second_check_loads_no_heavy_library(tmp_path: Path, rows: list[dict]) -> None:
    """The first one rehearses in a process of its own; the second finds rows and rehearsal in the cache."""
    recipe = write_recipe(tmp_path, POCKET, rows, **DROPPING)
    code = (
        "import sys; from finetune.cli import main\n"
        f"sys.argv = ['finetune', 'check', {str(recipe)!r}]\n"
        "try: main()\n"
        "except SystemExit as end: assert not end.code, end.code\n"
        "print(sorted({'torch', 'transformers', 'rich', 'tokenizers'} & set(sys.modules)), file=sys.stderr)"
    )
    environment = os.environ | {"XDG_CACHE_HOME": str(tmp_path / "cache")}
    runs = [
        subprocess.run(
            [sys.executable, "-c", code], cwd=CHECKOUT, env=environment, capture_output=True, text=True, check=True
        )
        for _ in range(2)
    ]
    assert [run.stderr.splitlines()[-1] for run in runs] == ["['tokenizers']", "[]"]
    told = [line.partition(" (")[0] for line in runs[0].stderr.splitlines()[:-1]]
    assert told == [f"rehearsal on a twin: {stage}" for stage in STAGES]
    first, second = (run.stdout.splitlines() for run in runs)
    rehearsed = first.index("Rehearsal on a twin") + 1
    assert first[rehearsed].startswith("  done: names ")
    assert second[rehearsed] == first[rehearsed].replace("done:", "found:") + FOUND
    assert first[:rehearsed] + first[rehearsed + 1 :] == second[:rehearsed] + second[rehearsed + 1 :]
    assert re.fullmatch(r"  ok   \d\d proofs of the rehearsal \(each with --json\)", first[-1])


def test_control_tokens_are_known_without_the_tokenizer() -> None:
    base = read_base(POCKET)
    added = base.tokenizer.get_added_tokens_decoder()
    assert base.special_tokens == {token.content: number for number, token in added.items() if token.special}
