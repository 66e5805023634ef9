"""Which examples make a step and how a step is cut into passes: pure arithmetic on counts, no data, no torch."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence


def count_steps(num_examples: int, *, batch_size: int, epochs: int) -> int:
    """Optimizer steps of a whole run; the last, smaller batch of an epoch counts."""
    return epochs * math.ceil(num_examples / batch_size)


def lay_out_steps(num_examples: int, *, batch_size: int, steps: int, seed: int) -> list[list[int]]:
    """The example numbers of every step: each epoch is its own permutation, fixed by the seed."""
    layout: list[list[int]] = []
    epoch = 0
    while len(layout) < steps:
        order = list(range(num_examples))
        random.Random(f"{seed}/{epoch}").shuffle(order)
        layout += [order[start : start + batch_size] for start in range(0, num_examples, batch_size)]
        epoch += 1
    return layout[:steps]


def cut_into_passes(tokens: Sequence[int], *, tokens_per_pass: int) -> list[list[int]]:
    """Positions of a step's examples, grouped so that no pass exceeds the limit unless one example alone does.

    Longest first into the first pass with room (first-fit decreasing): few passes, and the same ones every time.
    """
    passes: list[list[int]] = []
    room: list[int] = []
    for position in sorted(range(len(tokens)), key=lambda index: (-tokens[index], index)):
        fitting = next((index for index, left in enumerate(room) if left >= tokens[position]), None)
        if fitting is None:
            passes.append([position])
            room.append(tokens_per_pass - tokens[position])
        else:
            passes[fitting].append(position)
            room[fitting] -= tokens[position]
    return passes
