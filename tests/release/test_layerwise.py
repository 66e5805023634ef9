"""One layer in memory at a time: what transformers and PEFT compute with the whole model, in less memory."""

from __future__ import annotations

import json
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache, PreTrainedModel

from finetune.base import TensorEntry
from finetune.data.examples import Example
from finetune.errors import StorageError
from finetune.model.adapter import attach_adapter, load_adapter, save_adapter
from finetune.plan import AdapterPlan
from finetune.release import layerwise
from finetune.release.layerwise import LayerwiseModel, Pass
from finetune.release.measure import (
    answer_passes,
    deviation,
    greedy_answers,
    greedy_gap,
    loss_passes,
    loss_stretches,
    mean_divergence,
    mean_loss_of,
    positions_compared,
    probe_passes,
    rms_difference,
)
from finetune.release.weights import read_tensors
from finetune.train.held_out import mean_loss

SIZES = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "vocab_size": 99}
SIZES |= {"num_attention_heads": 4, "max_position_embeddings": 128}
GROUPED = {**SIZES, "num_key_value_heads": 2}
SLIDING = ["sliding_attention", "full_attention", "sliding_attention"]
FAMILIES = {
    "llama, tied": {"model_type": "llama", **GROUPED, "tie_word_embeddings": True},
    "llama, biases": {"model_type": "llama", **SIZES, "attention_bias": True, "mlp_bias": True},
    "mistral": {"model_type": "mistral", **GROUPED, "sliding_window": 5},
    "qwen2": {"model_type": "qwen2", **GROUPED, "tie_word_embeddings": True},
    "qwen3": {"model_type": "qwen3", **GROUPED, "head_dim": 8},
    "gemma2": {"model_type": "gemma2", **GROUPED, "head_dim": 8, "sliding_window": 4, "layer_types": SLIDING},
    "gemma3": {"model_type": "gemma3_text", **GROUPED, "head_dim": 8, "sliding_window": 4, "layer_types": SLIDING},
    "phi3": {"model_type": "phi3", **GROUPED, "pad_token_id": 0},
    "mixtral": {"model_type": "mixtral", **GROUPED, "num_local_experts": 4},
    "qwen3_moe": {"model_type": "qwen3_moe", **GROUPED, "head_dim": 8, "num_experts": 4, "num_experts_per_tok": 2}
    | {"moe_intermediate_size": 16},
    "gpt2": {"model_type": "gpt2", "vocab_size": 99, "n_embd": 32, "n_layer": 3, "n_head": 4, "n_positions": 128},
    # Its layers give pairs, which the model takes apart between them: computed whole.
    "falcon": {"model_type": "falcon", "vocab_size": 99, "hidden_size": 32, "num_hidden_layers": 3}
    | {"num_attention_heads": 4},
}
LENGTHS = (9, 17, 1, 6)


def make_model(folder: Path, config: dict) -> Path:
    """A random model of a family; no weight is a zero or a one, so that each of them matters."""
    settings = dict(config)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(settings.pop("model_type"), **settings))
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator) + 0.05)
    model.save_pretrained(folder)
    return folder


def whole(folder: Path) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(str(folder), dtype=torch.float32).eval()


def probes() -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(99, (1, length), generator=generator) for length in LENGTHS]


