"""What training promises, each checked against torch written out or against a run that did it differently."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from transformers import AutoModelForCausalLM

from finetune.data.examples import Example
from finetune.errors import NumericsError, UserError
from finetune.layout import Mixture, lay_out_steps
from finetune.model.adapter import attach_adapter
from finetune.model.load import load_base, load_tokenizer
from finetune.resolve import Resolved, resolve
from finetune.run import run
from finetune.train import trainer as trainer_file
from finetune.train.held_out import sum_losses
from finetune.train.loss import lay_end_to_end, stretch_losses_S
from finetune.train.trainer import make_trainer
from finetune.train.watch import read_metrics
from tests.conftest import alpaca_rows, write_recipe


def losses_of(folder: Path) -> list[float]:
    return [entry["loss"] for entry in read_metrics(folder / "metrics.jsonl") if "loss" in entry]


def plain_loss(model: torch.nn.Module, examples: list[Example]) -> torch.Tensor:
    """The mean over all supervised tokens, one example at a time, full logits: the reference."""
    total, count = torch.zeros(()), 0
    for example in examples:
        logits = model(input_ids=torch.tensor([example.ids.tolist()])).logits[0, :-1].float()
        labels = torch.tensor(example.labels[1:].tolist())
        total = total + F.cross_entropy(logits, labels, ignore_index=-100, reduction="sum")
        count += int((labels != -100).sum())
    return total / count


def load(resolved: Resolved) -> torch.nn.Module:
    return attach_adapter(load_base(resolved.plan.model), resolved.plan.adapter, base="x")


@pytest.mark.parametrize(("dtype", "bound"), [("float32", 1e-5), ("bfloat16", 1e-3)])
def test_the_first_loss_is_the_bases(tiny_base: Path, tmp_path: Path, dtype: str, bound: float) -> None:
    path = write_recipe(tmp_path, tiny_base, alpaca_rows(12), model__dtype=dtype)
    resolved = resolve(path)
    folder = run(path)
    steps = lay_out_steps(Mixture((12,), (1.0,)), batch_size=4, steps=4, seed=17)
    first = [resolved.data.train[index] for index in steps[0]]
    base = AutoModelForCausalLM.from_pretrained(tiny_base, dtype=getattr(torch, dtype))
    with torch.no_grad():
        assert losses_of(folder.path)[0] == pytest.approx(plain_loss(base, first).item(), abs=bound)


def test_one_step_is_the_reference_step(tiny_base: Path, tmp_path: Path) -> None:
    """Ten lines of torch: mean over the step's supervised tokens, clip, AdamW; ours in two passes, unequal masks."""
    settings = {"train__max_steps": 1, "train__tokens_per_pass": 110, "train__warmup": 0}
    resolved = resolve(write_recipe(tmp_path, tiny_base, alpaca_rows(4), **settings))
    assert resolved.plan.passes_per_step >= 2
    reference = load(resolved)
    optimizer = torch.optim.AdamW(
        [p for p in reference.parameters() if p.requires_grad], lr=1e-2, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0
    )
    plain_loss(reference, resolved.data.train).backward()
    torch.nn.utils.clip_grad_norm_([p for p in reference.parameters() if p.requires_grad], 1.0)
    optimizer.step()

    ours = load(resolved)
    trainer = make_trainer(
        resolved.plan.train, model=ours, tokenizer=load_tokenizer(tiny_base), examples=resolved.data.train, held_out=[],
        folder=tmp_path / "t",
    )  # fmt: skip
    trainer.train()
    ours_now = {name: p for name, p in ours.named_parameters() if p.requires_grad}
    for name, parameter in reference.named_parameters():
        if parameter.requires_grad:
            torch.testing.assert_close(ours_now[name], parameter, rtol=1e-4, atol=1e-6)
    assert any("lora_B" in name and p.abs().max() > 0 for name, p in ours_now.items())


def test_layout_changes_nothing_but_speed(tiny_base: Path, tmp_path: Path) -> None:
    rows = alpaca_rows(16)
    whole = run(write_recipe(tmp_path / "a", tiny_base, rows, train__tokens_per_pass=2000))
    cut = run(write_recipe(tmp_path / "b", tiny_base, rows, train__tokens_per_pass=100))
    assert losses_of(cut.path) == pytest.approx(losses_of(whole.path), rel=1e-4)


