"""Real tokens per second of a training step: finetune beside TRL's SFTTrainer with its defaults.

A random-weight 160M LLaMA (hidden 768, 12 layers, vocabulary 32,000), LoRA rank 16 on all linear modules, Alpaca rows,
one epoch of 8 examples a step. Every measurement is a process of its own; contenders take turns, so that a machine
whose speed drifts slows both. Real tokens are the tokens of the rows; padding does not count.

    python benchmarks/training_speed.py --shared ../shared/data --rows 160 --rounds 3 --out benchmarks/results/NAME.json
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import platform
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

BATCH_SIZE = 8
CONTENDERS = ("finetune", "trl")


def make_base(folder: Path, tokenizer_folder: Path) -> None:
    """Write the random 160M LLaMA with the Llama 2 tokenizer, in bfloat16."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=768, intermediate_size=2048, num_hidden_layers=12, num_attention_heads=12, vocab_size=32000,
        max_position_embeddings=2048,
    )  # fmt: skip
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)
    for file in tokenizer_folder.iterdir():
        shutil.copyfile(file, folder / file.name)


def write_recipe(folder: Path, base: Path, data: Path, quantization: str) -> Path:
    """The recipe both contenders train; JSON is YAML."""
    recipe = {
        "version": 1,
        "name": "speed",
        "model": {"base": str(base), "quantization": quantization, "dtype": "bfloat16"},
        "adapter": {"rank": 16, "alpha": 32},
        "data": {"train": str(data), "template": "alpaca", "max_tokens": 1024},
        "train": {"epochs": 1, "batch_size": BATCH_SIZE, "learning_rate": 2e-4},
        "output": {"folder": str(folder / "run"), "save_every_steps": 10**6},
    }
    path = folder / "recipe.json"
    path.write_text(json.dumps(recipe))
    return path


def run_finetune(recipe: Path) -> dict[str, float]:
    """Train with finetune; its own figures."""
    from finetune.run import run

    folder = run(recipe)
    entries = [json.loads(line) for line in (folder.path / "metrics.jsonl").read_text().splitlines()]
    tokens = sum(entry["tokens"] for entry in entries)
    return {"tokens_per_second": folder.result["tokens_per_second"], "tokens": tokens, "loss": entries[-1]["loss"]}


def run_trl(recipe: Path) -> dict[str, float]:
    """Train the same rows with TRL's SFTTrainer: prompt-completion rows, every setting TRL's default but the batch."""
    from datasets import Dataset
    from peft import LoraConfig
    from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
    from trl import SFTConfig, SFTTrainer

    from finetune.model.load import quantization_config
    from finetune.resolve import resolve

    resolved = resolve(recipe)
    plan, examples = resolved.plan, resolved.data.train
    rows = [
        {"prompt": e.text[: e.spans[0][0]].removeprefix("<s>"), "completion": e.text[e.spans[0][0] :]} for e in examples
    ]
    import torch

    quantization = quantization_config(plan.model.quantization, torch.bfloat16)
    model = AutoModelForCausalLM.from_pretrained(
        plan.model.folder, dtype=torch.bfloat16, quantization_config=quantization
    )
    seconds: list[float] = []

    class Clock(TrainerCallback):
        def on_step_begin(self, *_: Any, **__: Any) -> None:
            seconds.append(-time.perf_counter())

        def on_step_end(self, *_: Any, **__: Any) -> None:
            seconds[-1] += time.perf_counter()

    trainer = SFTTrainer(
        model=model,
        args=SFTConfig(
            output_dir=str(recipe.parent / "trl"), per_device_train_batch_size=BATCH_SIZE, num_train_epochs=1,
            use_cpu=not torch.cuda.is_available(), save_strategy="no", report_to="none",
        ),
        train_dataset=Dataset.from_list(rows),
        processing_class=AutoTokenizer.from_pretrained(plan.model.folder),
        peft_config=LoraConfig(task_type="CAUSAL_LM", r=16, lora_alpha=32, target_modules=list(plan.adapter.targets)),
        callbacks=[Clock()],
    )  # fmt: skip
    trained_tokens = sum(len(row["input_ids"]) for row in trainer.train_dataset)
    trainer.train()
    last = trainer.state.log_history[-1]["train_loss"]
    return {"tokens_per_second": trained_tokens / sum(seconds), "tokens": trained_tokens, "loss": last}


