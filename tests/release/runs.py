"""Finished runs without their training: a real run folder around an adapter of random numbers."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import torch

from finetune.artifact import RunFolder, open_run_folder, read_json, write_json
from finetune.model.adapter import attach_adapter, save_adapter
from finetune.model.load import load_base
from finetune.release.choice import Choice
from finetune.release.manifest import MANIFEST, describe_files
from finetune.release.merge import write_release
from finetune.release.source import check_base, read_source
from finetune.resolve import resolve
from finetune.train.train import TrainResult
from tests.conftest import alpaca_rows, make_tiny_base, write_recipe

RESULT = TrainResult(4, 20, 100, 5.0, 5.0, 1.0, 100.0, 0.5)
SIZE = 0.05  # of the random numbers: a delta about as large as a real one after some hundred steps


def random_run(folder: Path, *, dtype: str = "float32", tied: bool = False, **settings: Any) -> RunFolder:
    """A finished run on a tiny base stored in `dtype`; its adapter, magnitudes included, is random and not zero."""
    return random_run_on(make_tiny_base(folder / "base", dtype=dtype, tied=tied), folder, **settings)


def random_run_on(base: Path, folder: Path, **settings: Any) -> RunFolder:
    """The same on another base."""
    asked = {"model__quantization": "nf4", "data__eval": 6, **settings}
    recipe = write_recipe(folder, base, alpaca_rows(20), **asked)
    resolved = resolve(recipe)
    run = open_run_folder(resolved.plan, recipe, (), resolved.base, resolved.recipe.data, resume=False)
    model = attach_adapter(load_base(resolved.plan.model), resolved.plan.adapter, base=str(base))
    generator = torch.Generator().manual_seed(1)
    for name, parameter in model.named_parameters():
        if "lora_magnitude" in name:
            parameter.data *= 1 + 0.2 * torch.rand(parameter.shape, generator=generator)
        elif "lora_" in name:
            parameter.data = SIZE * torch.randn(parameter.shape, generator=generator)
    run.write_adapter(resolved.base, resolved.data.template, lambda target: save_adapter(model, target))
    return run.finish(RESULT)


def unproven_release(folder: Path, run: RunFolder, onto: str) -> Path:
    """A release folder as merge writes it before the proofs."""
    source = read_source(run.path)
    folder.mkdir(parents=True)
    choice = Choice(onto, onto, "as asked", {}, 0, None)
    write_release(folder, source, choice, base_sha256=check_base(source), out=folder)
    return folder


def copy_release(release: Path, target: Path) -> Path:
    """A copy to be changed."""
    shutil.copytree(release, target)
    return target


def describe_again(folder: Path) -> None:
    """Let the manifest agree with the changed files, so that only the deeper proofs can see the change."""
    manifest = read_json(folder / MANIFEST)
    write_json(folder / MANIFEST, manifest | {"files": describe_files(folder)})
