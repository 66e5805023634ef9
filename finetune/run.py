"""One training run, start to end. Read this first."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path

from finetune.artifact import RunFolder, open_run_folder, refuse_unusable
from finetune.data.cached import Progress
from finetune.disk import refuse_full_disk
from finetune.errors import OutOfMemoryError, Problem, UserError
from finetune.machine import free_memory_gib, launched_rank, probe_machine, return_freed_memory
from finetune.plan import TrainPlan, memory_problem
from finetune.resolve import Resolved, resolve
from finetune.run_lock import LOCK, only_run_in
from finetune.stop import StopSignal
from finetune.train.memory import out_of_memory_told
from finetune.train.ranks import Ranks, joined_ranks

MAY_CHANGE = ("world_size",)  # what --allow-change lets a run go on with
Reading = Callable[[], AbstractContextManager[Progress | None]]


def run(  # noqa: PLR0913 - what the command line can say
    recipe_path: Path,
    overrides: Sequence[str] = (),
    *,
    out: Path | None = None,
    resume: bool = False,
    allow_change: Sequence[str] = (),
    reading: Reading = nullcontext,
    stop: StopSignal | None = None,
) -> RunFolder:
    """Train what the recipe asks for and return the finished run folder; `reading` shows the rows being read.

    Under a launcher such as torchrun every process is a rank: the first reads the rows and writes the folder, all of
    them train.

    Raises:
        UserError, NumericsError: see the stages; nothing is written before the plan is resolved.
        OutOfMemoryError: the plan needs more memory than the machine has.
        Stopped: `stop` has got a signal; what was trained is saved.
        WorkerError: another rank is gone or hangs.
    """
    _refuse_unknown_changes(allow_change)
    stop = stop or StopSignal()
    with joined_ranks(*launched_rank(), stop=stop) as ranks, ExitStack() as held:
        resolved = ranks.first_alone(lambda: _resolve(recipe_path, overrides, out, reading, resume=resume))
        # The others find the rows where the first rank put them.
        resolved = resolved or _resolve(recipe_path, overrides, out, resume=resume)
        folder = RunFolder(resolved.plan.run_folder)
        ranks.first_alone(lambda: _refuse_too_large(resolved))
        ranks.first_alone(lambda: _hold(held, resolved, resume=resume))
        with ranks.ends_noted(folder.path, stop):
            ranks.first_alone(
                lambda: open_run_folder(
                    resolved.plan, recipe_path, overrides, resolved.base, resolved.recipe.data, resume=resume
                ).keep_ranks(ranks.count, allow_other="world_size" in allow_change)
            )
            if not ranks.largest(folder.is_finished):
                merged_bytes = resolved.base.facts.stored_bytes
                ranks.first_alone(lambda: refuse_full_disk(folder.path, resolved.plan, merged_bytes=merged_bytes))
                _train(folder, resolved, stop, ranks)
    return folder


def _train(folder: RunFolder, resolved: Resolved, stop: StopSignal, ranks: Ranks) -> None:
    # Only now torch and the libraries around it: what is wrong with the input is said before their seconds of import.
    from finetune.model.adapter import attach_adapter, save_adapter
    from finetune.model.fast.speed_up import left_told, record, speed_up
    from finetune.model.load import load_base, load_tokenizer
    from finetune.train.train import train
    from finetune.use.samples import answer_all

    plan, base, data, prompts = resolved.plan, resolved.base, resolved.data, resolved.prompts
    where = f"cuda:{launched_rank()[1]}" if plan.model.device == "cuda" else plan.model.device
    with out_of_memory_told(lambda: "loading the base"):
        loaded = load_base(replace(plan.model, device=where), keep=True)
        model = attach_adapter(loaded, plan.adapter, base=plan.model.base)
        swapped = speed_up(model, plan.train.speedups, compute=plan.train.compute)
        tokenizer = load_tokenizer(base.tokenizer_folder)
    return_freed_memory()  # of loading, before the passes take theirs
    ranks.first_alone(lambda: _tell(folder, [*left_told(swapped), *folder.keep_speedups(record(swapped))]))

    def lightened(lighter: TrainPlan, told: str) -> None:
        folder.keep_lowered(lighter.lowered)
        _tell(folder, [f"{told}: the same training up to rounding"])

    result = train(
        plan.train,
        model,
        tokenizer,
        examples=data.train,
        held_out=data.eval,
        folder=folder.path,
        stop=stop,
        ranks=ranks,
        lightened=lightened,
        starts_at_base=plan.adapter.start_from is None,
        answer_all=partial(answer_all, plan, base, data.template, model, prompts) if prompts else None,
    )

    def publish() -> None:
        folder.write_adapter(base, data.template, lambda target: save_adapter(model, target))
        folder.finish(result)

    ranks.first_alone(publish)


def _tell(folder: RunFolder, lines: Sequence[str]) -> None:
    sys.stderr.write("".join(f"{folder.path}: {line}\n" for line in lines))


def _resolve(
    recipe_path: Path, overrides: Sequence[str], out: Path | None, reading: Reading = nullcontext, *, resume: bool
) -> Resolved:
    with reading() as progress:
        return resolve(recipe_path, overrides, out=out, progress=progress, resume=resume)


def _refuse_too_large(resolved: Resolved) -> None:
    free_gib = free_memory_gib(resolved.plan.model.device)
    if problem := memory_problem(resolved.plan, probe_machine(), free_gib=free_gib):
        raise OutOfMemoryError(problem)


def _hold(held: ExitStack, resolved: Resolved, *, resume: bool) -> None:
    """The folder for us alone. Where a run was before, whether one is at work there comes first of all."""
    folder = resolved.plan.run_folder
    was_held = (folder / LOCK).exists()
    if was_held:
        held.enter_context(only_run_in(folder))
    refuse_unusable(resolved.plan, resume=resume)
    if not was_held:
        held.enter_context(only_run_in(folder))


def _refuse_unknown_changes(names: Sequence[str]) -> None:
    unknown = [name for name in names if name not in MAY_CHANGE]
    if unknown:
        message = f"{unknown[0]!r} is not possible; write {' or '.join(MAY_CHANGE)}"
        raise UserError(Problem("--allow-change", message))
