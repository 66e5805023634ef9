"""A LoRA's thin products against their formulas in float64: compiled, and by torch where that takes nothing."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch

from finetune.model.fast import thin
from finetune.model.fast.kernels import Kernels, load_kernels

SCALE = 0.7
ROUNDING = 2**-8 + 1e-4  # of a bfloat16, and of sums in float32
SHAPES = [(1, 32, 1), (7, 64, 16), (37, 96, 8), (100, 768, 40), (33, 288, 256)]  # tokens, width, rank


@pytest.fixture(params=["compiled", "torch"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    if request.param == "torch":
        monkeypatch.setattr(thin, "load_kernels", Kernels)
    else:
        needs_compiled()
    return request.param


def needs_compiled() -> None:
    if not load_kernels().thin:
        pytest.skip(f"no compiled thin products on this machine: {load_kernels().reason or 'no bfloat16 on this CPU'}")


def drawn(*shape: int, seed: int = 0, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def matrices(width: int, rank: int) -> list[torch.Tensor]:
    """[width, rank] as B lies, and as the transposed A does."""
    return [drawn(width, rank, seed=2, dtype=torch.float32), drawn(rank, width, seed=2, dtype=torch.float32).t()]


def rounded(m_NR: torch.Tensor) -> torch.Tensor:
    return (m_NR * SCALE).bfloat16().double()


def agree(ours: torch.Tensor, exact: torch.Tensor, limit: float) -> bool:
    assert ours.shape == exact.shape
    return bool(((ours.double() - exact).abs() <= limit * exact.abs() + 1e-5 * exact.abs().max()).all())


@pytest.mark.parametrize(("tokens", "width", "rank"), SHAPES)
def test_the_three_are_their_formulas(way: str, tokens: int, width: int, rank: int) -> None:
    for m_NR in matrices(width, rank):
        x_TN, y_TN = drawn(tokens, width), drawn(tokens, width, seed=1)
        t_TR = thin.product(x_TN, m_NR, scale=SCALE)
        assert agree(t_TR, x_TN.double() @ rounded(m_NR), ROUNDING)

        narrow_TR = t_TR.double()
        exact_TN = y_TN.double() + narrow_TR @ rounded(m_NR).t()
        assert thin.add_product_(y_TN, t_TR, m_NR, scale=SCALE) is y_TN
        assert agree(y_TN, exact_TN, ROUNDING)

        gradient_NR = thin.gradient(x_TN, t_TR, m_NR, scale=SCALE)
        assert gradient_NR.dtype is torch.float32
        assert gradient_NR.t().is_contiguous() == m_NR.t().is_contiguous()  # as the parameter lies
        # torch rounds it to bfloat16 before it is scaled
        limit = 1e-5 if way == "compiled" else ROUNDING
        assert agree(gradient_NR, SCALE * (x_TN.double().t() @ narrow_TR), limit)


@pytest.fixture
def set_threads() -> Iterator[Callable[[int], None]]:
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def test_threads_and_neighbours_do_not_change_a_bit(set_threads: Callable[[int], None]) -> None:
    needs_compiled()
    x_TN, (m_NR, _) = drawn(301, 416), matrices(416, 16)

    def everything() -> list[torch.Tensor]:
        t_TR = thin.product(x_TN, m_NR)
        y_TN = thin.add_product_(x_TN.clone(), t_TR, m_NR)
        return [t_TR, y_TN, thin.gradient(x_TN, t_TR, m_NR)]

    results = []
    for threads in (1, 2, 3, 1):
        set_threads(threads)
        results.append(everything())
    assert all(torch.equal(one, other) for other in results[1:] for one, other in zip(results[0], other, strict=True))
    alone = thin.product(x_TN[300:], m_NR)  # a row's values do not depend on what lies before it
    assert torch.equal(alone, results[0][0][300:])
    assert torch.equal(thin.add_product_(x_TN[300:].clone(), alone, m_NR), results[0][1][300:])


def test_nothing_beyond_the_rows_is_read_or_written() -> None:
    needs_compiled()
    (m_NR, _) = matrices(64, 8)
    for tokens in (1, 7, 9, 15, 17):
        room_TN = torch.full((tokens + 2, 64), torch.nan, dtype=torch.bfloat16)
        y_TN = room_TN[1:-1]
        y_TN.copy_(drawn(tokens, 64))
        t_TR = thin.product(y_TN, m_NR)
        gradient_NR = thin.gradient(y_TN, t_TR, m_NR)
        thin.add_product_(y_TN, t_TR, m_NR)
        assert all(bool(each.isfinite().all()) for each in (t_TR, gradient_NR, y_TN))
        assert room_TN[0].isnan().all()
        assert room_TN[-1].isnan().all()


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_what_is_not_finite_is_seen(bad: float) -> None:
    needs_compiled()
    x_TN, (m_NR, _) = drawn(20, 64), matrices(64, 8)
    clean_TR = thin.product(x_TN, m_NR)
    x_TN[19, 63] = bad
    t_TR = thin.product(x_TN, m_NR)
    assert not t_TR[19].isfinite().any()
    assert torch.equal(t_TR[:19], clean_TR[:19])
    assert not thin.gradient(x_TN, clean_TR, m_NR)[63].isfinite().any()
    assert not thin.add_product_(drawn(20, 64), t_TR, m_NR)[19].isfinite().any()


def test_other_shapes_and_types_go_to_torch() -> None:
    cases = [
        (drawn(5, 48), drawn(48, 8, dtype=torch.float32)),  # 48 is no multiple of 32
        (drawn(64, 5).t(), drawn(64, 8, dtype=torch.float32)),
        (drawn(5, 64, dtype=torch.float32), drawn(64, 8, dtype=torch.float32)),
        (drawn(5, 64), drawn(64, 8)),
    ]
    for x_TN, some_NR in cases:
        t_TR = thin.product(x_TN, some_NR)
        assert torch.equal(t_TR, x_TN @ some_NR.to(x_TN.dtype))
        assert torch.equal(thin.gradient(x_TN, t_TR, some_NR), (t_TR.t() @ x_TN).t().to(some_NR.dtype))