def test_documents_do_not_see_each_other(tiny_base: Path, tmp_path: Path) -> None:
    resolved = resolve(write_recipe(tmp_path, tiny_base, alpaca_rows(6)))
    model = load_base(resolved.plan.model)
    examples = resolved.data.train
    with torch.no_grad():
        together = stretch_losses_S(model, lay_end_to_end(examples))
        alone = torch.cat([stretch_losses_S(model, lay_end_to_end([example])) for example in examples])
        joined = lay_end_to_end(examples)
        mixed = stretch_losses_S(model, type(joined)(**{**vars(joined), "document_lengths": [joined.tokens]}))
    torch.testing.assert_close(together, alone, rtol=1e-5, atol=1e-5)
    assert (mixed - alone).abs().max() > 1e-2, "one document for all must be seen by this test"


def test_the_base_is_bit_identical_after_training(tiny_base: Path, tmp_path: Path) -> None:
    resolved = resolve(write_recipe(tmp_path, tiny_base, alpaca_rows(8), model__quantization="nf4"))
    model = load(resolved)
    # By name, not by requires_grad: a base weight that is trained by mistake must be among them.
    frozen = {name: p.detach().clone() for name, p in model.named_parameters() if "lora_" not in name}
    trainer = make_trainer(
        resolved.plan.train, model=model, tokenizer=load_tokenizer(tiny_base), examples=resolved.data.train,
        held_out=resolved.data.train[:2], folder=tmp_path / "t",
    )  # fmt: skip
    trainer.train()
    after = dict(model.named_parameters())
    assert len(frozen) > 10
    assert all(torch.equal(after[name], value) for name, value in frozen.items())


@pytest.mark.parametrize("method", ["lora", "rslora", "dora"])
def test_trainable_parameters_are_the_closed_formula(tiny_base: Path, tmp_path: Path, method: str) -> None:
    resolved = resolve(write_recipe(tmp_path, tiny_base, alpaca_rows(4), adapter__method=method))
    trainable = sum(p.numel() for p in load(resolved).parameters() if p.requires_grad)
    hidden, mlp, kv, layers, rank = 64, 128, 32, 2, 4
    shapes = [(hidden, hidden)] * 2 + [(hidden, kv)] * 2 + [(hidden, mlp)] * 2 + [(mlp, hidden)]
    expected = layers * sum(rank * (i + o) + (o if method == "dora" else 0) for i, o in shapes)
    assert trainable == expected == resolved.plan.trainable_parameters


def test_gradients_do_not_depend_on_an_evaluation_before(tiny_base: Path, tmp_path: Path) -> None:
    """bitsandbytes repacks 4-bit weights at the first evaluation forward on AVX512-BF16 CPUs, unless it is stopped."""
    resolved = resolve(
        write_recipe(tmp_path, tiny_base, alpaca_rows(8), model__quantization="nf4", model__dtype="bfloat16")
    )

    def gradients(*, evaluate_first: bool) -> dict[str, torch.Tensor]:
        model = load(resolved)
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(parameter, std=0.02, generator=torch.Generator().manual_seed(len(name)))
        if evaluate_first:
            with torch.autocast("cpu", dtype=torch.bfloat16):
                sum_losses(model, resolved.data.train, tokens_per_pass=500)
        model.train()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            stretch_losses_S(model, lay_end_to_end(resolved.data.train)).sum().backward()
        return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}

    untouched, evaluated = gradients(evaluate_first=False), gradients(evaluate_first=True)
    assert len(untouched) == 2 * 7 * 2
    assert all(torch.equal(untouched[name], evaluated[name]) for name in untouched)


def test_adapters_train_in_float32_on_a_quantised_base(tiny_base: Path, tmp_path: Path) -> None:
    """TRL's constructor casts them to bfloat16; the saved adapter shows what was trained."""
    from safetensors.torch import load_file

    folder = run(write_recipe(tmp_path, tiny_base, alpaca_rows(8), model__quantization="nf4", train__max_steps=2))
    weights = load_file(folder.adapter / "adapter_model.safetensors")
    assert {tensor.dtype for tensor in weights.values()} == {torch.float32}
    assert any((tensor != tensor.bfloat16().float()).any() for name, tensor in weights.items() if "lora_B" in name)


