"""Every family trains, merges and is proven: a release is what plain transformers and PEFT make of base and adapter."""

from __future__ import annotations

import itertools
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from bitsandbytes.functional import dequantize_4bit, quantize_4bit
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig
from transformers.models.auto.tokenization_auto import (
    MODELS_WITH_INCORRECT_HUB_TOKENIZER_CLASS,
    TOKENIZER_MAPPING_NAMES,
)

from finetune.artifact import RunFolder
from finetune.base import REBUILT_TOKENIZERS, read_base
from finetune.release import merge as merge_file
from finetune.release.fresh import Proof
from finetune.release.merge import Release, merge
from finetune.release.proof import prove
from finetune.run import run
from tests.conftest import alpaca_rows, write_recipe
from tests.release.models import KINDS, make_base

POCKET, STORIES = "pocket-llama", "stories260K"
# A float32 release differs by the order of summation alone; one stored in bfloat16 by rounding each weight once.
RELATIVE_LIMIT = {torch.float32: 1e-5}
# Where rounding sends a token to another expert, as it does to one in some hundred, its logits jump. So base + adapter
# is computed with the experts that the release chooses, and freely with its sums rounded; both at every seed.
KL_LIMIT = 1e-3
TEXTS = (
    "the red fox sells seven small pears in the market",
    "### Instruction:\nWhere is Brundel?\n\n### Response:\n",
    "Übersetze: 17 + 25 = 42, naïve café.\n\n  def f(x): return {'a': [1, 2]}",
)


@dataclass(frozen=True)
class Cell:
    """One way from a base to a release."""

    kind: str
    dtype: str  # how the base is stored; pocket-llama and stories260K are stored as they are
    quantization: str
    method: str

    def __str__(self) -> str:
        return f"{self.kind}, {self.dtype}, {self.quantization}, {self.method}"


# Every family once, both quantisations, every method; the rest of the matrix is in soak.
CHOSEN = [
    Cell(POCKET, "stored", "nf4", "lora"),
    Cell(STORIES, "stored", "none", "lora"),
    Cell("llama", "float32", "none", "lora"),
    Cell("llama, multi-head", "bfloat16", "nf4", "dora"),
    Cell("llama, tied", "bfloat16", "none", "rslora"),
    Cell("llama, biases", "float32", "nf4", "lora"),
    Cell("mistral", "bfloat16", "nf4", "lora"),
    Cell("qwen2", "bfloat16", "nf4", "rslora"),
    Cell("qwen3", "bfloat16", "nf4", "dora"),
    Cell("gemma2", "bfloat16", "nf4", "lora"),
    Cell("gemma3", "float16", "nf4", "lora"),
    Cell("mixtral", "float32", "none", "lora"),
    Cell("mixtral", "bfloat16", "nf4", "lora"),
    Cell("qwen3_moe", "bfloat16", "none", "dora"),
]
STORED = [(kind, dtype) for kind in KINDS for dtype in ("float32", "bfloat16", "float16")]
STORED += [(POCKET, "stored"), (STORIES, "stored")]
MATRIX = [
    Cell(*stored, quantization, method)
    for stored, quantization, method in itertools.product(STORED, ("none", "nf4"), ("lora", "rslora", "dora"))
]
CELLS = [*CHOSEN, *(pytest.param(cell, marks=pytest.mark.soak) for cell in MATRIX if cell not in CHOSEN)]


def prove_here(pairs: Sequence[tuple[Path, Path]]) -> list[list[Proof]]:
    """The proofs without a process of their own, which takes seconds; test_mutations.py has the real one."""
    return [prove(folder, run) for folder, run in pairs]


def train(folder: Path, cell: Cell, base: Path | str) -> RunFolder:
    """Five steps, as a recipe asks for them."""
    settings = {"model__quantization": cell.quantization, "adapter__method": cell.method, "train__max_steps": 5}
    return run(write_recipe(folder, base, alpaca_rows(20), data__eval=6, **settings))


