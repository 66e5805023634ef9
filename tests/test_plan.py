"""The plan: every key of a recipe changes it, the same arguments repeat it, and what cannot be is refused."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from finetune.base import read_base
from finetune.calibration import Calibration
from finetune.data.prepare import prepare_data
from finetune.errors import OutOfMemoryError, UserError
from finetune.machine import Machine
from finetune.plan import Plan, count_trainable, make_plan, memory_problem
from finetune.recipe import Recipe, load_recipe
from finetune.run import run
from tests.conftest import POCKET, alpaca_rows, write_recipe

CPU = Machine("cpu", "a laptop", 2, 16.0, 16.0, computes_bfloat16=True, computes_in_8_bits="int8")
GPU = Machine("cuda", "a GPU", 8, 64.0, 24.0, computes_bfloat16=True, computes_in_8_bits="fp8")

# key -> (another value, what else is set on both sides so that the key has something to decide)
ONE_OTHER_VALUE_PER_KEY: dict[str, tuple[Any, dict[str, Any]]] = {
    "version": (2, {}),
    "name": ("other", {}),
    "seed": (18, {}),
    "model.base": (str(POCKET), {}),
    "model.revision": ("abc", {}),
    "model.quantization": ("none", {}),
    "model.dtype": ("float32", {}),
    "model.compute": ("int8", {}),
    "adapter.method": ("dora", {}),
    "adapter.rank": (8, {}),
    "adapter.alpha": (16, {}),
    "adapter.dropout": (0.1, {}),
    "adapter.targets": (["q_proj"], {}),
    "adapter.layers": ([0], {}),
    "adapter.rank_by": ({"q_proj": 8}, {}),
    "adapter.alpha_by": ({"layers.0.self_attn.q_proj": 8}, {}),
    "adapter.start": ("pissa", {}),
    "adapter.learning_rate_ratio": (16.0, {}),
    "adapter.block_size": (16, {"adapter.method": "oft"}),
    "adapter.train_tokens": (["</s>"], {}),
    "adapter.also_train": (["lm_head"], {}),
    "adapter.from": ("elsewhere/adapter", {}),
    "data.train": ("other.jsonl", {}),
    "data.eval": (3, {}),
    "data.format": ("prompt-completion", {"data.train": "both.jsonl", "data.format": "alpaca"}),
    "data.template": ("none", {}),
    "data.loss_on": ("everything", {}),
    "data.max_tokens": (20, {}),
    "data.too_long": ("drop", {"data.max_tokens": 60}),
    "data.truncate": ("answer", {"data.max_tokens": 84, "data.too_long": "truncate"}),
    "data.empty_answer": ("drop", {"data.train": "empty.jsonl"}),
    "data.special_tokens": ("control", {"data.train": "control.jsonl"}),
    "data.deduplicate": ("exact", {"data.train": "twice.jsonl"}),
    "data.leaked": ("drop", {"data.train": "twice.jsonl", "data.eval": 10}),
    "data.drop": (["empty_answer"], {"data.train": "empty.jsonl"}),
    "data.system": ("Be brief.", {}),
    "data.date": ("1 Jan 2000", {"data.template": "dated.jinja"}),
    "train.objective": ("dpo", {}),
    "train.epochs": (2, {}),
    "train.max_steps": (7, {}),
    "train.batch_size": (5, {}),
    "train.tokens_per_pass": (64, {}),
    "train.recompute": ("all", {}),
    "train.speedups": (["layers"], {}),
    "train.learning_rate": (1e-3, {}),
    "train.schedule": ("linear", {}),
    "train.warmup": (4, {}),
    "train.optimizer": ("adamw-8bit", {}),
    "train.weight_decay": (0.1, {}),
    "train.max_grad_norm": (0.5, {}),
    "evaluate.every_steps": (5, {}),
    "evaluate.prompts": ("prompts.txt", {}),
    "evaluate.patience": (5, {"data.eval": 3}),
    "output.folder": ("elsewhere", {}),
    "output.save_every_steps": (5, {}),
    "output.keep_checkpoints": (1, {}),
    "output.keep_best": (True, {"data.eval": 3}),
    "output.log_to": (["tensorboard"], {}),
}


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A current folder with data, some of which fit two formats, and a template that writes the date."""
    monkeypatch.chdir(tmp_path)
    rows = [{**row, "output": f"answer {index}"} for index, row in enumerate(alpaca_rows(20))]
    files = {
        "rows": rows,
        "other": rows[:9],
        "empty": [*rows, {**rows[0], "output": ""}],
        "control": [*rows, {**rows[0], "instruction": "What does </s> or <|end|> mean?"}],
        "twice": rows + rows,
        "both": [{**row, "prompt": "p", "completion": "c"} for row in rows],
    }
    for name, written in files.items():
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in written))
    (tmp_path / "dated.jinja").write_text(
        "{{ strftime_now('%A, %d %B %Y') }}{% for m in messages %}{{ m.content }}{{ eos_token }}{% endfor %}"
    )
    return tmp_path


