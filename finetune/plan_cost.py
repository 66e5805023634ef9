"""What a run costs: its shapes, its layout and the machine's figures in; GiB and seconds out. Arithmetic only.

docs/planning.md derives each line; benchmarks/plan_accuracy.py compares with real runs.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from finetune.base import BaseFacts
from finetune.calibration import Calibration
from finetune.layout import cut_into_passes
from finetune.machine import GIB

# Bits a frozen weight takes. NF4, double quantised: 4 + 8/64 + 32/(64*256) (QLoRA, arXiv:2305.14314, section 3).
STORED_BITS = {"nf4": 4.127, "fp4": 4.127, "int8": 8.0}
FOUR_BITS = ("nf4", "fp4")
ADAPTER_BYTES_PER_PARAMETER = {"adamw": 16, "adamw-8bit": 10, "paged-adamw-8bit": 10}  # weight, gradient, two moments
ELEMENT_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
RUNTIME_GIB = {"cpu": 0.49, "cuda": 1.2}  # the libraries, before a weight is loaded; a calibration measures it
# What training adds: trainer and tokenizer, oneDNN's programs for the last passes' products, small objects' heap.
TRAINER_GIB = {"cpu": 0.2, "cuda": 0.1}
# Holes in C's heap, which nothing fits into until they are returned (machine.py, settle_memory): of what a pass
# keeps, where our own functions compute and where PEFT's make copies; with recomputation, how many layers' tensors come
# and go beside it.
HOLES, HOLES_OF_COPIES, HOLES_IN_LAYERS = 0.15, 0.9, 2.0
# Of logits that exist at a time, in the precision of the product (finetune/model/fast/head.py takes them from here); on
# a CPU more than half its third cache costs a quarter of the head's time (measured with 32 MiB of it).
CHUNK_BYTES = {"cpu": 2**24, "cuda": 2**28}
FEWEST_ROWS = 128  # of a chunk: fewer would read the head's weight too often
SLICE_BYTES = {"cpu": 2**21, "cuda": 2**27}  # of it that are worked on at a time, where torch makes copies in float32
GATHERED_LOGITS_BYTES = 12  # without: log-softmax and two gradients in float32, where backward begins
# Found by comparing with real runs (benchmarks/plan_accuracy.py): how much slower than square products of their width
# the thin products of a LoRA and those of attention are; how often what a layer keeps is read or written by everything
# that is no product; bytes moved by an entry of the logits, by a weight that is dequantised, by the optimizer.
THIN, ATTENTION = 1.0, 2.0
MOVED, MOVED_AGAIN = 3.0, 1.0
DEQUANTISED_BYTES_MOVED, OPTIMIZER_BYTES_MOVED = 20.0, 60.0
LOGIT_BYTES_MOVED = {"cpu": 60.0, "cuda": 20.0}  # an exponential and its gradient take a core as long as so many bytes
OPERATIONS_PER_LAYER, OPERATIONS_PER_STEP = 300.0, 3000.0
OPERATIONS_PER_PASS = {"cpu": 4000.0, "cuda": 500.0}  # on a CPU oneDNN writes programs for products of a new length
EXACT_FORWARD = "down_proj"  # whose product forward is exact in 8 bits, too (finetune/model/fast/eight_bit.py)
TO_RESIDUAL = ("o_proj", "down_proj")  # linears whose output is added to the layer's input, and not kept by itself


@dataclass(frozen=True)
class Steps:
    """What the steps of a run hold on average, and its largest pass; counts of tokens."""

    passes: float
    tokens: float
    supervised: float
    pairs: float  # the sum of the squared lengths of a step's examples
    largest_pass: int
    largest_supervised: int


@dataclass(frozen=True)
class Costs:
    """What is trained, and how; `ranks` is the sum of the ranks of all adapted linears."""

    base: BaseFacts
    quantization: str
    dtype: str
    device: str
    optimizer: str
    trainable: int
    stored: int  # parameters that the optimizer holds
    ranks: int
    recompute: bool
    speedups: tuple[str, ...]
    steps: Steps
    compute: str = "auto"  # model.compute


def count_steps_contents(
    layout: Sequence[Sequence[int]], tokens: np.ndarray, supervised: np.ndarray, *, tokens_per_pass: int
) -> Steps:
    """What the steps of `layout` (the numbers of their examples) hold; `tokens` and `supervised` are by example."""
    passes, largest, largest_supervised, pairs = 0, 0, 0, 0
    for step in layout:
        lengths = tokens[list(step)]
        pairs += int((lengths.astype(np.int64) ** 2).sum())
        for members in cut_into_passes(lengths.tolist(), tokens_per_pass=tokens_per_pass):
            passes += 1
            largest = max(largest, int(lengths[members].sum()))
            largest_supervised = max(largest_supervised, int(supervised[list(step)][members].sum()))
    every = [number for step in layout for number in step]
    count = max(len(layout), 1)
    totals = (passes, int(tokens[every].sum()), int(supervised[every].sum()), pairs)
    means = [total / count for total in totals]
    return Steps(means[0], means[1], means[2], means[3], largest, largest_supervised)


# --- memory ---


def peak_memory_gib(costs: Costs, calibration: Calibration | None = None) -> float:
    """The most memory a run holds: libraries, weights, adapter, and what the largest pass keeps for its gradients."""
    runtime = calibration.runtime_gib if calibration and costs.device == "cpu" else RUNTIME_GIB[costs.device]
    held = _weight_bytes(costs) + costs.stored * ADAPTER_BYTES_PER_PARAMETER[costs.optimizer]
    holes = _heap_holes_bytes(costs) if costs.device == "cpu" else 0
    return runtime + TRAINER_GIB[costs.device] + (held + pass_bytes(costs) + holes) / GIB


def kept_weight_bytes(costs: Costs) -> int:
    """What is held beside the model for its products.

    With `weights` on a CPU 16-bit weights twice (one layout a product), others once; weights in 8 bits twice in any
    case, the exact one of an MLP's second linear in the place of one of them.
    """
    linears = 0 if costs.quantization == "int8" or costs.compute != "auto" else in_linears(costs.base)
    in_8_bits = _bytes_in_8_bits(costs)
    if "weights" not in costs.speedups:
        return in_8_bits
    if costs.device == "cpu" and costs.dtype == "bfloat16":
        head = costs.base.vocabulary * costs.base.hidden_size if "head" in costs.speedups else 0
        return in_8_bits + 4 * (linears + head)
    return in_8_bits + (ELEMENT_BYTES[costs.dtype] * linears if costs.quantization in FOUR_BITS else 0)


def _bytes_in_8_bits(costs: Costs) -> int:
    if costs.compute == "auto":
        return 0
    exact = sum(each.in_features * each.out_features for each in costs.base.linears if each.leaf == EXACT_FORWARD)
    held = costs.device == "cpu" or costs.quantization in FOUR_BITS
    return 2 * in_linears(costs.base) + (exact if held else -exact)


def _weight_bytes(costs: Costs) -> float:
    element = ELEMENT_BYTES[costs.dtype]
    linears = in_linears(costs.base)
    bits = STORED_BITS.get(costs.quantization, 8 * element)
    experts = in_experts(costs.base) if costs.quantization in FOUR_BITS else 0
    others = costs.base.parameters - linears - experts
    return (linears + experts) * bits / 8 + others * element + kept_weight_bytes(costs)


def pass_bytes(costs: Costs) -> float:
    """What the largest pass keeps until its gradients are computed, and what the first of these take at once."""
    tokens, element = costs.steps.largest_pass, ELEMENT_BYTES[costs.dtype]
    states, logits = _head_bytes(costs)
    gradients = tokens * _gradients_per_token(costs)
    kept = tokens * kept_per_token(costs)
    if costs.recompute:
        gradients += kept / max(costs.base.layers, 1)
        kept = tokens * element * costs.base.hidden_size * costs.base.layers
    return kept + states + max(logits, gradients) + _dequantised_experts_bytes(costs)


def _heap_holes_bytes(costs: Costs) -> float:
    """What passes of unequal lengths leave free in the heap; tensors over 32 MiB lie outside of it (glibc)."""
    tokens, kept = costs.steps.largest_pass, costs.steps.largest_pass * kept_per_token(costs)
    if costs.recompute:
        return HOLES_IN_LAYERS * (kept / max(costs.base.layers, 1) + tokens * _gradients_per_token(costs))
    return kept * (HOLES if "linears" in costs.speedups else HOLES_OF_COPIES)


def _dequantised_experts_bytes(costs: Costs) -> float:
    """Experts in 4 bits are dequantised where they are read, and kept until the gradients of their layer."""
    if costs.quantization not in FOUR_BITS or not costs.base.experts:
        return 0
    layers = len({shape.parameter.rpartition(".")[0] for shape in costs.base.experts})
    return in_experts(costs.base) * ELEMENT_BYTES[costs.dtype] / (layers if costs.recompute else 1)


def kept_per_token(costs: Costs) -> float:
    """Bytes that all layers keep of one token: the inputs of norms, products, attention and gate."""
    base, element = costs.base, ELEMENT_BYTES[costs.dtype]
    back = [each for each in base.linears if each.leaf in TO_RESIDUAL]
    others = sum(each.out_features for each in base.linears if each.leaf not in TO_RESIDUAL)
    elements = 4 * base.hidden_size * base.layers + sum(each.in_features for each in back) + others + costs.ranks
    elements += sum(shape.in_features + shape.out_features for shape in base.experts)  # of one expert a token
    return element * elements + _kept_by_libraries(costs)


def _kept_by_libraries(costs: Costs) -> float:
    """What the libraries' code keeps besides, where ours is left out."""
    base, element, kept = costs.base, ELEMENT_BYTES[costs.dtype], 0.0
    attended, gated = (sum(each.in_features for each in base.linears if each.leaf == leaf) for leaf in TO_RESIDUAL)
    if "layers" not in costs.speedups:  # the norms' inputs in float32, and the gate's activation
        kept += 2 * base.layers * base.hidden_size * (4 - element) + element * gated
    if "attention" not in costs.speedups:  # what each document attended, before it is laid with the others
        kept += element * attended
    if "linears" not in costs.speedups and costs.quantization not in FOUR_BITS:
        # PEFT casts an input once for each linear that reads it: q, k and v, gate and up.
        read = sum(each.in_features for each in base.linears)
        kept += element * (read - 2 * base.hidden_size * base.layers - attended - gated)
    return kept


