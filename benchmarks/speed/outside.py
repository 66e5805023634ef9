"""Programs measured from outside: a command in; wall and processor seconds, peak memory and exit code out."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
LIMIT_SECONDS = 7200.0


@dataclass(frozen=True)
class Seen:
    """What the operating system says of a finished process and of those it waited for."""

    code: int
    wall_seconds: float
    cpu_seconds: float
    peak_bytes: int  # resident, of the largest single process
    log: Path

    def figures(self) -> dict[str, float]:
        return {name: value for name, value in asdict(self).items() if name not in {"log", "code"}}


def run_outside(
    command: list[str],
    log: Path,
    *,
    environment: Mapping[str, str] | None = None,
    folder: Path = ROOT,
    limit_seconds: float = LIMIT_SECONDS,
) -> Seen:
    """Run a command in a folder to its end, its output in `log`; killed with its children after the limit."""
    merged = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HUB_DISABLE_TELEMETRY": "1", **(environment or {})}
    merged["PYTHONPATH"] = str(ROOT)
    with log.open("w") as output:
        started = time.perf_counter()
        process = subprocess.Popen(
            command, stdout=output, stderr=subprocess.STDOUT, env=merged, cwd=folder, start_new_session=True
        )
        killer = threading.Timer(limit_seconds, lambda: os.killpg(process.pid, signal.SIGKILL))
        killer.start()
        try:
            _, status, usage = os.wait4(process.pid, 0)
        except BaseException:
            os.killpg(process.pid, signal.SIGKILL)
            raise
        finally:
            killer.cancel()
        wall = time.perf_counter() - started
    process.returncode = os.waitstatus_to_exitcode(status)
    cpu = usage.ru_utime + usage.ru_stime
    return Seen(process.returncode, wall, cpu, usage.ru_maxrss * 1024, log)


def answer_of(command: list[str], log: Path, *, limit_seconds: float = LIMIT_SECONDS) -> dict[str, Any]:
    """The last line a command prints, as JSON, with its figures from outside under `outside`.

    Raises:
        RuntimeError: the command failed; the end of what it printed is in the message.
    """
    seen = run_outside(command, log, limit_seconds=limit_seconds)
    lines = log.read_text(errors="replace").splitlines()
    if seen.code == -signal.SIGKILL and seen.wall_seconds > limit_seconds:
        raise RuntimeError(f"TimeoutError: not done after {limit_seconds:.0f} s")
    if seen.code:
        raise RuntimeError(f"exit code {seen.code}: {' '.join(command)}\n" + "\n".join(lines[-25:]))
    return {**json.loads(lines[-1]), "outside": seen.figures()}


def python(script: str, *arguments: object) -> list[str]:
    """The command that runs a script of this folder with this interpreter."""
    return [sys.executable, str(ROOT / "benchmarks" / "speed" / script), *map(str, arguments)]


class Report:
    """A JSON file that grows by one measurement at a time; what is in it is not measured again, unless it failed."""

    def __init__(self, path: Path, **header: Any) -> None:
        self.path = path
        found = json.loads(path.read_text()) if path.is_file() else {}
        runs = [run for run in found.get("runs", []) if not run.get("failed")]
        commands = [*found.get("commands", []), header.pop("command")]
        self.content: dict[str, Any] = {**found, **header, "commands": list(dict.fromkeys(commands)), "runs": runs}

    def has(self, **key: Any) -> bool:
        return any(all(run.get(name) == value for name, value in key.items()) for run in self.content["runs"])

    def add(self, run: Mapping[str, Any]) -> None:
        self.content["runs"].append(dict(run))
        self.write()
        shown = {name: round(v, 3) if isinstance(v, float) else v for name, v in run.items() if name not in LONG}
        print(json.dumps(shown), file=sys.stderr, flush=True)

    def write(self) -> None:
        staged = self.path.with_suffix(".staged")
        staged.write_text(json.dumps(self.content, indent=1) + "\n")
        staged.rename(self.path)

    def fill(self, keys: Iterable[dict[str, Any]], measure: Callable[[dict[str, Any]], Mapping[str, Any]]) -> None:
        """Measure every key that has no run yet, in order; a contender that fails is noted once and left out then."""
        for key in keys:
            if self.has(**key) or self.has(**{n: v for n, v in key.items() if n not in TURNS}, failed=True):
                continue
            try:
                self.add({**key, **measure(key)})
            except RuntimeError as error:
                print(error, file=sys.stderr)
                self.add({**key, "failed": True, "reason": last_words(str(error))})


def last_words(text: str) -> str:
    """The last line of what a program printed that names an error, which says what went wrong."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    errors = [line for line in lines if "Error" in line.split(" ")[0] and not line.startswith("subprocess.")]
    return (errors or lines)[-1][:300]


LONG = {"losses", "reason", "cosines", "relative_errors", "step_seconds", "tokens_up_to_step"}
TURNS = {"round", "epochs"}  # a failure counts for all of them
