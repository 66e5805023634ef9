"""The rehearsal itself, in a process of its own: a recipe and its base in; train, resume, merge and export on a twin.

Everything is done by the code that does it to the real base. What fails here would have failed after hours.
"""

from __future__ import annotations

import json
import shutil
import sys
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from finetune.errors import FinetuneError, Problem, ProofError, UserError
from finetune.machine import prepare_libraries
from finetune.rehearsal import SAVED_AT, STEPS
from finetune.trust import is_trusted, take_over

NAMES_TOLD = 5
CURES = {
    "names": "fetch the base again, or name another",
    "twin": "name another base",
    "train": "change adapter.method, adapter.targets, model.quantization or model.dtype",
    "resume": "please report it with your recipe",
    "merge": "change adapter.method or model.quantization, or release the adapter alone (export --format adapter)",
    "gguf": "release it as safetensors",
}


class Rehearsal:
    """What was found so far, told line by line to the process that waits for it."""

    def __init__(self) -> None:
        self.stage = "start"
        self.seconds: dict[str, float] = {}
        self.proofs: list[dict[str, Any]] = []
        self.notes: list[str] = []

    @contextmanager
    def at(self, stage: str) -> Iterator[None]:
        """A stage, announced when it begins and timed."""
        self.stage = stage
        _say({"stage": stage})
        started = time.perf_counter()
        yield
        self.seconds[stage] = round(time.perf_counter() - started, 2)

    def prove(self, name: str, value: float, limit: float | None = 0) -> None:
        self.proofs.append({"name": name, "value": value, "limit": limit})

    def answer(self, code: int = 0, problems: tuple[Problem, ...] = ()) -> dict[str, Any]:
        told = [{"where": problem.where, "message": problem.message} for problem in problems]
        facts = {"seconds": self.seconds, "proofs": self.proofs, "notes": self.notes}
        return {"code": code, "problems": told, **facts}


def main() -> None:
    """Arguments: the twin's recipe, the base's folder, its stored dtype, a work folder, the code that is allowed."""
    recipe, base, stored_dtype, work, trusted = sys.argv[1:]
    prepare_libraries()
    take_over(trusted)
    _say({"answer": carry_out(Path(recipe), Path(base), stored_dtype, Path(work))})


def carry_out(recipe: Path, base: Path, stored_dtype: str, work: Path) -> dict[str, Any]:
    """Rehearse the twin's recipe in `work`: exit code, problems, seconds by stage, proofs and notes."""
    rehearsal = Rehearsal()
    try:
        _rehearse(rehearsal, recipe, base, stored_dtype, work)
    except FinetuneError as error:
        code = ProofError.code if isinstance(error, ProofError) else UserError.code
        told = [str(problem) for problem in error.problems if not problem.where.endswith(".failed.json")]
        return rehearsal.answer(code, tuple(_told(rehearsal.stage, message, base, work) for message in told))
    except Exception as error:  # a library's, as it would have ended the run
        traceback.print_exc()
        said = (str(error).strip().splitlines() or [""])[0]
        message = f"{type(error).__name__}: {said}; {CURES.get(rehearsal.stage, 'please report it')}"
        return rehearsal.answer(UserError.code, (_told(rehearsal.stage, message, base, work),))
    return rehearsal.answer()


def _told(stage: str, message: str, base: Path, work: Path) -> Problem:
    return Problem(f"rehearsal: {stage}", message.replace(f"{work}/base", str(base)).replace(f"{work}/", ""))


def _say(value: dict[str, Any]) -> None:
    print(json.dumps({"rehearsal": value}), flush=True)  # noqa: T201 - the parent reads it


def _rehearse(rehearsal: Rehearsal, recipe: Path, base: Path, stored_dtype: str, work: Path) -> None:
    from finetune.artifact import RunFolder
    from finetune.twin import make_twin

    with rehearsal.at("names"):
        if any(base.glob("*.safetensors")):
            prove_names(rehearsal, base)
        else:
            complete_config(base)
    with rehearsal.at("twin"):
        make_twin(base, work / "base", stored_dtype=stored_dtype)
    with rehearsal.at("train"):
        from finetune.run import run

        trained = run(recipe)
        prove_learning(rehearsal, trained.path, work / "base")
    with rehearsal.at("resume"):
        again = work / "resumed"
        shutil.copytree(trained.path, again)
        for name in ("result.json", "adapter", f"checkpoints/step-{STEPS:06d}"):
            path = again / name
            shutil.rmtree(path) if path.is_dir() else path.unlink()
        resumed = run(recipe, out=again, resume=True)
        differing = _differing(RunFolder(trained.path).adapter, resumed.adapter)
        rehearsal.prove("weights that a resumed run has otherwise", len(differing))
    _release(rehearsal, trained.path, work)


