"""Prompts answered while a run trains: what transformers says with that step's adapter, and nothing else changes."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from finetune.check import check
from finetune.errors import UserError
from finetune.run import run
from finetune.stop import Stopped, StopSignal
from finetune.train.trainer import StepTrainer
from finetune.use import samples as samples_file
from finetune.use.generate import complete, generate
from finetune.use.target import find_target, load_target
from tests.conftest import alpaca_rows, write_recipe
from tests.train.forked import Nursery, weights

OPTIONS: dict[str, Any] = {
    "adapter__dropout": 0.5,
    "data__eval": 2,
    "data__system": "Be brief.",
    "evaluate__every_steps": 2,
    "output__save_every_steps": 2,
    "output__keep_checkpoints": 9,
    "train__max_steps": 5,
    "train__learning_rate": 0.1,
}
PROMPTS = ["Where does the red fox sell pears?", "Count.", "What is </s>?"]
ROWS = [
    {"prompt": "Where does the fox sell pears?"},
    {"instruction": "Count.", "input": "one two", "output": "not asked"},
    {"messages": [{"role": "system", "content": "You count."}, {"role": "user", "content": "One?"}]},
]


class Crash(Exception):
    """The end of a process, without its last words."""


class Trained:
    """A run with prompts and one without."""

    def __init__(self, folder: Path, base: Path) -> None:
        self.recipe = write_recipe(folder, base, alpaca_rows(12), **OPTIONS)
        self.prompts = folder / "prompts.txt"
        self.prompts.write_text("\n\n".join(PROMPTS) + "\n")
        self.base = base
        self.change = [f"evaluate.prompts={self.prompts}"]
        self.without = run(self.recipe).path
        self.path = run(self.recipe, self.change, out=folder / "asked").path
        self.samples = (self.path / "samples.jsonl").read_bytes()


@pytest.fixture(scope="module")
def trained(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Trained:
    return Trained(tmp_path_factory.mktemp("samples"), tiny_base)


def lines_of(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (path / "samples.jsonl").read_text().splitlines()]


def test_the_answers_are_what_transformers_says_with_the_adapter_of_that_step(trained: Trained) -> None:
    lines = lines_of(trained.path)
    assert [(line["step"], line["prompt"]) for line in lines] == [(s, p) for s in (2, 4, 5) for p in PROMPTS]
    assert len({line["answer"] for line in lines}) > 3, "the steps answer differently"
    found = find_target(str(trained.path))
    assert found.template
    tokenizer = found.base.tokenizer
    for step in (2, 4):
        model = AutoModelForCausalLM.from_pretrained(trained.base, dtype=torch.float32)
        model = PeftModel.from_pretrained(model, trained.path / "checkpoints" / f"step-{step:06d}").eval()
        for line in lines:
            if line["step"] != step or "</s>" in line["prompt"]:  # which stands for text there, not for a token
                continue
            turns = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": line["prompt"]}]
            text = found.template.render_prompt([samples_turn(turn) for turn in turns]).text
            ids = torch.tensor([tokenizer.encode(text, add_special_tokens=False).ids])
            said = model.generate(
                input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=128, do_sample=False,
                eos_token_id=list(found.stop_token_ids), pad_token_id=0,
            )[0, ids.shape[1] :].tolist()  # fmt: skip
            stopped = said[-1] in found.stop_token_ids
            said = said[:-1] if stopped else said
            assert line["tokens"] == len(said)
            assert line["stopped"] == ("eos" if stopped else "length")
            assert (
                line["answer"]
                == tokenizer.decode([ids[0, -1].item(), *said], skip_special_tokens=False)[
                    len(tokenizer.decode([ids[0, -1].item()], skip_special_tokens=False)) :
                ]
            )


@pytest.mark.parametrize("options", [["model.quantization=nf4"], ["train.recompute=all", "train.speedups=none"]])
def test_they_are_what_generate_says_whatever_computes_the_passes(
    trained: Trained, tmp_path: Path, options: list[str]
) -> None:
    """Without dropout our own code is in the model; the checkpoint is loaded without it."""
    change = [*trained.change, "adapter.dropout=0", "train.max_steps=2", *options]
    path = run(trained.recipe, change, out=tmp_path / "run").path
    answers = generate(load_target(str(path / "checkpoints" / "step-000002")), PROMPTS, max_new_tokens=128)
    assert [(line["answer"], line["tokens"], line["stopped"]) for line in lines_of(path)] == [
        (answer.text, answer.tokens, answer.stopped) for answer in answers
    ]


def samples_turn(turn: dict[str, str]) -> Any:
    from finetune.data.rows import Turn

    return Turn(turn["role"], turn["content"])


def test_asking_changes_nothing_of_the_training(trained: Trained) -> None:
    assert weights(trained.path) == weights(trained.without)
    assert (trained.path / "metrics.jsonl").read_bytes() == (trained.without / "metrics.jsonl").read_bytes()
    assert not (trained.without / "samples.jsonl").exists()


@pytest.mark.parametrize("step", [3, 4])
def test_a_run_that_crashed_writes_the_same_answers(
    trained: Trained, tmp_path: Path, step: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = StepTrainer.training_step

    def crashing(self: StepTrainer, *args: Any) -> Any:
        if self.state.global_step == step - 1:
            raise Crash
        return original(self, *args)

    change = [*trained.change, "output.save_every_steps=3"]
    with monkeypatch.context() as patch:
        patch.setattr(StepTrainer, "training_step", crashing)
        with pytest.raises(Crash):
            run(trained.recipe, change, out=tmp_path / "run")
    path = run(trained.recipe, change, out=tmp_path / "run", resume=True).path
    assert (path / "samples.jsonl").read_bytes() == trained.samples


@pytest.mark.parametrize("held_out", ["2", "null"])
def test_a_signal_breaks_the_answers_off_and_they_are_made_up_for(
    trained: Trained, tmp_path: Path, held_out: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where nothing else is evaluated; until then, and from then on, it is the undisturbed run."""
    change = [*trained.change, f"data.eval={held_out}", "output.save_every_steps=5"]
    whole = run(trained.recipe, change, out=tmp_path / "whole").path
    stop, calls = StopSignal(), []

    def signalled(*args: Any, advance: Any, **kwargs: Any) -> Any:
        calls.append(1)
        stop.number = 15 if len(calls) == 2 else 0
        return complete(*args, advance=advance, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(samples_file, "complete", signalled)
        with pytest.raises(Stopped):
            run(trained.recipe, change, out=tmp_path / "run", stop=stop)
    assert {line["step"] for line in lines_of(tmp_path / "run")} == {2}
    assert [each.name for each in (tmp_path / "run" / "checkpoints").iterdir()] == ["step-000004"]
    path = run(trained.recipe, change, out=tmp_path / "run", resume=True).path
    assert (path / "samples.jsonl").read_bytes() == (whole / "samples.jsonl").read_bytes()
    assert (path / "metrics.jsonl").read_bytes() == (whole / "metrics.jsonl").read_bytes()
    assert weights(path) == weights(whole)


def test_rows_are_asked_too(trained: Trained, tmp_path: Path) -> None:
    file = tmp_path / "prompts.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    change = [f"evaluate.prompts={file}", "train.max_steps=1"]
    lines = lines_of(run(trained.recipe, change, out=tmp_path / "run").path)
    asked = ["Where does the fox sell pears?", "Count.\n\n### Input:\none two", ROWS[2]["messages"]]
    assert [line["prompt"] for line in lines] == asked


WRONG = {
    "prompts.txt": (b"", "evaluate.prompts: .*prompts.txt holds no prompt"),
    "gone.txt": (None, "evaluate.prompts: .*gone.txt cannot be read"),
    "long.txt": (b"ok\n" + b"word " * 2000, r"long\.txt:2: has \d+ tokens; a prompt needs 1 to"),
    "binary.txt": (b"\xff\xfe\x00", "evaluate.prompts: .*binary.txt cannot be read"),
    "a.jsonl": (b'{"prompt": "a"}\n{"question": "b"}\n{"prompt": ""}\n', r"a\.jsonl:2: columns: prompt, messages or"),
    "b.jsonl": (b'{"prompt": "a"}\n{"prompt": 3}\n', r"b\.jsonl:2: prompt: "),
    "c.jsonl": (b'{"prompt": "a"}\n{"prompt"\n', r"c\.jsonl:2: "),
    "d.jsonl": (b'{"messages": [{"role": "assistant", "content": "a"}]}\n', r"d\.jsonl:1: "),
}


@pytest.mark.parametrize("name", WRONG)
def test_what_cannot_be_asked_is_told_before_anything_is_written(trained: Trained, tmp_path: Path, name: str) -> None:
    content, message = WRONG[name]
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=message):
        run(trained.recipe, [f"evaluate.prompts={tmp_path / name}"], out=tmp_path / "run")
    assert not (tmp_path / "run").exists()
    checked = check(trained.recipe, [f"evaluate.prompts={tmp_path / name}"])
    assert re.search(message, "\n".join(map(str, checked.problems)))


@pytest.mark.soak
def test_the_first_of_two_ranks_answers(trained: Trained, nursery: Nursery, tmp_path: Path) -> None:
    options = ["--set", trained.change[0], "--out", tmp_path / "run"]
    ended = nursery.train_ranks(2, trained.recipe, *options)
    assert [each.code for each in ended] == [0, 0], [each.err for each in ended]
    assert [(line["step"], line["prompt"]) for line in lines_of(tmp_path / "run")] == [
        (step, prompt) for step in (2, 4, 5) for prompt in PROMPTS
    ]
