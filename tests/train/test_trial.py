"""What is tried before the first step: it finds what would fail later, and leaves no bit behind."""

from __future__ import annotations

import errno
import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoTokenizer

from finetune import machine
from finetune.errors import ProofError, StorageError, UserError
from finetune.model import adapter as adapter_file
from finetune.run import run
from finetune.train import trainer as trainer_file
from finetune.train import trial
from finetune.train.loss import lay_end_to_end
from finetune.train.trainer import StepTrainer
from tests.conftest import alpaca_rows, write_recipe

CASES: dict[str, dict[str, Any]] = {
    "lora with dropout": {"adapter__dropout": 0.1, "train__warmup": 0},
    "nf4 and 8-bit adam": {"model__quantization": "nf4", "train__optimizer": "adamw-8bit", "adapter__rank": 64},
    "dora in bfloat16": {"adapter__method": "dora", "model__dtype": "bfloat16", "adapter__dropout": 0.1},
    "trained embeddings": {"adapter__also_train": ["embed_tokens"]},
}
MORE = {"data__eval": 3, "evaluate__every_steps": 2, "output__save_every_steps": 2}


def kept_files(run_folder: Path) -> dict[str, bytes]:
    """Weights, states, random numbers and losses of every checkpoint and of the end."""
    names = [*run_folder.glob("checkpoints/*/*.safetensors"), *run_folder.glob("checkpoints/*/random-*.json")]
    names += [run_folder / "adapter" / "adapter_model.safetensors", run_folder / "metrics.jsonl"]
    assert len(names) == 8
    return {str(path.relative_to(run_folder)): path.read_bytes() for path in names}


