"""Adapters become one by formulas that can be checked by hand; the difference of two models becomes an adapter."""

from __future__ import annotations

import contextlib
import importlib
import io
import json
import shutil
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from finetune.artifact import RunFolder, read_json, write_json
from finetune.cli import _runs_and_weights, main
from finetune.errors import ProofError, UserError
from finetune.release import algebra, extract_proof
from finetune.release import combined as combined_file
from finetune.release import extract as extract_file
from finetune.release import verify as verify_file
from finetune.release.algebra import Formula, combine, make_formula
from finetune.release.combined import merge_combined
from finetune.release.combined_proof import prove_combined
from finetune.release.extract import extract
from finetune.release.extract_proof import prove_extracted
from finetune.release.manifest import MANIFEST
from finetune.release.verify import verify
from tests.release.runs import copy_release, describe_again, random_run, unproven_release

pytestmark = pytest.mark.xdist_group("algebra")  # one worker makes the runs, not each
COMBINED_IN_FRESH_PROCESS = combined_file.prove_combined_in_fresh_process
EXTRACTED_IN_FRESH_PROCESS = extract_file.prove_extracted_in_fresh_process
DOWN = "model.layers.1.mlp.down_proj.weight"


@pytest.fixture(autouse=True)
def _no_fresh_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """The proofs without a process of their own, which takes seconds; the command-line tests have the real one."""
    for module in (combined_file, verify_file):
        monkeypatch.setattr(module, "prove_combined_in_fresh_process", prove_combined)
    for module in (extract_file, verify_file):
        monkeypatch.setattr(module, "prove_extracted_in_fresh_process", prove_extracted)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    return random_run(tmp_path_factory.mktemp("runs"), model__quantization="none", dtype="bfloat16")


@pytest.fixture(scope="module")
def other(run: RunFolder) -> RunFolder:
    """A second run on the same base, with other numbers and rank-stabilised."""
    copy = RunFolder(run.path.with_name("other"))
    shutil.copytree(run.path, copy.path)
    fill(copy, seed=5)
    config = read_json(copy.adapter / "adapter_config.json")
    write_json(copy.adapter / "adapter_config.json", config | {"use_rslora": True, "lora_alpha": 3})
    return copy


@pytest.fixture(scope="module")
def tuned(run: RunFolder) -> Path:
    """The run merged onto its base, which is stored in bfloat16."""
    return unproven_release(run.path.parent / "tuned", run, "original")


def fill(run: RunFolder, *, seed: int) -> None:
    file = run.adapter / "adapter_model.safetensors"
    generator = torch.Generator().manual_seed(seed)
    tensors = {
        name: 0.05 * torch.randn(found.shape, generator=generator) for name, found in load_file(str(file)).items()
    }
    save_file(tensors, str(file), metadata={"format": "pt"})


def stored(folder: Path) -> dict[str, np.ndarray[Any, Any]]:
    """The weights of a folder as float64."""
    return {name: found.double().numpy() for name, found in load_file(str(folder / "model.safetensors")).items()}


def delta_by_hand(run: RunFolder, module: str, scale: float) -> np.ndarray[Any, Any]:
    """scale * B @ A from the file itself."""
    tensors = load_file(str(run.adapter / "adapter_model.safetensors"))
    prefix = f"base_model.model.{module}"
    left, right = tensors[f"{prefix}.lora_B.weight"].double(), tensors[f"{prefix}.lora_A.weight"].double()
    return scale * (left.numpy() @ right.numpy())


def formula(method: str, *weights: float, **options: Any) -> Formula:
    return make_formula(len(weights), weights=weights, method=method, **({"density": None, "seed": None} | options))


def test_linear_is_the_sum_of_the_products_and_not_of_the_factors(
    run: RunFolder, other: RunFolder, tmp_path: Path
) -> None:
    done = merge_combined([run.path, other.path], formula("linear", 0.7, 0.3), out=tmp_path / "out")
    module = DOWN.removesuffix(".weight")
    # alpha / rank of the one, alpha / sqrt(rank) of the other
    wanted = stored(run.path.parent / "base")[DOWN] + 0.7 * delta_by_hand(run, module, 8 / 4)
    wanted += 0.3 * delta_by_hand(other, module, 3 / 2)
    nearest = torch.from_numpy(wanted).float().bfloat16().double().numpy()
    assert (stored(done.out)[DOWN] == nearest).all()
    manifest = read_json(done.out / MANIFEST)
    assert [(done.out / entry["path"]).resolve() for entry in manifest["combined"]["runs"]] == [run.path, other.path]
    assert [entry["weight"] for entry in manifest["combined"]["runs"]] == [0.7, 0.3]
    assert "linear of 0.7 x run + 0.3 x other" in (done.out / "README.md").read_text()
    assert verify(done.out).not_proven is None


