"""What checkpoints promise: one that is damaged is never used, and no crash or full disk loses the one before."""

from __future__ import annotations

import ast
import errno
import os
import random
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from finetune.errors import FinetuneError, NumericsError, StorageError
from finetune.run import run
from finetune.train import state as state_file
from finetune.train import trainer as trainer_file
from finetune.train.checkpoints import find_checkpoints, find_damage, newest_whole_checkpoint, write_checkpoint
from finetune.train.watch import MetricsFile, read_metrics
from tests.conftest import CHECKOUT, alpaca_rows, write_recipe

WEIGHTS = "adapter_model.safetensors"
FILES = {
    "adapter_config.json", WEIGHTS, "checkpoint.json", "random-000.json", "state.json", "state.safetensors",
    "trainer_state.json",
}  # fmt: skip


class Trained:
    """A finished run with checkpoints of steps 2 and 4, and the recipe it came from."""

    def __init__(self, folder: Path, base: Path, **more: object) -> None:
        # Rank 64: bitsandbytes keeps the state of tensors below 4096 numbers in 32 bits.
        options = {"adapter__rank": 64, "adapter__dropout": 0.1, "output__save_every_steps": 2, **more}
        self.recipe = write_recipe(folder, base, alpaca_rows(8), **options)
        self.folder = run(self.recipe).path
        self.weights = (self.folder / "adapter" / WEIGHTS).read_bytes()

    def as_before_its_end(self, folder: Path) -> Path:
        """A copy of the run without result and adapter, as after a crash behind the last save."""
        copy = shutil.copytree(self.folder, folder / "run")
        (copy / "result.json").unlink()
        shutil.rmtree(copy / "adapter")
        return copy

    def resumed(self, copy: Path) -> bytes:
        return (run(self.recipe, out=copy, resume=True).adapter / WEIGHTS).read_bytes()


