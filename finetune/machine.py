"""What this computer offers: the only reader of hardware and environment variables."""

from __future__ import annotations

import ctypes
import logging
import os
import platform
import resource
import shutil
import subprocess
import sys
import warnings
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

GIB = 2**30
SPINS = "300"  # a few microseconds
UNSETTLED_GIB = 0.0625
BFLOAT16_CAPABILITY, FLOAT8_CAPABILITY = (8, 0), (8, 9)


@dataclass(frozen=True)
class Machine:
    """Fixed facts of a computer; nothing here changes from one minute to the next."""

    device: str  # "cpu" or "cuda"
    device_name: str
    cores: int
    memory_gib: float
    device_memory_gib: float  # what the weights and activations must fit into; equals memory_gib on a CPU
    computes_bfloat16: bool
    computes_in_8_bits: str = ""  # what model.compute may be beside auto: int8 or fp8; empty: nothing


def probe_machine() -> Machine:
    """This computer's facts, read from the operating system and, where there is one, from the NVIDIA driver."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    memory_gib = _total_memory_bytes() / GIB
    gpu = _first_gpu()
    if gpu:
        name, gpu_gib, capability = gpu
        in_8_bits = "fp8" if capability >= FLOAT8_CAPABILITY else ""
        return Machine("cuda", name, cores, memory_gib, gpu_gib, capability >= BFLOAT16_CAPABILITY, in_8_bits)
    in_8_bits = "int8" if _cpu_computes_int8() else ""
    return Machine("cpu", _cpu_name(), cores, memory_gib, memory_gib, _cpu_computes_bfloat16(), in_8_bits)


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


def keeps_4bit() -> bool:
    """Whether bases that were quantised to 4 bits may be kept on disk (FINETUNE_4BIT_CACHE, which is on by default)."""
    return os.environ.get("FINETUNE_4BIT_CACHE", "").upper() not in {"0", "FALSE", "NO", "OFF"}


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
    # gloo and the store of several ranks tell on stderr how they try again; what becomes of it, we say ourselves.
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
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
    """Let threads that wait spin for some microseconds only, then sleep; set before torch is imported.

    As soon as another program wants a core, the small products of a small model wait for a thread that is not running:
    benchmarks/shared_cores.py measures it, 2.3 times slower beside one where threads spin for long. Where none spins at
    all, every product begins by waking them.
    """
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    os.environ.setdefault("GOMP_SPINCOUNT", SPINS)


def forget_products() -> None:
    """Let oneDNN keep the programs of few products; set before torch is imported.

    It writes one for every shape and keeps a thousand. Every pass has another length, so that few are used again, and a
    run of a small model would double its memory by them.
    """
    os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "64")
    os.environ.setdefault("LRU_CACHE_CAPACITY", "64")  # of a second cache, torch's own in front of it


def prepare_libraries() -> None:
    """What every process of ours sets before it imports a library."""
    quiet_libraries()
    refuse_fetched_code()
    share_cores()
    forget_products()


def return_freed_memory() -> None:
    """Give the system back what this process has freed; C's allocator keeps it (glibc; elsewhere nothing happens)."""
    library = ctypes.CDLL(None)
    if hasattr(library, "malloc_trim"):
        library.malloc_trim(0)


def settle_memory(most_gib: float) -> float:
    """Return freed memory if this process holds much more than it needs; what to call this with after the next step.

    Passes of changing lengths leave holes that C's allocator seldom fills: without this a run's memory grows for hours.
    What a step needs is what is held after one that began with nothing freed, so that only holes are returned: memory
    that the next step takes again costs it a fault for every page. `most_gib` is the most that was needed so far, or
    negative (or 0) where nothing freed was held when the step began.
    """
    held_gib = resident_gib()
    if most_gib <= 0:
        return max(held_gib, -most_gib)
    if held_gib - most_gib < UNSETTLED_GIB:
        return most_gib
    return_freed_memory()
    return -most_gib


def resident_gib() -> float:
    """What this process holds in memory now."""
    pages = int(Path("/proc/self/statm").read_text().split()[1]) if Path("/proc/self/statm").exists() else 0
    return pages * os.sysconf("SC_PAGE_SIZE") / GIB


@dataclass(frozen=True)
class Work:
    """What processes have done: processor time, and bytes that went through their system calls or came from a disk."""

    processor_seconds: float
    moved_bytes: int

    def is_beyond(self, before: Work, *, by: Work) -> bool:
        """Whether it differs by more than that; what an ended child has moved is not counted any more."""
        more_seconds = abs(self.processor_seconds - before.processor_seconds) > by.processor_seconds
        return more_seconds or abs(self.moved_bytes - before.moved_bytes) > by.moved_bytes


