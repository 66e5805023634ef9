"""What sealed checkpoints cost: wall and processor seconds of a save with and without its seal, beside a run's steps.

A random 160M LLaMA in nf4, LoRA of rank 16, steps of two short rows. At each save three kinds write the same checkpoint
in turn, each into a new folder: ours; ours without the seal (no sync, no sha256, no manifest); the Trainer's own
`_save_checkpoint`, which the library would have run. The overhead is what the seal takes, divided by the steps between
two saves at the default `output.save_every_steps`. Short rows make short steps, so the share is larger than a real one.
"""

from __future__ import annotations

import json
import shutil
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from benchmarks.faults.stage import Stage, versions
from finetune.run import run as train
from finetune.train import checkpoints
from finetune.train.trainer import StepTrainer
from tests.conftest import POCKET, alpaca_rows

STEPS, EVERY, LIMIT = 40, 20, 0.02
DEFAULT_EVERY = 200  # output.save_every_steps
CLOCKS: dict[str, Callable[[], float]] = {"wall": time.perf_counter, "processor": time.process_time}
KINDS = ("sealed", "unsealed", "stock")


def run(stage: Stage, count: int, seed: int, *, steps: int = STEPS, every: int = EVERY) -> dict[str, Any]:
    """`count` saves of each kind at each save of the run."""
    timed = Timed(stage.folder, count)
    recipe = write_recipe(stage.folder / "sealing", seed, steps, every)
    save, step = StepTrainer._save_checkpoint, StepTrainer.training_step
    StepTrainer._save_checkpoint = timed.saves(save)  # type: ignore[method-assign]
    StepTrainer.training_step = timed.steps(step)  # type: ignore[method-assign]
    try:
        train(recipe)
    finally:
        StepTrainer._save_checkpoint, StepTrainer.training_step = save, step  # type: ignore[method-assign]
    seconds = {kind: medians(each) for kind, each in timed.seconds.items()}
    overhead = {
        clock: (seconds["sealed"][clock] - seconds["unsealed"][clock]) / (DEFAULT_EVERY * seconds["step"][clock])
        for clock in CLOCKS
    }
    return {
        "harness": "sealing",
        "failed": [f"{clock}: {value:.4f} is above {LIMIT}" for clock, value in overhead.items() if value > LIMIT],
        "overhead": overhead, "limit": LIMIT, "median_seconds": seconds, "bytes": timed.bytes,
        "save_every_steps": DEFAULT_EVERY, "saves_of_each_kind": len(timed.seconds["sealed"]),
        "steps": steps, "threads": torch.get_num_threads(), "seed": seed, **versions(), "each": timed.seconds,
    }  # fmt: skip


def medians(each: list[dict[str, float]]) -> dict[str, float]:
    return {clock: statistics.median(seconds[clock] for seconds in each) for clock in CLOCKS}


class Timed:
    """Steps, and all kinds of save in turn before the save that the run needs."""

    def __init__(self, folder: Path, rounds: int) -> None:
        self.folder, self.rounds = folder, rounds
        self.seconds: dict[str, list[dict[str, float]]] = {kind: [] for kind in ("step", *KINDS)}
        self.bytes: dict[str, int] = {}

    def steps(self, original: Any) -> Any:
        """In place of StepTrainer.training_step, whose optimizer is not counted: the overhead is no smaller for it."""

        def step(trainer: StepTrainer, *args: Any, **kwargs: Any) -> Any:
            with self.timed("step"):
                return original(trainer, *args, **kwargs)

        return step

    def saves(self, ours: Any) -> Any:
        """In place of StepTrainer._save_checkpoint."""
        stock = super(StepTrainer, StepTrainer)._save_checkpoint
        kinds = {"sealed": ours, "unsealed": without_seal(ours), "stock": stock}

        def save(trainer: StepTrainer, model: Any, trial: Any) -> None:
            place, folder = trainer.args.output_dir, self.folder / "timed"
            for number in range(self.rounds):
                for kind in KINDS[number % 3 :] + KINDS[: number % 3]:
                    shutil.rmtree(folder, ignore_errors=True)
                    folder.mkdir()
                    trainer.args.output_dir = str(folder)
                    with self.timed(kind):
                        kinds[kind](trainer, model, trial)
                    self.bytes[kind] = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
            trainer.args.output_dir = place
            ours(trainer, model, trial)

        return save

    @contextmanager
    def timed(self, kind: str) -> Iterator[None]:
        started = {name: clock() for name, clock in CLOCKS.items()}
        yield
        self.seconds[kind].append({name: clock() - started[name] for name, clock in CLOCKS.items()})


def without_seal(ours: Any) -> Any:
    """Our save as it would be if nothing were synced, hashed or listed."""

    def save(*args: Any) -> None:
        seal, sync = checkpoints._seal, checkpoints._sync
        checkpoints._seal = lambda staging, step: None
        checkpoints._sync = lambda path: None
        try:
            ours(*args)
        finally:
            checkpoints._seal, checkpoints._sync = seal, sync

    return save


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
