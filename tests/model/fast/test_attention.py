"""Our attention by documents, forward and backward, beside attention written out in float64."""

from __future__ import annotations

import inspect
import subprocess
import sys
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from finetune.model import attention as interface
from finetune.model.attention import DOCUMENTS, documents_attention, register_attention, swap_attention
from finetune.model.fast import attention as fast
from finetune.model.fast import native
from finetune.model.fast.attention import attend, compiled
from finetune.model.fast.documents import Documents
from finetune.model.fast.varlen import attend_varlen, torch_varlen

# heads, key heads, head size, lengths, prefixes
CASES = {
    "one token": (2, 2, 16, [1], [-1]),
    "block edges": (2, 2, 64, [63, 64, 65, 1, 128, 200], [-1] * 6),
    "grouped": (6, 2, 80, [40, 130], [-1] * 2),
    "one key head": (4, 1, 256, [70, 3], [-1] * 2),
    "a head size of 24": (2, 2, 24, [150], [-1]),
    "an odd head size": (2, 1, 33, [70, 20], [-1, 0]),
    "a prefix": (4, 2, 32, [39, 100, 1, 30], [-1, 0, 0, 0]),
    "two prefixes between others": (2, 1, 32, [5, 70, 130, 64, 8, 66, 20], [-1, -1, 1, 1, -1, 4, 1]),
    "a prefix longer than its followers": (2, 2, 16, [300, 2, 7], [-1, 0, 0]),
}
Attention = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, Documents, float], torch.Tensor]


@pytest.fixture(autouse=True)
def _a_compiler() -> None:
    if isinstance(compiled(), str):
        pytest.skip(f"no compiled attention here: {compiled()}")


def drawn(case: str, dtype: torch.dtype = torch.float64) -> tuple[list[torch.Tensor], Documents]:
    """Query, key, value [1, heads, T, D] as a linear module's output lies, and the output's gradient."""
    heads, key_heads, size, lengths, prefixes = CASES[case]
    generator = torch.Generator().manual_seed(7)
    shapes = [(1, sum(lengths), count, size) for count in (heads, key_heads, key_heads, heads)]
    *inputs, gradient = (torch.randn(shape, generator=generator).bfloat16().to(dtype) for shape in shapes)
    return [*(each.transpose(1, 2) for each in inputs), gradient], Documents(tuple(lengths), tuple(prefixes))


