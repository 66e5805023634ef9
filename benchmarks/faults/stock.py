"""The same kills, damaged files, failing disks and NaNs against plain TRL: SFTTrainer with its defaults.

The tiny base, LoRA with dropout, a save every second step of eight, two checkpoints kept, `resume_from_checkpoint=True`
where a checkpoint folder exists. A run is lost if it cannot go on by that, or goes on to another adapter than the
undisturbed run's without an error. "as promised" is what finetune promises, not what TRL does.
"""

from __future__ import annotations

import itertools
import json
import random
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from benchmarks.faults import storage
from benchmarks.faults.hooks import KINDS_OF_CALLS, hook
from benchmarks.faults.stage import WEIGHTS, Outcome, Stage, last_line, report, tell, wait
from tests.train.forked import Ended

STEPS, EVERY, KEEP = 8, 2, 2
SIGKILL = 9
PLACE = "transformers Trainer._save_checkpoint"
# Of all rounds: kills, damaged files, failing calls, numbers that are not finite.
SHARES = {"kills": 0.3, "damage": 0.4, "failing": 0.15, "numerics": 0.15}


def train(folder: str, base: str, data: str, resume: bool, spoil: tuple[str, int, str] | None = None) -> None:
    """What a forked process does: a TRL training to its end, and its adapter."""
    from datasets import load_dataset
    from peft import LoraConfig
    from transformers import AutoModelForCausalLM
    from trl import SFTConfig, SFTTrainer

    trainer = SFTTrainer(
        model=AutoModelForCausalLM.from_pretrained(base),
        args=SFTConfig(
            output_dir=folder, per_device_train_batch_size=2, max_steps=STEPS, learning_rate=1e-2, use_cpu=True,
            save_steps=EVERY, save_total_limit=KEEP, logging_steps=1, report_to="none", disable_tqdm=True,
        ),
        train_dataset=load_dataset("json", data_files=data, split="train"),
        peft_config=LoraConfig(task_type="CAUSAL_LM", r=4, lora_alpha=8, lora_dropout=0.1),
    )  # fmt: skip
    if spoil:
        spoil_gradient_or_weight(trainer, *spoil)
    there = any(path.name.startswith("checkpoint-") for path in Path(folder).glob("*"))
    trainer.train(resume_from_checkpoint=True if resume and there else None)
    trainer.model.save_pretrained(Path(folder) / "adapter")
    with open(Path(folder) / "log.json", "w") as stream:
        json.dump(trainer.state.log_history, stream)
    raise SystemExit(0)


def spoil_gradient_or_weight(trainer: Any, what: str, step: int, value: str) -> None:
    """At a step the loss, the gradient or a weight is not finite."""
    import torch

    original = trainer.training_step

    def spoiled(model: Any, *args: Any, **kwargs: Any) -> Any:
        now = trainer.state.global_step == step - 1
        parameter = next(p for p in model.parameters() if p.requires_grad)
        if now and what == "weight":
            with torch.no_grad():
                parameter.view(-1)[0] = float(value)
        loss = original(model, *args, **kwargs)
        if now and what in ("gradient", "loss"):
            parameter.grad.view(-1)[0] = float(value)
        return loss * float(value) if now and what == "loss" else loss

    trainer.training_step = spoiled


def run(stage: Stage, count: int, seed: int) -> dict[str, Any]:
    """`count` faults, shared between the kinds."""
    chance, started = random.Random(seed), time.monotonic()
    rounds: list[dict[str, Any]] = []
    stock = Stock(stage)
    kinds = {"kills": stock.kills, "damage": stock.damages, "failing": stock.failing, "numerics": stock.numbers}
    for kind, share in SHARES.items():
        for found in itertools.islice(kinds[kind](chance), round(count * share)):
            if stage.is_over:
                break
            rounds.append({**found, "class": f"{kind}: {found['class']}"})
            tell(len(rounds) - 1, count, rounds[-1])
    return report("stock", rounds, seed=seed, seconds=time.monotonic() - started) | {"failed": []}


