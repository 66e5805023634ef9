"""What is trained in a measurement of speed: random bases of four sizes, Alpaca rows, the recipe, tokens in order."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

BATCH_SIZE = 8
RATE = 2e-4
CLIP = 1.0


@dataclass(frozen=True)
class Shape:
    """Sizes of a LLaMA, and how much of it is trained in one measurement."""

    hidden: int
    inner: int
    layers: int
    heads: int
    key_value_heads: int
    vocabulary: int = 32_000
    tied: bool = False
    rows: int = 160
    epochs: int = 2  # of the longer of two processes whose walls are subtracted; the shorter has one
    positions: int = 8192


SHAPES = {
    "1M": Shape(128, 352, 4, 4, 4, rows=32),
    "24M": Shape(288, 768, 6, 6, 6, epochs=5),
    "160M": Shape(768, 2048, 12, 12, 12),
    "1.1B": Shape(2048, 5632, 22, 32, 4, rows=48),
}


def make_base(folder: Path, shape: Shape, tokenizer_folder: Path) -> Path:
    """A LLaMA with random weights and a real tokenizer, stored in bfloat16."""
    import torch
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=shape.hidden,
        intermediate_size=shape.inner,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.key_value_heads,
        vocab_size=shape.vocabulary,
        tie_word_embeddings=shape.tied,
        max_position_embeddings=shape.positions,
    )
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)
    # As tokenizer.json: the other contenders' environments cannot all convert a SentencePiece model.
    AutoTokenizer.from_pretrained(tokenizer_folder).save_pretrained(folder)
    settings = folder / "tokenizer_config.json"  # transformers 5.23 does not save `legacy`, which changes the tokens
    settings.write_text(json.dumps({**json.loads(settings.read_text()), "legacy": True}))
    return folder


def alpaca_rows(shared: Path, count: int) -> list[dict[str, str]]:
    """The first rows of the Alpaca demo."""
    return json.loads((shared / "alpaca" / "alpaca_en_demo.json").read_text())[:count]


def write_recipe(folder: Path, base: Path, rows: list[dict[str, str]], quantization: str, **train: Any) -> Path:
    """The recipe that everybody trains: LoRA rank 16 on all linear modules, constant rate; JSON is YAML."""
    (folder / "rows.json").write_text(json.dumps(rows))
    plain: dict[str, Any] = {"epochs": 1, "batch_size": BATCH_SIZE, "learning_rate": RATE, "schedule": "constant"}
    recipe = {
        "version": 1,
        "name": "speed",
        "model": {"base": str(base), "quantization": quantization, "dtype": "bfloat16"},
        "adapter": {"rank": 16, "alpha": 32},
        "data": {"train": str(folder / "rows.json"), "template": "alpaca", "max_tokens": 8192},
        "train": {**plain, "warmup": 0, "max_grad_norm": CLIP, **train},
        "output": {"folder": str(folder / "run"), "save_every_steps": 10**6},
    }
    path = folder / f"recipe-{quantization}.json"
    path.write_text(json.dumps(recipe))
    return path


def write_tokens(recipe: Path, target: Path, *settings: str) -> dict[str, int]:
    """The recipe's examples in the order in which finetune trains them, for the other contenders; how many there are.

    Each line has input_ids and labels (-100 where nothing is learned): all contenders train the same tokens.
    """
    from finetune.layout import lay_out_steps
    from finetune.resolve import resolve

    resolved = resolve(recipe, settings)
    train, examples = resolved.plan.train, resolved.data.train
    steps = lay_out_steps(train.mixture, batch_size=train.batch_size, steps=train.steps, seed=train.seed)
    order = [examples[index] for step in steps for index in step]
    with target.open("w") as file:
        for example in order:
            file.write(json.dumps({"input_ids": example.ids.tolist(), "labels": example.labels.tolist()}) + "\n")
    tokens, supervised = sum(e.tokens for e in order), sum(e.supervised_tokens for e in order)
    return {"examples": len(order), "steps": len(steps), "tokens": tokens, "supervised_tokens": supervised}
