"""Train Alpaca rows with LitGPT; runs in LitGPT's own environment.

    python benchmarks/speed/with_litgpt.py BASE ROWS.json REPEATS FOLDER QUANTIZATION

The base becomes a checkpoint in LitGPT's format, the rows its JSON data, `REPEATS` times one after the other.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
from pathlib import Path

from litgpt import Config
from litgpt.scripts.convert_hf_checkpoint import convert_hf_checkpoint

FILES = ("config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json")

base, rows, repeats, folder, quantization = sys.argv[1:]
checkpoint, data = Path(folder) / "checkpoint", Path(folder) / "data"
checkpoint.mkdir()
data.mkdir()
theirs = json.loads((Path(base) / "config.json").read_text())
config = Config(
    name="measured",
    hf_config={},
    n_layer=theirs["num_hidden_layers"],
    n_head=theirs["num_attention_heads"],
    n_query_groups=theirs["num_key_value_heads"],
    n_embd=theirs["hidden_size"],
    intermediate_size=theirs["intermediate_size"],
    vocab_size=theirs["vocab_size"],
    padded_vocab_size=theirs["vocab_size"],
    block_size=theirs["max_position_embeddings"],
    rotary_percentage=1.0,
    parallel_residual=False,
    bias=False,
    norm_class_name="RMSNorm",
    norm_eps=theirs["rms_norm_eps"],
    mlp_class_name="LLaMAMLP",
)
for name in (*FILES, "model.safetensors"):
    shutil.copyfile(Path(base) / name, checkpoint / name)
Config.from_name = lambda *_args, **_kwargs: config  # its converter knows published names only
convert_hf_checkpoint(checkpoint)
texts = json.loads(Path(rows).read_text())
(data / "train.json").write_text(json.dumps(texts * int(repeats)))
(data / "val.json").write_text(json.dumps(texts[:1]))
options = {
    "out_dir": f"{folder}/out",
    "precision": "bf16-true",
    "lora_r": 16,
    "lora_alpha": 32,
    "lora_dropout": 0.0,
    **{f"lora_{part}": "true" for part in ("query", "key", "value", "projection", "mlp")},
    "data": "JSON",
    "data.json_path": data,
    "data.mask_prompt": "true",
    "data.num_workers": 0,
    "train.global_batch_size": 8,
    "train.micro_batch_size": 8,
    "train.epochs": 1,
    "train.log_interval": 1,
    "train.save_interval": 10**6,
    "train.lr_warmup_steps": 1,  # it divides by them
    "train.max_seq_length": 8192,
    "eval.interval": 10**6,
    "eval.initial_validation": "false",
    "eval.final_validation": "false",
    "eval.evaluate_example": "first",
    "devices": 1,
}
if quantization == "nf4":
    options["quantize"] = "bnb.nf4-dq"
command = [str(Path(sys.executable).parent / "litgpt"), "finetune_lora", str(checkpoint)]
command += [part for name, value in options.items() for part in (f"--{name}", str(value))]
os.execv(command[0], command)
