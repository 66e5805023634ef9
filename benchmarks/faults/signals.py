"""SIGINT, SIGTERM, SIGUSR1 and SIGHUP in every phase, on one rank and on two with up to five seconds between them.

Promised: exit code 128 + n of the ranks that were signalled (before and after training 7 of one that waits for
another), the same in exit.json, no `adapter/`, no result, no traceback, and a resumed run
with the bits of the undisturbed one; none takes longer than a minute to end.
"""

from __future__ import annotations

import json
import random
import shutil
import signal
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.faults.hooks import hook
from benchmarks.faults.stage import HUNG, Case, Outcome, Stage, difference, has_traceback, last_line, report, tell, wait
from tests.train.forked import Ended

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP)
# How often a phase comes. "joining" is before everything: with a long delay, any moment of a run.
PHASES = {
    "joining": 1, "reading": 1, "tokenising": 1, "opening": 1, "loading": 1, "training": 1, "evaluating": 4,
    "saving": 4, "rotating": 4, "drawing": 1, "publishing": 1,
}  # fmt: skip
ON_EVERY_RANK = ("joining", "loading", "training", "evaluating", "saving")
SKEWS = (0.0, 0.05, 0.4, 1.0, 5.0)
TWO_RANKS = 30 / 130  # of all rounds


def run(stage: Stage, count: int, seed: int, *, two: int | None = None) -> dict[str, Any]:
    """`count` signals that reached a run before its end, `two` of them on two ranks."""
    chance, started = random.Random(seed), time.monotonic()
    rounds: list[dict[str, Any]] = []
    finished_first = 0
    two = round(count * TWO_RANKS) if two is None else two
    while len(rounds) < count and not stage.is_over:
        ranks = 2 if len(rounds) < two else 1
        found = one_round(stage, chance, ranks, list(PHASES)[len(rounds) % len(PHASES)])
        if found["outcome"] == "finished before the signal":
            finished_first += 1
            continue
        rounds.append(found)
        tell(len(rounds) - 1, count, found)
    hangs = sum(each["outcome"].startswith("hang") for each in rounds)
    seconds = time.monotonic() - started
    return report("signals", rounds, seed=seed, seconds=seconds, hangs=hangs, finished_first=finished_first)


def one_round(stage: Stage, chance: random.Random, ranks: int, phase: str) -> dict[str, Any]:
    case = stage.case(ranks=ranks)
    number, call = chance.choice(SIGNALS), chance.randint(1, PHASES[phase])
    longest = {"joining": case.seconds, "training": case.seconds / 2}.get(phase, 0.02)
    delay = round(chance.random() * longest, 4)
    skew = chance.choice(SKEWS) if ranks == 2 else None
    hooks = {0: hook("signal_at", phase, call, delay, int(number))}
    if skew is not None and chance.random() < 0.8:  # else only the first rank gets it
        second_phase = phase if phase in ON_EVERY_RANK else "joining"
        hooks[1] = hook("signal_at", second_phase, call, delay + skew, int(number))
    folder = stage.new_folder(f"signal-{phase}")
    ended = wait(stage.start(case, folder, *fresh_rows(stage, case, phase), hooks=hooks))
    outcome, ok = judge(stage, case, folder, ended, number, resumable=phase != "tokenising")
    found = {"class": f"{phase}, {ranks} rank(s)", "signal": number.name, "call": call, "delay_seconds": delay}
    return {**found, "skew_seconds": skew, "both": len(hooks) == 2, "outcome": outcome, "ok": ok}


def fresh_rows(stage: Stage, case: Case, phase: str) -> Sequence[str]:
    """Rows that are in no cache yet, so that there is something to tokenise: the same with blank lines behind them."""
    if phase != "tokenising":
        return ()
    rows = stage.folder / "fresh.jsonl"
    rows.write_bytes((case.recipe.parent / "rows.jsonl").read_bytes() + b"\n" * (time.time_ns() % 100_000))
    return ("--set", f"data.train={rows}")


def judge(stage: Stage, case: Case, folder: Path, ended: list[Ended], number: int, *, resumable: bool) -> Outcome:
    codes = [each.code for each in ended]
    if HUNG in codes:
        return f"hang: {codes} {last_line(ended)}", False
    if set(codes) <= {0, 128 + number, -number} and (folder / "result.json").exists():
        same = not resumable or not difference(folder, case.straight)
        return ("finished before the signal", True) if same else ("finished: other bits", False)
    if has_traceback(ended):
        return f"traceback: {codes} {last_line(ended)}", False
    # A rank that is waiting for another when that one stops, before or after training, cannot know why: code 7.
    gone = len(codes) > 1 and set(codes) == {128 + number, 7} and not (folder / "result.json").exists()
    if set(codes) != {128 + number} and not gone:
        return f"wrong exit: {codes} {last_line(ended)}", False
    if len(codes) > 1 and (folder / "exit.json").exists():
        noted = json.loads((folder / "exit.json").read_text())
        if any(noted.get(str(rank)) not in {None, code} for rank, code in enumerate(codes)):
            return f"wrong exit.json: {noted}, {codes}", False
    exits = "128 + n and 7" if gone else "128 + n"
    if not resumable:
        shutil.rmtree(folder, ignore_errors=True)
        return f"{exits}, as nothing was trained", True
    outcome, ok = stage.resumed(case, folder)
    return f"{exits}, {outcome}", ok