def measure_in_child(contender: str, recipe: Path) -> dict[str, float]:
    """One contender in a fresh process: its figures and its peak memory."""
    shutil.rmtree(recipe.parent / "run", ignore_errors=True)
    command = [sys.executable, __file__, "--child", contender, str(recipe)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(done.stderr)
    return json.loads(done.stdout.splitlines()[-1])


def child(contender: str, recipe: Path) -> None:
    """Measure in this process and print one JSON line."""
    from finetune.machine import quiet_libraries

    quiet_libraries()
    figures = (run_finetune if contender == "finetune" else run_trl)(recipe)
    figures["peak_memory_gib"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    print(json.dumps(figures))


def versions() -> dict[str, Any]:
    """What was measured, and on what."""
    import importlib.metadata

    from finetune.machine import probe_machine

    names = ("torch", "transformers", "trl", "peft", "bitsandbytes")
    machine = probe_machine()
    return {
        "versions": {name: importlib.metadata.version(name) for name in names},
        "python": platform.python_version(),
        "machine": {"name": machine.device_name, "cores": machine.cores, "device": machine.device},
        "date": time.strftime("%Y-%m-%d"),
    }


def compare(arguments: argparse.Namespace) -> dict[str, Any]:
    """All rounds of all contenders, and the median ratios."""
    shared = Path(arguments.shared)
    results: dict[str, Any] = {"rows": arguments.rows, "batch_size": BATCH_SIZE, **versions(), "runs": []}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        make_base(folder / "base", shared / "tokenizers" / "llama2")
        rows = json.loads((shared / "alpaca" / "alpaca_en_demo.json").read_text())[: arguments.rows]
        (folder / "rows.json").write_text(json.dumps(rows))
        for number, quantization in itertools.product(range(arguments.rounds), arguments.quantization):
            recipe = write_recipe(folder, folder / "base", folder / "rows.json", quantization)
            for contender in CONTENDERS:
                figures = measure_in_child(contender, recipe)
                run = {"round": number, "contender": contender, "quantization": quantization, **figures}
                results["runs"].append(run)
                print(run, flush=True)
    results["medians"] = {q: medians(results["runs"], q) for q in arguments.quantization}
    return results


def medians(runs: list[dict[str, Any]], quantization: str) -> dict[str, float]:
    """Median tokens per second of both, and the median of the round-by-round ratios."""
    speed = {
        contender: [
            r["tokens_per_second"] for r in runs if (r["contender"], r["quantization"]) == (contender, quantization)
        ]
        for contender in CONTENDERS
    }
    ratios = [ours / theirs for ours, theirs in zip(speed["finetune"], speed["trl"], strict=True)]
    return {**{name: statistics.median(values) for name, values in speed.items()}, "ratio": statistics.median(ratios)}


def main() -> None:
    """Parse the command line and print or write the comparison."""
    if sys.argv[1:2] == ["--child"]:
        child(sys.argv[2], Path(sys.argv[3]))
        return
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shared", default="../shared/data")
    parser.add_argument("--rows", type=int, default=160)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--quantization", nargs="+", default=["nf4", "none"])
    parser.add_argument("--out")
    arguments = parser.parse_args()
    os.environ["HF_HUB_OFFLINE"] = "1"
    text = json.dumps(compare(arguments), indent=2)
    print(text)
    if arguments.out:
        Path(arguments.out).write_text(text + "\n")


if __name__ == "__main__":
    main()
