"""What this machine can do for finetune: one line per capability, with the cure where one is missing. No torch."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import shutil
import sys
from dataclasses import dataclass

from finetune.calibration import calibrate, read_calibration
from finetune.machine import Machine, cache_folder, is_offline, probe_machine

NEEDED = (
    "torch", "transformers", "peft", "bitsandbytes", "accelerate", "datasets", "trl", "tokenizers", "safetensors",
    "sentencepiece", "tiktoken",
)  # fmt: skip
LOGGERS = ("tensorboard", "wandb", "mlflow", "trackio")


@dataclass(frozen=True)
class Finding:
    """One capability: whether it is there, what was found, and what to do if it is not."""

    name: str
    ok: bool
    found: str
    cure: str = ""


def examine() -> list[Finding]:
    """All findings, the machine first, then the libraries, then the folders."""
    machine = probe_machine()
    return [
        _python(),
        Finding("device", True, f"{machine.device}: {machine.device_name}, {machine.cores} cores"),
        Finding("memory", True, f"{machine.memory_gib:.1f} GiB, on the device {machine.device_memory_gib:.1f} GiB"),
        _bfloat16(machine.computes_bfloat16),
        _in_8_bits(machine.computes_in_8_bits),
        _speed(machine),
        *(_library(name) for name in NEEDED),
        *(Finding(name, True, _version(name) or "not installed (only for output.log_to)") for name in LOGGERS),
        _cache(),
        Finding(
            "network", True, "forbidden by HF_HUB_OFFLINE" if is_offline() else "allowed, for bases a recipe names"
        ),
    ]


def measure_machine() -> None:
    """Measure how fast this machine is and keep the figures; about ten seconds.

    Raises:
        UserError: it cannot be measured.
    """
    calibrate(probe_machine())


def _speed(machine: Machine) -> Finding:
    """What `plan` counts with; a machine that was never measured lacks nothing but the seconds in its plans."""
    found = read_calibration(machine)
    if found is None:
        return Finding("speed", True, "not measured: plan shows no seconds (finetune doctor --calibrate)")
    rates = {dtype: max(rate for _, rate in points) / 1e12 for dtype, points in found.products.items()}
    told = ", ".join(f"{kind} {rate:.2f} T{'' if kind == 'int8' else 'FL'}OP/s" for kind, rate in rates.items())
    return Finding("speed", True, f"{told}, memory {found.bytes_per_second / 1e9:.0f} GB/s")


def _python() -> Finding:
    ok = sys.version_info >= (3, 11)
    return Finding("python", ok, platform.python_version(), "" if ok else "install Python 3.11 or newer")


def _bfloat16(computes: bool) -> Finding:
    found = "computed in hardware" if computes else "not computed in hardware; dtype auto takes float32"
    return Finding("bfloat16", True, found)


def _in_8_bits(kind: str) -> Finding:
    return Finding("8 bits", True, f"model.compute may be {kind}" if kind else "no products for model.compute")


def _library(name: str) -> Finding:
    version = _version(name)
    return Finding(name, version is not None, version or "not installed", "" if version else f"pip install {name}")


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _cache() -> Finding:
    folder = cache_folder()
    parent = next(path for path in (folder, *folder.parents) if path.exists())
    free_gib = shutil.disk_usage(parent).free / 2**30
    ok = os.access(parent, os.W_OK)
    return Finding(
        "cache", ok, f"{folder}, {free_gib:.0f} GiB free", "" if ok else "set XDG_CACHE_HOME to a folder of yours"
    )