def test_cat_as_an_adapter_is_what_peft_itself_makes_of_plain_lora(run: RunFolder, tmp_path: Path) -> None:
    second = RunFolder(tmp_path / "second")
    shutil.copytree(run.path, second.path)
    fill(second, seed=6)
    done = merge_combined([run.path, second.path], formula("cat", 0.7, 0.3), out=tmp_path / "out", form="adapter")
    base = AutoModelForCausalLM.from_pretrained(run.path.parent / "base", dtype=torch.float32)
    model = PeftModel.from_pretrained(base, str(run.adapter), adapter_name="one")
    model.load_adapter(str(second.adapter), adapter_name="two")
    model.add_weighted_adapter(["one", "two"], [0.7, 0.3], "both", combination_type="cat")
    model.load_adapter(str(done.out), adapter_name="ours")
    layer = model.get_submodule("base_model.model." + DOWN.removesuffix(".weight"))
    assert torch.allclose(layer.get_delta_weight("ours"), layer.get_delta_weight("both"), atol=1e-7)  # type: ignore[operator]
    assert model.peft_config["ours"].r == 8
    assert verify(done.out).not_proven is None


def test_ties_on_a_hand_worked_example() -> None:
    """Trim keeps two of three, the signs are elected by sums 1, -4 and 3, and only those who agree are averaged."""
    one, two = torch.tensor([[3.0, -4.0, 1.0]]).double(), torch.tensor([[-2.0, 0.5, 3.0]]).double()
    found = combine([one, two], Formula("ties", (1.0, 1.0), 2 / 3), "x")
    assert found.tolist() == [[3.0, -4.0, 3.0]]  # 3 outvotes -2; 0.5 and 1 were trimmed
    both = combine([one, torch.tensor([[5.0, -2.0, 0.0]]).double()], Formula("ties", (1.0, 1.0), 2 / 3), "x")
    assert both.tolist() == [[4.0, -3.0, 0.0]]
    weighted = combine([one, two], Formula("ties", (0.5, 2.0), 2 / 3), "x")
    assert weighted.tolist() == [[-4.0, -2.0, 6.0]]  # 0.5 * 3 against 2 * -2
    assert combine([one, -one], Formula("ties", (1.0, 1.0), 1.0), "x").tolist() == [[0.0, 0.0, 0.0]]


def test_dare_drops_the_share_rescales_the_rest_and_depends_on_seed_run_and_tensor() -> None:
    ones = torch.ones(100, 100, dtype=torch.float64)
    found = combine([ones], Formula("dare", (0.5,), 0.25, 3), "x")
    assert sorted(set(found.flatten().tolist())) == [0.0, 2.0]  # 0.5 * 1 / 0.25
    assert abs(float((found != 0).double().mean()) - 0.25) < 0.02  # four deviations: 4 * sqrt(0.25 * 0.75 / 10^4)
    assert torch.equal(found, combine([ones], Formula("dare", (0.5,), 0.25, 3), "x"))
    assert not torch.equal(found, combine([ones], Formula("dare", (0.5,), 0.25, 4), "x"))
    assert not torch.equal(found, combine([ones], Formula("dare", (0.5,), 0.25, 3), "y"))
    apart = combine([ones, -ones], Formula("dare", (0.5, 0.5), 0.25, 3), "x")
    assert apart.any()  # the same draws for both would cancel


@pytest.mark.parametrize("method", ["ties", "dare"])
def test_the_other_methods_are_published_and_verified(
    run: RunFolder, other: RunFolder, tmp_path: Path, method: str
) -> None:
    done = merge_combined([run.path, other.path], formula(method, 1, 0.5), out=tmp_path / "out")
    assert {found.name: found.value for found in done.proofs}["combined elements that are not the nearest value"] == 0
    assert verify(done.out).not_proven is None
    describe = read_json(done.out / MANIFEST)
    told = describe["combined"]["formula"]
    wrong = {"density": 0.9} if method == "ties" else {"seed": told["seed"] + 1}
    write_json(done.out / MANIFEST, describe | {"combined": describe["combined"] | {"formula": told | wrong}})
    with pytest.raises(ProofError, match="nearest value"):
        verify(done.out)


