"""What `finetune plan` answers of any published base on any machine: against bitsandbytes' bytes, torch's count of
operations, published figures, and the plan of the changed recipe itself."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from finetune.base import read_base
from finetune.errors import UserError
from finetune.fit import as_override, read_size
from finetune.model.adapter import attach_adapter
from finetune.model.load import load_base
from finetune.named_machines import NAMED, assumptions, named_machine
from finetune.plan_stages import stored_weight_bytes
from finetune.plan_text import plan_text
from finetune.planned import plan_values
from finetune.resolve import resolve
from tests.conftest import POCKET, alpaca_rows, write_recipe

BOTH = ("", "-Instruct")
IDS = [
    *(f"huggyllama/llama-{size}" for size in ("7b", "13b", "30b", "65b")),
    *(f"meta-llama/Llama-2-{size}{kind}-hf" for size in ("7b", "13b", "70b") for kind in ("", "-chat")),
    *(f"meta-llama/Meta-Llama-3-{size}{kind}" for size in ("8B", "70B") for kind in BOTH),
    *(f"meta-llama/Llama-3.1-{size}{kind}" for size in ("8B", "70B", "405B") for kind in BOTH),
    *(f"meta-llama/Llama-3.2-{size}{kind}" for size in ("1B", "3B", "11B-Vision", "90B-Vision") for kind in BOTH),
    "meta-llama/Llama-3.3-70B-Instruct",
    *(f"meta-llama/Llama-4-{size}{kind}" for size in ("Scout-17B-16E", "Maverick-17B-128E") for kind in BOTH),
    *("mistralai/Mistral-7B-v0.1", "mistralai/Mistral-7B-v0.3"),
]
TRAINING = ("load", "step", "evaluate")


def quantised(folder: Path, base: str | Path, **settings: Any) -> Path:
    return write_recipe(
        folder, base, alpaca_rows(24), **{"model__quantization": "nf4", "model__dtype": "auto"} | settings
    )


@pytest.mark.parametrize("hub_id", IDS)
def test_every_published_llama_is_planned_with_nothing_on_disk(tmp_path: Path, hub_id: str) -> None:
    values = plan_values(quantised(tmp_path, hub_id), on="h100")
    assert list(values["stages_gib"]) == ["load", "step", "evaluate", "merge"]
    assert values["stages_gib"]["step"] == values["peak_memory_gib"] > values["weights_gib"] > 0
    assert values["disk_parts_gib"]["base"] == pytest.approx(2 * values["base_parameters"] / 2**30, abs=1e-3)
    assert values["operations_per_token"] > 0
    assert values["seconds"] == pytest.approx(values["seconds_per_step"] * values["steps"], rel=1e-3, abs=0.1)
    assert {"seconds", "seconds_per_step", "tokens", "peak_memory_gib"} <= set(values["estimated"])
    page = plan_text(json.loads(json.dumps(values)))
    assert ("does not fit" in page) == (max(values["stages_gib"][stage] for stage in ("load", "step")) > 79.6)


@pytest.mark.parametrize("name", NAMED)
def test_a_machine_that_is_not_here_is_planned_for_and_its_assumptions_are_told(tmp_path: Path, name: str) -> None:
    values = plan_values(quantised(tmp_path, "meta-llama/Llama-3.1-8B"), on=name)
    machine, _ = named_machine(name)
    assert values["device_memory_gib"] == machine.device_memory_gib
    assert values["settings"]["model.dtype"] == ("bfloat16" if NAMED[name].bfloat16 else "float32")
    assert list(assumptions(name)) == values["assumptions"]
    page = plan_text(values)
    assert all(f"  {line}\n" in page for line in values["assumptions"])
    assert "not measured" in page


def test_products_in_fp8_are_planned_for_machines_that_have_them(tmp_path: Path) -> None:
    """Twice the rate by the data sheet, for the linears alone; refused by a name that has none."""
    recipe = quantised(tmp_path, "meta-llama/Llama-3.1-8B", model__compute="fp8")
    exact = quantised(tmp_path / "exact", "meta-llama/Llama-3.1-8B")
    ratio = plan_values(exact, on="h100")["seconds_per_step"] / plan_values(recipe, on="h100")["seconds_per_step"]
    assert 1.05 < ratio < 2
    with pytest.raises(UserError, match=r"model\.compute: fp8 needs an NVIDIA GPU of compute capability 8\.9 or newer"):
        plan_values(recipe, on="a100-80")


def test_an_unknown_machine_and_a_size_that_is_none_are_told(tmp_path: Path) -> None:
    recipe = quantised(tmp_path, POCKET)
    with pytest.raises(UserError, match=r"--on: 'h20' is not known; did you mean 'h200'\?; write one of h200, h100"):
        plan_values(recipe, on="h20")
    for size in ("", "many", "-4GB", "24XB", "0"):
        with pytest.raises(UserError, match="--fit: .* is no size; write it as 24GB"):
            read_size(size or " ")
    assert read_size("24GB") == 24e9 / 2**30
    assert (read_size("22.5 GiB"), read_size("24")) == (22.5, 24e9 / 2**30)


@pytest.mark.parametrize(
    ("hub_id", "on", "size", "settings", "same_training"),
    [
        ("meta-llama/Llama-3.1-8B", "h100", "24GB", {}, True),
        ("meta-llama/Llama-3.1-8B", "h100", "9GB", {}, True),
        ("meta-llama/Llama-3.1-8B", "a100-80", "12GB", {"model__quantization": "none"}, False),
        (
            "meta-llama/Llama-2-13b-hf",
            "4090",
            "12GB",
            {"train__tokens_per_pass": 16_384, "train__recompute": "none"},
            True,
        ),
        ("meta-llama/Llama-3.1-70B", "h200", "45GiB", {"adapter__rank": 256}, False),
        ("mistralai/Mixtral-8x7B-v0.1", "a100-80", "30GiB", {}, True),
        ("google/gemma-2-9b", "cpu", "15GB", {}, True),
    ],
)
def test_the_changes_that_are_named_make_it_fit_and_each_of_them_is_needed(  # noqa: PLR0913
    tmp_path: Path, hub_id: str, on: str, size: str, settings: dict[str, Any], same_training: bool
) -> None:
    recipe = quantised(tmp_path, hub_id, **settings)
    before, most = plan_values(recipe, on=on, fit=size), read_size(size)
    fit = before["fit"]
    assert fit["fits"]
    assert fit["same_training"] == same_training

    def peak(changes: dict[str, Any]) -> float:
        stages = plan_values(recipe, [as_override(*change) for change in changes.items()], on=on)["stages_gib"]
        return max(stages[stage] for stage in TRAINING)

    assert peak(fit["changes"]) == pytest.approx(fit["peak_memory_gib"], abs=2e-3)
    assert peak(fit["changes"]) <= most
    for key in fit["changes"].keys() - {"data.too_long"}:
        assert peak({name: value for name, value in fit["changes"].items() if name != key}) > most, key
    page = plan_text(before)
    assert all(f"--set {as_override(*change)}\n" in page for change in fit["changes"].items())


def test_what_cannot_fit_is_told_with_what_it_takes(tmp_path: Path) -> None:
    values = plan_values(quantised(tmp_path, "meta-llama/Llama-3.1-405B"), on="h200", fit="80GB")
    assert (values["fit"]["fits"], values["fit"]["changes"]) == (False, {})
    assert values["fit"]["peak_memory_gib"] > values["weights_gib"] > 200
    assert "it does not fit in 74.5 GiB, whatever is changed" in plan_text(values)


@pytest.mark.parametrize("quantization", ["none", "nf4", "fp4", "int8"])
def test_the_bytes_of_the_weights_are_those_that_bitsandbytes_holds(tmp_path: Path, quantization: str) -> None:
    plan = resolve(write_recipe(tmp_path, POCKET, alpaca_rows(4), model__quantization=quantization)).plan
    model = load_base(plan.model)
    held = 0
    for parameter in model.parameters():
        held += parameter.untyped_storage().nbytes()
        if (state := getattr(parameter, "quant_state", None)) is not None:
            held += sum(part.nbytes for part in (state.absmax, state.offset, state.state2.absmax))
        if getattr(parameter, "SCB", None) is not None:
            held += parameter.SCB.nbytes
    base = read_base(str(POCKET)).facts
    assert stored_weight_bytes(base, quantization=quantization, element_bytes=4) == held


def test_scout_in_nf4_takes_what_its_makers_count_promises(tmp_path: Path) -> None:
    """109 billion parameters in about 56 GiB: the experts in 4 bits, the tower, router and embeddings in 16."""
    values = plan_values(quantised(tmp_path, "meta-llama/Llama-4-Scout-17B-16E-Instruct"), on="h200")
    assert 56 <= values["weights_gib"] < 57
    assert values["peak_memory_gib"] < 80


@pytest.mark.parametrize(
    ("hub_id", "active"),
    # mistral.ai/news/mixtral-of-experts; Qwen3 technical report, table 2; the Llama 4 model card
    [
        ("mistralai/Mixtral-8x7B-v0.1", 12.9e9),
        ("Qwen/Qwen3-30B-A3B", 3.3e9),
        ("meta-llama/Llama-4-Scout-17B-16E", 17e9),
    ],
)
def test_a_token_costs_the_experts_it_meets(tmp_path: Path, hub_id: str, active: float) -> None:
    """Two products, of two operations a weight and token, of what is active but the embedding and most of the head."""
    recipe = quantised(tmp_path, hub_id, model__quantization="none", train__recompute="none", adapter__rank=1)
    values = plan_values(recipe, on="h200")
    found = values["operations_per_token"] / 4
    assert 0.8 * active < found < active
    assert values["seconds"] is not None


def test_operations_are_those_that_torch_counts(tiny_base: Path, tmp_path: Path) -> None:
    rows = [{"instruction": "seven small pears in the market of Brundel", "output": "the red fox " * 40}] * 3
    recipe = write_recipe(tmp_path, tiny_base, rows, data__loss_on="everything", train__recompute="none")
    plan = resolve(recipe).plan
    tokens = plan.tokens // plan.examples
    model = attach_adapter(load_base(plan.model), plan.adapter, base="x")
    ids_1T = torch.arange(tokens)[None] % 100 + 5
    with FlopCounterMode(display=False) as counter:
        model(input_ids=ids_1T, labels=ids_1T).loss.backward()
    # Attention is not torch's own here: of half the pairs two products forward, five backward, width 64, two layers.
    attention = 2 * (2 + 5) * 64 * tokens / 2 * 2
    assert plan.operations_per_token == pytest.approx(counter.get_total_flops() / tokens + attention, rel=0.02)


def test_rows_that_are_elsewhere_are_taken_at_their_longest(tmp_path: Path) -> None:
    recipe = quantised(
        tmp_path, "meta-llama/Llama-3.1-8B", data__train="hub:yahma/alpaca-cleaned", data__max_tokens=600
    )
    values = plan_values(recipe, ["train.epochs=2", "data.template=llama3"], on="h100")
    assert values["examples"] == 51_760  # its page on the hub
    assert values["tokens"] == 51_760 * 600
    assert values["assumptions"][0].startswith("the rows are not on this machine: 51,760 of them")
    with pytest.raises(UserError, match="not in the hub cache, and the network is switched off"):
        plan_values(recipe, ["data.train=hub:someone/elses", "train.epochs=1"])
    known = plan_values(recipe, ["data.train=hub:someone/elses", "train.max_steps=30"])
    assert (known["steps"], known["examples"]) == (30, 120)
