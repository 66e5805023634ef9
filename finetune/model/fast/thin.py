"""The thin products of a LoRA, whose inner or outer size is its rank: compiled where the CPU multiplies bfloat16.

Elsewhere torch computes them. Its own products of such shapes are slow on CPUs, up to five times where the rows of x
are 4,096 bytes apart, and it writes a program for each of six shapes of every new number of tokens.
"""

# T = tokens, N = inputs or outputs, R = rank; m is [N, R] in any strides: A transposed, or B.

from __future__ import annotations

import torch

from finetune.model.fast.kernels import Thin, load_kernels

DEEP, WIDE = 16, 32  # what compiled code takes at a time: of a rank filled up, and of a width
LARGEST_RANK = 256


def product(x_TN: torch.Tensor, m_NR: torch.Tensor, *, scale: float = 1.0) -> torch.Tensor:
    """t = x (scale m) in x's dtype, m rounded to it: [T, R]."""
    if _takes(x_TN, m_NR):
        t_TR = x_TN.new_empty(len(x_TN), m_NR.shape[1])
        _call("thin_product", x_TN, m_NR, scale, t_TR)
        return t_TR
    return torch.mm(x_TN, _rounded(m_NR, scale, x_TN.dtype).contiguous())


def add_product_(y_TN: torch.Tensor, t_TR: torch.Tensor, m_NR: torch.Tensor, *, scale: float = 1.0) -> torch.Tensor:
    """y += t (scale m)^T, in place; m rounded to y's dtype."""
    if _takes(y_TN, m_NR, t_TR):
        _call("thin_addition", y_TN, m_NR, scale, t_TR)
        return y_TN
    return y_TN.addmm_(t_TR, _rounded(m_NR, scale, y_TN.dtype).t().contiguous())


def gradient(d_TN: torch.Tensor, t_TR: torch.Tensor, m_NR: torch.Tensor, *, scale: float = 1.0) -> torch.Tensor:
    """scale d^T t, [N, R], in m's dtype and strides."""
    if _takes(d_TN, m_NR, t_TR):
        gradient_NR = torch.empty_like(m_NR)
        _call("thin_gradient", d_TN, gradient_NR, scale, t_TR)
        return gradient_NR
    gradient_RN = torch.mm(t_TR.t(), d_TN).to(m_NR.dtype).mul_(scale)
    return gradient_RN.t() if m_NR.t().is_contiguous() else gradient_RN.t().contiguous()


def _takes(x_TN: torch.Tensor, m_NR: torch.Tensor, t_TR: torch.Tensor | None = None) -> bool:
    width, rank = m_NR.shape
    kinds = (x_TN.device.type, x_TN.dtype, m_NR.dtype) == ("cpu", torch.bfloat16, torch.float32)
    fits = width % WIDE == 0 and rank <= LARGEST_RANK and x_TN.is_contiguous()
    return kinds and fits and (t_TR is None or t_TR.is_contiguous()) and load_kernels().thin


def _call(name: str, x_TN: torch.Tensor, m_NR: torch.Tensor, scale: float, t_TR: torch.Tensor) -> None:
    rows, rank = t_TR.shape
    # Room for words, pairs of the numbers of m, or of t in the gradient: filled up with zeros.
    pairs = torch.empty(max(m_NR.shape[0], rows + DEEP) // 2 * (rank + DEEP), dtype=torch.int32)
    thin = Thin(m_NR.data_ptr(), *m_NR.stride(), *m_NR.shape, scale)
    where = (x_TN.data_ptr(), thin, pairs.data_ptr(), t_TR.data_ptr())
    getattr(load_kernels().library, name)(*where, rows, torch.get_num_threads())


def _rounded(m_NR: torch.Tensor, scale: float, dtype: torch.dtype) -> torch.Tensor:
    """scale m, rounded once."""
    return (m_NR if scale == 1 else m_NR * scale).to(dtype)
