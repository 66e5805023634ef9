"""Hostile bases, adapters, data and recipes: none of their code runs, each is refused in a line; stock calls run it."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tests.security.attacks import ALL
from tests.security.conftest import Act


def everything(folder: Path) -> set[str]:
    return {os.path.join(top, name) for top, folders, files in os.walk(folder) for name in (*folders, *files)}


@pytest.mark.parametrize("name", ALL)
def test_a_hostile_artefact_runs_nothing(name: str, tmp_path: Path, act: Act) -> None:
    attack = ALL[name]
    folder, marker = tmp_path / "artefact", tmp_path / "EXECUTED"
    attack.make(folder, marker)
    before = everything(tmp_path)
    typed = [word.replace("FOLDER", str(folder)) for word in attack.typed]
    done = act("command_line", folder, typed=typed)
    assert not marker.exists()
    assert done["code"] in attack.exits, done["text"]
    assert "Traceback" not in done["text"]
    assert everything(tmp_path) == before  # nothing was published, nothing left behind
    if attack.stock:
        act("stock", folder, call=attack.stock)
        assert marker.exists()  # it is no dud


def test_there_are_as_many_as_are_told() -> None:
    working = sum(attack.stock is not None for attack in ALL.values())
    assert (len(ALL), working) == (36, 22)
