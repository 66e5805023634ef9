"""One training run, start to end. Read this first."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

from finetune.artifact import RunFolder, open_run_folder
from finetune.data.cached import Progress
from finetune.resolve import resolve


def run(
    recipe_path: Path,
    overrides: Sequence[str] = (),
    *,
    out: Path | None = None,
    resume: bool = False,
    reading: Callable[[], AbstractContextManager[Progress | None]] = nullcontext,
) -> RunFolder:
    """Train what the recipe asks for and return the finished run folder; `reading` shows the rows being read.

    Raises:
        UserError, NumericsError: see the stages; nothing is written before the plan is resolved.
    """
    with reading() as progress:
        recipe, base, data, plan = vars(resolve(recipe_path, overrides, out=out, progress=progress)).values()
    folder = open_run_folder(plan, recipe_path, overrides, base, recipe.data, resume=resume)
    if folder.is_finished:
        return folder
    # Only now torch and the libraries around it: what is wrong with the input is said before their seconds of import.
    from finetune.model.adapter import attach_adapter, save_adapter
    from finetune.model.load import load_base, load_tokenizer
    from finetune.train.train import train

    model = attach_adapter(load_base(plan.model), plan.adapter, base=plan.model.base)
    tokenizer = load_tokenizer(base.tokenizer_folder)
    result = train(plan.train, model, tokenizer, examples=data.train, held_out=data.eval, folder=folder.path)
    folder.write_adapter(base, data.template, lambda target: save_adapter(model, target))
    return folder.finish(result)