def trim_nothing(delta: torch.Tensor, density: float) -> torch.Tensor:
    return delta


def sum_of_factors(deltas: Any, formula: Formula, name: str) -> torch.Tensor:
    return sum(deltas) * formula.weights[0]


def without_rescaling(deltas: Any, formula: Formula, name: str) -> torch.Tensor:
    assert formula.density is not None
    return DARE(deltas, replace(formula, weights=tuple(weight * formula.density for weight in formula.weights)), name)


DARE = algebra.METHODS["dare"]


@pytest.mark.parametrize(
    ("method", "break_it"),
    [
        ("ties", lambda patch: patch.setattr(algebra, "_trim", trim_nothing)),
        ("linear", lambda patch: patch.setitem(algebra.METHODS, "linear", sum_of_factors)),
        ("dare", lambda patch: patch.setitem(algebra.METHODS, "dare", without_rescaling)),
    ],
)
def test_a_formula_that_is_wrong_publishes_nothing(
    run: RunFolder,
    other: RunFolder,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    method: str,
    break_it: Callable[[pytest.MonkeyPatch], None],
) -> None:
    break_it(monkeypatch)
    with pytest.raises(ProofError, match="nearest value"):
        merge_combined([run.path, other.path], formula(method, 0.6, 0.4), out=tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out.failed.json"]


def test_adapters_of_all_kinds_combine_and_a_tied_head_comes_loose(tmp_path: Path) -> None:
    """DoRA and trained rows by their deltas; what one run does to a tied embedding reaches the head it unties."""
    made = random_run(tmp_path / "a", model__quantization="none", tied=True, adapter__method="dora")
    folder = made.path.parent / "head"
    shutil.copytree(made.adapter, folder)
    base = stored(made.path.parent / "base")
    head, rows = torch.randn(base["model.embed_tokens.weight"].shape) * 0.1, torch.randn(2, 64) * 0.1
    config = read_json(folder / "adapter_config.json") | {"use_dora": False, "target_modules": ["q_proj"]}
    for name, more, tensors in (
        ("head", {"modules_to_save": ["lm_head"]}, {"base_model.model.lm_head.weight": head}),
        (
            "rows",
            {"trainable_token_indices": [3, 7]},
            {"base_model.model.model.embed_tokens.token_adapter.trainable_tokens_delta": rows},
        ),
    ):
        (tmp_path / name).mkdir()
        for file in folder.glob("*token*"):
            shutil.copyfile(file, tmp_path / name / file.name)
        shutil.copyfile(folder / "chat_template.jinja", tmp_path / name / "chat_template.jinja")
        write_json(tmp_path / name / "adapter_config.json", config | more)
        save_file(tensors, str(tmp_path / name / "adapter_model.safetensors"))
    done = merge_combined(
        [made.path, tmp_path / "head", tmp_path / "rows"], formula("linear", 1, 0.5, 0.25), out=tmp_path / "out"
    )
    with pytest.raises(UserError, match="only plain LoRAs become one adapter"):
        merge_combined([tmp_path / "head"], formula("cat", 1), out=tmp_path / "cat", form="adapter")
    with pytest.raises(UserError, match="DoRA"):
        merge_combined([made.path], formula("cat", 1), out=tmp_path / "cat", form="adapter")
    found, embedding = stored(done.out), base["model.embed_tokens.weight"]
    wanted = embedding + 0.5 * (head.double().numpy() - embedding)
    wanted[[3, 7]] += 0.25 * (rows.double().numpy() - embedding[[3, 7]])
    assert np.abs(found["lm_head.weight"] - wanted).max() < 1e-7
    alone = stored(unproven_release(tmp_path / "alone", made, "original"))
    assert np.array_equal(found[DOWN], alone[DOWN])  # only the first run changes it, with weight 1
    assert not np.array_equal(found[DOWN], base[DOWN])
    assert np.array_equal(np.delete(found["model.embed_tokens.weight"], [3, 7], 0), np.delete(embedding, [3, 7], 0))


def test_runs_that_do_not_fit_together_are_refused_by_both_names(run: RunFolder, tmp_path: Path) -> None:
    other = RunFolder(tmp_path / "other")
    shutil.copytree(run.path, other.path)
    template = other.adapter / "chat_template.jinja"
    template.write_text(template.read_text() + " ")
    tokenizer = read_json(other.adapter / "tokenizer.json")
    write_json(other.adapter / "tokenizer.json", tokenizer | {"normalizer": {"type": "Lowercase"}})
    plan = read_json(other.path / "plan.json")
    write_json(other.path / "plan.json", plan | {"stop_token_ids": [9]})
    with pytest.raises(UserError) as refused:
        merge_combined([run.path, other.path], formula("linear", 1, 1), out=tmp_path / "out")
    told = [str(problem) for problem in refused.value.problems]
    assert all(str(run.path) in line and str(other.path) in line for line in told)
    assert [line.split("the same ")[1].split(";")[0] for line in told] == ["chat template", "tokenizer", "stop tokens"]
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"weights": [1.0]}, "1 given for 2 runs"),
        ({"weights": [0.0, 0.0]}, "one that is not 0"),
        ({"weights": [float("nan"), 1.0]}, "finite numbers"),
        ({"method": "slerp"}, "write one of linear, cat, ties, dare"),
        ({"method": "ties", "density": 1.5}, "above 0, at most 1"),
        ({"method": "linear", "density": 0.5}, "drops nothing"),
        ({"method": "ties", "seed": 3}, "draws nothing"),
    ],
)
def test_a_formula_that_is_not_possible_is_refused(options: dict[str, Any], told: str) -> None:
    given: dict[str, Any] = {"weights": [0.5, 0.5], "method": None, "density": None, "seed": None, **options}
    with pytest.raises(UserError, match=told):
        make_formula(2, **given)


