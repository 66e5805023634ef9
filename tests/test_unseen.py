"""Plans of bases that are not on this machine: shapes against transformers' modules, tokens against real tokenizers."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from finetune.base import is_here
from finetune.data.prepare import prepare_data
from finetune.families import find_family, find_model
from finetune.plan import count_trainable
from finetune.planned import plan_values
from finetune.recipe import load_recipe
from finetune.shipped import ShippedRecipe, list_recipes
from finetune.unseen import linears, table_facts
from tests.conftest import CHECKOUT, POCKET, alpaca_rows, write_recipe
from tests.test_families import CONFIGS

LLAMA = "meta-llama/Llama-3.1-8B"


@pytest.mark.parametrize(
    "hub_id",
    [
        "meta-llama/Llama-2-7b-hf",
        LLAMA,
        "Qwen/Qwen3-4B",
        "google/gemma-2-9b",
        "microsoft/phi-4",
        "mistralai/Mixtral-8x7B-v0.1",
        "Qwen/Qwen3-30B-A3B",
        "deepseek-ai/DeepSeek-V2-Lite",
        "deepseek-ai/DeepSeek-V3",
        "meta-llama/Llama-3.2-11B-Vision-Instruct",
        "meta-llama/Llama-4-Maverick-17B-128E-Instruct",
    ],
)
def test_an_adapter_on_all_linear_modules_has_as_many_parameters_as_the_modules_say(hub_id: str) -> None:
    import transformers

    model = find_model(hub_id)
    assert model is not None
    config_class, model_class, arguments = CONFIGS[find_family(model.family).model_type]
    with torch.device("meta"):
        modules: Any = getattr(transformers, model_class)(
            getattr(transformers, config_class)(**arguments(model.shape))
        ).named_modules()
    expected = sum(
        16 * (module.in_features + module.out_features)
        for name, module in modules
        if isinstance(module, torch.nn.Linear)
        and ".layers." in name
        and not {"vision_model", "vision_tower", "router", "gate"} & set(name.split("."))
    )
    found = tuple(linears(model.shape, find_family(model.family)))
    leaves = tuple({linear.leaf for linear in found})
    assert count_trainable(found, leaves, method="lora", rank=16) == expected


@pytest.mark.real
@pytest.mark.parametrize(
    ("tokenizer", "hub_id"), [("llama2", "meta-llama/Llama-2-7b-hf"), ("llama3.2-instruct", LLAMA)]
)
def test_estimated_tokens_are_within_a_tenth_of_the_tokenizers(
    shared: Path, tmp_path: Path, tokenizer: str, hub_id: str
) -> None:
    rows = json.loads((shared / "alpaca" / "alpaca_en_demo.json").read_text())[:300]
    recipe = write_recipe(tmp_path, hub_id, rows, data__template="alpaca", data__max_tokens=4096)
    estimated = plan_values(recipe)
    base = make_base_with(shared / "tokenizers" / tokenizer, tmp_path / "base")
    own = load_recipe(recipe, [f"model.base={base}"])
    from finetune.base import read_base

    facts = prepare_data(own.data, read_base(str(base)), seed=1).facts
    assert estimated["examples"] == len(facts.train_tokens) == 300
    assert estimated["tokens"] == pytest.approx(int(facts.train_tokens.sum()), rel=0.1)
    assert estimated["supervised_tokens"] == pytest.approx(int(facts.train_supervised.sum()), rel=0.1)


def make_base_with(tokenizer: Path, folder: Path) -> Path:
    """Config and weights of the smallest LLaMA with as many embeddings as the tokenizer has tokens."""
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    words = AutoTokenizer.from_pretrained(tokenizer)
    config = LlamaConfig(
        hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1, vocab_size=len(words)
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    words.save_pretrained(folder)
    return folder


def test_a_plan_without_the_base_names_what_is_estimated_and_leaves_the_unknown_null(tmp_path: Path) -> None:
    values = plan_values(write_recipe(tmp_path, "meta-llama/Llama-3.1-405B", alpaca_rows(10), data__eval=2))
    assert values["base_parameters"] == 405_853_388_800
    assert values["examples"] == 8
    assert values["eval_examples"] == 2
    assert {"tokens", "supervised_tokens", "peak_memory_gib"} <= set(values["estimated"])
    assert values["stop_token_ids"] is None
    assert values["peak_memory_gib"] > values["device_memory_gib"]  # an answer, not an error


def test_only_a_published_base_is_planned_from_the_table(tmp_path: Path) -> None:
    assert not is_here(LLAMA)
    assert is_here("builtin:pocket-llama")
    assert is_here(str(POCKET))
    here = plan_values(write_recipe(tmp_path, POCKET, alpaca_rows(10)))
    assert here["stop_token_ids"]
    assert "tokens" not in here["estimated"]


def test_a_shape_is_stored_in_sixteen_bits() -> None:
    model = find_model("mistralai/Mistral-7B-v0.3")
    assert model is not None
    facts = table_facts(model)
    assert facts.stored_bytes == 2 * 7_248_023_552
    assert facts.context_tokens == 32_768


@pytest.mark.parametrize("recipe", list_recipes(), ids=lambda recipe: recipe.name)
def test_every_shipped_recipe_can_be_planned_on_a_laptop(tmp_path: Path, recipe: ShippedRecipe) -> None:
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps(row) + "\n" for row in alpaca_rows(40)))
    local = [f"data.train={rows}", "data.format=alpaca", "data.eval=4"]
    values = plan_values(recipe.path, local)
    assert values["steps"] >= 1
    assert values["trainable_parameters"] > 0
    assert values["base_parameters"] > 1_000_000


def test_a_hub_that_nobody_answers_at_is_no_reason_not_to_plan(tmp_path: Path) -> None:
    """A port that is closed stands for the hub; nothing says that the network is off. A name that is none is told."""
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        address = f"http://127.0.0.1:{closed.getsockname()[1]}"
    environment = {name: value for name, value in os.environ.items() if name != "HF_HUB_OFFLINE"}
    environment |= {"HF_ENDPOINT": address, "HF_HOME": str(tmp_path), "PYTHONPATH": str(CHECKOUT)}

    def plan(*arguments: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "finetune", "plan", *arguments, "--json"]
        return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, check=False)

    recipe = next(each for each in list_recipes() if each.name == "llama/llama3.1-8b")
    planned = plan(str(recipe.path))
    assert planned.returncode == 0, planned.stdout
    answer = json.loads(planned.stdout)
    assert answer["examples"] == 51_760
    assert any("the rows are not on this machine" in assumed for assumed in answer["assumptions"])
    refused = plan(str(recipe.path), "--set", "data.train=hub:a/b/c/d")
    assert refused.returncode == 2
    assert "is no name of a data set" in refused.stdout