def base_of(cell: Cell, folder: Path, request: pytest.FixtureRequest) -> Path | str:
    if cell.kind == POCKET:
        return f"builtin:{POCKET}"
    if cell.kind == STORIES:
        return request.getfixturevalue("shared") / "weights" / STORIES
    return make_base(folder / "base", cell.kind, dtype=cell.dtype)


@dataclass(frozen=True)
class Oracle:
    """Logits by transformers, bitsandbytes and PEFT as anybody calls them, in float32."""

    tuned: list[torch.Tensor]  # base + adapter
    base: list[torch.Tensor]
    on_routes: list[torch.Tensor]  # base + adapter, with experts that were told
    rounded: list[torch.Tensor]  # merged by PEFT and rounded, each element once


def oracle_of(
    folder: Path,
    adapter: Path,
    onto: str,
    probes: Sequence[Sequence[int]],
    routes: Sequence[torch.Tensor],
    stored: torch.dtype,
) -> Oracle:
    quantization = None
    if onto == "dequantized":
        quantization = BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=torch.float32,
        )  # fmt: skip
    base = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, quantization_config=quantization)
    if quantization is not None:
        base = base.dequantize()  # bitsandbytes' kernels for AVX512-BF16 compute in bfloat16 whatever is asked
    tuned = PeftModel.from_pretrained(base, str(adapter)).eval()
    free = logits(tuned, probes)
    with tuned.disable_adapter():
        alone = logits(tuned, probes)
    with followed(tuned, routes):
        on_routes = logits(tuned, probes)
    merged = tuned.merge_and_unload()
    for parameter in merged.parameters():
        parameter.data = parameter.to(stored).float()
    return Oracle(free, alone, on_routes, logits(merged, probes))


def with_experts_in_4_bits(folder: Path, target: Path) -> Path:
    """A copy of a base in float32 whose experts, tensor by tensor, have the values that bitsandbytes makes of them."""
    shutil.copytree(folder, target)
    tensors = {name: tensor.float() for name, tensor in load_file(folder / "model.safetensors").items()}
    for name, tensor in tensors.items():
        if ".experts." in name and tensor.shape[-1] % 64 == 0:  # others stay as they are
            packed, state = quantize_4bit(tensor, blocksize=64, compress_statistics=True, quant_type="nf4")
            tensors[name] = dequantize_4bit(packed, state)
    save_file(tensors, target / "model.safetensors", metadata={"format": "pt"})
    return target


def routers(model: torch.nn.Module) -> list[torch.nn.Module]:
    return [module for module in model.modules() if type(module).__name__.endswith("TopKRouter")]


@contextmanager
def noted(model: torch.nn.Module) -> Iterator[list[torch.Tensor]]:
    """The experts that the routers choose, call by call."""
    chosen: list[torch.Tensor] = []
    hooks = [each.register_forward_hook(lambda _m, _args, found: chosen.append(found[2])) for each in routers(model)]
    yield chosen
    for hook in hooks:
        hook.remove()


@contextmanager
def followed(model: torch.nn.Module, chosen: Sequence[torch.Tensor]) -> Iterator[None]:
    """The routers give each token to these experts; shares of the chosen, brought to a sum of one."""
    waiting = iter(chosen)

    def choose(_module: Any, _args: Any, found: Any) -> Any:
        index = next(waiting)
        shares = found[0].softmax(dim=-1).gather(-1, index)
        return found[0], shares / shares.sum(dim=-1, keepdim=True), index

    hooks = [each.register_forward_hook(choose) for each in routers(model)]
    yield
    for hook in hooks:
        hook.remove()


def logits(model: torch.nn.Module, probes: Sequence[Sequence[int]]) -> list[torch.Tensor]:
    with torch.no_grad():
        return [model(input_ids=torch.tensor([list(ids)])).logits[0].double() for ids in probes]


def mean_kl(reference: Sequence[torch.Tensor], other: Sequence[torch.Tensor]) -> float:
    """Mean Kullback-Leibler divergence over all positions, in nats."""
    expected, found = torch.cat(list(reference)).log_softmax(-1), torch.cat(list(other)).log_softmax(-1)
    return (expected.exp() * (expected - found)).sum(-1).mean().item()


