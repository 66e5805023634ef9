"""Train rows of given tokens with Unsloth's model under TRL's SFTTrainer; runs in Unsloth's own environment.

python benchmarks/speed/with_unsloth.py SETTINGS.json
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from unsloth import FastLanguageModel  # first: it changes the libraries below

import torch  # isort: skip
from datasets import Dataset  # isort: skip
from trl import SFTConfig, SFTTrainer  # isort: skip

settings = json.loads(Path(sys.argv[1]).read_text())
rows = [json.loads(line) for line in Path(settings["tokens"]).read_text().splitlines()]
model, tokenizer = FastLanguageModel.from_pretrained(
    settings["base"],
    max_seq_length=8192,
    load_in_4bit=settings["quantization"] == "nf4",
    dtype=torch.bfloat16,
)
model = FastLanguageModel.get_peft_model(model, r=16, lora_alpha=32, lora_dropout=0, target_modules=settings["targets"])
trainer = SFTTrainer(
    model=model,
    processing_class=tokenizer,
    train_dataset=Dataset.from_list(rows),
    args=SFTConfig(
        num_train_epochs=1,
        use_cpu=not torch.cuda.is_available(),
        train_sampling_strategy="sequential",
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        **settings["config"],
    ),
)
trainer.train()
