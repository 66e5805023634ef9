"""Costs by hand: one small shape counted out on paper, layouts that fit, and what is refused for want of memory."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from finetune.base import BaseFacts, ExpertShape, LinearShape
from finetune.calibration import Calibration, calibration_file, keep_calibration, read_calibration
from finetune.machine import Machine, _left_in_groups, free_memory_gib
from finetune.plan_cost import (
    HOLES,
    HOLES_IN_LAYERS,
    HOLES_OF_COPIES,
    Costs,
    Steps,
    chunk_bytes,
    count_steps_contents,
    kept_per_token,
    kept_weight_bytes,
    operations_per_step,
    pass_bytes,
    peak_memory_gib,
    seconds_per_step,
    step_products,
)
from finetune.plan_layout import SPEEDUPS

CPU = Machine("cpu", "a laptop", 2, 16.0, 16.0, computes_bfloat16=True)
# Two layers of width 8, 2 heads of 4, 1 key/value head, 12 inside, 100 words; 5 tokens of which 3 are learned.
LINEARS = {"q_proj": (8, 8), "k_proj": (4, 8), "v_proj": (4, 8), "o_proj": (8, 8)}
LINEARS |= {"gate_proj": (12, 8), "up_proj": (12, 8), "down_proj": (8, 12)}
BASE = BaseFacts(
    base="small",
    revision=None,
    folder=Path("small"),
    model_type="llama",
    layers=2,
    hidden_size=8,
    vocabulary=100,
    context_tokens=64,
    tied_embeddings=False,
    stored_dtype="BF16",
    parameters=2 * (64 + 32 + 32 + 64 + 3 * 96 + 2 * 8) + 2 * 100 * 8 + 8,
    stored_bytes=0,
    linears=tuple(
        LinearShape(f"model.layers.{layer}.{name}", *shape) for layer in range(2) for name, shape in LINEARS.items()
    ),
    isolates_by_documents=True,
)
COSTS = Costs(
    base=BASE,
    quantization="nf4",
    dtype="bfloat16",
    device="cpu",
    optimizer="adamw",
    trainable=2 * 3 * (16 + 12 + 12 + 16 + 20 + 20 + 20),  # rank 3
    stored=2 * 3 * (16 + 12 + 12 + 16 + 20 + 20 + 20),
    ranks=2 * 7 * 3,
    recompute=False,
    speedups=SPEEDUPS,
    steps=Steps(1.0, 5.0, 3.0, 2**2 + 3**2, 5, 3),
)
EVEN = Calibration(
    products={"float32": ((128, 1e9),), "bfloat16": ((128, 1e9), (512, 4e9))},
    bytes_per_second=1e10,
    operation_seconds=1e-6,
    runtime_gib=0.5,
    import_seconds=3.0,
)


def test_a_steps_operations_are_those_counted_on_paper() -> None:
    """Forward and back through 480 weights a layer; three products of each LoRA matrix; 2 + 3 tokens in two rows."""
    linears = 2 * 2 * 480 * 5 * 2  # multiply and add, layers, weights, tokens, forward and back
    lora = 2 * 2 * 3 * 116 * 5 * 3  # multiply and add, layers, rank, in + out of all seven, tokens, one and two
    pairs = 2 * 2 + 3 * 3
    # Scores and values: 2 products of 8 numbers a pair, half of the pairs; backward two and a half times as much.
    attention = 2 * (2 * 2 * 8 * pairs / 2) * 3.5
    head = 2 * 100 * 8 * 3 * 2
    assert operations_per_step(COSTS) == linears + lora + attention + head
    again = replace(COSTS, recompute=True)
    assert operations_per_step(again) - operations_per_step(COSTS) == linears / 2 + lora / 3 + attention / 3.5


def test_seconds_are_operations_by_rate_and_bytes_by_bandwidth() -> None:
    """Of the linears alone, where everything else is free."""
    free = replace(EVEN, bytes_per_second=1e30, operation_seconds=1e-30)
    linears_only = replace(COSTS, trainable=0, ranks=0, steps=replace(COSTS.steps, pairs=0.0, supervised=0.0))
    assert seconds_per_step(linears_only, free) == pytest.approx(2 * 2 * 480 * 5 * 2 / 1e9)
    assert seconds_per_step(COSTS, EVEN) > seconds_per_step(COSTS, free) > 0
    assert len(list(step_products(COSTS))) == 14 + 1 + 2 + 1
    twice = replace(free, products={**EVEN.products, "int8": ((128, 2e9),)})
    operations, exact = 2 * 2 * 480 * 5 * 2, 2 * 2 * 96 * 5  # forward through an MLP's second linear
    in_int8 = seconds_per_step(replace(linears_only, compute="int8"), twice)
    assert in_int8 == pytest.approx((operations - exact) / 2e9 + exact / 1e9)


def test_more_work_takes_longer() -> None:
    plain = seconds_per_step(COSTS, EVEN)
    slower = [
        replace(COSTS, recompute=True),
        replace(COSTS, speedups=tuple(name for name in SPEEDUPS if name != "weights")),
        replace(COSTS, steps=replace(COSTS.steps, tokens=6.0)),
        replace(COSTS, steps=replace(COSTS.steps, passes=2.0)),
        replace(COSTS, steps=replace(COSTS.steps, supervised=4.0)),
    ]
    assert all(seconds_per_step(costs, EVEN) > plain for costs in slower)


def test_rates_between_measured_widths_lie_between_them() -> None:
    at = [EVEN.product_seconds(1e9, dtype="bfloat16", width=width) for width in (1, 128, 256, 512, 4096)]
    assert at == pytest.approx([1, 1, 0.5, 0.25, 0.25])  # 256 is half way between on a scale of logarithms


def test_what_a_layer_keeps_of_a_token_is_a_list_of_tensors() -> None:
    """Two norms' inputs and outputs, q, k, v, attended values, gate, up, their product, seven x A^T; 2 bytes each."""
    layer = [8, 8, 8, 4, 4, 8, 8, 8, 12, 12, 12, *[3] * 7]
    assert kept_per_token(COSTS) == 2 * 2 * sum(layer)
    assert kept_per_token(replace(COSTS, dtype="float32")) == 4 * 2 * sum(layer)


