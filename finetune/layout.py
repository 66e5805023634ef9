"""Which examples make a step and how a step is cut into passes: pure arithmetic on counts, no data, no torch."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Mixture:
    """How many examples each source has, and how often each of them is seen in one epoch."""

    examples: tuple[int, ...]
    weights: tuple[float, ...]

    @property
    def examples_per_epoch(self) -> int:
        return sum(
            int(weight) * count + _drawn(count, weight)
            for count, weight in zip(self.examples, self.weights, strict=True)
        )


def count_steps(examples_per_epoch: int, *, batch_size: int, epochs: int) -> int:
    """Optimizer steps of a whole run; the last, smaller batch of an epoch counts."""
    return epochs * math.ceil(examples_per_epoch / batch_size)


def lay_out_steps(mixture: Mixture, *, batch_size: int, steps: int, seed: int) -> list[list[int]]:
    """The example numbers of every step: each epoch is its own permutation, a pure function of seed and epoch.

    Examples are numbered over all sources, in their order.
    """
    layout: list[list[int]] = []
    epoch = 0
    while len(layout) < steps:
        order = _examples_of_epoch(mixture, epoch, seed=seed)
        random.Random(f"{seed}/{epoch}").shuffle(order)
        layout += [order[start : start + batch_size] for start in range(0, len(order), batch_size)]
        epoch += 1
    return layout[:steps]


def _examples_of_epoch(mixture: Mixture, epoch: int, *, seed: int) -> list[int]:
    """Every example as often as its weight says; what is left of a weight beyond whole times takes turns by epoch."""
    order: list[int] = []
    first = 0
    for source, (count, weight) in enumerate(zip(mixture.examples, mixture.weights, strict=True)):
        order += list(range(first, first + count)) * int(weight)
        if drawn := _drawn(count, weight):
            turns = list(range(first, first + count))
            random.Random(f"{seed}/mixture/{source}").shuffle(turns)
            start = epoch * drawn
            order += [turns[(start + position) % count] for position in range(drawn)]
        first += count
    return order


def _drawn(count: int, weight: float) -> int:
    """How many examples of a source the part of its weight beyond whole times stands for."""
    part = weight - int(weight)
    return min(count, max(1, round(part * count))) if part and count else 0


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
