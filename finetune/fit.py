"""What a recipe would have to change to fit in so much memory: a plan for any changed keys in, the fewest keys out."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from finetune.errors import Problem, UserError
from finetune.machine import GIB
from finetune.plan import Plan
from finetune.plan_layout import FEWEST_TOKENS_PER_PASS, FOUR_BITS

UNITS = {"": 1e9, "gb": 1e9, "g": 1e9, "gib": GIB, "mib": 2**20, "mb": 1e6}
SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*([a-z]*)")
OF_TRAINING = ("load", "step", "evaluate")  # stages that the device has to hold; a merge can be made elsewhere
SHORTEST_ROW, LOWEST_RANK = 256, 4
LAYOUT = ("train.recompute", "train.tokens_per_pass", "train.speedups")  # slower, never another training
Changes = Mapping[str, Any]
Replan = Callable[[Changes], Plan]


@dataclass(frozen=True)
class Fit:
    """The keys to change, none where even all of them are not enough; `peak_gib` is the least that is reached then."""

    gib: float
    fits: bool
    changes: Changes
    peak_gib: float  # with the changes
    kept: bool  # the changes leave the training as it is

    def to_json(self) -> dict[str, Any]:
        return {
            "gib": round(self.gib, 3),
            "fits": self.fits,
            "changes": dict(self.changes),
            "peak_memory_gib": round(self.peak_gib, 3),
            "same_training": self.kept,
        }


def read_size(text: str) -> float:
    """`24GB` (10^9 bytes each, as cards are sold), `22GiB` or `24`, in GiB.

    Raises:
        UserError: it is no size.
    """
    match = SIZE.fullmatch(text.strip().lower())
    if not match or match[2] not in UNITS or not float(match[1]):
        raise UserError(Problem("--fit", f"{text!r} is no size; write it as 24GB or 22.5GiB"))
    return float(match[1]) * UNITS[match[2]] / GIB


def fit_into(gib: float, replan: Replan) -> Fit:
    """The fewest changed keys that make the run fit; first those that cost time only, then those that change it.

    `replan` gives the plan with these keys changed, on the machine that the answer is for.
    """
    changes: dict[str, Any] = {}
    plan = replan(changes)
    for change in _ladder(plan):
        if _peak(plan) <= gib:
            break
        lighter = _tried(replan, {**changes, **change})
        # A pass is no narrower than its longest row: below that a narrower one brings nothing.
        narrows = "train.tokens_per_pass" in change and "train.tokens_per_pass" in changes
        if lighter is not None and (_peak(lighter) < _peak(plan) or (_peak(lighter) == _peak(plan) and not narrows)):
            changes, plan = {**changes, **change}, lighter
    if _peak(plan) > gib:
        return Fit(gib, False, {}, _peak(plan), kept=True)
    changes, plan = _without_needless(changes, plan, gib, replan)
    return Fit(gib, True, changes, _peak(plan), kept=changes.keys() <= set(LAYOUT))


def _peak(plan: Plan) -> float:
    return max(plan.stages_gib[stage] for stage in OF_TRAINING)


def _ladder(plan: Plan) -> Iterator[Changes]:
    """Changes of a plan from the cheapest to the dearest, each beside those before it."""
    train, data, settings = plan.train, "data.max_tokens", plan.settings
    if "weights" in train.speedups:
        yield {"train.speedups": [name for name in train.speedups if name != "weights"]}
    width = train.tokens_per_pass
    while width >= FEWEST_TOKENS_PER_PASS:
        yield {"train.tokens_per_pass": width}
        width //= 2
    if not train.recompute:
        yield {"train.recompute": "all"}
    if plan.model.quantization not in FOUR_BITS:
        yield {"model.quantization": "nf4"}
    if train.optimizer == "adamw":
        yield {"train.optimizer": "adamw-8bit"}
    longest = settings[data] // 2
    while longest >= SHORTEST_ROW:
        more = {"train.tokens_per_pass": longest} if longest < FEWEST_TOKENS_PER_PASS else {}
        yield {data: longest, "data.too_long": "truncate", **more}
        longest //= 2
    rank = plan.adapter.rank // 2
    while rank >= LOWEST_RANK and settings.get("adapter.rank"):
        yield {"adapter.rank": rank}
        rank //= 2


def _tried(replan: Replan, changes: Changes) -> Plan | None:
    """None where these keys do not go together, as a pass that is narrower than its longest row may not."""
    try:
        return replan(changes)
    except UserError:
        return None


def _without_needless(changes: dict[str, Any], plan: Plan, gib: float, replan: Replan) -> tuple[dict[str, Any], Plan]:
    """Leave out what turned out not to be needed, the slowest first."""
    for key in [*LAYOUT, *(key for key in changes if key not in LAYOUT)]:
        if key not in changes or key == "data.too_long":
            continue
        fewer = {name: value for name, value in changes.items() if name != key}
        if "data.max_tokens" not in fewer:
            fewer.pop("data.too_long", None)
        simpler = _tried(replan, fewer)
        if simpler is not None and _peak(simpler) <= gib:
            changes, plan = fewer, simpler
    return changes, plan


def as_override(key: str, value: Any) -> str:
    """As `--set` takes it."""
    return f"{key}={value if isinstance(value, str) else json.dumps(value)}"