def written_out(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, documents: Documents, scale: float) -> torch.Tensor:
    """softmax(scale q k') v over the whole stretch, with a mask made token by token."""
    document = [number for number, length in enumerate(documents.lengths) for _ in range(length)]
    sees = torch.tensor(
        [
            [there == here and j <= i or there == documents.prefixes[here] for j, there in enumerate(document)]
            for i, here in enumerate(document)
        ]
    )
    k, v = (each.repeat_interleave(q.shape[1] // k.shape[1], dim=1) for each in (k, v))
    return ((q @ k.mT * scale).masked_fill(~sees, -torch.inf).softmax(-1) @ v).transpose(1, 2)


def by_torch(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, documents: Documents, scale: float) -> torch.Tensor:
    kwargs = {"document_lengths": list(documents.lengths), "document_prefixes": list(documents.prefixes)}
    return documents_attention(torch.nn.Identity(), q, k, v, None, scaling=scale, **kwargs)[0]


def results(attention: Attention, case: str, dtype: torch.dtype, scale: float = 0.2) -> list[torch.Tensor]:
    """The output and the gradients of query, key and value."""
    (*inputs, gradient), documents = drawn(case, dtype)
    inputs = [each.requires_grad_() for each in inputs]
    out = attention(*inputs, documents, scale)
    return [out.detach(), *torch.autograd.grad(out, inputs, gradient)]


def errors(found: Sequence[torch.Tensor], right: Sequence[torch.Tensor]) -> list[float]:
    return [((a.double() - b).norm() / (b.norm() or 1)).item() for a, b in zip(found, right, strict=True)]


@pytest.mark.parametrize("case", CASES)
def test_in_float32_it_is_the_formula(case: str) -> None:
    right = results(written_out, case, torch.float64)
    assert max(errors(results(attend, case, torch.float32), right)) < 1e-6
    assert max(errors(results(by_torch, case, torch.float32), right)) < 1e-6


@pytest.mark.parametrize("case", CASES)
def test_in_bfloat16_it_is_as_exact_as_torch(case: str) -> None:
    right = results(written_out, case, torch.float64)
    ours, torchs = results(attend, case, torch.bfloat16), results(by_torch, case, torch.bfloat16)
    for own, other in zip(errors(ours, right), errors(torchs, right), strict=True):
        assert own < 0.005  # 2^-8: what rounding to bfloat16 costs
        assert own <= 1.05 * other


def test_it_is_the_same_bit_by_bit_however_many_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    first = results(attend, "two prefixes between others", torch.bfloat16)
    for threads in (1, 2, 5):
        monkeypatch.setattr(fast.torch, "get_num_threads", lambda threads=threads: threads)
        again = results(attend, "two prefixes between others", torch.bfloat16)
        assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


def test_tensors_may_lie_in_any_order() -> None:
    (q, k, v, gradient), documents = drawn("a prefix", torch.float32)
    dense = attend(q, k, v, documents, 0.2)
    assert torch.equal(attend(q.contiguous(), k.contiguous(), v.contiguous(), documents, 0.2), dense)
    turned = [each.transpose(2, 3).contiguous().transpose(2, 3).requires_grad_() for each in (q, k, v)]
    out = attend(*turned, documents, 0.2)
    expanded = torch.ones(()).expand_as(gradient)
    straight = [each.clone().requires_grad_() for each in (q, k, v)]
    right = torch.autograd.grad(attend(*straight, documents, 0.2), straight, expanded.contiguous())
    assert torch.equal(out, dense)
    assert all(torch.equal(a, b) for a, b in zip(torch.autograd.grad(out, turned, expanded), right, strict=True))


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_what_is_not_finite_stays_so_and_in_its_document(value: float) -> None:
    (q, k, v, _), documents = drawn("block edges", torch.bfloat16)
    k[0, 0, 70] = value  # in the second document
    finite = attend(q, k, v, documents, 0.2)[0].isfinite().all(-1)
    assert not finite[70:127, 0].any()
    assert finite[:, 1].all()
    assert finite[:70].all()
    assert finite[127:].all()


def test_scores_far_apart_do_not_overflow() -> None:
    (q, k, v, gradient), documents = drawn("block edges", torch.float32)
    inputs = [(q * 300).requires_grad_(), k.requires_grad_(), v.requires_grad_()]
    wide = [each.detach().double().requires_grad_() for each in inputs]
    out, right = attend(*inputs, documents, 1.0), written_out(*wide, documents, 1.0)
    assert errors([out.detach()], [right.detach()])[0] < 1e-4
    assert all(each.isfinite().all() for each in torch.autograd.grad(out, inputs, gradient))


LONG = """
import resource, torch
from finetune.model.fast.attention import attend
from finetune.model.fast.documents import Documents
def peak(tokens):
    q, k, v = (torch.randn(1, 1, tokens, 16, requires_grad=True) for _ in range(3))
    attend(q, k, v, Documents((tokens,), (-1,)), 0.25).sum().backward()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
print(peak(64), peak(16384))
"""


def test_a_long_document_costs_no_square_of_memory() -> None:
    """16,384 tokens: a square of floats would be 1 GiB, of bits 32 MiB."""
    done = subprocess.run([sys.executable, "-c", LONG], capture_output=True, text=True, check=True)
    before, after = map(int, done.stdout.split())
    assert after - before < 30_000  # KiB


@pytest.mark.parametrize("machine", ["-march=x86-64-v3", pytest.param("-march=x86-64", marks=pytest.mark.soak)])
def test_code_for_other_machines_computes_the_same(machine: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the instructions for bfloat16, and with vectors half and a quarter as wide."""
    if not native.WIDE or torch.backends.cpu.get_cpu_capability() not in ("AVX2", "AVX512"):
        pytest.skip("not an x86 machine with AVX2")
    flags = tuple(flag for flag in native.FLAGS if not flag.startswith("-march"))
    monkeypatch.setattr(native, "FLAGS", (*flags, machine))
    library = native.load_library(source=fast.SOURCE)
    monkeypatch.setattr(fast, "compiled", lambda: library)
    for dtype, bound in ((torch.float32, 1e-6), (torch.bfloat16, 0.005)):
        case = "two prefixes between others"
        assert max(errors(results(attend, case, dtype), results(written_out, case, torch.float64))) < bound


def varlen_by_meaning(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *bounds: Any, **how: Any) -> Any:
    """torch's varlen_attn as its documentation has it, which also says what it takes."""
    cu_seq_q, cu_seq_k, max_q, max_k = bounds
    assert cu_seq_q.dtype == cu_seq_k.dtype == torch.int32
    assert type(max_q) is type(max_k) is int
    assert (max_q, max_k) == (cu_seq_q.diff().max(), cu_seq_k.diff().max())
    assert (cu_seq_q[-1], cu_seq_k[-1]) == (len(query), len(key))
    assert how.keys() - {"enable_gqa"} == {"scale", "window_size"}
    assert how["window_size"] == (-1, 0)
    outs = []
    for number in range(len(cu_seq_q) - 1):
        q = query[cu_seq_q[number] : cu_seq_q[number + 1]].transpose(0, 1)
        k, v = (t[cu_seq_k[number] : cu_seq_k[number + 1]].transpose(0, 1) for t in (key, value))
        k, v = (t.repeat_interleave(q.shape[0] // k.shape[0], dim=0) for t in (k, v))
        sees = torch.ones(q.shape[1], k.shape[1], dtype=torch.bool).tril(k.shape[1] - q.shape[1])
        outs.append((q @ k.mT * how["scale"]).masked_fill(~sees, -torch.inf).softmax(-1) @ v)
    return torch.cat(outs, dim=1).transpose(0, 1)


@pytest.mark.parametrize("case", CASES)
def test_what_a_gpu_kernel_is_given(case: str) -> None:
    def by_kernel(
        q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, documents: Documents, scale: float
    ) -> torch.Tensor:
        return attend_varlen(q, k, v, documents, scale, varlen_by_meaning)

    right = results(written_out, case, torch.float64)
    assert max(errors(results(by_kernel, case, torch.float64), right)) < 1e-6


def test_a_pass_in_inference_mode_leaves_nothing_a_gradient_cannot_use() -> None:
    (q, k, v, _), _ = drawn("one token", torch.float32)
    never_before = Documents((1, 1), (-1, -1))
    q, k, v = (each.expand(-1, -1, 2, -1) for each in (q, k, v))

    def saving(query: torch.Tensor, *rest: Any, **how: Any) -> torch.Tensor:
        return query * rest[2][-1]  # saves where the documents end

    with torch.inference_mode():
        attend_varlen(q, k, v, never_before, 1.0, saving)
    attend_varlen(q.clone().requires_grad_(), k, v, never_before, 1.0, saving).sum().backward()


def test_the_kernel_of_this_torch_takes_what_it_is_given() -> None:
    kernel = torch_varlen()
    assert kernel is not None
    inspect.signature(kernel).bind(*range(7), scale=0.2, window_size=(-1, 0), enable_gqa=True)


def tiny_model(attention: str) -> LlamaForCausalLM:
    register_attention()
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        vocab_size=99, attn_implementation=attention, initializer_range=0.3,
    )  # fmt: skip
    return LlamaForCausalLM(config)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("recompute", [False, True])
def test_a_swapped_model_computes_the_same(dtype: torch.dtype, recompute: bool) -> None:
    def run(*, swap: bool) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        model = tiny_model(DOCUMENTS).to(dtype)
        if swap:
            swapped = swap_attention(model)
            assert (swapped.count, swapped.left) == (2, {})
        if recompute:
            model.activation_checkpointing_enable()
        model.train()
        ids = torch.arange(60)[None] % 7
        logits = model(
            input_ids=ids, use_cache=False, document_lengths=[20, 25, 15], document_prefixes=[-1, 0, -1]
        ).logits
        logits.float().square().mean().backward()
        return logits.detach(), {name: p.grad for name, p in model.named_parameters() if p.grad is not None}

    logits, grads = run(swap=True)
    right, right_grads = run(swap=False)
    bound = 1e-5 if dtype == torch.float32 else 0.03
    assert errors([logits], [right.double()])[0] < bound
    assert max(errors(list(grads.values()), [each.double() for each in right_grads.values()])) < bound
    assert len(grads) == len(right_grads) > 15


def test_autocast_reaches_our_code(monkeypatch: pytest.MonkeyPatch) -> None:
    (q, k, v, _), documents = drawn("grouped", torch.float32)
    kwargs = {"document_lengths": list(documents.lengths), "scaling": 0.2}
    seen = []
    monkeypatch.setattr(interface, "attend", lambda *given: seen.append(given[0].dtype) or attend(*given))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out, _ = interface.fast_documents_attention(torch.nn.Identity(), q, k, v.bfloat16(), None, **kwargs)
    assert (out.dtype, seen) == (torch.bfloat16, [torch.bfloat16])


@pytest.mark.parametrize("what", ["float64", "head size", "two rows"])
def test_what_our_code_does_not_take_is_torchs(what: str) -> None:
    shape = {"head size": (1, 2, 5, 264), "two rows": (2, 2, 5, 16)}.get(what, (1, 2, 5, 16))
    q, k, v = (torch.randn(shape, dtype=torch.float64 if what == "float64" else torch.float32) for _ in range(3))
    given = (torch.nn.Identity(), q, k, v, None)
    assert torch.equal(interface.fast_documents_attention(*given)[0], documents_attention(*given)[0])


def test_a_model_that_does_not_attend_by_documents_is_left_alone() -> None:
    model = tiny_model("sdpa")
    assert swap_attention(model).left
    assert model.config._attn_implementation == "sdpa"


def test_without_a_compiler_the_model_stays_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(interface, "compiled", lambda: "no C compiler was found")
    model = tiny_model(DOCUMENTS)
    assert swap_attention(model).left == {"attention": "no C compiler was found"}
    assert model.config._attn_implementation == DOCUMENTS
