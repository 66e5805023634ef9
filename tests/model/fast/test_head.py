"""The head in chunks: losses and gradients are those of all logits written out, for every family; no logits kept."""

from __future__ import annotations

from copy import deepcopy
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import transformers
from peft import LoraConfig, get_peft_model
from torch.utils._python_dispatch import TorchDispatchMode

from finetune.data.examples import Example
from finetune.model.adapter import without_pattern_warning
from finetune.model.attention import register_attention
from finetune.model.fast import head as head_file
from finetune.model.fast.head import FORMS, LogitForm, LossHead, _Rows, swap_head, swapped_losses_S
from finetune.model.fast.kernels import Kernels
from finetune.model.fast.weights import can_pack
from finetune.train.loss import lay_end_to_end, stretch_losses_S

HIDDEN, VOCABULARY = 24, 40


@pytest.fixture(params=["compiled", "torch"])
def small_chunks(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Five rows a chunk, two rows a slice, so that small inputs take several of both; with kernels and without."""
    if request.param == "torch":
        monkeypatch.setattr(head_file, "load_kernels", Kernels)
    monkeypatch.setattr(head_file, "FEWEST_ROWS", 1)
    monkeypatch.setattr(head_file, "CHUNK_BYTES", {"cpu": 5 * VOCABULARY * 4})
    monkeypatch.setattr(head_file, "SLICE_BYTES", {"cpu": 2 * VOCABULARY * 4})


def make_head(dtype: torch.dtype, form: LogitForm, *, bias: bool = False, vocabulary: int = VOCABULARY) -> LossHead:
    torch.manual_seed(1)
    linear = torch.nn.Linear(HIDDEN, vocabulary, bias=bias, dtype=dtype)
    torch.nn.init.normal_(linear.weight, std=0.7)
    return LossHead(linear.requires_grad_(False), form)


def drawn(dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
    """Hidden rows, numbers of them out of order and repeated, targets, and an upstream gradient of its own for each."""
    torch.manual_seed(2)
    hidden_TH = torch.randn(17, HIDDEN).to(dtype).requires_grad_()
    predicting_S = torch.tensor([3, 9, 9, 0, 16, 2, 9, 5, 4, 11, 12, 3, 8])
    return hidden_TH, predicting_S, torch.randint(0, VOCABULARY, (13,)), torch.randn(13)


def losses_of_rows(
    head: LossHead, hidden: torch.Tensor, predicting: torch.Tensor, target: torch.Tensor
) -> torch.Tensor:
    return head.losses_S(_Rows.apply(hidden, predicting), target)


def reference(
    hidden_TH: torch.Tensor, head: LossHead, predicting_S: torch.Tensor, target_S: torch.Tensor
) -> torch.Tensor:
    """All logits written out, in the precision of the arguments."""
    logits = hidden_TH[predicting_S] @ head.weight.to(hidden_TH.dtype).t()
    logits = (logits if head.bias is None else logits + head.bias) * head.form.scale
    if head.form.cap:
        logits = head.form.cap * torch.tanh(logits / head.form.cap)
    return torch.stack([torch.logsumexp(row, 0) - row[target] for row, target in zip(logits, target_S, strict=True)])


FORMS_SEEN = [LogitForm(), LogitForm(scale=0.3), LogitForm(cap=2.5), LogitForm(scale=1.5, cap=4.0)]


@pytest.mark.usefixtures("small_chunks")
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("form", FORMS_SEEN)
def test_losses_and_gradients_are_the_references(form: LogitForm, bias: bool) -> None:
    head = make_head(torch.float32, form, bias=bias)
    hidden, predicting, target, upstream = drawn(torch.float32)
    exact = hidden.detach().double().requires_grad_()
    expected = reference(exact, head, predicting, target)
    (expected * upstream).sum().backward()
    losses = losses_of_rows(head, hidden, predicting, target)
    (losses * upstream).sum().backward()
    assert losses.dtype == torch.float32
    torch.testing.assert_close(losses.double(), expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(hidden.grad.double(), exact.grad, rtol=1e-5, atol=1e-6)


@pytest.mark.usefixtures("small_chunks")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("form", FORMS_SEEN[:3:2])
def test_half_precision_is_no_less_exact_than_the_librarys_way(form: LogitForm, dtype: torch.dtype) -> None:
    """Many draws, because single roundings are luck; both are compared with float64."""
    head, errors = make_head(dtype, form, vocabulary=2000), {"ours": [], "library": []}
    for seed in range(20):
        torch.manual_seed(seed)
        count = 30 + 3 * seed  # 1 / count is what all gradients have in common, and its rounding is luck too
        hidden, target = torch.randn(count, HIDDEN).to(dtype), torch.randint(0, 2000, (count,))
        exact = hidden.double().requires_grad_()
        expected = reference(exact, head, torch.arange(count), target)
        (expected.sum() / count).backward()
        for name, way in WAYS.items():
            given = hidden.clone().requires_grad_()
            losses = way(head, given, target)
            (losses.sum() / count).backward()
            assert F.cosine_similarity(given.grad.double().flatten(), exact.grad.flatten(), dim=0) > 0.999
            loss_error = (losses.double() - expected).norm() / expected.norm()
            errors[name].append([loss_error.item(), ((given.grad - exact.grad).norm() / exact.grad.norm()).item()])
    ours, library = np.mean(errors["ours"], axis=0), np.mean(errors["library"], axis=0)
    assert (ours <= library * 1.02).all(), (ours, library)


def library_way(head: LossHead, hidden: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    logits = F.linear(hidden, head.weight) * head.form.scale
    if head.form.cap:
        logits = torch.tanh(logits / head.form.cap) * head.form.cap
    return F.cross_entropy(logits.float(), target, reduction="none")


WAYS = {"library": library_way, "ours": lambda head, hidden, target: head.losses_S(hidden, target)}


class Largest(TorchDispatchMode):
    """How many elements the largest tensor has that any operation made."""

    def __init__(self) -> None:
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, tuple) else (out,):
            if isinstance(tensor, torch.Tensor) and tensor.untyped_storage().nbytes():
                self.elements = max(self.elements, tensor.numel())
        return out


@pytest.mark.usefixtures("small_chunks")
def test_never_more_logits_than_a_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    rows, wide = 200, 5000
    linear = torch.nn.Linear(8, wide, bias=False).requires_grad_(False)
    for form in FORMS_SEEN:
        monkeypatch.setattr(head_file, "CHUNK_BYTES", {"cpu": 10 * wide * 4})
        hidden = torch.randn(rows, 8, requires_grad=True)
        with Largest() as largest:
            LossHead(linear, form).losses_S(hidden, torch.arange(rows)).sum().backward()
        assert largest.elements == 10 * wide
    kept: list[int] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor.numel()) or tensor, lambda x: x):
        LossHead(linear, LogitForm()).losses_S(hidden, torch.arange(rows))
    assert sum(kept) == rows * 8


def test_of_a_wide_vocabulary_a_chunk_has_128_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fewer would fit into its bytes, and every chunk reads the head's whole weight."""
    rows, wide = 300, 5000
    monkeypatch.setattr(head_file, "CHUNK_BYTES", {"cpu": 10 * wide * 4})
    hidden = torch.randn(rows, 8, requires_grad=True)
    linear = torch.nn.Linear(8, wide, bias=False).requires_grad_(False)
    with Largest() as largest:
        LossHead(linear, LogitForm()).losses_S(hidden, torch.arange(rows)).sum().backward()
    assert largest.elements == 100 * wide  # 300 in three equal chunks, the fewest of at most 128


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("bias", [False, True])
def test_a_kept_weight_changes_no_bit_and_follows_the_heads(dtype: torch.dtype, bias: bool) -> None:
    plain = make_head(dtype, LogitForm(), bias=bias, vocabulary=2000)
    kept = LossHead(plain, LogitForm(), keep=True)
    hidden, target = torch.randn(300, HIDDEN).to(dtype), torch.randint(0, 2000, (300,))

    def losses_and_gradient(head: LossHead) -> torch.Tensor:
        given = hidden.clone().requires_grad_()
        losses = head.losses_S(given, target)
        losses.sum().backward()
        return torch.cat([losses.detach()[:, None], given.grad.float()], dim=1)

    before = losses_and_gradient(plain)
    assert torch.equal(losses_and_gradient(kept), before)
    assert kept.current.get() is kept.current.get()
    assert kept.current.get().kept_bytes == (2 * plain.weight.nbytes if can_pack(plain) else 0)
    with torch.no_grad():
        plain.weight.mul_(1.5)  # which is the other's, too
    assert not torch.equal(losses_and_gradient(plain), before)
    assert torch.equal(losses_and_gradient(kept), losses_and_gradient(plain))
    copied = deepcopy(kept)
    with torch.no_grad():
        copied.weight.mul_(0)
    assert torch.equal(losses_and_gradient(kept), losses_and_gradient(plain))
    assert not torch.equal(losses_and_gradient(copied), losses_and_gradient(plain))


def test_the_same_again_and_the_same_without_gradients() -> None:
    head = make_head(torch.float32, LogitForm())
    hidden, _, _, _ = drawn(torch.float32)
    predicting, target = torch.randint(0, 17, (3000,)), torch.randint(0, VOCABULARY, (3000,))

    def once() -> tuple[torch.Tensor, torch.Tensor]:
        hidden.grad = None
        losses = losses_of_rows(head, hidden, predicting, target)
        losses.sum().backward()
        return losses.detach(), hidden.grad

    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        first = once()
        for _ in range(5):
            assert all(torch.equal(a, b) for a, b in zip(once(), first, strict=True))
        with torch.no_grad():
            assert torch.equal(losses_of_rows(head, hidden, predicting, target), first[0])
    finally:
        torch.set_num_threads(threads)


SIZES = {
    "vocab_size": 96, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 64, "pad_token_id": 0, "bos_token_id": 1,
    "eos_token_id": 2, "initializer_range": 0.2,
}  # fmt: skip
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
OTHERS = {
    "Mixtral": {"num_local_experts": 4},
    "Qwen2Moe": {**EXPERTS, "shared_expert_intermediate_size": 16},
    "Qwen3Moe": EXPERTS,
    "Gemma2": {"final_logit_softcapping": 1.5, "query_pre_attn_scalar": 8},
    "Gemma3": {"final_logit_softcapping": 1.5, "query_pre_attn_scalar": 8},
    "Granite": {"logits_scaling": 3.0},
    "Cohere": {"logit_scale": 0.4},
}  # fmt: skip
LATENT = {
    "n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "kv_lora_rank": 8, "q_lora_rank": 8,
    "qk_rope_head_dim": 4, "qk_nope_head_dim": 8, "v_head_dim": 8, "n_group": 1, "topk_group": 1, "n_shared_experts": 1,
    "first_k_dense_replace": 1, "num_key_value_heads": 4, "head_dim": 4,
}  # fmt: skip


def tiny_model(name: str, **settings: Any) -> Any:
    """A random model of the class, in float32."""
    sizes = {**SIZES, **OTHERS.get(name, {}), **(LATENT if name.startswith("Deepseek") else {}), **settings}
    kind = getattr(transformers, f"{name}ForCausalLM")
    register_attention()
    torch.manual_seed(3)
    model = kind(kind.config_class(**sizes))
    return model.requires_grad_(False)


def rows() -> list[Example]:
    random, lengths = np.random.default_rng(4), (9, 4, 13)
    drawn_rows = [(random.integers(3, 96, length).astype(np.int32), np.arange(length) >= 2) for length in lengths]
    return [Example(ids=ids, learned=learned, where="", prompt_tokens=0, cut_tokens=0) for ids, learned in drawn_rows]


def with_lora(model: Any, **settings: Any) -> Any:
    """The model with a LoRA whose B is not zero."""
    torch.manual_seed(5)
    with without_pattern_warning():
        tuned = get_peft_model(model, LoraConfig(**{"target_modules": "all-linear", "r": 2, **settings}))
    for name, parameter in tuned.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.3)
    return tuned