def test_libraries_keep_more_than_our_pieces() -> None:
    """Two norms in float32 and the gate's activation; each document's values; for 16-bit weights PEFT's copies."""

    def more(missing: str, **settings: str) -> float:
        left = tuple(name for name in SPEEDUPS if name != missing)
        return kept_per_token(replace(COSTS, speedups=left, **settings)) - kept_per_token(COSTS)

    assert more("layers") == 2 * (2 * 2 * 8 + 2 * 12)
    assert more("attention") == 2 * 2 * 8
    assert more("linears") == more("head") == more("prefix") == 0
    assert more("linears", quantization="none") == 2 * 2 * (2 * 8 + 8)  # q, k, v and gate, up share no input then
    assert kept_per_token(replace(COSTS, dtype="float32", speedups=())) == kept_per_token(
        replace(COSTS, dtype="float32")
    ) + 4 * 2 * (12 + 8)


def test_a_pass_is_what_it_keeps_and_its_widest_moment() -> None:
    """5 tokens, 3 of them learned: the last states of all and two of the learned, then logits or gradients."""
    states = 2 * 8 * (5 + 2 * 3)
    gradients = 2 * 5 * (3 * 12 + 2 * 8)
    layer = 5 * kept_per_token(COSTS) / 2
    chunk = 3 * 100 * (2 + 4)
    assert pass_bytes(COSTS) == 2 * layer + states + max(chunk, gradients)
    of_few = replace(COSTS, base=replace(BASE, vocabulary=4))
    assert pass_bytes(of_few) == 2 * layer + states + gradients
    whole = replace(COSTS, speedups=("attention", "linears", "layers"))
    assert pass_bytes(whole) == 2 * layer + states + 12 * 3 * 100
    assert pass_bytes(replace(of_few, recompute=True)) == 2 * 5 * 8 * 2 + states + layer + gradients