def recipe_with(**values: Any) -> Recipe:
    """A recipe on pocket-llama; keys are written "section.key"."""
    recipe: dict[str, Any] = {"version": 1, "name": "tiny", "model": {"base": "builtin:pocket-llama"}}
    for key, value in {"data.train": "rows.jsonl", **values}.items():
        section, dot, name = key.partition(".")
        if dot:
            recipe.setdefault(section, {})[name] = value
        else:
            recipe[section] = value
    Path("recipe.json").write_text(json.dumps(recipe))
    return load_recipe(Path("recipe.json"))


def plan_of(machine: Machine = CPU, **values: Any) -> Plan:
    recipe = recipe_with(**values)
    base = read_base(recipe.model.base, revision=recipe.model.revision)
    data = prepare_data(recipe.data, base, seed=recipe.seed)
    return make_plan(recipe, machine, base.facts, data.facts, token_ids=base.token_ids(recipe.adapter.train_tokens))


def outcome(values: dict[str, Any]) -> Any:
    """The plan without its copy of the settings, in which any key would show; or why there is none."""
    try:
        return replace(plan_of(**values), settings={}, defaults=())
    except UserError as error:
        return [problem.message for problem in error.problems]


def test_the_table_knows_every_key(here: Path) -> None:
    assert set(ONE_OTHER_VALUE_PER_KEY) == set(recipe_with().settings())


@pytest.mark.parametrize("key", ONE_OTHER_VALUE_PER_KEY)
def test_every_key_changes_the_plan(here: Path, key: str) -> None:
    other, beside = ONE_OTHER_VALUE_PER_KEY[key]
    before, after = outcome(beside), outcome({**beside, key: other})
    assert before != after
    assert isinstance(after, Plan) or key in {"version", "train.objective", "data.max_tokens"}


def test_the_same_arguments_give_the_same_plan(here: Path) -> None:
    assert plan_of() == plan_of()
    assert plan_of().to_json() == plan_of().to_json()
    json.dumps(plan_of().to_json())


def test_free_memory_and_cores_do_not_change_the_layout(here: Path) -> None:
    other = replace(CPU, cores=64, memory_gib=512.0, device_memory_gib=512.0, device_name="a server")
    assert plan_of(CPU) == plan_of(other)


def test_numbers_follow_the_closed_formulas(here: Path) -> None:
    found = plan_of(**{"train.epochs": 3, "train.batch_size": 8, "data.eval": 3})
    shapes = read_base("builtin:pocket-llama").facts.linears
    assert (found.examples, found.eval_examples, found.train.steps) == (17, 3, 3 * 3)
    assert found.trainable_parameters == sum(16 * (shape.in_features + shape.out_features) for shape in shapes)
    assert found.settings["train.max_steps"] == 9
    assert found.to_json()["steps"] == 9
    assert found.to_json()["tokens_per_pass"] == found.train.tokens_per_pass == 3072
    assert found.passes_per_step == 1.0