def _release(rehearsal: Rehearsal, run: Path, work: Path) -> None:
    from finetune.release.export import export
    from finetune.release.merge import merge

    with rehearsal.at("merge"):
        release = merge(run, out=work / "merged")
        rehearsal.proofs += [{**each.to_json(), "name": f"merge: {each.name}"} for each in release.proofs]
    with rehearsal.at("gguf"):
        try:
            done = export(str(release.out), format="gguf", out=work / "gguf")
        except UserError as error:
            rehearsal.notes += [f"no GGUF: {problem.message}" for problem in error.problems]
        else:
            rehearsal.proofs += [{**each.to_json(), "name": f"gguf: {each.name}"} for each in done.proofs]


def complete_config(stand_in: Path) -> None:
    """Write out what the config of a base without files leaves to transformers, as a published one has it."""
    from transformers import AutoConfig

    AutoConfig.from_pretrained(str(stand_in), trust_remote_code=False).save_pretrained(stand_in)


def prove_names(rehearsal: Rehearsal, base: Path) -> None:
    """Every weight of the real base has its place and every place its weight; only names and shapes are read.

    transformers fills what a file does not hold with random numbers, and leaves out what it does not know.

    Raises:
        UserError: a weight is missing, has another shape, or would be left out.
    """
    found = _loading_info(base)
    missing = sorted(found["missing_keys"])
    shaped = [name for name, *_ in sorted(found["mismatched_keys"])]
    unknown = [name for name in sorted(found["unexpected_keys"]) if not name.endswith("inv_freq")]
    problems = []
    for names, said in (
        (missing, "the files hold no {}, which would be random numbers"),
        (shaped, "{} has another shape than config.json says"),
    ):
        if names:
            cure = _head_cure(names) or CURES["names"]
            problems.append(Problem(str(base), f"{said.format(_some(names))}; {cure}"))
    if unknown and (missing or not _is_image_part(unknown)):
        message = f"transformers has no place for {_some(unknown)} and would leave it out; {CURES['names']}"
        problems.append(Problem(str(base), message))
    if problems:
        raise UserError(problems)
    rehearsal.prove("weights of the base without a place, or places without a weight", len(missing) + len(shaped))


def _loading_info(base: Path) -> dict[str, Any]:
    from transformers import AutoModelForCausalLM

    loaded: Any
    try:
        loaded = AutoModelForCausalLM.from_pretrained(
            str(base),
            device_map="meta",
            output_loading_info=True,
            use_safetensors=True,
            ignore_mismatched_sizes=True,
            trust_remote_code=is_trusted(base),
        )
    except Exception as error:  # whatever an architecture's own code raises is its answer
        first_line = (str(error).strip().splitlines() or [type(error).__name__])[0]
        message = f"transformers cannot build this model: {first_line}; correct config.json, or name another base"
        raise UserError(Problem(str(base), message)) from error
    info: dict[str, Any] = loaded[1]
    return info


def _is_image_part(names: list[str]) -> bool:
    """What a text model leaves out of one of text and images, and the layers that only predict further tokens."""
    parts = ("vision", "multi_modal_projector", "image", "mtp")
    return all(any(part in name for part in parts) or ".layers.61." in name for name in names)


def _head_cure(names: list[str]) -> str | None:
    if names == ["lm_head.weight"]:
        return "if the head is the embedding, write tie_word_embeddings: true into config.json"
    return None


def _some(names: list[str]) -> str:
    more = f" and {len(names) - NAMES_TOLD} more" if len(names) > NAMES_TOLD else ""
    return ", ".join(names[:NAMES_TOLD]) + more


def prove_learning(rehearsal: Rehearsal, run: Path, twin: Path) -> None:
    """Between the checkpoint in the middle and the end every trainable tensor has changed."""
    half = run / "checkpoints" / f"step-{SAVED_AT:06d}"
    unchanged = set(_tensors(run / "adapter")) - set(_differing(half, run / "adapter"))
    # What VeRA draws is fixed; a token's row learns only where the token stands, perhaps not in so few rows.
    unchanged = {name for name in unchanged if not name.endswith(("vera_A", "vera_B", "trainable_tokens_delta"))}
    crossing = "cross_attention_layers" in (twin / "config.json").read_text(encoding="utf-8")
    # A layer that looks at an image learns nothing from rows without one.
    rehearsal.prove("adapter weights that learn nothing", len(unchanged), None if crossing else 0)
    if unchanged:
        rehearsal.notes.append(f"learn nothing: {_some(sorted(unchanged))}; leave them out of adapter.targets")


def _differing(one: Path, other: Path) -> list[str]:
    import torch

    ours, theirs = _tensors(one), _tensors(other)
    return [
        name
        for name in sorted(ours.keys() | theirs.keys())
        if name not in ours or name not in theirs or not torch.equal(ours[name], theirs[name])
    ]


def _tensors(folder: Path) -> dict[str, Any]:
    from safetensors.torch import load_file

    return load_file(folder / "adapter_model.safetensors")