def test_logits_at_a_time_are_16_mib_or_128_rows() -> None:
    """Of the 128,256 words of Llama 3 128 rows in 16 bits, 31 MiB; of 32,000 16 MiB; and 4 MiB of them in float32."""

    def of(words: int, learned: int) -> float:
        steps = replace(COSTS.steps, largest_supervised=learned)
        return chunk_bytes(replace(COSTS, base=replace(BASE, vocabulary=words), steps=steps))

    assert of(128_256, 2000) == 128 * 128_256 * 2 + 2**22
    assert of(32_000, 2000) == 2**24 + 2**22
    assert of(32_000, 7) == 7 * 32_000 * (2 + 4)


def test_only_a_heap_has_holes() -> None:
    """A tenth of what is kept; two layers' tensors and gradients with recomputation; none on a GPU."""

    def holes(costs: Costs) -> float:
        held = peak_memory_gib(replace(costs, steps=replace(costs.steps, largest_pass=0, largest_supervised=0)))
        return (peak_memory_gib(costs) - held) * 2**30 - pass_bytes(costs)

    kept, gradients = 5 * kept_per_token(COSTS), 2 * 5 * (3 * 12 + 2 * 8)
    assert holes(COSTS) == pytest.approx(HOLES * kept, abs=1e-3)
    assert holes(replace(COSTS, recompute=True)) == pytest.approx(HOLES_IN_LAYERS * (kept / 2 + gradients), abs=1e-3)
    without = replace(COSTS, speedups=("attention", "layers", "head"))
    assert holes(without) == pytest.approx(HOLES_OF_COPIES * kept, abs=1e-3)
    assert holes(replace(COSTS, device="cuda")) == pytest.approx(0, abs=1e-3)


def test_weights_are_held_twice_only_where_that_is_so() -> None:
    linears, head = 2 * 480, BASE.vocabulary * BASE.hidden_size
    assert kept_weight_bytes(COSTS) == 4 * (linears + head)  # two layouts of 16 bits
    assert kept_weight_bytes(replace(COSTS, quantization="none")) == 4 * (linears + head)
    assert kept_weight_bytes(replace(COSTS, speedups=("linears", "weights"))) == 4 * linears
    assert kept_weight_bytes(replace(COSTS, dtype="float32")) == 4 * linears
    assert kept_weight_bytes(replace(COSTS, dtype="float32", quantization="none")) == 0
    assert kept_weight_bytes(replace(COSTS, device="cuda")) == 2 * linears
    assert kept_weight_bytes(replace(COSTS, quantization="int8")) == 4 * head
    assert kept_weight_bytes(replace(COSTS, speedups=("linears",))) == 0
    in_8_bits = 2 * linears + 2 * 96  # an MLP's second linear, of 8 x 12, is held in 16 bits forward
    assert kept_weight_bytes(replace(COSTS, compute="int8")) == in_8_bits + 4 * head
    assert kept_weight_bytes(replace(COSTS, compute="int8", speedups=("linears",))) == in_8_bits
    assert kept_weight_bytes(replace(COSTS, compute="fp8", device="cuda")) == in_8_bits
    stored = replace(COSTS, compute="fp8", device="cuda", quantization="none")  # where it is the base's own
    assert kept_weight_bytes(stored) == 2 * linears - 2 * 96


def test_experts_in_4_bits_are_kept_dequantised_unless_recomputed() -> None:
    shapes = tuple(ExpertShape(f"model.layers.{layer}.mlp.experts.gate_up_proj", 4, 24, 8) for layer in range(2))
    of_experts = replace(COSTS, base=replace(BASE, experts=shapes, parameters=BASE.parameters + 2 * 4 * 24 * 8))
    plain = replace(of_experts, quantization="none")
    assert pass_bytes(of_experts) - pass_bytes(plain) == 2 * 2 * 4 * 24 * 8
    again = [pass_bytes(replace(costs, recompute=True)) for costs in (of_experts, plain)]
    assert again[0] - again[1] == 2 * 4 * 24 * 8
    assert peak_memory_gib(of_experts) < peak_memory_gib(plain) + 2 * 2 * 4 * 24 * 8 / 2**30


def test_steps_are_counted_as_they_are_laid_out() -> None:
    tokens, learned = np.array([5, 3, 4, 2]), np.array([2, 1, 4, 1])
    found = count_steps_contents([[0, 1], [2, 3]], tokens, learned, tokens_per_pass=6)
    assert found == Steps(1.5, 7.0, 4.0, (25 + 9 + 16 + 4) / 2, 6, 5)


