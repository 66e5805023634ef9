"""What a forked run does before it begins: it arms the signal, the kill, the full disk or the NaN that is to come.

Used as text, because it runs in another process: `hook("kill_in", "saving", ...)`.
"""

from __future__ import annotations

import contextlib
import ctypes
import importlib
import os
import time
from collections.abc import Callable
from typing import Any

KILL = -1  # in place of an error number, see storage.c
WRITE, SYNC, NAME, OPEN = 1, 2, 4, 8
ANY = WRITE | SYNC | NAME | OPEN
KINDS_OF_CALLS = {"write": WRITE, "sync": SYNC, "rename or removal": NAME, "open": OPEN}
# Where a run is: the functions that a phase lasts for.
PHASES = {
    "joining": "finetune.run joined_ranks",
    "reading": "finetune.run resolve",
    "tokenising": "finetune.resolve prepare_data",
    "opening": "finetune.run open_run_folder",
    "loading": "finetune.model.load load_base",
    "training": "finetune.train.trainer StepTrainer.train",
    "evaluating": "finetune.train.trainer StepTrainer.evaluate",
    "saving": "finetune.train.trainer StepTrainer._save_checkpoint",
    "rotating": "finetune.train.checkpoints _rotate",
    "drawing": "finetune.train.train draw_loss_curve",
    "publishing": "finetune.artifact RunFolder.write_adapter",
    "finishing": "finetune.artifact RunFolder.finish",
}


def hook(name: str, *arguments: Any) -> str:
    """The text of a call of a function of this file."""
    return f"from benchmarks.faults import hooks\nhooks.{name}(*{arguments!r})\n"


def around(place: str, before: Callable[[int, tuple], None], after: Callable[[int], None] | None = None) -> None:
    """Call `before` (number of the call from 1, arguments) and `after` around a function, named "module a.b"."""
    module, _, name = place.partition(" ")
    owner: Any = importlib.import_module(module)
    *path, last = name.split(".")
    for part in path:
        owner = getattr(owner, part)
    original, calls = getattr(owner, last), [0]

    def wrapped(*args: Any, **kwargs: Any) -> Any:
        calls[0] += 1
        number = calls[0]
        before(number, args)
        try:
            return original(*args, **kwargs)
        finally:
            if after:
                after(number)

    setattr(owner, last, wrapped)


def note_phases(file: str) -> None:
    """Keep the name of the phase in a file, where it is after a kill too."""
    descriptor = os.open(file, os.O_RDWR | os.O_CREAT | os.O_TRUNC)
    stack = ["starting"]

    def write() -> None:
        os.pwrite(descriptor, stack[-1].ljust(16).encode(), 0)

    write()
    for phase, place in PHASES.items():

        def enter(_number: int, _args: tuple, phase: str = phase) -> None:
            stack.append(phase)
            write()

        def leave(_number: int) -> None:
            stack.pop()
            write()

        around(place, enter, leave)


def signal_at(phase: str, call: int, delay: float, number: int) -> None:
    """Another process sends this one a signal, `delay` seconds after a phase has begun for the nth time.

    A phase is one of PHASES or "module a.b"; "any" begins now.
    """

    def send_later() -> None:
        target = os.getpid()
        if os.fork():
            return
        time.sleep(delay)
        with contextlib.suppress(ProcessLookupError):
            os.kill(target, number)
        os._exit(0)

    if phase == "any":
        send_later()
        return
    around(PHASES.get(phase, phase), lambda count, _: send_later() if count == call else None)


def meet_within(seconds: float) -> None:
    """Ranks wait for each other at the start for so long, in place of five minutes."""
    from finetune.train import ranks

    ranks.JOIN_SECONDS = seconds


def break_storage(phase: str, call: int, which: int, error: int, kinds: int, count_file: str = "") -> None:
    """Within the nth time of a phase the file-system call number `which` fails once; KILL ends the process there.

    A phase is one of PHASES or "module a.b". How many calls it makes is written to `count_file`; without one every
    call from `which` on fails, also after the phase.
    """
    library = ctypes.CDLL(None)
    library.faults_disarm.restype = ctypes.c_long

    def arm(count: int, _args: tuple) -> None:
        if count == call:
            library.faults_arm(ctypes.c_long(which), error, kinds, int(not count_file))

    def disarm(count: int) -> None:
        if count == call and count_file:
            calls = library.faults_disarm()
            with open(count_file, "w") as stream:
                stream.write(str(calls))

    around(PHASES.get(phase, phase), arm, disarm)


def spoil(what: str, step: int, value: str) -> None:
    """A number that is not finite: the `loss` or `gradient` of a step, a `weight` before it or one `updated` by it."""
    from finetune.train import trainer as file

    number = float(value)
    losses, gradients = file.stretch_losses_S, file.StepTrainer._accumulate_gradients
    train_step, save = file.StepTrainer.training_step, file.StepTrainer._save_checkpoint
    now = [0]  # the step that is being trained

    def spoiled_losses(model: Any, stretch: Any) -> Any:
        found = losses(model, stretch)
        return found * number if what == "loss" and model.training and now[0] == step else found

    def spoiled_gradients(self: Any, *args: Any) -> Any:
        found = gradients(self, *args)
        if what == "gradient" and now[0] == step:
            self._trainable[-1].grad.view(-1)[0] = number
        return found

    def spoiled_step(self: Any, *args: Any, **kwargs: Any) -> Any:
        now[0] = self.state.global_step + 1
        if what == "weight" and now[0] == step:
            self._trainable[0].data.view(-1)[0] = number
        return train_step(self, *args, **kwargs)

    def spoiled_save(self: Any, *args: Any) -> Any:
        if what == "updated" and self.state.global_step == step:
            self._trainable[0].data.view(-1)[0] = number
        return save(self, *args)

    file.stretch_losses_S = spoiled_losses
    file.StepTrainer._accumulate_gradients = spoiled_gradients  # type: ignore[method-assign]
    file.StepTrainer.training_step = spoiled_step  # type: ignore[method-assign]
    file.StepTrainer._save_checkpoint = spoiled_save  # type: ignore[method-assign]
