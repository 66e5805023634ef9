"""Causal attention over documents on CUDA: torch's variable-length attention, a prefix's keys before the own ones."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import cache, lru_cache
from itertools import accumulate
from typing import Any

import torch

from finetune.model.fast.documents import Documents

LARGEST_HEAD = 256
Varlen = Callable[..., torch.Tensor]

# H = query heads, G = key/value heads, T = tokens, K = keys with every prefix repeated, D = head size


@cache
def torch_varlen() -> Varlen | None:
    """torch's varlen_attn, or None where it is missing or cannot scale and mask (before torch 2.11)."""
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        return None
    found: Varlen = varlen_attn  # type: ignore[assignment]
    return found if {"scale", "window_size"} <= set(inspect.signature(found).parameters) else None


def can_attend_varlen(query_BHTD: torch.Tensor, key_BGTD: torch.Tensor, value_BGTD: torch.Tensor) -> bool:
    """Whether torch's kernel computes these: 16-bit numbers of an equal head size on a GPU from Ampere on."""
    size = query_BHTD.shape[-1]
    return (
        query_BHTD.device.type == "cuda"
        and torch.version.hip is None
        and torch_varlen() is not None
        and query_BHTD.dtype in (torch.bfloat16, torch.float16)
        and query_BHTD.dtype == key_BGTD.dtype == value_BGTD.dtype
        and query_BHTD.shape[0] == 1
        and query_BHTD.shape[2] == key_BGTD.shape[2]
        and key_BGTD.shape == value_BGTD.shape
        and size % 8 == 0
        and size <= LARGEST_HEAD
        and torch.cuda.get_device_capability(query_BHTD.device) >= (8, 0)
    )


def attend_varlen(  # noqa: PLR0913 - what attention takes, and the kernel
    query_BHTD: torch.Tensor,
    key_BGTD: torch.Tensor,
    value_BGTD: torch.Tensor,
    documents: Documents,
    scale: float,
    kernel: Varlen | None = None,
) -> torch.Tensor:
    """The attended values [1, T, H, D]: a query sees its document up to itself, and all of its document's prefix.

    The kernel aligns its causal mask at the ends: the last query of a document sees all of its keys. So a prefix that
    lies before the own keys is seen whole.
    """
    kernel = kernel or torch_varlen()
    assert kernel is not None
    query_THD, key_KGD, value_KGD = (t[0].transpose(0, 1) for t in (query_BHTD, key_BGTD, value_BGTD))
    if any(documents.prefix_lengths):
        key_KGD, value_KGD = _WithPrefixes.apply(key_KGD, documents), _WithPrefixes.apply(value_KGD, documents)
    queries, keys = (_boundaries(counts, query_THD.device) for counts in (documents.lengths, documents.seen))
    grouped = {"enable_gqa": True} if "enable_gqa" in inspect.signature(kernel).parameters else {}
    most = max(documents.lengths), max(documents.seen)
    return kernel(
        query_THD, key_KGD, value_KGD, queries, keys, *most, scale=scale, window_size=(-1, 0), **grouped
    )[None]  # fmt: skip


@lru_cache(maxsize=4)
def _boundaries(lengths: tuple[int, ...], device: torch.device) -> torch.Tensor:
    """Where documents begin, and the end, int32; made once for all layers of a pass, without waiting for the GPU."""
    with torch.inference_mode(False):  # kept, and a training pass saves it for its gradient
        starts = torch.tensor([0, *accumulate(lengths)], dtype=torch.int32)
        return starts.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else starts


class _WithPrefixes(torch.autograd.Function):
    """Every document's rows after a copy of its prefix's; the gradients of copies are summed in float32, in order."""

    @staticmethod
    def forward(ctx: Any, rows_TGD: torch.Tensor, documents: Documents) -> torch.Tensor:
        ctx.documents = documents
        pieces = rows_TGD.split(documents.lengths)
        laid = []
        for own, prefix in zip(pieces, documents.prefixes, strict=True):
            laid += [pieces[prefix], own] if prefix >= 0 else [own]
        return torch.cat(laid)

    @staticmethod
    def backward(ctx: Any, grad_KGD: torch.Tensor) -> tuple[torch.Tensor, None]:  # type: ignore[override]
        documents: Documents = ctx.documents
        own, copies = [], []
        for piece, before in zip(grad_KGD.split(documents.seen), documents.prefix_lengths, strict=True):
            copies.append(piece[:before])
            own.append(piece[before:])
        for first, *followers in documents.families:
            if followers:
                all_uses = torch.stack([own[first], *(copies[number] for number in followers)])
                own[first] = all_uses.sum(0, dtype=torch.float32).to(grad_KGD.dtype)
        return torch.cat(own), None