def test_dora_trains_a_magnitude_for_every_output(here: Path) -> None:
    shapes = read_base("builtin:pocket-llama").facts.linears
    targets = ("q_proj", "v_proj")
    difference = count_trainable(shapes, targets, method="dora", rank=3) - count_trainable(
        shapes, targets, method="lora", rank=3
    )
    assert difference == sum(shape.out_features for shape in shapes if shape.leaf in targets)


def test_speedups_are_all_that_apply(here: Path) -> None:
    every = ("attention", "linears", "weights", "layers", "head", "prefix")
    assert plan_of().train.speedups == every
    assert plan_of().settings["train.speedups"] == list(every)
    assert plan_of(**{"adapter.dropout": 0.1}).train.speedups == every[:5]
    assert plan_of(**{"train.speedups": ["head", "linears"]}).train.speedups == ("linears", "head")
    none = plan_of(**{"train.speedups": "none"})
    assert (none.train.speedups, none.settings["train.speedups"]) == ((), "none")


@pytest.mark.parametrize(
    ("machine", "values", "reason"),
    [
        (GPU, {}, "int8 needs a CPU that multiplies 8-bit numbers .*; write fp8 here, or leave it auto"),
        (replace(CPU, computes_in_8_bits=""), {}, "int8 needs a CPU that .*; a laptop has none, or leave it auto"),
        (CPU, {"model.compute": "fp8"}, "fp8 needs an NVIDIA GPU of compute capability 8.9 or newer; write int8 here"),
        (CPU, {"model.dtype": "float32"}, "stands beside products in bfloat16, and model.dtype is float32 here"),
        (CPU, {"model.quantization": "int8"}, "is not for a base that bitsandbytes multiplies in 8 bits"),
        (CPU, {"adapter.method": "dora"}, "and adapter.method is dora; write lora or rslora"),
        (CPU, {"adapter.dropout": 0.1}, "which have no adapter.dropout; write 0"),
        (CPU, {"train.speedups": ["head"]}, "let train.speedups have linears"),
    ],
)
def test_products_in_8_bits_are_had_or_refused(
    here: Path, machine: Machine, values: dict[str, Any], reason: str
) -> None:
    with pytest.raises(UserError) as caught:
        plan_of(machine, **{"model.compute": "int8", **values})
    (problem,) = caught.value.problems
    assert problem.where == "model.compute"
    assert re.search(reason, problem.message), problem.message


def test_sizes_that_fp8_cannot_multiply_are_refused(here: Path) -> None:
    """A router's, which stays as it is, may have any."""
    recipe = recipe_with(**{"model.compute": "fp8"})
    base = read_base(recipe.model.base)
    data = prepare_data(recipe.data, base, seed=recipe.seed)
    shape = base.facts.linears[0]
    router = replace(
        base.facts, linears=(*base.facts.linears, replace(shape, module="model.layers.0.gate", out_features=6))
    )
    assert make_plan(recipe, GPU, router, data.facts).train.compute == "fp8"
    odd = replace(base.facts, linears=(replace(shape, out_features=250), *base.facts.linears[1:]))
    with pytest.raises(UserError, match=f"multiples of 16, and {shape.leaf} has 250 x {shape.in_features}; take"):
        make_plan(recipe, GPU, odd, data.facts)


def test_weights_in_8_bits_take_a_byte_for_each_product(here: Path) -> None:
    """In place of two; of an MLP's second linear two forward, one back."""
    shapes = read_base("builtin:pocket-llama").facts.linears
    linears, second = (
        sum(each.in_features * each.out_features for each in shapes if each.leaf in names)
        for names in ({each.leaf for each in shapes}, {"down_proj"})
    )
    saved = plan_of().peak_memory_gib - plan_of(**{"model.compute": "int8"}).peak_memory_gib
    assert saved == pytest.approx((2 * linears - second) / 2**30, abs=1e-3)
    assert plan_of(**{"model.compute": "int8"}).train.compute == "int8"
    assert plan_of(GPU, **{"model.compute": "fp8"}).train.compute == "fp8"


