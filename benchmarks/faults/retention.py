"""Random histories of a checkpoints folder: no training, only finetune/train/checkpoints.py, with an oracle of its own.

A history is saves, crashes at a random moment of a save, resumes, clocks that jump a day, damaged checkpoints, folders
and files of somebody else, relative and absolute paths. In three of four histories most saves have a held-out loss,
and the best is to be kept. After each event: the newest whole checkpoint is still there (or a newer one), and the best
whole one (or a better one), with the bytes they were saved with, and nothing of somebody else has changed. A history
runs in a forked process, and each save that crashes in another one.
"""

from __future__ import annotations

import contextlib
import io
import math
import os
import random
import shutil
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.faults.stage import Stage, report, tell
from finetune.errors import StorageError
from finetune.train.checkpoints import newest_whole_checkpoint, write_checkpoint

DAY = 86_400
EVENTS = 12
FOREIGN = (
    "checkpoint-best",
    "step-best",
    "step-000002-keep",
    "my adapter",
    "notes.txt",
    "step-12",
    ".step-mine.partial",
)
CALLS = {"open", "os.rename", "os.mkdir", "os.remove", "os.rmdir", "os.truncate", "shutil.rmtree"}
Contents = dict[str, bytes]


class Broken(Exception):
    """An invariant does not hold."""


class History:
    """A folder, what was saved in it (by step) and what is somebody else's (by name)."""

    def __init__(self, folder: Path, chance: random.Random) -> None:
        self.folder, self.chance = folder, chance
        self.keep = chance.randint(1, 4)
        self.step = 0
        self.keeps_best = chance.random() < 0.75
        self.saved: dict[int, Contents] = {}
        self.losses: dict[int, float] = {}  # of the run's evaluations up to now, as metrics.jsonl has them
        self.foreign: dict[str, Contents] = {}

    def play(self) -> list[str]:
        """All events; their names."""
        played = []
        for _ in range(EVENTS):
            event = self.chance.choice(EVERY_EVENT)
            played.append(event.__name__)
            before, best = self.whole(), self.best()
            event(self)
            try:
                self.check(before, best, damaged=event is History.damage)
            except Broken as broken:
                raise Broken(f"{broken} after {played}, keep {self.keep}") from None
        return played

    def save(self, *, steps: int = 2) -> None:
        self.step += steps
        before = self.whole()
        contents = self.new_contents()
        self.saved[self.step] = contents
        self.evaluate()
        write_checkpoint(
            self.named(), step=self.step, keep=self.keep, write=writer(contents), losses=self.losses_kept()
        )
        whole = self.whole()
        if self.step not in whole:
            raise Broken(f"step {self.step} was saved and is not whole")
        older = [step for step in before if step < self.step]
        left = [step for step in whole if step < self.step]
        newest = older[max(0, len(older) - self.keep + 1) :]
        best = self.best_of([*older, self.step])
        if left != [step for step in older if step in newest or step == best]:
            raise Broken(f"of {older} there are {left} left, the best is {best}")

    def crash(self) -> None:
        """A save in another process, which ends at a random call."""
        self.step += 2
        contents = self.new_contents()
        self.saved[self.step] = contents
        self.evaluate()
        at = self.chance.randint(1, 40)
        child = os.fork()
        if child == 0:
            end_at_call(at)
            write_checkpoint(
                self.named(), step=self.step, keep=self.keep, write=writer(contents), losses=self.losses_kept()
            )
            os._exit(0)
        os.waitpid(child, 0)
        self.resume()

    def resume(self) -> None:
        """Find the newest whole checkpoint, as a new start does, and go on from there."""
        whole = self.whole()
        try:
            with contextlib.redirect_stderr(io.StringIO()):
                found = newest_whole_checkpoint(self.named())
        except StorageError:
            if whole:
                raise Broken(f"{whole} are whole, and none was found") from None
            shutil.rmtree(self.folder)  # as it is told to, together with what is in it
            self.foreign.clear()
            self.folder.mkdir()
            self.step = 0
            self.losses.clear()
            return
        if (found is None) != (not whole) or (found and found.name != name_of(whole[-1])):
            raise Broken(f"{found} was found of {whole}")
        self.step = whole[-1] if whole else 0
        self.losses = {step: loss for step, loss in self.losses.items() if step <= self.step}

    def jump_in_time(self) -> None:
        for path in self.folder.iterdir():
            now = time.time() + self.chance.uniform(-DAY, DAY)
            os.utime(path, (now, now), follow_symlinks=False)

    def damage(self) -> None:
        whole = self.whole()
        if whole:
            step = self.chance.choice(whole)
            file = self.chance.choice(sorted((self.folder / name_of(step)).iterdir()))
            self.chance.choice([lambda: file.unlink(), lambda: file.write_bytes(b""), lambda: cut(file)])()
            del self.saved[step]  # the manifest may be what was hit, which this file cannot read

    def somebody_else(self) -> None:
        name = self.chance.choice(FOREIGN)
        if name in self.foreign:
            return
        path, contents = self.folder / name, self.new_contents()
        if "." in name[1:] and not name.startswith("."):
            path.write_bytes(contents["a"])
            contents = {"": contents["a"]}
        else:
            path.mkdir()
            writer(contents)(path)
        self.foreign[name] = contents

    def own_copy(self) -> None:
        """A user keeps a copy of a checkpoint under a name of his own."""
        whole = self.whole()
        if whole and "copy" not in self.foreign:
            shutil.copytree(self.folder / name_of(whole[-1]), self.folder / "copy")
            self.foreign["copy"] = contents_of(self.folder / "copy")

    def evaluate(self) -> None:
        """Most steps that are saved have been evaluated; some losses are equal, and some are none."""
        if self.chance.random() < 0.8:
            self.losses[self.step] = self.chance.choice([*range(9), math.nan, math.inf])

    def losses_kept(self) -> dict[int, float]:
        return dict(self.losses) if self.keeps_best else {}

    def best(self) -> int | None:
        return self.best_of(self.whole())

    def best_of(self, steps: list[int]) -> int | None:
        """The step with the lowest loss, the first of equal ones."""
        best = None
        for step in sorted(steps):
            loss = self.losses_kept().get(step, math.nan)
            if math.isfinite(loss) and (best is None or loss < self.losses[best]):
                best = step
        return best

    def new_contents(self) -> Contents:
        return {name: self.chance.randbytes(self.chance.randint(1, 60)) for name in "abc"}

    def named(self) -> Path:
        """The folder, absolute or relative to a current folder."""
        if self.chance.random() < 0.5:
            return self.folder
        os.chdir(self.chance.choice([self.folder.parent, self.folder]))
        return Path(os.path.relpath(self.folder))

    def whole(self) -> list[int]:
        """Steps whose folder has exactly the bytes that were saved, by this file's own memory."""
        return sorted(step for step in self.saved if self.is_whole(step))

    def is_whole(self, step: int) -> bool:
        folder = self.folder / name_of(step)
        return (folder / "checkpoint.json").is_file() and without_manifest(contents_of(folder)) == self.saved[step]

    def check(self, before: list[int], best: int | None, *, damaged: bool) -> None:
        whole = self.whole()
        if before and not damaged and self.folder.exists() and (not whole or whole[-1] < before[-1]):
            raise Broken(f"{before} were whole, now {whole}")
        now = self.best_of(whole)
        if best in self.losses and not damaged and (now is None or self.losses[now] > self.losses[best]):
            raise Broken(f"the best was {best}, now {now}")
        for name, contents in self.foreign.items():
            if contents_of(self.folder / name) != contents:
                raise Broken(f"{name} of somebody else has changed")


