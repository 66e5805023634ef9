"""What is swapped in is what was named; what is left to the library is said in one line and kept in plain values."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from finetune.model.fast import speed_up as pieces
from finetune.model.fast.speed_up import left_told, record, speed_up
from finetune.model.fast.swapped import Swapped
from finetune.plan_layout import SPEEDUPS
from finetune.run import run
from tests.conftest import alpaca_rows, make_tiny_base, write_recipe


def test_every_piece_has_a_name_that_a_recipe_can_write() -> None:
    assert set(pieces.PIECES) <= set(SPEEDUPS) - {"prefix", "weights"}


def test_only_what_is_named_is_swapped() -> None:
    model = torch.nn.Sequential(torch.nn.Linear(2, 2))
    before = dict(model.named_modules())
    assert speed_up(model, ()) == {}
    assert speed_up(model, ("prefix",)) == {}
    assert dict(model.named_modules()) == before


def test_the_head_is_kept_as_products_want_it_only_with_weights(tmp_path: Path) -> None:
    """Where the CPU multiplies bfloat16, two layouts of 2 bytes each are kept."""
    base = make_tiny_base(tmp_path / "base", dtype="bfloat16")
    kept = {}
    for names in (("head",), ("head", "weights")):
        model = AutoModelForCausalLM.from_pretrained(base).requires_grad_(False)
        kept[names] = speed_up(model, names)["head"].kept_bytes
    packs = torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()
    assert kept == {("head",): 0, ("head", "weights"): 2 * 2 * model.lm_head.weight.numel() if packs else 0}


def test_what_is_left_is_told_by_piece_and_reason() -> None:
    found = {
        "linears": Swapped(80, 1000, {"q": "dropout", "k": "dropout", "v": "dropout"}),
        "layers": Swapped(5, 0, {"norm": "an unknown norm"}),
        "head": Swapped(1, 0, {}),
        "attention": Swapped(0, 0, {"a": "hooks", "b": "eager", "c": "hooks"}),
    }
    assert left_told(found) == [
        "linears: 3 modules stay the library's (dropout)",
        "layers: 1 module stays the library's (an unknown norm)",
        "attention: 3 modules stay the library's (1 eager, 2 hooks)",
    ]
    kept = json.loads(json.dumps(record(found)))
    assert kept["pieces"]["attention"] == {"swapped": 0, "left": {"eager": 1, "hooks": 2}}
    assert kept["pieces"]["head"] == {"swapped": 1, "left": {}}
    assert set(kept["kernels"]) == {"kernels", "attention"}
    assert all(told.startswith(("compiled ", "torch (")) for told in kept["kernels"].values())
    assert record({}) == {"pieces": {}, "kernels": {}}


def test_a_run_tells_and_records_what_it_left(
    tiny_base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """One name alone: nothing of the others is swapped; and what is left stands in lock.json and on stderr."""
    options = {"train__max_steps": 1, "adapter__dropout": 0.1, "train__speedups": ["linears"]}
    folder = run(write_recipe(tmp_path / "a", tiny_base, alpaca_rows(4), **options)).path
    kept = json.loads((folder / "lock.json").read_text())["speedups"]
    assert set(kept["pieces"]) <= {"linears"}
    left = sum(sum(piece["left"].values()) for piece in kept["pieces"].values())
    assert ("the library's" in capsys.readouterr().err) == (left > 0)
    without = run(
        write_recipe(tmp_path / "b", tiny_base, alpaca_rows(4), **{**options, "train__speedups": "none"})
    ).path
    assert json.loads((without / "lock.json").read_text())["speedups"] == {"pieces": {}, "kernels": {}}
