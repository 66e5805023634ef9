"""The loss of one pass: examples laid end to end in, the sum of their supervised tokens' cross entropies out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from finetune.data.examples import Example


@dataclass(frozen=True)
class Stretch:
    """Examples end to end, without padding. T = tokens of the stretch, S = supervised tokens.

    The token at `predicting_S[i]` predicts `target_S[i]`; both belong to the same example, so no example's loss depends
    on another's tokens.
    """

    input_ids_1T: torch.Tensor
    position_ids_1T: torch.Tensor
    document_lengths: list[int]
    predicting_S: torch.Tensor
    target_S: torch.Tensor

    @property
    def tokens(self) -> int:
        return self.input_ids_1T.shape[1]


def lay_end_to_end(examples: Sequence[Example], *, device: str | torch.device = "cpu") -> Stretch:
    """One stretch of all examples, positions starting at 0 in each."""
    ids_T = torch.from_numpy(np.concatenate([example.ids for example in examples]).astype(np.int64))
    positions_T = torch.from_numpy(np.concatenate([np.arange(example.tokens) for example in examples]))
    learned_T = np.concatenate([example.learned for example in examples])
    learned_T[np.cumsum([0, *(example.tokens for example in examples)])[:-1]] = False  # nothing predicts a first token
    target_positions_S = torch.from_numpy(np.flatnonzero(learned_T))
    return Stretch(
        input_ids_1T=ids_T[None].to(device),
        position_ids_1T=positions_T[None].to(device),
        document_lengths=[example.tokens for example in examples],
        predicting_S=(target_positions_S - 1).to(device),
        target_S=ids_T[target_positions_S].to(device),
    )


def stretch_losses_S(model: torch.nn.Module, stretch: Stretch) -> torch.Tensor:
    """Cross entropy of every supervised token, float32 [S]; the head runs on the predicting positions only."""
    arguments: dict[str, Any] = {"document_lengths": stretch.document_lengths}
    logits_1SV = model(
        input_ids=stretch.input_ids_1T,
        position_ids=stretch.position_ids_1T,
        use_cache=False,  # with a cache transformers would not isolate the documents (masking_utils.py)
        logits_to_keep=stretch.predicting_S,
        **arguments,
    ).logits
    return F.cross_entropy(logits_1SV[0].float(), stretch.target_S, reduction="none")
