"""Watch a run: one line of metrics.jsonl a step, a progress bar on stderr, and the loss curve as a picture."""

from __future__ import annotations

import errno
import json
import os
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from finetune.errors import storing
from finetune.plan import TrainPlan
from finetune.train.divergence import Divergence

BETWEEN_BARS = 0.1  # seconds


class Watch(TrainerCallback):
    """Writes metrics.jsonl and shows progress; `step_counts` tells the last step's (tokens, supervised tokens)."""

    def __init__(
        self, plan: TrainPlan, metrics_file: Path, *, first_step: int, step_counts: Callable[[], tuple[int, int]]
    ) -> None:
        self.plan = plan
        self.step_counts = step_counts
        self.tokens = 0  # those of this process; what the whole run has seen is in metrics.jsonl
        self.seconds = 0.0
        self.first_step = first_step
        self.held_out: dict[int, float] = {}  # the loss of every evaluation so far, by step; the first rank's alone
        self.metrics = MetricsFile(metrics_file)
        self._started = time.perf_counter()
        self._divergence = Divergence()
        self._bar = StepBar(plan.steps, first_step=first_step)

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        with storing(self.metrics.file):
            kept = self.metrics.open(until_step=self.first_step)
        self._divergence = Divergence(entry["loss"] for entry in kept if "loss" in entry)
        self.held_out = held_out_losses(kept)
        self._bar.start()

    def on_step_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self._started = time.perf_counter()

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self.seconds += time.perf_counter() - self._started

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        logs = kwargs["logs"]
        if "loss" in logs:
            tokens, supervised = self.step_counts()
            self.tokens += tokens
            self._bar.advance(state.global_step, logs["loss"], logs["learning_rate"], self.tokens_per_second)
            kept = {key: float(logs[key]) for key in ("loss", "learning_rate", "grad_norm") if key in logs}
            self.metrics.add({"step": state.global_step, **kept, "tokens": tokens, "supervised_tokens": supervised})
            if warning := self._divergence.see(float(logs["loss"])):
                self._bar.note(f"step {state.global_step}: {warning}")
                self.metrics.add({"step": state.global_step, "warning": warning})
        elif "eval_loss" in logs:
            self.held_out[state.global_step] = float(logs["eval_loss"])
            self.note(f"step {state.global_step}: held-out loss {logs['eval_loss']:.4f}")
            self.metrics.add({"step": state.global_step, "eval_loss": float(logs["eval_loss"])})

    def note(self, text: str) -> None:
        """A line on stderr, above the progress bar."""
        self._bar.note(text)

    def owes_evaluation(self, step: int) -> bool:
        """Whether a run that goes on after a step has still to evaluate it: a signal came in the middle."""
        return is_evaluated(self.plan, step) and step not in self.held_out

    def close(self) -> None:
        """Close the metrics file and the progress bar."""
        self._bar.stop()
        self.metrics.close()

    @property
    def tokens_per_second(self) -> float:
        """Real tokens of optimizer steps per second of stepping."""
        return self.tokens / self.seconds if self.seconds else 0.0


def is_evaluated(plan: TrainPlan, step: int) -> bool:
    """Whether an evaluation follows this step."""
    return step > 0 and (step % plan.evaluate_every_steps == 0 or step == plan.steps)


class MetricsFile:
    """metrics.jsonl or samples.jsonl: whole lines only. What a full disk refuses waits in memory for the next line."""

    def __init__(self, file: Path) -> None:
        self.file = file
        self.kept: list[dict[str, Any]] = []  # the entries that were there when it was opened
        self._waiting = b""
        self._longest = 0  # bytes of a line that was added
        self._size = 0
        self._descriptor: int | None = None
        self._is_behind = False

    def open(self, *, until_step: int) -> list[dict[str, Any]]:
        """Cut off the lines after a step, which will be written again, and return the others."""
        self.kept = [entry for entry in read_metrics(self.file) if entry["step"] <= until_step]
        lines = b"".join(map(_line, self.kept))
        self._descriptor = os.open(self.file, os.O_RDWR | os.O_CREAT, 0o666)
        if os.pread(self._descriptor, len(lines), 0) != lines:
            os.pwrite(self._descriptor, lines, 0)
        self._size = len(lines)
        os.ftruncate(self._descriptor, self._size)
        return self.kept

    def add(self, *entries: dict[str, Any]) -> None:
        """Append lines; a disk that is full is said once and does not stop the run."""
        lines = [*map(_line, entries)]
        self._longest = max(self._longest, *map(len, lines))
        self._waiting += b"".join(lines)
        try:
            self.flush()
        except OSError as error:
            if not self._is_behind:
                sys.stderr.write(f"{self.file}: cannot be written ({error}); its lines wait until there is room\n")
            self._is_behind = True

    def flush(self) -> None:
        """Write what waits.

        Raises:
            OSError: it cannot be written; the file ends with its last whole line.
        """
        if self._descriptor is None:  # another rank writes
            return
        try:
            while self._waiting:
                written = os.pwrite(self._descriptor, self._waiting, self._size)
                if not written:
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
                self._size += written
                self._waiting = self._waiting[written:]
        except OSError:
            last_line = self._size - self._half_a_line()
            self._waiting = os.pread(self._descriptor, self._size - last_line, last_line) + self._waiting
            os.ftruncate(self._descriptor, last_line)
            self._size = last_line
            raise
        self._is_behind = False

    def close(self) -> None:
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None

    def _half_a_line(self) -> int:
        """How many bytes stand after the last newline."""
        assert self._descriptor is not None
        tail = os.pread(self._descriptor, self._longest, max(0, self._size - self._longest))
        return len(tail) - (tail.rfind(b"\n") + 1)


