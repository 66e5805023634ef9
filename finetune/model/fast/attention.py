"""Causal attention over documents that lie end to end, by our own compiled code: attention.c called, with gradients."""

from __future__ import annotations

import ctypes
from functools import cache
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch

from finetune.model.fast.documents import Documents
from finetune.model.fast.native import Unavailable, load_library

SOURCE = Path(__file__).with_name("attention.c")
LARGEST_HEAD = 256

# B = 1, H = query heads, G = key/value heads, T = tokens, D = head size


class _Tensor(ctypes.Structure):
    _fields_ = (("data", ctypes.c_void_p), ("token", ctypes.c_int64), ("head", ctypes.c_int64))


class _Document(ctypes.Structure):
    _fields_ = tuple((name, ctypes.c_int64) for name in ("start", "length", "prefix_start", "prefix_length"))


TENSORS = ("query", "key", "value", "out", "grad_out", "grad_query", "grad_key", "grad_value")


class _Attention(ctypes.Structure):
    _fields_ = (
        *((name, _Tensor) for name in TENSORS),
        ("lse", ctypes.c_void_p),
        ("documents", ctypes.POINTER(_Document)),
        ("roots", ctypes.POINTER(ctypes.c_int64)),
        ("members", ctypes.POINTER(ctypes.c_int64)),
        *((name, ctypes.c_int64) for name in ("tasks", "tokens", "query_heads", "key_heads", "head_size")),
        ("scale", ctypes.c_float),
        ("threads", ctypes.c_int32),
    )


@cache
def compiled() -> ctypes.CDLL | str:
    """The compiled attention, or why there is none; compiled when first asked for."""
    try:
        return load_library(source=SOURCE)
    except Unavailable as reason:
        return str(reason)


def can_attend(query_BHTD: torch.Tensor, key_BGTD: torch.Tensor, value_BGTD: torch.Tensor) -> bool:
    """Whether the compiled code computes these: on a CPU, one row, equal types, a head size it has room for."""
    size = query_BHTD.shape[-1]
    return (
        query_BHTD.device.type == "cpu"
        and query_BHTD.shape[0] == 1
        and query_BHTD.shape[2] == key_BGTD.shape[2]
        and query_BHTD.shape[1] % key_BGTD.shape[1] == 0
        and key_BGTD.shape == value_BGTD.shape
        and size <= LARGEST_HEAD
        and query_BHTD.dtype == key_BGTD.dtype == value_BGTD.dtype
        and query_BHTD.dtype in (torch.bfloat16, torch.float32)
    )


def attend(
    query_BHTD: torch.Tensor, key_BGTD: torch.Tensor, value_BGTD: torch.Tensor, documents: Documents, scale: float
) -> torch.Tensor:
    """The attended values [1, T, H, D]: a query sees its document up to itself, and all of its document's prefix.

    For the backward pass the inputs, the output and one float per head and token are kept.

    Raises:
        MemoryError: there was no room for the blocks of a document.
    """
    return _Attend.apply(query_BHTD, key_BGTD, value_BGTD, documents, scale)  # type: ignore[no-any-return]


class _Attend(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, documents: Documents, scale: float
    ) -> torch.Tensor:
        tensors = {"query": _rows(query), "key": _rows(key), "value": _rows(value)}
        _, heads, tokens, size = query.shape
        out_BTHD = query.new_empty(1, tokens, heads, size)
        lse_HT = query.new_empty(heads, tokens, dtype=torch.float32)
        _call("attention_forward", {**tensors, "out": out_BTHD.transpose(1, 2)}, lse_HT, documents, scale)
        ctx.save_for_backward(*tensors.values(), out_BTHD, lse_HT)
        ctx.layout = documents, scale
        return out_BTHD

    @staticmethod
    def backward(ctx: Any, grad_BTHD: torch.Tensor) -> tuple[torch.Tensor | None, ...]:  # type: ignore[override]
        query, key, value, out_BTHD, lse_HT = ctx.saved_tensors
        grads = {f"grad_{name}": _empty_rows(of) for name, of in (("query", query), ("key", key), ("value", value))}
        given = {"query": query, "key": key, "value": value, "out": out_BTHD.transpose(1, 2)}
        grad_out = _rows(grad_BTHD.to(query.dtype).transpose(1, 2))
        _call("attention_backward", {**given, "grad_out": grad_out, **grads}, lse_HT, *ctx.layout)
        return *grads.values(), None, None


def _call(
    name: str, tensors: dict[str, torch.Tensor], lse_HT: torch.Tensor, documents: Documents, scale: float
) -> None:
    """Run one of the two entries of attention.c on tensors [1, heads, T, D] whose last axis is dense."""
    library = compiled()
    assert not isinstance(library, str), library
    query = tensors["query"]
    starts, families = documents.starts, documents.families
    laid = [
        _Document(start, length, starts[prefix] if before else 0, before)
        for start, length, prefix, before in zip(
            starts, documents.lengths, documents.prefixes, documents.prefix_lengths, strict=True
        )
    ]
    members = [number for family in families for number in family]
    roots = list(accumulate(map(len, families), initial=0))
    arguments = _Attention(
        **{field: _Tensor(of.data_ptr(), of.stride(2), of.stride(1)) for field, of in tensors.items()},
        lse=lse_HT.data_ptr(),
        documents=(_Document * len(laid))(*laid),
        roots=(ctypes.c_int64 * len(roots))(*roots),
        members=(ctypes.c_int64 * len(members))(*members),
        tasks=len(families) if name == "attention_backward" else len(laid),
        tokens=query.shape[2],
        query_heads=query.shape[1],
        key_heads=tensors["key"].shape[1],
        head_size=query.shape[3],
        scale=scale,
        threads=torch.get_num_threads(),
    )
    run = library[name]
    run.restype = ctypes.c_int64
    if run(ctypes.byref(arguments), ctypes.c_int32(query.dtype == torch.bfloat16)):
        raise MemoryError(f"{name}: no room for the blocks of a document of {max(documents.seen)} tokens")


def _rows(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor, copied if a head's numbers do not lie side by side."""
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()


def _empty_rows(like: torch.Tensor) -> torch.Tensor:
    """Room for [1, heads, T, D] that lies as [1, T, heads, D], as a linear module's output does."""
    _, heads, tokens, size = like.shape
    return like.new_empty(1, tokens, heads, size).transpose(1, 2)
