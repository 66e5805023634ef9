"""A process that labels rows and is killed ends the command with a sentence and its code."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from finetune.data.labelling import ROWS_WITHOUT_WORKERS
from tests.conftest import CHECKOUT, alpaca_rows, write_recipe

# Python runs this at the start of every process; only spawned workers are killed, where they would begin to work.
KILLED = """
import os, sys
if "--multiprocessing-fork" in sys.orig_argv:
    import finetune.data.labelling as labelling
    labelling.label_piece = lambda *_: os.kill(os.getpid(), 9)
"""


@pytest.mark.skipif(os.cpu_count() == 1, reason="one core labels without workers")
def test_a_killed_worker_is_told(tiny_base: Path, tmp_path: Path) -> None:
    (tmp_path / "sitecustomize.py").write_text(KILLED)
    recipe = write_recipe(tmp_path / "recipe", tiny_base, alpaca_rows(ROWS_WITHOUT_WORKERS + 1))
    path = os.pathsep.join([str(tmp_path), str(CHECKOUT)])
    environment = {**os.environ, "PYTHONPATH": path, "XDG_CACHE_HOME": str(tmp_path / "cache")}
    ended = subprocess.run(
        [sys.executable, "-m", "finetune", "plan", str(recipe), "--json"],
        env=environment, capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert ended.returncode == 7, ended.stderr
    assert "Traceback" not in ended.stderr
    (problem,) = json.loads(ended.stdout)["error"]["problems"]
    assert problem["where"] == "reading the rows"
    assert "was killed" in problem["message"]
