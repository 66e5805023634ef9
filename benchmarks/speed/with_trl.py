"""Train rows of given tokens with TRL's SFTTrainer: settings as JSON in; step losses and counts as one JSON line out.

    python benchmarks/speed/with_trl.py SETTINGS.json

Settings: base, tokens (a file of lines with input_ids and labels, trained in this order), quantization, rank, folder,
config (arguments of SFTConfig), and dtype, attention (how the base is loaded).
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from peft import LoraConfig
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig, TrainerCallback
from trl import SFTConfig, SFTTrainer


class Watch(TrainerCallback):
    """Seconds of every step, and what was logged of it."""

    def __init__(self) -> None:
        self.seconds: list[float] = []
        self.losses: list[float] = []
        self.tokens: list[int] = []  # real ones, up to and with each step

    def on_step_begin(self, *_: Any, **__: Any) -> None:
        self.seconds.append(-time.perf_counter())

    def on_step_end(self, *_: Any, **__: Any) -> None:
        self.seconds[-1] += time.perf_counter()

    def on_log(self, *_: Any, logs: dict[str, float], **__: Any) -> None:
        if "loss" in logs:
            self.losses.append(float(logs["loss"]))
            self.tokens.append(int(float(logs["num_tokens"])))


def load(settings: dict[str, Any]) -> torch.nn.Module:
    """The base, in 4 bits where asked."""
    dtype = getattr(torch, settings.get("dtype", "bfloat16"))
    four_bits = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
    )
    return AutoModelForCausalLM.from_pretrained(
        settings["base"],
        dtype=dtype,
        attn_implementation=settings.get("attention"),
        quantization_config=four_bits if settings["quantization"] == "nf4" else None,
    )


def main() -> None:
    """Train one epoch of the lines in their order."""
    settings = json.loads(Path(sys.argv[1]).read_text())
    rows = [json.loads(line) for line in Path(settings["tokens"]).read_text().splitlines()]
    watch = Watch()
    trainer = SFTTrainer(
        model=load(settings),
        args=SFTConfig(
            output_dir=settings["folder"],
            num_train_epochs=1,
            train_sampling_strategy=settings["config"].pop("train_sampling_strategy", "sequential"),
            logging_steps=1,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            use_cpu=not torch.cuda.is_available(),
            **settings["config"],
        ),
        train_dataset=Dataset.from_list(rows),
        processing_class=AutoTokenizer.from_pretrained(settings["base"]),
        peft_config=LoraConfig(
            task_type="CAUSAL_LM",
            r=settings["rank"],
            lora_alpha=2 * settings["rank"],
            target_modules="all-linear",
        ),
        callbacks=[watch],
    )
    data = trainer.train_dataset
    labels = [label for row in data for label in row["labels"]]
    trainer.train()
    answer = {
        "tokens": sum(len(row["input_ids"]) for row in data),
        "labelled_tokens": sum(label != -100 for label in labels),
        "steps": trainer.state.global_step,
        "trainable": sum(p.numel() for p in trainer.model.parameters() if p.requires_grad),
        "losses": watch.losses,
        "step_seconds": watch.seconds,
        "tokens_up_to_step": watch.tokens,
    }
    print(json.dumps(answer))


if __name__ == "__main__":
    main()