def test_the_machines_own_runtime_takes_the_place_of_the_usual_one() -> None:
    usual, measured = peak_memory_gib(COSTS), peak_memory_gib(COSTS, replace(EVEN, runtime_gib=7.0))
    assert measured - usual == pytest.approx(7.0 - 0.49)


def test_figures_are_found_again_only_where_they_hold(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert read_calibration(CPU) is None
    figures = {"products": {"float32": [[128, 1e9]], "bfloat16": [[128, 2e9]]}, "bytes_per_second": 1.0}
    figures |= {"operation_seconds": 1.0, "runtime_gib": 1.0, "import_seconds": 1.0}
    keep_calibration(CPU, figures)
    found = read_calibration(CPU)
    assert found is not None
    assert found.products["bfloat16"] == ((128, 2e9),)
    assert read_calibration(replace(CPU, cores=4)) is None
    assert read_calibration(replace(CPU, device_name="another")) is None
    assert read_calibration(replace(CPU, computes_in_8_bits="int8")) is None  # whose products were not measured


@pytest.mark.parametrize(
    "broken",
    [{"bytes_per_second": 0}, {"operation_seconds": -1}, {"runtime_gib": math.inf}, {"products": {}},
     {"import_seconds": "x"}, {"products": {"float32": [[512, 1e9], [128, 1e9]]}}, {"unknown": 1}],
)  # fmt: skip
def test_damaged_figures_are_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, broken: dict) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    figures = {"products": {"float32": [[128, 1e9]]}, "bytes_per_second": 1.0, "operation_seconds": 1.0}
    figures |= {"runtime_gib": 1.0, "import_seconds": 1.0}
    keep_calibration(CPU, figures)
    assert read_calibration(CPU) is not None
    keep_calibration(CPU, {**figures, **broken})
    assert read_calibration(CPU) is None
    calibration_file().write_text("[]")
    assert read_calibration(CPU) is None


def test_a_control_group_leaves_less_than_the_machine(tmp_path: Path) -> None:
    """Limit 1000, used 700 of which 100 are cache: 400 are left; the group above leaves 5000 - 800."""
    root, group = tmp_path / "fs", tmp_path / "cgroup"
    for path, limit, used, cached in (("a", 5000, 800, 0), ("a/b", 1000, 700, 100)):
        (root / path).mkdir(parents=True, exist_ok=True)
        (root / path / "memory.max").write_text(f"{limit}\n")
        (root / path / "memory.current").write_text(f"{used}\n")
        (root / path / "memory.stat").write_text(f"anon 5\ninactive_file {cached}\n")
    (root / "a" / "b" / "c").mkdir()
    (root / "a" / "b" / "c" / "memory.max").write_text("max\n")
    group.write_text("0::/a/b/c\n")
    assert sorted(_left_in_groups(root, group)) == [400, 4200]
    group.write_text("1:cpu:/a\n")
    assert _left_in_groups(root, group) == []
    old = root / "memory" / "x"
    old.mkdir(parents=True)
    (old / "memory.limit_in_bytes").write_text("300")
    (old / "memory.usage_in_bytes").write_text("200")
    (old / "memory.stat").write_text("total_inactive_file 50\n")
    group.write_text("4:memory:/x\n")
    assert _left_in_groups(root, group) == [150]


def test_free_memory_is_less_than_all_of_it() -> None:
    lines = Path("/proc/meminfo").read_text().splitlines()
    total_gib = int(next(line.split()[1] for line in lines if line.startswith("MemTotal"))) / 2**20
    found = free_memory_gib()
    assert found is not None
    assert 0 < found < total_gib


@pytest.mark.soak
def test_this_machine_can_be_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from finetune.calibration import calibrate
    from finetune.machine import probe_machine

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    machine = probe_machine()
    found = calibrate(machine)
    assert (machine.computes_in_8_bits or "float32") in found.products
    assert json.loads(calibration_file().read_text())["figures"]["runtime_gib"] == found.runtime_gib
    assert 0.1 < found.runtime_gib < 4
    assert 1e-8 < found.operation_seconds < 1e-3
    assert all(1e9 < rate < 1e16 for points in found.products.values() for _, rate in points)
