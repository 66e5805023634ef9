"""`finetune train` in processes of its own, forked from one that has imported everything: a second, not ten, a run.

A hook is Python that the child executes first: it patches a function so that a signal, a full disk or a NaN comes at an
exact moment. So no test waits for a clock.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from tests.conftest import CHECKOUT

WEIGHTS = "adapter_model.safetensors"

SERVER = """
import json, os, signal, sys
from finetune.machine import quiet_libraries
quiet_libraries()
import torch, trl, matplotlib.pyplot, transformers.models.llama.modeling_llama, rich.progress
import finetune.cli, finetune.run, finetune.model.adapter, finetune.model.load, finetune.train.train

def child(order):
    for number, path in ((1, order["out"]), (2, order["err"])):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT, 0o600), number)
    os.environ.update(order["environment"])
    sys.argv = ["finetune", *order["arguments"]]
    code = 1
    try:
        exec(order["hook"], {})
        finetune.cli.main()
        code = 0
    except SystemExit as end:
        code = end.code or 0
    except BaseException:
        import traceback
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)

for line in sys.stdin:
    order = json.loads(line)
    if "wait" in order:
        print(os.waitstatus_to_exitcode(os.waitpid(order["wait"], 0)[1]), flush=True)
        continue
    pid = os.fork()
    if pid == 0:
        signal.signal(signal.SIGINT, signal.default_int_handler)  # whatever ignores them where the tests were started
        signal.signal(signal.SIGHUP, signal.SIG_DFL)
        child(order)
    print(pid, flush=True)
"""


@dataclass(frozen=True)
class Ended:
    """How a process ended and what it said."""

    code: int
    out: str
    err: str


@dataclass(frozen=True)
class Child:
    """A running `finetune train`."""

    nursery: Nursery
    pid: int
    folder: Path

    def wait(self) -> Ended:
        code = int(self.nursery.ask({"wait": self.pid}))
        return Ended(code, (self.folder / "out").read_text(), (self.folder / "err").read_text())

    def kill(self) -> None:
        """Whatever became of it; one that was waited for is gone."""
        with suppress(ProcessLookupError):
            os.kill(self.pid, signal.SIGKILL)


class Nursery:
    """The process that the runs are forked from."""

    def __init__(self, process: subprocess.Popen[str], folder: Path) -> None:
        self.process = process
        self.folder = folder

    def ask(self, order: dict) -> str:
        assert self.process.stdin
        assert self.process.stdout
        self.process.stdin.write(json.dumps(order) + "\n")
        self.process.stdin.flush()
        return self.process.stdout.readline()

    def start(self, *arguments: object, hook: str = "", environment: dict[str, str] | None = None) -> Child:
        folder = Path(tempfile.mkdtemp(dir=self.folder))
        order = {
            "arguments": ["train", *map(str, arguments)],
            "hook": hook,
            "environment": environment or {},
            "out": str(folder / "out"),
            "err": str(folder / "err"),
        }
        return Child(self, int(self.ask(order)), folder)

    def train(self, *arguments: object, hook: str = "") -> Ended:
        return self.start(*arguments, hook=hook).wait()

    def train_ranks(self, count: int, *arguments: object, hooks: dict[int, str] | None = None) -> list[Ended]:
        """One process a rank, to their ends; `hooks` by rank."""
        return [child.wait() for child in self.start_ranks(count, *arguments, hooks=hooks)]

    def start_ranks(self, count: int, *arguments: object, hooks: dict[int, str] | None = None) -> list[Child]:
        """One process a rank, as torchrun starts them."""
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        children = []
        for rank in range(count):
            environment = {
                "RANK": str(rank),
                "LOCAL_RANK": str(rank),
                "WORLD_SIZE": str(count),
                "LOCAL_WORLD_SIZE": str(count),
                "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": str(port),
            }
            children.append(self.start(*arguments, hook=(hooks or {}).get(rank, ""), environment=environment))
        return children


@contextmanager
def nursery_in(folder: Path) -> Iterator[Nursery]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(CHECKOUT)}
    process = subprocess.Popen(
        [sys.executable, "-c", SERVER],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment, cwd=folder,
    )  # fmt: skip
    try:
        yield Nursery(process, folder)
    finally:
        process.kill()
        process.communicate()


def weights(run: Path) -> bytes:
    return (run / "adapter" / WEIGHTS).read_bytes()
