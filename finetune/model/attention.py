"""Attention over documents that lie end to end: each one is attended alone, so no mask of the whole stretch is made."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from transformers import AttentionInterface, PreTrainedModel

from finetune.model.fast.attention import attend, can_attend, compiled
from finetune.model.fast.documents import Documents
from finetune.model.fast.swapped import Swapped
from finetune.model.fast.varlen import attend_varlen, can_attend_varlen

DOCUMENTS = "documents"
FAST_DOCUMENTS = "documents_fast"

# B = 1, H = query heads, G = key/value heads, T = tokens, D = head size


def documents_attention(
    module: torch.nn.Module,
    query_BHTD: torch.Tensor,
    key_BGTD: torch.Tensor,
    value_BGTD: torch.Tensor,
    attention_mask: torch.Tensor | None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Causal attention inside each document, by torch's own; the output has shape [B, T, H, D].

    `document_lengths` (a list of ints that sum to T) reaches this function as a keyword of the model's forward; without
    it the whole stretch is one document. `document_prefixes`, a keyword likewise, names for each document an earlier
    one whose keys it sees besides its own, or -1. The signature is transformers' attention interface
    (integrations/sdpa_attention.py).
    """
    documents = _documents(query_BHTD, kwargs)
    grouped = query_BHTD.shape[1] != key_BGTD.shape[1]
    outputs = [
        F.scaled_dot_product_attention(
            query, key, value, attn_mask=mask, is_causal=mask is None, scale=kwargs.get("scaling"), enable_gqa=grouped
        )
        for query, key, value, mask in _one_by_one(query_BHTD, key_BGTD, value_BGTD, documents)
    ]
    return torch.cat(outputs, dim=2).transpose(1, 2), None


def fast_documents_attention(
    module: torch.nn.Module,
    query_BHTD: torch.Tensor,
    key_BGTD: torch.Tensor,
    value_BGTD: torch.Tensor,
    attention_mask: torch.Tensor | None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """The same by all documents at once: our compiled code on a CPU, torch's variable-length attention on CUDA.

    Where neither can (another type, a head size too large, no compiler), torch attends one by one.
    """
    query, key, value = _autocast(query_BHTD), _autocast(key_BGTD), _autocast(value_BGTD)
    documents = _documents(query, kwargs)
    scale = kwargs.get("scaling") or query.shape[-1] ** -0.5
    if can_attend_varlen(query, key, value):
        return attend_varlen(query, key, value, documents, scale), None
    if can_attend(query, key, value) and not isinstance(compiled(), str):
        return attend(query, key, value, documents, scale), None
    return documents_attention(module, query, key, value, attention_mask, **kwargs)


def swap_attention(model: torch.nn.Module) -> Swapped:
    """Let a model that attends by documents do so by all documents at once; a model that does not is left alone."""
    inner = next(found for found in model.modules() if isinstance(found, PreTrainedModel))
    layers = int(inner.config.get_text_config().num_hidden_layers)
    if inner.config._attn_implementation != DOCUMENTS:
        return Swapped(0, 0, {"attention": "attends by a mask, not by documents"})
    if inner.device.type == "cpu" and isinstance(reason := compiled(), str):
        return Swapped(0, 0, {"attention": reason})
    inner.set_attn_implementation(FAST_DOCUMENTS)
    return Swapped(layers, 0, {})


def register_attention() -> None:
    """Make both known to transformers as attention implementations; they take no mask, so none is built."""
    AttentionInterface.register(DOCUMENTS, documents_attention)
    AttentionInterface.register(FAST_DOCUMENTS, fast_documents_attention)


def _documents(query_BHTD: torch.Tensor, kwargs: dict[str, Any]) -> Documents:
    """Length and prefix of every document; one document of all tokens where nothing is said."""
    lengths = kwargs.get("document_lengths") or [query_BHTD.shape[2]]
    return Documents(tuple(lengths), tuple(kwargs.get("document_prefixes") or [-1] * len(lengths)))


def _one_by_one(
    query_BHTD: torch.Tensor, key_BGTD: torch.Tensor, value_BGTD: torch.Tensor, documents: Documents
) -> Iterator[tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor | None]]:
    """Queries, keys and values of each document; and a mask where its keys begin with a prefix's."""
    queries, keys, values = (t.split(documents.lengths, dim=2) for t in (query_BHTD, key_BGTD, value_BGTD))
    for query, key, value, prefix in zip(queries, keys, values, documents.prefixes, strict=True):
        if prefix < 0:
            yield query, key, value, None
            continue
        seen = torch.cat([keys[prefix], key], dim=2)
        mask = torch.ones(query.shape[2], seen.shape[2], dtype=torch.bool, device=query.device)
        yield query, seen, torch.cat([values[prefix], value], dim=2), mask.tril_(documents.lengths[prefix])


def _autocast(tensor: torch.Tensor) -> torch.Tensor:
    """What torch's own attention makes of it under autocast."""
    kind = tensor.device.type
    return tensor.to(torch.get_autocast_dtype(kind)) if torch.is_autocast_enabled(kind) else tensor
