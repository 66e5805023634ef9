"""SIGKILL at random moments of merge and export: what is left is either nothing or a whole, proven release.

Each round forks a process that merges (or exports) a random adapter of pocket-llama, always to the same place, and
kills it at a random moment of a phase: `start` (reading), `writing`, `proving`, `renaming`. Half of the kills take the
whole process group, half only the process that merges. After each kill: the place holds nothing, or what
`finetune verify` accepts; an earlier release beside it has not changed. At the end one merge is let through: nothing
hidden may be left then. Last, two merges to one place at once: one release, and one refused.

    python benchmarks/merge_kills.py FOLDER --kills 50 --out benchmarks/results/merge_kills.json
"""

from __future__ import annotations

import argparse
import json
import os
import random
import select
import shutil
import signal
import sys
import time
import warnings
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

CHECKOUT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(CHECKOUT))

from finetune.machine import quiet_libraries  # noqa: E402

quiet_libraries()

import torch  # noqa: E402
from safetensors.torch import save_file  # noqa: E402

from finetune.base import read_tensor_entries, sha256_of  # noqa: E402
from finetune.errors import FinetuneError  # noqa: E402
from finetune.release import export as export_file  # noqa: E402
from finetune.release import merge as merge_file  # noqa: E402
from finetune.release import verify as verify_file  # noqa: E402
from finetune.release.export_proof import prove_export  # noqa: E402
from finetune.release.fresh import Proof  # noqa: E402
from finetune.release.proof import prove  # noqa: E402
from finetune.release.verify import verify  # noqa: E402

BASE = CHECKOUT / "finetune" / "assets" / "pocket-llama"
PHASES = ("start", "writing", "proving", "renaming")
WEIGHTS = (1, 4, 3, 2)  # of the phases: nine of ten kills while it writes, proves or renames
LINES = {"merging": "writing", "writing": "writing", "proving": "proving"}  # first words of progress, and the phase


def make_adapter(folder: Path) -> Path:
    """A random adapter in PEFT's format."""
    folder.mkdir(parents=True)
    generator, tensors = torch.Generator().manual_seed(1), {}
    for entry in read_tensor_entries(BASE):
        if ".layers." in entry.name and len(entry.shape) == 2:
            path = f"base_model.model.{entry.name.removesuffix('.weight')}"
            tensors[f"{path}.lora_A.weight"] = 0.05 * torch.randn(4, entry.shape[1], generator=generator)
            tensors[f"{path}.lora_B.weight"] = 0.05 * torch.randn(entry.shape[0], 4, generator=generator)
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    leaves = sorted({name.split(".")[-3] for name in tensors})
    config = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": 4, "lora_alpha": 8, "target_modules": leaves}
    (folder / "adapter_config.json").write_text(json.dumps(config | {"base_model_name_or_path": str(BASE)}))
    return folder


def prove_here(pairs: list[tuple[Path, Path]]) -> list[list[Proof]]:
    """The proofs without a process of their own."""
    return [prove(folder, run) for folder, run in pairs]


def work(command: str, adapter: Path, out: Path, tell: Callable[[str], None]) -> None:
    """One merge or export; every phase is told when it begins."""
    tell("start")
    publish = merge_file.publish

    def told(folder: Path, place: Path) -> None:
        tell("renaming")
        publish(folder, place)

    merge_file.publish = told
    vars(export_file)["publish"] = told

    def progress(line: str) -> None:
        phase = LINES.get(line.split(" ", 1)[0])
        if phase:
            tell(phase)

    if command == "merge":
        merge_file.merge(adapter, out=out, onto="original", progress=progress)
    else:
        target, form = (str(adapter), "adapter") if command == "export adapter" else (str(BASE), "gguf")
        export_file.export(target, format=form, out=out, progress=progress)


def fork(command: str, adapter: Path, out: Path) -> tuple[int, int]:
    """The process and the end of a pipe that says its phases; it exits 0, or with the code of its error."""
    reader, writer = os.pipe()
    child = os.fork()
    if child:
        os.close(writer)
        return child, reader
    os.setsid()
    os.close(reader)
    devnull = os.open(os.devnull, os.O_WRONLY)
    os.dup2(devnull, 1)
    os.dup2(devnull, 2)
    code = 1
    try:
        work(command, adapter, out, lambda phase: os.write(writer, f"{phase}\n".encode()) and None)
        code = 0
    except FinetuneError as error:
        code = error.code
    finally:
        os._exit(code)