def test_a_base_with_other_attention_keeps_it(here: Path) -> None:
    recipe = recipe_with()
    base = read_base(recipe.model.base)
    data = prepare_data(recipe.data, base, seed=recipe.seed)
    windowed = replace(base.facts, isolates_by_documents=False)
    assert make_plan(recipe, CPU, windowed, data.facts).train.speedups == ("linears", "weights", "layers", "head")
    asked = recipe_with(**{"train.speedups": ["attention", "prefix"]})
    with pytest.raises(UserError) as caught:
        make_plan(asked, CPU, windowed, data.facts)
    assert len(caught.value.problems) == 2
    assert "train.speedups: attention is for bases with plain causal attention in every layer; leave it out" in str(
        caught.value
    )


def test_a_speedup_that_cannot_be_had_is_refused_by_name(here: Path) -> None:
    (alone,) = refusal(**{"train.speedups": ["weights"]})
    assert alone.startswith("train.speedups: weights are those of linears, which has to stand beside it; leave it out")
    (dropped,) = refusal(**{"train.speedups": ["attention", "prefix"], "adapter.dropout": 0.5})
    assert dropped.startswith("train.speedups: prefix cannot go with adapter.dropout")


def test_what_is_left_open_is_taken_from_the_run_that_began(here: Path) -> None:
    recipe = recipe_with()
    base = read_base(recipe.model.base)
    facts = prepare_data(recipe.data, base, seed=recipe.seed).facts

    def went_on(recipe: Recipe, **begun: Any) -> tuple[int, bool, tuple[str, ...]]:
        train = make_plan(recipe, CPU, base.facts, facts, begun=begun).train
        return train.tokens_per_pass, train.recompute, train.speedups

    before = {"train.tokens_per_pass": 77, "train.recompute": "all", "train.speedups": ["head"]}
    assert went_on(recipe, **before) == (77, True, ("head",))
    assert went_on(recipe, **{**before, "train.speedups": "none"}) == (77, True, ())
    assert went_on(recipe, **{"train.tokens_per_pass": 77, "train.recompute": "none"}) == (77, False, ())
    asked = recipe_with(**{"train.tokens_per_pass": 99, "train.recompute": "none", "train.speedups": ["linears"]})
    assert went_on(asked, **before) == (99, False, ("linears",))


@pytest.mark.parametrize(
    ("machine", "asked", "dtype"),
    [
        (CPU, "auto", "bfloat16"),
        (replace(CPU, computes_bfloat16=False), "auto", "float32"),
        (CPU, "float32", "float32"),
        (GPU, "float16", "float16"),
    ],
)
def test_the_dtype_follows_the_machine(here: Path, machine: Machine, asked: str, dtype: str) -> None:
    found = plan_of(machine, **{"model.dtype": asked})
    assert found.model.dtype == found.train.dtype == found.settings["model.dtype"] == dtype


