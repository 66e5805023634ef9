"""Products in 8 bits: the integers written out, near the exact ones, only while training, refused where too coarse."""

from __future__ import annotations

import json
import math
import re
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from finetune.errors import NumericsError, UserError
from finetune.machine import probe_machine
from finetune.model.fast.eight_bit import MATRICES, EightBit, Int8
from finetune.model.fast.kernels import Kernels, load_kernels
from finetune.model.fast.linears import bytes_kept, swap_linears
from finetune.model.fast.weights import CurrentWeight, can_pack
from finetune.run import run
from finetune.train.parity import are_near
from tests.conftest import alpaca_rows, make_tiny_base, write_recipe
from tests.model.fast.test_linears import WEIGHTS, adapted, cosine, formula, inputs, one, step, tokens

TOKENS, INPUTS, OUTPUTS = 50, 96, 160
HAS_INT8 = probe_machine().computes_in_8_bits == "int8"
on_int8 = pytest.mark.skipif(not HAS_INT8, reason="this CPU does not sum products of 8-bit numbers in 32 bits")


def drawn(rows: int, columns: int, seed: int) -> torch.Tensor:
    """Rows of very different sizes."""
    torch.manual_seed(seed)
    return (torch.randn(rows, columns) * torch.logspace(-3, 3, rows)[:, None]).bfloat16()


