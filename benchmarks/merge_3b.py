"""Time and memory of a merge: a random bf16 LLaMA of 3.2 billion parameters, an adapter of rank 16 on every linear.

Each measurement is a process of its own; they take turns, and medians are reported. Beside ours: the same merge under
a limit of its address space, the disk's own copy speed (cp of the same files), the proof alone (once), and the usual
way: transformers from_pretrained, PeftModel, merge_and_unload, save_pretrained. The base's files are in the page cache
before each measurement where the memory allows it; nobody waits for the disk to have written (no fsync), which is the
same for all of them. Seconds are without imports.

    python benchmarks/merge_3b.py FOLDER --rounds 3 --out benchmarks/results/merge_3b_2cores.json

FOLDER needs 21 GB for a while; what this script wrote there is removed at the end.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

CHECKOUT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(CHECKOUT))
SIZES = {"hidden_size": 3072, "intermediate_size": 8192, "num_attention_heads": 24, "num_key_value_heads": 8}
VOCABULARY, RANK, SHARD_LAYERS = 128256, 16, 7
KEY_VALUE = SIZES["hidden_size"] // SIZES["num_attention_heads"] * SIZES["num_key_value_heads"]
LINEARS = {  # out, in
    "self_attn.q_proj": (SIZES["hidden_size"], SIZES["hidden_size"]),
    "self_attn.k_proj": (KEY_VALUE, SIZES["hidden_size"]),
    "self_attn.v_proj": (KEY_VALUE, SIZES["hidden_size"]),
    "self_attn.o_proj": (SIZES["hidden_size"], SIZES["hidden_size"]),
    "mlp.gate_proj": (SIZES["intermediate_size"], SIZES["hidden_size"]),
    "mlp.up_proj": (SIZES["intermediate_size"], SIZES["hidden_size"]),
    "mlp.down_proj": (SIZES["hidden_size"], SIZES["intermediate_size"]),
}
LARGEST_GROUP = VOCABULARY * SIZES["hidden_size"] * 2  # bytes of the embedding
LIMIT = 2 * LARGEST_GROUP + 4 * 10**9


def make_base(folder: Path, layers: int) -> None:
    """Config, tokenizer and shards; the random numbers of a tensor are a stretch of one random block."""
    from finetune.base import ASSETS

    folder.mkdir(parents=True)
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        shutil.copyfile(ASSETS / "pocket-llama" / name, folder / name)
    config = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "dtype": "bfloat16", "hidden_act": "silu"}
    config |= {"vocab_size": VOCABULARY, "num_hidden_layers": layers, "tie_word_embeddings": True, **SIZES}
    config |= {"rms_norm_eps": 1e-5, "max_position_embeddings": 4096, "bos_token_id": 0, "eos_token_id": 1}
    (folder / "config.json").write_text(json.dumps(config))
    noise = (torch.randn(1 << 26, generator=torch.Generator().manual_seed(0)) * 0.02).bfloat16()

    def random(place: int, *shape: int) -> torch.Tensor:
        count = shape[0] * shape[1]
        pieces = [noise.roll(place * 9973)] * (1 + count // len(noise))
        return torch.cat(pieces)[:count].reshape(shape)

    shards: list[dict[str, Callable[[], torch.Tensor]]] = [
        {"model.embed_tokens.weight": lambda: random(0, VOCABULARY, SIZES["hidden_size"])}
    ]
    ones = torch.ones(SIZES["hidden_size"], dtype=torch.bfloat16)
    for layer in range(layers):
        if layer % SHARD_LAYERS == 0:
            shards.append({})
        path = f"model.layers.{layer}"
        for norm in ("input_layernorm", "post_attention_layernorm"):
            shards[-1][f"{path}.{norm}.weight"] = ones.clone
        for place, (name, shape) in enumerate(LINEARS.items()):
            shards[-1][f"{path}.{name}.weight"] = lambda at=layer * 7 + place, shape=shape: random(at, *shape)
    shards[-1]["model.norm.weight"] = ones.clone
    weight_map = {}
    for number, shard in enumerate(shards, 1):
        file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        save_file({name: make() for name, make in shard.items()}, folder / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(shard, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def make_adapter(folder: Path, base: Path, layers: int) -> None:
    """A random adapter in PEFT's format."""
    folder.mkdir(parents=True)
    generator = torch.Generator().manual_seed(1)
    tensors = {}
    for layer in range(layers):
        for name, (rows, columns) in LINEARS.items():
            path = f"base_model.model.model.layers.{layer}.{name}"
            tensors[f"{path}.lora_A.weight"] = 0.02 * torch.randn(RANK, columns, generator=generator)
            tensors[f"{path}.lora_B.weight"] = 0.02 * torch.randn(rows, RANK, generator=generator)
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    config: dict[str, Any] = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": RANK, "lora_alpha": 2 * RANK}
    config |= {"target_modules": sorted(name.split(".")[1] for name in LINEARS), "base_model_name_or_path": str(base)}
    (folder / "adapter_config.json").write_text(json.dumps(config))


