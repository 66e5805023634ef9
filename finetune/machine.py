"""What this computer offers: the only reader of hardware and environment variables."""

from __future__ import annotations

import logging
import os
import platform
import shutil
import subprocess
import sys
import warnings
from dataclasses import dataclass
from pathlib import Path

GIB = 2**30


@dataclass(frozen=True)
class Machine:
    """Fixed facts of a computer; nothing here changes from one minute to the next."""

    device: str  # "cpu" or "cuda"
    device_name: str
    cores: int
    memory_gib: float
    device_memory_gib: float  # what the weights and activations must fit into; equals memory_gib on a CPU
    computes_bfloat16: bool


def probe_machine() -> Machine:
    """This computer's facts, read from the operating system and, where there is one, from the NVIDIA driver."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    memory_gib = _total_memory_bytes() / GIB
    gpu = _first_gpu()
    if gpu:
        name, gpu_gib, major = gpu
        return Machine("cuda", name, cores, memory_gib, gpu_gib, computes_bfloat16=major >= 8)
    return Machine("cpu", _cpu_name(), cores, memory_gib, memory_gib, _cpu_computes_bfloat16())


def cache_folder() -> Path:
    """Where converted tokenizers and other caches lie."""
    root = os.environ.get("XDG_CACHE_HOME")
    return (Path(root) if root else Path.home() / ".cache") / "finetune"


def is_offline() -> bool:
    """Whether the environment forbids the network (HF_HUB_OFFLINE)."""
    return os.environ.get("HF_HUB_OFFLINE", "").upper() in {"1", "TRUE", "YES", "ON"}


def go_offline() -> None:
    """Forbid every library of this process the network; set before they are imported."""
    os.environ["HF_HUB_OFFLINE"] = "1"


def launched_rank() -> tuple[int, int, int]:
    """Rank, rank on this host and number of ranks, as a launcher such as torchrun says; (0, 0, 1) without one."""
    names = ("RANK", "LOCAL_RANK", "WORLD_SIZE")
    rank, local_rank, count = (os.environ.get(name, "") for name in names)
    if not (rank.isdecimal() and local_rank.isdecimal() and count.isdecimal()):
        return 0, 0, 1
    return int(rank), int(local_rank), int(count)


def quiet_libraries() -> None:
    """Switch off the telemetry and the progress bars that libraries start on their own; set before their import."""
    os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    # bitsandbytes tries to fetch a CPU kernel while it is imported, says that it failed, and works without it.
    logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
    # Two deprecations between the pinned libraries, which no user can cure: PEFT reads and TRL sets the old names of
    # activation checkpointing (peft/peft_model.py, trl/trainer/base_config.py).
    for name in ("is_gradient_checkpointing", "gradient_checkpointing"):
        warnings.filterwarnings("ignore", category=FutureWarning, message=f"`{name}` is deprecated")


def refuse_fetched_code() -> None:
    """Let no library of this process fetch programs and run them; set before they are imported.

    transformers replaces layers by compiled kernels from the hub unless USE_HUB_KERNELS says no
    (transformers/integrations/hub_kernels.py); bitsandbytes fetches one while it is imported, asking nobody
    (bitsandbytes/backends/cpu/ops.py). Without the package `kernels` neither can, so that it counts as not installed.
    """
    os.environ["USE_HUB_KERNELS"] = "NO"
    sys.modules.setdefault("kernels", None)  # type: ignore[arg-type]  # `import kernels` raises ImportError


def share_cores() -> None:
    """Let waiting threads sleep instead of spin; set before torch is imported.

    Spinning gains nothing on an idle machine, and as soon as another program wants a core the small products of a small
    model wait for a thread that is not running. benchmarks/shared_cores.py measures it: 2.3 times slower beside one.
    """
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")


def _total_memory_bytes() -> int:
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def _first_gpu() -> tuple[str, float, int] | None:
    """Name, memory in GiB and major compute capability of the first visible NVIDIA GPU, or None."""
    if os.environ.get("CUDA_VISIBLE_DEVICES") in {"", "-1"} or not shutil.which("nvidia-smi"):
        return None
    query = ["nvidia-smi", "--query-gpu=name,memory.total,compute_cap", "--format=csv,noheader,nounits"]
    answer = subprocess.run(query, capture_output=True, text=True, timeout=30, check=False)
    if answer.returncode or not answer.stdout.strip():
        return None
    name, memory_mib, capability = (part.strip() for part in answer.stdout.splitlines()[0].split(","))
    return name, float(memory_mib) / 1024, int(capability.split(".")[0])


def _cpu_flags() -> frozenset[str]:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    return frozenset(next((line.split(":", 1)[1] for line in lines if line.startswith("flags")), "").split())


def _cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())


def _cpu_computes_bfloat16() -> bool:
    return bool(_cpu_flags() & {"avx512_bf16", "amx_bf16"})
