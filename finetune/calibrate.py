"""Measure this machine, in a process of its own: a device in, figures on stdout out. See finetune/calibration.py."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable

import torch

import finetune.train.train  # noqa: F401 - a training run imports as much
from finetune.machine import resident_gib
from finetune.model.fast.eight_bit import MATRICES

WIDTHS = (128, 512, 2048)
TOKENS = 1024
DTYPES = ("float32", "bfloat16", "float16")
SECONDS_EACH = 0.4  # of repetitions; the fastest counts
COPIED_BYTES = 2**26
OPERATIONS = 100


def main() -> None:
    """Prints the figures as a line of JSON.

    Arguments: the device, how it computes in 8 bits (empty if it does not), and when this process was started
    (time.time).
    """
    device, in_8_bits, started = sys.argv[1], sys.argv[2], float(sys.argv[3])
    imported = time.time() - started
    resident = resident_gib()
    dtypes = DTYPES if device == "cuda" else DTYPES[:2]
    products = {dtype: [[n, _product_rate(n, dtype, device)] for n in WIDTHS] for dtype in dtypes}
    if in_8_bits:
        products[in_8_bits] = [[n, _rate_in_8_bits(n, in_8_bits, device)] for n in WIDTHS]
    figures = {
        "products": products,
        "bytes_per_second": _bytes_per_second(device),
        "operation_seconds": _operation_seconds(device),
        "runtime_gib": resident,
        "import_seconds": imported,
    }
    print(json.dumps(figures))  # noqa: T201 - the parent reads it


def _product_rate(n: int, dtype: str, device: str) -> float:
    """Floating-point operations a second of [TOKENS, n] x [n, n]."""
    left = torch.randn(TOKENS, n, device=device, dtype=getattr(torch, dtype))
    right = torch.randn(n, n, device=device, dtype=getattr(torch, dtype))
    return 2 * TOKENS * n * n / _fastest(lambda: torch.nn.functional.linear(left, right), device)


def _rate_in_8_bits(n: int, kind: str, device: str) -> float:
    """The same of a frozen weight in 8 bits, with all that rounds its rows and scales what comes out."""
    left = torch.randn(TOKENS, n, device=device, dtype=torch.bfloat16)
    right = MATRICES[kind](torch.randn(n, n, device=device, dtype=torch.bfloat16))
    return 2 * TOKENS * n * n / _fastest(lambda: right.product(left), device)


def _bytes_per_second(device: str) -> float:
    """Of one operation that reads a tensor larger than the caches and writes another."""
    source = torch.ones(COPIED_BYTES // 4, device=device)
    target = torch.empty_like(source)
    return 2 * COPIED_BYTES / _fastest(lambda: torch.neg(source, out=target), device)


def _operation_seconds(device: str) -> float:
    """Of one operation on a few numbers, forward and backward."""
    start = torch.ones(16, device=device, requires_grad=True)

    def several() -> None:
        x = start
        for _ in range(OPERATIONS):
            x = x * 1.0
        x.sum().backward()

    alone = torch.get_num_threads() if device == "cpu" else 1  # so small an operation has one core
    return _fastest(several, device) * alone / (2 * OPERATIONS)


def _fastest(work: Callable[[], object], device: str) -> float:
    """Seconds of the fastest of many repetitions, the first few left out.

    On a CPU the time that all cores worked, shared among them: other programs, which share the cores, add little to it.
    """
    clock = time.perf_counter if device == "cuda" else time.process_time
    times: list[float] = []
    until = time.perf_counter() + SECONDS_EACH
    while len(times) < 5 or time.perf_counter() < until:
        started = clock()
        work()
        if device == "cuda":
            torch.cuda.synchronize()
        times.append(clock() - started)
    return min(times[2:]) / (1 if device == "cuda" else torch.get_num_threads())