def relative(reference: Sequence[torch.Tensor], other: Sequence[torch.Tensor]) -> float:
    """The largest difference of a logit over the largest logit."""
    expected, found = torch.cat(list(reference)), torch.cat(list(other))
    return ((found - expected).abs().max() / expected.abs().max()).item()


def assert_is_base_and_adapter(trained: RunFolder, release: Release) -> None:
    tokenizer = AutoTokenizer.from_pretrained(release.out)
    probes = [tokenizer(text)["input_ids"] for text in TEXTS]
    assert probes == [AutoTokenizer.from_pretrained(trained.plan["model"]["folder"])(t)["input_ids"] for t in TEXTS]
    stored = AutoModelForCausalLM.from_pretrained(release.out, dtype="auto").dtype
    plain = AutoModelForCausalLM.from_pretrained(release.out, dtype=torch.float32)
    with noted(plain) as routes:
        released = logits(plain, probes)
    base = Path(trained.plan["model"]["folder"])
    if routes and release.onto.chosen == "dequantized":
        base = with_experts_in_4_bits(base, release.out.with_name("base with experts in 4 bits"))
    oracle = oracle_of(base, trained.adapter, release.onto.chosen, probes, routes, stored)
    divergence = mean_kl(oracle.on_routes, released)
    assert divergence <= KL_LIMIT
    assert mean_kl(oracle.rounded, released) <= KL_LIMIT
    if stored in RELATIVE_LIMIT:
        assert relative(oracle.tuned, released) <= RELATIVE_LIMIT[stored]
    # What the adapter changes is more than what rounding changes.
    assert mean_kl(oracle.tuned, oracle.base) > 50 * divergence


@pytest.mark.parametrize("cell", CELLS, ids=str)
def test_a_release_is_base_and_adapter(
    cell: Cell, tmp_path: Path, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(merge_file, "prove_in_fresh_process", prove_here)
    trained = train(tmp_path, cell, base_of(cell, tmp_path, request))
    release = merge(trained.path, out=tmp_path / "release")
    assert [found for found in release.proofs if not found.passed] == []
    assert_is_base_and_adapter(trained, release)


def test_the_experts_and_the_router_of_a_mixture_are_no_linears(tmp_path: Path) -> None:
    """transformers holds them as parameters of three dimensions, which no 4-bit linear and no LoRA replaces."""
    facts = read_base(str(make_base(tmp_path, "mixtral", dtype="float32"))).facts
    model = AutoModelForCausalLM.from_pretrained(tmp_path)
    linears = {
        name: (module.out_features, module.in_features)
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear) and name != "lm_head"
    }
    assert {each.module: (each.out_features, each.in_features) for each in facts.linears} == linears
    assert {each.leaf for each in facts.linears} == {"q_proj", "k_proj", "v_proj", "o_proj"}


@pytest.mark.parametrize("kind", KINDS)
def test_training_reads_the_ids_that_transformers_gives_a_user_of_the_base(kind: str, tmp_path: Path) -> None:
    """transformers rebuilds the tokenizer of some model types whatever class the folder declares: Qwen 2's, for one."""
    folder = make_base(tmp_path, kind, dtype="bfloat16")
    ours, theirs = read_base(str(folder)).tokenizer, AutoTokenizer.from_pretrained(folder)
    texts = [*TEXTS, "I'll say IT'S 1234567 o'clock"]
    assert [ours.encode(text, add_special_tokens=False).ids for text in texts] == [
        theirs(text, add_special_tokens=False)["input_ids"] for text in texts
    ]


def test_the_tokenizers_that_transformers_rebuilds_are_known() -> None:
    own_class = {
        model_type
        for model_type in MODELS_WITH_INCORRECT_HUB_TOKENIZER_CLASS
        if TOKENIZER_MAPPING_NAMES.get(model_type) not in {None, "TokenizersBackend"}
    }
    assert own_class <= REBUILT_TOKENIZERS