def test_what_cannot_be_written_is_refused(run: RunFolder, other: RunFolder, tmp_path: Path) -> None:
    both = [run.path, other.path]
    for method, options, told in (
        ("ties", {"form": "adapter"}, "no low rank"),
        ("linear", {"form": "gguf"}, "write one of weights, adapter"),
        ("linear", {"onto": "dequantized"}, "write --onto original"),
        ("cat", {"onto": "original", "form": "adapter"}, "nothing is merged"),
    ):
        with pytest.raises(UserError, match=told):
            merge_combined(both, formula(method, 1, 1), out=tmp_path / "out", **options)  # type: ignore[arg-type]


def test_weights_may_stand_apart_or_together(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "7").mkdir()  # a run may be called so
    assert _runs_and_weights(["a", "7", "0.3"], ["0.7"]) == ([Path("a"), Path("7")], [0.7, 0.3])
    assert _runs_and_weights(["a", "b"], ["0.7,-0.3"]) == ([Path("a"), Path("b")], [0.7, -0.3])
    with pytest.raises(UserError, match="'much' is no number"):
        _runs_and_weights(["a"], ["much"])


def test_full_rank_is_the_tuned_model_and_a_lower_one_the_best_there_is(
    run: RunFolder, tuned: Path, tmp_path: Path
) -> None:
    base = run.path.parent / "base"
    whole = extract(str(base), str(tuned), rank=1000, out=tmp_path / "whole")
    proofs = {found.name: found for found in whole.proofs}
    assert proofs["logits against the tuned model"].limit is not None
    assert whole.total_error < 1e-7
    cut = extract(str(base), str(tuned), rank=3, out=tmp_path / "cut")
    difference = stored(tuned)[DOWN] - stored(base)[DOWN]
    sizes = np.linalg.svd(difference, compute_uv=False)
    best = np.sqrt((sizes[3:] ** 2).sum() / (sizes**2).sum())
    assert cut.errors[DOWN.removesuffix(".weight")] == pytest.approx(best, rel=1e-6)
    loaded = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), str(cut.out))
    delta = loaded.get_submodule("base_model.model." + DOWN.removesuffix(".weight")).get_delta_weight("default")  # type: ignore[operator]
    missed = np.linalg.norm(difference - delta.detach().double().numpy())
    assert missed / np.linalg.norm(difference) == pytest.approx(best, rel=1e-5)
    assert verify(cut.out).not_proven is None
    weights = copy_release(cut.out, tmp_path / "worse") / "adapter_model.safetensors"
    tensors = load_file(str(weights))
    name = f"base_model.model.{DOWN.removesuffix('.weight')}.lora_B.weight"
    save_file(tensors | {name: tensors[name] * 1.02}, str(weights), metadata={"format": "pt"})
    describe_again(weights.parent)
    with pytest.raises(ProofError, match="beyond the smallest of the rank"):
        verify(weights.parent)


