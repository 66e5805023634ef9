"""Time and memory of the data path: how long `finetune check --only data` takes on a large file, cold and warm.

    python benchmarks/data_path.py ALPACA_FILE TOKENIZER_FOLDER [--times 20] [--rounds 3] [--out FILE]

Cold: an empty cache, so that the tokenizer is converted and every row is read, rendered, tokenised and labelled. Warm:
the same command again. Then the same rows written `--times` times over as JSON lines. Memory is the resident set of
the command and all its worker processes together, looked at every 20 ms.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import lzma
import os
import platform
import shutil
import statistics
import struct
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "special_tokens_map.json")


def base_around(tokenizer: Path, folder: Path) -> Path:
    """A base that is its tokenizer and next to nothing else: the data path never looks at a weight."""
    folder.mkdir()
    for name in TOKENIZER_FILES:
        if (tokenizer / name).is_file():
            shutil.copyfile(tokenizer / name, folder / name)
    config = {"model_type": "llama", "num_hidden_layers": 1, "hidden_size": 32, "vocab_size": 200_000}
    (folder / "config.json").write_text(json.dumps(config))
    header = json.dumps({"model.embed_tokens.weight": {"dtype": "F32", "shape": [1, 1], "data_offsets": [0, 4]}})
    (folder / "model.safetensors").write_bytes(struct.pack("<Q", len(header)) + header.encode() + bytes(4))
    return folder


def write_recipe(folder: Path, base: Path, data: Path) -> Path:
    recipe = {"version": 1, "name": "data-path", "model": {"base": str(base)}}
    recipe["data"] = {"train": str(data), "max_tokens": 4096, "empty_answer": "drop"}
    path = folder / f"{data.name}.recipe.json"
    path.write_text(json.dumps(recipe))
    return path


def check(recipe: Path, cache: Path) -> dict[str, Any]:
    """One `finetune check --only data`: seconds, peak GiB of it and its children, and what it counted."""
    environment = {**os.environ, "XDG_CACHE_HOME": str(cache), "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-m", "finetune", "check", str(recipe), "--only", "data", "--json"]
    started = time.perf_counter()
    with tempfile.TemporaryFile() as output:
        running = subprocess.Popen(command, env=environment, stdout=output, stderr=subprocess.DEVNULL)
        peak_bytes = 0
        while running.poll() is None:
            peak_bytes = max(peak_bytes, resident_bytes(running.pid))
            time.sleep(0.02)
        seconds = time.perf_counter() - started
        output.seek(0)
        answer = json.loads(output.read())
    counted = {"rows": answer["rows"], "tokens": answer["tokens"]}
    return {"seconds": seconds, "peak_gib": peak_bytes / 2**30, "exit_code": running.returncode, **counted}


def resident_bytes(pid: int) -> int:
    """Resident memory of a process and all that descend from it; shared pages count in each."""
    total, waiting = 0, [pid]
    while waiting:
        current = waiting.pop()
        try:
            total += int(Path(f"/proc/{current}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
            waiting += map(int, Path(f"/proc/{current}/task/{current}/children").read_text().split())
        except (OSError, IndexError):
            continue
    return total


def many_times(rows: list[dict], target: Path, times: int) -> Path:
    with target.open("w", encoding="utf-8") as stream:
        lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in rows]
        for _ in range(times):
            stream.writelines(lines)
    return target


def measure(recipe: Path, folder: Path, rounds: int) -> dict[str, Any]:
    """Cold and warm, `rounds` times each, and the medians."""
    runs = []
    for number in range(rounds):
        cache = folder / f"cache-{number}"
        runs.append({"cold": check(recipe, cache), "warm": check(recipe, cache)})
        shutil.rmtree(cache)
        print(f"{recipe.name} round {number}: {runs[-1]}", file=sys.stderr)
    median = {
        f"{kind}_{figure}": statistics.median(run[kind][figure] for run in runs)
        for kind in ("cold", "warm")
        for figure in ("seconds", "peak_gib")
    }
    return {"median": median, "runs": runs}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("tokenizer", type=Path)
    parser.add_argument("--times", type=int, default=20)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out", type=Path)
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        base = base_around(asked.tokenizer, folder / "base")
        result: dict[str, Any] = {
            "machine": {"cores": len(os.sched_getaffinity(0)), "processor": processor()},
            "python": platform.python_version(),
            "libraries": {name: importlib.metadata.version(name) for name in ("tokenizers", "jinja2", "numpy")},
            "once": measure(write_recipe(folder, base, asked.data.absolute()), folder, asked.rounds),
        }
        if asked.times > 1:
            packed = asked.data.read_bytes()
            rows = json.loads(lzma.decompress(packed) if asked.data.suffix == ".xz" else packed)
            large = many_times(rows, folder / "many.jsonl", asked.times)
            result[f"{asked.times} times"] = measure(write_recipe(folder, base, large), folder, 1)
    text = json.dumps(result, indent=1)
    print(text)
    if asked.out:
        asked.out.write_text(text + "\n")


def processor() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "unknown")


if __name__ == "__main__":
    main()
