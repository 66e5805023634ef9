"""Our LoRA linears: values and gradients of the written-out formula on every kind of weight; all else stays PEFT's."""

from __future__ import annotations

import copy
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from bitsandbytes.functional import dequantize_4bit
from peft import LoraConfig, PeftModel, VeraConfig, get_peft_model
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForCausalLM

from finetune.model.adapter import save_adapter
from finetune.model.fast.linears import bytes_kept, swap_linears
from finetune.model.load import keep_4bit_weights_unpacked, quantization_config

RANK, ALPHA, TOKENS = 4, 12, 24
LINEARS = 2 * 7  # of the tiny base: q, k, v, o, gate, up, down in two layers
WEIGHTS = 2 * (64 * 64 + 32 * 64 + 32 * 64 + 64 * 64 + 3 * 64 * 128)  # of these
WAYS = [{"keep": True, "pack": True}, {"keep": True, "pack": False}, {"keep": False, "pack": False}]
BASES = [("none", torch.float32), ("none", torch.bfloat16), ("nf4", torch.bfloat16), ("fp4", torch.float32)]

REQUANTISED = pytest.mark.filterwarnings("ignore:.*erge lora module to 4-bit linear")  # PEFT's, of every 4-bit merge


def adapted(base: Path, quantization: str, dtype: torch.dtype, **settings: Any) -> PeftModel:
    """The tiny base with LoRA on all linears but the last, B random, so that every gradient is one."""
    model = AutoModelForCausalLM.from_pretrained(
        base, dtype=dtype, quantization_config=quantization_config(quantization, dtype)
    )
    model.requires_grad_(False)
    keep_4bit_weights_unpacked(model)
    torch.manual_seed(1)
    tuned = get_peft_model(model, LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules="all-linear", **settings))
    for name, parameter in tuned.named_parameters():
        if "lora_B" in name:
            parameter.data = 0.05 * torch.randn(parameter.shape)
        elif "bias" in name:
            parameter.data = torch.randn(parameter.shape).to(parameter.dtype)
    assert isinstance(tuned, PeftModel)
    return tuned


def tokens() -> torch.Tensor:
    return torch.randint(3, 1000, (1, TOKENS), generator=torch.Generator().manual_seed(2))


def precision(dtype: torch.dtype) -> AbstractContextManager[Any]:
    """What the Trainer computes in."""
    return nullcontext() if dtype is torch.float32 else torch.autocast("cpu", dtype)


def one(model: PeftModel, name: str) -> Any:
    return model.get_submodule(f"base_model.model.model.layers.1.{name}")


