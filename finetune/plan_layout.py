"""Resolve how a run's passes are laid out: a recipe, the data and what the run began with in; a Layout out.

Nothing here changes what is trained, only how fast and in how much memory.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, get_args

from finetune.base import BaseFacts
from finetune.errors import Problem
from finetune.recipe import Recipe, Speedup

SPEEDUPS: tuple[str, ...] = get_args(Speedup)
AUTO_TOKENS_PER_PASS = {"cpu": 3072, "cuda": 8192}
FEWEST_TOKENS_PER_PASS = 512
FOUR_BITS = ("nf4", "fp4")


@dataclass(frozen=True)
class Layout:
    """The resolved layout keys of a recipe."""

    tokens_per_pass: int
    recompute: bool
    speedups: tuple[str, ...]  # in the order of SPEEDUPS

    def settings(self) -> dict[str, Any]:
        """As a recipe would write them."""
        return {
            "train.tokens_per_pass": self.tokens_per_pass,
            "train.recompute": "all" if self.recompute else "none",
            "train.speedups": list(self.speedups) or "none",
        }


@dataclass(frozen=True)
class Lowered:
    """After out of memory: how passes are laid out from `step` on (1 is the first), until the next such entry."""

    step: int
    tokens_per_pass: int
    recompute: bool

    def told(self, before: Lowered) -> str:
        """What became of the layout before, in the recipe's words."""
        if self.recompute != before.recompute:
            return "train.recompute is all"
        return f"train.tokens_per_pass is {self.tokens_per_pass} (was {before.tokens_per_pass})"


def possible_layouts(
    recipe: Recipe, base: BaseFacts, *, longest: int, device: str, begun: Mapping[str, Any] | None = None
) -> Iterator[Layout]:
    """Layouts that the recipe allows, the fastest first, each needing less memory or as little as the one before.

    `longest` is the number of tokens of the longest example. `begun` are the settings in the plan.json of a run that
    goes on: what the recipe leaves to `auto` is taken from there, so that the rest of the run is computed as its
    beginning was. A run from before a key had none of it.
    """
    asked = recipe.train
    before = begun or {}
    most = before.get("train.tokens_per_pass") or max(AUTO_TOKENS_PER_PASS[device], longest)
    # Dequantised experts are kept for the gradients: all layers' at once would be the whole base in 16 bits.
    experts_in_4_bits = bool(base.experts) and recipe.model.quantization in FOUR_BITS
    recompute = before.get("train.recompute", "none") if begun is not None else "all" if experts_in_4_bits else "none"
    speedups = _possible_speedups(recipe, base) if begun is None else before.get("train.speedups", "none")
    fastest = Layout(
        tokens_per_pass=most if asked.tokens_per_pass == "auto" else asked.tokens_per_pass,
        recompute=(recompute if asked.recompute == "auto" else asked.recompute) == "all",
        speedups=_in_order(speedups if asked.speedups == "auto" else asked.speedups),
    )
    yield fastest
    if begun is not None:
        return
    widths = [fastest.tokens_per_pass]
    while asked.tokens_per_pass == "auto" and widths[-1] // 2 >= max(longest, FEWEST_TOKENS_PER_PASS):
        widths.append(widths[-1] // 2)
    without = replace(fastest, speedups=tuple(name for name in fastest.speedups if name != "weights"))
    lighter = [fastest, without] if asked.speedups == "auto" else [fastest]
    lighter += [replace(lighter[-1], recompute=True)] if asked.recompute == "auto" else []
    yield from (replace(layout, tokens_per_pass=width) for layout in lighter for width in widths)


def layout_problems(recipe: Recipe, base: BaseFacts) -> list[Problem]:
    """Speedups that were asked for by name and cannot be had."""
    asked = recipe.train.speedups
    if isinstance(asked, str):
        return []
    problems = [f"{name} {reason}" for name, reason in _impossible(recipe, base).items() if name in asked]
    if "weights" in asked and "linears" not in asked:
        problems.append("weights are those of linears, which has to stand beside it")
    return [Problem("train.speedups", f"{problem}; leave it out, or write auto") for problem in problems]


def _possible_speedups(recipe: Recipe, base: BaseFacts) -> tuple[str, ...]:
    impossible = _impossible(recipe, base)
    return tuple(name for name in SPEEDUPS if name not in impossible)


def _impossible(recipe: Recipe, base: BaseFacts) -> dict[str, str]:
    """What this recipe cannot have, and why."""
    found: dict[str, str] = {}
    if not base.isolates_by_documents:
        reason = "is for bases with plain causal attention in every layer"
        found |= {"attention": reason, "prefix": reason}
    if recipe.adapter.dropout > 0:
        found["prefix"] = "cannot go with adapter.dropout: every example drops other inputs of the same beginning"
    return found


def _in_order(names: str | tuple[str, ...] | list[str]) -> tuple[str, ...]:
    return () if isinstance(names, str) else tuple(name for name in SPEEDUPS if name in names)
