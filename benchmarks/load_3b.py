"""Time and memory of loading a base in nf4: random bf16 LLaMA weights in the shapes of Llama 3.2 3B, in five shards.

Each measurement is a process of its own, at its peak of memory; seconds are without imports. `usual` is transformers
with bitsandbytes from the folder; `first` is load_base with an empty cache, which hashes the base, quantises it and
keeps it; `second` takes it from the cache. Warm: the files are in the page cache before; cold: they were dropped from
it (posix_fadvise), which empties no cache below the system. Bytes are those that went through the system's calls or
were read for a mapped page.

    python benchmarks/load_3b.py FOLDER --out benchmarks/results/load_3b_1core.json

FOLDER needs 10 GB for a while; what this script wrote there is removed at the end.
"""

from __future__ import annotations

import argparse
import json
import os
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

CHECKOUT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(CHECKOUT))
from benchmarks.merge_3b import make_base  # noqa: E402 - after the checkout is on the path

SECOND_STARTS = 3


def usual(base: Path) -> Any:
    """The usual way with transformers and bitsandbytes."""
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    kind: dict[str, Any] = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True}
    settings = BitsAndBytesConfig(bnb_4bit_compute_dtype=torch.bfloat16, **kind)
    return AutoModelForCausalLM.from_pretrained(
        base, dtype=torch.bfloat16, quantization_config=settings, device_map={"": "cpu"}
    )


def ours(base: Path) -> Any:
    """As `finetune train` loads it."""
    from finetune.model.load import load_base
    from finetune.plan import ModelPlan

    plan = ModelPlan(str(base), None, base, "nf4", "bfloat16", "cpu", "documents")
    return load_base(plan, keep=True)


WAYS: dict[str, Callable[[Path], Any]] = {"usual": usual, "ours": ours}


def measure(way: str, base: Path, *, cold: bool) -> dict[str, Any]:
    """One measurement in a process of its own, after its files were put into the page cache or out of it."""
    files = [*base.glob("*.safetensors"), *base.parent.glob("cache/finetune/4bit/*/*")]
    for file in files:
        _drop(file) if cold else _read(file)
    command = [sys.executable, __file__, str(base), "--child", way]
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "XDG_CACHE_HOME": str(base.parent / "cache")}
    load = os.getloadavg()[0]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, env=environment)
    answer = json.loads(done.stdout.strip().splitlines()[-1])
    return answer | {"cold": cold, "load_average_before": round(load, 1)}


def _read(file: Path) -> None:
    with file.open("rb") as stream:
        while stream.read(1 << 24):
            pass


def _drop(file: Path) -> None:
    with file.open("rb") as stream:
        os.fsync(stream.fileno())
        os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def child(way: str, base: Path) -> dict[str, float]:
    """Load, and say what it took."""
    import finetune.model.load  # noqa: F401  imports are not measured

    imported = _resident()
    read, worked, start = _bytes_read(), time.process_time(), time.perf_counter()
    model = WAYS[way](base)
    seconds, worked, read = time.perf_counter() - start, time.process_time() - worked, _bytes_read() - read
    return {
        "seconds": seconds,
        "processor_seconds": worked,
        "bytes_through_calls": read,
        "peak_bytes": _peak(),
        "bytes_after_imports": imported,
        "model_bytes": model.get_memory_footprint(),
    }


def _resident() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def _peak() -> int:
    """Of this program alone: ru_maxrss begins with what the process held that started it."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith("VmHWM:")).split()[1]) * 1024


def _bytes_read() -> int:
    return int(Path("/proc/self/io").read_text().splitlines()[0].split()[1])


def run_all(folder: Path, layers: int) -> dict[str, Any]:
    """All measurements, and what they say."""
    base = folder / "base"
    make_base(base, layers)
    shards = [file.stat().st_size for file in base.glob("*.safetensors")]
    time.sleep(3)  # a file that is younger is hashed again
    runs: dict[str, list[dict[str, Any]]] = {}

    def once(name: str, way: str, *, cold: bool) -> None:
        runs.setdefault(name, []).append(measure(way, base, cold=cold))
        print(name, runs[name][-1], file=sys.stderr)

    once("usual, warm", "usual", cold=False)
    for state, cold in (("warm", False), ("cold", True)):
        shutil.rmtree(folder / "cache", ignore_errors=True)
        once(f"first, {state}", "ours", cold=cold)
        for _ in range(SECOND_STARTS):
            once(f"second, {state}", "ours", cold=cold)
    kept = sum(file.stat().st_size for file in folder.glob("cache/finetune/4bit/*/*"))
    numbers = ("seconds", "processor_seconds", "bytes_through_calls", "peak_bytes")
    medians = {
        name: {key: statistics.median(run[key] for run in found) for key in numbers} for name, found in runs.items()
    }
    allowed = kept + max(shards) + 10**9
    return {
        "parameters": sum(shards) // 2,
        "shards_bytes": shards,
        "kept_bytes": kept,
        "allowed_peak_bytes": allowed,
        "peak_is_within": {name: found["peak_bytes"] <= allowed for name, found in medians.items()},
        "first_over_second": {
            state: {key: medians[f"first, {state}"][key] / medians[f"second, {state}"][key] for key in numbers[:2]}
            for state in ("warm", "cold")
        },
        "cores": len(os.sched_getaffinity(0)),
        "threads": torch.get_num_threads(),
        "versions": {name: version(name) for name in ("torch", "transformers", "bitsandbytes", "safetensors")},
        "medians": medians,
        "runs": runs,
    }


def main() -> None:
    """Measure and print; as a child, one way."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--layers", type=int, default=28)
    parser.add_argument("--child", choices=WAYS)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    if arguments.child:
        print(json.dumps(child(arguments.child, arguments.folder)))
        return
    work = arguments.folder / "load_3b"
    shutil.rmtree(work, ignore_errors=True)
    try:
        result = run_all(work, arguments.layers)
    finally:
        shutil.rmtree(work, ignore_errors=True)
    text = json.dumps(result, indent=2)
    print(text)
    if arguments.out:
        arguments.out.write_text(text + "\n")


if __name__ == "__main__":
    main()
