"""What all tests share: the real data's folder, and tiny bases made on the spot."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

CHECKOUT = Path(__file__).resolve().parent.parent
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["XDG_CACHE_HOME"] = str(CHECKOUT / "build" / "test-cache")  # not the home folder of whoever tests

from finetune.machine import quiet_libraries  # noqa: E402 - after the environment is set

quiet_libraries()

POCKET = CHECKOUT / "finetune" / "assets" / "pocket-llama"


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of real data, or a visible skip where it is not there."""
    folder = Path(os.environ.get("FINETUNE_SHARED", CHECKOUT.parent / "shared")) / "data"
    if not folder.is_dir():
        pytest.skip(f"the real data is not at {folder}; set FINETUNE_SHARED")
    return folder


@pytest.fixture(scope="session")
def tiny_base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random LLaMA with two layers, grouped-query attention and pocket-llama's tokenizer, stored in float32."""
    return make_tiny_base(tmp_path_factory.mktemp("base") / "tiny", dtype="float32")


def make_tiny_base(folder: Path, *, dtype: str, tied: bool = False) -> Path:
    """Write a random two-layer LLaMA in Hugging Face format."""
    import torch
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    tokenizer = AutoTokenizer.from_pretrained(POCKET)
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=len(tokenizer),
        max_position_embeddings=512,
        tie_word_embeddings=tied,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        initializer_range=0.1,
    )
    model = LlamaForCausalLM(config).to(getattr(torch, dtype))
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def write_recipe(folder: Path, base: Path | str, rows: list[dict], **settings: object) -> Path:
    """A recipe file and its data in `folder`; settings are "section__key" keywords."""
    import json

    folder.mkdir(parents=True, exist_ok=True)
    data = folder / "rows.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    recipe: dict = {
        "version": 1,
        "name": "tiny",
        "model": {"base": str(base), "quantization": "none", "dtype": "float32"},
        "adapter": {"rank": 4, "alpha": 8},
        "data": {"train": str(data)},
        "train": {"batch_size": 4, "max_steps": 4, "learning_rate": 1e-2},
        "output": {"folder": str(folder / "run")},
    }
    for key, value in settings.items():
        section, _, name = key.partition("__")
        if name:
            recipe.setdefault(section, {})[name] = value
        else:
            recipe[section] = value
    path = folder / "recipe.json"
    path.write_text(json.dumps(recipe))
    return path


def alpaca_rows(count: int) -> list[dict]:
    """Rows of clearly different lengths, so that masks and documents are unequal."""
    text = "the red fox sells seven small pears in the market of Brundel every cold morning"
    words = text.split()
    return [
        {
            "instruction": " ".join(words[: 2 + index % 7]) + f" {index}?",
            "input": "" if index % 3 else " ".join(words[index % 5 :]),
            "output": " ".join(words[: 1 + (index * 5) % 11]),
        }
        for index in range(count)
    ]