def in_experts(base: BaseFacts) -> int:
    """Parameters of the experts, which are no linear modules."""
    return sum(shape.experts * shape.in_features * shape.out_features for shape in base.experts)


def in_linears(base: BaseFacts) -> int:
    """Parameters of the linear modules inside the layers."""
    return sum(linear.in_features * linear.out_features for linear in base.linears)


def _gradients_per_token(costs: Costs) -> float:
    """Bytes at once in the backward pass of one layer: gradients of gate, up, their product, and of both ends."""
    widest = max((each.in_features for each in costs.base.linears if each.leaf in TO_RESIDUAL), default=0)
    return ELEMENT_BYTES[costs.dtype] * (3 * widest + 2 * costs.base.hidden_size)


def _head_bytes(costs: Costs) -> tuple[float, float]:
    """Of the last states, the rows that predict with their gradients; and the logits: a chunk, or all of them."""
    rows, element, hidden = costs.steps.largest_supervised, ELEMENT_BYTES[costs.dtype], costs.base.hidden_size
    states = element * hidden * (costs.steps.largest_pass + 2 * rows)
    if "head" not in costs.speedups:
        return states, rows * costs.base.vocabulary * GATHERED_LOGITS_BYTES
    return states, chunk_bytes(costs)


def chunk_bytes(costs: Costs) -> float:
    """The logits that exist at a time."""
    element, vocabulary, rows = ELEMENT_BYTES[costs.dtype], costs.base.vocabulary, costs.steps.largest_supervised
    most = max(CHUNK_BYTES[costs.device], FEWEST_ROWS * vocabulary * element) + 2 * SLICE_BYTES[costs.device]
    return min(most, rows * vocabulary * (element + 4))


