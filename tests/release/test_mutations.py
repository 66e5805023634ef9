"""Good releases of several families and every wrong merge we know: a fresh process passes those, and fails these."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from finetune.artifact import RunFolder, read_json, write_json
from finetune.release.delta import Delta, read_deltas
from finetune.release.fresh import Proof, prove_in_fresh_process
from finetune.release.proof import make_onto
from finetune.release.source import read_source
from finetune.run import run as train
from tests.conftest import alpaca_rows, write_recipe
from tests.release.models import make_base
from tests.release.runs import copy_release, describe_again, unproven_release

pytestmark = pytest.mark.xdist_group("mutations")  # one worker makes the releases, not each

# Named proofs.
NOT_NEAREST = "tuned elements that are not the nearest value"
LOGITS = "logits against base + adapter"
RMS = "logits against base + adapter, root mean square"
ROUNDED = "logits against the sums, rounded"
NO_OP = "no-op"
OTHERS = "other tensors that changed"
SHAPES = "tensor names, shapes and dtypes"
IDS, RENDERING = "probes whose ids differ", "probes whose rendering differs"
TEMPLATE, STOPS = "template differs", "stop tokens that differ"

# Kind of base, how it is stored, quantised and trained, and what its release is merged onto; else two layers.
FAMILIES = {
    "llama": ("llama", "float32", "none", "lora", "original"),
    "mistral": ("mistral", "bfloat16", "none", "dora", "original"),
    "qwen2": ("qwen2", "bfloat16", "nf4", "rslora", "dequantized"),
    "gemma2": ("gemma2", "bfloat16", "nf4", "lora", "dequantized"),
    "mixtral": ("mixtral", "bfloat16", "nf4", "lora", "dequantized"),
    "mixtral, float32": ("mixtral", "float32", "none", "lora", "original"),
    "qwen3_moe": ("qwen3_moe", "bfloat16", "none", "lora", "original"),
    "gemma3, deep": ("gemma3", "bfloat16", "none", "lora", "original"),
}
LAYERS = {"gemma3, deep": 8}


@dataclass(frozen=True)
class Good:
    """A whole release, its run, another run on the same base, and the weights [out, in] that the deltas meet."""

    release: Path
    run: RunFolder
    other_run: RunFolder
    onto: str
    weights: dict[str, torch.Tensor]
    deltas: dict[str, Delta]

    @property
    def alpha(self) -> float:
        return read_json(self.run.adapter / "adapter_config.json")["lora_alpha"]


def tuned(weight_OI: torch.Tensor, delta: Delta, *, added_OI: torch.Tensor | None = None) -> torch.Tensor:
    """W + s*B*A in float64, or W plus another sum; with DoRA each row brought to its magnitude."""
    added = delta.scale * delta.b_OR.double() @ delta.a_RI.double() if added_OI is None else added_OI
    total = weight_OI.double() + added
    if delta.magnitude_O is not None:
        total *= (delta.magnitude_O.double() / total.norm(dim=1))[:, None]
    return total


Weights = Iterator[tuple[str, torch.Tensor]]


def skip_a_layer(good: Good) -> Weights:
    yield from ((name, weight) for name, weight in good.weights.items() if ".layers.1." in name)


def merge_nothing(good: Good) -> Weights:
    yield from good.weights.items()


def forget_to_divide_by_the_rank(good: Good) -> Weights:
    for name, weight in good.weights.items():
        delta = good.deltas[name]
        yield name, tuned(weight, delta, added_OI=good.alpha * delta.b_OR.double() @ delta.a_RI.double())


def scale_by_two_percent_more(good: Good) -> Weights:
    for name, weight in good.weights.items():
        delta = good.deltas[name]
        yield name, tuned(weight, replace(delta, scale=1.02 * delta.scale))


def transpose(good: Good) -> Weights:
    """The delta of a square weight transposed, of any other with A's rows in reverse."""
    for name, weight in good.weights.items():
        delta = good.deltas[name]
        a_RI, b_OR = delta.a_RI.double(), delta.b_OR.double()
        square = weight.shape[0] == weight.shape[1]
        yield name, tuned(weight, delta, added_OI=delta.scale * ((b_OR @ a_RI).T if square else b_OR @ a_RI.flip(0)))


