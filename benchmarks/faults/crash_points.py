"""Every crash point: SIGKILL at the n-th file-system call, for n = 1, 2, 3, ... until nothing is left to kill.

Of opening a run folder, of the third save (which also removes the oldest checkpoint), of publishing the adapter and of
writing the result. A killed write has written half of its bytes. Each run is then resumed to its end.
"""

from __future__ import annotations

import time
from typing import Any

from benchmarks.faults.hooks import ANY, KILL, hook
from benchmarks.faults.stage import Case, Stage, last_line, report, tell

SIGKILL = 9
STRETCHES = {"saving": 3, "opening": 1, "publishing": 1, "finishing": 1}  # the phase, and which time it is entered


def run(stage: Stage, count: int, seed: int, *, every: int = 1) -> dict[str, Any]:
    """At most `count` crash points; with `every` only the first of so many."""
    started = time.monotonic()
    case, rounds = stage.case(), []
    for phase, call in STRETCHES.items():
        point = 1
        while len(rounds) < count and not stage.is_over and (found := crash(stage, case, phase, call, point)):
            rounds.append({"class": phase, "point": point, **found})
            tell(len(rounds) - 1, count, rounds[-1])
            point += every
    return report("crash-points", rounds, seed=seed, seconds=time.monotonic() - started)


def crash(stage: Stage, case: Case, phase: str, call: int, point: int) -> dict[str, Any] | None:
    """What became of a run that was killed at a point; None if the phase has no such point."""
    folder = stage.new_folder("crash")
    text = hook("break_storage", phase, call, point, KILL, ANY, str(stage.folder / "calls"))
    ended = stage.train(case, folder, hook=text)
    if ended[0].code == 0:
        return None
    if ended[0].code != -SIGKILL:
        return {"outcome": f"lost: exits {ended[0].code}: {last_line(ended)}", "ok": False}
    outcome, ok = stage.resumed(case, folder)
    return {"outcome": outcome, "ok": ok}
