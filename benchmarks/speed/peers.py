"""Other toolkits in environments of their own: how each is installed, told what to train, and started.

All get the same token ids and labels in the same order, 8 examples a step, LoRA rank 16 on all linear modules,
bfloat16; everything else is what the toolkit does by itself. Only LitGPT tokenises on its own.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import site
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from benchmarks.speed.outside import ROOT, run_outside
from benchmarks.speed.subjects import BATCH_SIZE, CLIP, RATE

LINEARS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


@dataclass(frozen=True)
class Job:
    """What a peer has to train; `bin` is its environment's."""

    bin: Path
    base: Path
    tokens: Path  # lines with input_ids and labels
    folder: Path  # for its settings and whatever it writes
    quantization: str

    def rows(self) -> list[dict[str, list[int]]]:
        return [json.loads(line) for line in self.tokens.read_text().splitlines()]

    def write(self, name: str, content: Any) -> Path:
        path = self.folder / name
        path.write_text(json.dumps(content))
        return path


def llamafactory(job: Job) -> list[str]:
    """LLaMA-Factory: a folder of tokens that are there already, and a recipe for its command line."""
    tokens = job.folder / "tokens"
    rows = [{**row, "attention_mask": [1] * len(row["input_ids"])} for row in job.rows()]
    script = "import json,sys,datasets as d; rows=json.load(open(sys.argv[1])); "
    script += "d.DatasetDict(train=d.Dataset.from_list(rows)).save_to_disk(sys.argv[2])"
    path = job.write("rows.json", rows)
    subprocess.run([job.bin / "python", "-c", script, path, tokens], check=True, capture_output=True)
    settings: dict[str, Any] = {
        "model_name_or_path": str(job.base),
        "stage": "sft",
        "do_train": True,
        "use_cpu": True,
        "finetuning_type": "lora",
        "lora_rank": 16,
        "lora_alpha": 32,
        "lora_dropout": 0.0,
        "lora_target": "all",
        "dataset": "rows",
        "tokenized_path": str(tokens),
        "template": "alpaca",
        "cutoff_len": 8192,
        "disable_shuffling": True,
        "per_device_train_batch_size": BATCH_SIZE,
        "num_train_epochs": 1,
        "learning_rate": RATE,
        "lr_scheduler_type": "constant",
        "max_grad_norm": CLIP,
        "bf16": True,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "output_dir": str(job.folder / "out"),
    }
    if job.quantization == "nf4":
        settings |= {"quantization_bit": 4, "quantization_method": "bnb", "double_quantization": True}
    return [str(job.bin / "llamafactory-cli"), "train", str(job.write("llamafactory.yaml", settings))]


def axolotl(job: Job) -> list[str]:
    """axolotl: its kernels off, which are for CUDA, and no autocast, which it refuses without a GPU."""
    rows = [{**row, "attention_mask": [1] * len(row["input_ids"])} for row in job.rows()]
    path = job.folder / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    settings = {
        "base_model": str(job.base),
        "load_in_4bit": job.quantization == "nf4",
        "adapter": "qlora" if job.quantization == "nf4" else "lora",
        "lora_r": 16,
        "lora_alpha": 32,
        "lora_dropout": 0.0,
        "lora_target_linear": True,
        "lora_mlp_kernel": False,
        "lora_qkv_kernel": False,
        "lora_o_kernel": False,
        "datasets": [{"path": str(path), "ds_type": "json", "type": None}],
        "dataset_prepared_path": str(job.folder / "prepared"),
        "val_set_size": 0,
        "sequence_len": 8192,
        "shuffle_merged_datasets": False,
        "curriculum_sampling": True,  # in the order of the rows
        "micro_batch_size": BATCH_SIZE,
        "gradient_accumulation_steps": 1,
        "num_epochs": 1,
        "optimizer": "adamw_torch_fused",
        "learning_rate": RATE,
        "lr_scheduler": "constant",
        "max_grad_norm": CLIP,
        "bf16": False,
        "torch_dtype": "bfloat16",
        "logging_steps": 1,
        "save_strategy": "no",
        "output_dir": str(job.folder / "out"),
        "special_tokens": {"pad_token": "</s>"},
    }
    return [str(job.bin / "axolotl"), "train", str(job.write("axolotl.yaml", settings))]


def unsloth(job: Job) -> list[str]:
    """Unsloth: its model under TRL's trainer, as its own notebooks have it."""
    config = {"learning_rate": RATE, "lr_scheduler_type": "constant", "max_grad_norm": CLIP, "max_length": None}
    config |= {"per_device_train_batch_size": BATCH_SIZE, "shuffle_dataset": False}
    config["output_dir"] = str(job.folder / "out")
    settings = {"base": str(job.base), "tokens": str(job.tokens), "quantization": job.quantization, "targets": LINEARS}
    path = job.write("unsloth.json", {**settings, "config": config})
    return [str(job.bin / "python"), str(ROOT / "benchmarks" / "speed" / "with_unsloth.py"), str(path)]


def litgpt(job: Job) -> list[str]:
    """LitGPT: a checkpoint in its own format, and the rows as texts, which it tokenises itself."""
    script = str(ROOT / "benchmarks" / "speed" / "with_litgpt.py")
    rows = job.base.parent / "rows.json"
    repeats = sum(1 for _ in job.tokens.open()) // len(json.loads(rows.read_text()))
    return [str(job.bin / "python"), script, str(job.base), str(rows), str(repeats), str(job.folder), job.quantization]


