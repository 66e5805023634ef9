"""The loss of one pass: a stretch of examples in, the cross entropy of every supervised token out."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from finetune.model.fast.head import swapped_losses_S
from finetune.train.stretch import Stretch as Stretch
from finetune.train.stretch import lay_end_to_end as lay_end_to_end


def stretch_losses_S(model: torch.nn.Module, stretch: Stretch) -> torch.Tensor:
    """Cross entropy of every supervised token, float32 [S]; the head runs on the predicting positions only."""
    losses_S = swapped_losses_S(model, stretch.inputs, stretch.predicting_S, stretch.target_S)
    if losses_S is not None:
        return losses_S
    # With a cache transformers would not isolate the documents (masking_utils.py).
    logits_1SV = model(**stretch.inputs, use_cache=False, logits_to_keep=stretch.predicting_S).logits
    return F.cross_entropy(logits_1SV[0].float(), stretch.target_S, reduction="none")
