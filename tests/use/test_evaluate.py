"""Facts about evaluation: the loss is that of plain torch, matches are counted right, two targets see one text."""

from __future__ import annotations

import json
import math
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from finetune.data.trace import read_eval_examples
from finetune.errors import UserError
from finetune.use.evaluate import Evaluation, evaluate, evaluation_text
from finetune.use.target import Target, find_target, load_target

from .conftest import ANSWERS, QUESTIONS, save_tiny, tiny_model, write_rows

TRAINING_STEPS = 60


def plain_loss(target: Target, rows_file: str) -> tuple[float, int]:
    """Mean cross entropy by a loop over rows, each alone, over what follows the prompt up to the eos token."""
    assert target.template is not None
    total, count = 0.0, 0
    for line in Path(rows_file).read_text().splitlines():
        row = json.loads(line)
        before = (
            "Be brief." if target.system else ""
        ) + f"\n\n### Instruction:\n{row['instruction']}\n\n### Response:\n"
        prompt_text, whole = "<s>" + before, "<s>" + before + row["output"] + "</s>"
        encoding = target.base.tokenizer.encode(whole, add_special_tokens=False)
        first = next(index for index, (_, end) in enumerate(encoding.offsets) if end > len(prompt_text))
        ids = torch.tensor(encoding.ids, device=target.device)
        with torch.no_grad():
            log_probs_TV = target.model(input_ids=ids[None]).logits[0].double().log_softmax(-1)
        total -= log_probs_TV[first - 1 : -1].gather(1, ids[first:, None]).sum().item()
        count += len(ids) - first
    return total / count, count