def step(module: torch.nn.Module, x: torch.Tensor, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """The output of a linear, and all gradients of a loss that weighs every output differently."""
    module.zero_grad()
    x = x.detach().requires_grad_()
    with precision(dtype):
        y = module(x)
    y.backward(torch.linspace(-1, 1, y.numel()).view(y.shape).to(y.dtype))
    learned = {name: p.grad for name, p in module.named_parameters() if p.requires_grad}
    return {"y": y.detach(), "x": x.grad, **learned}


def formula(layer: Any, x: torch.Tensor) -> dict[str, torch.Tensor]:
    """y = x W^T + bias + (alpha / r) (x A^T) B^T and its gradients, in float64."""
    base = layer.base_layer
    state = getattr(base.weight, "quant_state", None)
    weight = (dequantize_4bit(base.weight.data, state) if state else base.weight).double()
    a, b = (part["default"].weight.detach().double() for part in (layer.lora_A, layer.lora_B))
    rows = x.double().reshape(-1, x.shape[-1])
    y = rows @ weight.T + (ALPHA / RANK) * rows @ a.T @ b.T + (0 if base.bias is None else base.bias.double())
    dy = torch.linspace(-1, 1, y.numel()).view(y.shape).to(x.dtype).double()
    dt = (ALPHA / RANK) * dy @ b
    return {
        "y": y.view(*x.shape[:-1], -1),
        "x": (dy @ weight + dt @ a).view(x.shape),
        "lora_A.default.weight": dt.T @ rows,
        "lora_B.default.weight": (ALPHA / RANK) * dy.T @ (rows @ a.T),
    }


def error(found: torch.Tensor, exact: torch.Tensor) -> float:
    return float((found.double() - exact).norm() / exact.norm())


def cosine(found: torch.Tensor, exact: torch.Tensor) -> float:
    return float(torch.cosine_similarity(found.double().flatten(), exact.flatten(), dim=0))


def inputs(layer: Any, dtype: torch.dtype) -> torch.Tensor:
    return torch.randn(2, TOKENS, layer.in_features, generator=torch.Generator().manual_seed(3)).to(dtype)


@pytest.mark.parametrize("way", WAYS, ids=["packed", "kept", "unkept"])
@pytest.mark.parametrize(("quantization", "dtype"), [("none", torch.float32), ("nf4", torch.float32)])
def test_float32_is_the_formula(tiny_base: Path, quantization: str, dtype: torch.dtype, way: dict[str, bool]) -> None:
    model = adapted(tiny_base, quantization, dtype)
    layer = one(model, "mlp.down_proj")
    exact = formula(layer, inputs(layer, dtype))
    swap_linears(model, **way)
    found = step(layer, inputs(layer, dtype), dtype)
    assert found.keys() == exact.keys()
    assert {name: error(found[name], exact[name]) < 1e-5 for name in exact} == dict.fromkeys(exact, True)


@pytest.mark.parametrize("way", WAYS, ids=["packed", "kept", "unkept"])
@pytest.mark.parametrize("quantization", ["none", "nf4", "fp4"])
def test_bfloat16_is_not_less_exact_than_the_library(tiny_base: Path, quantization: str, way: dict[str, bool]) -> None:
    model = adapted(tiny_base, quantization, torch.bfloat16)
    for name in ("self_attn.k_proj", "mlp.gate_proj", "mlp.down_proj"):
        layer = one(model, name)
        x = inputs(layer, torch.bfloat16)
        exact, library = formula(layer, x), step(layer, x, torch.bfloat16)
        swap_linears(model, **way)
        found = step(layer, x, torch.bfloat16)
        assert {key: value.dtype for key, value in found.items()} == {key: v.dtype for key, v in library.items()}
        assert found["lora_A.default.weight"].dtype == torch.float32
        for key in exact:
            assert cosine(found[key], exact[key]) > 0.999
            assert error(found[key], exact[key]) <= 1.05 * error(library[key], exact[key])


@pytest.mark.parametrize("quantization", ["none", "nf4"])
def test_the_ways_to_hold_a_weight_agree_bit_for_bit_and_repeat(tiny_base: Path, quantization: str) -> None:
    results = []
    for way in [*WAYS, WAYS[0]]:
        model = adapted(tiny_base, quantization, torch.bfloat16)
        swap_linears(model, **way)
        for _ in range(2):
            results.append(whole_step(model, torch.bfloat16))
    assert all(same(results[0], other) for other in results[1:])


def whole_step(model: PeftModel, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """The loss of the whole model and every gradient."""
    model.zero_grad()
    with precision(dtype):
        loss = model(input_ids=tokens(), labels=tokens()).loss
    loss.backward()
    return {"loss": loss.detach(), **{name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad}}


def same(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> bool:
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


@pytest.mark.parametrize(("quantization", "dtype"), BASES)
def test_the_whole_model_trains_as_with_the_library(tiny_base: Path, quantization: str, dtype: torch.dtype) -> None:
    model = adapted(tiny_base, quantization, dtype)
    library = whole_step(model, dtype)
    swapped = swap_linears(model)
    assert (swapped.count, swapped.left) == (LINEARS, {})
    found = whole_step(model, dtype)
    least = 1 - 1e-6 if dtype is torch.float32 else 0.998
    assert {name: cosine(found[name], library[name].double()) > least for name in found} == dict.fromkeys(found, True)


@pytest.mark.parametrize("quantization", ["none", "nf4"])
def test_recomputed_gradients_are_the_same(tiny_base: Path, quantization: str) -> None:
    model = adapted(tiny_base, quantization, torch.bfloat16)
    swap_linears(model)
    model.train()
    plain = whole_step(model, torch.bfloat16)
    model.get_base_model().activation_checkpointing_enable()
    calls: list[int] = []
    one(model, "mlp.up_proj").register_forward_hook(lambda *_: calls.append(1))
    assert same(whole_step(model, torch.bfloat16), plain)
    assert len(calls) == 2  # once more, in backward


def test_only_x_and_the_narrow_product_are_kept_for_backward(tiny_base: Path) -> None:
    model = adapted(tiny_base, "nf4", torch.bfloat16)
    swap_linears(model)
    attention = one(model, "self_attn")
    x = inputs(attention.q_proj, torch.bfloat16).requires_grad_()
    saved: dict[int, int] = {}

    def note(tensor: torch.Tensor) -> torch.Tensor:
        if not isinstance(tensor, torch.nn.Parameter):
            saved[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor), precision(torch.bfloat16):
        outputs = [attention.q_proj(x), attention.k_proj(x), attention.v_proj(x)]
    assert len(outputs) == 3
    assert sum(saved.values()) == x.nbytes + 3 * (x.numel() // x.shape[-1]) * RANK * x.itemsize


class Products(TorchDispatchMode):
    """Counts matrix products that give something as wide as the inputs of the counted layer."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.width, self.count = width, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func is torch.ops.aten.mm.default and result.shape[-1] == self.width and result.shape[0] > RANK:
            self.count += 1
        return result


@pytest.mark.parametrize("learns", [True, False])
def test_no_gradient_of_x_where_nobody_asks_for_it(tiny_base: Path, learns: bool) -> None:
    model = adapted(tiny_base, "none", torch.float32)
    layer = one(model, "mlp.down_proj")
    x = inputs(layer, torch.float32).requires_grad_(learns)
    swap_linears(model, pack=False)
    y = layer(x)
    with Products(layer.in_features) as products:
        y.sum().backward()
    assert products.count == int(learns)


def everything(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


@REQUANTISED
@pytest.mark.parametrize(("quantization", "dtype"), BASES)
def test_names_files_and_merges_stay_pefts(
    tiny_base: Path, tmp_path: Path, quantization: str, dtype: torch.dtype
) -> None:
    library, ours = adapted(tiny_base, quantization, dtype), adapted(tiny_base, quantization, dtype)
    swap_linears(ours)
    assert [name for name, _ in ours.named_parameters()] == [name for name, _ in library.named_parameters()]
    assert same(everything(ours), everything(library))
    save_adapter(library, tmp_path / "library")
    save_adapter(ours, tmp_path / "ours")
    for file in (tmp_path / "library").iterdir():
        assert file.read_bytes() == (tmp_path / "ours" / file.name).read_bytes()
    merged = [model.merge_and_unload() for model in (library, ours)]
    assert same(everything(merged[1]), everything(merged[0]))
    with torch.no_grad():
        assert torch.equal(merged[1](tokens()).logits, merged[0](tokens()).logits)


@REQUANTISED
@pytest.mark.parametrize(("quantization", "dtype"), BASES)
def test_disabled_and_merged_adapters_are_the_librarys(tiny_base: Path, quantization: str, dtype: torch.dtype) -> None:
    library, ours = adapted(tiny_base, quantization, dtype), adapted(tiny_base, quantization, dtype)
    swap_linears(ours)
    for model in (library, ours):
        model.eval()
    with torch.no_grad():
        with library.disable_adapter(), ours.disable_adapter():
            assert torch.equal(ours(tokens()).logits, library(tokens()).logits)
        for model in (library, ours):
            model.merge_adapter()
        assert torch.equal(ours(tokens()).logits, library(tokens()).logits)
        for model in (library, ours):
            model.unmerge_adapter()
        assert cosine(ours(tokens()).logits, library(tokens()).logits.double()) > 0.999


@pytest.mark.parametrize("quantization", ["none", "nf4"])
def test_generated_text_is_the_librarys(tiny_base: Path, quantization: str) -> None:
    model = adapted(tiny_base, quantization, torch.float32)
    model.eval()
    asked = {"input_ids": tokens(), "attention_mask": torch.ones_like(tokens()), "max_new_tokens": 12}
    library = model.generate(**asked, do_sample=False)
    swap_linears(model)
    assert torch.equal(model.generate(**asked, do_sample=False), library)


LEFT = {
    "dropout": ({"lora_dropout": 0.1}, "dropout"),
    "dora": ({"use_dora": True}, "the LoRA is a Dora"),
    "bias of B": ({"lora_bias": True}, "lora_bias"),
}


@pytest.mark.filterwarnings("ignore:`lora_bias=True` was passed")
@pytest.mark.parametrize("case", LEFT)
@pytest.mark.parametrize("quantization", ["none", "nf4"])
def test_what_is_left_to_the_library_is_said_and_unchanged(tiny_base: Path, quantization: str, case: str) -> None:
    settings, reason = LEFT[case]
    library, ours = (adapted(tiny_base, quantization, torch.bfloat16, **settings) for _ in range(2))
    swapped = swap_linears(ours, pack=False)
    assert set(swapped.left.values()) == {reason}
    assert len(swapped.left) == LINEARS
    assert swapped.count == (LINEARS if quantization == "nf4" else 0)  # the 4-bit weights below are still kept
    results = []
    for model in (library, ours):
        model.train()
        torch.manual_seed(5)  # of the dropout
        results.append(whole_step(model, torch.bfloat16))
    assert same(*results)


def test_int8_other_methods_and_trained_bases_are_left(tiny_base: Path) -> None:
    model = adapted(tiny_base, "int8", torch.bfloat16)
    swapped = swap_linears(model)
    assert (swapped.count, set(swapped.left.values())) == (0, {"the adapter's layers are Linear8bitLt"})
    base = AutoModelForCausalLM.from_pretrained(tiny_base, dtype=torch.float32)
    with_vera = get_peft_model(base, VeraConfig(r=4, target_modules=["q_proj"]))
    assert set(swap_linears(with_vera).left.values()) == {"the adapter's layers are Linear"}
    model = adapted(tiny_base, "none", torch.float32)
    one(model, "mlp.up_proj").base_layer.weight.requires_grad_()
    assert set(swap_linears(model).left.values()) == {"the base is trained"}


def test_a_second_adapter_goes_to_the_library(tiny_base: Path) -> None:
    library, ours = (adapted(tiny_base, "nf4", torch.float32) for _ in range(2))
    swap_linears(ours)
    for model in (library, ours):
        model.eval()
        model.add_adapter("other", LoraConfig(r=2, init_lora_weights=False, target_modules=["q_proj", "down_proj"]))
    for name, parameter in [*library.named_parameters(), *ours.named_parameters()]:
        if ".other." in name:
            parameter.data.fill_(0.01)
    with torch.no_grad():
        for model in (library, ours):
            model.set_adapter("other")
        assert error(ours(tokens()).logits, library(tokens()).logits.double()) < 1e-5
        for model in (library, ours):
            model.base_model.set_adapter(["default", "other"])
        assert torch.equal(ours(tokens()).logits, library(tokens()).logits)
        for model in (library, ours):
            model.set_adapter("default")
        layers = [one(model, "self_attn.q_proj") for model in (library, ours)]
        x = inputs(layers[0], torch.float32)
        theirs, found = (layer(x, adapter_names=["default", "__base__"]) for layer in layers)
        assert torch.equal(found, theirs)


@pytest.mark.parametrize("way", WAYS, ids=["packed", "kept", "unkept"])
def test_4bit_linears_without_lora_are_bitsandbytes_bit_for_bit(tiny_base: Path, way: dict[str, bool]) -> None:
    library, ours = (adapted(tiny_base, "nf4", torch.bfloat16, exclude_modules=["gate_proj"]) for _ in range(2))
    assert swap_linears(ours, **way).count == LINEARS
    layers = [one(model, "mlp.gate_proj") for model in (library, ours)]
    x = inputs(layers[0], torch.bfloat16)
    assert same(step(layers[1], x, torch.bfloat16), step(layers[0], x, torch.bfloat16))


@pytest.mark.parametrize(("quantization", "dtype"), BASES)
def test_kept_bytes_are_the_formula_and_known_beforehand(
    tiny_base: Path, quantization: str, dtype: torch.dtype
) -> None:
    once = WEIGHTS * dtype.itemsize
    plain = once if quantization != "none" else 0
    packed = 2 * once if dtype is torch.bfloat16 and torch.ops.mkldnn._is_mkldnn_bf16_supported() else plain
    for way, expected in zip(WAYS, [packed, plain, 0], strict=True):
        model = adapted(tiny_base, quantization, dtype)
        assert bytes_kept(model, **way) == expected
        assert swap_linears(model, **way).kept_bytes == expected


@pytest.mark.parametrize("quantization", ["none", "nf4"])
def test_a_copy_is_its_own_model(tiny_base: Path, quantization: str) -> None:
    model = adapted(tiny_base, quantization, torch.bfloat16)
    swap_linears(model)
    twin = copy.deepcopy(model)
    before = whole_step(model, torch.bfloat16)
    assert same(whole_step(twin, torch.bfloat16), before)
    with torch.no_grad():
        for name, parameter in twin.named_parameters():
            if "lora_A" in name:
                parameter.zero_()
    assert same(whole_step(model, torch.bfloat16), before)
    assert not whole_step(twin, torch.bfloat16)[
        "base_model.model.model.layers.0.mlp.up_proj.lora_B.default.weight"
    ].any()


def test_a_changed_weight_is_taken_up(tiny_base: Path) -> None:
    model = adapted(tiny_base, "none", torch.bfloat16)
    swap_linears(model)
    layer = one(model, "mlp.up_proj")
    x = inputs(layer, torch.bfloat16)
    with torch.no_grad():
        once = layer(x)
        layer.base_layer.weight.zero_()
        layer.lora_B.default.weight.zero_()
        assert once.any()
        assert not layer(x).any()


def test_a_bias_is_added_once(tiny_base: Path) -> None:
    for way in WAYS:
        model = adapted(tiny_base, "none", torch.bfloat16)
        layer = one(model, "mlp.up_proj")
        layer.base_layer.bias = torch.nn.Parameter(torch.randn(layer.out_features).bfloat16(), requires_grad=False)
        x = inputs(layer, torch.bfloat16)
        exact = formula(layer, x)
        assert swap_linears(model, **way).left == {}
        found = step(layer, x, torch.bfloat16)
        assert {name: error(found[name], exact[name]) < 0.01 for name in exact} == dict.fromkeys(exact, True)
