"""Train, check, merge, export, generate and evaluate once: no connection, no listening socket, no secret written."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import alpaca_rows, write_recipe
from tests.security.conftest import Act

# Python tells these of every socket; a child process of a command imports this file when it starts.
WATCH = """
import os, sys
def tell(event, arguments, file=os.environ['SOCKET_LOG']):
    if event in ('socket.connect', 'socket.bind', 'socket.getaddrinfo', 'socket.gethostbyname', 'socket.sendto'):
        with open(file, 'a') as log:
            log.write(f'{event} {arguments[1:]}\\n')
sys.addaudithook(tell)
"""
SECRETS = {
    "HF_TOKEN": "hf_canaryAAAAAAAAAAAAAAAAAAAAAAAAAAAAA",
    "HUGGING_FACE_HUB_TOKEN": "hf_canaryBBBBBBBBBBBBBBBBBBBBBBBBBBBBB",
    "WANDB_API_KEY": "canarycccccccccccccccccccccccccccccccccc",
    "AWS_SECRET_ACCESS_KEY": "canaryDDDDDDDDDDDDDDDDDDDDDDDDDDDDDDDDDD",
}
IN_FILES = {".netrc": "canaryEEEEEEEEEEEEEEEE", "token": "hf_canaryFFFFFFFFFFFFFFFFFFFFFFFFFFFFF"}


@dataclass(frozen=True)
class Life:
    """The folder everything was written into, what each command said, and the sockets it used."""

    folder: Path
    done: Mapping[str, dict[str, Any]]
    sockets: str


@pytest.fixture(scope="module")
def life(tmp_path_factory: pytest.TempPathFactory, act: Act) -> Life:
    aside, folder = tmp_path_factory.mktemp("aside"), tmp_path_factory.mktemp("life")
    (aside / "sitecustomize.py").write_text(WATCH)
    (aside / ".netrc").write_text(f"machine huggingface.co login me password {IN_FILES['.netrc']}\n")
    (aside / "token").write_text(IN_FILES["token"])
    environment = {
        **SECRETS,
        "SOCKET_LOG": str(aside / "log"),
        "HF_TOKEN_PATH": str(aside / "token"),
        "HF_HUB_OFFLINE": None,
    }
    environment |= {"NETRC": str(aside / ".netrc"), "PYTHONPATH": str(aside), "XDG_CACHE_HOME": str(folder / "cache")}
    settings: dict[str, Any] = {"train__max_steps": 2, "output__save_every_steps": 1, "name": "life"}
    recipe = write_recipe(folder, "builtin:pocket-llama", alpaca_rows(16), **settings)
    run = str(folder / "run")
    commands = {
        "check": ["check", str(recipe), "--offline"],
        "train": ["train", str(recipe), "--offline"],
        "generate": ["generate", run, "--prompt", "x", "--max-new-tokens", "2"],
        "evaluate": ["evaluate", run, "--data", str(folder / "rows.jsonl")],
        "merge": ["merge", run, "--out", str(folder / "release")],
        "export": ["export", str(folder / "release"), "--format", "gguf", "--out", str(folder / "gguf")],
        "a path that cannot be": ["train", str(recipe), "--out", "\0"],
        "a wrong recipe": ["train", str(recipe), "--set", f"data.train=https://me:{SECRETS['HF_TOKEN']}@example.com/x.jsonl"],
    }  # fmt: skip
    done = {}
    for name, typed in commands.items():
        done[name] = act("command_line", folder, typed=typed, site=str(aside), environment=environment, seconds=300)
        (folder / f"said by {name}").write_text(done[name]["text"])
    log = aside / "log"
    return Life(folder, done, log.read_text() if log.is_file() else "")


def test_the_commands_did_their_work(life: Life) -> None:
    codes = {name: done["code"] for name, done in life.done.items()}
    told = {name: done["text"][-600:] for name, done in life.done.items()}
    assert {codes[name] for name in ("check", "train", "generate", "evaluate", "merge", "export")} == {0}, told
    assert codes["a wrong recipe"] == 2
    assert {"run", "release", "gguf", "cache"} <= {path.name for path in life.folder.iterdir()}


def test_no_socket_is_opened(life: Life) -> None:
    assert life.sockets == ""


def test_the_watch_sees_a_socket(tmp_path: Path, act: Act) -> None:
    (tmp_path / "sitecustomize.py").write_text(WATCH)
    act("connect", tmp_path, site=str(tmp_path), environment={"SOCKET_LOG": str(tmp_path / "log")})
    assert "socket.connect" in (tmp_path / "log").read_text()
    assert "socket.bind" in (tmp_path / "log").read_text()


def test_no_secret_is_written(life: Life) -> None:
    files = [path for path in life.folder.rglob("*") if path.is_file()]
    secrets = [*SECRETS.values(), *IN_FILES.values()]
    found = [
        (str(path.relative_to(life.folder)), secret)
        for path in files
        for secret in secrets
        if secret.encode() in path.read_bytes()
    ]
    assert not found
    assert len(files) > 40


def test_a_secret_in_an_address_is_not_repeated(life: Life) -> None:
    told = life.done["a wrong recipe"]["text"]
    assert "https://***@example.com" in told
    assert SECRETS["HF_TOKEN"] not in told


# A library's error, with the address it was given and the environment's token in it, deep in the command.
BUG = """
import os
import finetune.run
def broken(*args, **kwargs):
    raise RuntimeError(f"https://me:{os.environ['PASSWORD']}@example.com: bad token {os.environ['HF_TOKEN']}")
finetune.run.run = broken
"""


def test_a_traceback_tells_no_secret(tmp_path: Path, act: Act) -> None:
    (tmp_path / "sitecustomize.py").write_text(BUG)
    recipe = write_recipe(tmp_path, "builtin:pocket-llama", alpaca_rows(4))
    secrets = {"HF_TOKEN": SECRETS["HF_TOKEN"], "PASSWORD": "canarygggggggg"}
    typed = ["train", str(recipe), "--json"]
    done = act("command_line", tmp_path, typed=typed, site=str(tmp_path), environment=secrets)
    assert done["code"] == 1
    assert "RuntimeError: https://***@example.com: bad token hf_***\n" in done["text"]
    assert "in broken" in done["text"]
    assert "please report it" in done["text"]
    assert not [secret for secret in secrets.values() if secret in done["text"]]


def test_no_file_of_a_run_or_release_is_a_pickle(life: Life) -> None:
    files = [path for name in ("run", "release", "gguf") for path in (life.folder / name).rglob("*") if path.is_file()]
    assert not {path.suffix for path in files} & {".bin", ".pt", ".pth", ".pkl", ".ckpt"}
    starts = [path.read_bytes()[:2] for path in files]
    assert not [start for start in starts if start in (b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05")]
    assert json.loads((life.folder / "run" / "lock.json").read_text())
