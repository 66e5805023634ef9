"""An entry of the cache is taken as it was written, or not at all: flipped bits, cut files, other bases, other settings
and versions, no room. Oracle: the base loaded without the cache, and hashlib."""

from __future__ import annotations

import hashlib
import json
import os
import random
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel

import finetune.model.keep as keeping
import finetune.model.quantised_cache as cache
from finetune import weight_hashes
from finetune.base import read_header
from finetune.cache import clear_caches, look_at_caches
from finetune.model.load import load_base, quantization_config
from finetune.plan import ModelPlan
from finetune.weight_hashes import weight_sha256
from tests.conftest import CHECKOUT, make_tiny_base

IDS = torch.arange(3, 40)[None]


@pytest.fixture(autouse=True)
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(cache, "SMALLEST_BYTES", 0)
    monkeypatch.setattr(weight_hashes, "SETTLED_SECONDS", -1.0)
    return tmp_path / "cache" / "finetune" / "4bit"


@pytest.fixture
def base(tiny_bf16: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_bf16, tmp_path / "base"))


@pytest.fixture(scope="module")
def tiny_bf16(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_base(tmp_path_factory.mktemp("base") / "tiny", dtype="bfloat16", tied=True)


def plan_of(base: Path, quantization: str = "nf4", dtype: str = "bfloat16") -> ModelPlan:
    return ModelPlan(str(base), None, base, quantization, dtype, "cpu", "sdpa")


def entry_of(plan: ModelPlan) -> cache.Entry:
    settings = quantization_config(plan.quantization, getattr(torch, plan.dtype))
    assert settings is not None
    entry = cache.find_entry(plan, settings)
    assert entry is not None
    return entry


@torch.no_grad()
def answer(model: PreTrainedModel) -> torch.Tensor:
    return model(IDS).logits


def flip(file: Path, bit: int) -> None:
    held = bytearray(file.read_bytes())
    held[bit // 8] ^= 1 << bit % 8
    file.write_bytes(held)


def flip_in(part: str) -> Callable[[Path], None]:
    """A bit in the middle of a stored tensor."""

    def damage(entry: Path) -> None:
        (file,) = entry.glob("*.safetensors")
        found = next(each for each in read_header(file) if each.name.endswith(part))
        flip(file, 8 * (found.start + found.bytes // 2))

    return damage


def cut(entry: Path) -> None:
    (file,) = entry.glob("*.safetensors")
    file.write_bytes(file.read_bytes()[:-1])


def of_another(entry: Path) -> None:
    """A whole entry of another kind under this one's name."""
    shutil.rmtree(entry)
    base = entry.parents[3] / "base"
    load_base(plan_of(base, "fp4"), keep=True)
    entry_of(plan_of(base, "fp4")).folder.rename(entry)


DAMAGES: dict[str, Callable[[Path], None]] = {
    "packed weights": flip_in("q_proj.weight"),
    "scales": flip_in("down_proj.weight.absmax"),
    "scales of scales": flip_in("down_proj.weight.nested_absmax"),
    "table": flip_in("o_proj.weight.quant_map"),
    "offset": flip_in("quant_state.bitsandbytes__nf4"),
    "embedding": flip_in("embed_tokens.weight"),
    "norm": flip_in("model.norm.weight"),
    "cut": cut,
    "file gone": lambda entry: next(entry.glob("*.safetensors")).unlink(),
    "list gone": lambda entry: (entry / "manifest.json").unlink(),
    "list": lambda entry: flip(entry / "manifest.json", 8 * 2000),
    "seal": lambda entry: flip(entry / "manifest.json", 3),
    "of another kind": of_another,
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_entry_is_made_again(base: Path, capsys: pytest.CaptureFixture[str], damage: str) -> None:
    plan = plan_of(base)
    usual = answer(load_base(plan))
    load_base(plan, keep=True)
    entry = entry_of(plan).folder
    DAMAGES[damage](entry)
    capsys.readouterr()
    assert torch.equal(answer(load_base(plan, keep=True)), usual)
    told = capsys.readouterr().err
    assert told.count("it is made again") == 1
    assert str(entry) in told
    assert torch.equal(answer(load_base(plan, keep=True)), usual)
    assert "made again" not in capsys.readouterr().err
    assert [entry] == list(entry.parent.iterdir())


def test_no_flipped_bit_is_taken(base: Path) -> None:
    plan = plan_of(base)
    load_base(plan, keep=True)
    entry = entry_of(plan)
    whole = entry.folder.with_name("whole")
    entry.folder.rename(whole)
    (file,) = whole.glob("*.safetensors")
    original = load_file(file)
    chance = random.Random(0)
    header = 8 + int.from_bytes(file.read_bytes()[:8], "little")
    bits = [("header", 8 * chance.randrange(header) + chance.randrange(8)) for _ in range(60)]
    bits += [("length", bit) for bit in range(0, 64, 5)]
    bits += [("body", chance.randrange(8 * header, 8 * file.stat().st_size)) for _ in range(20)]
    for where, bit in bits:
        shutil.rmtree(entry.folder, ignore_errors=True)
        shutil.copytree(whole, entry.folder)
        flip(entry.folder / file.name, bit)
        try:
            kept = cache.open_kept(entry)
            assert kept is not None
            taken = {name: kept.read(name) for name in kept.tensors}
        except cache.Damaged:
            continue
        assert where != "body", bit
        assert all(torch.equal(original[name], tensor) for name, tensor in taken.items()), bit


def test_another_base_of_the_same_shapes_is_another_entry(base: Path, root: Path) -> None:
    plan = plan_of(base)
    before = answer(load_base(plan, keep=True))
    file = base / "model.safetensors"
    times = file.stat()
    weights = load_file(file)
    weights["model.layers.1.mlp.up_proj.weight"][0, 0] += 1
    with file.open("r+b") as stream:  # the same file, written over, its time of change put back
        save_file(weights, base / "other", metadata={"format": "pt"})
        stream.write((base / "other").read_bytes())
    os.utime(file, ns=(times.st_atime_ns, times.st_mtime_ns))
    assert file.stat().st_size == times.st_size
    after = answer(load_base(plan, keep=True))
    assert torch.equal(after, answer(load_base(plan)))
    assert not torch.equal(before, after)
    assert len(list(root.iterdir())) == 2


def test_a_copy_of_a_base_is_the_same_entry(base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    load_base(plan_of(base), keep=True)
    copy = Path(shutil.copytree(base, tmp_path / "copy"))
    model = load_base(plan_of(copy), keep=True)
    assert f"{copy}: read in 4 bits" in capsys.readouterr().err
    assert model.name_or_path == str(copy)


def test_what_changes_a_bit_changes_the_entry(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    names = [
        entry_of(plan_of(base, kind, dtype)).folder for kind in ("nf4", "fp4") for dtype in ("bfloat16", "float32")
    ]
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps(config | {"rms_norm_eps": 1e-3}))
    names.append(entry_of(plan_of(base)).folder)
    monkeypatch.setattr(cache, "LAYOUT", 2)
    names.append(entry_of(plan_of(base)).folder)
    monkeypatch.setattr(cache, "version", lambda name: f"1.0 of {name}")
    names.append(entry_of(plan_of(base)).folder)
    threads = torch.get_num_threads()
    torch.set_num_threads(threads + 1)
    names.append(entry_of(plan_of(base)).folder)
    torch.set_num_threads(threads)
    assert len(set(names)) == len(names)


@pytest.mark.parametrize("word", ["off", "0", "No", "false"])
def test_it_can_be_switched_off(base: Path, root: Path, monkeypatch: pytest.MonkeyPatch, word: str) -> None:
    monkeypatch.setenv("FINETUNE_4BIT_CACHE", word)
    load_base(plan_of(base), keep=True)
    assert not root.exists()


def test_a_small_base_is_not_kept(
    base: Path, root: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    size = sum(entry.bytes for entry in read_header(base / "model.safetensors"))
    monkeypatch.setattr(cache, "SMALLEST_BYTES", size + 1)
    load_base(plan_of(base), keep=True)
    assert not root.exists()
    assert not capsys.readouterr().err
    assert not (root.parent / "hashes").exists()  # nor is it read for its name
    monkeypatch.setattr(cache, "SMALLEST_BYTES", size)
    load_base(plan_of(base), keep=True)
    assert len(list(root.iterdir())) == 1


def test_without_room_the_base_is_loaded_all_the_same(
    base: Path, root: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    plan = plan_of(base)
    load_base(plan, keep=True)
    needed = sum(file.stat().st_size for file in entry_of(plan).folder.glob("*.safetensors"))
    clear_caches()
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=4 * needed))
    capsys.readouterr()
    assert torch.equal(answer(load_base(plan, keep=True)), answer(load_base(plan)))
    assert capsys.readouterr().err.count("for want of room") == 1
    assert not list(root.iterdir())
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=6 * needed))
    load_base(plan, keep=True)
    assert len(list(root.iterdir())) == 1


def test_where_nothing_can_be_written_the_base_is_loaded_all_the_same(
    base: Path, root: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root.parent.mkdir(parents=True)
    root.write_text("a file in the place of the folder")
    (root.parent / "hashes").write_text("here, too")
    assert torch.equal(answer(load_base(plan_of(base), keep=True)), answer(load_base(plan_of(base))))
    assert capsys.readouterr().err.count("not kept in 4 bits for the next start") == 1


def test_of_two_that_write_the_first_stays(
    base: Path, root: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    plan = plan_of(base)
    load_base(plan, keep=True)
    entry = entry_of(plan)
    theirs = entry.folder.rename(root / "theirs")
    sync, seen = keeping._sync, []

    def other_is_faster(path: Path) -> None:
        sync(path)
        if not entry.folder.exists():
            seen.append(theirs.rename(entry.folder).stat().st_ino)

    monkeypatch.setattr(keeping, "_sync", other_is_faster)
    capsys.readouterr()
    load_base(plan, keep=True)
    assert [entry.folder] == list(root.iterdir())
    assert [entry.folder.stat().st_ino] == seen
    assert "kept" not in capsys.readouterr().err
    assert cache.open_kept(entry)


TWO = """
import sys
from pathlib import Path
import finetune.model.quantised_cache as cache
from finetune.model.load import load_base
from finetune.plan import ModelPlan
cache.SMALLEST_BYTES = 0
base = Path(sys.argv[1])
for _ in range(5):
    load_base(ModelPlan("base", None, base, "nf4", "bfloat16", "cpu", "sdpa"), keep=True)
"""


@pytest.mark.soak
def test_two_processes_at_once(base: Path, root: Path) -> None:
    command = [sys.executable, "-c", TWO, str(base)]
    both = [subprocess.Popen(command, cwd=CHECKOUT, stderr=subprocess.PIPE, text=True) for _ in range(2)]
    told = [each.communicate(timeout=120)[1] for each in both]
    assert [each.returncode for each in both] == [0, 0], told
    assert len(list(root.iterdir())) == 1
    assert "made again" not in "".join(told)


def test_what_a_killed_process_left_is_swept_after_a_day(base: Path, root: Path) -> None:
    for name, age in (("old.1.partial", 90_000), ("young.2.partial", 10)):
        (root / name).mkdir(parents=True)
        os.utime(root / name, (time.time() - age,) * 2)
    load_base(plan_of(base), keep=True)
    assert {"young.2.partial", entry_of(plan_of(base)).folder.name} == {each.name for each in root.iterdir()}


def test_the_cache_command_counts_and_clears_it(base: Path, root: Path) -> None:
    load_base(plan_of(base), keep=True)
    size = sum(file.stat().st_size for file in root.rglob("*") if file.is_file())
    found = {each.kind: (each.entries, each.bytes) for each in look_at_caches()}
    assert found["4bit"] == (1, size)
    assert found["hashes"][0] == 1
    clear_caches()
    assert not list(root.iterdir())


def test_a_file_is_hashed_once(base: Path, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = base / "model.safetensors"
    digest = hashlib.sha256(file.read_bytes()).hexdigest()
    assert weight_sha256([file]) == {file.name: digest}
    with monkeypatch.context() as patched:
        patched.setattr(weight_hashes, "_read", lambda _: "0" * 64)
        assert weight_sha256([file]) == {file.name: digest}  # remembered
        file.touch()
        assert weight_sha256([file]) == {file.name: "0" * 64}  # another time of change: read
    for entry in (root.parent / "hashes").iterdir():
        flip(entry, 5)
    assert weight_sha256([file]) == {file.name: digest}


def test_the_hash_of_a_young_file_is_not_remembered(base: Path, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(weight_hashes, "SETTLED_SECONDS", 3600.0)
    weight_sha256([base / "model.safetensors"])
    assert not (root.parent / "hashes").exists()