def test_what_is_no_linear_is_refused_or_named(run: RunFolder, tuned: Path, tmp_path: Path) -> None:
    base, other = run.path.parent / "base", copy_release(tuned, tmp_path / "tuned")
    (other / MANIFEST).unlink()
    tensors = load_file(str(other / "model.safetensors"))
    tensors["model.norm.weight"] += 1
    tensors["model.embed_tokens.weight"][5] += 1
    save_file(tensors, str(other / "model.safetensors"), metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"model.embed_tokens.weight, model.norm.weight; .* --linears-only"):
        extract(str(base), str(other), rank=2, out=tmp_path / "out")
    done = extract(str(base), str(other), rank=2, out=tmp_path / "out", linears_only=True)
    assert sorted(done.left_out) == ["model.embed_tokens.weight", "model.norm.weight"]
    assert any("not in the adapter" in note for note in done.notes)
    manifest = read_json(done.out / MANIFEST)
    write_json(done.out / MANIFEST, manifest | {"extracted": manifest["extracted"] | {"left_out": []}})
    with pytest.raises(ProofError, match="neither in the adapter nor named"):
        verify(done.out)


def test_two_models_that_have_nothing_to_extract_are_refused(run: RunFolder, tmp_path: Path) -> None:
    base = run.path.parent / "base"
    with pytest.raises(UserError, match="no linear differs"):
        extract(str(base), str(base), rank=2, out=tmp_path / "out")
    with pytest.raises(UserError, match="is an adapter already"):
        extract(str(base), str(run.path), rank=2, out=tmp_path / "out")
    smaller = Path(shutil.copytree(base, tmp_path / "smaller"))
    tensors = load_file(str(smaller / "model.safetensors"))
    del tensors["model.layers.0.input_layernorm.weight"]
    save_file(tensors, str(smaller / "model.safetensors"), metadata={"format": "pt"})
    with pytest.raises(UserError, match="only the base holds it"):
        extract(str(base), str(smaller), rank=2, out=tmp_path / "out")


def test_the_smallest_error_is_that_of_the_decomposition() -> None:
    matrix = np.random.default_rng(0).normal(size=(9, 14))
    sizes = np.linalg.svd(matrix, compute_uv=False)
    assert extract_proof.smallest_error(matrix, 4) == pytest.approx(np.sqrt((sizes[4:] ** 2).sum()))
    assert extract_proof.smallest_error(matrix.T, 9) == 0


def answer_here(module: str, arguments: list[str]) -> Any:
    """What the proving process prints, without the seconds that a process takes to import everything."""
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(io.StringIO()) as printed:
        patch.setattr(sys, "argv", [module, *arguments])
        importlib.import_module(module).main()
    return json.loads(printed.getvalue())


@pytest.mark.parametrize("fresh", [False, pytest.param(True, marks=pytest.mark.soak)])
def test_the_commands_answer_in_json(  # noqa: PLR0913  fixtures
    run: RunFolder,
    other: RunFolder,
    tuned: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    *,
    fresh: bool,
) -> None:
    monkeypatch.setattr(combined_file, "prove_combined_in_fresh_process", COMBINED_IN_FRESH_PROCESS)
    monkeypatch.setattr(extract_file, "prove_extracted_in_fresh_process", EXTRACTED_IN_FRESH_PROCESS)
    for module in () if fresh else (combined_file, extract_file):
        monkeypatch.setattr(module, "answer_of", answer_here)
    commands = (
        ["merge", str(run.path), str(other.path), "--weights", "0.7", "0.3", "--method", "ties"],
        ["extract", str(run.path.parent / "base"), str(tuned), "--rank", "2"],
    )
    for number, command in enumerate(commands):
        monkeypatch.setattr(sys, "argv", ["finetune", *command, "--out", str(tmp_path / str(number)), "--json"])
        with pytest.raises(SystemExit) as end:
            main()
        assert not end.value.code
        answer = json.loads(capsys.readouterr().out)
        assert {"out", "proofs", "files", "notes"} <= answer.keys()
        assert all(found["passed"] for found in answer["proofs"])
