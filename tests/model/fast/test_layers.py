"""Swapped layers give the library's values and gradients, for every class in the tables, and keep less for backward."""

from __future__ import annotations

import copy
import importlib
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from finetune.model.adapter import without_pattern_warning
from finetune.model.fast.kernels import Kernels
from finetune.model.fast.layers import LIBRARY, MLPS, NORMS, ROTATED, swap_layers
from tests.model.fast.test_kernels import compiled

HIDDEN = 48
SMALL = {
    "hidden_size": HIDDEN,
    "intermediate_size": 80,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 60,
    "head_dim": 16,
    "pad_token_id": 0,
}
EXPERTS = {"num_experts": 4, "num_local_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
LATENT = {
    "head_dim": 8,
    "num_key_value_heads": 4,
    "q_lora_rank": None,
    "kv_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 8,
}
# Family, its own settings, how many modules are swapped of 2 layers, and the reasons of those that are not.
FAMILIES = [
    ("llama", {}, 2 * 4 + 1, set()),
    ("mistral", {"sliding_window": 3}, 2 * 4 + 1, set()),
    ("qwen2", {"use_sliding_window": True, "sliding_window": 3, "max_window_layers": 1}, 2 * 4 + 1, set()),
    ("qwen3", {}, 2 * 6 + 1, set()),
    ("mixtral", EXPERTS, 2 * 3 + 1, {"an unknown MixtralExperts"}),
    ("qwen3_moe", {**EXPERTS, "mlp_only_layers": [0]}, 2 * 5 + 1 + 1, {"an unknown Qwen3MoeExperts"}),
    ("gemma", {}, 2 * 4 + 1, set()),
    ("gemma2", {}, 2 * 6 + 1, set()),
    ("gemma3_text", {}, 2 * 8 + 1, set()),
    ("phi3", {}, 2 * 2 + 1, {"an unknown Phi3MLP", "an unknown Phi3Attention"}),
    ("deepseek_v3", {**LATENT, "first_k_dense_replace": 2}, 2 * 4 + 1, {"an unknown DeepseekV3Attention"}),
]


@pytest.fixture(params=["compiled", "torch"])
def kernels(request: pytest.FixtureRequest) -> Kernels:
    return compiled() if request.param == "compiled" else Kernels(reason="not wanted")


def make_model(family: str = "llama", dtype: torch.dtype = torch.float32, **more: Any) -> nn.Module:
    """A small random model whose norms are no ones, frozen, with LoRA on its linears whose B is no zero."""
    config = AutoConfig.for_model(family, **{**SMALL, **more})
    targets = ["q_proj", "kv_b_proj", "o_proj"] if "kv_lora_rank" in more else "all-linear"
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation="eager")
    for name, parameter in model.named_parameters():
        if "norm" in name:
            nn.init.uniform_(parameter, 0.5, 1.5)
    with without_pattern_warning():
        tuned = get_peft_model(model.to(dtype), LoraConfig(r=4, target_modules=targets))
    for name, parameter in tuned.named_parameters():
        if parameter.requires_grad:
            parameter.data = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(len(name))) * 0.05
    return tuned.train()


def passed(
    model: nn.Module, *, batch: int = 2, tokens: int = 7, dtype: torch.dtype = torch.float32, seed: int = 1
) -> dict[str, Any]:
    """Logits, the gradient of the embedded tokens and of every adapter weight."""
    torch.manual_seed(seed)
    inputs = torch.randn(batch, tokens, HIDDEN).to(next(model.parameters()).dtype).requires_grad_()
    model.zero_grad()
    with torch.autocast("cpu", dtype=dtype, enabled=dtype != torch.float32):
        logits = model(inputs_embeds=inputs, use_cache=False).logits
    upstream = torch.randn(logits.shape)
    (logits.float() * upstream).sum().backward()
    learned = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return {"logits": logits.detach(), "inputs": inputs.grad, **learned}


def difference(ours: dict[str, Any], exact: dict[str, Any]) -> float:
    """The largest relative error over all tensors."""
    assert ours.keys() == exact.keys()
    return max(((ours[n].double() - exact[n].double()).norm() / exact[n].double().norm()).item() for n in exact)


def library_class(row: str) -> type:
    module, name = row.rsplit(".", 1)
    return getattr(importlib.import_module(LIBRARY + module), name)


