"""SIGKILL at random moments, up to four a run, a good part of them inside a save; then `--resume` to the end.

A run is lost if it cannot go on, or if a loss of a step (every bit) or the adapter differs from the undisturbed run's.
"""

from __future__ import annotations

import random
import time
from pathlib import Path
from typing import Any

from benchmarks.faults.hooks import hook
from benchmarks.faults.stage import QUANTIZATIONS, Case, Stage, last_line, report, tell, wait

SIGKILL = 9
MOST_KILLS = 4


def run(
    stage: Stage,
    count: int,
    seed: int,
    *,
    ranks: tuple[int, ...] = (1, 2),
    quantizations: tuple[str, ...] = QUANTIZATIONS,
) -> dict[str, Any]:
    """`count` kills that hit a running process, and what became of their runs."""
    chance, started = random.Random(seed), time.monotonic()
    rounds: list[dict[str, Any]] = []
    kills: list[str] = []
    while len(kills) < count and not stage.is_over:
        quantization, number = chance.choice(quantizations), chance.choice(ranks)
        case = stage.case(quantization, ranks=number, dropout=0.1 if quantization == "none" else 0.05)
        found = kill_and_resume(stage, case, chance)
        kills += found["killed_in"]
        rounds.append({"class": f"{quantization}, {number} rank(s)", **found})
        tell(len(kills) - 1, count, rounds[-1])
    phases = {phase: kills.count(phase) for phase in sorted(set(kills))}
    inside = sum(phases.get(phase, 0) for phase in ("saving", "rotating"))
    return report(
        "kills",
        rounds,
        seed=seed,
        seconds=time.monotonic() - started,
        kills=len(kills),
        kills_inside_a_save=inside,
        kills_by_phase=phases,
    )


def kill_and_resume(stage: Stage, case: Case, chance: random.Random) -> dict[str, Any]:
    """One run with one to four kills; the last start is let through."""
    folder = stage.new_folder("kills")
    killed_in: list[str] = []
    hooks: list[str] = []
    for _ in range(chance.randint(1, MOST_KILLS)):
        text = random_kill(case, chance)
        hooks.append(text)
        note = stage.folder / "phase"
        victim = chance.randrange(case.ranks)
        # Only the first rank writes: the phase is its.
        texts = {0: hook("note_phases", str(note))}
        texts[victim] = texts.get(victim, "") + text
        children = stage.start(case, folder, hooks=texts, resume=True)
        ended = wait(children)
        if ended[victim].code == -SIGKILL:
            killed_in.append(phase_in(note))
        elif ended[victim].code != 0:
            return lost(f"lost: exits {[each.code for each in ended]}: {last_line(ended)}", killed_in, hooks)
        if any(each.code not in {0, 7, -SIGKILL} for each in ended):
            return lost(
                f"another rank ended with {[each.code for each in ended]}: {last_line(ended)}", killed_in, hooks
            )
    outcome, ok = stage.resumed(case, folder)
    return {"outcome": outcome, "ok": ok, "killed_in": killed_in, "hooks": hooks}


def random_kill(case: Case, chance: random.Random) -> str:
    """Inside a save, or at any moment of the run."""
    if chance.random() < 0.6:
        return hook("signal_at", "saving", chance.randint(1, 2), round(chance.random() * 0.02, 4), SIGKILL)
    return hook("signal_at", "any", 0, round(chance.random() * case.seconds, 4), SIGKILL)


def phase_in(note: Path) -> str:
    return note.read_text().strip() if note.exists() else "starting"


def lost(outcome: str, killed_in: list[str], hooks: list[str]) -> dict[str, Any]:
    return {"outcome": outcome, "ok": False, "killed_in": killed_in, "hooks": hooks}
