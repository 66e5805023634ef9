"""How fast this machine computes, measured once and kept in the cache: a file in, a Calibration out. No torch."""

from __future__ import annotations

import importlib.metadata
import json
import math
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from finetune.errors import Problem, UserError
from finetune.machine import Machine, cache_folder

PACKAGE_PARENT = Path(__file__).resolve().parents[1]
MEASURE = "import sys; sys.path.insert(0, sys.argv.pop(1)); from finetune.machine import prepare_libraries; "
MEASURE += "prepare_libraries(); from finetune.calibrate import main; main()"


@dataclass(frozen=True)
class Calibration:
    """What was measured; products are [tokens, n] x [n, n], and stand as (n, floating-point operations a second)."""

    products: dict[str, tuple[tuple[int, float], ...]]  # by dtype, or int8 or fp8 (model.compute); n ascending
    bytes_per_second: float  # read and written by one simple operation
    operation_seconds: float  # of one operation on a few numbers, with its gradient
    runtime_gib: float  # resident in a process that has imported everything and trained a few numbers
    import_seconds: float

    def product_seconds(self, operations: float, *, dtype: str, width: float) -> float:
        """Of so many floating-point operations in products whose matrices are about `width` wide.

        Between two measured widths the rate is interpolated over logarithms, beyond them it stays.
        """
        points = self.products[dtype]
        at = math.log(max(width, 1.0))
        logs = [(math.log(n), math.log(rate)) for n, rate in points]
        if at <= logs[0][0]:
            return operations / points[0][1]
        for (low, slow), (high, fast) in zip(logs, logs[1:], strict=False):
            if at <= high:
                return operations / math.exp(slow + (fast - slow) * (at - low) / (high - low))
        return operations / points[-1][1]


def calibration_file() -> Path:
    return cache_folder() / "calibration.json"


def read_calibration(machine: Machine) -> Calibration | None:
    """What was measured here with these libraries and as many cores; None if it was not, or cannot be read."""
    try:
        stored = json.loads(calibration_file().read_text(encoding="utf-8"))
        if stored["machine"] != _conditions(machine):
            return None
        figures = stored["figures"]
        products = {
            dtype: tuple((int(n), float(rate)) for n, rate in each) for dtype, each in figures["products"].items()
        }
        found = Calibration(**{**figures, "products": products})
        return found if _is_usable(found) else None
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None


def calibrate(machine: Machine) -> Calibration:
    """Measure this machine in a process of its own, about ten seconds, and keep the figures.

    Raises:
        UserError: the measurement failed.
    """
    child = [sys.executable, "-P", "-c", MEASURE, str(PACKAGE_PARENT), machine.device, machine.computes_in_8_bits]
    child += [str(time.time())]
    done = subprocess.run(child, capture_output=True, text=True, check=False)
    if done.returncode:
        said = (done.stderr.strip().splitlines() or ["it gave no reason"])[-1]
        raise UserError(Problem("calibration", f"the measurement failed: {said}; see finetune doctor"))
    keep_calibration(machine, json.loads(done.stdout.splitlines()[-1]))
    found = read_calibration(machine)
    if found is None:
        raise UserError(Problem(str(calibration_file()), "the figures cannot be read back; measure again"))
    return found


def keep_calibration(machine: Machine, figures: dict[str, Any]) -> None:
    """Write the figures with what they hold for, so that the file is whole or not there."""
    file = calibration_file()
    file.parent.mkdir(parents=True, exist_ok=True)
    staging = file.with_suffix(".partial")
    staging.write_text(json.dumps({"machine": _conditions(machine), "figures": figures}, indent=2), encoding="utf-8")
    staging.replace(file)


def figures_of(calibration: Calibration) -> dict[str, Any]:
    """Plain JSON values."""
    return asdict(calibration)


def _conditions(machine: Machine) -> dict[str, Any]:
    """What the figures hold for."""
    try:
        version = importlib.metadata.version("torch")
    except importlib.metadata.PackageNotFoundError:
        version = "none"
    in_8_bits = {"in_8_bits": machine.computes_in_8_bits} if machine.computes_in_8_bits else {}
    return {"device": machine.device_name, "cores": machine.cores, "torch": version, **in_8_bits}


def _is_usable(found: Calibration) -> bool:
    rates: Sequence[float] = [rate for points in found.products.values() for _, rate in points]
    widths = [[n for n, _ in points] for points in found.products.values()]
    figures = [*rates, found.bytes_per_second, found.operation_seconds, found.runtime_gib, found.import_seconds]
    ascending = all(each and each == sorted(set(each)) and each[0] > 0 for each in widths)
    return {"float32"} <= found.products.keys() and ascending and all(0 < f < math.inf for f in figures)
