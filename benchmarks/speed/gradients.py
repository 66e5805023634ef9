"""Gradients of every A and B, our pass in bfloat16 against plain transformers and PEFT in float32; one JSON line.

python benchmarks/speed/gradients.py RECIPE
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F

from benchmarks.speed.plain import plain_model
from benchmarks.speed.ready import add_gradients, ready
from finetune.data.examples import Example
from finetune.machine import quiet_libraries

ROWS = 8
Gradients = dict[str, torch.Tensor]


def gradients_of(model: torch.nn.Module) -> Gradients:
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad and p.grad is not None}


def set_adapter(model: torch.nn.Module) -> None:
    """The same random A and B in every model; a module's tensors depend on its name only."""
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            generator = torch.Generator().manual_seed(sum(map(ord, name)) * 1009 + len(name))
            parameter.data = 0.05 * torch.randn(parameter.shape, generator=generator)


def plain_gradients(model: torch.nn.Module, examples: Sequence[Example]) -> Gradients:
    """In float32, row by row: the sum of all cross entropies over the number of supervised tokens."""
    supervised = sum(example.supervised_tokens for example in examples)
    for example in examples:
        ids = torch.from_numpy(example.ids).long()[None]
        labels = torch.from_numpy(example.labels).long()
        logits = model(input_ids=ids, use_cache=False).logits[0]
        (F.cross_entropy(logits[:-1].float(), labels[1:], reduction="sum") / supervised).backward()
    return gradients_of(model)


def cosine(one: torch.Tensor, other: torch.Tensor) -> float:
    return F.cosine_similarity(one.double().flatten(), other.double().flatten(), dim=0).item()


def main() -> None:
    """Print the cosine and the relative error of every tensor's gradient, with our own pieces and without."""
    quiet_libraries()
    recipe = Path(sys.argv[1])
    found: dict[str, Gradients] = {}
    for way in ("auto", "none"):
        model, resolved = ready(recipe, f"train.speedups={way}", "train.tokens_per_pass=1000000")
        set_adapter(model)
        examples = [resolved.data.train[index] for index in range(ROWS)]
        add_gradients(model, resolved, examples)
        found[way] = gradients_of(model)
    reference = plain_model(resolved, torch.float32)
    set_adapter(reference)
    expected = plain_gradients(reference, examples)
    assert all(each.keys() == expected.keys() for each in found.values())
    print(
        json.dumps(
            {
                "cosines": {way: {n: cosine(g, expected[n]) for n, g in each.items()} for way, each in found.items()},
                "relative_errors": {
                    way: {n: ((g - expected[n]).norm() / expected[n].norm()).item() for n, g in each.items()}
                    for way, each in found.items()
                },
            }
        )
    )


if __name__ == "__main__":
    main()