def row(length: int, seed: int) -> Example:
    ids = np.random.default_rng(seed).integers(0, 99, length)
    return Example(ids.astype(np.int32), np.arange(length) >= length // 3, "here", length // 3, 0)


def equal(ours: Sequence[torch.Tensor], theirs: Sequence[torch.Tensor]) -> bool:
    return all((a - b).abs().max() <= 1e-6 * b.abs().max() for a, b in zip(ours, theirs, strict=True))


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("families")
    return {name: make_model(root / str(number), config) for number, (name, config) in enumerate(FAMILIES.items())}


@pytest.mark.parametrize("family", FAMILIES)
def test_logits_loss_and_answers_are_the_whole_models(folders: dict[str, Path], family: str) -> None:
    reference, model = whole(folders[family]), LayerwiseModel(folders[family])
    with torch.no_grad():
        theirs = [reference(input_ids=ids, use_cache=False).logits[0] for ids in probes()]
        last = [reference(input_ids=ids, use_cache=False, logits_to_keep=2).logits[0] for ids in probes()]
    assert equal(list(model.logits([Pass(ids) for ids in probes()])), theirs)
    assert equal(list(model.logits([Pass(ids, keep=2) for ids in probes()])), last)
    assert model.is_cut is (family != "falcon")

    rows = [row(length, seed=length) for length in (7, 12, 20)]
    stretches = loss_stretches(rows, device="cpu")
    loss = mean_loss_of(stretches, model.logits(loss_passes(stretches)))
    assert loss == pytest.approx(mean_loss(reference, rows, tokens_per_pass=64), rel=1e-6)

    prompts = [ids[0].tolist() for ids in probes()]
    answers = greedy_answers(model, prompts, tokens=6, stops=())
    for prompt, answer in zip(prompts, answers, strict=True):
        ids = torch.tensor([prompt])
        written = reference.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=6,
                                     eos_token_id=None, pad_token_id=0)  # fmt: skip
        assert answer.written == written[0, len(prompt) :].tolist()
    assert greedy_gap(answers, model.logits(answer_passes(answers))) == 0


@pytest.mark.parametrize("family", ["llama, tied", "mixtral", "gemma3"])
@pytest.mark.parametrize("method", ["lora", "dora"])
def test_an_adapter_computes_beside_the_base_as_peft_does(
    folders: dict[str, Path], tmp_path: Path, family: str, method: str
) -> None:
    targets = ("q_proj", "v_proj")
    plan = AdapterPlan(method, rank=4, alpha=8.0, dropout=0.0, targets=targets, seed=0, start_from=None)
    tuned = attach_adapter(whole(folders[family]), plan, base="here")
    for number, (name, parameter) in enumerate(tuned.named_parameters()):
        if "lora_" in name:
            generator = torch.Generator().manual_seed(number)
            parameter.data += 0.3 * torch.rand(parameter.shape, generator=generator)
    save_adapter(tuned, tmp_path)
    reference = load_adapter(whole(folders[family]), tmp_path)
    model = LayerwiseModel(folders[family], adapter=tmp_path)
    with torch.no_grad():
        theirs = [reference(input_ids=ids, use_cache=False).logits[0] for ids in probes()]
        with reference.disable_adapter():
            base = [reference(input_ids=ids, use_cache=False).logits[0] for ids in probes()]
    passes = [Pass(ids) for ids in probes()] + [Pass(ids, adapted=False) for ids in probes()]
    assert equal(list(model.logits(passes)), theirs + base)
    assert equal(list(model.logits(passes[::-1])), (theirs + base)[::-1])  # and the adapter is there again
    assert rms_difference(theirs, base) > 0.1 * deviation(base)