@pytest.mark.parametrize("name", [kind.removesuffix("ForCausalLM") for kind in FORMS])
def test_every_family_gives_the_librarys_losses_and_gradients(name: str) -> None:
    tuned = with_lora(tiny_model(name))
    stretch = lay_end_to_end(rows())

    def both() -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        tuned.zero_grad()
        losses = stretch_losses_S(tuned, stretch)
        losses.mean().backward()
        return losses.detach(), {n: p.grad.clone() for n, p in tuned.named_parameters() if p.grad is not None}

    names = list(tuned.state_dict())
    expected, gradients = both()
    assert swap_head(tuned).count == 1
    losses, ours = both()
    assert list(tuned.state_dict()) == names
    assert losses.std() > 0.1
    torch.testing.assert_close(losses, expected, rtol=1e-5, atol=1e-5)
    assert ours.keys() == gradients.keys()
    for parameter, gradient in gradients.items():
        torch.testing.assert_close(ours[parameter], gradient, rtol=1e-4, atol=1e-6 + 1e-5 * gradient.abs().max().item())


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("name", ["Gemma", "Llama", "Mistral", "Qwen2", "Qwen3"])
def test_the_last_layer_computes_the_predicting_rows_only(name: str, recompute: bool) -> None:
    """Positions out of order and repeated, as shared prefixes make them; losses and gradients are the library's."""
    tuned = with_lora(tiny_model(name))
    if recompute:
        tuned.enable_input_require_grads()
        tuned.base_model.model.activation_checkpointing_enable()
    tuned.train()
    stretch = lay_end_to_end(rows())
    stretch = replace(stretch, predicting_S=torch.tensor([20, 3, 7, 3, 3, 11]), target_S=torch.arange(6))
    rows_seen: list[int] = []
    last = tuned.base_model.model.model.layers[-1]
    last.mlp.down_proj.register_forward_hook(lambda module, arguments, out: rows_seen.append(arguments[0].shape[1]))

    def both() -> tuple[torch.Tensor, list[torch.Tensor]]:
        tuned.zero_grad()
        losses = stretch_losses_S(tuned, stretch)
        (losses * torch.arange(1, 7)).sum().backward()
        return losses.detach(), [p.grad.clone() for p in tuned.parameters() if p.grad is not None]

    expected, gradients = both()
    assert swap_head(tuned).count == 1
    losses, ours = both()
    half = len(rows_seen) // 2  # of calls: one, or another one that computes it again
    assert (set(rows_seen[:half]), set(rows_seen[half:])) == ({stretch.tokens}, {6})
    torch.testing.assert_close(losses, expected, rtol=1e-5, atol=1e-5)
    assert len(ours) == len(gradients) == 2 * 7 * 2
    for mine, gradient in zip(ours, gradients, strict=True):
        torch.testing.assert_close(mine, gradient, rtol=1e-4, atol=1e-5 * gradient.abs().max().item())
    tuned.eval()
    ids = torch.arange(3, 9)[None]
    assert tuned(ids).logits.shape == (1, 6, 96)


