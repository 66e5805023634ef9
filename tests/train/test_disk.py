"""Full disks and full memory: said with figures before or when they bite, and never a broken file left behind."""

from __future__ import annotations

import json
import shutil
from collections import namedtuple
from pathlib import Path

import pytest
import torch

from finetune import disk
from finetune.errors import OutOfMemoryError, StorageError
from finetune.plan import run_bytes
from finetune.resolve import resolve
from finetune.run import run
from finetune.train.checkpoints import find_checkpoints, find_damage
from finetune.train.memory import CURES, asked_for, is_out_of_memory, out_of_memory_told
from tests.conftest import alpaca_rows, write_recipe
from tests.train.forked import Nursery, weights

Usage = namedtuple("Usage", "total used free")


@pytest.mark.parametrize("optimizer", ["adamw", "adamw-8bit"])
def test_the_estimate_is_what_a_run_takes(tiny_base: Path, tmp_path: Path, optimizer: str) -> None:
    recipe = write_recipe(
        tmp_path, tiny_base, alpaca_rows(8), adapter__rank=64, train__optimizer=optimizer, output__save_every_steps=2
    )
    plan = resolve(recipe).plan
    folder = run(recipe).path
    sizes = [sum(file.stat().st_size for file in path.iterdir()) for path in find_checkpoints(folder / "checkpoints")]
    adapter = (folder / "adapter" / "adapter_model.safetensors").stat().st_size
    taken = sum(sizes) + adapter
    assert len(sizes) == 2
    assert 0.8 * taken < run_bytes(plan.train, plan.trainable_parameters) < 1.3 * taken


