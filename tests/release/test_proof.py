"""Releases proven in one fresh process: whole ones pass, and every way we know to spoil one fails its proof."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from finetune.artifact import RunFolder, read_json, write_json
from finetune.base import read_base
from finetune.errors import StorageError
from finetune.release.compared import GREEDY_TOKENS, greedy_tokens
from finetune.release.fresh import Proof, prove_in_fresh_process
from finetune.release.proof import EXACT, ROUNDED, prove
from tests.release.runs import copy_release, describe_again, random_run, unproven_release

# Name of the run, how it is stored and trained, and what its release is merged onto.
WHOLE = {
    "lora, float32": ({"dtype": "float32", "adapter__method": "lora"}, "original"),
    "lora, bfloat16, tied": ({"dtype": "bfloat16", "tied": True, "adapter__method": "lora"}, "dequantized"),
    "rslora, float16": ({"dtype": "float16", "adapter__method": "rslora", "data__eval": None}, "original"),
    "dora, bfloat16": ({"dtype": "bfloat16", "adapter__method": "dora"}, "dequantized"),
    "two targets of an unquantised base": (
        {"dtype": "float32", "model__quantization": "none", "adapter__targets": ["q_proj", "down_proj"]},
        "original",
    ),
    "two targets of an 8-bit base, stored in float16, computed in bfloat16": (
        {"dtype": "float16", "model__dtype": "bfloat16", "model__quantization": "int8"}
        | {"adapter__targets": ["q_proj", "down_proj"]},
        "dequantized",
    ),
    "two targets, computed in bfloat16": (
        {"dtype": "float32", "model__dtype": "bfloat16", "adapter__targets": ["v_proj", "up_proj"]},
        "dequantized",
    ),
}
SPOILED_RUN = "lora, float32"


def change_weights(release: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> None:
    tensors = load_file(str(release / "model.safetensors"))
    change(tensors)
    save_file(tensors, str(release / "model.safetensors"), metadata={"format": "pt"})


def drop_a_tensor(release: Path, run: RunFolder) -> None:
    def drop(tensors: dict[str, torch.Tensor]) -> None:
        del tensors["model.norm.weight"]

    change_weights(release, drop)


def swap_two_tokens(release: Path, run: RunFolder) -> None:
    tokenizer = read_json(release / "tokenizer.json")
    vocabulary = tokenizer["model"]["vocab"]
    vocabulary["a"], vocabulary["e"] = vocabulary["e"], vocabulary["a"]
    write_json(release / "tokenizer.json", tokenizer)


# What is done to a whole release, and the proofs that must see it, manifest or not.
NOT_NEAREST = "tuned elements that are not the nearest value"
LOGITS = "logits against base + adapter"
RMS = "logits against base + adapter, root mean square"
DIVERGENCE = "divergence from base + adapter"
SPOILED: dict[Callable[[Path, RunFolder], None], set[str]] = {  # test_mutations.py has more
    drop_a_tensor: {"tensor names, shapes and dtypes"},
    swap_two_tokens: {"probes whose ids differ"},
}


@pytest.fixture(scope="module")
def proofs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Proof]]:
    """All proofs by case and name; one process proves every folder, so that the imports are paid once."""
    folder = tmp_path_factory.mktemp("proof")
    pairs = {}
    for number, (case, (settings, onto)) in enumerate(WHOLE.items()):
        run = random_run(folder / f"run{number}", **settings)
        pairs[case] = (unproven_release(folder / f"whole{number}", run, onto), run.path)
    whole, run_path = pairs[SPOILED_RUN]
    for spoil in SPOILED:
        release = copy_release(whole, folder / spoil.__name__)
        spoil(release, RunFolder(run_path))
        describe_again(release)
        pairs[spoil.__name__] = (release, run_path)
    truncated = copy_release(whole, folder / "truncated")
    (truncated / "model.safetensors").write_bytes((whole / "model.safetensors").read_bytes()[:-1])
    pairs["truncated"] = (truncated, run_path)
    alone = shutil.copytree(RunFolder(run_path).adapter, folder / "alone")
    pairs["an adapter without its run"] = (whole, alone)
    found = prove_in_fresh_process(list(pairs.values()))
    return {case: {proof.name: proof for proof in every} for case, every in zip(pairs, found, strict=True)}


@pytest.mark.parametrize("case", WHOLE)
def test_a_whole_release_passes_every_proof(proofs: dict[str, dict[str, Proof]], case: str) -> None:
    assert [found for found in proofs[case].values() if not found.passed] == []
    assert {"files", NOT_NEAREST, LOGITS, DIVERGENCE, RMS, "no-op", "greedy answers"} <= proofs[case].keys()
    assert {"loss of the release", "loss of the model as trained"} <= proofs[case].keys()
    assert proofs[case][DIVERGENCE].limit == 1e-3
    a_layer = {"float32": 7e-6, "bfloat16": 0.025, "float16": 0.003}
    assert proofs[case][RMS].limit == pytest.approx(2**0.5 * a_layer[WHOLE[case][0]["dtype"]])
    assert proofs[case][ROUNDED].limit == proofs[case][EXACT].limit == pytest.approx(2**0.5 * 7e-6, rel=0.5)
    assert proofs[case][ROUNDED].value == 0
    assert not any(name.startswith("experts") for name in proofs[case])


@pytest.mark.parametrize("spoil", SPOILED, ids=lambda spoil: spoil.__name__)
def test_a_spoiled_release_fails_its_proofs(
    proofs: dict[str, dict[str, Proof]], spoil: Callable[[Path, RunFolder], None]
) -> None:
    failed = {name for name, found in proofs[spoil.__name__].items() if not found.passed}
    assert failed >= SPOILED[spoil]


def test_without_held_out_rows_the_answers_to_the_probes_are_compared(proofs: dict[str, dict[str, Proof]]) -> None:
    found = proofs["an adapter without its run"]
    assert {name for name in found if name.startswith(("loss", "greedy"))} == {"greedy answers"}
    assert all(found[name].passed for name in (LOGITS, RMS, DIVERGENCE, "no-op", "greedy answers"))


@pytest.mark.parametrize("damage", ["truncated", "not finite"])
def test_a_damaged_adapter_is_told_as_one(tmp_path: Path, damage: str, capfd: pytest.CaptureFixture[str]) -> None:
    run = random_run(tmp_path, dtype="float32", model__quantization="none")
    release = unproven_release(tmp_path / "release", run, "original")
    file = run.adapter / "adapter_model.safetensors"
    if damage == "truncated":
        file.write_bytes(file.read_bytes()[:-9])
    else:
        tensors = load_file(str(file))
        next(iter(tensors.values()))[0, 0] = float("nan")
        save_file(tensors, str(file))
    with pytest.raises(StorageError) as caught:
        prove_in_fresh_process([(release, run.path)]) if damage == "truncated" else prove(release, run.path)
    assert str(run.adapter) in str(caught.value) or "lora" in str(caught.value)
    assert "Traceback" not in "".join(capfd.readouterr())


def test_how_many_tokens_are_answered_depends_on_the_bytes_of_the_base() -> None:
    facts = read_base("builtin:pocket-llama").facts
    assert greedy_tokens(facts) == GREEDY_TOKENS
    assert greedy_tokens(replace(facts, stored_bytes=6 * 10**9)) == 10
    assert greedy_tokens(replace(facts, stored_bytes=140 * 10**9)) == 4


def test_a_truncated_file_is_seen_before_anything_is_loaded(proofs: dict[str, dict[str, Proof]]) -> None:
    assert [(found.name, found.value, found.passed) for found in proofs["truncated"].values()] == [("files", 1, False)]


def test_a_rounded_release_is_as_far_as_rounding_and_no_farther(proofs: dict[str, dict[str, Proof]]) -> None:
    """The limit is not slack: a bfloat16 release uses a twentieth of it at least."""
    found = proofs["lora, bfloat16, tied"][LOGITS]
    assert found.limit is not None
    assert found.limit / 20 < found.value


def test_the_proofs_are_plain_json(proofs: dict[str, dict[str, Proof]]) -> None:
    found = [proof.to_json() for proof in proofs[SPOILED_RUN].values()]
    assert json.loads(json.dumps(found)) == found
    assert all(set(proof) == {"name", "value", "limit", "passed"} for proof in found)
