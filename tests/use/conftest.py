"""A tiny random LLaMA with a real tokenizer, as a base folder and as a run with an adapter; no network."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from finetune.artifact import open_run_folder
from finetune.base import ASSETS
from finetune.model.adapter import attach_adapter, save_adapter
from finetune.model.load import load_base
from finetune.resolve import resolve
from finetune.use.target import Target, load_target

POCKET = ASSETS / "pocket-llama"
CONTEXT = 96
QUESTIONS = ["What is red?", "Name a fish.", "Say it twice: yes", "Who sells the hat of copper?", "2 + 2?", "Where?"]
ANSWERS = ["blood", "trout", "yes yes", "a tailor in café Nine", "4", "here"]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    # PEFT 0.21 reads a property that transformers 5.23 deprecates (peft/peft_model.py, PeftModel.__init__).
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning"))


def save_tiny(folder: Path, model: LlamaForCausalLM) -> Path:
    """The model as a base folder with pocket-llama's tokenizer and no template."""
    model.save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        shutil.copyfile(POCKET / name, folder / name)
    return folder


def tiny_model(*, seed: int = 5) -> LlamaForCausalLM:
    """Random weights, large enough that the likeliest token is never a near-tie."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=3072,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=CONTEXT,
        initializer_range=0.3,
        tie_word_embeddings=False,
        bos_token_id=0,
        eos_token_id=1,
    )
    return LlamaForCausalLM(config).eval()


def write_rows(file: Path, rows: list[dict]) -> str:
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(file)


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("tiny"), tiny_model())


@pytest.fixture(scope="session")
def tiny(tiny_folder: Path) -> Target:
    """The tiny base in float32, with a template of few tokens."""
    return load_target(str(tiny_folder), template="none")


@pytest.fixture
def rows_file(tmp_path: Path) -> str:
    kinds = ["a", "b", "b", "a", "b", None]
    rows = [
        {"instruction": question, "output": answer, "kind": kind}
        for question, answer, kind in zip(QUESTIONS, ANSWERS, kinds, strict=True)
    ]
    return write_rows(tmp_path / "rows.jsonl", rows)


@pytest.fixture
def run_folder(tmp_path: Path, tiny_folder: Path, rows_file: str) -> Path:
    """A run in nf4 as training leaves it, its lora_B random instead of trained."""
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        f"version: 1\nname: tiny\nmodel: {{base: {tiny_folder}, dtype: float32}}\nadapter: {{rank: 4, alpha: 8}}\n"
        f"data: {{train: {rows_file}, template: alpaca, system: Be brief., date: 1 Jan 2020}}\n"
    )
    resolved = resolve(recipe, out=tmp_path / "run")
    folder = open_run_folder(resolved.plan, recipe, (), resolved.base, resolved.recipe.data, resume=False)
    model = attach_adapter(load_base(resolved.plan.model), resolved.plan.adapter, base=resolved.plan.model.base)
    torch.manual_seed(1)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.2)
    folder.write_adapter(resolved.base, resolved.data.template, lambda target: save_adapter(model, target))
    return folder.path