EVERY_EVENT: tuple[Callable[[History], None], ...] = (
    History.save, History.save, History.save, History.crash, History.resume, History.jump_in_time, History.damage,
    History.somebody_else, History.own_copy,
)  # fmt: skip


def run(stage: Stage, count: int, seed: int) -> dict[str, Any]:
    """`count` histories; each that breaks an invariant with its seed."""
    started, rounds = time.monotonic(), []
    place = stage.folder / "histories"
    for number in range(count):
        outcome = play_in_child(place, seed * 1_000_003 + number)
        found = {"class": "history", "seed": seed * 1_000_003 + number, "outcome": outcome, "ok": outcome == "kept"}
        rounds.append(found)
        if number % 100 == 99 or not found["ok"]:
            tell(number, count, found)
    broken = [each for each in rounds if not each["ok"]]
    more = {"events": count * EVENTS}
    return report("retention", rounds, seed=seed, seconds=time.monotonic() - started, **more) | {"each": broken}


def play_in_child(place: Path, seed: int) -> str:
    """kept, or what was broken; in another process, because a history changes the current folder."""
    shutil.rmtree(place, ignore_errors=True)
    (place / "checkpoints").mkdir(parents=True)
    reader, writer_end = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            History(place / "checkpoints", random.Random(seed)).play()
            said = "kept"
        except Broken as broken:
            said = f"broken: {broken}"
        except BaseException as error:
            said = f"error: {error!r}"
        os.write(writer_end, said.encode())
        os._exit(0)
    os.close(writer_end)
    with open(reader, "rb") as stream:
        said = stream.read().decode()
    os.waitpid(child, 0)
    return said


def end_at_call(at: int) -> None:
    """This process ends at the so many-th change of a file or folder, or sync."""
    calls = 0

    def count() -> None:
        nonlocal calls
        calls += 1
        if calls == at:
            os._exit(9)

    def audit(event: str, _args: tuple) -> None:
        if event in CALLS:
            count()

    def synced(descriptor: int, real: Callable[[int], None] = os.fsync) -> None:
        count()
        real(descriptor)

    os.fsync = synced
    sys.addaudithook(audit)


def writer(contents: Contents) -> Callable[[Path], None]:
    def write(folder: Path) -> None:
        for name, data in contents.items():
            (folder / name).write_bytes(data)

    return write


def contents_of(path: Path) -> Contents:
    if path.is_file():
        return {"": path.read_bytes()}
    return {file.name: file.read_bytes() for file in path.iterdir()} if path.is_dir() else {}


def without_manifest(contents: Contents) -> Contents:
    return {name: data for name, data in contents.items() if name != "checkpoint.json"}


def name_of(step: int) -> str:
    return f"step-{step:06d}"


def cut(file: Path) -> None:
    os.truncate(file, file.stat().st_size - 1)