def rounded(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Whole numbers up to 127 and the rows' scales, in float64."""
    scale = x.double().abs().amax(1, keepdim=True) / 127
    return (x.double() / scale).round(), scale


def relative(found: torch.Tensor, exact: torch.Tensor) -> float:
    return float((found.double() - exact).norm() / exact.norm())


@pytest.fixture(params=["compiled", "torch"])
def kernels(request: pytest.FixtureRequest) -> Kernels:
    found = load_kernels() if request.param == "compiled" else Kernels()
    if request.param == "compiled" and found.library is None:
        pytest.skip(f"no compiled kernels on this machine: {found.reason}")
    return found


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("shape", [(1, 1), (3, 7), (40, 768)])
def test_rows_are_whole_numbers_of_their_own_scale(
    kernels: Kernels, dtype: torch.dtype, shape: tuple[int, int]
) -> None:
    x = drawn(*shape, seed=1).to(dtype)
    q, scale = kernels.eight_bits(x)
    whole, exact = rounded(x)
    assert torch.allclose(scale.double(), exact[:, 0], rtol=1e-6)
    assert q.dtype == torch.uint8
    off = (q.double() - 128 - whole).abs()
    halves = ((x.double() / exact) % 1 - 0.5).abs() < 1e-4  # which may be rounded either way
    assert not off[~halves].any()
    assert off.max() <= 1
    assert (q.double() - 128).abs().amax(1).eq(127).all()


def test_rows_without_numbers_stay_without(kernels: Kernels) -> None:
    """Zeros and what is nothing beside 1e-30 give zeros; NaN and infinity give a row of NaN, and no other."""
    x = torch.ones(5, 16)
    x[0], x[1], x[2, 3], x[3, 5] = 0, 1e-38, torch.nan, -torch.inf
    q, scale = kernels.eight_bits(x)
    values = (q.float() - 128) * scale[:, None]
    assert not values[:2].any()
    assert values[2:4].isnan().all()
    assert torch.allclose(values[4], torch.ones(16))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_rows_times_their_number(kernels: Kernels, dtype: torch.dtype) -> None:
    y, by = drawn(300, 96, seed=3).to(dtype), torch.rand(300)
    exact = y.double() * by.double()[:, None]
    assert torch.allclose(kernels.times_rows_(y, by).double(), exact, rtol=2**-8, atol=0)


@on_int8
def test_int8_is_the_sum_of_whole_numbers_times_both_scales() -> None:
    """Sums of integers have no rounding: what is left are two roundings to bfloat16."""
    torch.manual_seed(4)
    rows, columns = torch.randint(-127, 128, (TOKENS, INPUTS)), torch.randint(-127, 128, (OUTPUTS, INPUTS))
    rows[:, 0], columns[:, 0] = 127, -127  # the largest, so that a power of two is the scale
    row_scale, column_scale = 2.0 ** torch.randint(-9, 9, (TOKENS, 1)), 2.0 ** torch.randint(-9, 9, (OUTPUTS, 1))
    exact = (rows @ columns.T).double() * row_scale * column_scale.T
    found = Int8((columns * column_scale).bfloat16()).product((rows * row_scale).bfloat16())
    assert found.dtype == torch.bfloat16
    assert ((found.double() - exact).abs() <= 2**-7 * exact.abs()).all()


@pytest.mark.parametrize("kind", ["fp8", pytest.param("int8", marks=on_int8)])
@pytest.mark.parametrize("bias", [False, True])
def test_both_products_are_near_the_exact_ones(kind: str, bias: bool) -> None:
    torch.manual_seed(5)
    weight, x, dy = torch.randn(OUTPUTS, INPUTS), torch.randn(TOKENS, INPUTS), torch.randn(TOKENS, OUTPUTS)
    weight, x, dy = weight.bfloat16(), x.bfloat16(), dy.bfloat16()
    added = torch.randn(OUTPUTS).bfloat16() if bias else None
    frozen = EightBit.of(weight, added, kind)
    limit = {"int8": 0.015, "fp8": 0.04}[kind]
    exact = x.double() @ weight.double().T + (0 if added is None else added.double())
    assert relative(frozen.forward(x), exact) < limit
    assert relative(frozen.backward(dy), dy.double() @ weight.double()) < limit
    assert frozen.kept_bytes == 2 * weight.numel()


@pytest.mark.parametrize("kind", ["fp8", pytest.param("int8", marks=on_int8)])
def test_a_row_that_is_no_number_is_told_by_its_product_alone(kind: str) -> None:
    matrix = MATRICES[kind](drawn(OUTPUTS, INPUTS, seed=2))
    x = torch.ones(32, INPUTS).bfloat16()
    x[3, 5], x[7, 0], x[9] = torch.nan, torch.inf, 0
    found = matrix.product(x)
    assert found[3].isnan().all()
    assert found[7].isnan().all()
    assert not found[9].any()
    assert found[[row for row in range(32) if row not in (3, 7)]].isfinite().all()


@on_int8
@pytest.mark.parametrize("quantization", ["none", "nf4"])
def test_a_linear_rounds_while_it_trains_and_not_where_it_is_evaluated(tiny_base: Path, quantization: str) -> None:
    model = adapted(tiny_base, quantization, torch.bfloat16)
    exact, layer = adapted(tiny_base, quantization, torch.bfloat16), one(model, "mlp.down_proj")
    kept, second = bytes_kept(model, compute="int8"), 2 * 64 * 128  # of both layers' MLPs, held exactly for forward
    held = swap_linears(model, compute="int8").kept_bytes
    assert held == kept == 2 * WEIGHTS + (second if quantization == "nf4" or can_pack(layer.base_layer) else -second)
    swap_linears(exact)
    model.train()
    for path in ("mlp.up_proj", "mlp.down_proj"):
        layer = one(model, path)
        found = step(layer, inputs(layer, torch.bfloat16), torch.bfloat16)
        wanted = formula(layer, inputs(layer, torch.bfloat16))
        assert {name: cosine(found[name], wanted[name]) > 0.9999 for name in wanted} == dict.fromkeys(wanted, True)
        same = one(exact.train(), path)
        beside = step(same, inputs(layer, torch.bfloat16), torch.bfloat16)
        assert {name for name in found if torch.equal(found[name], beside[name])} == (
            {"y", "lora_A.default.weight", "lora_B.default.weight"}
            if path == "mlp.down_proj"
            else {"lora_A.default.weight", "lora_B.default.weight"}
        )
    ids = tokens()
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        training = model(ids).logits
        assert not torch.equal(training, exact(ids).logits)
        assert torch.equal(model.eval()(ids).logits, exact.eval()(ids).logits)
        assert torch.equal(model.train()(ids).logits, training)


@on_int8
def test_a_changed_weight_is_rounded_again() -> None:
    linear = torch.nn.Linear(INPUTS, OUTPUTS, bias=False, dtype=torch.bfloat16).requires_grad_(False)
    current = CurrentWeight(linear, keep=True, pack=True, compute="int8")
    x = drawn(TOKENS, INPUTS, seed=1)
    before = current.get().forward(x)
    with torch.no_grad():
        linear.weight.mul_(2)
    assert torch.allclose(current.get().forward(x).double(), 2 * before.double(), rtol=2**-7, atol=1e-6)


IN_INT8 = {"model__quantization": "nf4", "model__dtype": "bfloat16", "model__compute": "int8"}


def losses(folder: Path) -> list[float]:
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return [entry["loss"] for entry in map(json.loads, lines) if "loss" in entry]


@on_int8
def test_a_run_is_near_the_exact_one_and_twice_the_same(
    tiny_base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def trained(name: str, **settings: object) -> Path:
        rows = alpaca_rows(12)
        return run(write_recipe(tmp_path / name, tiny_base, rows, **{**IN_INT8, "data__eval": 2, **settings})).path

    one, two = trained("one"), trained("two")
    told = capsys.readouterr().err
    assert "in int8 loss " in told
    assert losses(one) == losses(two)
    assert (one / "adapter/adapter_model.safetensors").read_bytes() == (
        two / "adapter/adapter_model.safetensors"
    ).read_bytes()
    exact = trained("exact", model__compute="auto")
    assert losses(one) != losses(exact)
    assert losses(one) == pytest.approx(losses(exact), rel=5e-3)
    assert json.loads((one / "plan.json").read_text())["train"]["compute"] == "int8"
    split = trained("split", train__tokens_per_pass=256)
    assert losses(split) == pytest.approx(losses(one), rel=2e-3)


@on_int8
def test_a_trained_base_passes_where_small_errors_grow(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The embedded base, asked for answers it does not know how to give."""
    run(write_recipe(tmp_path, "builtin:pocket-llama", alpaca_rows(12), **IN_INT8, train__max_steps=1))
    told = re.search(r"in int8 loss (\S+) \((\S+) exactly\), gradients at a cosine of (\S+)\n", capsys.readouterr().err)
    assert told is not None
    loss, exact, cosine_ = map(float, told.groups())
    assert loss == pytest.approx(exact, rel=0.01)
    assert 0.95 < cosine_ < 1


@pytest.mark.parametrize(
    ("in_8_bits", "cosine", "near"),
    [(2.0, 1.0, True), (2.03, 0.91, True), (1.97, 0.91, True), (2.05, 1.0, False), (1.95, 1.0, False),
     (2.0, 0.89, False), (2.0, -1.0, False), (math.nan, 1.0, False), (2.0, math.nan, False)],
)  # fmt: skip
def test_near_are_both_the_loss_and_the_gradients(in_8_bits: float, cosine: float, near: bool) -> None:
    """Of an exact loss of 2."""
    assert are_near(in_8_bits, 2.0, cosine) is near


@on_int8
def test_a_base_whose_rows_8_bits_cannot_hold_is_refused_before_the_first_step(tmp_path: Path) -> None:
    """One input of every product is 3,000 times larger than the others, so that these round to nothing."""
    base = make_tiny_base(tmp_path / "base", dtype="float32")
    file = base / "model.safetensors"
    weights = load_file(file)
    for name, weight in weights.items():
        if "layernorm" in name:
            weight[0] = 3000
        elif name.endswith(("q_proj.weight", "k_proj.weight", "v_proj.weight", "gate_proj.weight", "up_proj.weight")):
            weight[:, 0] = weight[:, 0] / 3000
    save_file(weights, file, metadata={"format": "pt"})
    recipe = write_recipe(tmp_path, base, alpaca_rows(12), **{**IN_INT8, "model__quantization": "none"})
    with pytest.raises(NumericsError, match=r"model\.compute: int8 is too coarse for this base: loss .* cosine"):
        run(recipe)
    shutil.rmtree(tmp_path / "run")
    run(write_recipe(tmp_path, base, alpaca_rows(12), **{**IN_INT8, "model__compute": "auto"}))


def test_a_run_in_8_bits_goes_on_in_8_bits_only(tiny_base: Path, tmp_path: Path) -> None:
    if not HAS_INT8:
        with pytest.raises(UserError, match=r"model\.compute: int8 needs a CPU"):
            run(write_recipe(tmp_path, tiny_base, alpaca_rows(8), **IN_INT8))
        return
    recipe = write_recipe(tmp_path, tiny_base, alpaca_rows(8), **IN_INT8, output__save_every_steps=2)
    run(recipe)
    with pytest.raises(UserError, match=r"model\.compute: was 'int8'"):
        run(recipe, ["model.compute=auto", "train.max_steps=6"], resume=True)
