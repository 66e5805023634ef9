"""Notice a loss that runs away: one loss a step in, one warning a run out."""

from __future__ import annotations

import statistics
from collections.abc import Iterable

WINDOW = 50  # steps whose median a loss is compared with
FEWEST = 20  # before that nothing is said: the first losses of a run fall steeply
STREAK = 5  # steps in a row; one hard batch is no divergence
TIMES, MARGIN = 2.0, 1.0  # nats per token


class Divergence:
    """Warns once, when the loss of five steps in a row is above twice the median of the fifty before them, plus one."""

    def __init__(self, losses: Iterable[float] = ()) -> None:
        self._before: list[float] = []
        self._streak: list[float] = []
        self._warned = False
        for loss in losses:
            self.see(loss)

    def see(self, loss: float) -> str | None:
        """The warning, at the step where it is due."""
        if len(self._before) >= FEWEST and loss > TIMES * statistics.median(self._before) + MARGIN:
            self._streak.append(loss)
        else:
            self._before = [*self._before, *self._streak, loss][-WINDOW:]
            self._streak = []
        if len(self._streak) < STREAK or self._warned:
            return None
        self._warned = True
        usual = statistics.median(self._before)
        return (
            f"the loss runs away: {STREAK} steps in a row above {TIMES:g} x {usual:.3f} (the median of "
            f"{len(self._before)} steps before) + {MARGIN:g}, now {loss:.3f}; lower train.learning_rate"
        )