def test_a_tied_head_stays_the_embedding() -> None:
    model = tiny_model("Llama", tie_word_embeddings=True)
    assert swap_head(model).count == 1
    assert model.lm_head.weight is model.model.embed_tokens.weight
    ids = torch.arange(3, 9)[None]
    assert torch.equal(model(ids).logits[0], F.linear(model.model(ids).last_hidden_state[0], model.lm_head.weight))


def test_what_it_does_not_cover_is_left_with_a_reason() -> None:
    trained = tiny_model("Llama")
    trained.lm_head.requires_grad_(True)
    saved = with_lora(tiny_model("Llama"), modules_to_save=["lm_head"])
    adapted = with_lora(tiny_model("Llama"), target_modules=["q_proj", "lm_head"])
    tokens = with_lora(tiny_model("Llama", tie_word_embeddings=True), trainable_token_indices=[4, 5])
    other = tiny_model("GPTNeoX")
    for model, reason in (
        (trained, "a trained head"),
        (saved, "ModulesToSaveWrapper"),
        (adapted, "(Linear)"),
        (tokens, "TrainableTokensWrapper"),
        (other, "GPTNeoXForCausalLM"),
    ):
        swapped = swap_head(model)
        stretch = lay_end_to_end(rows())
        assert swapped.count == 0
        assert swapped_losses_S(model, stretch.inputs, stretch.predicting_S, stretch.target_S) is None
        assert reason in swapped.left["lm_head"]
    assert stretch_losses_S(saved, lay_end_to_end(rows())).isfinite().all()
