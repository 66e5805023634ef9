"""Every adapter method on every kind of base: starts at the base, has the parameters of its formula, learns, is saved,
goes on as if it had not stopped, and is merged with proof."""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, MixtralConfig
from transformers.models.llama4 import Llama4TextConfig

from finetune.artifact import RunFolder
from finetune.errors import UserError
from finetune.model.adapter import attach_adapter, stored_tensors
from finetune.model.load import load_base
from finetune.plan import Plan
from finetune.recipe import load_recipe
from finetune.release.proof import prove
from finetune.resolve import resolve
from finetune.run import run
from tests.conftest import alpaca_rows, make_tiny_base, write_recipe
from tests.release.runs import unproven_release
from tests.release.test_merge_kinds import LLAMA4, MIXTRAL, Kind, make_base

# The tiny base, written out: (outputs, inputs) of the linears of each of its two layers.
ATTENTION = {"q_proj": (64, 64), "k_proj": (32, 64), "v_proj": (32, 64), "o_proj": (64, 64)}
MLP = {"gate_proj": (128, 64), "up_proj": (128, 64), "down_proj": (64, 128)}
LINEARS = ATTENTION | MLP
HIDDEN, VOCABULARY = 64, 3072


def low_rank(rank: int, linears: dict[str, tuple[int, int]] = LINEARS, layers: int = 2) -> int:
    return layers * sum(rank * (outputs + inputs) for outputs, inputs in linears.values())


@dataclass(frozen=True)
class Case:
    """An adapter section, its trainable parameters on the tiny base, and the largest difference of a logit at step 0.

    The difference is in standard deviations of the logits: 0 is the base, bit for bit.
    """

    section: dict[str, Any]
    parameters: int
    start_error: float = 0.0
    held: int = 0  # parameters beside these that are saved, and do not change
    quantization: str | None = "nf4"  # of the base that the suite trains on; soak has the other one, too
    more: dict[str, Any] = field(default_factory=dict)