def work_done(root: Path = Path("/proc")) -> Work | None:
    """By this process and its children since they began; None where the system does not say (other than Linux)."""
    if not (root / "self" / "io").is_file():
        return None
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    seconds = sum(each.ru_utime + each.ru_stime for each in used)
    moved = _moved_bytes(root / "self")
    for child in _living_children(root, os.getpid()):
        with suppress(OSError, ValueError, IndexError):  # it may end meanwhile, or be another user's
            ticks = (root / str(child) / "stat").read_text().rpartition(")")[2].split()[11:13]
            seconds += sum(map(int, ticks)) / os.sysconf("SC_CLK_TCK")
            moved += _moved_bytes(root / str(child))
    return Work(seconds, moved)


def _moved_bytes(process: Path) -> int:
    counts = dict(line.split(": ") for line in (process / "io").read_text().splitlines())
    return sum(int(counts[name]) for name in ("rchar", "wchar", "read_bytes"))


def _living_children(root: Path, process: int) -> list[int]:
    """Children and theirs."""
    found: list[int] = []
    for file in (root / str(process) / "task").glob("*/children"):
        with suppress(OSError):
            found += map(int, file.read_text().split())
    return found + [each for child in found for each in _living_children(root, child)]


def free_memory_gib(device: str = "cpu") -> float | None:
    """What is left of a device's memory now: on a CPU the machine's, or its control group's; None if unknown.

    The only fact here that changes from one minute to the next: it may refuse to start a run, never lay one out.
    """
    if device == "cuda":
        free_mib = _ask_gpu("memory.free")
        return float(free_mib[0]) / 1024 if free_mib else None
    found = [_available_bytes(), *_left_in_groups()]
    known = [each for each in found if each is not None]
    return min(known) / GIB if known else None


def _available_bytes() -> int | None:
    info = Path("/proc/meminfo")
    lines = info.read_text().splitlines() if info.exists() else []
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:")), None)


def _left_in_groups(root: Path = Path("/sys/fs/cgroup"), groups: Path = Path("/proc/self/cgroup")) -> list[int]:
    """Limit less use, in this process's control groups and those above (version 2 or 1); their cache counts as free."""
    found = []
    for line in groups.read_text().splitlines() if groups.exists() else []:
        _, controllers, path = line.split(":", 2)
        if controllers not in {"", "memory"}:
            continue
        top = root / controllers
        names = ("memory.limit_in_bytes", "memory.usage_in_bytes") if controllers else ("memory.max", "memory.current")
        for folder in [top / path.strip("/"), *(top / path.strip("/")).parents]:
            if not folder.is_relative_to(top):
                break
            found += _left_in_group(folder, *names)
    return found


def _left_in_group(folder: Path, limit: str, used: str) -> list[int]:
    try:
        most, taken = (folder / limit).read_text().strip(), int((folder / used).read_text())
        lines = (folder / "memory.stat").read_text().splitlines()
    except (OSError, ValueError):
        return []
    cached = next(
        (int(line.split()[1]) for line in lines if line.startswith(("inactive_file ", "total_inactive_file "))), 0
    )
    return [int(most) - taken + cached] if most.isdecimal() and int(most) < 2**60 else []


def _total_memory_bytes() -> int:
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def _first_gpu() -> tuple[str, float, tuple[int, ...]] | None:
    """Name, memory in GiB and compute capability of the first visible NVIDIA GPU, or None."""
    if os.environ.get("CUDA_VISIBLE_DEVICES") in {"", "-1"} or not shutil.which("nvidia-smi"):
        return None
    if not (answer := _ask_gpu("name,memory.total,compute_cap")):
        return None
    name, memory_mib, capability = answer
    return name, float(memory_mib) / 1024, tuple(int(part) for part in capability.split("."))


def _ask_gpu(facts: str) -> list[str] | None:
    """What the driver says of the first GPU."""
    query = ["nvidia-smi", f"--query-gpu={facts}", "--format=csv,noheader,nounits"]
    answer = subprocess.run(query, capture_output=True, text=True, timeout=30, check=False)
    if answer.returncode or not answer.stdout.strip():
        return None
    return [part.strip() for part in answer.stdout.splitlines()[0].split(",")]


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


def _cpu_computes_int8() -> bool:
    """Whether it sums products of 8-bit numbers in 32 bits; with older instructions they saturate at 16."""
    return bool(_cpu_flags() & {"avx512_vnni", "avx_vnni", "amx_int8"})
