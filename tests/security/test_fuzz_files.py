"""Thousands of damaged headers and configs: each is read, or refused in a line; no other error, no memory, no wait."""

from __future__ import annotations

import json
import random
import struct
import time
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from finetune.base import read_base, read_tensor_entries
from finetune.errors import StorageError, UserError
from tests.conftest import POCKET
from tests.security.attacks import base, replace

STRANGE = (
    None, True, -1, 0, 2**31, 2**63, 2**64, 10**400, 1e308, -0.5, "", "x", "../x", "\0", "9" * 50, [], [[]], {},
    {"a": {}}, [1, "a"], [-1, 5], [2**62, 2**63], "F32", "BF16", [0], {"content": 3}, [{"name": "default"}],
)  # fmt: skip
CONFIGS = ("config.json", "tokenizer_config.json", "generation_config.json", "adapter_config.json", "tokenizer.json")


def changed(value: Any, chance: random.Random) -> Any:
    """The same JSON with one place in it replaced, removed, repeated or nested deeply."""
    value = json.loads(json.dumps(value))
    place, key = value, None
    while isinstance(place, (dict, list)) and place:
        holder = place
        key = chance.choice([*place] if isinstance(place, dict) else range(len(place)))
        place = place[key]
        if chance.random() < 0.4:
            break
    if key is None:
        return chance.choice(STRANGE)
    kind = chance.random()
    if kind < 0.7:
        holder[key] = chance.choice(STRANGE)
    elif kind < 0.8:
        holder.pop(key)
    elif isinstance(holder, dict):
        holder[chance.choice(["x", "auto_map", "text_config", "\0", "__metadata__", "quantization_config"])] = holder[
            key
        ]
    else:
        holder.append(holder[key])
    return value


def damaged(data: bytes, chance: random.Random) -> bytes:
    """The same bytes cut off, one changed, some inserted, or put deep into brackets."""
    kind, place = chance.randrange(5), chance.randrange(len(data))
    if kind == 0:
        return data[:place]
    if kind == 1:
        return data[:place] + bytes([chance.randrange(256)]) + data[place + 1 :]
    if kind == 2:
        return data[:place] + chance.choice([b"{", b"[", b'"', b"\xff", b"1e999", b"NaN", b"\0"]) * 3 + data[place:]
    if kind == 3:
        return b"[" * 100_000 + data
    return b""


def bounded(read: Callable[[], object]) -> str:
    """ "read" or "refused"; fails on another error, more than 5 s, or 64 MiB asked for by Python."""
    before = time.thread_time()
    tracemalloc.start()
    try:
        read()
        outcome, told = "read", []
    except (UserError, StorageError) as error:
        outcome, told = "refused", [str(problem) for problem in error.problems]
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert not [line for line in told if "\n" in line]
    assert peak < 64 << 20
    assert time.thread_time() - before < 5
    return outcome


def header_bytes(chance: random.Random, header: dict) -> bytes:
    text = json.dumps(changed(header, chance)).encode()
    if chance.random() < 0.3:
        text = damaged(text, chance)
    length = (
        len(text)
        if chance.random() < 0.8
        else chance.choice([0, 1, len(text) - 1, len(text) + 9, 2**32, 2**63, 2**64 - 1])
    )
    data = struct.pack("<Q", max(length, 0)) + text + bytes(24)
    return data if chance.random() < 0.9 else damaged(data, chance)


def fuzz_headers(folder: Path, count: int, seed: int) -> dict[str, int]:
    header = {
        "__metadata__": {"format": "pt"},
        "a": {"dtype": "F32", "shape": [2, 2], "data_offsets": [0, 16]},
        "b": {"dtype": "BF16", "shape": [4], "data_offsets": [16, 24]},
    }
    (folder / "config.json").write_text("{}")
    chance = random.Random(seed)
    seen = {"read": 0, "refused": 0}
    for _ in range(count):
        (folder / "model.safetensors").write_bytes(header_bytes(chance, header))
        seen[bounded(lambda: [entry.bytes for entry in read_tensor_entries(folder)])] += 1
    return seen


def fuzz_configs(folder: Path, count: int, seed: int) -> dict[str, int]:
    base(folder)
    originals = {name: json.loads((POCKET / name).read_text()) for name in CONFIGS if (POCKET / name).is_file()}
    chance = random.Random(seed)
    seen = {"read": 0, "refused": 0}
    for _ in range(count):
        name = chance.choice([each for each in originals if each != "tokenizer.json"])
        text = json.dumps(changed(originals[name], chance)).encode()
        replace(folder / name, "")
        (folder / name).write_bytes(damaged(text, chance) if chance.random() < 0.2 else text)
        seen[bounded(lambda: read_base(str(folder)))] += 1
        replace(folder / name, json.dumps(originals[name]))
    return seen


def test_damaged_headers_are_refused(tmp_path: Path) -> None:
    seen = fuzz_headers(tmp_path, 1200, seed=1)
    assert seen["refused"] > 600
    assert seen["read"] > 10


def test_damaged_configs_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("finetune.base._convert_in_child", refuse_conversion)
    seen = fuzz_configs(tmp_path / "base", 800, seed=2)
    assert min(seen.values()) > 100


@pytest.mark.soak
@pytest.mark.parametrize("seed", range(4))
def test_many_more_of_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, seed: int) -> None:
    monkeypatch.setattr("finetune.base._convert_in_child", refuse_conversion)
    (tmp_path / "headers").mkdir()
    assert fuzz_headers(tmp_path / "headers", 10_000, seed=100 + seed)["refused"]
    assert fuzz_configs(tmp_path / "base", 3000, seed=200 + seed)["refused"]


def refuse_conversion(folder: Path, target: Path) -> None:
    """A tokenizer of another class is converted in a child process, seconds each; here only what is read before."""
    raise UserError(())
