"""What is pushed is what was proven: asked of a hub on loopback that hashes what it gets, never of the client."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from finetune.artifact import read_json, write_json
from finetune.cli import main
from finetune.errors import Problem, ProofError, UserError
from finetune.release import verify as verify_file
from finetune.release.fresh import Proof
from finetune.release.manifest import MANIFEST, damaged_files, describe_files
from finetune.release.push import push
from tests.release.fake_hub import FakeHub, fake_hub

TOKEN = "hf_CanaryCanaryCanaryCanary0123456789"
CHECKOUT = Path(__file__).resolve().parents[2]
# huggingface_hub sends a commit's bytes by a name that its HTTP library deprecates.
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")
LARGE = bytes(range(256)) * 1000  # bytes of a file that travels as a large one


@dataclass
class Done:
    """How a command ended, and what it wrote."""

    returncode: int
    stdout: str
    stderr: str


@pytest.fixture
def hub() -> Iterator[FakeHub]:
    with fake_hub() as running:
        yield running


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A release as far as its manifest goes; its run is not there."""
    return make_release(tmp_path / "demo")


def make_release(folder: Path, *, base: str = "someone/base") -> Path:
    (folder / "sub").mkdir(parents=True)
    (folder / "README.md").write_text("---\nlicense: mit\n---\n# demo\n")
    (folder / "model.safetensors").write_bytes(LARGE)
    (folder / "config.json").write_text("{}")
    (folder / "sub" / "more.txt").write_text("Grüße | mehr")
    manifest: dict[str, Any] = {"version": 1, "run": "../gone", "base": {"id": base, "revision": None, "sha256": {}}}
    proofs = [{"name": "no-op", "value": 0.0, "limit": 1.0, "passed": True}]
    manifest |= {"onto": None, "proofs": proofs, "files": describe_files(folder)}
    write_json(folder / MANIFEST, manifest)
    return folder


def finetune_push(folder: Path, hub: FakeHub, *options: str, token: str | None = TOKEN, **more: str) -> Done:
    """The command in a process of its own, so that every byte that it writes anywhere can be looked at."""
    home = folder.parent / "home"
    home.mkdir(exist_ok=True)
    environment = {"PATH": os.environ["PATH"], "HOME": str(home), "HF_HOME": str(home / "hf"), "HF_ENDPOINT": hub.url}
    environment |= {"HF_HUB_DISABLE_XET": "1", "PYTHONPATH": str(CHECKOUT), **({"HF_TOKEN": token} if token else {})}
    command = [sys.executable, "-m", "finetune", "push", str(folder), "me/repo", *options]
    done = subprocess.run(
        command, env=environment | more, cwd=folder.parent, capture_output=True, text=True, check=False
    )
    return Done(done.returncode, done.stdout, done.stderr)


