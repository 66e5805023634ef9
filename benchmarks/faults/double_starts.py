"""Two runs started in one folder within moments: one trains undisturbed, the other ends at once with exit code 2."""

from __future__ import annotations

import random
import time
from typing import Any

from benchmarks.faults.stage import Case, Stage, difference, has_traceback, last_line, report, tell, wait


def run(stage: Stage, count: int, seed: int) -> dict[str, Any]:
    """`count` pairs; half of them with `--resume`."""
    chance, started, rounds = random.Random(seed), time.monotonic(), []
    case = stage.case()
    for number in range(count):
        if stage.is_over:
            break
        resume, pause = number % 2 == 1, chance.choice([0.0, 0.0, chance.random() * case.seconds / 2])
        outcome, ok = start_two(stage, case, pause, resume=resume)
        name = "with --resume" if resume else "without --resume"
        rounds.append({"class": name, "pause_seconds": round(pause, 3), "outcome": outcome, "ok": ok})
        tell(number, count, rounds[-1])
    return report("double-starts", rounds, seed=seed, seconds=time.monotonic() - started)


def start_two(stage: Stage, case: Case, pause: float, *, resume: bool) -> tuple[str, bool]:
    folder = stage.new_folder("double")
    children = stage.start(case, folder, resume=resume)
    time.sleep(pause)
    children += stage.start(case, folder, resume=resume)
    ended = wait(children)
    codes = sorted(each.code for each in ended)
    if codes != [0, 2] or has_traceback(ended):
        return f"exits {codes}: {last_line(ended)}", False
    refused = next(each for each in ended if each.code == 2)
    # Without --resume it may see the run before it sees who is at work in it.
    reason = next((words for words in ("another run is at work", "an unfinished run") if words in refused.err), None)
    if reason is None:
        return f"exit 2 for another reason: {last_line([refused])}", False
    found = difference(folder, case.straight)
    return (f"disturbed: {found}", False) if found else (f"one trained, the other exit 2 ({reason})", True)
