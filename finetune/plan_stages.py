"""What a run takes stage by stage: its costs in; GiB of load, step, evaluation, merge and disk, operations out."""

from __future__ import annotations

import math
from collections.abc import Mapping

from finetune.base import BaseFacts
from finetune.calibration import Calibration
from finetune.machine import GIB
from finetune.plan_cost import (
    ADAPTER_BYTES_PER_PARAMETER,
    DEQUANTISED_BYTES_MOVED,
    ELEMENT_BYTES,
    FOUR_BITS,
    RUNTIME_GIB,
    TRAINER_GIB,
    Costs,
    chunk_bytes,
    in_experts,
    in_linears,
    kept_per_token,
    kept_weight_bytes,
    operations_per_step,
    peak_memory_gib,
)

# A quantised block of 64 weights has a scale in 8 bits; 256 of those have one in 32 bits, and all of them a mean
# (double quantisation: QLoRA, arXiv:2305.14314, section 3).
BLOCK, SCALES_A_BLOCK = 64, 256
LAYERS_IN_PROOF = 2  # of the release and of base + adapter, in float32


def stored_weight_bytes(base: BaseFacts, *, quantization: str, element_bytes: int) -> int:
    """Bytes that the loaded base takes, to the byte: quantised linears and experts with their scales, the rest plain.

    Without the tables of 4-bit values, which all linears share: 1.1 KB each at most.
    """
    plain = base.parameters - in_linears(base) - in_experts(base)
    shapes = [(each.out_features, each.in_features) for each in base.linears]
    if quantization == "int8":
        quantised = sum(rows * columns + 4 * rows for rows, columns in shapes)
        return quantised + element_bytes * (plain + in_experts(base))
    if quantization not in FOUR_BITS:
        return element_bytes * base.parameters
    counts = [rows * columns for rows, columns in shapes]
    counts += [each.experts * each.out_features * each.in_features for each in base.experts]
    return sum(map(_four_bit_bytes, counts)) + element_bytes * plain


def _four_bit_bytes(count: int) -> int:
    """Of one tensor: two values a byte, its blocks' scales, their scales and the mean."""
    blocks = math.ceil(count / BLOCK)
    return math.ceil(count / 2) + blocks + 4 * math.ceil(blocks / SCALES_A_BLOCK) + 4


def stages_gib(costs: Costs, calibration: Calibration | None = None) -> dict[str, float]:
    """The most memory of the device that each stage takes; docs/planning.md derives the lines."""
    runtime = calibration.runtime_gib if calibration and costs.device == "cpu" else RUNTIME_GIB[costs.device]
    weights = stored_weight_bytes(costs.base, quantization=costs.quantization, element_bytes=_element(costs))
    training = weights + kept_weight_bytes(costs) + costs.stored * ADAPTER_BYTES_PER_PARAMETER[costs.optimizer]
    return {
        "load": runtime + (weights + _read_at_once(costs)) / GIB,
        "step": peak_memory_gib(costs, calibration),
        "evaluate": runtime + TRAINER_GIB[costs.device] + (training + _forward_bytes(costs)) / GIB,
        "merge": runtime + _merge_bytes(costs, weights) / GIB,
    }


def _element(costs: Costs) -> int:
    return ELEMENT_BYTES[costs.dtype]


def _read_at_once(costs: Costs) -> float:
    """Beside what is loaded already: the largest tensor before it is cut."""
    if costs.quantization == "none" and costs.device == "cpu":
        return 0  # the pages of the file are the weights
    base = costs.base
    largest = max((each.out_features * each.in_features for each in base.linears), default=0)
    of_experts = (each.experts * each.out_features * each.in_features for each in base.experts)
    return _element(costs) * max(largest, base.vocabulary * base.hidden_size, *of_experts, 0)


def _forward_bytes(costs: Costs) -> float:
    """A pass without gradients: the states of one layer, the rows that are scored, a chunk of logits."""
    base, tokens = costs.base, costs.steps.largest_pass
    layer = kept_per_token(costs) / max(base.layers, 1)
    return tokens * (layer + 2 * _element(costs) * base.hidden_size) + chunk_bytes(costs)


def _merge_bytes(costs: Costs, weights: int) -> float:
    """The proof's: the quantised base as it was trained on; else layers in float32, beside embedding and head."""
    base = costs.base
    inside = (in_linears(base) + in_experts(base)) / max(base.layers, 1)
    ends = base.vocabulary * base.hidden_size * (1 if base.tied_embeddings else 2)
    in_layers = 4 * (LAYERS_IN_PROOF * inside + ends)
    return in_layers if costs.quantization == "none" else max(weights, in_layers)


def disk_gib(base: BaseFacts, *, run_bytes: int) -> dict[str, float]:
    """The base as it is downloaded, the run folder at its fullest, and the merged release."""
    return {"base": base.stored_bytes / GIB, "run": run_bytes / GIB, "release": base.stored_bytes / GIB}


def operations_per_token(costs: Costs) -> float:
    """Floating-point operations of the products for one token of training: forward, backward, what is recomputed."""
    if not costs.steps.tokens:
        return 0.0
    return operations_per_step(costs) / costs.steps.tokens + sum(_expert_operations(costs).values())


def expert_seconds(costs: Costs, calibration: Calibration) -> float:
    """What the experts add to a step: the products of those that a token meets, and all of them dequantised."""
    products = sum(
        calibration.product_seconds(operations * costs.steps.tokens, dtype=costs.dtype, width=width)
        for width, operations in _expert_operations(costs).items()
    )
    if costs.quantization not in FOUR_BITS:
        return products
    moved = in_experts(costs.base) * DEQUANTISED_BYTES_MOVED * costs.steps.passes * (1 + costs.recompute)
    return products + moved / calibration.bytes_per_second


def _expert_operations(costs: Costs) -> Mapping[float, float]:
    """Of one token, by the width of the matrices: a product forward, one backward, one more where recomputed."""
    found: dict[float, float] = {}
    for each in costs.base.experts:
        size = each.in_features * each.out_features
        operations = 2 * size * costs.base.active_experts * (2 + costs.recompute)
        found[math.sqrt(size)] = found.get(math.sqrt(size), 0) + operations
    return found