def merge_ours(adapter: Path, out: Path) -> dict[str, float]:
    """All of `finetune merge` but the proof: check the base's hashes, write, hash what was written."""
    from finetune.release.choice import Choice
    from finetune.release.merge import write_release
    from finetune.release.source import check_base, read_source

    start = time.perf_counter()
    source = read_source(adapter)
    base_sha256 = check_base(source)
    checked = time.perf_counter()
    out.mkdir()
    choice = Choice("original", "original", "as asked", {}, 0, None)
    write_release(out, source, choice, base_sha256=base_sha256, out=out)
    return {"seconds": time.perf_counter() - start, "of_that_hashing_the_base": checked - start}


def merge_usual(adapter: Path, out: Path) -> dict[str, float]:
    """The usual way with transformers and PEFT."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    start = time.perf_counter()
    model = AutoModelForCausalLM.from_pretrained(adapter.parent / "base", dtype=torch.bfloat16)
    PeftModel.from_pretrained(model, str(adapter)).merge_and_unload().save_pretrained(out)
    return {"seconds": time.perf_counter() - start}


def prove_ours(adapter: Path, out: Path) -> dict[str, float]:
    """The proofs of a release that is there."""
    from finetune.release.proof import prove

    start = time.perf_counter()
    proofs = prove(out, adapter)
    failed = [found.name for found in proofs if not found.passed]
    assert not failed, failed
    return {"seconds": time.perf_counter() - start, "proofs": len(proofs)}


def copy(adapter: Path, out: Path) -> dict[str, float]:
    """What the disk and the page cache allow: cp of the base's weights."""
    out.mkdir()
    files = sorted(map(str, (adapter.parent / "base").glob("*.safetensors")))
    start = time.perf_counter()
    subprocess.run(["cp", "--reflink=never", *files, str(out)], check=True)
    return {"seconds": time.perf_counter() - start}


WAYS = {"ours": merge_ours, "ours limited": merge_ours, "usual": merge_usual, "cp": copy, "proof": prove_ours}


def measure(way: str, adapter: Path, out: Path) -> dict[str, float]:
    """One measurement in a process of its own, its peak memory added."""

    def limit() -> None:
        if way == "ours limited":
            resource.setrlimit(resource.RLIMIT_AS, (LIMIT, LIMIT))

    command = [sys.executable, __file__, str(adapter), "--child", way, "--out", str(out)]
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "error"}
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, env=environment, preexec_fn=limit)  # noqa: PLW1509
    return json.loads(done.stdout.strip().splitlines()[-1])


def run_rounds(folder: Path, layers: int, rounds: int, *, with_proof: bool) -> dict[str, Any]:
    """All measurements, round by round, and what they say."""
    base, adapter, out = folder / "base", folder / "adapter", folder / "out"
    make_base(base, layers)
    make_adapter(adapter, base, layers)
    weights = sum(file.stat().st_size for file in base.glob("*.safetensors"))
    runs: dict[str, list[dict[str, float]]] = {}
    for number in range(rounds):
        for way in ("cp", "ours", "usual", "ours limited"):
            shutil.rmtree(out, ignore_errors=True)
            os.sync()
            runs.setdefault(way, []).append(measure(way, adapter, out))
            print(number, way, runs[way][-1], file=sys.stderr)
    if with_proof:  # of the last one, ours
        runs["proof"] = [measure("proof", adapter, out)]
        print("proof", runs["proof"], file=sys.stderr)
    medians = {
        way: {key: statistics.median(run[key] for run in found) for key in found[0]} for way, found in runs.items()
    }
    for found in medians.values():
        found["weight_megabytes_per_second"] = weights / found["seconds"] / 1e6
    return {
        "parameters": weights // 2,
        "weight_bytes": weights,
        "largest_group_bytes": LARGEST_GROUP,
        "address_space_limit_bytes": LIMIT,
        "cores": len(os.sched_getaffinity(0)),
        "versions": {name: version(name) for name in ("torch", "transformers", "peft", "safetensors")},
        "medians": medians,
        "ours_over_usual": {key: medians["ours"][key] / medians["usual"][key] for key in ("seconds", "peak_bytes")},
        "peak_within_two_groups_and_1_gb": medians["ours"]["peak_bytes"] <= 2 * LARGEST_GROUP + 10**9,
        "runs": runs,
    }


def main() -> None:
    """Measure and print; as a child, one way."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--layers", type=int, default=28)
    parser.add_argument("--no-proof", action="store_true")
    parser.add_argument("--child", choices=WAYS)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    if arguments.child:
        import peft  # noqa: F401

        import finetune.release.merge  # noqa: F401  imports are not measured

        answer = WAYS[arguments.child](arguments.folder, arguments.out)
        who = resource.RUSAGE_CHILDREN if arguments.child == "cp" else resource.RUSAGE_SELF
        print(json.dumps(answer | {"peak_bytes": resource.getrusage(who).ru_maxrss * 1024}))
        return
    work = arguments.folder / "merge_3b"
    shutil.rmtree(work, ignore_errors=True)
    try:
        result = run_rounds(work, arguments.layers, arguments.rounds, with_proof=not arguments.no_proof)
    finally:
        shutil.rmtree(work, ignore_errors=True)
    text = json.dumps(result, indent=2)
    print(text)
    if arguments.out:
        arguments.out.write_text(text + "\n")


if __name__ == "__main__":
    main()