@pytest.mark.parametrize("quantization", ["none", "nf4"])
def test_a_resumed_run_is_bit_identical(tiny_base: Path, tmp_path: Path, quantization: str) -> None:
    rows, name = alpaca_rows(12), "adapter_model.safetensors"
    common = {"model__quantization": quantization, "adapter__dropout": 0.1, "output__save_every_steps": 3}
    straight = run(write_recipe(tmp_path / "a", tiny_base, rows, train__max_steps=6, **common))
    path = write_recipe(tmp_path / "b", tiny_base, rows, train__max_steps=6, **common)
    broken = run(path)
    # As after a crash behind step 3: no result, no adapter, the later checkpoint gone, metrics written further.
    (broken.path / "result.json").unlink()
    checkpoints = sorted((broken.path / "checkpoints").glob("step-*"))
    assert [checkpoint.name for checkpoint in checkpoints] == ["step-000003", "step-000006"]
    for file in [*checkpoints[-1].iterdir(), *broken.adapter.iterdir()]:
        file.unlink()
    checkpoints[-1].rmdir()
    resumed = run(path, resume=True)
    assert (resumed.adapter / name).read_bytes() == (straight.adapter / name).read_bytes()
    assert losses_of(resumed.path) == losses_of(straight.path)


def test_a_loss_that_is_not_finite_stops_the_run_before_the_update(
    tiny_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_recipe(tmp_path, tiny_base, alpaca_rows(8), train__max_steps=4)
    calls = []

    def broken_at_step_3(model: torch.nn.Module, stretch: object) -> torch.Tensor:
        calls.append(1)
        return stretch_losses_S(model, stretch) * (float("nan") if len(calls) == 1 + 3 else 1.0)  # one is tried first

    monkeypatch.setattr(trainer_file, "stretch_losses_S", broken_at_step_3)
    with pytest.raises(NumericsError) as caught:
        run(path)
    assert caught.value.code == 4
    assert "step 3" in str(caught.value)
    assert "rows.jsonl:" in str(caught.value)
    assert len(losses_of(tmp_path / "run")) == 2


def test_a_loss_that_is_not_finite_is_never_logged_as_an_average(
    tiny_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """transformers' logging_nan_inf_filter, on by default, would write the mean of the losses before."""
    monkeypatch.setattr(trainer_file.StepTrainer, "_refuse", lambda *_: None)
    monkeypatch.setattr(trainer_file, "stretch_losses_S", lambda *pair: stretch_losses_S(*pair) * float("nan"))
    with pytest.raises(NumericsError, match="not finite; this step is not saved"):
        run(write_recipe(tmp_path, tiny_base, alpaca_rows(8), train__max_steps=2))
    assert not list((tmp_path / "run" / "checkpoints").iterdir())
    assert all(math.isnan(loss) for loss in losses_of(tmp_path / "run"))


def test_a_folder_with_another_run_is_refused(tiny_base: Path, tmp_path: Path) -> None:
    rows = alpaca_rows(4)
    path = write_recipe(tmp_path, tiny_base, rows, train__max_steps=1)
    finished = run(path)
    with pytest.raises(UserError, match="--resume"):
        run(path)
    assert run(path, resume=True) == finished
    with pytest.raises(UserError, match="train.learning_rate: was 0.01 when this run began, is 0.5"):
        run(path, ["train.learning_rate=0.5"], resume=True)


def test_a_run_goes_on_only_with_the_same_bytes(tiny_base: Path, tmp_path: Path) -> None:
    path = write_recipe(tmp_path, tiny_base, alpaca_rows(4), train__max_steps=1)
    run(path)
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps(row) + "\n" for row in reversed(alpaca_rows(4))))
    with pytest.raises(UserError, match=r"rows\.jsonl has changed since this run began"):
        run(path, resume=True)


def test_the_run_folder_is_complete(tiny_base: Path, tmp_path: Path) -> None:
    path = write_recipe(tmp_path, tiny_base, alpaca_rows(10), data__eval=2, evaluate__every_steps=2)
    folder = run(path).path
    assert (folder / "recipe.yaml").read_bytes() == path.read_bytes()
    assert (folder / "loss.png").read_bytes()[:4] == b"\x89PNG"
    assert {file.name for file in (folder / "adapter").iterdir()} == {
        "adapter_config.json", "adapter_model.safetensors", "chat_template.jinja", "tokenizer.json",
        "tokenizer_config.json",
    }  # fmt: skip
    entries = read_metrics(folder / "metrics.jsonl")
    assert [entry["step"] for entry in entries if "eval_loss" in entry] == [2, 4]
    assert json.loads((folder / "plan.json").read_text())["examples"] == 8
    lock = json.loads((folder / "lock.json").read_text())
    assert lock["libraries"]["torch"] == torch.__version__
