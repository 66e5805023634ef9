"""What was measured on what: versions, machine, how fast it multiplies at this moment, how busy it is."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import shlex
import statistics
import subprocess
import sys
import time
from typing import Any

PACKAGES = ("torch", "transformers", "trl", "peft", "accelerate", "datasets", "bitsandbytes")
SIZE = 2048  # of the square matrices that are multiplied


def header(command: str) -> dict[str, Any]:
    """What stands at the top of every report."""
    from finetune.machine import probe_machine

    machine = probe_machine()
    return {
        "command": command,
        "date": time.strftime("%Y-%m-%d"),
        "machine": {
            "name": machine.device_name,
            "device": machine.device,
            "cores": machine.cores,
            "memory_gib": round(machine.memory_gib, 1),
            "computes_bfloat16": machine.computes_bfloat16,
            "computes_in_8_bits": machine.computes_in_8_bits,
        },
        "python": platform.python_version(),
        "versions": {name: _version(name) for name in PACKAGES},
        "commit": _commit(),
    }


def command_line() -> str:
    """The command as one would type it again."""
    return shlex.join(["python", os.path.relpath(sys.argv[0]), *sys.argv[1:]])


def moment() -> dict[str, float]:
    """How fast this machine multiplies bfloat16 matrices right now, in TFLOP/s, and its load average."""
    script = f"from benchmarks.speed.facts import product_rate; print(product_rate({SIZE}))"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    return {"product_tflops": float(done.stdout.split()[-1]), "load_average": os.getloadavg()[0]}


def product_rate(size: int, repeats: int = 9) -> float:
    """Median rate of a bfloat16 product of square matrices in TFLOP/s, all cores, on the GPU where there is one."""
    import torch

    device = "cuda" if torch.cuda.is_available() else "cpu"
    left, right = (torch.randn(size, size, device=device).bfloat16() for _ in range(2))
    seconds = []
    for _ in range(repeats + 2):
        started = time.perf_counter()
        left @ right
        if device == "cuda":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - started)
    return 2 * size**3 / statistics.median(seconds[2:]) / 1e12


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _commit() -> str | None:
    answer = subprocess.run(["git", "describe", "--always", "--dirty"], capture_output=True, text=True, check=False)
    return answer.stdout.strip() or None