def test_an_adapter_that_lacks_a_weight_is_refused(folders: dict[str, Path], tmp_path: Path) -> None:
    plan = AdapterPlan("lora", rank=4, alpha=8.0, dropout=0.0, targets=("q_proj",), seed=0, start_from=None)
    save_adapter(attach_adapter(whole(folders["qwen3"]), plan, base="here"), tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    tensors = load_file(str(file))
    del tensors["base_model.model.model.layers.1.self_attn.q_proj.lora_B.weight"]
    save_file(tensors, str(file))
    with pytest.raises(StorageError, match=r"holds no .*layers\.1\.self_attn\.q_proj\.lora_B"):
        LayerwiseModel(folders["qwen3"], adapter=tmp_path)
    file.write_bytes(file.read_bytes()[:-7])
    with pytest.raises(StorageError, match="cannot be loaded"):
        LayerwiseModel(folders["qwen3"], adapter=tmp_path)


def test_weights_may_change_while_they_are_read(folders: dict[str, Path]) -> None:
    """What is computed is what `read` gives: one expert of one layer doubled."""
    changed = "model.layers.1.block_sparse_moe.experts.2.w2.weight"

    def read(entries: Sequence[TensorEntry]) -> Iterator[tuple[TensorEntry, torch.Tensor]]:
        for entry, tensor in read_tensors(entries):
            yield entry, 2 * tensor if entry.name == changed else tensor

    reference = whole(folders["mixtral"])
    before = [reference(input_ids=ids).logits[0].detach() for ids in probes()]
    reference.get_parameter("model.layers.1.mlp.experts.down_proj").data[2] *= 2
    after = [reference(input_ids=ids).logits[0].detach() for ids in probes()]
    found = list(LayerwiseModel(folders["mixtral"], read=read).logits([Pass(ids) for ids in probes()]))
    assert equal(found, after)
    assert not equal(found, before)


def test_each_layer_is_read_once_for_the_passes_that_fit(
    folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    reads: Counter[str] = Counter()

    def read(entries: Sequence[TensorEntry]) -> Iterator[tuple[TensorEntry, torch.Tensor]]:
        for entry, tensor in read_tensors(entries):
            reads[entry.name] += 1
            yield entry, tensor

    model = LayerwiseModel(folders["qwen3"], read=read)
    layers = [name for name in load_file(str(folders["qwen3"] / "model.safetensors")) if ".layers." in name]
    together = list(model.logits([Pass(ids) for ids in probes()]))
    assert {reads[name] for name in layers} == {1}
    monkeypatch.setattr(layerwise, "BYTES_BETWEEN_LAYERS", 1)
    assert equal(list(model.logits([Pass(ids) for ids in probes()])), together)
    assert {reads[name] for name in layers} == {1 + len(LENGTHS)}
    model.parts.keeps = True
    for _ in range(2):
        assert equal(list(model.logits([Pass(ids) for ids in probes()])), together)
    assert {reads[name] for name in layers} == {2 + len(LENGTHS)}


def test_a_cache_goes_on_where_it_stopped(folders: dict[str, Path]) -> None:
    """Beyond the sliding window of four tokens, too."""
    model = LayerwiseModel(folders["gemma2"])
    ids = probes()[1]
    (at_once,) = model.logits([Pass(ids)])
    cache = DynamicCache(config=model.config)
    parts = [next(model.logits([Pass(part, cache=cache)])) for part in ids.split([6, 1, 1, 9], dim=1)]
    assert (torch.cat(parts) - at_once).abs().max() < 1e-5 * at_once.std()


@pytest.mark.parametrize("damage", ["missing", "other shape"])
def test_files_that_are_not_the_configs_are_refused(tmp_path: Path, damage: str) -> None:
    folder = make_model(tmp_path, FAMILIES["qwen2"])
    tensors = load_file(str(folder / "model.safetensors"))
    name = "model.layers.2.mlp.up_proj.weight"
    tensors[name] = tensors[name][:-1].clone()
    if damage == "missing":
        del tensors[name]
    save_file(tensors, str(folder / "model.safetensors"), metadata={"format": "pt"})
    with pytest.raises(StorageError, match=r"no usable model\.layers\.2\.mlp\.up_proj\.weight"):
        list(LayerwiseModel(folder).logits([Pass(ids) for ids in probes()]))


def test_a_different_answer_is_as_far_as_the_logits_say(folders: dict[str, Path]) -> None:
    """Of a model whose head has two rows swapped: the first difference counts, later ones do not."""
    model, prompts = LayerwiseModel(folders["qwen3"]), [ids[0].tolist() for ids in probes()]
    answers = greedy_answers(model, prompts, tokens=5, stops=())
    first = answers[0].written[0]
    other = (first + 1) % 99

    def read(entries: Sequence[TensorEntry]) -> Iterator[tuple[TensorEntry, torch.Tensor]]:
        for entry, tensor in read_tensors(entries):
            if entry.name == "lm_head.weight":
                tensor[[first, other]] = tensor[[other, first]]
            yield entry, tensor

    swapped = LayerwiseModel(folders["qwen3"], read=read)
    expected = max(
        (
            (logits_AV[place, token] - logits_AV[place, other if token == first else first]).item()
            for answer, logits_AV in zip(answers, model.logits(answer_passes(answers)), strict=True)
            for place, token in enumerate(answer.written[:1])
            if token in {first, other}
        )
    )
    found = greedy_gap(answers[:1], swapped.logits(answer_passes(answers[:1])))
    assert found == pytest.approx(expected)
    assert found > 0


def test_an_answer_ends_at_a_stop_token(folders: dict[str, Path]) -> None:
    model, prompts = LayerwiseModel(folders["qwen2"]), [ids[0].tolist() for ids in probes()]
    free = greedy_answers(model, prompts, tokens=6, stops=())
    stop = free[0].written[2]
    for before, stopped in zip(free, greedy_answers(model, prompts, tokens=6, stops=[stop]), strict=True):
        end = before.written.index(stop) + 1 if stop in before.written else 6
        assert stopped.written == before.written[:end]


def test_figures_are_the_written_out_formulas() -> None:
    generator = torch.Generator().manual_seed(2)
    some = [torch.randn(length, 11, generator=generator) for length in (3, 5)]
    others = [logits + 0.1 * torch.randn(logits.shape, generator=generator) for logits in some]
    p, q = torch.cat(some).double().log_softmax(1), torch.cat(others).double().log_softmax(1)
    assert mean_divergence(some, others) == pytest.approx(F.kl_div(q, p, log_target=True, reduction="batchmean").item())
    assert deviation(some) == pytest.approx(torch.cat(some).std(unbiased=False).item())
    squares = (torch.cat(some) - torch.cat(others)).square()
    assert rms_difference(some, others) == pytest.approx(squares.mean().sqrt().item())


def test_logits_that_are_kept_have_a_limit() -> None:
    assert positions_compared(18, 32_000) == 32
    assert positions_compared(18, 262_144) == 14
    assert positions_compared(10**6, 10**6) == 1
    assert {one.keep for one in probe_passes([[1, 2]] * 18, vocabulary=262_144)} == {14}


MEASURE = """
import json, resource, sys, torch
from pathlib import Path
from finetune.release.layerwise import LayerwiseModel, Pass

def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10

small, large = map(Path, sys.argv[1:])
ids = torch.randint(99, (1, 64))
list(LayerwiseModel(small).logits([Pass(ids, keep=1)]))  # what the libraries take at their first use
before = peak()
list(LayerwiseModel(large).logits([Pass(ids, keep=1) for _ in range(4)]))
print(json.dumps(peak() - before))
"""
ROOM = 48 << 20  # for activations of 256 tokens and what the allocator keeps


def test_memory_is_the_embedding_and_two_layers(folders: dict[str, Path], tmp_path: Path) -> None:
    """Of 350 MB in float32, stored in 16 bits: measured in a process of its own, which has computed a small one."""
    sizes = {"hidden_size": 768, "intermediate_size": 2048, "num_hidden_layers": 12, "vocab_size": 4000}
    config = AutoConfig.for_model("llama", **sizes, num_attention_heads=12, tie_word_embeddings=False)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    config.save_pretrained(tmp_path)
    zeros = {name: torch.zeros(found.shape, dtype=torch.bfloat16) for name, found in model.state_dict().items()}
    save_file(zeros, str(tmp_path / "model.safetensors"), metadata={"format": "pt"})
    layer = 4 * sum(parameter.numel() for parameter in model.model.layers[0].parameters())
    embedding = 4 * model.lm_head.weight.numel()
    total = 4 * sum(parameter.numel() for parameter in model.parameters())
    command = [sys.executable, "-c", MEASURE, str(folders["qwen3"]), str(tmp_path)]
    answer = subprocess.run(command, capture_output=True, text=True, check=True)
    taken = json.loads(answer.stdout.splitlines()[-1])
    assert taken <= embedding + 2 * layer + ROOM
    assert total > 2 * (embedding + 2 * layer + ROOM)
