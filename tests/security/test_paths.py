"""Names that lead elsewhere, and archives that grow: no byte outside the folder that was asked for, no large memory."""

from __future__ import annotations

import gzip
import io
import json
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import alpaca_rows, write_recipe
from tests.security.attacks import base, replace
from tests.security.conftest import Act
from tests.security.test_hostile_artefacts import everything

ROW = json.dumps(alpaca_rows(1)[0]).encode() + b"\n"


def named(name: str) -> Callable[[Path], list[str]]:
    def make(folder: Path) -> list[str]:
        recipe = write_recipe(folder, "builtin:pocket-llama", alpaca_rows(4), name=name, output={})
        return ["train", str(recipe)]

    return make


def shard(name: str) -> Callable[[Path], list[str]]:
    """A base whose index names a file elsewhere as a shard."""

    def make(folder: Path) -> list[str]:
        base(folder / "base", without=("model.safetensors",))
        base(folder / "elsewhere")
        index = {"weight_map": {"x": name.replace("ELSEWHERE", str(folder / "elsewhere"))}}
        (folder / "base" / "model.safetensors.index.json").write_text(json.dumps(index))
        return ["generate", str(folder / "base"), "--raw", "--prompt", "x"]

    return make


def manifest(name: str) -> Callable[[Path], list[str]]:
    """A release whose manifest names a file elsewhere, with the right hash."""

    def make(folder: Path) -> list[str]:
        base(folder / "release")
        secret = folder / "secret"
        secret.write_text("secret")
        digest = "2bb80d537b1da3e38bd30361aa855686bde0eacd7162fef6a25fe97bf527a25b"
        listed = [{"name": name.replace("ELSEWHERE", str(secret)), "bytes": 6, "sha256": digest}]
        replace(
            folder / "release" / "finetune.json", json.dumps({"files": listed, "run": None, "proofs": [], "onto": None})
        )
        return ["verify", str(folder / "release")]

    return make


def archive(name: str) -> Callable[[Path], list[str]]:
    def make(folder: Path) -> list[str]:
        recipe = write_recipe(folder, "builtin:pocket-llama", alpaca_rows(4), data__train=str(folder / name))
        content = io.BytesIO()
        if "zip" in name:
            with zipfile.ZipFile(content, "w") as packed:
                packed.writestr("../escaped.jsonl", ROW)
        else:
            with tarfile.open(fileobj=content, mode="w:gz" if name.endswith("gz") else "w") as packed_tar:
                packed_tar.addfile(tarfile.TarInfo("../escaped.jsonl"), io.BytesIO(b""))
        (folder / name).write_bytes(content.getvalue())
        return ["check", str(recipe)]

    return make


CASES = {
    **{f"a run called {name!r}": named(name) for name in (
        "../../escaped", "/escaped", "..", "a/../../escaped", "a\\..\\b", ".")},
    **{f"a shard called {name!r}": shard(name) for name in (
        "../elsewhere/model.safetensors", "ELSEWHERE/model.safetensors", "./../elsewhere/model.safetensors")},
    **{f"a file of a release called {name!r}": manifest(name) for name in ("../secret", "ELSEWHERE", "x/../../secret")},
    **{f"rows in {name}": archive(name) for name in ("rows.zip", "rows.tar", "rows.tar.gz", "rows.jsonl.tgz")},
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_nothing_leaves_its_folder(name: str, tmp_path: Path, act: Act) -> None:
    folder = tmp_path / "a" / "b"
    folder.mkdir(parents=True)
    typed = CASES[name](folder)
    before = everything(tmp_path)
    done = act("command_line", folder, typed=typed)
    assert done["code"] in (2, 3, 6), done["text"]
    assert "Traceback" not in done["text"]
    assert everything(tmp_path) == before
    if "a shard called" in name:
        assert "names a shard outside this folder" in done["text"]


def bomb(kind: str) -> bytes:
    """200 MB of one line in about 1/1000 of that."""
    if kind == "gz":
        return gzip.compress(b"a" * 200_000_000, 9)
    import zstandard

    return zstandard.compress(b"a" * 200_000_000)


@pytest.mark.parametrize("kind", ["gz", "zst"])
def test_a_small_file_that_grows_a_thousand_times_is_refused(kind: str, tmp_path: Path, act: Act) -> None:
    file = tmp_path / f"rows.jsonl.{kind}"
    file.write_bytes(bomb(kind))
    assert file.stat().st_size < 201_000
    recipe = write_recipe(tmp_path, "builtin:pocket-llama", alpaca_rows(4), data__train=str(file))
    done: dict[str, Any] = act("command_line", tmp_path, typed=["check", str(recipe)])
    assert done["code"] == 2, done["text"]
    assert "Traceback" not in done["text"]
    assert done["mib"] < 700


def test_a_run_folder_that_is_a_link_elsewhere_is_not_written_through(tmp_path: Path, act: Act) -> None:
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "mine.txt").write_text("mine")
    recipe = write_recipe(tmp_path, "builtin:pocket-llama", alpaca_rows(4))
    (tmp_path / "run").symlink_to(elsewhere)
    done = act("command_line", tmp_path, typed=["train", str(recipe)])
    assert done["code"] == 2, done["text"]
    assert [path.name for path in elsewhere.iterdir()] == ["mine.txt"]


def test_a_recipe_is_not_copied_through_a_link(tmp_path: Path, act: Act) -> None:
    elsewhere = tmp_path / "elsewhere.yaml"
    elsewhere.write_text("mine")
    (tmp_path / "to" / "recipes").mkdir(parents=True)
    (tmp_path / "to" / "recipes" / "quickstart.yaml").symlink_to(elsewhere)
    done = act("command_line", tmp_path, typed=["recipes", "copy", "quickstart", "--to", str(tmp_path / "to")])
    assert done["code"] == 2, done["text"]
    assert elsewhere.read_text() == "mine"
    assert act("command_line", tmp_path, typed=["recipes", "copy", "../../x"])["code"] == 2
