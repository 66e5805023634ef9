"""What sealed checkpoints cost: time inside our save beside the stock one, at the same moment of the same run.

A random 160M LLaMA in nf4, 400 steps of two short rows, `save_every_steps` 200. At each save both kinds write the
checkpoint several times in turn, each into a new folder: ours, and the Trainer's own `_save_checkpoint` (which the
library would have run). The overhead is what our two saves take longer, divided by the run without these repetitions.
Short rows make the run short, so that the share is larger than that of a real one.
"""

from __future__ import annotations

import json
import shutil
import statistics
import time
from pathlib import Path
from typing import Any

import torch

from benchmarks.faults.stage import Stage, versions
from finetune.run import run as train
from finetune.train.trainer import StepTrainer
from tests.conftest import POCKET, alpaca_rows

STEPS, EVERY, LIMIT = 400, 200, 0.02


def run(stage: Stage, count: int, seed: int, *, steps: int = STEPS, every: int = EVERY) -> dict[str, Any]:
    """`count` pairs of saves at each save of the run."""
    timed = Timed(stage.folder, count)
    recipe = write_recipe(stage.folder / "sealing", seed, steps, every)
    ours = StepTrainer._save_checkpoint
    StepTrainer._save_checkpoint = timed.save(ours)  # type: ignore[method-assign]
    started = time.perf_counter()
    try:
        train(recipe)
    finally:
        StepTrainer._save_checkpoint = ours  # type: ignore[method-assign]
    seconds = time.perf_counter() - started - timed.repeating
    sealed, stock = statistics.median(timed.sealed), statistics.median(timed.stock)
    overhead = (steps // every) * (sealed - stock) / seconds
    return {
        "harness": "sealing", "failed": [] if overhead <= LIMIT else [f"{overhead:.4f} is above {LIMIT}"],
        "overhead": overhead, "limit": LIMIT, "run_seconds": seconds, "saves": steps // every, "steps": steps,
        "sealed_save_seconds": {"median": sealed, "all": timed.sealed}, "sealed_bytes": timed.sealed_bytes,
        "stock_save_seconds": {"median": stock, "all": timed.stock}, "stock_bytes": timed.stock_bytes,
        "threads": torch.get_num_threads(), "seed": seed, **versions(),
    }  # fmt: skip


class Timed:
    """Both kinds of save, timed in turn before the one that the run needs."""

    def __init__(self, folder: Path, pairs: int) -> None:
        self.folder, self.pairs = folder, pairs
        self.sealed: list[float] = []
        self.stock: list[float] = []
        self.sealed_bytes = self.stock_bytes = 0
        self.repeating = 0.0

    def save(self, ours: Any) -> Any:
        """In place of StepTrainer._save_checkpoint."""
        stock = super(StepTrainer, StepTrainer)._save_checkpoint

        def both(trainer: StepTrainer, model: Any, trial: Any) -> None:
            started, place = time.perf_counter(), trainer.args.output_dir
            for number in range(self.pairs):
                for kind in (ours, stock) if number % 2 else (stock, ours):
                    seconds, size = self.once(kind, trainer, model, trial)
                    (self.sealed if kind is ours else self.stock).append(seconds)
                    if kind is ours:
                        self.sealed_bytes = size
                    else:
                        self.stock_bytes = size
            trainer.args.output_dir = place
            self.repeating += time.perf_counter() - started
            ours(trainer, model, trial)

        return both

    def once(self, kind: Any, trainer: StepTrainer, model: Any, trial: Any) -> tuple[float, int]:
        """Seconds and bytes of one save into a new folder."""
        folder = self.folder / "timed"
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        trainer.args.output_dir = str(folder)
        started = time.perf_counter()
        kind(trainer, model, trial)
        seconds = time.perf_counter() - started
        return seconds, sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())


def write_recipe(folder: Path, seed: int, steps: int, every: int) -> Path:
    """A random base of 160M parameters, short rows, and the recipe of the run."""
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    tokenizer = AutoTokenizer.from_pretrained(POCKET)
    config = LlamaConfig(
        hidden_size=768, intermediate_size=2048, num_hidden_layers=12, num_attention_heads=12, vocab_size=32000,
        max_position_embeddings=2048, bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id,
    )  # fmt: skip
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(folder / "base")
    tokenizer.save_pretrained(folder / "base")
    rows = folder / "rows.jsonl"
    rows.write_text("".join(json.dumps(row) + "\n" for row in alpaca_rows(64)))
    recipe = {
        "version": 1,
        "name": "sealing",
        "model": {"base": str(folder / "base"), "quantization": "nf4"},
        "adapter": {"rank": 16, "alpha": 32},
        "data": {"train": str(rows)},
        "train": {"max_steps": steps, "batch_size": 2, "learning_rate": 2e-4},
        "output": {"folder": str(folder / "run"), "save_every_steps": every},
    }
    path = folder / "recipe.json"
    path.write_text(json.dumps(recipe))
    return path
