"""One process that has imported everything, in which each task is a fork."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import CHECKOUT

Act = Callable[..., dict[str, Any]]


@pytest.fixture(scope="package")
def act(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Act]:
    """Carry out a task in a fork: `work` says which, see stage.py; its code, text, seconds and MiB come back."""
    aside = tmp_path_factory.mktemp("stage")
    home = aside / "home"
    home.mkdir()
    environment = os.environ | {"PYTHONPATH": str(CHECKOUT), "HF_HUB_OFFLINE": "1", "HOME": str(home)}
    environment |= {"XDG_CACHE_HOME": str(aside / "cache"), "HF_HOME": str(home / "hf"), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-P", "-m", "tests.security.stage"]
    with subprocess.Popen(
        command, cwd=aside, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as stage:
        assert stage.stdin is not None
        assert stage.stdout is not None

        def carry_out(work: str, folder: Path, **task: Any) -> dict[str, Any]:
            values = {"work": work, "folder": str(folder), "output": str(aside / "output"), **task}
            stage.stdin.write(json.dumps(values) + "\n")
            stage.stdin.flush()
            return json.loads(stage.stdout.readline())

        yield carry_out
        stage.stdin.close()