class Stock:
    """TRL runs of one recipe, and the undisturbed one."""

    def __init__(self, stage: Stage) -> None:
        self.stage = stage
        self.data = stage.case().recipe.parent / "rows_for_trl.jsonl"
        rows = [json.loads(line) for line in (self.data.parent / "rows.jsonl").read_text().splitlines()]
        pairs = [{"prompt": f"{row['instruction']}\n", "completion": row["output"]} for row in rows]
        self.data.write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
        self.straight = stage.new_folder("trl-straight")
        self.start(self.straight, resume=False)
        started = time.monotonic()
        ended = self.start(stage.new_folder("trl-again"), resume=False)
        self.seconds = time.monotonic() - started
        assert ended.code == 0, ended.err
        assert not self.differs(stage.folder / "runs" / "trl-again")
        self.unfinished = stage.new_folder("trl-unfinished")
        shutil.copytree(self.straight, self.unfinished)
        shutil.rmtree(self.unfinished / "adapter")

    def start(self, folder: Path, *, resume: bool, before: str = "", spoil: Any = None) -> Ended:
        arguments = (str(folder), str(self.stage.base), str(self.data), resume, spoil)
        text = f"{before}\nfrom benchmarks.faults import stock\nstock.train(*{arguments!r})\n"
        return wait([self.stage.nursery.start(hook=text)])[0]

    def differs(self, folder: Path) -> bool:
        file = folder / "adapter" / WEIGHTS
        return not file.exists() or file.read_bytes() != (self.straight / "adapter" / WEIGHTS).read_bytes()

    def resumed(self, folder: Path) -> Outcome:
        ended = self.start(folder, resume=True)
        if ended.code:
            return f"lost, cannot resume: {last_line([ended])}", False
        return ("lost, silently another adapter", False) if self.differs(folder) else ("resumed, same bits", True)

    def kills(self, chance: random.Random) -> Iterator[dict[str, Any]]:
        """Half of them inside a save."""
        while True:
            folder = self.stage.new_folder("trl")
            inside = chance.random() < 0.5
            if inside:
                text = hook("signal_at", PLACE, chance.randint(1, 3), round(chance.random() * 0.02, 4), SIGKILL)
            else:
                text = hook("signal_at", "any", 0, round(chance.random() * self.seconds, 4), SIGKILL)
            if self.start(folder, resume=False, before=text).code == 0:
                continue
            complete = len(list(folder.glob("checkpoint-*/trainer_state.json")))
            outcome, ok = self.resumed(folder)
            name = "inside a save" if inside else "any moment"
            yield {"class": name, "complete_checkpoints": complete, "outcome": outcome, "ok": ok}

    def damages(self, chance: random.Random) -> Iterator[dict[str, Any]]:
        """Of the newest checkpoint, whose step is the last one, or of the one before when that is gone."""
        newest = self.unfinished / f"checkpoint-{STEPS - EVERY}"
        shutil.rmtree(self.unfinished / f"checkpoint-{STEPS}")
        shutil.copytree(newest, self.unfinished / f"checkpoint-{STEPS - 2 * EVERY}")
        needed = ("adapter_config.json", WEIGHTS, "optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json")
        changes = [name for name in storage.changes(chance) if name != "swapped"]
        kinds = list(itertools.product(needed, changes))
        while True:
            chance.shuffle(kinds)
            for name, change in kinds:
                folder = self.stage.new_folder("trl")
                shutil.copytree(self.unfinished, folder)
                storage.changes(chance)[change](folder / newest.name / name)
                outcome, ok = self.resumed(folder)
                yield {"class": change.split(" (")[0], "file": name, "outcome": outcome, "ok": ok}

    def failing(self, chance: random.Random) -> Iterator[dict[str, Any]]:
        """A call of the second or third save fails once; then, if the run ended, it is resumed."""
        while True:
            error, kind = chance.choice(list(storage.ERRORS)), chance.choice(list(KINDS_OF_CALLS))
            save, which = chance.randint(2, 3), chance.randint(1, 16)
            folder, made = self.stage.new_folder("trl"), self.stage.folder / "calls"
            made.unlink(missing_ok=True)
            text = hook("break_storage", PLACE, save, which, storage.ERRORS[error], KINDS_OF_CALLS[kind], str(made))
            ended = self.start(folder, resume=False, before=text)
            if ended.code == 0 and int(made.read_text()) < which:
                continue
            if ended.code == 0:
                outcome, ok = ("lost, silently another adapter", False) if self.differs(folder) else ("ran on", True)
            else:
                outcome, ok = self.resumed(folder)
                outcome = f"traceback, then {outcome}"
            yield {"class": f"{error} at a {kind}", "outcome": outcome, "ok": ok}

    def numbers(self, chance: random.Random) -> Iterator[dict[str, Any]]:
        """Whether the run stops, and what it has saved."""
        while True:
            what = chance.choice(("loss", "gradient", "weight"))
            step, value = chance.randint(1, STEPS), chance.choice(("nan", "inf"))
            folder = self.stage.new_folder("trl")
            ended = self.start(folder, resume=False, spoil=(what, step, value))
            yield {"class": what, "step": step, "value": value, **self.saved_numbers(folder, ended)}

    def saved_numbers(self, folder: Path, ended: Ended) -> dict[str, Any]:
        from benchmarks.faults.numerics import is_finite

        checkpoints = list(folder.glob("checkpoint-*"))
        bad = sum(not is_finite(path / WEIGHTS) for path in checkpoints if (path / WEIGHTS).exists())
        stopped = "stopped" if ended.code else "exit 0"
        spoiled = "the final adapter is not finite" if self.has_bad_adapter(folder) else "the final adapter is finite"
        outcome = f"{stopped}, {spoiled}: {bad} of {len(checkpoints)} checkpoints not finite"
        return {"outcome": outcome, "bad_checkpoints": bad, "ok": bool(ended.code) and not bad}

    def has_bad_adapter(self, folder: Path) -> bool:
        from benchmarks.faults.numerics import is_finite

        file = folder / "adapter" / WEIGHTS
        return file.exists() and not is_finite(file)
