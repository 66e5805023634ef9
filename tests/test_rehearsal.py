"""The rehearsal: a small twin of the base goes through train, resume, merge and export before the base is loaded."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from benchmarks.families import OUTCOME, QUANTIZATIONS, rehearse_family
from finetune import rehearsal
from finetune.base import read_base
from finetune.cache import look_at_caches
from finetune.check import Checked, check
from finetune.errors import ProofError, UserError
from finetune.recipe import Recipe, load_recipe
from finetune.rehearsal import SAVED_AT, Rehearsed, left_out, rehearse, twin_recipe
from finetune.rehearse import Rehearsal, prove_learning, prove_names
from finetune.twin import make_twin, small_sizes
from tests.conftest import POCKET, alpaca_rows, make_tiny_base, write_recipe
from tests.test_families import CONFIGS, published_config

KINDS = sorted(CONFIGS)


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "finetune"


def published(kind: str) -> Any:
    return published_config(kind, AutoTokenizer.from_pretrained(POCKET))


@pytest.mark.parametrize("kind", KINDS)
def test_a_twin_keeps_what_matters(kind: str) -> None:
    """Counted on the published config itself: ratios of heads, ties, biases, both kinds of layers, experts."""
    config = published(kind).get_text_config()
    sizes = small_sizes(config)
    assert 2 <= sizes["num_hidden_layers"] <= 8
    assert sizes["hidden_size"] % 64 == sizes["intermediate_size"] % 64 == 0
    if "kv_lora_rank" not in sizes:
        groups = config.num_attention_heads // config.num_key_value_heads
        assert sizes["num_attention_heads"] // sizes["num_key_value_heads"] == groups
    kinds = getattr(config, "layer_types", None)
    if kinds:
        assert set(kinds[: sizes["num_hidden_layers"]]) == set(kinds)
    assert not {"tie_word_embeddings", "vocab_size", "attention_bias", "hidden_act"} & sizes.keys()
    small = type(config)(**{**config.to_dict(), **sizes})
    for key in ("tie_word_embeddings", "vocab_size", "hidden_act", "model_type"):
        assert getattr(small, key, None) == getattr(config, key, None)


def test_the_same_base_gives_the_same_twin(tmp_path: Path) -> None:
    for name in ("one", "two"):
        make_twin(POCKET, tmp_path / name, stored_dtype="BF16")
    one, two = ((tmp_path / name / "model.safetensors").read_bytes() for name in ("one", "two"))
    assert one == two
    facts, real = read_base(str(tmp_path / "one")).facts, read_base(str(POCKET)).facts
    assert (facts.stored_dtype, facts.vocabulary, facts.tied_embeddings) == ("BF16", real.vocabulary, True)
    assert {linear.leaf for linear in facts.linears} == {linear.leaf for linear in real.linears}
    assert facts.layers == 2 < real.layers
    assert (tmp_path / "one" / "tokenizer.json").read_bytes() == (POCKET / "tokenizer.json").read_bytes()


def test_a_twins_config_is_the_bases_own_but_for_its_sizes(tmp_path: Path) -> None:
    """Also keys in an old form, which transformers would write anew."""
    shutil.copytree(POCKET, tmp_path / "base")
    given = json.loads((POCKET / "config.json").read_text())
    del given["rope_parameters"], given["dtype"]
    given |= {"rope_theta": 10000.0, "rope_scaling": None, "torch_dtype": "bfloat16", "made_by": "somebody"}
    (tmp_path / "base" / "config.json").write_text(json.dumps(given))
    make_twin(tmp_path / "base", tmp_path / "twin", stored_dtype="BF16")
    twins = json.loads((tmp_path / "twin" / "config.json").read_text())
    sizes = {"num_hidden_layers", "num_attention_heads", "num_key_value_heads", "hidden_size", "intermediate_size"}
    assert {key for key in given if twins[key] != given[key]} <= sizes | {"head_dim"}
    assert twins.keys() - given.keys() <= {"layer_types"}


def test_the_twins_recipe_is_the_recipe_but_for_its_length(tmp_path: Path) -> None:
    recipe = load_recipe(
        write_recipe(
            tmp_path,
            POCKET,
            alpaca_rows(20),
            adapter__method="dora",
            train__schedule="linear",
            train__warmup=9,
            train__optimizer="adamw-8bit",
            data__eval=0.2,
            train__batch_size=64,
            data__loss_on="last-assistant",
            train__max_steps=400,
        )
    )
    file = tmp_path / "twin.json"
    file.write_text(json.dumps(twin_recipe(recipe, tmp_path / "work")))
    twin = load_recipe(file)
    changed = {key for key, value in twin.settings().items() if value != recipe.settings()[key]}
    assert changed == {
        "model.base", "data.train", "data.eval", "data.max_tokens", "data.too_long", "data.empty_answer", "data.drop",
        "train.max_steps", "train.batch_size", "train.warmup", "evaluate.every_steps", "output.folder",
        "output.save_every_steps",
    }  # fmt: skip
    assert twin.data.sources[0].rows == 32


def test_an_adapter_that_learns_nothing_is_seen(tmp_path: Path) -> None:
    for folder in (f"checkpoints/step-{SAVED_AT:06d}", "adapter"):
        (tmp_path / folder).mkdir(parents=True)
        save_file(
            {"a": torch.ones(2), "b": torch.full((2,), float(folder == "adapter"))},
            tmp_path / folder / "adapter_model.safetensors",
        )
    found = Rehearsal()
    prove_learning(found, tmp_path, POCKET)
    assert found.proofs == [{"name": "adapter weights that learn nothing", "value": 1, "limit": 0}]
    assert found.notes == ["learn nothing: a; leave them out of adapter.targets"]


def checked_with(recipe: Path, done: Rehearsed) -> Checked:
    return check(recipe, rehearse=lambda asked, base: done)


def test_a_failed_proof_ends_with_code_6_and_a_problem_with_code_2(tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path, POCKET, alpaca_rows(20), data__empty_answer="drop")
    proof = {"name": "merge: other tensors that changed", "value": 3, "limit": 0}
    error = checked_with(recipe, Rehearsed("done", {}, (proof,))).error()
    assert isinstance(error, ProofError)
    assert str(error) == "check: rehearsal: merge: other tensors that changed: 3, at most 0 is right"
    assert error.answer["proofs"][-1] == {**proof, "name": f"rehearsal: {proof['name']}", "passed": False}
    problem = rehearsal.Problem("rehearsal: merge", "no")
    error = checked_with(recipe, Rehearsed("failed", {}, (), (), (problem,))).error()
    assert isinstance(error, UserError)
    error = checked_with(recipe, Rehearsed("failed", {}, (), (), (problem,), proof_failed=True)).error()
    assert isinstance(error, ProofError)
    assert checked_with(recipe, left_out("why")).to_json()["rehearsal"] == {
        "state": "left out", "seconds": {}, "notes": ["why"]
    }  # fmt: skip


def test_what_is_wrong_already_is_not_rehearsed(tmp_path: Path) -> None:
    rows = [{**row, "output": " "} for row in alpaca_rows(3)]

    def never(recipe: Recipe, base: object) -> Rehearsed:
        raise AssertionError("rehearsed")

    checked = check(write_recipe(tmp_path, POCKET, rows), rehearse=never)
    assert checked.to_json()["rehearsal"]["state"] == "left out"


@pytest.mark.parametrize(
    ("program", "told"),
    [
        (
            "import os, signal; os.kill(os.getpid(), signal.SIGSEGV)",
            "the process ended with code -11: it gave no reason",
        ),
        ("raise RuntimeError('broken')", "the process ended with code 1: RuntimeError: broken"),
    ],
)
def test_a_crash_is_contained_and_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, own_cache: Path, program: str, told: str
) -> None:
    say = 'print(\'chatter\'); print(\'{"rehearsal": {"stage": "train"}}\', flush=True); '
    monkeypatch.setattr(rehearsal, "START", say + program)
    recipe = load_recipe(write_recipe(tmp_path, POCKET, alpaca_rows(5)))
    stages: list[str] = []
    done = rehearse(recipe, read_base(str(POCKET)), tell=stages.append)
    ((where, message),) = [(problem.where, problem.message) for problem in done.problems]
    assert where == "rehearsal: train"
    assert told in message
    assert stages == ["rehearsal on a twin: train (0 s)"]
    assert not (own_cache / "rehearsals").exists()


ANSWER = {"code": 0, "problems": [], "seconds": {"train": 1.0}, "proofs": [], "notes": []}


def test_it_is_found_again_until_something_it_depends_on_changes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    said = json.dumps({"rehearsal": {"answer": ANSWER}})
    monkeypatch.setattr(rehearsal, "START", f"print({said!r})")
    base = make_tiny_base(tmp_path / "base", dtype="float32")

    def state(**settings: Any) -> str:
        recipe = load_recipe(write_recipe(tmp_path, base, alpaca_rows(5), **settings))
        return rehearse(recipe, read_base(str(base))).state

    assert [state(), state()] == ["done", "found"]
    assert [state(adapter__rank=8), state(adapter__rank=8), state()] == ["done", "found", "found"]
    assert [state(data__template="vicuna"), state()] == ["done", "found"]
    assert [state(model__quantization="nf4"), state(train__optimizer="adamw-8bit"), state()] == ["done"] * 2 + ["found"]
    assert [state(train__max_steps=400), state(name="other")] == ["found", "done"]
    settings = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps({**settings, "rms_norm_eps": 1e-5}))
    assert state() == "done"
    monkeypatch.setattr(rehearsal, "_code_sha256", lambda: "other code")
    assert state() == "done"
    (cache,) = [cache for cache in look_at_caches() if cache.kind == "rehearsals"]
    assert cache.entries == 8


def test_only_the_rehearsal_reads_no_row_of_the_account(tmp_path: Path) -> None:
    done = Rehearsed("done", {"train": 1.0}, ({"name": "x", "value": 0, "limit": 0},))
    values = check(
        write_recipe(tmp_path, POCKET, alpaca_rows(5)), only="rehearsal", rehearse=lambda recipe, base: done
    ).to_json()
    assert values["rows"] is None
    assert [proof["name"] for proof in values["proofs"]] == ["rehearsal: x"]


def test_a_names_proof_agrees_with_transformers_own_loading(tmp_path: Path) -> None:
    """A weight under another name: transformers loads it all the same, and its numbers are random."""
    base = make_tiny_base(tmp_path / "base", dtype="float32")
    prove_names(Rehearsal(), base)
    name = "model.layers.1.mlp.down_proj.weight"
    tensors = load_file(base / "model.safetensors")
    tensors["model.layers.1.mlp.down.weight"] = tensors.pop(name)
    save_file(tensors, base / "model.safetensors", metadata={"format": "pt"})
    loaded = [dict(AutoModelForCausalLM.from_pretrained(base).named_parameters())[name] for _ in range(2)]
    assert not torch.equal(*loaded)
    with pytest.raises(UserError, match=f"the files hold no {name}, which would be random numbers"):
        prove_names(Rehearsal(), base)


@pytest.mark.parametrize("quantization", QUANTIZATIONS)
@pytest.mark.parametrize("kind", KINDS)
def test_every_family_is_rehearsed_as_docs_models_says(kind: str, quantization: str, tmp_path: Path) -> None:
    """What fails is told in docs/models.md, which is rendered from this file; a cure there is a better file here."""
    recorded = json.loads(OUTCOME.read_text())[kind][quantization]
    found = rehearse_family(kind, quantization, tmp_path)
    assert (found["state"], found["problems"]) == (recorded["state"], recorded["problems"])