@pytest.mark.parametrize(("family", "more", "count", "reasons"), FAMILIES, ids=[row[0] for row in FAMILIES])
def test_whole_models_stay_what_they_were(
    kernels: Kernels, family: str, more: dict[str, Any], count: int, reasons: set[str]
) -> None:
    model = make_model(family, **more)
    exact = passed(model)
    swapped = swap_layers(model, kernels=kernels)
    if kernels.library is None and family not in ("phi3", "deepseek_v3"):
        count, reasons = count - 2, reasons | {"rotary embedding gains by compiled kernels only"}
    assert swapped.count == count
    assert set(swapped.left.values()) == reasons
    assert all(isinstance(model.get_submodule(name), nn.Module) for name in swapped.left)
    assert difference(passed(model), exact) < 1e-5
    assert "inputs" in exact
    assert sum("lora_" in name for name in exact) >= 2 * 2 * 3


def test_nothing_of_the_library_is_left(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same values where the library's norms, activations and rotary function cannot be called any more."""
    model = make_model()
    exact = passed(model)

    def broken(*args: Any) -> Any:
        raise AssertionError("the library was called")

    llama = importlib.import_module(LIBRARY + "llama.modeling_llama")
    monkeypatch.setattr(llama.LlamaRMSNorm, "forward", broken)
    monkeypatch.setattr(llama, "apply_rotary_pos_emb", broken)
    monkeypatch.setattr(transformers.activations.SiLUActivation, "forward", broken)
    swap_layers(model, kernels=compiled())
    assert difference(passed(model), exact) < 1e-5


@pytest.mark.parametrize("row", sorted(NORMS))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_norm_of_the_table(kernels: Kernels, row: str, dtype: torch.dtype) -> None:
    """The library's value in float32; in bfloat16 as near to the formula as the library or nearer."""
    norm = library_class(row)(33, eps=1e-2).to(dtype)
    nn.init.uniform_(norm.weight, 0.5, 1.5).requires_grad_(False)
    x = torch.randn(2, 5, 33).to(dtype).requires_grad_()
    g = torch.randn(2, 5, 33).to(dtype)
    theirs = norm(x), *torch.autograd.grad(norm(x), x, g)
    wide = x.detach().double().requires_grad_()
    weight = norm.weight.double() + ("Gemma" in row)
    y = wide / (wide.square().mean(-1, keepdim=True) + 1e-2).sqrt() * weight
    exact = y, *torch.autograd.grad(y, wide, g.double())
    assert swap_layers(norm, kernels=kernels).count == 1
    ours = norm(x), *torch.autograd.grad(norm(x), x, g)
    for own, library, reference in zip(ours, theirs, exact, strict=True):
        assert own.dtype == library.dtype == dtype
        error, allowed = ((each.double() - reference).norm() / reference.norm() for each in (own, library))
        assert error <= max(allowed * 1.02, 2e-7)
        assert allowed < 1e-2


@pytest.mark.parametrize("row", sorted(MLPS))
def test_every_mlp_of_the_table(kernels: Kernels, row: str) -> None:
    family = row.split(".")[0]
    known = {"mllama": "mllama_text_model", "gemma3": "gemma3_text", "llama4": "llama4_text"}.get(family, family)
    config = AutoConfig.for_model(known, **SMALL) if known != "mllama_text_model" else mllama_config()
    mlp = library_class(row)(config).requires_grad_(False)
    x, g = torch.randn(2, 3, HIDDEN, requires_grad=True), torch.randn(2, 3, HIDDEN)
    theirs = mlp(x), *torch.autograd.grad(mlp(x), x, g)
    assert swap_layers(mlp, kernels=kernels).count == 1
    ours = mlp(x), *torch.autograd.grad(mlp(x), x, g)
    for own, library in zip(ours, theirs, strict=True):
        assert torch.allclose(own, library, rtol=1e-5, atol=1e-7)


def mllama_config() -> Any:
    from transformers.models.mllama.configuration_mllama import MllamaTextConfig

    return MllamaTextConfig(hidden_size=HIDDEN, intermediate_size=80, num_hidden_layers=2)


@pytest.mark.parametrize("row", sorted(ROTATED))
def test_every_attention_of_the_table_turns_by_halves(row: str) -> None:
    """Its module's rotary function is the formula, and its forward calls that one."""
    library = importlib.import_module(LIBRARY + row.rsplit(".", 1)[0]).apply_rotary_pos_emb
    q, k, cos, sin = torch.randn(1, 3, 5, 8), torch.randn(1, 2, 5, 8), torch.randn(1, 5, 8), torch.randn(1, 5, 8)
    for ours, theirs in zip((q, k), library(q, k, cos, sin), strict=True):
        low, high = ours[..., :4], ours[..., 4:]
        exact = torch.cat((low * cos[..., :4] - high * sin[..., :4], high * cos[..., 4:] + low * sin[..., 4:]), -1)
        assert torch.allclose(theirs, exact, atol=1e-6)
    assert "apply_rotary_pos_emb" in library_class(row).forward.__code__.co_names


@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma3_text"])
def test_bfloat16_is_no_less_exact_than_the_library(kernels: Kernels, family: str) -> None:
    model = make_model(family, torch.bfloat16)
    wide, swapped = copy.deepcopy(model).float(), copy.deepcopy(model)
    swap_layers(swapped, kernels=kernels)
    own, theirs = 0.0, 0.0
    for seed in range(6):
        exact = passed(wide, seed=seed)
        library, ours = (passed(each, seed=seed, dtype=torch.bfloat16) for each in (model, swapped))
        own, theirs = own + squared_errors(ours, exact), theirs + squared_errors(library, exact)
        assert {name: t.dtype for name, t in ours.items()} == {name: t.dtype for name, t in library.items()}
        flat = [torch.cat([each[name].flatten().double() for name in exact]) for each in (ours, exact)]
        assert torch.cosine_similarity(*flat, dim=0) > 0.999
    assert own <= 1.05 * theirs


def squared_errors(ours: dict[str, Any], exact: dict[str, Any]) -> float:
    return sum(difference({name: ours[name]}, {name: exact[name]}) ** 2 for name in exact)


def test_the_same_again_and_without_gradients(kernels: Kernels) -> None:
    model = make_model(dtype=torch.bfloat16)
    swap_layers(model, kernels=kernels)
    first, again = passed(model, dtype=torch.bfloat16), passed(model, dtype=torch.bfloat16)
    assert all(torch.equal(first[name], again[name]) for name in first)
    model.eval()
    torch.manual_seed(1)
    inputs = torch.randn(2, 7, HIDDEN).bfloat16()
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(model(inputs_embeds=inputs, use_cache=False).logits, first["logits"])


def test_recomputed_layers_give_the_same_gradients(kernels: Kernels) -> None:
    model = make_model()
    swap_layers(model, kernels=kernels)
    exact = passed(model)
    for reentrant in (False, True):
        model.activation_checkpointing_enable({"use_reentrant": reentrant})
        recomputed = passed(model)
        assert all(torch.equal(exact[name], recomputed[name]) for name in exact)


def test_a_copy_computes_with_its_own_weights(kernels: Kernels) -> None:
    model = make_model()
    swap_layers(model, kernels=kernels)
    twin = copy.deepcopy(model)
    for parameter in model.parameters():
        parameter.data.zero_()
    assert difference(passed(twin), passed(make_model())) < 1e-5


def test_one_row_many_heads_and_one_token(kernels: Kernels) -> None:
    model = make_model(num_attention_heads=8, num_key_value_heads=1, head_dim=6)
    cases = [(1, 1), (1, 300), (3, 2)]
    exact = [passed(model, batch=b, tokens=t) for b, t in cases]
    swap_layers(model, kernels=kernels)
    for (b, t), reference in zip(cases, exact, strict=True):
        ours = passed(model, batch=b, tokens=t)
        if t == 1:  # one token attends to itself alone, so q and k learn nothing but rounding
            names = [n for n in ours if not ("q_proj" in n or "k_proj" in n)]
            ours, reference = ({n: each[n] for n in names} for each in (ours, reference))
        assert difference(ours, reference) < 1e-5


def test_what_is_left_to_the_library_is_said(kernels: Kernels) -> None:
    model = make_model(hidden_act="relu")
    norms = [module for module in model.modules() if type(module).__name__ == "LlamaRMSNorm"]
    norms[0].weight.requires_grad_(True)
    exact = passed(model)
    left = swap_layers(model, kernels=kernels).left
    assert sorted(reason for name, reason in left.items() if "self_attn" not in name) == [
        "a trained norm",
        *["an unknown activation (ReLU)"] * 2,
    ]
    norms[1].weight.requires_grad_(True)  # trained later: the library computes it, its weight learns
    norms[0].weight.grad = None
    ours = passed(model)
    later = next(name for name, p in model.named_parameters() if p is norms[1].weight)
    assert ours.pop(later).abs().sum() > 0
    assert difference(ours, exact) < 1e-5


def test_rotary_is_swapped_on_a_cpu_only() -> None:
    """The device `meta` stands for one that is no CPU."""
    with torch.device("meta"):
        attention = library_class("llama.modeling_llama.LlamaAttention")(AutoConfig.for_model("llama", **SMALL), 0)
    assert swap_layers(attention, kernels=compiled()).left == {"": "rotary embedding is compiled for CPUs only"}


def test_other_dtypes_are_the_librarys(kernels: Kernels) -> None:
    """A norm in bfloat16 of values in float32: the library gives float32."""
    norm = library_class("llama.modeling_llama.LlamaRMSNorm")(16).bfloat16().requires_grad_(False)
    x = torch.randn(3, 16)
    exact = norm(x)
    swap_layers(norm, kernels=kernels)
    assert norm(x).dtype == exact.dtype == torch.float32
    assert torch.equal(norm(x), exact)


def kept_bytes(model: nn.Module, inputs: torch.Tensor) -> int:
    """Bytes autograd keeps for backward, each piece of memory once, without the weights."""
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        output = model(inputs)
        del output
    return sum(kept.values())


def test_norm_and_gate_keep_their_inputs_only(kernels: Kernels) -> None:
    rows, width = 50, 48
    norm = library_class("llama.modeling_llama.LlamaRMSNorm")(width).bfloat16().requires_grad_(False)
    x = torch.randn(rows, width).bfloat16().requires_grad_()
    swap_layers(norm, kernels=kernels)
    assert kept_bytes(norm, x) == rows * width * 2 + rows * 4
    config = AutoConfig.for_model("llama", **{**SMALL, "intermediate_size": 80})
    mlp = library_class("llama.modeling_llama.LlamaMLP")(config).bfloat16().requires_grad_(False)
    before = kept_bytes(mlp, x)
    swap_layers(mlp, kernels=kernels)
    assert kept_bytes(mlp, x) == 2 * rows * 80 * 2 == before - rows * 80 * 2


def test_hooks_on_a_swapped_module_still_run(kernels: Kernels) -> None:
    model = make_model()
    swap_layers(model, kernels=kernels)
    seen: list[str] = []
    for name, module in model.named_modules():
        if "forward" in vars(module):
            module.register_forward_hook(lambda *_, name=name: seen.append(name))
    passed(model)
    assert len(seen) == len(set(seen)) == 9 - 2 * (kernels.library is None)


RANKS = """
import os, sys, torch, torch.distributed as dist
from finetune.model.fast.layers import swap_layers
from transformers.models.llama.modeling_llama import LlamaConfig, LlamaDecoderLayer
child = os.fork()  # before anything is computed: two ranks for the imports of one
rank, meeting = int(child == 0), sys.argv[1]
torch.manual_seed(0)
config = LlamaConfig(hidden_size=32, intermediate_size=48, num_attention_heads=2, attn_implementation="eager")
layer = LlamaDecoderLayer(config, 0)
for name, parameter in layer.named_parameters():
    parameter.requires_grad_("norm" not in name)
draws = [torch.randn(1, 6, 32) for _ in range(2)]
angles = torch.rand(1, 6, 16).cos(), torch.rand(1, 6, 16).sin()

def learned(inputs):
    layer.zero_grad()
    for each in inputs:
        layer(each, position_embeddings=angles).square().sum().backward()
    return [p.grad.clone() for p in layer.parameters() if p.grad is not None]

alone = learned(draws)
assert swap_layers(layer).count >= 3
dist.init_process_group("gloo", init_method="file://" + meeting, rank=rank, world_size=2)
summed = learned(draws[rank : rank + 1])
for gradient in summed:
    dist.all_reduce(gradient)
dist.destroy_process_group()
assert len(summed) == len(alone) == 7
for own, one in zip(summed, alone):
    assert torch.allclose(own, one, rtol=1e-4, atol=1e-5)
if child:
    assert os.waitpid(child, 0)[1] == 0
print("done")
"""


def test_two_ranks_sum_to_the_librarys_gradients_of_both_inputs(tmp_path: Path) -> None:
    command = [sys.executable, "-c", RANKS, str(tmp_path / "meet")]
    done = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parents[3], check=False)
    assert (done.returncode, done.stdout) == (0, "done\n" * 2), done.stderr


def test_the_tables_name_classes_of_this_version() -> None:
    for row in (*NORMS, *MLPS, *ROTATED):
        assert issubclass(library_class(row), nn.Module), (row, transformers.__version__)
