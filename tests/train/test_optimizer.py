"""What happens to all gradients at once: clipping is torch's, and a step of the optimizer is AdamW written out."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest
import torch

from finetune.model.adapter import attach_adapter
from finetune.model.load import load_base, load_tokenizer
from finetune.resolve import resolve
from finetune.train.optimizer import clip_gradients_, forget_gradients
from finetune.train.trainer import make_trainer
from tests.conftest import alpaca_rows, write_recipe


def parameters(scale: float) -> list[torch.nn.Parameter]:
    """Of several shapes, one of them without a gradient."""
    torch.manual_seed(0)
    made = [torch.nn.Parameter(torch.randn(shape)) for shape in ((3, 4), (7,), (2, 2, 2), (5, 1), ())]
    for parameter in (*made[:2], *made[3:]):
        parameter.grad = scale * torch.randn_like(parameter)
    return made


@pytest.mark.parametrize("scale", [0.01, 1.0, 30.0])
@pytest.mark.parametrize("largest", [0.3, 1.0, 5.0])
def test_clipping_is_torchs(scale: float, largest: float) -> None:
    ours, torchs = parameters(scale), parameters(scale)
    norm = clip_gradients_(ours, largest=largest)
    expected = torch.nn.utils.clip_grad_norm_(torchs, largest)
    torch.testing.assert_close(norm, expected, rtol=1e-6, atol=0)
    for mine, other in zip(gradients(ours), gradients(torchs), strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-6, atol=0)
    if expected <= largest:
        assert all(
            torch.equal(mine, own) for mine, own in zip(gradients(ours), gradients(parameters(scale)), strict=True)
        )


def gradients(of: Sequence[torch.nn.Parameter]) -> list[torch.Tensor]:
    return [parameter.grad for parameter in of if parameter.grad is not None]


@pytest.mark.parametrize("spoiled", [float("nan"), float("inf")])
def test_a_norm_that_is_not_finite_is_told(spoiled: float) -> None:
    ours = parameters(1.0)
    gradients(ours)[2].view(-1)[3] = spoiled
    assert not torch.isfinite(clip_gradients_(ours, largest=1.0))


def test_no_gradients_have_no_norm() -> None:
    ours = parameters(1.0)
    forget_gradients(ours)
    assert gradients(ours) == []
    assert clip_gradients_(ours, largest=1.0) == 0


def test_three_steps_are_adamw_written_out(tiny_base: Path, tmp_path: Path) -> None:
    """Decay, both moments and their correction (arXiv:1711.05101, algorithm 2), B faster than A (LoRA+), in float64."""
    settings = {"train__weight_decay": 0.1, "train__schedule": "constant", "adapter__learning_rate_ratio": 4.0}
    resolved = resolve(write_recipe(tmp_path, tiny_base, alpaca_rows(4), train__warmup=0, **settings))
    model = attach_adapter(load_base(resolved.plan.model), resolved.plan.adapter, base="x")
    trainer = make_trainer(
        resolved.plan.train, model=model, tokenizer=load_tokenizer(tiny_base), examples=resolved.data.train,
        held_out=[], folder=tmp_path / "t",
    )  # fmt: skip
    optimizer = trainer.create_optimizer()
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    weights = {name: p.detach().double() for name, p in trained.items()}
    first, second = ({name: torch.zeros_like(w) for name, w in weights.items()} for _ in range(2))
    torch.manual_seed(6)
    for step in (1, 2, 3):
        for name, parameter in trained.items():
            parameter.grad = torch.randn_like(parameter)
            given, rate = parameter.grad.double(), 1e-2 * (4.0 if "lora_B" in name else 1.0)
            first[name] = 0.9 * first[name] + 0.1 * given
            second[name] = 0.999 * second[name] + 0.001 * given**2
            root = (second[name] / (1 - 0.999**step)).sqrt() + 1e-8
            weights[name] = weights[name] * (1 - rate * 0.1) - rate * first[name] / (1 - 0.9**step) / root
        optimizer.step()
        model.zero_grad()
        assert all(parameter.grad is None for parameter in trained.values())
    assert len(trained) == 28
    for name, parameter in trained.items():
        torch.testing.assert_close(parameter.double(), weights[name], rtol=1e-5, atol=1e-6)
