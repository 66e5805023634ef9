"""What keeps products in 8 bits (model.compute) from being had: recipe, machine and layout in; problems out."""

from __future__ import annotations

from collections.abc import Iterator

from finetune.errors import Problem
from finetune.machine import Machine
from finetune.plan_layout import Layout
from finetune.recipe import Recipe

NEEDS = {
    "int8": "a CPU that multiplies 8-bit numbers (AVX512-VNNI, AVX-VNNI or AMX-INT8)",
    "fp8": "an NVIDIA GPU of compute capability 8.9 or newer",
}


def compute_problems(recipe: Recipe, machine: Machine, layout: Layout, *, dtype: str) -> list[Problem]:
    """Everything that keeps this recipe from model.compute: int8 or fp8 on this machine; none where it is auto."""
    asked = recipe.model.compute
    if asked == "auto":
        return []
    return [
        Problem("model.compute", f"{asked} {reason}, or leave it auto")
        for reason in _reasons(recipe, machine, layout, dtype)
    ]


def _reasons(recipe: Recipe, machine: Machine, layout: Layout, dtype: str) -> Iterator[str]:
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
