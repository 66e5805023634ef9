"""Fetching a base: asked of a hub on loopback that counts every byte it sends, never of the client."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
import threading
from collections import namedtuple
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from finetune import fetch as fetch_file
from finetune.errors import StorageError
from tests.conftest import CHECKOUT, POCKET, alpaca_rows, write_recipe

TOKEN = "hf_CanaryCanaryCanaryCanary0123456789"
COMMIT = "c" * 40
WEIGHTS = "model.safetensors"


@dataclass
class Hub:
    """A repository `me/pocket`, what was asked of it, and how it is to misbehave."""

    url: str = ""
    files: dict[str, bytes] = field(default_factory=dict)
    sent: dict[str, int] = field(default_factory=dict)  # bytes, by file
    ranges: list[str] = field(default_factory=list)  # of the weights
    requests: int = 0
    refuse: tuple[int, str] | None = None  # status and error code of every answer
    break_after: int | None = None  # bytes of the weights; from then on nothing more
    damage: str | None = None  # this file's last byte is another on its way

    def siblings(self) -> list[dict[str, Any]]:
        return [self._sibling(name, content) for name, content in self.files.items()]

    def _sibling(self, name: str, content: bytes) -> dict[str, Any]:
        entry: dict[str, Any] = {"rfilename": name, "size": len(content), "blobId": git_sha1(content)}
        if name.endswith(".safetensors"):
            sha256 = hashlib.sha256(content).hexdigest()
            entry["lfs"] = {"sha256": sha256, "size": len(content), "pointerSize": 134}
        return entry


def git_sha1(content: bytes) -> str:
    return hashlib.sha1(b"blob " + str(len(content)).encode() + b"\0" + content).hexdigest()


class Answer(BaseHTTPRequestHandler):
    """One request."""

    hub: Hub

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        hub = self.hub
        hub.requests += 1
        if hub.refuse:
            self._send(
                b'{"error": "no, not with ' + TOKEN.encode() + b'"}', hub.refuse[0], {"X-Error-Code": hub.refuse[1]}
            )
        elif self.path.startswith("/api/models/me/pocket"):
            about = {"id": "me/pocket", "sha": COMMIT, "siblings": hub.siblings(), "tags": [], "private": False}
            self._send(json.dumps(about | {"cardData": {"license": "apache-2.0"}}).encode())
        elif self.path.startswith("/me/pocket/resolve/"):
            self._file(self.path.split("/")[-1])
        else:
            self._send(b"{}", 404, {"X-Error-Code": "RepoNotFound"})

    def _file(self, name: str) -> None:
        hub, content = self.hub, self.hub.files.get(name)
        if content is None:
            self._send(b"{}", 404, {"X-Error-Code": "EntryNotFound"})
            return
        etag = hashlib.sha256(content).hexdigest() if name.endswith(".safetensors") else git_sha1(content)
        headers = {"ETag": f'"{etag}"', "X-Repo-Commit": COMMIT, "Accept-Ranges": "bytes"}
        start, stop, status = 0, len(content), 200
        asked = self.headers.get("Range")
        if asked:
            first, _, last = asked.removeprefix("bytes=").partition("-")
            start, stop, status = int(first), min(int(last) + 1 if last else stop, stop), 206
            headers["Content-Range"] = f"bytes {start}-{stop - 1}/{len(content)}"
        if self.command == "GET" and name == WEIGHTS:
            hub.ranges.append(asked or "")
        if hub.damage == name and stop == len(content):
            content = content[:-1] + bytes([content[-1] ^ 1])
        self._send(content[start:stop], status, headers, name)

    def _send(self, body: bytes, status: int = 200, headers: dict[str, str] | None = None, name: str = "") -> None:
        self.send_response(status)
        for key, value in {"Content-Length": str(len(body)), **(headers or {})}.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command == "HEAD":
            return
        hub = self.hub
        if name == WEIGHTS and hub.break_after is not None:
            body, hub.refuse = body[: hub.break_after], (403, "")
        hub.sent[name] = hub.sent.get(name, 0) + len(body)
        with suppress(BrokenPipeError, ConnectionResetError):
            self.wfile.write(body)

    def log_message(self, format: str, *args: Any) -> None:
        """Quiet."""


@pytest.fixture
def hub() -> Iterator[Hub]:
    names = ("config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", "README.md", WEIGHTS)
    found = Hub(files={name: (POCKET / name).read_bytes() for name in names if (POCKET / name).is_file()})
    found.files |= {
        "pytorch_model.bin": b"pickle" * 999,
        "training_args.bin": b"x",
        "consolidated.safetensors": b"x" * 99,
    }
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("HubAnswer", (Answer,), {"hub": found}))
    found.url = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield found
    server.shutdown()
    thread.join()
    server.server_close()


def finetune(hub: Hub, home: Path, *arguments: str, **more: str) -> subprocess.CompletedProcess[str]:
    environment = {"PATH": os.environ["PATH"], "HOME": str(home), "HF_HOME": str(home / "hf"), "HF_ENDPOINT": hub.url}
    environment |= {"HF_TOKEN": TOKEN, "PYTHONPATH": str(CHECKOUT), "XDG_CACHE_HOME": str(home / "cache")}
    command = [sys.executable, "-m", "finetune", *arguments]
    done = subprocess.run(command, env=environment | more, cwd=home, capture_output=True, text=True, check=False)
    assert TOKEN not in done.stdout + done.stderr
    assert "Traceback" not in done.stderr, done.stderr
    return done


def snapshot(home: Path) -> Path:
    return home / "hf" / "hub" / "models--me--pocket" / "snapshots" / COMMIT


def test_only_what_is_used_is_fetched_and_its_size_said_first(hub: Hub, tmp_path: Path) -> None:
    done = finetune(hub, tmp_path, "fetch", "me/pocket", "--json")
    assert done.returncode == 0, done.stderr
    values = json.loads(done.stdout)
    wanted = {name for name in hub.files if not name.endswith(".bin") and name != "consolidated.safetensors"}
    assert {entry["name"] for entry in values["files"]} == wanted
    assert {path.name for path in snapshot(tmp_path).iterdir()} == wanted
    assert all((snapshot(tmp_path) / name).read_bytes() == hub.files[name] for name in wanted)
    total = sum(len(hub.files[name]) for name in wanted)
    assert values["fetched_bytes"] == total
    assert values["licence"] == "apache-2.0"
    first = done.stderr.splitlines()[0]
    assert first.startswith(f"me/pocket at {COMMIT[:12]}: {len(wanted)} files, {total / 2**20:.2f} MiB, of which ")
    assert not {"pytorch_model.bin", "consolidated.safetensors"} & hub.sent.keys()
    sent = hub.sent[WEIGHTS]
    again = finetune(hub, tmp_path, "fetch", "me/pocket")
    assert again.returncode == 0
    assert hub.sent[WEIGHTS] == sent == len(hub.files[WEIGHTS])
    # What is whole is taken without a word to the hub.
    asked = hub.requests
    recipe = write_recipe(tmp_path, "me/pocket", alpaca_rows(5), data__empty_answer="drop")
    used = finetune(hub, tmp_path, "check", str(recipe), "--only", "data", HF_HUB_OFFLINE="1")
    assert used.returncode == 0, used.stderr
    assert hub.requests == asked


def test_a_broken_download_goes_on_where_it_stopped(hub: Hub, tmp_path: Path) -> None:
    hub.files[WEIGHTS] = bytes(range(250)) * 100_000
    hub.break_after = 12_000_000
    done = finetune(hub, tmp_path, "fetch", "me/pocket")
    assert done.returncode == 2
    assert "me/pocket: the hub refused it (status 403)" in done.stderr
    assert not (snapshot(tmp_path) / WEIGHTS).exists()
    hub.break_after = hub.refuse = None
    hub.ranges.clear()
    assert finetune(hub, tmp_path, "fetch", "me/pocket").returncode == 0
    assert hub.ranges == [f"bytes={10 * 2**20}-"]  # it is written in pieces of 10 MiB
    assert hub.sent[WEIGHTS] == len(hub.files[WEIGHTS]) + 12_000_000 - 10 * 2**20
    assert (snapshot(tmp_path) / WEIGHTS).read_bytes() == hub.files[WEIGHTS]


@pytest.mark.parametrize("name", [WEIGHTS, "config.json"])
def test_a_file_damaged_on_its_way_is_seen_and_fetched_again(hub: Hub, tmp_path: Path, name: str) -> None:
    hub.damage = name
    done = finetune(hub, tmp_path, "fetch", "me/pocket", "--json")
    assert done.returncode == 3
    ((problem),) = json.loads(done.stdout)["error"]["problems"]
    assert problem["where"].endswith(name)
    assert "is not the hub's" in problem["message"]
    assert not (snapshot(tmp_path) / name).exists()
    hub.damage = None
    assert finetune(hub, tmp_path, "fetch", "me/pocket").returncode == 0
    assert (snapshot(tmp_path) / name).read_bytes() == hub.files[name]


@pytest.mark.parametrize(
    ("refuse", "words"),
    [
        ((403, "GatedRepo"), "open https://huggingface.co/me/pocket, agree to it with your account"),
        ((401, "GatedRepo"), "then `hf auth login` (or set HF_TOKEN)"),
        ((404, "RepoNotFound"), "the hub has no such model, or a private one"),
        ((404, "RevisionNotFound"), "has no such revision"),
        ((500, ""), "the hub refused it (status 500); try again later"),
    ],
)
def test_a_refusal_is_explained(hub: Hub, tmp_path: Path, refuse: tuple[int, str], words: str) -> None:
    hub.refuse = refuse
    done = finetune(hub, tmp_path, "fetch", "me/pocket")
    assert done.returncode == 2
    assert words in done.stderr
    assert len(done.stderr.splitlines()) == 1


def test_offline_makes_no_connection(hub: Hub, tmp_path: Path) -> None:
    for arguments in (["fetch", "me/pocket"], ["train", str(write_recipe(tmp_path, "me/pocket", alpaca_rows(5)))]):
        done = finetune(hub, tmp_path, *arguments, "--offline")
        assert done.returncode == 2
        assert "the network is switched off" in done.stderr
    assert hub.requests == 0


def test_a_hub_that_is_not_there_is_told(hub: Hub, tmp_path: Path) -> None:
    done = finetune(hub, tmp_path, "fetch", "me/pocket", HF_ENDPOINT="http://127.0.0.1:9")
    assert done.returncode == 2
    assert "the hub cannot be reached" in done.stderr


def test_a_repository_of_pickles_is_refused_before_anything_is_fetched(hub: Hub, tmp_path: Path) -> None:
    del hub.files[WEIGHTS]
    done = finetune(hub, tmp_path, "fetch", "me/pocket")
    assert done.returncode == 2
    assert "holds no weights as model.safetensors; there is consolidated.safetensors, which is not read" in done.stderr
    assert set(hub.sent) == {""}


def test_a_missing_base_is_fetched_by_the_command_that_needs_it(hub: Hub, tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path, "me/pocket", alpaca_rows(5), data__empty_answer="drop")
    done = finetune(hub, tmp_path, "check", str(recipe), "--only", "data")
    assert done.returncode == 0, done.stderr
    assert done.stderr.startswith(f"fetching me/pocket at {COMMIT[:12]}: ")
    assert hub.sent[WEIGHTS] == len(hub.files[WEIGHTS])


def test_a_plan_fetches_no_weights(hub: Hub, tmp_path: Path) -> None:
    """What transformers would download to load it, against what the hub sent: headers only."""
    recipe = write_recipe(tmp_path, "me/pocket", alpaca_rows(5), data__empty_answer="drop")
    done = finetune(hub, tmp_path, "plan", str(recipe), "--json")
    assert done.returncode == 0, done.stderr
    here = finetune(hub, tmp_path, "plan", str(recipe), "--json", "--set", "model.base=builtin:pocket-llama")
    values, known = json.loads(done.stdout), json.loads(here.stdout)
    for key in ("base_parameters", "trainable_parameters", "tokens", "steps", "peak_memory_gib", "stop_token_ids"):
        assert values[key] == known[key]
    assert hub.sent[WEIGHTS] <= 110_000 < len(hub.files[WEIGHTS])
    assert not (snapshot(tmp_path) / WEIGHTS).exists()


def test_a_disk_without_room_is_told_before_anything_is_fetched(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(10**12, 0, 2**33))
    fetch_file._refuse_full_disk(tmp_path / "not" / "there", 2**32)
    with pytest.raises(StorageError, match=r"8\.00 GiB are to be fetched, 8\.00 GiB are free; make room"):
        fetch_file._refuse_full_disk(tmp_path / "not" / "there", 2**33)