@pytest.mark.parametrize("case", CASES)
def test_the_run_after_a_trial_is_the_run_without_one(
    tiny_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, case: str, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = write_recipe(tmp_path, tiny_base, alpaca_rows(14), **MORE, **CASES[case])
    tried = run(recipe, out=tmp_path / "tried").path
    assert capsys.readouterr().err.count("tried a step with ") == 1
    monkeypatch.setattr(trial, "try_step", lambda *_, **__: None)
    plain = run(recipe, out=tmp_path / "plain").path
    assert "tried a step" not in capsys.readouterr().err
    assert kept_files(tried) == kept_files(plain)
    assert [path.name for path in sorted((tried / "checkpoints").iterdir())] == ["step-000002", "step-000004"]


def test_a_run_that_goes_on_is_not_tried_again(
    tiny_base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = write_recipe(tmp_path, tiny_base, alpaca_rows(8), train__max_steps=1)
    run(recipe)
    run(recipe, ["train.max_steps=2"], resume=True)
    assert capsys.readouterr().err.count("tried a step with ") == 1


@given(
    tokens=st.lists(st.integers(1, 30), min_size=1, max_size=7),
    batch_size=st.integers(1, 4),
    room=st.integers(1, 60),
)
def test_the_longest_example_is_tried_with_what_fits_beside_it(tokens: list[int], batch_size: int, room: int) -> None:
    examples = [_example(np.arange(count)) for count in tokens]
    chosen = trial.fullest_step(examples, batch_size=batch_size, tokens=room)
    sizes = [tokens[index] for index in chosen]
    assert len(set(chosen)) == len(chosen) <= batch_size
    assert sizes[0] == max(tokens)
    assert len(sizes) == 1 or sum(sizes) <= room
    # No single example more would fit, of those as long as a batch's longest.
    longest = sorted(tokens, reverse=True)[:batch_size]
    left = sorted((np.array(longest)).tolist())
    for size in sizes:
        left.remove(size)
    assert all(sum(sizes) + size > room for size in left)


def test_what_is_tried_holds_the_longest_rows(tiny_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    widths: list[list[int]] = []
    monkeypatch.setattr(
        trainer_file,
        "lay_end_to_end",
        lambda examples, **more: (
            widths.append([example.tokens for example in examples]),
            lay_end_to_end(examples, **more),
        )[1],
    )
    run(write_recipe(tmp_path, tiny_base, alpaca_rows(30), train__max_steps=8, train__tokens_per_pass=200))
    first, *others = widths
    assert max(first) == max(itertools.chain(*others))
    assert sum(first) <= 200
    assert sum(first) > 150


def test_no_step_returns_memory_that_the_fullest_one_needed(
    tiny_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The process holds 2 GiB after the trial, less after the next steps, 2 again: nothing of that is a hole."""
    held, returned = iter([2.0, 1.2, 1.5, 2.0]), []
    monkeypatch.setattr(machine, "resident_gib", lambda: next(held))
    monkeypatch.setattr(machine, "return_freed_memory", lambda: returned.append(True))
    monkeypatch.setattr(trial, "free_memory", lambda device: None)
    run(write_recipe(tmp_path, tiny_base, alpaca_rows(8), train__max_steps=3, train__batch_size=2))
    assert (next(held, None), returned) == (None, []), "asked once a step, and nothing was returned"


def test_an_adapter_that_nothing_trains_is_named(
    tiny_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As where a layer shares the keys of another: its own are never computed, and nothing says so."""
    from transformers.models.llama.modeling_llama import LlamaAttention

    def without_k(self: Any, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        before = self.k_proj
        if self.layer_idx == 1:
            self.k_proj = before.get_base_layer()
        try:
            return forward(self, hidden_states, *args, **kwargs)
        finally:
            self.k_proj = before

    forward = LlamaAttention.forward
    monkeypatch.setattr(LlamaAttention, "forward", without_k)
    settings = {"train__speedups": "none", "train__recompute": "none"}
    with pytest.raises(UserError) as caught:
        run(write_recipe(tmp_path, tiny_base, alpaca_rows(8), **settings))
    assert "1 modules got an adapter that no gradient reaches" in str(caught.value)
    assert "learn: model.layers.1.self_attn.k_proj; " in str(caught.value)
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


@pytest.mark.parametrize("wrong", [True, False])
def test_an_adapter_that_does_not_start_at_the_base_is_refused(
    tiny_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, wrong: bool
) -> None:
    attach = adapter_file.attach_adapter

    def attach_wrongly(*args: Any, **kwargs: Any) -> Any:
        model = attach(*args, **kwargs)
        next(p for name, p in model.named_parameters() if "lora_B" in name).data += 0.1 if wrong else 1e-9
        return model

    monkeypatch.setattr(adapter_file, "attach_adapter", attach_wrongly)
    recipe = write_recipe(tmp_path, tiny_base, alpaca_rows(8))
    if not wrong:
        run(recipe)
        return
    with pytest.raises(ProofError) as caught:
        run(recipe)
    assert caught.value.code == 6
    assert "the first loss is " in str(caught.value)


def test_a_disk_that_takes_no_checkpoint_is_told_before_the_first_step(
    tiny_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    recipe = write_recipe(tmp_path, tiny_base, alpaca_rows(8))
    with monkeypatch.context() as patch:
        patch.setattr(trainer_file, "save_state", full)
        with pytest.raises(StorageError, match="No space left on device"):
            run(recipe)
    assert not list((tmp_path / "run" / "checkpoints").iterdir())
    run(recipe, resume=True)


def test_a_template_that_the_base_does_not_know_is_told_with_its_figures(
    tiny_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The figures are those of a plain forward pass of the untouched base, example by example."""
    trainers: list[StepTrainer] = []
    init = StepTrainer.__init__
    monkeypatch.setattr(StepTrainer, "__init__", lambda self, **more: (trainers.append(self), init(self, **more))[1])
    monkeypatch.setattr(trial, "MARGIN", -100.0)  # random weights know no template, and no plain text either
    monkeypatch.setattr(trial, "FEWEST_TOKENS", 20)
    recipe = write_recipe(tmp_path, tiny_base, alpaca_rows(40), train__max_steps=1)
    run(recipe)
    (warning,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("warning: ")]
    from transformers import AutoModelForCausalLM

    base = AutoModelForCausalLM.from_pretrained(tiny_base).eval()
    control = set(AutoTokenizer.from_pretrained(tiny_base).all_special_ids)
    rows = [trainers[0].examples[index] for index in range(trial.ROWS)]
    sums, count = {"template": 0.0, "plain": 0.0}, 0
    for row in rows:
        ids = row.ids.tolist()
        targets = [t for t in range(1, len(ids)) if row.learned[t] and ids[t] not in control]
        text = [t for t in range(len(ids)) if t == 0 or ids[t] not in control]
        assert len(text) < len(ids)
        with torch.no_grad():
            logits = base(torch.tensor([ids])).logits[0].log_softmax(-1)
            logits_of_text = base(torch.tensor([[ids[t] for t in text]])).logits[0].log_softmax(-1)
        sums["template"] -= sum(logits[t - 1, ids[t]].item() for t in targets)
        sums["plain"] -= sum(logits_of_text[text.index(t) - 1, ids[t]].item() for t in targets)
        count += len(targets)
    assert f"(loss {sums['template'] / count:.3f})" in warning
    assert f"({sums['plain'] / count:.3f}; {count:,} tokens of {trial.ROWS} rows)" in warning


def test_few_tokens_say_nothing_of_a_template(
    tiny_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(trial, "MARGIN", -100.0)
    run(write_recipe(tmp_path, tiny_base, alpaca_rows(4), train__max_steps=1))
    assert "warning" not in capsys.readouterr().err


def _example(ids: np.ndarray) -> Any:
    from finetune.data.examples import Example

    return Example(ids, np.ones(len(ids), bool), "", 0, 0)


def test_the_comparison_is_of_the_same_answers() -> None:
    """An end-of-turn token is no text that plain text could be asked for."""
    row = _example(np.array([1, 5, 6, 2, 7, 8, 2]))
    control = np.array([1, 2])
    assert trial.without_control_targets(row, control).learned.tolist() == [0, 1, 1, 0, 1, 1, 0]
    plain = trial.without_control_tokens(row, control)
    assert plain.ids.tolist() == [1, 5, 6, 7, 8]
    assert plain.learned.tolist() == [0, 1, 1, 1, 1]
