"""Facts about targets: what a folder is taken for, how it is loaded, and what is refused with which words."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from finetune.errors import UserError
from finetune.use.target import Target, attention_for_loss, find_target, load_target, transformers_model


def logits_TV(target: Target) -> torch.Tensor:
    ids_1T = torch.tensor([[0, 5, 300, 301, 77]], device=target.device)
    with torch.no_grad():
        return target.model(input_ids=ids_1T).logits[0].float().cpu()


def message_of(target: str, **kwargs: str) -> str:
    with pytest.raises(UserError) as caught:
        find_target(target, **kwargs)
    return str(caught.value)


def test_a_builtin_base_is_found_without_a_template() -> None:
    found = find_target("builtin:pocket-llama")
    assert (found.kind, found.template, found.stop_token_ids, found.adapter) == ("model", None, (1,), None)
    assert found.plan.quantization == "none"


def test_a_template_given_by_name_takes_the_place_of_none() -> None:
    found = find_target("builtin:pocket-llama", template="alpaca")
    assert found.template is not None
    assert found.template.name == "alpaca"


def test_a_float32_base_is_loaded_in_float32(tiny: Target) -> None:
    assert tiny.dtype == "float32"
    assert {parameter.dtype for parameter in tiny.model.parameters()} == {torch.float32}


def test_a_run_is_loaded_as_it_was_trained(run_folder: Path) -> None:
    found = find_target(str(run_folder))
    assert (found.kind, found.plan.quantization, found.plan.dtype, found.system) == (
        "run",
        "nf4",
        "float32",
        "Be brief.",
    )
    assert found.stop_token_ids == (1,)
    assert found.template is not None
    assert found.template.source == (run_folder / "adapter" / "chat_template.jinja").read_text()
    assert found.template.date.year == 2020


def test_an_adapter_folder_inside_a_run_is_the_run(run_folder: Path) -> None:
    inside, run = find_target(str(run_folder / "adapter")), find_target(str(run_folder))
    assert (inside.kind, inside.plan, inside.template) == ("run", run.plan, run.template)


def test_a_checkpoint_of_an_unfinished_run_is_the_run_with_that_adapter(run_folder: Path) -> None:
    checkpoint = run_folder / "checkpoints" / "step-000001"
    checkpoint.mkdir(parents=True)
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        shutil.copyfile(run_folder / "adapter" / name, checkpoint / name)
    whole = logits_TV(load_target(str(run_folder)))
    shutil.rmtree(run_folder / "adapter")
    found = find_target(str(checkpoint))
    assert (found.kind, found.template and found.template.name) == ("run", "alpaca")
    assert torch.equal(logits_TV(load_target(str(checkpoint))), whole)
    assert f"or name its checkpoint {checkpoint}" in message_of(str(run_folder))


def test_an_adapter_elsewhere_is_its_unquantised_base_plus_the_delta(run_folder: Path, tmp_path: Path) -> None:
    folder = tmp_path / "elsewhere" / "deep" / "adapter"
    shutil.copytree(run_folder / "adapter", folder)
    target = load_target(str(folder))
    assert (target.kind, target.plan.quantization) == ("adapter", "none")
    base = load_target(target.plan.base)
    weights = load_file(folder / "adapter_model.safetensors")
    for name, module in transformers_model(base.model).named_modules():
        key = f"base_model.model.{name}.lora_"
        if f"{key}A.weight" in weights:  # W + alpha / rank * B A, LoRA's definition
            module.weight.data += 2.0 * (weights[f"{key}B.weight"] @ weights[f"{key}A.weight"]).to(module.weight)
    torch.testing.assert_close(logits_TV(target), logits_TV(base), rtol=1e-4, atol=1e-3)
    assert not torch.allclose(logits_TV(target), logits_TV(load_target(target.plan.base)), atol=1.0)


def test_a_model_folder_brings_its_template_and_stop_tokens(tiny_folder: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(tiny_folder, tmp_path / "merged")
    (folder / "chat_template.jinja").write_text(
        "{% for m in messages %}{{ m['content'] }}{% if m['role'] == 'assistant' %}</s>{% endif %}{% endfor %}"
    )
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [7, 9]}))
    found = find_target(str(folder))
    assert found.template is not None
    assert found.stop_token_ids == (1, 7, 9)  # 1 is what its template ends an answer with


def test_attention_goes_back_to_the_one_that_knows_padding(run_folder: Path) -> None:
    target = load_target(str(run_folder))
    config = transformers_model(target.model).config
    assert config._attn_implementation == "sdpa"
    with attention_for_loss(target):
        assert config._attn_implementation == "documents"
    assert config._attn_implementation == "sdpa"


def test_targets_that_are_none_are_refused(tmp_path: Path) -> None:
    assert "no such folder" in message_of("./nowhere")
    assert "neither a folder nor a hub id" in message_of("a/b/c/nowhere")
    assert "there are: builtin:pocket-llama" in message_of("builtin:nothing")
    (tmp_path / "notes.txt").write_text("x")
    message = message_of(str(tmp_path))
    assert "adapter_config.json (an adapter)" in message
    assert "it holds notes.txt" in message
    assert "is a file" in message_of(str(tmp_path / "notes.txt"))


def test_an_unfinished_run_is_refused_with_the_cure(run_folder: Path) -> None:
    shutil.rmtree(run_folder / "adapter")
    assert "finish it with `finetune train ... --resume`" in message_of(str(run_folder))


def test_a_run_on_weights_it_was_not_trained_on_is_refused(run_folder: Path) -> None:
    lock = json.loads((run_folder / "lock.json").read_text())
    lock["base_sha256"]["model.safetensors"] = "0" * 64
    (run_folder / "lock.json").write_text(json.dumps(lock))
    assert "has other weights than those it was trained on" in message_of(str(run_folder))


def test_an_adapter_without_its_base_is_refused(tmp_path: Path) -> None:
    for base, words in (("./gone", "its base ./gone cannot be read: "), (None, "names no base")):
        (tmp_path / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": base}))
        assert words in message_of(str(tmp_path))


def test_an_unknown_template_is_refused() -> None:
    assert "unknown template 'alpacca'; ours: alpaca" in message_of("builtin:pocket-llama", template="alpacca")


def test_an_adapter_that_does_not_fit_its_base_is_refused(run_folder: Path, tmp_path: Path) -> None:
    folder = tmp_path / "elsewhere" / "deep" / "adapter"
    shutil.copytree(run_folder / "adapter", folder)
    config = json.loads((folder / "adapter_config.json").read_text())
    config["base_model_name_or_path"] = "builtin:pocket-llama"
    (folder / "adapter_config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match="the adapter does not fit its base builtin:pocket-llama"):
        load_target(str(folder))
