"""What the caches hold is told and can be removed, and nothing beside them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from finetune.cache import clear_caches, look_at_caches


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    entry = tmp_path / "finetune" / "tokens" / "abc"
    entry.mkdir(parents=True)
    (entry / "ids.bin").write_bytes(bytes(1000))
    (entry / "store.json").write_bytes(bytes(24))
    (tmp_path / "finetune" / "calibration.json").write_text("not ours to remove")
    return tmp_path / "finetune"


def test_entries_and_bytes_are_counted(cache: Path) -> None:
    found = {each.kind: (each.entries, each.bytes) for each in look_at_caches()}
    kinds = ("4bit", "tokenizers", "bases", "hashes", "rehearsals", "kernels", "unquantised")
    others = dict.fromkeys(kinds, (0, 0))
    assert found == {"tokens": (1, 1024), **others}


def test_only_the_entries_are_removed(cache: Path) -> None:
    assert sum(each.bytes for each in clear_caches()) == 1024
    assert sum(each.entries for each in look_at_caches()) == 0
    assert (cache / "calibration.json").is_file()


def test_the_command_answers_and_clears(cache: Path) -> None:
    environment = {**os.environ, "XDG_CACHE_HOME": str(cache.parent)}

    def finetune(*words: str) -> dict:
        command = [sys.executable, "-m", "finetune", "cache", *words, "--json"]
        return json.loads(subprocess.run(command, env=environment, capture_output=True, check=True).stdout)

    assert finetune("show")["bytes"] == finetune()["bytes"] == 1024
    assert finetune("clear")["bytes"] == 1024
    assert finetune("show")["bytes"] == 0
