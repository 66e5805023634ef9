"""How each contender trains the same tokens in a process of its own."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.speed.ours import train_ours
from benchmarks.speed.outside import LIMIT_SECONDS, answer_of, python
from benchmarks.speed.peers import PEERS, Job, train_with_peer
from benchmarks.speed.subjects import CLIP, RATE, SHAPES, alpaca_rows, make_base, write_recipe, write_tokens
from benchmarks.speed.trl_configurations import CONFIGURATIONS

IN_INT8 = "finetune: int8"  # with model.compute: int8


@dataclass(frozen=True)
class Work:
    """A base, a recipe and its tokens in a folder of their own."""

    folder: Path
    base: Path
    recipe: Path
    quantization: str
    peers: Path  # the folder of their environments
    rank: int = 16

    def tokens(self, epochs: int) -> Path:
        path = self.folder / f"tokens-{self.quantization}-{epochs}.jsonl"
        if not path.is_file():
            write_tokens(self.recipe, path, f"train.epochs={epochs}")
        return path


def prepare(model: str, quantization: str, *, folder: Path, shared: Path, peers: Path, rows: int = 0) -> Work:
    """The base of a size, made once, and the recipe that trains it; `rows` other than the size's own."""
    shape, here = SHAPES[model], folder / model
    base = here / "base"
    if not base.is_dir():
        here.mkdir(parents=True)
        make_base(base, shape, shared / "tokenizers" / "llama2")
    recipe = write_recipe(here, base, alpaca_rows(shared, rows or shape.rows), quantization)
    work = Work(here, base, recipe, quantization, peers)
    work.tokens(1)
    return work


def train(contender: str, work: Work, epochs: int) -> dict[str, Any]:
    """Figures of one process: wall, processor seconds, peak memory, tokens, losses.

    Raises:
        RuntimeError: it failed.
    """
    if contender == "finetune":
        return train_ours(work.recipe, work.folder, f"train.epochs={epochs}")
    if contender == IN_INT8:
        return train_ours(work.recipe, work.folder, f"train.epochs={epochs}", "model.compute=int8")
    if contender.startswith("trl: "):
        return train_with_trl(work, CONFIGURATIONS[contender.removeprefix("trl: ")], epochs)
    job = Job(
        work.peers / contender / "bin", work.base, work.tokens(epochs), work.folder / contender, work.quantization
    )
    return train_with_peer(contender, job)


def train_with_trl(
    work: Work, configuration: dict[str, Any], epochs: int, *, limit_seconds: float = LIMIT_SECONDS
) -> dict[str, Any]:
    """The same with TRL in a given configuration."""
    config = {name: value for name, value in configuration.items() if name != "base"}
    given = {
        "learning_rate": RATE,
        "lr_scheduler_type": "constant",
        "warmup_steps": 0,
        "max_grad_norm": CLIP,
        "shuffle_dataset": False,
    }
    settings = {
        "base": str(work.base),
        "tokens": str(work.tokens(epochs)),
        "quantization": work.quantization,
        "rank": work.rank,
        "folder": str(work.folder / "trl"),
        "config": {**given, **config},
        **configuration.get("base", {}),
    }
    path = work.folder / "trl.json"
    path.write_text(json.dumps(settings))
    answer = answer_of(python("with_trl.py", path), work.folder / "trl.log", limit_seconds=limit_seconds)
    return {**answer.pop("outside"), **answer}


def known(name: str) -> str:
    """The name of a contender, for argparse."""
    if name in ("finetune", IN_INT8) or name in PEERS or name.removeprefix("trl: ") in CONFIGURATIONS:
        return name
    raise ValueError(name)
