"""Whether a run fits the disk: its plan in; a refusal with both figures, a warning, or nothing out."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

from finetune.errors import Problem, StorageError
from finetune.machine import GIB
from finetune.plan import Plan, run_bytes


def refuse_full_disk(folder: Path, plan: Plan, *, merged_bytes: int) -> None:
    """Before the first step: the checkpoints, the one being written and the adapter must fit what is free.

    What these hold already counts as room, because it is replaced. A later merge on the same disk that would not
    fit is said on stderr.

    Raises:
        StorageError: they do not fit.
    """
    parts = (folder / "checkpoints", folder / "adapter")
    there = sum(file.stat().st_size for part in parts for file in part.rglob("*") if file.is_file())
    needed = max(0, run_bytes(plan.train, plan.trainable_parameters) - there)
    free = shutil.disk_usage(folder).free
    if needed > free:
        message = (
            f"the run needs about {_size(needed)} on this disk (checkpoints and adapter), {_size(free)} are free; make "
            f"room, name a folder on another disk with --out, or lower output.keep_checkpoints (now "
            f"{plan.train.keep_checkpoints})"
        )
        raise StorageError(Problem(str(folder), message))
    if needed + merged_bytes > free:
        sys.stderr.write(
            f"{folder}: the run fits this disk ({_size(free)} free), but with a merged model of about "
            f"{_size(merged_bytes)} it would not; merge to another disk, or make room before\n"
        )


def _size(count: int) -> str:
    return f"{count / GIB:.2f} GiB" if count >= GIB / 100 else f"{count / 2**20:.2f} MiB"