# --- time ---


def seconds_per_step(costs: Costs, calibration: Calibration) -> float:
    """Of an average step, on a machine that has nothing else to do."""
    products = sum(
        calibration.product_seconds(operations, dtype=dtype, width=width)
        for operations, width, dtype in step_products(costs)
    )
    moved = step_bytes(costs) / calibration.bytes_per_second
    return products + moved + _operations(costs) * calibration.operation_seconds


def step_products(costs: Costs) -> Iterator[tuple[float, float, str]]:
    """Operations of a step, each with its matrices' width and what it is computed in: linears, LoRA, attention, head.

    A frozen weight has a product forward and one backward, none for its own gradient; the two matrices of a LoRA have
    one forward and two backward. Attention sees half of all pairs, and computes its scores again for the gradients.
    """
    base, steps, again, dtype = costs.base, costs.steps, int(costs.recompute), costs.dtype
    for linear in base.linears:
        operations = 2 * linear.in_features * linear.out_features * steps.tokens
        width = math.sqrt(linear.in_features * linear.out_features)
        exact = 2 + again if costs.compute == "auto" else 1 + again if linear.leaf == EXACT_FORWARD else 0
        yield operations * exact, width, dtype
        if exact < 2 + again:
            yield operations * (2 + again - exact), width, costs.compute
    yield 2 * costs.trainable * steps.tokens * (3 + again) * THIN, base.hidden_size, dtype
    for linear in base.linears:
        if linear.leaf in TO_RESIDUAL[:1]:
            yield 2 * linear.in_features * steps.pairs * (1 + 2.5 + again) * ATTENTION, linear.in_features, dtype
    width = math.sqrt(base.vocabulary * base.hidden_size)
    yield 4 * base.vocabulary * base.hidden_size * steps.supervised, width, dtype


