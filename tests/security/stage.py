"""Runs tasks in forks of one process that has imported everything: tasks as JSON lines in, what became of them out."""

from __future__ import annotations

import json
import os
import resource
import runpy
import signal
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path


def carry_out(task: dict, work: Callable[[dict], int | None]) -> dict:
    """Fork, do the work in the task's folder, and tell its exit code, text, computing seconds and growth in MiB."""
    output = Path(task["output"])
    before = time.monotonic()
    pid = os.fork()
    if not pid:
        _child(task, output, work)
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    code, megabytes = _watch(pid, task.get("seconds", 60), before)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu = after.ru_utime + after.ru_stime - used.ru_utime - used.ru_stime
    return {"code": code, "cpu": cpu, "mib": megabytes, "text": output.read_text(errors="replace")}


def _child(task: dict, output: Path, work: Callable[[dict], int | None]) -> None:
    code = 1
    try:
        descriptor = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(descriptor, 1)
        os.dup2(descriptor, 2)
        os.chdir(task["folder"])
        if limit := task.get("limit_mib"):
            size = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
            resource.setrlimit(resource.RLIMIT_AS, (size + (limit << 20),) * 2)
        if limit := task.get("cpu_seconds"):
            signal.signal(signal.SIGXCPU, signal.SIG_DFL)
            resource.setrlimit(resource.RLIMIT_CPU, (int(time.process_time()) + limit, -1))
        code = work(task) or 0
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else 1
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def _watch(pid: int, most_seconds: float, since: float) -> tuple[int, int]:
    """Exit code (negative: the signal; -9 after `most_seconds`) and growth of resident memory in MiB."""
    started = _peak(pid)
    highest = started
    while True:
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status), highest - started
        highest = max(highest, _peak(pid))
        if time.monotonic() - since > most_seconds:
            os.kill(pid, signal.SIGKILL)
        time.sleep(0.002)


def _peak(pid: int) -> int:
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) >> 10 for line in lines if line.startswith("VmHWM")), 0)


def prepare(task: dict) -> None:
    for name, value in task.get("environment", {}).items():
        os.environ.pop(name, None)
        if value is not None:
            os.environ[name] = value
    if task.get("site"):  # what grandchildren import on their own start, this process imports now
        runpy.run_path(f"{task['site']}/sitecustomize.py")


def command_line(task: dict) -> None:
    from finetune.cli import main

    prepare(task)
    sys.argv = ["finetune", *task["typed"]]
    main()


def connect(task: dict) -> None:
    """What no command does: listen, and connect to it."""
    import socket

    prepare(task)
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        listening.listen()
        socket.create_connection(listening.getsockname()).close()


def kernels(task: dict) -> None:
    """Whether transformers takes kernels from the hub, and whether the package that fetches them can be imported."""
    import importlib.util

    from transformers.integrations import hub_kernels

    sys.stdout.write(f"{hub_kernels._kernels_enabled} {importlib.util.find_spec('kernels')} {task['folder']}")


def stock(task: dict) -> None:
    import tests.security.stock as calls

    getattr(calls, task["call"])(Path(task["folder"]))


def ours(task: dict) -> None:
    from datetime import datetime

    from finetune.data.rows import Turn
    from finetune.data.template import Template

    template = Template("own", task["template"], "<s>", "</s>", datetime(2024, 7, 26))
    sys.stdout.write(template.text([Turn("user", "x")], add_generation_prompt=True)[:1000])


def theirs(task: dict) -> None:
    import tests.security.stock as calls

    sys.stdout.write(calls.template(task["template"])[:1000])


def main() -> None:
    from finetune.machine import quiet_libraries, refuse_fetched_code

    quiet_libraries()
    refuse_fetched_code()
    import finetune.release.merge
    import finetune.train.train
    import finetune.use.chat

    del finetune  # imported once, so that no fork has to
    works = {work.__name__: work for work in (command_line, connect, kernels, stock, ours, theirs)}
    answers = sys.stdout
    for line in sys.stdin:
        task = json.loads(line)
        answers.write(json.dumps(carry_out(task, works[task["work"]])) + "\n")
        answers.flush()


if __name__ == "__main__":
    main()
