"""The main job on real input: a real small LLaMA, real Alpaca rows, from the recipe to a proven release."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig

from finetune.data.examples import TracedExample
from finetune.data.trace import trace
from finetune.release.merge import merge
from finetune.resolve import resolve
from finetune.run import run
from finetune.train.loss import lay_end_to_end, stretch_losses_S
from finetune.train.watch import read_metrics
from finetune.use.target import load_target

NF4 = BitsAndBytesConfig(
    load_in_4bit=True,
    bnb_4bit_quant_type="nf4",
    bnb_4bit_use_double_quant=True,
    bnb_4bit_compute_dtype=torch.float32,
)


@pytest.mark.real
@pytest.mark.parametrize("quantization", ["nf4", "none"])
def test_alpaca_on_stories260k(shared: Path, tmp_path: Path, quantization: str) -> None:
    base = shared / "weights" / "stories260K"
    recipe = {
        "version": 1,
        "name": "stories",
        "model": {"base": str(base), "quantization": quantization, "dtype": "float32"},
        "data": {
            "train": str(shared / "alpaca" / "alpaca_en_demo.json"), "eval": 40, "max_tokens": 512, "too_long": "drop",
        },
        "train": {"max_steps": 60, "batch_size": 8, "learning_rate": 3e-3},
        "evaluate": {"every_steps": 20},
        "output": {"folder": str(tmp_path / "run")},
    }  # fmt: skip
    path = tmp_path / "recipe.json"
    path.write_text(json.dumps(recipe))
    folder = run(path)

    held_out = [entry["eval_loss"] for entry in read_metrics(folder.path / "metrics.jsonl") if "eval_loss" in entry]
    with_base = load_target(str(base), template="alpaca")
    data = resolve(path).data
    with torch.no_grad():
        losses = stretch_losses_S(with_base.model, lay_end_to_end(data.eval[:10]))
    assert held_out[-1] < held_out[0] < losses.mean().item() - 0.3

    # Plain PEFT and transformers on the trained adapter give the logits that this toolkit gives.
    ids = torch.tensor([data.eval[0].ids.tolist()])
    tuned = load_target(str(folder.path))
    plain = AutoModelForCausalLM.from_pretrained(
        base, dtype=torch.float32, quantization_config=NF4 if quantization == "nf4" else None
    )
    adapted = PeftModel.from_pretrained(plain, folder.adapter).train()  # in eval, bitsandbytes repacks on some CPUs
    with torch.no_grad():
        torch.testing.assert_close(tuned.model(ids).logits, adapted(ids).logits, rtol=1e-5, atol=1e-4)
    tokenizer = AutoTokenizer.from_pretrained(folder.adapter)
    written = trace(data.section, data.base, data.template, data.eval[0].where)
    assert isinstance(written, TracedExample)
    assert tokenizer(written.text, add_special_tokens=False).input_ids == data.eval[0].ids.tolist()

    release = merge(folder.path, out=tmp_path / "release")
    assert all(proof.passed for proof in release.proofs)
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "release", dtype=torch.float32)
    with torch.no_grad():
        difference = (merged(ids).logits - tuned.model(ids).logits).abs().max().item()
    assert difference < (1e-3 if quantization == "none" else 1.0)
