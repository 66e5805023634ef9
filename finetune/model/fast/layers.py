"""Swap what lies between the linears, norms, gates and rotary embeddings, for functions that keep only their inputs.

The library's norm keeps float32 copies of its input for backward, its gate the activation beside gate and up; ours
compute both again. Only `forward` of modules of one model is replaced. What is not in the tables, and every call
whose tensors are not alike in dtype, stays the library's.
"""

from __future__ import annotations

from collections.abc import Callable
from types import FunctionType, MethodType
from typing import Any

import torch
from torch import nn
from torch.autograd.function import once_differentiable

from finetune.model.fast.kernels import Kernels, load_kernels
from finetune.model.fast.swapped import Swapped

# B = batch, T = tokens, H = heads, D = head size, N = numbers of a row

# Classes of transformers.models whose arithmetic is the one meant here; tests/model/fast/test_layers.py compares each.
# x / rms(x) * weight in float32; the name of epsilon, and what is added to the weight
LLAMA_NORM, GEMMA_NORM = ("variance_epsilon", 0.0), ("eps", 1.0)
NORMS = {
    "llama.modeling_llama.LlamaRMSNorm": LLAMA_NORM,
    "mistral.modeling_mistral.MistralRMSNorm": LLAMA_NORM,
    "mixtral.modeling_mixtral.MixtralRMSNorm": LLAMA_NORM,
    "mllama.modeling_mllama.MllamaTextRMSNorm": LLAMA_NORM,
    "llama4.modeling_llama4.Llama4TextRMSNorm": ("eps", 0.0),
    "qwen2.modeling_qwen2.Qwen2RMSNorm": LLAMA_NORM,
    "qwen3.modeling_qwen3.Qwen3RMSNorm": LLAMA_NORM,
    "qwen3_moe.modeling_qwen3_moe.Qwen3MoeRMSNorm": LLAMA_NORM,
    "phi3.modeling_phi3.Phi3RMSNorm": LLAMA_NORM,
    "deepseek_v2.modeling_deepseek_v2.DeepseekV2RMSNorm": LLAMA_NORM,
    "deepseek_v3.modeling_deepseek_v3.DeepseekV3RMSNorm": LLAMA_NORM,
    "gemma.modeling_gemma.GemmaRMSNorm": GEMMA_NORM,
    "gemma2.modeling_gemma2.Gemma2RMSNorm": GEMMA_NORM,
    "gemma3.modeling_gemma3.Gemma3RMSNorm": GEMMA_NORM,
}
# down(activation(gate(x)) * up(x)); the name of the activation
MLPS = {
    "llama.modeling_llama.LlamaMLP": "act_fn",
    "mistral.modeling_mistral.MistralMLP": "act_fn",
    "mllama.modeling_mllama.MllamaTextMLP": "act_fn",
    "llama4.modeling_llama4.Llama4TextMLP": "activation_fn",
    "qwen2.modeling_qwen2.Qwen2MLP": "act_fn",
    "qwen3.modeling_qwen3.Qwen3MLP": "act_fn",
    "qwen3_moe.modeling_qwen3_moe.Qwen3MoeMLP": "act_fn",
    "deepseek_v2.modeling_deepseek_v2.DeepseekV2MLP": "act_fn",
    "deepseek_v3.modeling_deepseek_v3.DeepseekV3MLP": "act_fn",
    "gemma.modeling_gemma.GemmaMLP": "act_fn",
    "gemma2.modeling_gemma2.Gemma2MLP": "act_fn",
    "gemma3.modeling_gemma3.Gemma3MLP": "act_fn",
}
IS_GELU = {"SiLUActivation": False, "SiLU": False, "GELUTanh": True}  # by the class of the activation
# Attention that calls its module's apply_rotary_pos_emb(q, k, cos, sin), which turns whole heads by halves
ROTATED = {
    "llama.modeling_llama.LlamaAttention",
    "mistral.modeling_mistral.MistralAttention",
    "mixtral.modeling_mixtral.MixtralAttention",
    "qwen2.modeling_qwen2.Qwen2Attention",
    "qwen3.modeling_qwen3.Qwen3Attention",
    "qwen3_moe.modeling_qwen3_moe.Qwen3MoeAttention",
    "gemma.modeling_gemma.GemmaAttention",
    "gemma2.modeling_gemma2.Gemma2Attention",
    "gemma3.modeling_gemma3.Gemma3Attention",
}
ROTARY = "apply_rotary_pos_emb"
LIBRARY = "transformers.models."
KINDS = ("Norm", "MLP", "Attention", "Experts")  # how transformers names what could be swapped

Forward = Callable[..., Any]


def swap_layers(model: nn.Module, *, kernels: Kernels | None = None) -> Swapped:
    """Replace the forward of every known norm, MLP and attention of `model`; nothing is kept in memory."""
    kernels = kernels or load_kernels()
    count, left = 0, {}
    for name, module in model.named_modules():
        forward = _own_forward(module, kernels)
        if isinstance(forward, str):
            left[name] = forward
        elif forward is not None:
            module.forward = MethodType(forward, module)  # bound, so that a copy of the model calls its own
            count += 1
    return Swapped(count=count, kept_bytes=0, left=left)