def merge_another_run(good: Good) -> Weights:
    others = read_deltas(good.other_run.adapter)
    yield from ((name, tuned(weight, others[name])) for name, weight in good.weights.items())


def round_twice(good: Good) -> Weights:
    """Weight and delta rounded to bfloat16 one by one, then their sum, as a model loaded in 16 bits merges."""
    for name, weight in good.weights.items():
        exact = tuned(weight, good.deltas[name])
        yield name, weight.bfloat16() + (exact - weight.double()).float().bfloat16()


def swap_the_tokenizer(release: Path, good: Good) -> None:
    """Another byte-level tokenizer of the same control tokens and size limit."""
    stored = read_json(release / "tokenizer.json")
    control = [token["content"] for token in sorted(stored["added_tokens"], key=lambda token: token["id"])]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=400, special_tokens=control, initial_alphabet=alphabet)
    tokenizer.train_from_iterator([row["instruction"] for row in alpaca_rows(20)], trainer)
    tokenizer.save(str(release / "tokenizer.json"))


def edit_the_template(release: Path, good: Good) -> None:
    file = release / "chat_template.jinja"
    file.write_text(file.read_text().replace("### Response:", "### Answer:"))


def drop_the_stop_token(release: Path, good: Good) -> None:
    config = read_json(release / "generation_config.json")
    found = config["eos_token_id"] if isinstance(config["eos_token_id"], list) else [config["eos_token_id"]]
    kept = [stop for stop in found if stop not in good.run.plan["stop_token_ids"]]
    assert len(kept) < len(found)
    write_json(release / "generation_config.json", config | {"eos_token_id": kept})


def change_a_byte(release: Path, good: Good) -> None:
    """The lowest bit of one number of a weight that no adapter touches."""
    tensors = load_file(str(release / "model.safetensors"))
    tensors["model.embed_tokens.weight"].view(torch.uint8)[7, 0] ^= 1
    save_file(tensors, str(release / "model.safetensors"), metadata={"format": "pt"})


def change_the_dtype(release: Path, good: Good) -> None:
    tensors = load_file(str(release / "model.safetensors"))
    other = torch.float16 if tensors["model.embed_tokens.weight"].dtype == torch.bfloat16 else torch.bfloat16
    tensors = {name: tensor.to(other) for name, tensor in tensors.items()}
    save_file(tensors, str(release / "model.safetensors"), metadata={"format": "pt"})
    config = read_json(release / "config.json")
    write_json(release / "config.json", config | {"dtype": str(other).removeprefix("torch.")})


def change_the_config(release: Path, good: Good) -> None:
    """A base of the rotary angles that is a hundredth larger: less than rounding to 16 bits changes."""
    config = read_json(release / "config.json")
    config["rope_parameters"]["rope_theta"] *= 1.01
    write_json(release / "config.json", config)


# What is done to a good release, and the proofs that must see it although the manifest agrees with the files.
WEIGHTS: dict[Callable[[Good], Weights], set[str]] = {
    skip_a_layer: {NOT_NEAREST, ROUNDED, LOGITS, RMS},
    merge_nothing: {NOT_NEAREST, ROUNDED, LOGITS, RMS, NO_OP},
    forget_to_divide_by_the_rank: {NOT_NEAREST, ROUNDED, LOGITS, RMS},
    scale_by_two_percent_more: {NOT_NEAREST, ROUNDED},
    transpose: {NOT_NEAREST, ROUNDED, LOGITS, RMS},
    merge_another_run: {NOT_NEAREST, ROUNDED, LOGITS, RMS},
    round_twice: {NOT_NEAREST, ROUNDED},
}
FILES: dict[Callable[[Path, Good], None], set[str]] = {
    swap_the_tokenizer: {IDS},
    edit_the_template: {TEMPLATE, RENDERING},
    drop_the_stop_token: {STOPS},
    change_a_byte: {OTHERS},
    change_the_dtype: {SHAPES},
    change_the_config: {ROUNDED},
}
EXPECTED = {mutation.__name__: seen for mutation, seen in (WEIGHTS | FILES).items()}


