"""The arithmetic of a merge, against PEFT in float64 and against the formula written out; the base it is added to."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from finetune.artifact import RunFolder
from finetune.model import load as load_file_of_model
from finetune.model.adapter import load_adapter
from finetune.model.delta import quantized_weights
from finetune.model.load import load_base
from finetune.release.delta import Onto, read_deltas, round_tuned, scale_of
from finetune.release.proof import load_plain, make_onto
from finetune.release.proof_files import count_not_nearest
from finetune.release.source import Source, read_source
from tests.release.runs import random_run

CASES = [
    ("lora", "float32", True),
    ("rslora", "bfloat16", False),
    ("dora", "bfloat16", True),
    ("dora", "float32", False),
]
Q_PROJ = "model.layers.1.self_attn.q_proj.weight"


@pytest.fixture(scope="module", params=CASES, ids=lambda case: "-".join(map(str, case)))
def run(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    method, dtype, tied = request.param
    return random_run(tmp_path_factory.mktemp("run"), dtype=dtype, tied=tied, adapter__method=method)


def stored(run: RunFolder) -> dict[str, torch.Tensor]:
    return load_file(str(read_source(run.path).base.facts.folder / "model.safetensors"))


def merged_by_peft(run: RunFolder) -> dict[str, torch.Tensor]:
    """PEFT's own merge of an unquantised base, everything in float64."""
    base = AutoModelForCausalLM.from_pretrained(read_source(run.path).base.facts.folder, dtype=torch.float64)
    return dict(load_adapter(base, run.adapter).double().merge_and_unload().named_parameters())


def test_a_merge_is_pefts_in_float64_rounded_once(run: RunFolder) -> None:
    expected, weights = merged_by_peft(run), stored(run)
    deltas = read_deltas(run.adapter)
    assert len(deltas) == 14  # two layers, seven linears each
    for name, delta in deltas.items():
        exact = expected[name].detach()
        ours = round_tuned(weights[name], delta, dtype=weights[name].dtype)
        other = exact.to(ours.dtype)
        # Equal but for an element at a tie, which the last bit of float64 decides.
        assert (ours != other).sum() <= 1
        assert not torch.equal(ours, weights[name])


def test_a_merge_is_the_written_out_formula(run: RunFolder) -> None:
    config = json.loads((run.adapter / "adapter_config.json").read_text())
    tensors = load_file(str(run.adapter / "adapter_model.safetensors"))
    a, b = (tensors[f"base_model.model.{Q_PROJ[:-7]}.lora_{part}.weight"].double().numpy() for part in "AB")
    scale = config["lora_alpha"] / (config["r"] ** 0.5 if config["use_rslora"] else config["r"])
    weight = stored(run)[Q_PROJ]
    exact = weight.double().numpy() + scale * b @ a
    if config["use_dora"]:
        magnitude = tensors[f"base_model.model.{Q_PROJ[:-7]}.lora_magnitude_vector"].double().numpy()
        exact *= (magnitude / np.linalg.norm(exact, axis=1))[:, None]
    ours = round_tuned(weight, read_deltas(run.adapter)[Q_PROJ], dtype=weight.dtype).double().numpy()
    step = {torch.float32: 2.0**-24, torch.bfloat16: 2.0**-9}[weight.dtype]
    assert (np.abs(ours - exact) <= np.abs(exact) * 2 * step).all()
    assert scale_of(config) == scale


def test_nearest_is_counted_to_the_last_element(run: RunFolder) -> None:
    """Off by one step of the stored dtype in one element: one violation."""
    weight, delta = stored(run)[Q_PROJ], read_deltas(run.adapter)[Q_PROJ]
    ours = round_tuned(weight, delta, dtype=weight.dtype)
    assert count_not_nearest(ours, weight, delta) == 0
    bits = ours.view(torch.int32 if ours.dtype == torch.float32 else torch.int16)
    bits[3, 5] += 1
    assert count_not_nearest(ours, weight, delta) == 1
    ours[0, 0] = float("nan")
    assert count_not_nearest(ours, weight, delta) == 2


def logits(model: torch.nn.Module, tokens_BT: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=tokens_BT, use_cache=False).logits


def chosen_weights(source: Source, onto: Onto) -> dict[str, torch.Tensor]:
    """The linears' weights as the deltas meet them."""
    tensors = load_file(str(source.base.facts.folder / "model.safetensors"))
    names = [f"{linear.module}.weight" for linear in source.base.facts.linears]
    return {name: onto.weight(tensors[name]) for name in names}


def test_the_dequantised_base_is_the_trained_4bit_model(run: RunFolder) -> None:
    """Same logits with the adapter, also after the 4-bit model has been evaluated; same weights, bit for bit."""
    source = read_source(run.path)
    onto = make_onto(source, "dequantized")
    tokens_BT = torch.randint(10, 500, (2, 24), generator=torch.Generator().manual_seed(3))
    trained = load_adapter(load_base(source.model), source.adapter).eval()
    first = logits(trained, tokens_BT)
    plain, weights = load_plain(source.base.facts.folder, source.model.device), chosen_weights(source, onto)
    for name, weight in weights.items():
        plain.get_parameter(name).data.copy_(weight)
    chosen = load_adapter(plain, source.adapter).eval()
    scale = first.std()
    assert (logits(chosen, tokens_BT) - first).abs().max() / scale < 1e-5
    assert torch.equal(logits(trained, tokens_BT), first)
    held = dict(quantized_weights(trained))
    assert len(held) == 14
    for name, weight in weights.items():
        assert torch.equal(held[name.removesuffix(".weight")], weight)


def test_without_the_fix_an_evaluation_breaks_the_4bit_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The mutation of the test above, where the CPU has the instructions that bitsandbytes repacks for."""
    import bitsandbytes.functional as bnb

    if not bnb.has_avx512bf16():
        pytest.skip("this CPU has no AVX512-BF16, so bitsandbytes never repacks")
    source = read_source(random_run(tmp_path).path)
    monkeypatch.setattr(load_file_of_model, "keep_4bit_weights_unpacked", lambda model: None)
    trained = load_base(source.model)
    logits(trained, torch.randint(10, 500, (2, 24)))
    held = dict(quantized_weights(trained))
    chosen = chosen_weights(source, make_onto(source, "dequantized"))
    assert not all(torch.equal(held[name], chosen[f"{name}.weight"]) for name in held)
