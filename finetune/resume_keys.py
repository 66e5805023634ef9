"""What may change when a run goes on: the settings it began with and those of now in, what follows or a refusal out."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from finetune.errors import Problem

MUST_MATCH = "must match"  # the rest of the run would not be the run that began
LENGTH = "length"  # more steps go on, with the schedule of the longer run; fewer are refused
LAYOUT = "layout"  # speed and memory only: the same training up to rounding
FREE = "free"  # takes effect from here on and changes no step

# Every key of a recipe; the test of this table asks the recipe for its keys.
KEYS = {
    "version": MUST_MATCH,
    "name": MUST_MATCH,  # under another name it is another run
    "seed": MUST_MATCH,
    "model.base": MUST_MATCH,
    "model.revision": MUST_MATCH,
    "model.quantization": MUST_MATCH,
    "model.dtype": MUST_MATCH,
    "model.compute": MUST_MATCH,
    "adapter.method": MUST_MATCH,
    "adapter.rank": MUST_MATCH,
    "adapter.alpha": MUST_MATCH,
    "adapter.dropout": MUST_MATCH,
    "adapter.targets": MUST_MATCH,
    "adapter.layers": MUST_MATCH,
    "adapter.rank_by": MUST_MATCH,
    "adapter.alpha_by": MUST_MATCH,
    "adapter.start": MUST_MATCH,
    "adapter.learning_rate_ratio": MUST_MATCH,
    "adapter.block_size": MUST_MATCH,
    "adapter.train_tokens": MUST_MATCH,
    "adapter.also_train": MUST_MATCH,
    "adapter.from": MUST_MATCH,
    "data.train": MUST_MATCH,
    "data.eval": MUST_MATCH,
    "data.format": MUST_MATCH,
    "data.template": MUST_MATCH,
    "data.loss_on": MUST_MATCH,
    "data.max_tokens": MUST_MATCH,
    "data.too_long": MUST_MATCH,
    "data.truncate": MUST_MATCH,
    "data.empty_answer": MUST_MATCH,
    "data.special_tokens": MUST_MATCH,
    "data.deduplicate": MUST_MATCH,
    "data.leaked": MUST_MATCH,
    "data.drop": MUST_MATCH,
    "data.system": MUST_MATCH,
    "data.date": MUST_MATCH,
    "train.objective": MUST_MATCH,
    "train.epochs": LENGTH,
    "train.max_steps": LENGTH,
    "train.batch_size": MUST_MATCH,
    "train.tokens_per_pass": LAYOUT,
    "train.recompute": LAYOUT,
    "train.speedups": LAYOUT,
    "train.learning_rate": MUST_MATCH,
    "train.schedule": MUST_MATCH,
    "train.warmup": MUST_MATCH,
    "train.optimizer": MUST_MATCH,
    "train.weight_decay": MUST_MATCH,
    "train.max_grad_norm": MUST_MATCH,
    "evaluate.every_steps": FREE,
    "evaluate.prompts": FREE,
    "evaluate.patience": FREE,
    "output.folder": FREE,
    "output.save_every_steps": FREE,
    "output.keep_checkpoints": FREE,
    "output.keep_best": FREE,
    "output.log_to": FREE,
}
# What no key says, but the data does.
COUNTS = ("template_sha256", "tokens", "supervised_tokens")


@dataclass(frozen=True)
class Changes:
    """What follows from keys that changed: refusals, lines for people, and whether the run became longer.

    `more_patient`: one that ended early may go on.
    """

    problems: tuple[Problem, ...]
    notes: tuple[str, ...]
    longer: bool
    more_patient: bool = False


def compare_plans(
    before: Mapping[str, Any], now: Mapping[str, Any], *, asked_before: Mapping[str, Any], asked_now: Mapping[str, Any]
) -> Changes:
    """What changed between two plans (their JSON).

    `asked_*` are the recipes' own settings, in which a fraction is still one.
    """
    longer = now["steps"] > before["steps"]
    problems, notes = [], []
    for key, old, new in _changed_settings(before, now):
        kind = KEYS.get(key, MUST_MATCH)
        follows_length = key == "train.warmup" and longer and asked_before.get(key) == asked_now.get(key)
        if kind == MUST_MATCH and not follows_length:
            problems.append(_refusal(key, old, new))
        elif kind in (LAYOUT, FREE):
            meaning = "the same training up to rounding" if kind == LAYOUT else "from here on"
            notes.append(f"{key} was {old!r}, is {new!r}: {meaning}")
    problems += [_refusal(key, before[key], now[key]) for key in COUNTS if before[key] != now[key]]
    if now["steps"] < before["steps"]:
        message = (
            f"the run began with {before['steps']} steps, now {now['steps']} are asked for; it can only grow longer"
        )
        problems.append(Problem("train.max_steps", message))
    if longer:
        notes.append(
            f"{now['steps']} steps in place of {before['steps']}: from here on the learning rate is that of the longer "
            "run, while the steps before followed the shorter schedule"
        )
    return Changes(tuple(problems), tuple(notes), longer, _is_more_patient(before["settings"], now["settings"]))


def _is_more_patient(before: Mapping[str, Any], now: Mapping[str, Any]) -> bool:
    was, is_now = (settings.get("evaluate.patience") or math.inf for settings in (before, now))
    return is_now > was


def _changed_settings(before: Mapping[str, Any], now: Mapping[str, Any]) -> Iterator[tuple[str, Any, Any]]:
    was, is_now = before["settings"], now["settings"]
    for key in dict.fromkeys([*is_now, *was]):
        came_later = key not in was and key in now["defaults"]  # a key that an older version did not know
        if was.get(key) != is_now.get(key) and not came_later:
            yield key, was.get(key), is_now.get(key)


def _refusal(key: str, was: Any, now: Any) -> Problem:
    return Problem(key, f"was {was!r} when this run began, is {now!r}; set it back, or name another folder with --out")
