"""A disk that fails during a save, and checkpoint files that are damaged afterwards; nothing may be loaded silently.

Failing calls: ENOSPC, EIO or EROFS at the n-th write, sync, rename or removal, or open, once or from then on. Damage:
each file of the newest checkpoint, of all but the oldest or of all of them. Promised: the run goes on or resumes to the
same bits and says what was wrong, or exits 3.
"""

from __future__ import annotations

import errno
import itertools
import os
import random
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from benchmarks.faults.hooks import KINDS_OF_CALLS, hook
from benchmarks.faults.stage import WEIGHTS, Case, Outcome, Stage, difference, has_traceback, last_line, report, tell
from finetune.train.checkpoints import find_damage

ERRORS = {"ENOSPC": errno.ENOSPC, "EIO": errno.EIO, "EROFS": errno.EROFS}
FILES = (
    "adapter_config.json", WEIGHTS, "checkpoint.json", "random-000.json", "state.json", "state.safetensors",
    "trainer_state.json",
)  # fmt: skip
RUN_FILES = ("plan.json", "lock.json", "recipe.yaml", "metrics.jsonl")
HIT = {"newest": 1, "all but the oldest": 2, "all": 3}  # so many checkpoints, of three


def run(stage: Stage, count: int, seed: int) -> dict[str, Any]:
    """`count` faults, drawn from all: a third failing calls, the rest damage; the files of the run folder on top."""
    chance, started = random.Random(seed), time.monotonic()
    rounds: list[dict[str, Any]] = []
    failing = count // 3
    for each in itertools.chain(
        itertools.islice(failing_calls(stage, chance), failing),
        itertools.islice(damages(stage, chance), count - failing),
        itertools.islice(damaged_run_files(stage), count // 12),
    ):
        rounds.append(each)
        if stage.is_over:
            break
        tell(len(rounds) - 1, count, each)
    silent = [each for each in rounds if each["outcome"].startswith("silent")]
    return report("storage", rounds, seed=seed, seconds=time.monotonic() - started, silent_loads=len(silent))


def failing_calls(stage: Stage, chance: random.Random) -> Iterator[dict[str, Any]]:
    """Runs in which a call of the second or third save fails; a call that a save does not make is none."""
    case = stage.case()
    while True:
        error, kind, stays = chance.choice(list(ERRORS)), chance.choice(list(KINDS_OF_CALLS)), chance.random() < 0.3
        save, which = chance.randint(2, 3), chance.randint(1, 16)
        made = stage.folder / "calls"  # how many such calls the save has made; not written where they go on to fail
        made.unlink(missing_ok=True)
        text = hook(
            "break_storage", "saving", save, which, ERRORS[error], KINDS_OF_CALLS[kind], "" if stays else str(made)
        )
        folder = stage.new_folder("failing")
        ended = stage.train(case, folder, hook=text)
        said = os.strerror(ERRORS[error]) in ended[0].err
        if not said and (stays or int(made.read_text()) < which):
            continue
        name = f"{error} at a {kind}, {'from then on' if stays else 'once'}"
        outcome, ok = after_failing(stage, case, folder, ended) if said else after_unsaid(case, folder, ended)
        yield {"class": name, "outcome": outcome, "ok": ok, "save": save, "which": which}


def after_failing(stage: Stage, case: Case, folder: Path, ended: list[Any]) -> Outcome:
    """Whether the run went on, or stopped with exit code 3 and can be resumed."""
    if has_traceback(ended) or ended[0].code not in (0, 3):
        return f"exits {ended[0].code}: {last_line(ended)}", False
    if ended[0].code == 3:
        outcome, ok = stage.resumed(case, folder)
        return f"exit 3, then {outcome}", ok
    found = difference(folder, case.straight)
    return (f"silent: {found}", False) if found else ("said, ran on, same bits", True)


def after_unsaid(case: Case, folder: Path, ended: list[Any]) -> Outcome:
    """A call that failed unsaid is one that was not needed, as making a folder that is there: all files are there."""
    checkpoints, theirs = (sorted((run / "checkpoints").iterdir()) for run in (folder, case.straight))
    names = [[(path.name, sorted(os.listdir(path))) for path in paths] for paths in (checkpoints, theirs)]
    whole = names[0] == names[1] and not any(map(find_damage, checkpoints))
    if ended[0].code or not whole or difference(folder, case.straight):
        return f"silent: nothing was said, exit {ended[0].code}", False
    return "not needed, same bits", True


def damages(stage: Stage, chance: random.Random) -> Iterator[dict[str, Any]]:
    """All damages of all files, in random order, then again with other bits."""
    case = stage.case(output__keep_checkpoints=3)
    while True:
        kinds = list(itertools.product(FILES, changes(chance), HIT))
        chance.shuffle(kinds)
        for name, change, hit in kinds:
            folder = before_its_end(stage, case)
            found = sorted((folder / "checkpoints").iterdir())
            for checkpoint in found[len(found) - HIT[hit] :]:
                changes(random.Random(chance.random()))[change](checkpoint / name)
            if not any(differs(path, case.straight / "checkpoints" / path.name) for path in found):
                continue  # swapped with a file that is the same
            outcome, ok = after_damage(stage, case, folder, hit=hit, name=name)
            yield {"class": f"{change}, {hit}", "outcome": outcome, "ok": ok, "file": name}


def differs(checkpoint: Path, other: Path) -> bool:
    files = {file.name: file.read_bytes() for file in checkpoint.iterdir()}
    return files != {file.name: file.read_bytes() for file in other.iterdir()}


def changes(chance: random.Random) -> dict[str, Callable[[Path], Any]]:
    """What can happen to a file; of the bits a few, at random."""
    return {
        "emptied": lambda file: file.write_bytes(b""),
        "halved": lambda file: os.truncate(file, file.stat().st_size // 2),
        "cut by a byte": lambda file: os.truncate(file, file.stat().st_size - 1),
        "a byte longer": lambda file: file.write_bytes(file.read_bytes() + b"\0"),
        "a page of rubbish": lambda file: overwrite(file, chance.random()),
        **{f"a bit flipped ({number})": lambda file: flip(file, chance.random()) for number in range(5)},
        "removed": lambda file: file.unlink(),
        "swapped": swap,
    }


def flip(file: Path, where: float) -> None:
    data = bytearray(file.read_bytes())
    bit = int(where * len(data) * 8)
    data[bit // 8] ^= 1 << bit % 8
    file.write_bytes(data)


def overwrite(file: Path, where: float) -> None:
    """Zeros where something was, and something where zeros were, in at most a page."""
    data = bytearray(file.read_bytes())
    start = int(where * len(data))
    data[start : start + 4096] = bytes(0 if byte else 0xFF for byte in data[start : start + 4096])
    file.write_bytes(data)


def swap(file: Path) -> None:
    """With the same file of another step."""
    others = [path for path in sorted(file.parents[1].iterdir()) if path != file.parent and (path / file.name).exists()]
    other = others[0] / file.name
    mine, theirs = file.read_bytes(), other.read_bytes()
    file.write_bytes(theirs)
    if len(others) == 1:
        other.write_bytes(mine)


def after_damage(stage: Stage, case: Case, folder: Path, *, hit: str, name: str) -> Outcome:
    """Fallen back and said, or exit 3 where nothing is whole; every other end is a failure."""
    ended = stage.train(case, folder, resume=True)
    if has_traceback(ended) or ended[0].code not in (0, 3):
        return f"exits {ended[0].code}: {last_line(ended)}", False
    if ended[0].code == 3:
        return ("exit 3", True) if hit == "all" else (f"exit 3 although one is whole: {last_line(ended)}", False)
    found = difference(folder, case.straight)
    if found:
        return f"silent: {found}", False
    return ("said, fell back, same bits", True) if name in ended[0].err else ("silent: nothing was said", False)


def damaged_run_files(stage: Stage) -> Iterator[dict[str, Any]]:
    """The files beside the checkpoints: a refusal, or the same adapter."""
    case = stage.case(output__keep_checkpoints=3)
    kinds = ("emptied", "halved", "cut by a byte", "a page of rubbish", "removed")
    for name, change in itertools.product(RUN_FILES, kinds):
        folder = before_its_end(stage, case)
        changes(random.Random(1))[change](folder / name)
        ended = stage.train(case, folder, resume=True)
        adapter = folder / "adapter" / WEIGHTS
        outcome, ok = f"exit {ended[0].code}, no traceback", ended[0].code in (2, 3)
        if ended[0].code == 0:
            same = adapter.read_bytes() == (case.straight / "adapter" / WEIGHTS).read_bytes()
            outcome, ok = ("resumed, same adapter", True) if same else ("silent: another adapter", False)
        elif has_traceback(ended) or not ok:
            outcome, ok = f"exits {ended[0].code}: {last_line(ended)}", False
        yield {"class": f"{name} {change}", "outcome": outcome, "ok": ok, "said": last_line(ended)}


def before_its_end(stage: Stage, case: Case) -> Path:
    """A copy of the undisturbed run as after a crash behind its last save, with three checkpoints."""
    folder = stage.new_folder("damaged")
    shutil.copytree(case.straight, folder)
    (folder / "result.json").unlink()
    shutil.rmtree(folder / "adapter")
    assert len(list((folder / "checkpoints").iterdir())) == 3
    return folder
