"""What adapters that are no LoRA change: the settings and tensors of an IA3, VeRA or OFT in, changes by parameter out.

Each change is the weight that PEFT's own forward amounts to, written in float64 from the trained values.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch

from finetune.base import TensorEntry
from finetune.errors import Problem, StorageError
from finetune.release.adapter_file import Parts
from finetune.release.delta import Change, Delta, Rotated, Scaled

Find = Callable[[str], TensorEntry | None]  # the stored tensor of a parameter


def other_changes(config: Mapping[str, Any], modules: Mapping[str, Parts], find: Find) -> Iterator[tuple[str, Change]]:
    """The changes of a whole adapter, by parameter.

    Raises:
        StorageError: a part of the adapter is missing.
    """
    tensors = {module: parts.trained for module, parts in modules.items()}
    if config["peft_type"] == "VERA":
        shared = tensors.pop("base_model", {})
        for module, parts in tensors.items():
            yield f"{module}.weight", _random_projection(module, shared | parts, find(f"{module}.weight"))
        return
    for module, parts in tensors.items():
        if config["peft_type"] == "OFT":
            path = module.removesuffix(".oft_R")
            yield f"{path}.weight", Rotated(cayley(_part(module, parts, "weight"), int(config["oft_block_size"])))
        else:
            yield from _scales(module, _part(module, parts, "ia3_l"), find)


def cayley(skew_NK: torch.Tensor, size: int) -> torch.Tensor:
    """Rotations [blocks, size, size], float64: (1 - Q) (1 + Q)^-1 of antisymmetric matrices from their upper halves.

    PEFT tuners/oft/layer.py, OFTRotationModule._cayley_batch; OFT: arXiv:2306.07280, section 3.
    """
    upper, lower = torch.triu_indices(size, size, 1)
    if skew_NK.dim() != 2 or skew_NK.shape[1] != len(upper):
        raise StorageError(Problem("oft_R", f"{list(skew_NK.shape)} does not fit blocks of {size}; train it again"))
    q_NSS = torch.zeros(skew_NK.shape[0], size, size, dtype=torch.float64)
    q_NSS[:, upper, lower] = skew_NK.double()
    q_NSS = q_NSS - q_NSS.transpose(1, 2)
    one = torch.eye(size, dtype=torch.float64)
    return torch.linalg.solve(one + q_NSS, one - q_NSS, left=False)


def _random_projection(module: str, parts: Mapping[str, torch.Tensor], weight: TensorEntry | None) -> Delta:
    """VeRA (arXiv:2310.11454, equation 2): diag(b) B diag(d) A, of the shared A and B as much as the module needs."""
    a_RI, b_OR = _part(module, parts, "vera_A").double(), _part(module, parts, "vera_B").double()
    d_R, factors_O = _part(module, parts, "vera_lambda_d").double(), _part(module, parts, "vera_lambda_b").double()
    inputs = weight.shape[1] if weight else a_RI.shape[1]
    return Delta(d_R[:, None] * a_RI[:, :inputs], factors_O[:, None] * b_OR[: len(factors_O)], None, 1.0)


def _scales(module: str, factors: torch.Tensor, find: Find) -> Iterator[tuple[str, Change]]:
    """IA3 (arXiv:2205.05638, section 3.3): factors of the outputs stand in a column, those of the inputs in a row."""
    of_rows = factors.shape[-1] == 1
    weight, bias = find(f"{module}.weight"), find(f"{module}.bias")
    other = weight.shape[1 if of_rows else 0] if weight else 1
    shape = (factors.numel(), other) if of_rows else (other, factors.numel())
    yield f"{module}.weight", Scaled(factors.flatten(), of_rows, shape)
    if bias and of_rows:
        yield f"{module}.bias", Scaled(factors.flatten(), False, bias.shape)


def _part(module: str, parts: Mapping[str, torch.Tensor], name: str) -> torch.Tensor:
    if name not in parts:
        raise StorageError(Problem(module, f"{name} is missing; the adapter is incomplete"))
    return parts[name]