@pytest.fixture(scope="module")
def taught(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The tiny base after it learned the answers by heart (template none)."""
    folder = tmp_path_factory.mktemp("taught")
    model = tiny_model()
    base = find_target("builtin:pocket-llama", template="none")
    assert base.template is not None
    rows = [{"instruction": q, "output": a} for q, a in zip(QUESTIONS, ANSWERS, strict=True)]
    examples = read_eval_examples(write_rows(folder / "rows.jsonl", rows), base.base, base.template)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    for _ in range(TRAINING_STEPS):
        pairs = [(torch.from_numpy(e.example.ids).long(), torch.from_numpy(e.example.labels).long()) for e in examples]
        losses = [model(input_ids=ids[None], labels=labels[None]).loss for ids, labels in pairs]
        optimizer.zero_grad()
        torch.stack(losses).mean().backward()
        optimizer.step()
    return str(save_tiny(folder / "model", model))


def rows_with(tmp_path: Path, answers: list[str]) -> str:
    rows = [{"instruction": q, "output": a} for q, a in zip(QUESTIONS, answers, strict=True)]
    return write_rows(tmp_path / "questions.jsonl", rows)


def test_the_loss_is_that_of_plain_torch(run_folder: Path, rows_file: str) -> None:
    target = load_target(str(run_folder))
    evaluation = evaluate(str(run_folder), data=rows_file, exact_match=False)
    (score,) = evaluation.targets
    loss, count = plain_loss(target, rows_file)
    assert score.supervised_tokens == count
    assert score.loss == pytest.approx(loss, rel=1e-5)
    assert score.perplexity == pytest.approx(math.exp(loss), rel=1e-4)
    assert (score.exact_match, evaluation.rows[0].text) == (None, None)


def test_rows_that_were_learned_by_heart_match_exactly(taught: str, tmp_path: Path) -> None:
    (score,) = evaluate(taught, data=rows_with(tmp_path, ANSWERS), template="none").targets
    figures = score.to_json()
    assert (figures["exact_match"], figures["begins_correctly"], figures["stopped"]) == (1.0, 1.0, 1.0)
    assert [row.text for row in score.rows] == ANSWERS
    assert figures["loss"] < 0.1


def test_only_the_whole_answer_is_a_match(taught: str, tmp_path: Path) -> None:
    # Another answer, the beginning of one, one with spaces around, and one with é as two characters.
    answers = ["water", "trou", "  yes yes ", ANSWERS[3].replace("é", "e\u0301"), *ANSWERS[4:]]
    evaluation = evaluate(taught, data=rows_with(tmp_path, answers), template="none")
    assert [row.correct for row in evaluation.rows] == [False, False, True, True, True, True]
    assert [row.begins_correctly for row in evaluation.rows] == [False, True, True, True, True, True]
    assert evaluation.targets[0].to_json()["exact_match"] == pytest.approx(4 / 6)


def test_an_answer_that_is_cut_is_no_match(taught: str, tmp_path: Path) -> None:
    (score,) = evaluate(taught, data=rows_with(tmp_path, ANSWERS), template="none", max_new_tokens=1).targets
    assert score.to_json()["stopped"] == 0.0
    assert score.exact_match is not None
    assert score.exact_match < 1


def test_a_target_against_itself_gives_the_same_figures(run_folder: Path, rows_file: str) -> None:
    first, second = evaluate(str(run_folder), data=rows_file, against=str(run_folder)).to_json()["targets"]
    assert first == second
    assert set(first) >= {"target", "rows", "supervised_tokens", "loss", "perplexity", "exact_match"}


def test_the_base_of_a_run_is_measured_on_the_runs_tokens(run_folder: Path, tiny_folder: Path, rows_file: str) -> None:
    evaluation = evaluate(str(run_folder), data=rows_file, against=str(tiny_folder))
    run, base = evaluation.targets
    assert (run.target, base.target) == (str(run_folder), str(tiny_folder))
    assert [row.prompt for row in run.rows] == [row.prompt for row in base.rows]
    assert run.rows[0].prompt.startswith("<s>Be brief.")
    target = load_target(str(tiny_folder), template="alpaca")
    loss, count = plain_loss(replace(target, system="Be brief."), rows_file)
    assert (base.supervised_tokens, base.loss) == (count, pytest.approx(loss, rel=1e-5))


def test_another_tokenizer_is_refused(tiny_folder: Path, rows_file: str, tmp_path: Path) -> None:
    other = shutil.copytree(tiny_folder, tmp_path / "other")
    tokenizer = json.loads((other / "tokenizer.json").read_text())
    tokenizer["model"]["merges"] = tokenizer["model"]["merges"][:20]
    (other / "tokenizer.json").write_text(json.dumps(tokenizer))
    with pytest.raises(UserError, match="its tokenizer gives .*rows.jsonl:1 other tokens"):
        evaluate(str(tiny_folder), data=rows_file, template="alpaca", against=str(other))


def test_groups_add_up_to_the_whole(tiny_folder: Path, rows_file: str) -> None:
    (score,) = evaluate(str(tiny_folder), data=rows_file, template="none", by="kind", exact_match=False).targets
    groups = score.to_json()["groups"]
    assert {name: group["rows"] for name, group in groups.items()} == {"a": 2, "b": 3, "null": 1}
    of_a = [row for row in score.rows if row.values["kind"] == "a"]
    expected = sum(row.loss_sum for row in of_a) / sum(row.supervised_tokens for row in of_a)
    assert groups["a"]["loss"] == pytest.approx(expected)
    assert "groups" not in evaluate(str(tiny_folder), data=rows_file, template="none", exact_match=False).to_json()


def refusal(*args: str, **kwargs: str) -> str:
    with pytest.raises(UserError) as caught:
        evaluate(*args, **kwargs)  # type: ignore[arg-type]
    return str(caught.value)


def test_what_cannot_be_evaluated_is_refused(tiny_folder: Path, rows_file: str, tmp_path: Path) -> None:
    name = str(tiny_folder)
    assert "with `--template alpaca`" in refusal(name, data=rows_file)
    assert "no such data file" in refusal(name, data=str(tmp_path / "none.jsonl"), template="none")
    message = refusal(name, data=rows_file, template="none", by="sort")
    assert "no row has a column 'sort' to group by; there are: instruction, kind, output" in message
    long = write_rows(tmp_path / "long.jsonl", [{"instruction": "word " * 200, "output": "x"}])
    assert "but only 96 can be read" in refusal(name, data=long, template="none")
    (tmp_path / "empty.jsonl").write_text("")
    assert "holds no rows" in refusal(name, data=str(tmp_path / "empty.jsonl"), template="none")


def test_an_evaluation_is_plain_json(taught: str, tmp_path: Path) -> None:
    evaluation = evaluate(taught, data=rows_with(tmp_path, ANSWERS), template="none")
    assert isinstance(evaluation, Evaluation)
    assert json.loads(json.dumps(evaluation.to_json(), allow_nan=False)) == evaluation.to_json()
    text = evaluation_text(evaluation)
    assert taught in text
    assert "exact match 100.0%" in text
