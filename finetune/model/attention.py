"""Attention over documents that lie end to end: each one is attended alone, so no mask of the whole stretch is made."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from transformers import AttentionInterface

DOCUMENTS = "documents"


def documents_attention(
    module: torch.nn.Module,
    query_BHTD: torch.Tensor,
    key_BGTD: torch.Tensor,
    value_BGTD: torch.Tensor,
    attention_mask: torch.Tensor | None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Causal attention inside each document; the output has shape [B, T, H, D].

    B = 1, H = query heads, G = key/value heads, T = tokens, D = head size. `document_lengths` (a list of ints that sum
    to T) reaches this function as a keyword of the model's forward; without it the whole stretch is one document.
    The signature is transformers' attention interface (integrations/sdpa_attention.py).
    """
    lengths = kwargs.get("document_lengths") or [query_BHTD.shape[2]]
    grouped = query_BHTD.shape[1] != key_BGTD.shape[1]
    outputs = [
        F.scaled_dot_product_attention(
            query, key, value, is_causal=True, scale=kwargs.get("scaling"), enable_gqa=grouped
        )
        for query, key, value in zip(
            query_BHTD.split(lengths, dim=2),
            key_BGTD.split(lengths, dim=2),
            value_BGTD.split(lengths, dim=2),
            strict=True,
        )
    ]
    return torch.cat(outputs, dim=2).transpose(1, 2), None


def register_attention() -> None:
    """Make `documents` known to transformers as an attention implementation; it takes no mask, so none is built."""
    AttentionInterface.register(DOCUMENTS, documents_attention)