def make_good(folder: Path, family: str) -> Good:
    """Train a run and another with another seed on a random base, and merge the first."""
    kind, dtype, quantization, method, onto = FAMILIES[family]
    base = make_base(folder / "base", kind, dtype=dtype, layers=LAYERS.get(family, 2))
    settings = {"model__quantization": quantization, "adapter__method": method, "data__eval": 6, "train__max_steps": 5}
    runs = [train(write_recipe(folder / str(seed), base, alpaca_rows(20), seed=seed, **settings)) for seed in (17, 18)]
    source = read_source(runs[0].path)
    deltas = read_deltas(runs[0].adapter)
    stored, chosen = load_file(str(base / "model.safetensors")), make_onto(source, onto)
    weights = {name: chosen.weight(stored[name]) for name in deltas}
    return Good(unproven_release(folder / "release", runs[0], onto), *runs, onto, weights, deltas)


def mutate_weights(release: Path, good: Good, mutation: Callable[[Good], Weights]) -> None:
    tensors = load_file(str(release / "model.safetensors"))
    for name, weight in mutation(good):
        tensors[name] = weight.float().to(tensors[name].dtype).contiguous()
    save_file(tensors, str(release / "model.safetensors"), metadata={"format": "pt"})


Found = dict[str, dict[str, dict[str, Proof]]]  # by family, mutation and proof


@pytest.fixture(
    scope="module",
    params=[
        pytest.param(("llama", "gemma2", "mixtral"), id="llama, gemma2, mixtral"),
        pytest.param(
            ("mistral", "qwen2", "mixtral, float32", "qwen3_moe", "gemma3, deep"), id="others", marks=pytest.mark.soak
        ),
    ],
)
def proofs(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Found:
    """Every proof of every release; one process proves all of them, so that its imports are paid once."""
    folder = tmp_path_factory.mktemp("mutations")
    pairs = {}
    for family in request.param:
        good = make_good(folder / family, family)
        pairs[family, "good"] = (good.release, good.run.path)
        for mutation in (*WEIGHTS, *(FILES if family == request.param[0] else ())):  # no family matters to files
            release = copy_release(good.release, folder / family / mutation.__name__)
            if mutation in WEIGHTS:
                mutate_weights(release, good, mutation)
            else:
                mutation(release, good)
            describe_again(release)
            pairs[family, mutation.__name__] = (release, good.run.path)
    every = prove_in_fresh_process(list(pairs.values()))
    shutil.rmtree(folder)
    found: Found = {family: {} for family in request.param}
    for (family, mutation), of_folder in zip(pairs, every, strict=True):
        found[family][mutation] = {proof.name: proof for proof in of_folder}
    return found


def test_good_releases_pass(proofs: Found) -> None:
    wanted = {name for seen in EXPECTED.values() for name in seen}
    for family, of_mutation in proofs.items():
        assert [proof for proof in of_mutation["good"].values() if not proof.passed] == [], family
        assert of_mutation["good"].keys() >= wanted


@pytest.mark.parametrize("mutation", EXPECTED)
def test_a_mutation_fails_its_proofs(proofs: Found, mutation: str) -> None:
    for family, of_mutation in proofs.items():
        if mutation not in of_mutation:
            continue
        found = of_mutation[mutation].values()
        assert of_mutation[mutation]["files"].passed  # it is not the checksum that sees it
        assert {proof.name for proof in found if not proof.passed} >= EXPECTED[mutation], (family, *found)