LORA = {"rank": 4, "alpha": 8}
ROUNDING = 1e-5
CASES = {
    "lora": Case(LORA, low_rank(4), quantization="none"),
    "rslora": Case({**LORA, "method": "rslora"}, low_rank(4), quantization=None),
    "dora": Case({**LORA, "method": "dora"}, low_rank(4) + 2 * sum(outputs for outputs, _ in LINEARS.values())),
    "dropout": Case({**LORA, "dropout": 0.2}, low_rank(4), quantization=None),
    "attention": Case({**LORA, "targets": "attention"}, low_rank(4, ATTENTION), quantization=None),
    "patterns": Case(
        {
            **LORA,
            "targets": ["mlp", "q_proj"],
            "layers": "1-1",
            "rank_by": {"down_proj": 2},
            "alpha_by": {"layers.1.self_attn.q_proj": 3},
        },
        low_rank(4, {name: LINEARS[name] for name in ("q_proj", "gate_proj", "up_proj")}, 1)
        + low_rank(2, {"down_proj": LINEARS["down_proj"]}, 1),
    ),
    "lora+": Case({**LORA, "learning_rate_ratio": 16}, low_rank(4), more={"train__weight_decay": 0.1}),
    "pissa": Case({**LORA, "start": "pissa"}, low_rank(4), ROUNDING, held=low_rank(4)),
    "olora": Case(
        {**LORA, "start": "olora", "rank_by": {"k_proj": 3}, "dropout": 0.1},
        low_rank(4) - low_rank(1, {"k_proj": LINEARS["k_proj"]}),
        ROUNDING,
        held=low_rank(4) - low_rank(1, {"k_proj": LINEARS["k_proj"]}),
        quantization="none",
    ),
    # Outputs are scaled, of the mlp's second linear the inputs.
    "ia3": Case({"method": "ia3"}, 2 * (64 + 32 + 32 + 64 + 128 + 128 + 128)),
    "ia3, one layer": Case(
        {"method": "ia3", "layers": [1], "targets": ["k_proj", "down_proj"]}, 32 + 128, quantization=None
    ),
    "vera": Case({"method": "vera", "rank": 8}, 2 * sum(8 + out for out, _ in LINEARS.values()), held=8 * (128 + 128)),
    # Blocks of n inputs are turned by n (n - 1) / 2 angles each.
    "oft": Case(
        {"method": "oft", "block_size": 16, "layers": [0]},
        sum(inputs // 16 * (16 * 15 // 2) for _, inputs in LINEARS.values()),
        quantization="none",
    ),
    "tokens": Case({**LORA, "train_tokens": ["</s>", "Ġsmall", "Ġpear"]}, low_rank(4) + 3 * 2 * HIDDEN),
    "whole": Case(
        {**LORA, "also_train": ["lm_head", "embed_tokens"]}, low_rank(4) + 2 * VOCABULARY * HIDDEN, quantization="none"
    ),
}
BOTH = [(name, quantization) for name in CASES for quantization in ("none", "nf4")]
IN_SUITE = [
    pytest.param(name, kind, marks=[] if CASES[name].quantization == kind else [pytest.mark.soak])
    for name, kind in BOTH
]


def recipe_for(folder: Path, base: Path, section: dict[str, Any], quantization: str, **more: Any) -> Path:
    """A recipe whose adapter section is this one alone."""
    settings = {"model__quantization": quantization, "data__eval": 2, **more}
    recipe = write_recipe(folder, base, alpaca_rows(8), **settings)
    values = json.loads(recipe.read_text())
    values["adapter"] = section
    values["train"] |= {"max_steps": 3, "batch_size": 2, "warmup": 0, "tokens_per_pass": 64}
    values["output"] |= {"save_every_steps": 2}
    recipe.write_text(json.dumps(values))
    return recipe


def attached(plan: Plan) -> tuple[Any, Any]:
    """The base as it is loaded, and once more with the adapter."""
    return load_base(plan.model), attach_adapter(load_base(plan.model), plan.adapter, base="x")


def probe(plan: Plan) -> torch.Tensor:
    return torch.tensor([[5, 9, 60, 61, 62, 400, 401, *plan.adapter.token_ids, 7, 8]])


def logits(model: Any, ids: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(input_ids=ids, use_cache=False).logits


def gradients(model: Any, ids: torch.Tensor) -> dict[str, torch.Tensor]:
    for parameter in model.parameters():
        parameter.grad = None
    model.train()(input_ids=ids, labels=ids, use_cache=False).loss.backward()
    return {name: p.grad for name, p in model.named_parameters() if p.requires_grad}


def descend(model: Any, along: dict[str, torch.Tensor], rate: float) -> None:
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            parameter.data -= rate * along[name]


@pytest.mark.parametrize(("name", "quantization"), BOTH)
def test_step_0_is_the_base_the_parameters_are_the_formulas_and_all_of_them_learn(
    tiny_base: Path, tmp_path: Path, name: str, quantization: str
) -> None:
    case = CASES[name]
    plan = resolve(recipe_for(tmp_path, tiny_base, case.section, quantization, **case.more)).plan
    base, tuned = attached(plan)
    ids = probe(plan)
    expected = logits(base, ids)
    difference = (logits(tuned, ids) - expected).abs().max() / expected.std()
    assert difference <= case.start_error
    trained = sum(p.numel() for p in tuned.parameters() if p.requires_grad)
    assert plan.trainable_parameters == case.parameters
    assert sum(tensor.numel() for tensor in stored_tensors(tuned).values()) == case.parameters + case.held
    assert trained == case.parameters + (case.held if "start" in case.section else 0)
    first = gradients(tuned, ids)  # half of these are zero: B starts there
    assert all(p.dtype == torch.float32 for p in tuned.parameters() if p.requires_grad)
    descend(tuned, first, 0.1)
    assert [key for key, gradient in gradients(tuned, ids).items() if not gradient.any()] == []


@pytest.mark.parametrize(("name", "quantization"), IN_SUITE)
def test_what_was_trained_is_saved_goes_on_bit_by_bit_and_is_merged_with_proof(
    tiny_base: Path, tmp_path: Path, name: str, quantization: str
) -> None:
    case = CASES[name]
    recipe = recipe_for(tmp_path, tiny_base, case.section, quantization, **case.more)
    goes_on_and_is_proven(recipe, "original" if quantization == "none" else "dequantized")


def goes_on_and_is_proven(recipe: Path, onto: str) -> RunFolder:
    """Train, stop after step 2 and go on, merge and prove; the finished run comes back."""
    finished = run(recipe)
    weights = finished.adapter / "adapter_model.safetensors"
    config = (finished.adapter / "adapter_config.json").read_text()
    before = load_file(str(weights))
    stop_after_step_2(finished)
    assert run(recipe, resume=True).is_finished
    after = load_file(str(weights))
    assert before.keys() == after.keys()
    assert [key for key in before if not torch.equal(before[key], after[key])] == []
    assert (finished.adapter / "adapter_config.json").read_text() == config

    found = prove(unproven_release(finished.path.parent / "release", finished, onto), finished.path)
    assert [proof for proof in found if not proof.passed] == []
    assert {"no-op", "logits against base + adapter"} <= {proof.name for proof in found}
    return finished


def stop_after_step_2(finished: RunFolder) -> None:
    """The folder as a run leaves it that stopped after its first checkpoint."""
    (finished.path / "result.json").unlink()
    shutil.rmtree(finished.adapter)
    shutil.rmtree(finished.path / "checkpoints" / "step-000003")


# --- experts ---

ATTENTION_OF_MOE = {"q_proj": (32, 32), "k_proj": (16, 32), "v_proj": (16, 32), "o_proj": (32, 32)}
EXPERTS: dict[str, tuple[Kind, dict[str, Any], int]] = {
    "mixtral": (
        Kind({}, MIXTRAL, MixtralConfig, dtype="float32"),
        {"targets": "experts", "layers": [1], "rank_by": {"experts.down_proj": 2}},
        4 * (4 * (96 + 32) + 2 * (32 + 48)),
    ),
    "llama4": (
        Kind({}, LLAMA4, Llama4TextConfig, dtype="float32"),
        {"targets": ["attention", "experts"]},
        2 * 4 * 4 * (96 + 32 + 32 + 48) + low_rank(4, ATTENTION_OF_MOE),
    ),
}


@pytest.mark.parametrize("name", EXPERTS)
def test_experts_are_trained_merged_and_proven(tmp_path: Path, name: str) -> None:
    kind, section, parameters = EXPERTS[name]
    recipe = recipe_for(tmp_path, make_base(tmp_path / "base", kind), LORA | section, "none")
    plan = resolve(recipe).plan
    base, tuned = attached(plan)
    ids = probe(plan)
    assert torch.equal(logits(base, ids), logits(tuned, ids))
    assert plan.trainable_parameters == sum(p.numel() for p in tuned.parameters() if p.requires_grad) == parameters
    goes_on_and_is_proven(recipe, "original")


def test_no_router_is_a_target(tmp_path: Path) -> None:
    for name, (kind, _, _) in EXPERTS.items():
        base = make_base(tmp_path / name, kind)
        resolved = resolve(recipe_for(tmp_path / f"{name}-run", base, LORA, "none"))
        plan = resolved.plan
        assert {linear.leaf for linear in resolved.base.facts.linears}.isdisjoint({"gate", "router"})
        assert not {"gate", "router"} & set(plan.adapter.targets)
        tuned = attached(plan)[1]
        adapted = {key.split(".lora_")[0].rpartition(".")[2] for key in stored_tensors(tuned)}
        assert adapted == set(plan.adapter.targets) >= set(ATTENTION_OF_MOE)
        assert gradients(tuned, probe(plan))
        refused = recipe_for(tmp_path / f"{name}-refused", base, LORA | {"targets": ["router", "gate"]}, "none")
        with pytest.raises(UserError, match=r"no linear module is called 'router'.*\n.*no linear module .* 'gate'"):
            resolve(refused)


# --- starts from the base ---


@pytest.mark.parametrize("start", ["pissa", "olora"])
def test_a_start_from_the_base_trains_what_pefts_own_does_and_leaves_the_base_alone(
    tiny_base: Path, tmp_path: Path, start: str
) -> None:
    """PEFT takes the start out of the weights; we hold it beside them. Steps of plain gradient descent are the same."""
    plan = resolve(recipe_for(tmp_path, tiny_base, LORA | {"start": start}, "none")).plan
    ours = attached(plan)[1]
    config = LoraConfig(r=4, lora_alpha=8, target_modules=list(LINEARS), init_lora_weights=start)
    theirs = get_peft_model(AutoModelForCausalLM.from_pretrained(tiny_base, dtype=torch.float32), config)
    ids = probe(plan)
    plain = logits(AutoModelForCausalLM.from_pretrained(tiny_base, dtype=torch.float32), ids)
    weights = {key: p.clone() for key, p in ours.named_parameters() if not p.requires_grad}
    for model in (ours, theirs):
        for _ in range(3):
            descend(model, gradients(model, ids), 0.02)
    one, other = logits(ours, ids), logits(theirs, ids)
    assert (one - plain).abs().max() > 0.1 * plain.std()
    assert (one - other).abs().max() < 1e-3 * plain.std()
    assert all(torch.equal(p, weights[key]) for key, p in ours.named_parameters() if not p.requires_grad)


def test_pissa_starts_at_the_nearest_matrix_of_the_rank(tiny_base: Path, tmp_path: Path) -> None:
    """Eckart and Young: what is left has the norm of the singular values that were not taken."""
    section = LORA | {"start": "pissa", "targets": ["q_proj"], "rank": 6}
    tuned = attached(resolve(recipe_for(tmp_path, tiny_base, section, "none")).plan)[1]
    layer = tuned.base_model.model.model.layers[1].self_attn.q_proj
    weight = layer.base_layer.weight.double()
    a, b = (getattr(layer, name)["default"].weight.detach().double() for name in ("lora_A", "lora_B"))
    taken = (8 / 6) * b[:, :6] @ a[:6]
    missed = (weight - taken).norm().item()
    assert missed == pytest.approx(torch.linalg.svdvals(weight)[6:].norm().item(), rel=1e-4)
    assert torch.equal(a[6:], a[:6])
    assert torch.equal(b[:, 6:], -b[:, :6])


def test_the_held_half_is_saved_as_it_started(tiny_base: Path, tmp_path: Path) -> None:
    recipe = recipe_for(tmp_path, tiny_base, LORA | {"start": "pissa"}, "nf4")
    plan = resolve(recipe).plan
    before = stored_tensors(attached(plan)[1])
    after = load_file(str(run(recipe).adapter / "adapter_model.safetensors"))
    for key, values in after.items():
        dim = 0 if "lora_A" in key else 1
        half = values.shape[dim] // 2
        assert torch.equal(values.narrow(dim, half, half), before[key].narrow(dim, half, half))
        assert not torch.equal(values.narrow(dim, 0, half), before[key].narrow(dim, 0, half))
    config = json.loads((tmp_path / "run" / "adapter" / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"], config["init_lora_weights"]) == (8, 16, True)


# --- rates and precision ---


@pytest.mark.parametrize("optimizer", ["adamw", "adamw-8bit"])
def test_b_learns_as_much_faster_as_asked(tiny_base: Path, tmp_path: Path, optimizer: str) -> None:
    """The first step of Adam is the learning rate in the direction of the gradient's sign; A has no gradient then."""
    found = {}
    for ratio in (1.0, 16.0):
        recipe = recipe_for(tmp_path / str(ratio), tiny_base, LORA | {"learning_rate_ratio": ratio}, "none")
        values = json.loads(recipe.read_text())
        values["train"] |= {"max_steps": 1, "learning_rate": 1e-4, "schedule": "constant", "optimizer": optimizer}
        recipe.write_text(json.dumps(values))
        weights = load_file(str(run(recipe).adapter / "adapter_model.safetensors"))
        found[ratio] = max(value.abs().max().item() for key, value in weights.items() if "lora_B" in key)
    assert found[1.0] == pytest.approx(1e-4, rel=0.01)
    assert found[16.0] == pytest.approx(16e-4, rel=0.01)


def test_what_is_trained_whole_starts_as_the_base_stores_it_also_in_4_bit(tiny_base: Path, tmp_path: Path) -> None:
    recipe = recipe_for(tmp_path, tiny_base, LORA | {"also_train": ["lm_head"]}, "nf4")
    values = json.loads(recipe.read_text())
    values["train"] |= {"max_steps": 1, "learning_rate": 1e-30, "schedule": "constant"}  # nothing moves
    recipe.write_text(json.dumps(values))
    trained = load_file(str(run(recipe).adapter / "adapter_model.safetensors"))["base_model.model.lm_head.weight"]
    assert torch.equal(trained, load_file(str(tiny_base / "model.safetensors"))["lm_head.weight"])


def test_a_tied_head_and_embedding_are_trained_as_one(tmp_path: Path) -> None:
    base = make_tiny_base(tmp_path / "base", dtype="float32", tied=True)
    for also in (["lm_head"], ["embed_tokens", "lm_head"]):
        plan = resolve(recipe_for(tmp_path / "-".join(also), base, LORA | {"also_train": also}, "none")).plan
        tuned = attached(plan)[1]
        assert plan.trainable_parameters == sum(p.numel() for p in tuned.parameters() if p.requires_grad)
        assert plan.trainable_parameters == low_rank(4) + VOCABULARY * HIDDEN
    finished = goes_on_and_is_proven(tmp_path / "lm_head" / "recipe.json", "original")
    config = json.loads((finished.path.parent / "release" / "config.json").read_text())
    assert config["tie_word_embeddings"] is True


# --- what is refused ---

REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "prefix": ({"method": "prefix-tuning"}, "adapter.method: prefix-tuning trains virtual tokens"),
    "prompt": ({"method": "prompt"}, "nothing can be merged into a base"),
    "p-tuning": ({"method": "p-tuning"}, "only the first would see them"),
    "boft": ({"method": "boft"}, "would train another adapter on another machine"),
    "another": ({"method": "lokr"}, "must be lora, rslora, dora, ia3, vera or oft, got 'lokr'"),
    "eva": ({"start": "eva"}, "adapter.start: eva needs a pass over the data"),
    "loftq": ({"start": "loftq"}, "step 0 would not be the base"),
    "lora_ga": ({"start": "lora_ga"}, "it would start as the plain one"),
    "corda": ({"start": "corda"}, "covariances"),
    "rank of ia3": ({"method": "ia3", "rank": 4}, "adapter.rank: is no key of ia3, only of lora, rslora, dora, vera"),
    "start of dora": ({"method": "dora", "start": "pissa"}, "adapter.start: is no key of dora, only of lora; remove"),
    "no experts": ({"targets": "experts"}, "the base has no experts"),
    "dora of experts": ({"method": "dora", "targets": ["experts"]}, "dora cannot adapt experts"),
    "dropout of experts": ({"targets": ["experts"], "dropout": 0.1}, "adapter.dropout: has no effect on experts"),
    "a layer too many": ({"layers": [0, 2]}, "has the layers 0 to 1, got 2"),
    "layers backwards": ({"layers": "1-0"}, "the first layer is behind the last"),
    "a pattern without target": ({"rank_by": {"x_proj": 2}}, "adapter.rank_by: 'x_proj' fits no target"),
    "a pattern outside the layers": ({"layers": [0], "alpha_by": {"layers.1.mlp.up_proj": 2}}, "fits no target"),
    "a broken pattern": ({"rank_by": {"q_proj(": 2}}, "fits no target"),
    "two patterns": ({"rank_by": {"q_proj": 2, "layers.0.*proj": 3}}, "both fit model.layers.0.self_attn.q_proj"),
    "start and from": ({"start": "pissa", "from": "x"}, "adapter.start: has no effect beside adapter.from"),
    "too many directions": ({"start": "olora", "rank": 33}, "which has 32"),
    "odd blocks": ({"method": "oft", "block_size": 48}, "48 does not divide the inputs of"),
    "no such token": ({"train_tokens": ["<nope>"]}, "the tokenizer has no token '<nope>'"),
    "rows twice": ({"train_tokens": ["a"], "also_train": ["lm_head"]}, "stands beside adapter.also_train"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_would_not_be_what_was_asked_is_refused_with_the_reason(
    tiny_base: Path, tmp_path: Path, case: str
) -> None:
    section, words = REFUSED[case]
    with pytest.raises(UserError) as caught:
        resolve(recipe_for(tmp_path, tiny_base, section, "nf4"))
    assert caught.value.code == 2
    assert words in str(caught.value)


def test_weight_decay_would_wear_down_what_is_held(tiny_base: Path, tmp_path: Path) -> None:
    recipe = recipe_for(tmp_path, tiny_base, LORA | {"start": "pissa"}, "none", train__weight_decay=0.1)
    with pytest.raises(UserError, match=r"train\.weight_decay: would wear down the part that pissa holds fixed"):
        resolve(recipe)


@pytest.fixture(scope="module")
def earlier(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The adapter of a run of one step."""
    folder = tmp_path_factory.mktemp("earlier")
    recipe = recipe_for(folder, tiny_base, LORA, "none")
    return run(recipe, ["train.max_steps=1"]).adapter


def test_an_adapter_to_start_from_is_taken_as_it_is(tiny_base: Path, tmp_path: Path, earlier: Path) -> None:
    tuned = attached(resolve(recipe_for(tmp_path, tiny_base, LORA | {"from": str(earlier)}, "none")).plan)[1]
    saved = load_file(str(earlier / "adapter_model.safetensors"))
    assert all(torch.equal(values, saved[key]) for key, values in stored_tensors(tuned).items())


@pytest.mark.parametrize(
    "change",
    [{"rank": 8}, {"alpha": 9}, {"targets": "mlp"}, {"layers": [0]}, {"rank_by": {"q_proj": 2}}, {"method": "dora"}],
    ids=str,
)
def test_an_adapter_of_another_shape_is_no_start(
    tiny_base: Path, tmp_path: Path, earlier: Path, change: dict[str, Any]
) -> None:
    other = recipe_for(tmp_path, tiny_base, LORA | change | {"from": str(earlier)}, "none")
    with pytest.raises(UserError, match=r"adapter\.from: .* has .*, the recipe asks for"):
        attached(resolve(other).plan)


def test_a_section_for_a_small_twin_names_no_layer_and_fits_it(tiny_base: Path, tmp_path: Path) -> None:
    """The rehearsal of `finetune check` trains two layers of a small width, whatever the base has."""
    section = {
        "rank": 512,
        "start": "pissa",
        "layers": "20-31",
        "rank_by": {"layers.30.mlp.up_proj": 9, "down_proj": 300},
        "alpha_by": {"k_proj": 3},
        "from": "x",
    }
    recipe = load_recipe(recipe_for(tmp_path, tiny_base, section, "none"))
    small = recipe.adapter.for_a_twin()
    assert small == {"rank": 8, "start": "pissa", "rank_by": {"down_proj": 8}, "alpha_by": {"k_proj": 3}}
    assert resolve(recipe_for(tmp_path / "twin", tiny_base, small, "none")).plan.trainable_parameters == low_rank(8)
