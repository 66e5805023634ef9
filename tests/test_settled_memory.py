"""Freed memory that the next step takes again stays with the process; holes go back. A model of an allocator tells."""

from __future__ import annotations

import random

import pytest

from finetune import machine


class Heap:
    """GiB held: what was ever needed at once, and holes, which every step adds to; all but the base can be returned."""

    def __init__(self) -> None:
        self.base, self.held, self.returns = 1.0, 1.0, 0

    def step(self, need: float, hole: float) -> None:
        self.held = max(self.held, self.base + need) + hole

    def give_back(self) -> None:
        self.held, self.returns = self.base, self.returns + 1


@pytest.mark.parametrize(("hole", "most_returns"), [(0.0, 12), (0.01, 50)])
def test_only_holes_are_returned(monkeypatch: pytest.MonkeyPatch, hole: float, most_returns: int) -> None:
    heap, settled, random_ = Heap(), 0.0, random.Random(0)
    monkeypatch.setattr(machine, "resident_gib", lambda: heap.held)
    monkeypatch.setattr(machine, "return_freed_memory", heap.give_back)
    most_needed = highest = 0.0
    for _ in range(300):
        need = random_.uniform(0.3, 0.9)
        most_needed = max(most_needed, need)
        heap.step(need, hole)
        highest = max(highest, heap.held)
        settled = machine.settle_memory(settled)
        assert highest <= heap.base + most_needed + machine.UNSETTLED_GIB + 2 * hole + 1e-9
    assert heap.returns <= most_returns