def _own_forward(module: nn.Module, kernels: Kernels) -> Forward | str | None:
    """A forward for the module, or why it has none, or None where there was nothing to swap."""
    kind = type(module)
    if not kind.__module__.startswith(LIBRARY) or not kind.__name__.endswith(KINDS):
        return None
    known = f"{kind.__module__.removeprefix(LIBRARY)}.{kind.__name__}"
    if known in NORMS:
        return _norm_forward(module, *NORMS[known], kernels)
    if known in MLPS:
        return _mlp_forward(module, MLPS[known], kernels)
    if known in ROTATED:
        return _attention_forward(module, kernels)
    return f"an unknown {kind.__name__}"


def _norm_forward(module: Any, epsilon: str, added: float, kernels: Kernels) -> Forward | str:
    if module.weight.requires_grad:
        return "a trained norm"
    library = type(module).forward

    def forward(norm: Any, x: torch.Tensor) -> Any:
        if norm.weight.requires_grad or norm.weight.dtype != x.dtype:
            return library(norm, x)
        return _RmsNorm.apply(x, norm.weight, added, getattr(norm, epsilon), kernels)

    return forward


def _mlp_forward(module: Any, name: str, kernels: Kernels) -> Forward | str:
    activation = type(getattr(module, name)).__name__
    if activation not in IS_GELU:
        return f"an unknown activation ({activation})"

    def forward(mlp: Any, x: torch.Tensor) -> Any:
        gate, up = mlp.gate_proj(x), mlp.up_proj(x)
        if gate.dtype != up.dtype:
            return mlp.down_proj(getattr(mlp, name)(gate) * up)
        return mlp.down_proj(_Gated.apply(gate, up, IS_GELU[activation], kernels))

    return forward


def _attention_forward(module: Any, kernels: Kernels) -> Forward | str:
    """The library's own forward, but for the function by which it turns queries and keys."""
    if kernels.library is None:
        return "rotary embedding gains by compiled kernels only"
    if any(parameter.device.type != "cpu" for parameter in module.parameters()):
        return "rotary embedding is compiled for CPUs only"
    library = type(module).forward
    if ROTARY not in library.__code__.co_names:
        return f"its forward does not call {ROTARY} itself"

    def rotary(q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> tuple[Any, Any]:
        if q.device.type == "cpu" and q.dtype == k.dtype == cos.dtype and q.shape[-1] == cos.shape[-1]:
            return _Rotated.apply(q, cos, sin, kernels), _Rotated.apply(k, cos, sin, kernels)
        return library.__globals__[ROTARY](q, k, cos, sin)  # type: ignore[no-any-return]

    names = {**library.__globals__, ROTARY: rotary}
    own = FunctionType(library.__code__, names, library.__name__, library.__defaults__, library.__closure__)
    own.__kwdefaults__ = library.__kwdefaults__
    return own


class _RmsNorm(torch.autograd.Function):
    """x / rms(x) * (weight + added) of a frozen weight; keeps x and one number a row."""

    @staticmethod
    def forward(  # noqa: PLR0913, PLR0917 - what autograd is given
        ctx: Any, x: torch.Tensor, weight_N: torch.Tensor, added: float, epsilon: float, kernels: Kernels
    ) -> torch.Tensor:
        y, scale = kernels.rms_norm(_rows(x), weight_N.float() + added, epsilon)
        ctx.save_for_backward(x, weight_N, scale)
        ctx.added, ctx.kernels = added, kernels
        return y.view(x.shape)

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, g: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x, weight_N, scale = ctx.saved_tensors
        dx = ctx.kernels.rms_norm_gradient(_rows(g), _rows(x), weight_N.float() + ctx.added, scale)
        return dx.view(x.shape), None, None, None, None


class _Gated(torch.autograd.Function):
    """activation(gate) * up; keeps both, not the activation."""

    @staticmethod
    def forward(ctx: Any, gate: torch.Tensor, up: torch.Tensor, gelu: bool, kernels: Kernels) -> torch.Tensor:
        ctx.save_for_backward(gate, up)
        ctx.gelu, ctx.kernels = gelu, kernels
        return kernels.gated(gate, up, gelu=gelu)

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, g: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        gate, up = ctx.saved_tensors
        return *ctx.kernels.gated_gradient(g.contiguous(), gate, up, gelu=ctx.gelu), None, None


class _Rotated(torch.autograd.Function):
    """Queries or keys [B, H, T, D] turned by the angles of their positions; keeps the cosines and sines."""

    @staticmethod
    def forward(ctx: Any, x_BHTD: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, kernels: Kernels) -> torch.Tensor:
        ctx.save_for_backward(cos, sin)
        ctx.kernels = kernels
        return _rotate(x_BHTD, cos, sin, kernels, back=False)

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, g_BHTD: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        cos, sin = ctx.saved_tensors
        return _rotate(g_BHTD, cos, sin, ctx.kernels, back=True), None, None, None


def _rotate(
    x_BHTD: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, kernels: Kernels, *, back: bool
) -> torch.Tensor:
    """[B, H, T, D] again, in memory [B, T, H, D], as the linear before it lies; cosines are [1 or B, T, D]."""
    x_BTHD = x_BHTD.transpose(1, 2)
    y = kernels.rotate(x_BTHD.flatten(0, 1), _rows(cos), _rows(sin), back=back)
    return y.view(x_BTHD.shape).transpose(1, 2)


def _rows(x: torch.Tensor) -> torch.Tensor:
    return x.reshape(-1, x.shape[-1]).contiguous()
