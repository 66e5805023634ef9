"""Out of memory, told: an allocation that failed somewhere in, its stage, its bytes and the keys to lower out."""

from __future__ import annotations

import errno
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from finetune.errors import OutOfMemoryError, Problem

# What to lower, by stage. All of these may change when the run goes on, where it says so.
PASS = "lower train.tokens_per_pass or set train.recompute: all (both may change in a run that goes on with --resume)"
CURES = {
    "loading the base": "set model.quantization: nf4, or take a smaller base",
    "forward and backward": PASS,
    "optimizer": "set train.optimizer: adamw-8bit or lower adapter.rank, and start again with --out; or " + PASS,
    "evaluation": PASS,
    "saving a checkpoint": PASS,
}
ASKED = re.compile(
    r"ried to allocate (?P<cpu>\d+) bytes|ried to allocate (?P<cuda>[\d.]+ \w?i?B)|"
    r"nable to allocate (?P<numpy>[\d.]+ \w?i?B)"
)


@contextmanager
def out_of_memory_told(stage: Callable[[], str], *, kept: Callable[[], str] = lambda: "") -> Iterator[None]:
    """Turn a failed allocation into an OutOfMemoryError that names `stage()` and, in `kept()`, the last checkpoint."""
    try:
        yield
    except (MemoryError, RuntimeError, OSError) as error:
        if not is_out_of_memory(error):
            raise
        message = f"out of memory, {asked_for(error)}; {CURES[stage()]}{kept()}"
        raise OutOfMemoryError(Problem(stage(), message)) from error


def is_out_of_memory(error: BaseException) -> bool:
    """torch's own error on a GPU, the allocator's on a CPU, Python's, or the kernel's."""
    if isinstance(error, OSError):
        return error.errno == errno.ENOMEM
    words = ("DefaultCPUAllocator", "can't allocate memory", "CUDA out of memory", "Cannot allocate memory")
    is_torchs = type(error).__name__ == "OutOfMemoryError"  # by name, so that this file needs no torch
    return isinstance(error, MemoryError) or is_torchs or any(word in str(error) for word in words)


def asked_for(error: BaseException) -> str:
    found = ASKED.search(str(error))
    if not found:
        return "an unknown number of bytes was asked for"
    amount = found["cuda"] or found["numpy"] or f"{int(found['cpu']):,} bytes"
    return f"{amount} were asked for"
