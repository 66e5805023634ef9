"""Machines that a plan can be made for without having one: a name in; its memory and assumed speeds out.

Memory is what the driver reports, rates are those of the makers' data sheets: dense products in bfloat16 with sums in
float32 (float32 where bfloat16 is not computed), bytes a second of the device's memory. What a run gets of them is an
assumption, and every answer that follows from it says so.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from finetune.calibration import Calibration
from finetune.errors import Problem, UserError
from finetune.machine import Machine
from finetune.recipe_problems import did_you_mean

PRODUCTS_SHARE, MEMORY_SHARE = 0.4, 0.7  # of the makers' figures
OPERATION_SECONDS = {"cuda": 5e-6, "cpu": 2e-5}  # of a small operation with its gradient
CPU_RUNTIME_GIB = 0.49
IMPORT_SECONDS = 10.0


@dataclass(frozen=True)
class Named:
    """A machine by its data sheet; rates in 10^12 operations a second, memory in GiB, its traffic in 10^9 bytes."""

    title: str
    device: str
    memory_gib: float
    float32: float
    gigabytes_per_second: float
    bfloat16: float = 0.0  # 0: not computed, so that float32 is
    float8: float = 0.0  # with sums in float32; 0: not computed
    cores: int = 8


NAMED = {
    "h200": Named("NVIDIA H200 141 GB", "cuda", 140.4, 67, 4800, 989, 1979),
    "h100": Named("NVIDIA H100 SXM 80 GB", "cuda", 79.6, 67, 3350, 989, 1979),
    "a100-80": Named("NVIDIA A100 SXM 80 GB", "cuda", 80.0, 19.5, 2039, 312),
    "a100-40": Named("NVIDIA A100 SXM 40 GB", "cuda", 39.5, 19.5, 1555, 312),
    "l40s": Named("NVIDIA L40S 48 GB", "cuda", 45.0, 91.6, 864, 362, 733),
    "4090": Named("NVIDIA GeForce RTX 4090", "cuda", 24.0, 82.6, 1008, 165.2, 330.3),
    "3090": Named("NVIDIA GeForce RTX 3090", "cuda", 24.0, 35.6, 936, 71),
    "t4": Named("NVIDIA T4", "cuda", 15.0, 8.1, 300),
    "mac": Named("a Mac of 32 GB, computing on its processor", "cpu", 32.0, 1.5, 100),
    "cpu": Named("a computer of 8 cores and 32 GB without a GPU", "cpu", 32.0, 1.0, 40),
}


def named_machine(name: str) -> tuple[Machine, Calibration]:
    """The machine of that name, and how fast it is assumed to compute.

    Raises:
        UserError: no machine has this name.
    """
    if name.lower() not in NAMED:
        hint = did_you_mean(name.lower(), NAMED) or ""
        raise UserError(Problem("--on", f"{name!r} is not known{hint}; write one of {', '.join(NAMED)}"))
    named = NAMED[name.lower()]
    machine = Machine(
        named.device,
        named.title,
        named.cores,
        named.memory_gib,
        named.memory_gib,
        computes_bfloat16=named.bfloat16 > 0,
        computes_in_8_bits="fp8" if named.float8 else "",
    )
    rates = {"float32": named.float32, "bfloat16": named.bfloat16 or named.float32, "float16": named.bfloat16}
    rates |= {"fp8": named.float8} if named.float8 else {}
    calibration = Calibration(
        products={dtype: ((1, (rate or named.float32) * 1e12 * PRODUCTS_SHARE),) for dtype, rate in rates.items()},
        bytes_per_second=named.gigabytes_per_second * 1e9 * MEMORY_SHARE,
        operation_seconds=OPERATION_SECONDS[named.device],
        runtime_gib=CPU_RUNTIME_GIB,
        import_seconds=IMPORT_SECONDS,
    )
    return machine, calibration


def assumptions(name: str) -> Iterator[str]:
    """What the seconds of a plan for this machine rest on, a line each."""
    named = NAMED[name.lower()]
    dtype, rate = ("bfloat16", named.bfloat16) if named.bfloat16 else ("float32", named.float32)
    dtype += f" ({named.float8:g} in fp8)" if named.float8 else ""
    whose = "its data sheet" if named.device == "cuda" else "a guess at such machines"
    speeds = f"{rate:g} TFLOP/s in {dtype}, {named.gigabytes_per_second:g} GB/s"
    yield f"{named.title}: {named.memory_gib:g} GiB, {speeds} ({whose})"
    yield f"products run at {PRODUCTS_SHARE:.0%} of that rate, memory moves at {MEMORY_SHARE:.0%} of it"
    yield f"each small operation takes {OPERATION_SECONDS[named.device] * 1e6:g} millionths of a second to start"
    yield "steps alone: without loading, evaluations and saves, on a machine with nothing else to do; not measured"
