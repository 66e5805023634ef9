"""What keeps products in 8 bits (model.compute) from being had: recipe, machine and layout in; problems out."""

from __future__ import annotations

from collections.abc import Iterator

from finetune.adapter_plan import ROUTERS
from finetune.base import BaseFacts
from finetune.errors import Problem
from finetune.machine import Machine
from finetune.plan_layout import Layout
from finetune.recipe import Recipe

NEEDS = {
    "int8": "a CPU that multiplies 8-bit numbers (AVX512-VNNI, AVX-VNNI or AMX-INT8)",
    "fp8": "an NVIDIA GPU of compute capability 8.9 or newer",
}
FLOAT8_MULTIPLE = 16  # of a weight's sizes, which cuBLAS wants


def compute_problems(recipe: Recipe, machine: Machine, base: BaseFacts, layout: Layout, *, dtype: str) -> list[Problem]:
    """Everything that keeps this recipe from model.compute: int8 or fp8 on this machine; none where it is auto."""
    if recipe.model.compute == "auto":
        return []
    reasons = _reasons(recipe, machine, base, layout, dtype)
    return [Problem("model.compute", f"{recipe.model.compute} {reason}, or leave it auto") for reason in reasons]


def _reasons(recipe: Recipe, machine: Machine, base: BaseFacts, layout: Layout, dtype: str) -> Iterator[str]:
    asked = recipe.model.compute
    if asked != machine.computes_in_8_bits:
        other = machine.computes_in_8_bits
        yield f"needs {NEEDS[asked]}; " + (f"write {other} here" if other else f"{machine.device_name} has none")
    if dtype != "bfloat16":
        yield f"stands beside products in bfloat16, and model.dtype is {dtype} here; write bfloat16"
    if recipe.model.quantization == "int8":
        yield "is not for a base that bitsandbytes multiplies in 8 bits; write model.quantization: nf4 or none"
    if recipe.adapter.method not in ("lora", "rslora"):
        yield f"is for linears with a plain LoRA, and adapter.method is {recipe.adapter.method}; write lora or rslora"
    if recipe.adapter.dropout:
        yield "is computed by our own linears, which have no adapter.dropout; write 0"
    if "linears" not in layout.speedups:
        yield "is computed by our own linears; let train.speedups have linears"
    odd = [each for each in base.linears if each.in_features % FLOAT8_MULTIPLE or each.out_features % FLOAT8_MULTIPLE]
    if asked == "fp8" and (odd := [each for each in odd if each.leaf not in ROUTERS]):
        shape = f"{odd[0].leaf} has {odd[0].out_features} x {odd[0].in_features}"
        yield f"multiplies sizes that are multiples of {FLOAT8_MULTIPLE}, and {shape}; take another base"
