"""Numbers that are not finite, and losses that run away: seen before they cost anything."""

from __future__ import annotations

import json
import math
import random
import shutil
import statistics
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from finetune.errors import NumericsError
from finetune.run import run
from finetune.train import trainer as trainer_file
from finetune.train.checkpoints import find_checkpoints, find_damage
from finetune.train.divergence import Divergence
from finetune.train.loss import stretch_losses_S
from finetune.train.watch import MetricsFile, read_metrics
from tests.conftest import alpaca_rows, write_recipe

STEP = 3


class _Spoilt(torch.autograd.Function):
    """The identity, whose gradient is not finite."""

    @staticmethod
    def forward(ctx, losses):  # noqa: ANN001, ANN205
        return losses.clone()

    @staticmethod
    def backward(ctx, gradient):  # noqa: ANN001, ANN205
        return gradient * float("inf")


SPOILS = {
    "loss nan": lambda losses: losses * float("nan"),
    "loss inf": lambda losses: losses + float("inf"),
    "gradient": _Spoilt.apply,
}


@pytest.mark.parametrize("spoil", SPOILS)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_nothing_is_updated_with_what_is_not_finite(
    tiny_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, spoil: str, dtype: str
) -> None:
    """Every step is saved: step 2 is kept, step 3 names its rows, and its weights are those of step 2."""
    path = write_recipe(tmp_path, tiny_base, alpaca_rows(8), output__save_every_steps=1, model__dtype=dtype)
    trained: list[trainer_file.StepTrainer] = []

    def spoiled(model: torch.nn.Module, stretch: object) -> torch.Tensor:
        losses = stretch_losses_S(model, stretch)
        return SPOILS[spoil](losses) if trained[0].state.global_step == STEP - 1 else losses

    original = trainer_file.StepTrainer.training_step
    monkeypatch.setattr(
        trainer_file.StepTrainer,
        "training_step",
        lambda self, *args: (trained.append(self), original(self, *args))[1],
    )
    monkeypatch.setattr(trainer_file, "stretch_losses_S", spoiled)
    with pytest.raises(NumericsError) as caught:
        run(path)
    said = str(caught.value)
    assert caught.value.code == 4
    assert f"step {STEP}: the {'norm of the gradient' if spoil == 'gradient' else 'loss'} is " in said
    lines = sorted(int(where.rpartition(":")[2]) for where in said.partition("rows of this step: ")[2].split(", "))
    from finetune.layout import Mixture, lay_out_steps

    order = lay_out_steps(Mixture((8,), (1.0,)), batch_size=4, steps=STEP, seed=17)
    assert lines == sorted(index + 1 for index in order[-1])
    found = find_checkpoints(tmp_path / "run" / "checkpoints")
    assert [(path.name, find_damage(path)) for path in found] == [("step-000001", None), ("step-000002", None)]
    saved = load_file(found[-1] / "adapter_model.safetensors")
    here = {name.replace(".default.", "."): p for name, p in trained[0].adapted_model.named_parameters()}
    assert all(torch.equal(here[name], tensor) for name, tensor in saved.items())
    assert len(read_metrics(tmp_path / "run" / "metrics.jsonl")) == STEP - 1


def test_the_norm_of_the_gradient_is_in_every_line(tiny_base: Path, tmp_path: Path) -> None:
    folder = run(write_recipe(tmp_path, tiny_base, alpaca_rows(8), train__max_grad_norm=0.01)).path
    norms = [entry["grad_norm"] for entry in read_metrics(folder / "metrics.jsonl")]
    assert len(norms) == 4
    assert all(math.isfinite(norm) and norm > 0.01 for norm in norms), "it is the norm before clipping"


# -- a loss that runs away --------------------------------------------------------------------------------------------


def warned_at(losses: list[float]) -> list[int]:
    watch = Divergence()
    return [step for step, loss in enumerate(losses, 1) if watch.see(loss)]