def wait_for(reader: int, phase: str, seconds: float) -> bool:
    """Whether the phase has begun; False if the process ended before."""
    said, end = b"", time.monotonic() + seconds
    while phase.encode() not in said.split(b"\n"):
        if not select.select([reader], [], [], max(0.0, end - time.monotonic()))[0]:
            return False
        block = os.read(reader, 4096)
        if not block:
            return False
        said += block
    return True


def kill_once(
    command: str, phase: str, adapter: Path, out: Path, chance: random.Random, longest: float
) -> dict[str, Any]:
    """Start, kill in the phase, and look at what is left."""
    child, reader = fork(command, adapter, out)
    reached = wait_for(reader, phase, 300)
    delay = chance.random() ** 2 * {"start": 0.3, "writing": 0.3, "proving": longest, "renaming": 0.2}[phase]
    time.sleep(delay)
    whole_group = chance.random() < 0.5
    (os.killpg if whole_group else os.kill)(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    os.close(reader)
    found = {"command": command, "phase": phase, "delay_seconds": round(delay, 4), "whole_group": whole_group}
    found |= {"reached": reached, "killed": os.WIFSIGNALED(status), "left": state_of(out)}
    return found


def state_of(out: Path) -> str:
    """nothing, release (verified), or what is wrong."""
    if not out.exists():
        return "nothing"
    if not any(out.iterdir()):
        return "mixed: an empty folder"
    try:
        again = verify(out)
    except (FinetuneError, OSError, ValueError, KeyError) as error:
        return f"mixed: {error}"
    return "release" if again.not_proven is None or not again.not_proven else f"release, files only: {again.not_proven}"


def hashes(folder: Path) -> dict[str, str]:
    """sha256 of every file of a folder."""
    return {str(file.relative_to(folder)): sha256_of(file) for file in sorted(folder.rglob("*")) if file.is_file()}


def two_at_once(adapter: Path, out: Path) -> dict[str, Any]:
    """Two merges to one place: exit codes and what is there afterwards."""
    children = [fork("merge", adapter, out) for _ in range(2)]
    codes = []
    for child, reader in children:
        codes.append(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
        os.close(reader)
    return {"exit_codes": sorted(codes), "left": state_of(out)}


def run(folder: Path, kills: int, seed: int, longest: float) -> dict[str, Any]:
    """All kills, and what they say."""
    chance = random.Random(seed)
    adapter, place = make_adapter(folder / "adapter"), folder / "place"
    place.mkdir()
    good, out = place / "good", place / "out"
    child, reader = fork("merge", adapter, good)
    assert os.waitpid(child, 0)[1] == 0
    os.close(reader)
    before, rounds = hashes(good), []
    for number in range(kills):
        phase = PHASES[number] if number < len(PHASES) else chance.choices(PHASES, WEIGHTS)[0]
        command = chance.choice(("merge", "merge", "export adapter", "export gguf"))
        rounds.append(kill_once(command, phase, adapter, out, chance, longest))
        print(number, rounds[-1], file=sys.stderr)
        if out.exists() and not rounds[-1]["left"].startswith("mixed"):
            shutil.rmtree(out)
    child, reader = fork("merge", adapter, out)
    last = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    os.close(reader)
    names = sorted(path.name for path in place.iterdir())
    shutil.rmtree(out, ignore_errors=True)
    return {
        "kills": len(rounds),
        "killed_while_running": sum(found["killed"] for found in rounds),
        "by_phase": dict(Counter(found["phase"] for found in rounds)),
        "left": dict(Counter(found["left"].split(":")[0] for found in rounds)),
        "mixed": [found for found in rounds if found["left"].startswith("mixed")],
        "earlier_release_unchanged": hashes(good) == before,
        "a_merge_afterwards": {"exit_code": last, "names": names},
        "two_at_once": two_at_once(adapter, out),
        "seed": seed,
        "rounds": rounds,
    }


def main() -> None:
    """Kill and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--proof-seconds", type=float, default=8.0, help="how long after its begin a proof is killed")
    parser.add_argument("--proof-here", action="store_true", help="prove in the same process: faster")
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    if arguments.proof_here:
        merge_file.prove_in_fresh_process = verify_file.prove_in_fresh_process = prove_here  # type: ignore[assignment]
        vars(export_file)["prove_in_fresh_process"] = vars(verify_file)["prove_export_in_fresh_process"] = prove_export
    folder = arguments.folder / "merge_kills"
    shutil.rmtree(folder, ignore_errors=True)
    try:
        result = run(folder, arguments.kills, arguments.seed, arguments.proof_seconds)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    text = json.dumps(result | {"proof_here": arguments.proof_here}, indent=2)
    print(text)
    if arguments.out:
        arguments.out.write_text(text + "\n")


if __name__ == "__main__":
    main()
