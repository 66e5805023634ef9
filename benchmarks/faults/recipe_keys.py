"""Every key of a recipe changed once before `--resume`, through the command: none takes effect, or none, silently.

Promised: exit code 2 with the key and both values; or the run goes on, says the change in a line, and its adapter is
the undisturbed one (free), the same up to rounding (layout) or that of a longer run (length).
"""

from __future__ import annotations

import json
import shutil
import time
from pathlib import Path
from typing import Any

from safetensors.torch import load_file

from benchmarks.faults.stage import WEIGHTS, Case, Outcome, Stage, has_traceback, last_line, report, tell
from finetune.recipe import load_recipe

STEPS = 8
OTHER: dict[str, Any] = {
    "version": 2, "name": "another", "seed": 5, "model.base": "BASE2", "model.revision": "main",
    "model.quantization": "nf4", "model.dtype": "bfloat16", "adapter.method": "dora", "adapter.rank": 2,
    "adapter.alpha": 4, "adapter.dropout": 0.2, "adapter.targets": ["v_proj"], "adapter.layers": [0],
    "adapter.rank_by": {"v_proj": 2}, "adapter.alpha_by": {"v_proj": 2}, "adapter.start": "olora",
    "adapter.learning_rate_ratio": 4.0, "adapter.block_size": 2, "adapter.train_tokens": ["<s>"],
    "adapter.also_train": ["norm"], "adapter.from": "ADAPTER",
    "data.train": "ROWS", "data.eval": 2, "data.format": "alpaca", "data.template": "none",
    "data.loss_on": "everything", "data.max_tokens": 300, "data.too_long": "truncate", "data.truncate": "prompt",
    "data.empty_answer": "drop", "data.special_tokens": "control", "data.deduplicate": "exact", "data.leaked": "drop",
    "data.drop": ["too_long"], "data.system": "Be brief.", "data.date": "2 Feb 2026", "train.objective": "dpo",
    "train.epochs": 3, "train.max_steps": 10, "train.batch_size": 4, "train.tokens_per_pass": 100,
    "train.recompute": "all", "train.speedups": "none", "train.learning_rate": 5e-3, "train.schedule": "constant",
    "train.warmup": 2,
    "train.optimizer": "adamw-8bit", "train.weight_decay": 0.5, "train.max_grad_norm": 0.1,
    "evaluate.every_steps": 4, "evaluate.prompts": "PROMPTS", "evaluate.patience": 3,
    "output.folder": "elsewhere", "output.save_every_steps": 4,
    "output.keep_checkpoints": 1, "output.keep_best": True, "output.log_to": ["tensorboard"],
}  # fmt: skip


def run(stage: Stage, count: int, seed: int) -> dict[str, Any]:
    """All keys that a recipe has, `count` at most."""
    started, rounds = time.monotonic(), []
    case = stage.case(dropout=0.0)
    settings = load_recipe(case.recipe).settings()
    prepare(stage, case)
    for key in list(settings)[:count]:
        if key not in OTHER:
            rounds.append({"class": "unknown", "key": key, "outcome": "no other value in the harness", "ok": False})
            continue
        outcome, ok = change(stage, case, key, settings[key])
        kind = outcome.partition(":")[0]
        rounds.append(
            {"class": kind, "key": key, "was": settings[key], "now": OTHER[key], "outcome": outcome, "ok": ok}
        )
        tell(len(rounds) - 1, len(settings), {**rounds[-1], "class": key})
    silent = [each["key"] for each in rounds if each["outcome"].startswith("silent")]
    return report("recipe-keys", rounds, seed=seed, seconds=time.monotonic() - started, silent=silent)


def prepare(stage: Stage, case: Case) -> None:
    """Another base and other rows with the same bytes, and an adapter to begin from."""
    shutil.copytree(stage.base, stage.folder / "base2", dirs_exist_ok=True)
    shutil.copyfile(case.recipe.parent / "rows.jsonl", stage.folder / "rows2.jsonl")
    (stage.folder / "prompts.txt").write_text("Where is the fox?\n")
    names = {"BASE2": "base2", "ROWS": "rows2.jsonl", "PROMPTS": "prompts.txt"}
    for key, value in OTHER.items():
        if isinstance(value, str) and value in names:
            OTHER[key] = str(stage.folder / names[value])
        elif value == "ADAPTER":
            OTHER[key] = str(case.straight / "adapter")


def change(stage: Stage, case: Case, key: str, was: Any) -> Outcome:
    """What a run that ended after step 6 makes of another value."""
    folder = stage.new_folder("keys")
    shutil.copytree(case.straight, folder)
    (folder / "result.json").unlink()
    shutil.rmtree(folder / "adapter")
    shutil.rmtree(folder / "checkpoints" / f"step-{STEPS:06d}")
    text = f"{key}={json.dumps(OTHER[key])}"
    ended = stage.train(case, folder, "--set", text, resume=True)
    said = [line for line in ended[0].err.splitlines() if key.split(".")[-1] in line or "steps in place of" in line]
    if has_traceback(ended) or ended[0].code not in (0, 2):
        return f"exits {ended[0].code}: {last_line(ended)}", False
    if ended[0].code == 2:
        if not said:
            return f"refused, the key is not named: {last_line(ended)}", False
        line = said[0]
        both = "was " in line and " is " in line
        return (f"refused with both values: {line}", True) if both else (f"refused before: {line}", True)
    return judge(folder / "adapter" / WEIGHTS, case.straight / "adapter" / WEIGHTS, said, case, folder)


def judge(mine: Path, theirs: Path, said: list[str], case: Case, folder: Path) -> Outcome:
    steps = json.loads((folder / "result.json").read_text())["steps"]
    if steps != STEPS:
        return (f"longer: {said[0]}", True) if said and steps > STEPS else (f"silent: {steps} steps", False)
    same = mine.read_bytes() == theirs.read_bytes()
    plans = [json.loads((run / "plan.json").read_text()) for run in (folder, case.straight)]
    if same and not said:
        unchanged = plans[0] == plans[1]
        return ("no change: it resolves to the same plan", True) if unchanged else ("silent: same adapter", False)
    if not said:
        return "silent: another adapter", False
    if same:
        return f"said, same adapter: {said[0]}", True
    one, two = load_file(mine), load_file(theirs)
    apart = max((one[name] - two[name]).abs().max().item() for name in two)
    return f"said, same up to rounding: {said[0]} ({apart:.1e})", apart < 1e-5
