"""Lay out a run's first steps: a plan and token counts in, what each pass holds and how full it is out."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from finetune.layout import cut_into_passes, lay_out_steps
from finetune.plan import STEPS_LAID_OUT, TrainPlan

Step = list[list[int]]  # the example numbers of each of its passes


@dataclass(frozen=True)
class Packing:
    """How full the passes of a run's first epoch are."""

    passes_per_step: float
    tokens_per_pass: int
    share: float  # of tokens_per_pass that holds tokens

    def to_json(self) -> dict[str, float]:
        return {
            "passes_per_step": round(self.passes_per_step, 4),
            "tokens_per_pass": self.tokens_per_pass,
            "share": round(self.share, 4),
        }


def passes_of_steps(plan: TrainPlan, tokens: np.ndarray, *, steps: int) -> list[Step]:
    """The first steps of a run; `tokens` counts those of every training example."""
    layout = lay_out_steps(plan.mixture, batch_size=plan.batch_size, steps=steps, seed=plan.seed)
    return [
        [
            [step[position] for position in positions]
            for positions in cut_into_passes(tokens[step].tolist(), tokens_per_pass=plan.tokens_per_pass)
        ]
        for step in layout
    ]


def steps_of_first_epoch(plan: TrainPlan) -> int:
    return min(plan.steps, math.ceil(plan.mixture.examples_per_epoch / plan.batch_size))


def packing_of(plan: TrainPlan, tokens: np.ndarray) -> Packing:
    """Of the first epoch, or where it is very long of its first steps."""
    steps = passes_of_steps(plan, tokens, steps=min(steps_of_first_epoch(plan), STEPS_LAID_OUT))
    passes = sum(map(len, steps))
    held = sum(int(tokens[number]) for step in steps for each in step for number in each)
    return Packing(passes / len(steps), plan.tokens_per_pass, held / (passes * plan.tokens_per_pass))
