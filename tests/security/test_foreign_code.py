"""Whose code may run: nobody's, except the very bytes that the command line names."""

from __future__ import annotations

import json
import re
from hashlib import sha256
from pathlib import Path

import pytest

from finetune.errors import UserError
from finetune.trust import allow_foreign_code, allowed_commit, check_foreign_code, code_sha256, is_trusted
from tests.conftest import POCKET, alpaca_rows, write_recipe
from tests.security.attacks import base, code
from tests.security.conftest import Act

MODEL = """
from transformers import LlamaConfig, LlamaForCausalLM
class C(LlamaConfig):
    model_type = "own"
class M(LlamaForCausalLM):
    config_class = C
"""
MAP = {"model_type": "own", "auto_map": {"AutoConfig": "own.C", "AutoModelForCausalLM": "own.M"}}


@pytest.fixture(autouse=True)
def _nothing_allowed_afterwards():
    yield
    allow_foreign_code(None)


def own(folder: Path, marker: Path) -> Path:
    base(folder, config=MAP)
    (folder / "own.py").write_text(code(marker) + MODEL)
    return folder


def test_the_refusal_says_what_to_type_and_that_works(tmp_path: Path, act: Act) -> None:
    folder, marker = own(tmp_path / "base", tmp_path / "EXECUTED"), tmp_path / "EXECUTED"
    typed = ["generate", str(folder), "--raw", "--prompt", "x", "--max-new-tokens", "2"]
    refused = act("command_line", tmp_path, typed=typed)
    assert refused["code"] == 2
    assert not marker.exists()
    (permission,) = re.findall(r"--trust-remote-code (\S+);", refused["text"])
    content = (folder / "own.py").read_bytes()
    assert (
        permission
        == f"{folder}@{sha256(b'own.py' + f'{chr(10)}{len(content)}{chr(10)}'.encode() + content).hexdigest()}"
    )
    done = act("command_line", tmp_path, typed=[*typed, "--trust-remote-code", permission])
    assert done["code"] == 0, done["text"]
    assert marker.exists()


def test_other_bytes_another_folder_and_another_pin_are_refused(tmp_path: Path) -> None:
    folder = own(tmp_path / "base", tmp_path / "x")
    with pytest.raises(UserError) as caught:
        check_foreign_code(str(folder), folder)
    (permission,) = re.findall(r"--trust-remote-code (\S+);", str(caught.value))
    allow_foreign_code(permission)
    check_foreign_code(str(folder), folder)
    assert is_trusted(folder)
    (folder / "own.py").write_text("# changed\n")
    assert not is_trusted(folder)
    for wrong in (permission[:-1] + ("0" if permission[-1] != "0" else "1"), permission.replace("base@", "other@")):
        allow_foreign_code(wrong)
        with pytest.raises(UserError, match=r"asks for Python code of its own \(auto_map\)"):
            check_foreign_code(str(folder), folder)
    assert not is_trusted(folder)


def test_a_repository_is_allowed_at_one_commit_only(tmp_path: Path) -> None:
    commit, other = "a" * 40, "b" * 40
    for each in (commit, other):
        own(tmp_path / "snapshots" / each, tmp_path / "x")
        (tmp_path / "snapshots" / each / "own.py").write_text(MODEL + f"# {each}")
    allow_foreign_code(f"org/name@{commit}")
    assert (allowed_commit("org/name"), allowed_commit("org/another")) == (commit, None)
    check_foreign_code("org/name", tmp_path / "snapshots" / commit)
    assert is_trusted(tmp_path / "snapshots" / commit)
    with pytest.raises(UserError, match=f"--trust-remote-code org/name@{other}"):
        check_foreign_code("org/name", tmp_path / "snapshots" / other)
    allow_foreign_code(f"org/name@{commit}")
    with pytest.raises(UserError, match=f"--trust-remote-code org/another@{commit}"):
        check_foreign_code("org/another", tmp_path / "snapshots" / commit)
    assert not is_trusted(tmp_path / "snapshots" / other)


def test_a_run_records_the_code_it_was_allowed_and_goes_on_with_no_other(tmp_path: Path, act: Act) -> None:
    folder, run = own(tmp_path / "base", tmp_path / "EXECUTED"), tmp_path / "run"
    recipe = write_recipe(tmp_path, folder, alpaca_rows(8), train__max_steps=1)

    def train(*typed: str) -> dict:
        return act("command_line", tmp_path, typed=["train", str(recipe), *typed])

    def allowed_now() -> str:
        return f"{folder}@{code_sha256(folder)}"

    first = allowed_now()
    began = train("--trust-remote-code", first)
    assert began["code"] == 0, began["text"]
    assert json.loads((run / "lock.json").read_text())["foreign_code"] == {first: code_sha256(folder)}
    longer = ("--resume", "--set", "train.max_steps=2")
    assert f"allow it with --trust-remote-code {first}" in train(*longer)["text"]

    before = (folder / "own.py").read_bytes()
    (folder / "own.py").write_bytes(before + b"# another commit\n")
    other = train("--trust-remote-code", allowed_now(), *longer)
    assert other["code"] == 2
    assert f"was {first} when this run began, is {allowed_now()}; restore that code" in other["text"]

    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "auto_map": None, "model_type": "llama"}))
    without = train(*longer)
    assert without["code"] == 2
    assert f"was {first} when this run began, is none; restore that code" in without["text"]

    (folder / "own.py").write_bytes(before)
    (folder / "config.json").write_text(json.dumps(config))
    again = train("--trust-remote-code", first, *longer)
    assert again["code"] == 0, again["text"]
    assert (run / "checkpoints" / "step-000002").is_dir()


def test_code_of_a_repository_is_recorded_with_its_commit_and_bytes() -> None:
    from finetune.artifact import _other_code

    was, other = {"org/name@" + "a" * 40: "1" * 64}, {"org/name@" + "b" * 40: "1" * 64}
    (problem,) = _other_code(was, other)
    assert f"was org/name@{'a' * 40} (sha256 {'1' * 64}) when" in problem.message
    assert f"is org/name@{'b' * 40} (sha256 {'1' * 64});" in problem.message
    assert not _other_code(was, dict(was))


@pytest.mark.parametrize(
    "text", ["x", "org/name", "org/name@main", "org/name@abc", "@" + "a" * 40, "org/name@" + "A" * 40, ""]
)
def test_what_pins_nothing_is_no_permission(text: str) -> None:
    with pytest.raises(UserError, match="names no code; write REPO@<commit, 40 hex digits>"):
        allow_foreign_code(text)


def test_a_permission_never_comes_from_a_file(tmp_path: Path) -> None:
    folder = own(tmp_path / "base", tmp_path / "x")
    for name in ("plan.json", "lock.json", "recipe.yaml", "finetune.json"):
        (folder / name).write_text(json.dumps({"foreign_code": {"x": "y"}, "trust_remote_code": True}))
    with pytest.raises(UserError):
        check_foreign_code(str(folder), folder)
    check_foreign_code("builtin:pocket-llama", POCKET)
    assert not is_trusted(POCKET)


def test_no_library_can_fetch_a_kernel(tmp_path: Path, act: Act) -> None:
    assert act("kernels", tmp_path)["text"] == f"False None {tmp_path}"
