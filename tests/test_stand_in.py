"""A recipe is rehearsed although its base is not here: the stand-in against transformers' modules, real tokenizers'
control tokens, and the whole way to a proven release."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from benchmarks.families import _prove_in_this_process
from finetune.check import check
from finetune.check_unseen import unseen_model
from finetune.families import MODELS, Model, count_parameters, find_family, find_model
from finetune.recipe import load_recipe
from finetune.rehearsal import Rehearsed, rehearse, twin_recipe
from finetune.rehearse import carry_out
from finetune.shipped import ShippedRecipe, list_recipes
from finetune.stand_in import CLASSES, config_of, make_stand_in
from tests.conftest import POCKET, alpaca_rows, write_recipe

DISTINCT = list({(find_family(model.family).model_type, model.shape): model for model in MODELS}.values())
LLAMA = "meta-llama/Llama-3.2-1B"


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.mark.parametrize("model", DISTINCT, ids=lambda model: model.id)
def test_a_stand_ins_config_has_the_published_sizes(model: Model, tmp_path: Path) -> None:
    """Built by transformers on the meta device: as many parameters as the table counts, to the parameter."""
    ids = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": None}
    values = config_of(model, vocabulary=model.shape.vocabulary, ids=ids)
    (tmp_path / "config.json").write_text(json.dumps(values))
    config = transformers.AutoConfig.from_pretrained(tmp_path)
    with torch.device("meta"):
        modules: Any = getattr(transformers, CLASSES[config.model_type])(config)
    buffers = sum(value.numel() for name, value in modules.named_buffers() if name.endswith("e_score_correction_bias"))
    assert sum(parameter.numel() for parameter in modules.parameters()) + buffers == count_parameters(model.shape)


@pytest.mark.parametrize(
    "hub_id", [LLAMA, "meta-llama/Llama-3.1-8B-Instruct", "Qwen/Qwen3-8B", "mistralai/Mistral-7B-v0.3"]
)
def test_the_stand_ins_tokenizer_has_every_control_token_as_one(hub_id: str, tmp_path: Path) -> None:
    model = find_model(hub_id)
    assert model is not None
    template = "llama3" if hub_id == LLAMA else "auto"
    recipe = load_recipe(write_recipe(tmp_path, hub_id, alpaca_rows(4), data__template=template))
    base = make_stand_in(model, recipe, tmp_path / "base")
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "base")
    for token in find_family(model.family).stop_tokens:
        assert len(tokenizer.encode(token, add_special_tokens=False)) == 1
    assert tokenizer.eos_token == base.eos_token == find_family(model.family).stop_tokens[-1]
    config = json.loads((tmp_path / "base" / "config.json").read_text())
    assert config["vocab_size"] == len(tokenizer) + 64
    assert (base.chat_template is not None) == (hub_id in {"meta-llama/Llama-3.1-8B-Instruct", "Qwen/Qwen3-8B"})


def in_this_process(recipe: Path, folder: Path) -> dict[str, Any]:
    """`finetune check` without its processes, each of which imports torch anew."""
    answers = []

    def rehearsed(asked: Any, base: Any) -> Rehearsed:
        work = folder / "work"
        work.mkdir()
        (work / "recipe.json").write_text(json.dumps(twin_recipe(asked, work)))
        _prove_in_this_process()
        done = carry_out(work / "recipe.json", base.facts.folder, base.facts.stored_dtype, work)
        answers.append(done)
        return Rehearsed("done", {}, tuple(done["proofs"]), tuple(done["notes"]))

    checked = check(recipe, rehearse=rehearsed)
    assert checked.error() is None
    assert answers[0]["problems"] == []
    return checked.to_json()


def test_a_base_that_is_not_here_is_rehearsed_and_what_stood_in_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    slow = {"train__learning_rate": 1e-4, "adapter__rank": 64, "adapter__alpha": 16}  # as QLoRA's for 33B and 65B
    recipe = write_recipe(tmp_path, LLAMA, alpaca_rows(20), data__template="llama3", **slow)
    answer = in_this_process(recipe, tmp_path)
    assert len(answer["proofs"]) > 20
    assert all(proof["passed"] for proof in answer["proofs"])
    told = "\n".join(answer["rehearsal"]["notes"])
    for words in (f"{LLAMA} is not on this machine", "stand-ins: the tokenizer", f"finetune fetch {LLAMA}"):
        assert words in told


def test_what_is_wrong_with_the_recipe_is_told_without_the_base(tmp_path: Path) -> None:
    def never(recipe: Any, base: Any) -> Rehearsed:
        raise AssertionError("rehearsed")

    rows = [*alpaca_rows(3), {"instruction": "x", "output": " "}]
    error = check(write_recipe(tmp_path, LLAMA, rows), rehearse=never).error()
    assert error is not None
    assert [Path(problem.where).name for problem in error.problems] == ["rows.jsonl:4"]
    wrong = write_recipe(tmp_path, LLAMA, alpaca_rows(3), adapter__targets=["query_proj"])
    error = check(wrong, rehearse=never).error()
    assert error is not None
    assert "no linear module is called 'query_proj'" in str(error)


def test_only_a_base_of_the_table_that_cannot_be_had_has_a_stand_in(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def of(base: str | Path) -> Model | None:
        return unseen_model(load_recipe(write_recipe(tmp_path, base, alpaca_rows(2))))

    assert of(POCKET) is None
    assert of("someone/else") is None
    assert of(LLAMA) is not None
    monkeypatch.setattr("finetune.check_unseen.is_offline", lambda: False)
    assert of(LLAMA) is None  # it is fetched, and checked itself


@pytest.mark.soak
@pytest.mark.parametrize("shipped", list_recipes(), ids=lambda shipped: shipped.name)
def test_every_shipped_recipe_is_rehearsed_on_its_familys_twin(shipped: ShippedRecipe, tmp_path: Path) -> None:
    rows = tmp_path / "rows.jsonl"
    recipe = load_recipe(shipped.path)
    text = recipe.data.format == "text"
    rows.write_text("".join(json.dumps({"text": row["output"]} if text else row) + "\n" for row in alpaca_rows(40)))
    local = [f"data.train={rows}", f"data.eval={4 if recipe.data.eval else 'null'}"]
    local += [] if text else ["data.format=alpaca"]
    checked = check(shipped.path, local, rehearse=rehearse)
    assert checked.error() is None
    assert checked.to_json()["rehearsal"]["state"] == "done"
