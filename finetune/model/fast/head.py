"""The head and its loss in chunks: hidden rows and targets in, one cross entropy a row out; no logits are kept.

The gradient of the hidden rows is computed beside the losses, while a chunk's logits are at hand: two products a row,
as many as there are with all logits kept, and backward only scales.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MethodType
from typing import Any

import torch
from peft import PeftModel
from torch.autograd.function import once_differentiable

from finetune.model.fast.kernels import load_kernels
from finetune.model.fast.swapped import Swapped
from finetune.model.fast.weights import CurrentWeight, FrozenWeight, Plain
from finetune.plan_cost import CHUNK_BYTES, FEWEST_ROWS, SLICE_BYTES

# T = tokens, S = supervised rows, R = rows of a chunk, H = hidden size, V = vocabulary

HALF_PRECISION_LIFT = 2.0**10  # float16 cannot hold a probability of a large vocabulary, but a thousand times it


@dataclass(frozen=True)
class LogitForm:
    """What a family makes of the head's product: logits = cap * tanh(scale * product / cap); cap 0: no cap."""

    scale: float = 1.0
    cap: float = 0.0


PLAIN = (
    "DeepseekV2", "DeepseekV3", "Gemma", "Llama", "Mistral", "Mixtral", "Olmo2", "Phi3", "Qwen2", "Qwen2Moe", "Qwen3",
    "Qwen3Moe", "SmolLM3", "Starcoder2",
)  # fmt: skip
CAPPED = ("Gemma2", "Gemma3")
# Classes of transformers whose forward is: the decoder, the rows that are kept, the head, this.
FORMS: dict[str, Callable[[Any], LogitForm]] = {
    **{f"{name}ForCausalLM": lambda config: LogitForm() for name in PLAIN},
    **{f"{name}ForCausalLM": lambda config: LogitForm(cap=config.final_logit_softcapping or 0.0) for name in CAPPED},
    "GraniteForCausalLM": lambda config: LogitForm(scale=1 / config.logits_scaling),
    "CohereForCausalLM": lambda config: LogitForm(scale=config.logit_scale),
}

# Decoder layers that are: x + attention(norm(x)), then the same with an MLP.
PLAIN_LAYERS = [f"{name}DecoderLayer" for name in ("Gemma", "Llama", "Mistral", "Qwen2", "Qwen3")]
ROWS = "predicting_rows"  # the keyword by which they reach the last layer


class LossHead(torch.nn.Linear):
    """A model's own frozen head, the same weight under the same name, that also computes losses without logits.

    `keep` holds the weight in oneDNN's layouts, too, where the CPU has products for them; no value changes.
    """

    def __init__(self, head: torch.nn.Linear, form: LogitForm, *, keep: bool = False) -> None:
        torch.nn.Module.__init__(self)  # a Linear's own would make a second weight
        self.in_features, self.out_features = head.in_features, head.out_features
        self.weight, self.bias = head.weight, head.bias
        self.form = form
        self.current = CurrentWeight(self, keep=keep, pack=True)
        self.train(head.training)

    def losses_S(self, rows_SH: torch.Tensor, target_S: torch.Tensor) -> torch.Tensor:
        """Cross entropy of each target by its hidden row, float32 [S]."""
        device = rows_SH.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else self.weight.dtype
        wants_gradient = torch.is_grad_enabled() and rows_SH.requires_grad
        with torch.autocast(device, enabled=False):
            weight = self._weight(dtype)
            return _RowLosses.apply(rows_SH.to(dtype), weight, self.out_features, target_S, self.form, wants_gradient)

    def _weight(self, dtype: torch.dtype) -> FrozenWeight:
        if dtype is self.weight.dtype:
            return self.current.get()
        return Plain(self.weight.to(dtype), None if self.bias is None else self.bias.to(dtype), kept_bytes=0)


def swap_head(model: torch.nn.Module, *, keep: bool = False) -> Swapped:
    """Put a LossHead in the place of the model's head, if it is frozen and of a known form; else say why not.

    `keep` as in LossHead.
    Behind its attention, the last layer then computes only the rows that predict something, if it is of a known kind.
    """
    causal = _causal(model)
    if reason := _why_not(causal):
        return Swapped(count=0, kept_bytes=0, left={"lm_head": reason})
    head = LossHead(causal.lm_head, FORMS[type(causal).__name__](causal.config), keep=keep)
    causal.lm_head = head
    last = causal.base_model.layers[-1]
    if type(last).__name__ in PLAIN_LAYERS and "forward" not in vars(last):
        last.forward = MethodType(_forward_of_rows, last)  # bound, so that a copy of the model calls its own
    return Swapped(count=1, kept_bytes=head.current.get().kept_bytes, left={})


def swapped_losses_S(
    model: torch.nn.Module, inputs: Mapping[str, Any], predicting_S: torch.Tensor, target_S: torch.Tensor
) -> torch.Tensor | None:
    """Cross entropy of target_S[i] by position predicting_S[i], float32 [S]; None where no LossHead was put.

    `inputs` are the keywords of the model's forward for one row of tokens. Positions may repeat, in any order.
    """
    causal = _causal(model)
    head = getattr(causal, "lm_head", None)
    if not isinstance(head, LossHead):
        return None
    decoder = causal.base_model
    if _picks_rows(decoder.layers[-1]):
        return head.losses_S(decoder(**inputs, use_cache=False, **{ROWS: predicting_S}).last_hidden_state[0], target_S)
    hidden_1TH = decoder(**inputs, use_cache=False).last_hidden_state
    return head.losses_S(_Rows.apply(hidden_1TH[0], predicting_S), target_S)


