"""A base is loaded one tensor at a time and, in 4 bits, kept on disk: both give the model that transformers and
bitsandbytes give, bit by bit. Oracle: from_pretrained of the folder. What damages an entry: test_quantised_cache.py."""

from __future__ import annotations

import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from bitsandbytes.functional import dequantize_4bit, int8_vectorwise_dequant
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM, BitsAndBytesConfig, PreTrainedModel

import finetune.model.quantised_cache as cache
import finetune.model.streamed as streamed
from finetune import weight_hashes
from finetune.families import VISION
from finetune.model.adapter import attach_adapter
from finetune.model.experts import ExpertsConfig, ExpertsIn4Bit, experts_to_quantize
from finetune.model.load import dequantize_like_base, load_base
from finetune.plan import ModelPlan
from finetune.resolve import resolve
from tests.conftest import alpaca_rows, make_tiny_base, write_recipe
from tests.model.test_experts import make

IDS = torch.arange(3, 40)[None]
WORDS = ["quantised to", "kept in 4 bits", "read in 4 bits"]
SEES = [rf"(.*\.)?{part}" for part in VISION]


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(cache, "SMALLEST_BYTES", 0)
    monkeypatch.setattr(weight_hashes, "SETTLED_SECONDS", -1.0)
    return tmp_path / "cache" / "finetune" / "4bit"


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Made when asked for: two LLaMAs, mixtures whose experts are stored one by one and fused, one with a tower."""
    made: dict[str, Path] = {}
    root = tmp_path_factory.mktemp("bases")

    def get(kind: str) -> Path:
        if kind not in made:
            if kind in ("tied", "untied"):
                made[kind] = make_tiny_base(root / kind, dtype="bfloat16", tied=kind == "tied")
                own = '{"temperature": 0.6, "do_sample": true, "eos_token_id": [1, 2]}' if kind == "untied" else ""
                file = made[kind] / "generation_config.json"
                file.write_text(own) if own else file.unlink()
            else:
                made[kind] = make(kind, root / kind)
        return made[kind]

    return get


def plan_of(base: Path, quantization: str = "nf4", dtype: str = "bfloat16") -> ModelPlan:
    return ModelPlan(str(base), None, base, quantization, dtype, "cpu", "sdpa")


def by_transformers(plan: ModelPlan) -> PreTrainedModel:
    """The usual way: the folder, mapped into memory."""
    dtype = getattr(torch, plan.dtype)
    config = AutoConfig.from_pretrained(plan.folder)
    skipped = ["lm_head", *SEES] if hasattr(config, "vision_config") else None
    kind: dict[str, Any] = {
        "load_in_4bit": True,
        "bnb_4bit_quant_type": plan.quantization,
        "bnb_4bit_use_double_quant": True,
        "bnb_4bit_compute_dtype": dtype,
    }
    settings = BitsAndBytesConfig(llm_int8_skip_modules=skipped, **kind)
    if plan.quantization == "int8":
        settings = BitsAndBytesConfig(load_in_8bit=True)
    elif experts := experts_to_quantize(plan.folder):
        settings = ExpertsConfig(experts, **settings.to_dict())
    model = AutoModelForCausalLM.from_pretrained(
        plan.folder, config=config, dtype=dtype, quantization_config=settings, device_map={"": "cpu"}
    )
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
    return model.requires_grad_(False)


def everything(model: PreTrainedModel) -> dict[str, Any]:
    """All that the model computes with, tensors as they lie in memory."""
    found: dict[str, Any] = {}
    for name, tensor in [*model.named_parameters(remove_duplicate=False), *model.named_buffers()]:
        found[name] = tensor
        found[f"{name} is"] = (type(tensor), tensor.requires_grad, sorted(vars(tensor)), tensor.is_contiguous())
        if state := getattr(tensor, "quant_state", None):
            found |= {f"{name} {part}": value for part, value in flat(state).items()}
            found[f"{name} holds"] = (tensor.quant_type, tensor.blocksize, tensor.compress_statistics)
    for name, module in model.named_modules():
        found[name] = (type(module).__name__, sorted(vars(module)))
        if isinstance(module, ExpertsIn4Bit):
            found |= {f"{name} {part}": value for part, value in vars(module).items() if not part.startswith("_")}
    return found


def flat(state: Any) -> dict[str, Any]:
    values = dict(vars(state))
    second = values.pop("state2", None)
    return values | ({f"second {part}": value for part, value in flat(second).items()} if second else {})


def raw(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.data.reshape(-1).view(torch.uint8)


def hooks(model: PreTrainedModel) -> dict[str, Any]:
    """What PEFT, TRL and transformers ask a model."""
    quantizer: Any = model.hf_quantizer
    return {
        "attributes": sorted(vars(model)),
        "config": model.config.to_dict(),
        "generation": model.generation_config.to_dict() if model.generation_config else None,
        "name": (model.name_or_path, model.config.name_or_path),
        "quantizer": (type(quantizer), sorted(vars(quantizer)), sorted(quantizer.modules_to_not_convert)),
        "settings": type(quantizer.quantization_config),
        "flags": [getattr(model, name, None) for name in ("is_loaded_in_4bit", "is_quantized", "quantization_method")],
        "training": model.training,
        "memory": model.get_memory_footprint(),
        "conversions": len(model._weight_conversions),
    }


def assert_same(one: PreTrainedModel, other: PreTrainedModel) -> None:
    first, second = everything(one), everything(other)
    assert first.keys() == second.keys()
    for name, value in first.items():
        if isinstance(value, torch.Tensor):
            assert value.dtype == second[name].dtype, name
            assert torch.equal(raw(value), raw(second[name])), name
        elif name.rpartition(" ")[2] not in ("module",):
            assert value == second[name], name
    assert hooks(one) == hooks(other)
    with torch.no_grad():
        assert torch.equal(one(IDS).logits, other(IDS).logits)


@pytest.mark.parametrize(
    ("kind", "quantization", "dtype"),
    [
        ("untied", "nf4", "bfloat16"),
        ("untied", "fp4", "float16"),
        ("tied", "nf4", "bfloat16"),
        ("tied", "fp4", "float32"),
        ("mixtral", "nf4", "bfloat16"),
        ("llama4", "fp4", "bfloat16"),
        ("deepseek_v3", "nf4", "bfloat16"),
        ("gemma3", "nf4", "bfloat16"),
        ("mllama", "nf4", "bfloat16"),
    ],
)
def test_it_is_the_model_of_transformers(
    bases: Any, own_cache: Path, capfd: pytest.CaptureFixture[str], kind: str, quantization: str, dtype: str
) -> None:
    plan = plan_of(bases(kind), quantization, dtype)
    usual = by_transformers(plan)
    assert_same(load_base(plan), usual)
    assert not own_cache.exists()  # what proves something neither reads nor writes it
    assert_same(load_base(plan, keep=True), usual)
    assert len(list(own_cache.iterdir())) == 1
    assert_same(load_base(plan, keep=True), usual)
    told = [line for line in capfd.readouterr().err.splitlines() if line.startswith(str(plan.folder))]
    assert [next(word for word in WORDS if word in line) for line in told] == WORDS


def test_in_8_bits_it_is_the_model_of_transformers(bases: Any, own_cache: Path) -> None:
    plan = plan_of(bases("untied"), "int8", "float32")
    assert_same(load_base(plan, keep=True), by_transformers(plan))
    assert not own_cache.exists()  # only what is slow to quantise is kept


@pytest.mark.parametrize("quantization", ["nf4", "int8"])
@pytest.mark.parametrize(
    ("stored", "computes"), [("float16", "bfloat16"), ("float32", "bfloat16"), ("bfloat16", "float32")]
)
def test_a_stored_weight_becomes_the_values_that_the_loaded_base_has(
    tmp_path: Path, stored: str, computes: str, quantization: str
) -> None:
    """What a merge onto dequantised weights starts from; oracle: the loaded module, asked for its own values."""
    base = make_tiny_base(tmp_path / "base", dtype=stored)
    name, dtype = "model.layers.1.mlp.down_proj", getattr(torch, computes)
    held = load_base(plan_of(base, quantization, computes)).get_submodule(name).weight
    assert isinstance(held, torch.nn.Parameter)
    if quantization == "int8":
        values = int8_vectorwise_dequant(held.CB, held.SCB)  # type: ignore[attr-defined]
    else:
        values = dequantize_4bit(held.data, held.quant_state)  # type: ignore[attr-defined]
    weight = load_file(base / "model.safetensors")[f"{name}.weight"]
    found = dequantize_like_base(weight, quantization=quantization, dtype=dtype)
    assert found.dtype == (torch.float32 if quantization == "int8" else dtype)
    assert torch.equal(found, values)


def test_of_the_files_one_tensor_is_in_memory(bases: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    read, alive, most = streamed._OpenFiles.read, weakref.WeakSet[torch.Tensor](), [0]

    def watched(files: Any, file: Path, name: str) -> torch.Tensor:
        tensor = read(files, file, name)
        if name.endswith("_proj.weight"):
            alive.add(tensor)
            most[0] = max(most[0], len(alive))
        return tensor

    monkeypatch.setattr(streamed._OpenFiles, "read", watched)
    load_base(plan_of(bases("untied")))
    assert most == [1]
    assert not alive


def test_a_kept_base_learns_what_the_base_learns(bases: Any, tmp_path: Path) -> None:
    settings = {"model__quantization": "nf4", "adapter__targets": ["attention", "experts"]}
    plan = resolve(write_recipe(tmp_path, bases("mixtral"), alpaca_rows(8), **settings)).plan
    gradients = []
    for keep in (False, True, True):
        tuned: Any = attach_adapter(load_base(plan.model, keep=keep), plan.adapter, base="x").train()
        generator = torch.Generator().manual_seed(1)
        trained = [parameter for parameter in tuned.parameters() if parameter.requires_grad]
        for parameter in trained:
            parameter.data.normal_(0, 0.05, generator=generator)
        tuned(input_ids=IDS, use_cache=False).logits.float().logsumexp(-1).sum().backward()
        gradients.append([parameter.grad for parameter in trained])
    for other in gradients[1:]:
        assert all(torch.equal(one, two) for one, two in zip(gradients[0], other, strict=True))