@dataclass(frozen=True)
class Peer:
    """What is installed beside the torch of this environment, and how a job becomes a command."""

    command: Callable[[Job], list[str]]
    requirements: tuple[str, ...]
    notes: str
    with_dependencies: bool = True
    removed: tuple[str, ...] = ()
    emptied: tuple[str, ...] = ()  # modules replaced by empty ones


PEERS = {
    "llamafactory": Peer(
        llamafactory,
        ("llamafactory==0.9.5", "bitsandbytes"),
        "torchvision and torchaudio have no build for a CPU in the registry and are taken out again, an empty module "
        "stands for torchaudio, which is imported but not used for text",
        removed=("torchvision", "torchaudio"),
        emptied=("torchaudio",),
    ),
    "axolotl": Peer(
        axolotl,
        ("axolotl==0.19.0",),
        "the newest release for Python 3.11; its kernels are for CUDA and off, bf16 autocast is refused without a GPU: "
        "weights and computation in bfloat16",
    ),
    "unsloth": Peer(
        unsloth,
        ("unsloth==2026.10.9", "unsloth_zoo==2026.10.9"),
        "without its dependencies, of which one is not in the registry (certifi>=2026.10.19); the packages of this "
        "environment stand for them",
        with_dependencies=False,
    ),
    "litgpt": Peer(litgpt, ("litgpt==0.5.13", "bitsandbytes", "requests", "sentencepiece"), "tokenises on its own"),
}


def install(name: str, folder: Path, limit_seconds: float = 600) -> None:
    """A virtual environment with the peer and the torch that is measured here.

    Raises:
        RuntimeError: pip failed, with its last lines.
    """
    peer, environment = PEERS[name], folder / name
    if (environment / "ready").is_file():
        return
    shutil.rmtree(environment, ignore_errors=True)
    subprocess.run([sys.executable, "-m", "venv", environment], check=True)
    torch = f"torch=={version('torch').partition('+')[0]}"
    (environment / "constraints.txt").write_text(torch + "\n")
    pip = [str(environment / "bin" / "python"), "-m", "pip", "--quiet"]
    constraint = ["--constraint", str(environment / "constraints.txt")]
    dependencies = [] if peer.with_dependencies else ["--no-deps"]
    commands = [[*pip, "install", torch], [*pip, "install", *constraint, *dependencies, *peer.requirements]]
    commands += [[*pip, "uninstall", "-y", *peer.removed]] if peer.removed else []
    for command in commands:
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=limit_seconds)
        if done.returncode:
            raise RuntimeError("\n".join(line for line in done.stderr.splitlines() if "WARNING" not in line)[-1500:])
    packages = next((environment / "lib").glob("python*/site-packages"))
    if not peer.with_dependencies:
        (packages / "measured.pth").write_text(site.getsitepackages()[0] + "\n")
    for module in peer.emptied:
        (packages / module).mkdir()
        (packages / module / "__init__.py").touch()
    (environment / "ready").touch()


def versions(name: str, folder: Path) -> dict[str, str]:
    """The versions that matter, as the peer's own environment sees them."""
    names = (name, "torch", "transformers", "peft", "trl", "bitsandbytes", "lightning")
    script = (
        f"import importlib.metadata as m\nfor n in {names}:\n  try: print(n, m.version(n))\n  except Exception: pass"
    )
    command = [folder / name / "bin" / "python", "-c", script]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return dict(line.split() for line in done.stdout.splitlines())


def train_with_peer(name: str, job: Job) -> dict[str, Any]:
    """One process of a peer over the job's tokens: figures from outside, its step losses, counts of the tokens.

    Raises:
        RuntimeError: it failed; the end of what it printed is in the message.
    """
    shutil.rmtree(job.folder, ignore_errors=True)
    job.folder.mkdir()
    command = PEERS[name].command(job)
    path = f"{job.bin}{os.pathsep}{os.environ['PATH']}"
    environment = {"PATH": path, "AXOLOTL_DO_NOT_TRACK": "1", "PYTHONWARNINGS": "ignore"}
    seen = run_outside(command, job.folder / "log", environment=environment, folder=job.folder)
    log = seen.log.read_text(errors="replace")
    if seen.code:
        raise RuntimeError(f"exit code {seen.code}: {' '.join(command)}\n{log[-2000:]}")
    rows = job.rows()
    return {
        **seen.figures(),
        "tokens": sum(len(row["input_ids"]) for row in rows),
        "labelled_tokens": sum(label != -100 for row in rows for label in row["labels"]),
        "losses": _losses(name, job.folder, log),
    }


def _losses(name: str, folder: Path, log: str) -> list[float]:
    """The step losses that a peer printed or wrote."""
    written = folder / "out" / "trainer_log.jsonl"
    if written.is_file():
        entries = [json.loads(line) for line in written.read_text().splitlines()]
        return [entry["loss"] for entry in entries if "loss" in entry]
    pattern = r"loss train: ([\d.]+)" if name == "litgpt" else r"'loss': '?([\d.]+)"
    return [float(found) for found in re.findall(pattern, log)]