def _picks_rows(layer: torch.nn.Module) -> bool:
    return getattr(vars(layer).get("forward"), "__func__", None) is _forward_of_rows


def _forward_of_rows(layer: Any, hidden_1TH: torch.Tensor, **keywords: Any) -> torch.Tensor:
    """A decoder layer's output in the rows that the keyword names, [1, S, H]; without it the library's, in all rows."""
    rows_S = keywords.pop(ROWS, None)
    if rows_S is None:
        return type(layer).forward(layer, hidden_1TH, **keywords)  # type: ignore[no-any-return]
    attended_1TH, _ = layer.self_attn(hidden_states=layer.input_layernorm(hidden_1TH), **keywords)
    hidden_1SH = _Rows.apply((hidden_1TH + attended_1TH)[0], rows_S)[None]
    return hidden_1SH + layer.mlp(layer.post_attention_layernorm(hidden_1SH))  # type: ignore[no-any-return]


def _causal(model: torch.nn.Module) -> Any:
    """The transformers model inside PEFT's."""
    return model.get_base_model() if isinstance(model, PeftModel) else model


def _why_not(causal: Any) -> str:
    """Why the head stays the library's; empty if it need not."""
    kind = type(causal)
    if kind.__name__ not in FORMS or not kind.__module__.startswith("transformers.models."):
        return f"the form of {kind.__name__}'s logits is not known"
    head = causal.lm_head
    if type(head) is not torch.nn.Linear:
        return f"an adapted or quantised head ({type(head).__name__})"
    if head.weight.requires_grad:
        return "a trained head"
    return ""


class _Rows(torch.autograd.Function):
    """Rows of a matrix by number, some perhaps several times; their gradients add up in the same order every time."""

    @staticmethod
    def forward(ctx: Any, matrix_TH: torch.Tensor, rows_S: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(rows_S)
        ctx.shape = matrix_TH.shape
        return matrix_TH.index_select(0, rows_S)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient_SH: torch.Tensor) -> tuple[torch.Tensor, None]:
        (rows_S,) = ctx.saved_tensors
        gradient_TH = gradient_SH.new_zeros(ctx.shape)
        if gradient_SH.is_cuda:
            gradient_TH.index_put_((rows_S,), gradient_SH, accumulate=True)  # sorts; index_add_ has no fixed order
        else:
            gradient_TH.index_add_(0, rows_S, gradient_SH)  # one by one; index_put_ has no fixed order
        return gradient_TH, None


class _RowLosses(torch.autograd.Function):
    """Cross entropies, float32 [S], of the rows' logits; keeps nothing but the gradient [S, H] of each row's loss."""

    @staticmethod
    def forward(  # noqa: PLR0913, PLR0917 - what autograd is given
        ctx: Any,
        rows_SH: torch.Tensor,
        weight: FrozenWeight,
        vocabulary: int,
        target_S: torch.Tensor,
        form: LogitForm,
        wants_gradient: bool,
    ) -> torch.Tensor:
        losses_S = torch.empty(len(rows_SH), device=rows_SH.device)
        gradient_SH = torch.empty_like(rows_SH) if wants_gradient else None
        lift_S = torch.full_like(losses_S, _lift(rows_SH.dtype)) if wants_gradient else None
        row_bytes, device = vocabulary * rows_SH.element_size(), rows_SH.device.type
        for chunk in _even_slices(slice(0, len(rows_SH)), CHUNK_BYTES[device] // row_bytes, fewest=FEWEST_ROWS):
            logits = weight.forward(rows_SH[chunk])
            for part in _even_slices(chunk, SLICE_BYTES[device] // row_bytes, fewest=1):
                some = logits[part.start - chunk.start : part.stop - chunk.start]
                weights = None if lift_S is None else lift_S[part]
                losses_S[part] = load_kernels().cross_entropy_(
                    some, target_S[part], weights, scale=form.scale, cap=form.cap
                )
            if gradient_SH is not None:
                gradient_SH[chunk] = weight.backward(logits)
            del logits, some  # before the next chunk takes its memory
        if gradient_SH is not None:
            ctx.save_for_backward(gradient_SH)
        return losses_S

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream_S: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        (gradient_SH,) = ctx.saved_tensors
        lift = _lift(gradient_SH.dtype)
        return (gradient_SH * (upstream_S[:, None] / lift)).to(gradient_SH.dtype), None, None, None, None, None


def _lift(dtype: torch.dtype) -> float:
    return HALF_PRECISION_LIFT if dtype == torch.float16 else 1.0


def _even_slices(rows: slice, at_most: int, *, fewest: int) -> list[slice]:
    """`rows` in as few slices of `at_most` rows as there can be, of nearly the same size, the largest first."""
    count = rows.stop - rows.start
    size = -(-count // max(1, -(-count // max(fewest, at_most))))
    return [slice(start, min(start + size, rows.stop)) for start in range(rows.start, rows.stop, max(1, size))]