@pytest.fixture
def push_here(
    folder: Path, hub: FakeHub, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[..., Done]:
    """The command in this process, which saves a second each; huggingface_hub read its environment long ago."""
    from huggingface_hub import constants

    for name, value in {"ENDPOINT": hub.url, "HF_HUB_OFFLINE": False, "HF_HUB_DISABLE_XET": True}.items():
        monkeypatch.setattr(constants, name, value)
    monkeypatch.delenv("HF_HUB_OFFLINE")
    monkeypatch.setenv("HF_TOKEN", TOKEN)

    def run(*options: str) -> Done:
        monkeypatch.setattr(sys, "argv", ["finetune", "push", str(folder), "me/repo", *options])
        code = 0
        try:
            main()
        except SystemExit as end:
            code = int(end.code or 0)
        return Done(code, *capsys.readouterr())

    return run


def everything_written(folder: Path, done: Done) -> bytes:
    files = b"".join(file.read_bytes() for file in folder.parent.rglob("*") if file.is_file())
    return files + done.stdout.encode() + done.stderr.encode()


def test_every_file_arrives_once_in_one_commit_and_no_other(folder: Path, hub: FakeHub) -> None:
    done = finetune_push(folder, hub, "--files-only", "--private", "--json")
    hub.private = True
    assert done.returncode == 2, done.stderr  # the hub said that the repository is public
    assert "public" in done.stderr
    assert not hub.commits
    done = finetune_push(folder, hub, "--files-only", "--private", "--json")
    assert done.returncode == 0, done.stderr
    assert hub.created == {"name": "repo", "organization": "me", "visibility": "private"}
    expected = {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}
    assert hub.files == expected
    assert hub.large == {"model.safetensors"}
    assert len(hub.commits) == 1
    assert hub.tokens == {TOKEN}
    answer = json.loads(done.stdout)
    assert answer["out"] == f"{hub.url}/me/repo"
    assert {entry["name"]: entry["sha256"] for entry in answer["files"]} == {
        name: hashlib.sha256(content).hexdigest() for name, content in expected.items()
    }
    assert [found["passed"] for found in answer["proofs"]] == [True, True]
    assert TOKEN.encode() not in everything_written(folder, done)
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("extra", [".env", "notes.txt"])
def test_a_file_that_is_not_in_the_manifest_stops_everything(
    folder: Path, hub: FakeHub, push_here: Callable[..., Done], extra: str
) -> None:
    (folder / extra).write_text("secret")
    done = push_here("--files-only")
    assert done.returncode == 6
    assert extra in done.stderr
    assert not any("commit" in path or "create" in path for _, path in hub.requests)


@pytest.mark.parametrize("name", [".hidden", "../outside.txt", "/etc/hostname", "sub/.hidden"])
def test_a_manifest_that_names_hidden_or_foreign_files_is_refused(folder: Path, name: str) -> None:
    manifest = read_json(folder / MANIFEST)
    entry = {"name": name, "bytes": 1, "sha256": "0" * 64}
    write_json(folder / MANIFEST, manifest | {"files": [*manifest["files"], entry]})
    with pytest.raises(ProofError, match="no file of a release"):
        push(folder, "me/repo", dry_run=True)


def test_a_link_that_leads_out_of_the_folder_is_refused(folder: Path) -> None:
    (folder.parent / "secret.txt").write_text("secret")
    (folder / "link.txt").symlink_to(folder.parent / "secret.txt")
    write_json(folder / MANIFEST, read_json(folder / MANIFEST) | {"files": describe_files(folder)})
    with pytest.raises(ProofError, match="link.txt: is no file of a release"):
        push(folder, "me/repo", dry_run=True)


def test_a_changed_file_is_seen_before_anything_is_asked_of_the_hub(
    folder: Path, hub: FakeHub, push_here: Callable[..., Done]
) -> None:
    (folder / "config.json").write_text("[]")
    done = push_here("--files-only", "--json")
    assert done.returncode == 6
    assert json.loads(done.stdout)["error"]["code"] == 6
    assert not hub.requests


def test_what_the_hub_has_otherwise_than_the_manifest_is_told(hub: FakeHub, push_here: Callable[..., Done]) -> None:
    for name in ("model.safetensors", "config.json"):  # a large file and a git blob
        hub.files.clear()
        hub.damage = name
        done = push_here("--files-only")
        assert done.returncode == 6, done.stderr
        assert f"me/repo/{name}: differs" in done.stderr


def test_files_of_another_release_stay_unless_asked(hub: FakeHub, push_here: Callable[..., Done]) -> None:
    hub.files |= {"model-00002-of-00002.safetensors": b"old", ".gitattributes": b"by the hub"}
    done = push_here("--files-only")
    assert done.returncode == 2
    assert "model-00002-of-00002.safetensors" in done.stderr
    assert "--replace" in done.stderr
    assert not hub.commits
    done = push_here("--files-only", "--replace")
    assert done.returncode == 0, done.stderr
    assert "model-00002-of-00002.safetensors" not in hub.files
    assert hub.files[".gitattributes"] == b"by the hub"
    assert len(hub.commits) == 1


@pytest.mark.parametrize(
    ("part", "status", "told"),
    [
        ("/api/", 401, "hf auth login"),
        ("preupload", 403, "write permission"),
        ("/api/", 404, "correct OWNER"),
        ("/commit/", 409, "push again"),
        ("/commit/", 412, "somebody else committed"),
        ("preupload", 400, "correct what it names"),
        ("lfs/", 403, "write permission"),
    ],
)
def test_what_a_hub_refuses_is_told_with_the_cure_and_without_the_token(
    folder: Path, hub: FakeHub, push_here: Callable[..., Done], part: str, status: int, told: str
) -> None:
    hub.refuse = {part: status}
    done = push_here("--files-only", "--json")
    assert hub.tokens == {TOKEN}  # it was really sent
    assert done.returncode == 2, done.stderr
    assert told in done.stderr
    assert "Traceback" not in done.stderr
    assert TOKEN.encode() not in everything_written(folder, done)
    assert json.loads(done.stdout)["error"]["code"] == 2
    assert not hub.files


def test_no_network_no_token_and_offline_are_told_apart(folder: Path, hub: FakeHub) -> None:
    offline = finetune_push(folder, hub, "--files-only", "--offline")
    environment = finetune_push(folder, hub, "--files-only", HF_HUB_OFFLINE="1")
    nobody = finetune_push(folder, hub, "--files-only", token=None)
    assert not hub.requests
    for done, told in ((offline, "switched off"), (environment, "switched off"), (nobody, "hf auth login")):
        assert done.returncode == 2, done.stderr
        assert told in done.stderr
        assert "Traceback" not in done.stderr
    gone = finetune_push(folder, FakeHub("http://127.0.0.1:9"), "--files-only")  # nobody listens on the discard port
    assert gone.returncode == 2, gone.stderr
    assert "cannot be reached" in gone.stderr
    assert TOKEN.encode() not in everything_written(folder, gone)


def test_a_dry_run_needs_neither_network_nor_token(folder: Path, hub: FakeHub) -> None:
    done = finetune_push(folder, hub, "--dry-run", token=None, HF_HUB_OFFLINE="1")
    assert done.returncode == 0, done.stderr
    assert not hub.requests
    assert f"{hub.url}/me/repo" in done.stdout
    for file in (each for each in folder.rglob("*") if each.is_file()):
        line = next(line for line in done.stdout.splitlines() if line.endswith(f"  {file.relative_to(folder)}"))
        assert line.split()[0] == f"{file.stat().st_size:,}"


def test_without_its_run_the_user_decides(hub: FakeHub, push_here: Callable[..., Done]) -> None:
    done = push_here()
    assert done.returncode == 2
    assert "not proven again: no-op" in done.stderr
    assert "--files-only" in done.stderr
    assert not hub.requests


def test_a_failed_proof_is_told_before_anything_is_uploaded(
    hub: FakeHub, push_here: Callable[..., Done], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[Path] = []

    def fail(folder: Path) -> None:
        asked.append(folder)
        raise ProofError(Problem(f"{folder}: proof no-op", "2, at most 1 was allowed"))

    monkeypatch.setattr(verify_file, "verify", fail)
    done = push_here()
    assert done.returncode == 6
    assert "proof no-op" in done.stderr
    assert asked
    assert not hub.requests


def test_what_was_proven_again_is_uploaded_and_told(
    folder: Path, hub: FakeHub, push_here: Callable[..., Done], monkeypatch: pytest.MonkeyPatch
) -> None:
    files = read_json(folder / MANIFEST)["files"]
    again = verify_file.Verification(folder, files, [Proof("no-op", 0.25, 0.5, passed=True)], None)
    monkeypatch.setattr(verify_file, "verify", lambda _: again)  # test_merge.py has the real one
    done = push_here("--revision", "v2", "--json")
    assert done.returncode == 0, done.stderr
    assert [found["name"] for found in json.loads(done.stdout)["proofs"]] == [
        "no-op",
        "files on the hub that differ from the manifest",
    ]
    assert any(path.endswith("/branch/v2") for _, path in hub.requests)
    assert any(path.endswith("/commit/v2") for _, path in hub.requests)
    assert len(hub.commits) == 1


@pytest.mark.parametrize(
    "repo", ["repo", "a/b/c", "me/", "/x", "me/re po", "me/--x", "../x", "me/a--b", "me/x.git", "https://h/x"]
)
def test_a_name_that_is_none_is_refused(folder: Path, repo: str) -> None:
    with pytest.raises(UserError, match="OWNER/NAME"):
        push(folder, repo, dry_run=True)


def test_the_licence_of_a_llama_is_told_about_the_name_of_the_repository(tmp_path: Path) -> None:
    folder = make_release(tmp_path / "demo")
    (folder / "README.md").write_text("---\nlicense: llama3.2\n---\n")
    write_json(folder / MANIFEST, read_json(folder / MANIFEST) | {"files": []})
    write_json(folder / MANIFEST, read_json(folder / MANIFEST) | {"files": describe_files(folder)})
    (note,) = push(folder, "me/helper", dry_run=True).notes
    assert "'Llama'" in note
    assert "me/Llama-helper" in note
    assert not push(folder, "me/llama-helper", dry_run=True).notes


def test_a_downloaded_release_has_two_things_more(folder: Path) -> None:
    (folder / ".cache" / "huggingface").mkdir(parents=True)
    (folder / ".cache" / "huggingface" / "x.lock").write_text("")
    (folder / ".gitattributes").write_text("*.safetensors filter=lfs")
    files = read_json(folder / MANIFEST)["files"]
    assert damaged_files(folder, files) == []
    assert {entry["name"] for entry in push(folder, "me/repo", dry_run=True).files} == {
        *(entry["name"] for entry in files),
        MANIFEST,
    }
    (folder / ".cache" / "other").write_text("")
    assert len(damaged_files(folder, files)) == 1


def test_the_folder_that_is_no_release_is_named(tmp_path: Path) -> None:
    shutil.rmtree(tmp_path)
    tmp_path.mkdir()
    with pytest.raises(UserError, match=r"no release"):
        push(tmp_path, "me/repo", dry_run=True)