def flush(*files: MetricsFile) -> None:
    """Write what waits in any of them.

    Raises:
        OSError: it cannot be written.
    """
    for file in files:
        file.flush()


def _line(entry: dict[str, Any]) -> bytes:
    return (json.dumps(entry) + "\n").encode()


class StepBar:
    """A rich bar on a terminal, a plain line every tenth of the run elsewhere; always on stderr."""

    def __init__(self, steps: int, *, first_step: int) -> None:
        console = Console(stderr=True)
        self.steps = steps
        self.interactive = console.is_terminal
        self._every = max(1, steps // 10)
        self._progress = Progress(
            TextColumn("step {task.completed}/{task.total}"),
            BarColumn(),
            TextColumn("{task.fields[figures]}"),
            TimeRemainingColumn(),
            console=console,
            auto_refresh=False,  # its thread would be at work where the run hangs: finetune/train/stillness.py
        )
        self._shown = 0.0
        self._task = self._progress.add_task("train", total=steps, completed=first_step, figures="")

    def start(self) -> None:
        if self.interactive:
            self._progress.start()

    def advance(self, step: int, loss: float, learning_rate: float, tokens_per_second: float) -> None:
        figures = f"loss {loss:.4f}  lr {learning_rate:.2e}  {tokens_per_second:,.0f} tokens/s"
        if self.interactive:
            now = time.monotonic()
            is_due = now - self._shown > BETWEEN_BARS or step == self.steps
            self._shown = now if is_due else self._shown
            self._progress.update(self._task, completed=step, figures=figures, refresh=is_due)
        elif step % self._every == 0 or step == self.steps:
            sys.stderr.write(f"step {step}/{self.steps}  {figures}\n")

    def note(self, text: str) -> None:
        if self.interactive:
            self._progress.console.print(text)
        else:
            sys.stderr.write(text + "\n")

    def stop(self) -> None:
        if self.interactive:
            self._progress.stop()


def read_metrics(metrics_file: Path) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl, up to the first that is none of ours: one cut off by a crash, or damaged later."""
    if not metrics_file.is_file():
        return []
    entries: list[dict[str, Any]] = []
    for line in metrics_file.read_bytes().splitlines():
        try:
            entry = json.loads(line)
        except (ValueError, RecursionError):
            break
        if not isinstance(entry, dict) or not isinstance(entry.get("step"), int):
            break
        entries.append(entry)
    return entries


def held_out_losses(entries: Iterable[dict[str, Any]]) -> dict[int, float]:
    """The held-out loss by step, from the lines of metrics.jsonl."""
    return {entry["step"]: entry["eval_loss"] for entry in entries if "eval_loss" in entry}


def draw_loss_curve(metrics_file: Path, picture: Path) -> None:
    """The training loss of every step, its running mean, and the held-out loss, as a PNG."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot

    entries = read_metrics(metrics_file)
    train = [(entry["step"], entry["loss"]) for entry in entries if "loss" in entry]
    held_out = [(entry["step"], entry["eval_loss"]) for entry in entries if "eval_loss" in entry]
    figure, axes = pyplot.subplots(figsize=(8, 4.5), dpi=120)
    if train:
        steps, losses = zip(*train, strict=True)
        axes.plot(steps, losses, color="tab:blue", alpha=0.3, linewidth=1, label="each step")
        axes.plot(steps, _running_mean(losses), color="tab:blue", label="mean of the last 20 steps")
    if held_out:
        axes.plot(*zip(*held_out, strict=True), "o-", color="tab:orange", label="held-out rows")
    axes.set_xlabel("optimizer step")
    axes.set_ylabel("loss, nats per supervised token")
    axes.set_ylim(bottom=0)
    axes.grid(alpha=0.3)
    axes.legend()
    figure.tight_layout()
    figure.savefig(picture)
    pyplot.close(figure)


def _running_mean(values: tuple[float, ...], window: int = 20) -> list[float]:
    return [sum(values[max(0, i + 1 - window) : i + 1]) / min(i + 1, window) for i in range(len(values))]