@pytest.fixture(scope="module", params=["adamw", "adamw-8bit"])
def trained(request: pytest.FixtureRequest, tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Trained:
    return Trained(tmp_path_factory.mktemp("trained"), tiny_base, train__optimizer=request.param)


@pytest.fixture(scope="module")
def plain(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Trained:
    return Trained(tmp_path_factory.mktemp("plain"), tiny_base)


def flip(file: Path, bit: int) -> None:
    data = bytearray(file.read_bytes())
    data[bit // 8] ^= 1 << bit % 8
    file.write_bytes(bytes(data))


def make_folder(file: Path) -> None:
    file.unlink()
    file.mkdir()


DAMAGES: dict[str, Callable[[Path], None]] = {
    "emptied": lambda file: file.write_bytes(b"") and None,
    "halved": lambda file: os.truncate(file, file.stat().st_size // 2),
    "a byte short": lambda file: os.truncate(file, file.stat().st_size - 1),
    "a byte long": lambda file: file.write_bytes(file.read_bytes() + b"\n") and None,
    "first bit": lambda file: flip(file, 0),
    "last bit": lambda file: flip(file, file.stat().st_size * 8 - 1),
    "middle bit": lambda file: flip(file, file.stat().st_size * 4),
    "removed": lambda file: file.unlink(),
    "a folder": make_folder,
}


def test_every_damage_to_every_file_is_seen(plain: Trained, tmp_path: Path) -> None:
    whole = plain.folder / "checkpoints" / "step-000004"
    other = plain.folder / "checkpoints" / "step-000002"
    assert {file.name for file in whole.iterdir()} == FILES
    assert find_damage(whole) is None
    copy = shutil.copytree(whole, tmp_path / "step-000004")
    for name in sorted(FILES):
        for damage in DAMAGES.values():
            damage(copy / name)
            assert name in (find_damage(copy) or ""), name
            shutil.rmtree(copy / name) if (copy / name).is_dir() else (copy / name).unlink(missing_ok=True)
            shutil.copyfile(whole / name, copy / name)
        shutil.copyfile(other / name, copy / name)
        same = (other / name).read_bytes() == (whole / name).read_bytes()
        assert (find_damage(copy) is None) == same, name
        shutil.copyfile(whole / name, copy / name)
    (copy / "more.txt").write_text("")
    assert find_damage(copy) == "more.txt does not belong to it"
    (copy / "more.txt").unlink()
    assert "step 4" in (find_damage(copy.rename(tmp_path / "step-000008")) or "")


def test_every_flipped_bit_of_a_manifest_is_seen(tmp_path: Path) -> None:
    checkpoint = save(tmp_path, 1, keep=1)
    manifest = checkpoint / "checkpoint.json"
    for bit in range(manifest.stat().st_size * 8):
        flip(manifest, bit)
        assert find_damage(checkpoint), bit
        flip(manifest, bit)
    assert find_damage(checkpoint) is None


@pytest.mark.parametrize("file", ["state.safetensors", "checkpoint.json"])
def test_a_damaged_checkpoint_is_set_aside_and_the_one_before_gives_the_same_weights(
    trained: Trained, tmp_path: Path, capsys: pytest.CaptureFixture[str], file: str
) -> None:
    copy = trained.as_before_its_end(tmp_path)
    flip(copy / "checkpoints" / "step-000004" / file, 1000)
    assert trained.resumed(copy) == trained.weights
    said = [line for line in capsys.readouterr().err.splitlines() if "kept as" in line]
    assert len(said) == 1
    assert f"step-000004: {file} " in said[0]
    names = sorted(path.name for path in (copy / "checkpoints").iterdir())
    assert names == ["step-000002", "step-000004", "step-000004.damaged"]


def test_a_run_without_a_whole_checkpoint_says_so_again_and_again(plain: Trained, tmp_path: Path) -> None:
    copy = plain.as_before_its_end(tmp_path)
    for checkpoint in find_checkpoints(copy / "checkpoints"):
        (checkpoint / WEIGHTS).unlink()
    for _ in range(2):
        with pytest.raises(StorageError, match="no checkpoint in it is whole.*remove this folder"):
            plain.resumed(copy)
    assert len(list((copy / "checkpoints").glob("*.damaged"))) == 2


def test_eight_bit_states_are_among_the_files(tiny_base: Path, trained: Trained) -> None:
    tensors = load_file(trained.folder / "checkpoints" / "step-000004" / "state.safetensors")
    eight_bit = "8bit" in trained.recipe.read_text()
    assert eight_bit == any(tensor.dtype == torch.uint8 and "state1" in name for name, tensor in tensors.items())


def test_a_state_of_another_training_is_refused(plain: Trained, tmp_path: Path) -> None:
    """A checkpoint sealed anew around tensors of another dtype or name passes the manifest, not the load."""
    for change, said in (("dtype", "float16 .* was saved, float32 .* fits"), ("name", "nothing fits")):
        copy = plain.as_before_its_end(tmp_path / change)
        checkpoint = copy / "checkpoints" / "step-000004"
        tensors = load_file(checkpoint / WEIGHTS)
        name = next(iter(tensors))
        tensors[f"x.{name}" if change == "name" else name] = tensors.pop(name).to(
            torch.float16 if change == "dtype" else torch.float32
        )
        save_file(tensors, checkpoint / WEIGHTS)
        (checkpoint / "checkpoint.json").unlink()
        files = shutil.move(checkpoint, tmp_path / change / "files")
        write_checkpoint(
            copy / "checkpoints", step=4, keep=2,
            write=lambda target, files=files: shutil.copytree(files, target, dirs_exist_ok=True) and None,
        )  # fmt: skip
        with pytest.raises(StorageError, match=said):
            plain.resumed(copy)


def test_dora_resumes_to_the_same_weights(tiny_base: Path, tmp_path: Path) -> None:
    dora = Trained(tmp_path / "dora", tiny_base, adapter__method="dora", adapter__rank=4)
    copy = dora.as_before_its_end(tmp_path)
    shutil.rmtree(copy / "checkpoints" / "step-000004")
    assert dora.resumed(copy) == dora.weights


def test_random_numbers_go_on_where_they_were(plain: Trained) -> None:
    checkpoint = plain.folder / "checkpoints" / "step-000002"

    def draw() -> tuple:
        return random.random(), random.gauss(), np.random.normal(), torch.rand(3).tolist()  # noqa: NPY002

    state_file.load_random_state(checkpoint)
    first, second = draw(), draw()
    state_file.load_random_state(checkpoint)
    assert (draw(), draw()) == (first, second)
    assert first != second


# -- saving ---------------------------------------------------------------------------------------------------------


def save(folder: Path, step: int, *, keep: int = 2) -> Path:
    return write_checkpoint(
        folder, step=step, keep=keep, write=lambda target: (target / "a").write_text(f"{step}") and None
    )


def test_what_is_not_finite_is_never_saved(
    plain: Trained, tiny_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    broken = {"weight": "lora_B", "optimizer": "exp_avg_sq of"}
    for place, said in broken.items():
        original = trainer_file.save_state

        def spoiled(*args: object, place: str = place, save: Callable = original, **kwargs: object) -> None:
            model, optimizer = kwargs["model"], kwargs["optimizer"]
            if kwargs["parts"]["schedule"].last_epoch == 4:  # type: ignore[index]
                parameter = next(p for name, p in model.named_parameters() if "lora_B" in name)  # type: ignore[attr-defined]
                tensor = parameter.data if place == "weight" else optimizer.state[parameter]["exp_avg_sq"]  # type: ignore[attr-defined]
                tensor.view(-1)[-1] = float("inf")
            save(*args, **kwargs)

        with monkeypatch.context() as patch:
            patch.setattr(trainer_file, "save_state", spoiled)
            with pytest.raises(NumericsError, match=said) as caught:
                run(plain.recipe, ["output.keep_checkpoints=1"], out=tmp_path / place)
        assert caught.value.code == 4
        left = list((tmp_path / place / "checkpoints").iterdir())
        assert [path.name for path in left] == ["step-000002"]
        assert find_damage(left[0]) is None


@pytest.mark.parametrize("failing", [{3, 4}, {3, 4, 5}, {2, 3, 5, 6}])
def test_a_full_disk_ends_the_run_only_after_three_failed_saves(
    plain: Trained, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
    failing: set[int],
) -> None:  # fmt: skip
    folder = tmp_path / "run" / "checkpoints"

    original = trainer_file.StepTrainer._write_checkpoint_files

    def write(self: trainer_file.StepTrainer, target: Path, random_states: list[bytes]) -> None:
        original(self, target, random_states)
        if self.state.global_step in failing:
            raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(trainer_file.StepTrainer, "_write_checkpoint_files", write)
    overrides = ["output.save_every_steps=1", "output.keep_checkpoints=9", "train.max_steps=6"]
    error: FinetuneError | None = None
    try:
        run(plain.recipe, overrides, out=tmp_path / "run")
    except StorageError as caught:
        error = caught
    said = [line for line in capsys.readouterr().err.splitlines() if "No space left" in line]
    names = sorted(path.name for path in folder.iterdir())
    assert len(said) == (4 if len(failing) == 4 else 2)
    assert all("the run goes on" in line for line in said)
    if failing != {3, 4, 5}:  # a save that succeeds begins the count anew
        assert error is None
        assert names == [f"step-{step:06d}" for step in range(1, 7) if step not in failing]
        assert (tmp_path / "run" / "adapter").is_dir()
    else:
        assert error is not None
        assert error.code == 3
        assert names == ["step-000001", "step-000002"]
    assert all(find_damage(path) is None for path in folder.iterdir())


CRASHES = """
import os, shutil, signal, sys
from pathlib import Path
from finetune.train.checkpoints import find_damage, newest_whole_checkpoint, write_checkpoint

EVENTS = {"open", "os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.listdir", "os.scandir", "shutil.rmtree"}

def save(folder, step):
    def write(target):
        for name in "abc":
            (target / name).write_text(f"{name} of step {step}")
    write_checkpoint(folder, step=step, keep=2, write=write)

def crash_at(point, folder):
    left = [point]
    def count(*_):
        left[0] -= 1
        if left[0] == 0:
            os.kill(os.getpid(), signal.SIGKILL)
    sync = os.fsync
    os.fsync = lambda descriptor: (count(), sync(descriptor))
    sys.addaudithook(lambda event, _: count() if event in EVENTS else None)
    save(folder, 3)
    os._exit(0)

root, point, died, seen = Path(sys.argv[1]), 0, True, set()
save(root / "begin", 1)
save(root / "begin", 2)
while died:
    point += 1
    folder = shutil.copytree(root / "begin", root / str(point))
    child = os.fork()
    if child == 0:
        crash_at(point, folder)
    died = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
    best = newest_whole_checkpoint(folder)
    seen.add(best.name)
    assert best.name in ("step-000002", "step-000003"), best
    assert (best / "b").read_text() == f"b of step {int(best.name[-1])}"
    names = sorted(path.name for path in folder.iterdir())
    assert all(name.startswith("step-") and "damaged" not in name for name in names), (point, names)
    assert all(find_damage(path) is None for path in folder.iterdir())
    save(folder, 3)
    save(folder, 4)
    names = sorted(path.name for path in folder.iterdir())
    assert names == ["step-000003", "step-000004"], (point, names)
print(point - 1, *sorted(seen))
"""


def test_a_kill_at_every_point_of_a_save_leaves_a_whole_checkpoint(tmp_path: Path) -> None:
    command = [sys.executable, "-c", CRASHES, str(tmp_path)]
    done = subprocess.run(command, cwd=CHECKOUT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    points, *seen = done.stdout.split()
    assert int(points) > 30
    assert seen == ["step-000002", "step-000003"]


def test_the_manifest_and_the_folder_are_synced_before_and_after_the_rename(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    happened: list[str] = []
    sync, rename = os.fsync, Path.rename
    monkeypatch.setattr(
        os, "fsync", lambda fd: (happened.append(Path(os.readlink(f"/proc/self/fd/{fd}")).name), sync(fd))
    )
    monkeypatch.setattr(Path, "rename", lambda self, to: (happened.append("rename"), rename(self, to))[1])
    save(tmp_path / "checkpoints", 1)
    assert happened == ["a", "checkpoint.json", ".step-000001.partial", "rename", "checkpoints"]


# -- rotation -------------------------------------------------------------------------------------------------------

EVENT = st.one_of(
    st.tuples(st.just("save"), st.integers(1, 3)),
    st.tuples(st.sampled_from(["content", "manifest", "foreign", "resume", "clock"]), st.integers(0, 5)),
)


@pytest.fixture
def no_fsync(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(os, "fsync", lambda _: None)
    return


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(keep=st.integers(1, 3), events=st.lists(EVENT, max_size=14))
def test_rotation_never_removes_the_newest_whole_checkpoint_nor_what_is_not_ours(
    no_fsync: None, tmp_path_factory: pytest.TempPathFactory, keep: int, events: list[tuple[str, int]]
) -> None:
    folder = tmp_path_factory.mktemp("history") / "checkpoints"
    folder.mkdir()
    step = 0
    foreign = {folder / name for name in ("step-best", "checkpoint-3", "step-000001.copy", "step-12")}
    for path in foreign:
        path.mkdir()
    for event, number in events:
        there = find_checkpoints(folder)
        whole = [path for path in there if find_damage(path) is None]
        if event == "save":
            step += number
            saved = save(folder, step, keep=keep)
            assert find_damage(saved) is None
            older = [path for path in whole if path < saved]
            assert {*older[len(older) - keep + 1 :], *(path for path in whole if path > saved)} <= set(
                find_checkpoints(folder)
            )
        elif event == "resume":
            try:
                best = newest_whole_checkpoint(folder)
            except StorageError:
                assert not whole
            else:
                assert best == (whole[-1] if whole else None)
                step = int(best.name[5:]) if best else 0
        elif event == "foreign":
            path = folder / f"step-{900 + number:06d}"
            path.mkdir(exist_ok=True)
        elif there and event == "clock":
            os.utime(there[number % len(there)], (0, 0))
        elif there:
            file = there[number % len(there)] / ("a" if event == "content" else "checkpoint.json")
            file.write_text("") if file.is_file() else None
        now_whole = [path for path in find_checkpoints(folder) if find_damage(path) is None]
        assert len([path for path in now_whole if int(path.name[5:]) <= step]) <= keep or event != "save"
        assert all(path.is_dir() for path in foreign)


def test_rotation_leaves_what_is_newer_and_what_holds_no_manifest(tmp_path: Path) -> None:
    for step in (10, 20, 90):
        save(tmp_path, step, keep=9)
    (tmp_path / "step-000005").mkdir()
    save(tmp_path, 30, keep=1)
    assert [path.name for path in find_checkpoints(tmp_path)] == ["step-000005", "step-000030", "step-000090"]


def test_a_checkpoint_that_cannot_be_removed_is_said_and_the_new_one_counts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    save(tmp_path, 10, keep=1)
    rename = Path.rename

    def read_only(path: Path, target: Path) -> Path:
        if path.name == "step-000010":
            raise OSError(errno.EROFS, "Read-only file system")
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", read_only)
    assert find_damage(save(tmp_path, 20, keep=1)) is None
    assert [path.name for path in find_checkpoints(tmp_path)] == ["step-000010", "step-000020"]
    assert "step-000010: no longer needed, but it could not be removed" in capsys.readouterr().err


def test_a_short_checkpoint_does_not_count_as_kept(tmp_path: Path) -> None:
    for step in (1, 2, 3):
        save(tmp_path, step, keep=9)
    (tmp_path / "step-000003" / "a").write_text("")
    save(tmp_path, 4, keep=2)
    assert [path.name for path in find_checkpoints(tmp_path)] == ["step-000002", "step-000003", "step-000004"]


# -- no pickle ------------------------------------------------------------------------------------------------------


def forbidden_calls(source: str) -> list[str]:
    """torch.load and torch.save, however they are reached."""
    tree = ast.parse(source)
    reached = [f"{n.value.id}.{n.attr}" for n in ast.walk(tree)
               if isinstance(n, ast.Attribute) and isinstance(n.value, ast.Name)]  # fmt: skip
    imported = [f"{n.module}.{a.name}" for n in ast.walk(tree) if isinstance(n, ast.ImportFrom) for a in n.names]
    return sorted({"torch.load", "torch.save"} & {*reached, *imported})


def test_nothing_is_pickled() -> None:
    for file in sorted((CHECKOUT / "finetune").rglob("*.py")):
        assert not forbidden_calls(file.read_text(encoding="utf-8")), file
    assert forbidden_calls("import torch\ntorch.load('x')") == ["torch.load"]
    assert forbidden_calls("from torch import save as s") == ["torch.save"]


def test_no_file_of_a_checkpoint_is_a_pickle(trained: Trained) -> None:
    for file in (trained.folder / "checkpoints").rglob("*"):
        assert file.is_dir() or file.suffix in (".json", ".safetensors"), file


@pytest.mark.parametrize(
    "damage", [b"\xff\xfe\n", b"[1]\n", b'{"loss": 1.0}\n', b'{"step": "2"}\n', b'{"step": 2, "lo']
)
def test_metrics_are_read_up_to_the_first_damaged_line(tmp_path: Path, damage: bytes) -> None:
    file = tmp_path / "metrics.jsonl"
    file.write_bytes(b'{"step": 1, "loss": 2.0}\n' + damage + b'\n{"step": 3, "loss": 1.0}\n')
    assert read_metrics(file) == [{"step": 1, "loss": 2.0}]
    metrics = MetricsFile(file)
    assert metrics.open(until_step=9) == [{"step": 1, "loss": 2.0}]
    metrics.add({"step": 2})
    metrics.close()
    assert file.read_bytes() == b'{"step": 1, "loss": 2.0}\n{"step": 2}\n'