def test_a_long_row_gets_a_pass_that_holds_it(here: Path) -> None:
    found = plan_of()
    assert found.train.tokens_per_pass >= max(found.tokens // found.examples, 1)


def refusal(machine: Machine = CPU, **values: Any) -> list[str]:
    with pytest.raises(UserError) as caught:
        plan_of(machine, **values)
    return [str(problem) for problem in caught.value.problems]


def test_unknown_targets_are_told_with_the_known_ones(here: Path) -> None:
    told = refusal(**{"adapter.targets": ["query_proj", "v_proj", "x"]})
    known = "down_proj, gate_proj, k_proj, o_proj, q_proj, up_proj, v_proj"
    assert told == [
        f"adapter.targets: no linear module is called {name!r} in builtin:pocket-llama; there are: {known}; "
        "write one of these, or `targets: all-linear`"
        for name in ("query_proj", "x")
    ]


def test_what_a_cpu_cannot_do_is_told_at_once(here: Path) -> None:
    told = refusal(**{"model.dtype": "float16", "train.optimizer": "paged-adamw-8bit", "adapter.targets": ["x"]})
    assert [problem.split(":")[0] for problem in told] == ["adapter.targets", "model.dtype", "train.optimizer"]
    assert told[1] == "model.dtype: float16 is for GPUs; on a CPU write auto, bfloat16 or float32"


def test_a_row_over_the_context_is_refused(here: Path) -> None:
    (here / "long.jsonl").write_text(json.dumps({"instruction": "x", "output": "pear " * 1500}))
    (told,) = refusal(**{"data.train": ["rows.jsonl", "long.jsonl"], "data.max_tokens": 5000})
    assert told.startswith("data.max_tokens: the longest row has ")
    assert "builtin:pocket-llama reads 1024; set data.max_tokens: 1024 and data.too_long: drop" in told


def test_a_run_over_the_memory_has_a_problem(here: Path) -> None:
    assert memory_problem(plan_of(), CPU) is None
    told = str(memory_problem(plan_of(), replace(CPU, device_memory_gib=0.5, device_name="a toaster")))
    assert told.startswith("memory: about ")
    assert "a toaster has 0.5 GiB; lower train.tokens_per_pass (now 3072), set train.recompute: all" in told


def test_a_run_over_the_free_memory_has_another(here: Path) -> None:
    plan = plan_of()
    assert memory_problem(plan, CPU, free_gib=plan.peak_memory_gib) is None
    told = str(memory_problem(plan, CPU, free_gib=0.25))
    assert "a laptop has 0.2 of 16.0 GiB free now; end other programs, lower train.tokens_per_pass (now 3072)" in told


def test_the_plan_does_not_know_what_is_free(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = plan_of()
    monkeypatch.setattr("finetune.machine.free_memory_gib", lambda device: 0.01)
    assert plan_of() == before


def test_a_layout_left_open_fits_the_machine(here: Path) -> None:
    """With less memory first the passes are halved, then no weights kept, then activations computed again."""
    need = plan_of().peak_memory_gib
    seen = []
    for share in np.linspace(1.5, 0.3, 60):
        train = plan_of(replace(CPU, device_memory_gib=need * float(share))).train
        seen.append((train.recompute, "weights" not in train.speedups, -train.tokens_per_pass))
    assert seen == sorted(seen, key=lambda layout: layout[:2])
    assert seen[0] == (False, False, -3072)
    assert {recompute for recompute, _, _ in seen} == {False, True}
    small = replace(CPU, device_memory_gib=0.1)
    asked = plan_of(
        small, **{"train.tokens_per_pass": 4000, "train.recompute": "none", "train.speedups": ["weights", "linears"]}
    )
    assert (asked.train.tokens_per_pass, asked.train.recompute) == (4000, False)
    assert asked.train.speedups == ("linears", "weights")


def test_a_calibrated_machine_tells_seconds(here: Path) -> None:
    recipe = recipe_with()
    base = read_base(recipe.model.base)
    facts = prepare_data(recipe.data, base, seed=recipe.seed).facts
    measured = Calibration({"float32": ((128, 1e11),), "bfloat16": ((128, 1e11),)}, 1e10, 1e-6, 0.5, 3.0)
    found = make_plan(recipe, CPU, base.facts, facts, calibration=measured)
    assert found.seconds_per_step is not None
    assert found.seconds == pytest.approx(found.seconds_per_step * found.train.steps, abs=0.06)
    assert "seconds" in found.estimated
    without = make_plan(recipe, CPU, base.facts, facts)
    assert (without.seconds_per_step, without.seconds) == (None, None)
    assert "uncalibrated" in without.estimated
    assert found.train == without.train


def test_a_run_over_the_memory_ends_before_it_writes(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    toaster = replace(CPU, device_memory_gib=0.5, device_name="a toaster")
    monkeypatch.setattr("finetune.run.probe_machine", lambda: toaster)
    recipe = write_recipe(here / "large", POCKET, alpaca_rows(4))
    with pytest.raises(OutOfMemoryError, match="a toaster has 0.5 GiB"):
        run(recipe)
    assert not (here / "large" / "run").exists()


def test_recomputation_and_smaller_passes_need_less_memory(here: Path) -> None:
    peaks = [
        plan_of(**values).peak_memory_gib
        for values in ({}, {"train.recompute": "all"}, {"train.recompute": "all", "train.tokens_per_pass": 256})
    ]
    assert peaks == sorted(peaks, reverse=True)
    assert peaks[0] > peaks[2]
