"""Releases proven in one fresh process: whole ones pass, and every way we know to spoil one fails its proof."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from finetune.artifact import RunFolder, read_json, write_json
from finetune.release.delta import read_deltas
from finetune.release.fresh import Proof, prove_in_fresh_process
from finetune.release.source import read_source
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
    "two targets of an 8-bit base": (
        {"dtype": "bfloat16", "model__quantization": "int8", "adapter__targets": ["q_proj", "down_proj"]},
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


def leave_a_layer_out(release: Path, run: RunFolder) -> None:
    base = load_file(str(read_source(run.path).base.facts.folder / "model.safetensors"))
    layer = {name: tensor for name, tensor in base.items() if ".layers.1." in name}
    change_weights(release, lambda tensors: tensors.update(layer))


def merge_nothing(release: Path, run: RunFolder) -> None:
    base = load_file(str(read_source(run.path).base.facts.folder / "model.safetensors"))
    change_weights(release, lambda tensors: tensors.update(base))


def double_the_scale(release: Path, run: RunFolder) -> None:
    base = load_file(str(read_source(run.path).base.facts.folder / "model.safetensors"))

    def double(tensors: dict[str, torch.Tensor]) -> None:
        for name in read_deltas(run.adapter):
            tensors[name] += tensors[name] - base[name]

    change_weights(release, double)


def round_twice(release: Path, run: RunFolder) -> None:
    def round_again(tensors: dict[str, torch.Tensor]) -> None:
        for name in read_deltas(run.adapter):
            tensors[name] = tensors[name].bfloat16().float()

    change_weights(release, round_again)


def flip_a_bit(release: Path, run: RunFolder) -> None:
    def flip(tensors: dict[str, torch.Tensor]) -> None:
        tensors["model.norm.weight"].view(torch.int32)[7] ^= 1

    change_weights(release, flip)


def drop_a_tensor(release: Path, run: RunFolder) -> None:
    def drop(tensors: dict[str, torch.Tensor]) -> None:
        del tensors["model.norm.weight"]

    change_weights(release, drop)


def edit_the_template(release: Path, run: RunFolder) -> None:
    file = release / "chat_template.jinja"
    file.write_text(file.read_text().replace("### Response:", "### Answer:"))


def forget_the_stop_token(release: Path, run: RunFolder) -> None:
    config = read_json(release / "generation_config.json")
    write_json(release / "generation_config.json", config | {"eos_token_id": []})


def swap_two_tokens(release: Path, run: RunFolder) -> None:
    tokenizer = read_json(release / "tokenizer.json")
    vocabulary = tokenizer["model"]["vocab"]
    vocabulary["a"], vocabulary["e"] = vocabulary["e"], vocabulary["a"]
    write_json(release / "tokenizer.json", tokenizer)


# What is done to a whole release, and the proofs that must see it, manifest or not.
NOT_NEAREST = "tuned elements that are not the nearest value"
LOGITS = "logits against base + adapter"
SPOILED: dict[Callable[[Path, RunFolder], None], set[str]] = {
    leave_a_layer_out: {NOT_NEAREST, LOGITS},
    merge_nothing: {NOT_NEAREST, LOGITS, "no-op"},
    double_the_scale: {NOT_NEAREST, LOGITS, "no-op"},
    round_twice: {NOT_NEAREST, LOGITS},
    flip_a_bit: {"other tensors that changed"},
    drop_a_tensor: {"tensor names, shapes and dtypes"},
    edit_the_template: {"template differs", "probes whose rendering differs"},
    forget_the_stop_token: {"stop tokens that differ"},
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
    found = prove_in_fresh_process(list(pairs.values()))
    return {case: {proof.name: proof for proof in every} for case, every in zip(pairs, found, strict=True)}


@pytest.mark.parametrize("case", WHOLE)
def test_a_whole_release_passes_every_proof(proofs: dict[str, dict[str, Proof]], case: str) -> None:
    assert [found for found in proofs[case].values() if not found.passed] == []
    assert {"files", NOT_NEAREST, LOGITS, "no-op", "loss of the release", "greedy answers"} <= proofs[case].keys()


@pytest.mark.parametrize("spoil", SPOILED, ids=lambda spoil: spoil.__name__)
def test_a_spoiled_release_fails_its_proofs(
    proofs: dict[str, dict[str, Proof]], spoil: Callable[[Path, RunFolder], None]
) -> None:
    failed = {name for name, found in proofs[spoil.__name__].items() if not found.passed}
    assert failed >= SPOILED[spoil]


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
