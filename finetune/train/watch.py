"""Watch a run: one line of metrics.jsonl a step, a progress bar on stderr, and the loss curve as a picture."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from finetune.plan import TrainPlan


class Watch(TrainerCallback):
    """Writes metrics.jsonl and shows progress; `step_counts` tells the last step's (tokens, supervised tokens)."""

    def __init__(
        self, plan: TrainPlan, metrics_file: Path, *, first_step: int, step_counts: Callable[[], tuple[int, int]]
    ) -> None:
        self.plan = plan
        self.metrics_file = metrics_file
        self.step_counts = step_counts
        self.tokens = 0
        self.supervised_tokens = 0
        self.seconds = 0.0
        self.first_step = first_step
        self._started = time.perf_counter()
        self._stream: IO[str] | None = None
        self._bar = StepBar(plan.steps, first_step=first_step)

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        keep_metrics_until(self.metrics_file, step=self.first_step)
        self._stream = self.metrics_file.open("a", encoding="utf-8")
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
            self.supervised_tokens += supervised
            self._bar.advance(state.global_step, logs["loss"], logs["learning_rate"], self.tokens_per_second)
            kept = {key: float(logs[key]) for key in ("loss", "learning_rate", "grad_norm") if key in logs}
            self._write({"step": state.global_step, **kept, "tokens": tokens, "supervised_tokens": supervised})
        elif "eval_loss" in logs:
            self._bar.note(f"step {state.global_step}: held-out loss {logs['eval_loss']:.4f}")
            self._write({"step": state.global_step, "eval_loss": float(logs["eval_loss"])})

    def close(self) -> None:
        """Close the metrics file and the progress bar."""
        self._bar.stop()
        if self._stream:
            self._stream.close()

    @property
    def tokens_per_second(self) -> float:
        """Real tokens of optimizer steps per second of stepping."""
        return self.tokens / self.seconds if self.seconds else 0.0

    def _write(self, entry: dict[str, Any]) -> None:
        assert self._stream
        self._stream.write(json.dumps(entry) + "\n")
        self._stream.flush()


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
        )
        self._task = self._progress.add_task("train", total=steps, completed=first_step, figures="")

    def start(self) -> None:
        if self.interactive:
            self._progress.start()

    def advance(self, step: int, loss: float, learning_rate: float, tokens_per_second: float) -> None:
        figures = f"loss {loss:.4f}  lr {learning_rate:.2e}  {tokens_per_second:,.0f} tokens/s"
        if self.interactive:
            self._progress.update(self._task, completed=step, figures=figures)
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
    """The lines of metrics.jsonl; a last line cut off by a crash is left out."""
    if not metrics_file.is_file():
        return []
    entries = []
    for line in metrics_file.read_text(encoding="utf-8").splitlines():
        try:
            entries.append(json.loads(line))
        except ValueError:
            break
    return entries


def keep_metrics_until(metrics_file: Path, *, step: int) -> None:
    """Drop the lines after a step, which a resumed run will write again."""
    kept = [entry for entry in read_metrics(metrics_file) if entry["step"] <= step]
    metrics_file.write_text("".join(json.dumps(entry) + "\n" for entry in kept), encoding="utf-8")


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