def test_a_loss_that_runs_away_is_told_once() -> None:
    draw = random.Random(1)
    calm = [2.0 * draw.uniform(0.5, 1.5) for _ in range(60)]
    limit = 2 * statistics.median(calm[-50:]) + 1
    assert warned_at(calm) == []
    assert warned_at([*calm, *[limit + 0.01] * 40]) == [65], "the fifth step in a row, and not again"
    assert warned_at([*calm, *[limit - 0.01] * 40]) == []
    assert warned_at([*calm, *([limit + 0.01] * 4 + [2.0]) * 8]) == [], "hard batches with others between them"
    assert warned_at([9.0] * 5 + [2.0] * 5 + [9.0] * 9) == [], "too early to know what is usual"
    assert warned_at([*calm, *[50.0] * 5, *calm, *[50.0] * 5]) == [65]


def test_the_warning_stands_in_the_metrics_and_is_not_repeated_after_a_resume(
    tiny_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """From step 8 on the loss is 30 higher; less history is asked for, so that the run is short."""
    from finetune.train import divergence

    monkeypatch.setattr(divergence, "FEWEST", 3)
    original = trainer_file.StepTrainer.training_step

    def higher(self: trainer_file.StepTrainer, *args: object) -> torch.Tensor:
        return original(self, *args) + (30.0 if self.state.global_step >= 7 else 0.0)

    monkeypatch.setattr(trainer_file.StepTrainer, "training_step", higher)
    path = write_recipe(
        tmp_path, tiny_base, alpaca_rows(8), train__max_steps=18, output__save_every_steps=2,
        output__keep_checkpoints=50,
    )  # fmt: skip
    folder = run(path).path
    warnings = [entry for entry in read_metrics(folder / "metrics.jsonl") if "warning" in entry]
    assert len(warnings) == 1
    assert "the loss runs away" in warnings[0]["warning"]
    assert capsys.readouterr().err.count("the loss runs away") == 1
    whole = (folder / "metrics.jsonl").read_bytes()
    # Once from a step behind the warning, then from one in the middle of the five: there it is told once more.
    for last, told in ((warnings[0]["step"] + 1, 0), (warnings[0]["step"] - 2, 1)):
        (folder / "result.json").unlink()
        for checkpoint in find_checkpoints(folder / "checkpoints"):
            if int(checkpoint.name[5:]) > last:
                shutil.rmtree(checkpoint)
        run(path, resume=True)
        assert capsys.readouterr().err.count("the loss runs away") == told
        assert (folder / "metrics.jsonl").read_bytes() == whole


# -- metrics.jsonl ----------------------------------------------------------------------------------------------------


def test_lines_that_a_full_disk_refuses_wait_for_room(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The disk takes seven bytes of a line and then nothing: the file always ends with a whole line."""
    import errno
    import os

    file = tmp_path / "metrics.jsonl"
    metrics = MetricsFile(file)
    metrics.open(until_step=0)
    write, room = os.pwrite, [10**6]

    def limited(descriptor: int, data: bytes, offset: int) -> int:
        if not room[0]:
            raise OSError(errno.ENOSPC, "No space left on device")
        count = write(descriptor, data[: room[0]], offset)
        room[0] -= count
        return count

    monkeypatch.setattr(os, "pwrite", limited)
    for step in range(1, 9):
        room[0] = {3: 7, 4: 0, 5: 7}.get(step, 10**6)
        metrics.add({"step": step, "loss": step / 3})
        content = file.read_text()
        assert content.endswith("\n")
        assert [json.loads(line)["step"] for line in content.splitlines()] == list(
            range(1, (2 if step in (3, 4, 5) else step) + 1)
        )
    metrics.close()
    assert capsys.readouterr().err.count("No space left") == 1
    again = MetricsFile(file)
    assert [entry["step"] for entry in again.open(until_step=4)] == [1, 2, 3, 4]
    again.close()
    assert file.read_text() == "".join(json.dumps({"step": step, "loss": step / 3}) + "\n" for step in range(1, 5))