def operations_per_step(costs: Costs) -> float:
    """Floating-point operations of a step's products, as textbooks count them."""
    base, steps, again = costs.base, costs.steps, int(costs.recompute)
    linears = 2 * in_linears(base) * steps.tokens * (2 + again)
    lora = 2 * costs.trainable * steps.tokens * (3 + again)
    width = sum(linear.in_features for linear in base.linears if linear.leaf in TO_RESIDUAL[:1])
    attention = 2 * width * steps.pairs * (1 + 2.5 + again)
    return linears + lora + attention + 4 * base.vocabulary * base.hidden_size * steps.supervised


def step_bytes(costs: Costs) -> float:
    """Bytes that a step's simple operations read and write."""
    kept = kept_per_token(costs) * (MOVED + MOVED_AGAIN * costs.recompute)
    logits = costs.steps.supervised * costs.base.vocabulary * LOGIT_BYTES_MOVED[costs.device]
    weights = 0.0
    if "weights" not in costs.speedups and costs.quantization in FOUR_BITS and costs.compute == "auto":
        weights = costs.steps.passes * in_linears(costs.base) * (2 + costs.recompute) * DEQUANTISED_BYTES_MOVED
    return costs.steps.tokens * kept + logits + weights + costs.stored * OPTIMIZER_BYTES_MOVED


def _operations(costs: Costs) -> float:
    """How many small operations a step takes, however little each computes."""
    layers = costs.base.layers * OPERATIONS_PER_LAYER * (1 + costs.recompute / 2)
    return costs.steps.passes * (layers + OPERATIONS_PER_PASS[costs.device]) + OPERATIONS_PER_STEP