def test_a_run_that_does_not_fit_is_refused_with_both_figures(
    tiny_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = write_recipe(tmp_path, tiny_base, alpaca_rows(8), output__save_every_steps=1, train__max_steps=4)
    resolved = resolve(recipe)
    needed = run_bytes(resolved.plan.train, resolved.plan.trainable_parameters)
    trainable = resolved.plan.trainable_parameters
    assert needed == 3 * (12 * trainable + 4 * 200 + 100_000) + 4 * trainable, "two kept and the one being written"
    free = [needed - 5000]
    monkeypatch.setattr(shutil, "disk_usage", lambda _: Usage(0, 0, free[0]))
    with pytest.raises(StorageError, match=rf"needs about {needed / 2**20:.2f} MiB .*{free[0] / 2**20:.2f} MiB are"):
        run(recipe)
    assert not (tmp_path / "run" / "checkpoints").exists()
    free[0] = needed + 5000
    run(recipe, resume=True)
    assert "with a merged model of about" in capsys.readouterr().err
    free[0] = needed // 2  # the two that are kept are there already
    (tmp_path / "run" / "result.json").unlink()
    run(recipe, resume=True)


def test_a_merge_that_fits_is_not_spoken_of(
    tiny_base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    resolved = resolve(write_recipe(tmp_path, tiny_base, alpaca_rows(8)))
    disk.refuse_full_disk(tmp_path, resolved.plan, merged_bytes=resolved.base.facts.stored_bytes)
    assert capsys.readouterr().err == ""


FULL = """
import errno, importlib
def full_at(module, name, calls_allowed):
    owner = importlib.import_module(module)
    *path, last = name.split(".")
    for part in path:
        owner = getattr(owner, part)
    original, calls = getattr(owner, last), []
    def patched(*args, **kwargs):
        calls.append(1)
        if len(calls) > calls_allowed:
            raise OSError(errno.ENOSPC, "No space left on device")
        return original(*args, **kwargs)
    setattr(owner, last, patched)
"""
# Functions of ours or of the system that write, and how often they work before the disk is full.
FULL_AT = {
    "the recipe's copy": ("shutil", "copyfile", 0),
    "plan.json": ("finetune.artifact", "os.fsync", 1),
    "every checkpoint": ("finetune.train.checkpoints", "_sync_descriptor", 0),
    "metrics.jsonl": ("finetune.train.watch", "os.pwrite", 2),
    "the loss curve": ("finetune.train.train", "draw_loss_curve", 0),
    "the adapter": ("finetune.artifact", "write_tokenizer", 0),
}


@pytest.fixture(scope="module")
def straight(nursery: Nursery, tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run that always had room; its recipe lies beside it."""
    folder = tmp_path_factory.mktemp("straight")
    recipe = write_recipe(folder, tiny_base, alpaca_rows(8), output__save_every_steps=1)
    assert nursery.train(recipe).code == 0
    return folder / "run"


OFTEN = {"every checkpoint", "metrics.jsonl", "the adapter"}


@pytest.mark.parametrize("what", [pytest.param(w, marks=() if w in OFTEN else pytest.mark.soak) for w in FULL_AT])
def test_a_full_disk_is_exit_code_3_and_the_run_goes_on_later(
    nursery: Nursery, straight: Path, tmp_path: Path, what: str
) -> None:
    module, name, allowed = FULL_AT[what]
    recipe = straight.parent / "recipe.json"
    ended = nursery.train(recipe, "--out", tmp_path / "run", hook=f"{FULL}\nfull_at({module!r}, {name!r}, {allowed})\n")
    run_folder = tmp_path / "run"
    assert ended.code == 3, ended.err
    assert "No space left on device" in ended.err.splitlines()[-1]
    assert "Traceback" not in ended.err
    assert not (run_folder / "result.json").exists()
    assert all(find_damage(path) is None for path in find_checkpoints(run_folder / "checkpoints"))
    assert not (run_folder / "adapter").exists()
    again = nursery.train(recipe, "--out", tmp_path / "run", "--resume")
    assert again.code == 0, again.err
    assert weights(run_folder) == weights(straight)
    assert (run_folder / "metrics.jsonl").read_bytes() == (straight / "metrics.jsonl").read_bytes()


def test_a_full_disk_under_the_token_cache_is_exit_code_3(nursery: Nursery, tiny_base: Path, tmp_path: Path) -> None:
    """A real limit: no file of the process may be larger than a hundred bytes."""
    recipe = write_recipe(tmp_path, tiny_base, [{**row, "output": f"{tmp_path}"} for row in alpaca_rows(30)])
    limit = """
import resource, finetune.data.store as store
init = store.StoreWriter.__init__
def limited(self, folder):
    init(self, folder)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, resource.RLIM_INFINITY))
store.StoreWriter.__init__ = limited
discard = store.StoreWriter.discard
def freed(self):
    discard(self)
    resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
store.StoreWriter.discard = freed
"""
    ended = nursery.train(recipe, hook=limit)
    assert ended.code == 3, ended.err
    assert "the labelled rows cannot be written ([Errno 27] File too large)" in ended.err
    assert "XDG_CACHE_HOME" in ended.err
    assert "Traceback" not in ended.err


# -- memory -----------------------------------------------------------------------------------------------------------

# The process may take a little more than it has, and then asks for 8 GiB at one place.
OUT_OF_MEMORY = """
import importlib, resource, torch
def ask_at(module, name, call, ask):
    owner = importlib.import_module(module)
    *path, last = name.split(".")
    for part in path:
        owner = getattr(owner, part)
    original, calls = getattr(owner, last), []
    def patched(*args, **kwargs):
        calls.append(1)
        if len(calls) == call:
            pages = int(open("/proc/self/statm").read().split()[0])
            resource.setrlimit(resource.RLIMIT_AS, (pages * 4096 + 2**28, resource.RLIM_INFINITY))
            ask()
        return original(*args, **kwargs)
    setattr(owner, last, patched)
"""
TORCH, PYTHON = "lambda: torch.ones(2**31)", "lambda: bytearray(2**33)"
STAGES = {
    "loading the base": ("finetune.model.load AutoModelForCausalLM.from_pretrained 1", TORCH),
    "forward and backward": ("finetune.train.trainer stretch_losses_S 3", TORCH),
    "optimizer": ("torch.optim AdamW.step 3", TORCH),
    "evaluation": ("finetune.train.held_out sum_losses 1", TORCH),
    "saving a checkpoint": ("finetune.train.trainer save_state 3", PYTHON),
}


@pytest.mark.parametrize(
    "stage",
    [pytest.param(s, marks=() if s in {"optimizer", "saving a checkpoint"} else pytest.mark.soak) for s in STAGES],
)
def test_out_of_memory_names_stage_bytes_and_keys(
    nursery: Nursery, tiny_base: Path, tmp_path: Path, stage: str
) -> None:
    assert STAGES.keys() == CURES.keys()
    place, ask = STAGES[stage]
    module, name, call = place.split(" ")
    settings = {"output__save_every_steps": 1, "data__eval": 2, "evaluate__every_steps": 2, "train__recompute": "none"}
    recipe = write_recipe(tmp_path, tiny_base, alpaca_rows(8), train__tokens_per_pass=512, **settings)
    ended = nursery.train(recipe, "--json", hook=f"{OUT_OF_MEMORY}\nask_at({module!r}, {name!r}, {call}, {ask})\n")
    assert ended.code == 5, ended.err
    assert "Traceback" not in ended.err
    (problem,) = json.loads(ended.out)["error"]["problems"]
    assert problem["where"] == stage
    asked = "an unknown number of bytes was" if ask == PYTHON else "8,589,934,592 bytes were"
    assert problem["message"].startswith(f"out of memory, {asked} asked for; ")
    assert any(key in problem["message"] for key in ("train.tokens_per_pass", "model.quantization"))
    run_folder = tmp_path / "run"
    if stage != "loading the base":
        assert problem["message"].endswith("step-000001 is kept")
    assert all(find_damage(path) is None for path in find_checkpoints(run_folder / "checkpoints"))
    assert nursery.train(recipe, "--resume", "--set", "train.tokens_per_pass=100").code == 0


@pytest.mark.parametrize(
    ("error", "asked"),
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.50 GiB. GPU 0 has a total"), "2.50 GiB"),
        (RuntimeError("[enforce fail at alloc_cpu.cpp:124] DefaultCPUAllocator: can't allocate memory: you tried to "
                      "allocate 4000000 bytes. Error code 12"), "4,000,000 bytes"),
        (MemoryError("Unable to allocate 1.20 GiB for an array with shape (1,)"), "1.20 GiB"),
        (OSError(12, "Cannot allocate memory"), None),
        (MemoryError(), None),
    ],
)  # fmt: skip
def test_each_kind_of_failed_allocation_is_known(error: Exception, asked: str | None) -> None:
    assert asked_for(error) == (f"{asked} were asked for" if asked else "an unknown number of bytes was asked for")
    with pytest.raises(OutOfMemoryError), out_of_memory_told(lambda: "optimizer"):
        raise error
    assert not is_out_of_memory(RuntimeError("shapes do not fit"))
    with pytest.raises(OSError, match="No space"), out_of_memory_told(lambda: "optimizer"):
        raise OSError(28, "No space left on device")


def test_a_run_whose_losses_are_gone_says_so_and_can_be_finished(tiny_base: Path, tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path, tiny_base, alpaca_rows(8), output__save_every_steps=2)
    folder = run(recipe).path
    (folder / "result.json").unlink()
    (folder / "metrics.jsonl").write_text("")
    with pytest.raises(StorageError, match="holds the loss of no step any more; put it back, or remove the newest"):
        run(recipe, resume=True)
    shutil.rmtree(find_checkpoints(folder / "checkpoints")[-1])
    assert run(recipe, resume=True).result["steps"] == 4


@pytest.mark.parametrize("left", ["", "{", "{}", "[]"])
def test_a_result_that_a_disk_has_spoilt_is_written_again(tiny_base: Path, tmp_path: Path, left: str) -> None:
    recipe = write_recipe(tmp_path, tiny_base, alpaca_rows(8), output__save_every_steps=2)
    folder = run(recipe)
    before, adapter = folder.result, (folder.adapter / "adapter_model.safetensors").read_bytes()
    (folder.path / "result.json").write_text(left)
    again = run(recipe, resume=True)
    for name in ("steps", "examples", "supervised_tokens", "train_loss", "eval_loss"):
        assert again.result[name] == before[name]
    assert (again.adapter / "adapter_model.safetensors").read_bytes() == adapter
