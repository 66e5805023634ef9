"""Pretrain the base: a stream of documents and a token budget in, a LLaMA model out."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast


@dataclass(frozen=True)
class Pretraining:
    """Every number of a pretraining run."""

    tokens: int  # that the learning rate's schedule is laid out for
    stop_after_steps: int = 3500  # before the base begins to answer prompts it has never seen; see README.md
    layers: int = 5
    tokens_per_step: int = 4096
    sequence_length: int = 256
    long_sequence_length: int = 1024
    long_every: int = 50  # one step in so many has long sequences, so that the whole context is trained
    learning_rate: float = 2e-3
    warmup_steps: int = 200
    weight_decay: float = 0.05
    seed: int = 0


def make_model(vocabulary_size: int, *, layers: int, seed: int) -> LlamaForCausalLM:
    """An untrained model of the embedded base's shape."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=vocabulary_size,
        hidden_size=256,
        intermediate_size=768,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=1024,
        tie_word_embeddings=True,
        bos_token_id=0,
        eos_token_id=1,
        attn_implementation="eager",  # faster than the fused kernel on a CPU at this size
    )
    return LlamaForCausalLM(config)


def token_stream(documents: Iterator[str], tokenizer: PreTrainedTokenizerFast) -> Iterator[int]:
    """The ids of all documents one after the other, each between bos and eos."""
    while True:
        batch = [next(documents) for _ in range(200)]
        for ids in tokenizer(batch).input_ids:
            yield tokenizer.bos_token_id
            yield from ids
            yield tokenizer.eos_token_id


def learning_rate_at(step: int, *, steps: int, plan: Pretraining) -> float:
    """Linear warm-up, then a cosine down to zero."""
    warm = min(1.0, (step + 1) / plan.warmup_steps)
    return plan.learning_rate * warm * 0.5 * (1 + math.cos(math.pi * step / steps))


def pretrain(
    model: LlamaForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    documents: Iterator[str],
    *,
    plan: Pretraining,
    folder: Path,
) -> dict[str, float]:
    """Train the model in place, save it to `folder` every few minutes; the figures of the run come back."""
    steps = plan.tokens // plan.tokens_per_step
    ids = token_stream(documents, tokenizer)
    decayed = [p for p in model.parameters() if p.ndim == 2]
    plain = [p for p in model.parameters() if p.ndim != 2]
    groups = [{"params": decayed, "weight_decay": plan.weight_decay}, {"params": plain, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=plan.learning_rate, betas=(0.9, 0.95), fused=True)
    forward = torch.compile(model, dynamic=False)
    started, losses = time.time(), []
    last = min(steps, plan.stop_after_steps)
    for step in range(last):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate_at(step, steps=steps, plan=plan)
        is_long = step % plan.long_every == plan.long_every - 1
        length = plan.long_sequence_length if is_long else plan.sequence_length
        ids_BT = torch.tensor([next(ids) for _ in range(plan.tokens_per_step)]).view(-1, length)
        with torch.autocast("cpu", torch.bfloat16):
            loss = forward(input_ids=ids_BT, labels=ids_BT, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        report(step, steps, losses, started, plan)
        if step % 500 == 499:
            save_model(model, tokenizer, folder)
    save_model(model, tokenizer, folder)
    seconds = time.time() - started
    return {"tokens": last * plan.tokens_per_step, "seconds": round(seconds), "loss": mean(losses[-100:])}


def mean(values: list[float]) -> float:
    """The arithmetic mean, to four digits."""
    return round(sum(values) / len(values), 4)


def report(step: int, steps: int, losses: list[float], started: float, plan: Pretraining) -> None:
    """One line every fifty steps."""
    if step % 50 == 49:
        speed = (step + 1) * plan.tokens_per_step / (time.time() - started)
        print(f"step {step + 1}/{steps}  loss {mean(losses[-50:]):.4f}  {speed:.0f} tokens/s", flush=True)


def save_model(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    """The model in bfloat16 and its tokenizer, in Hugging Face format; `model` itself stays as it is."""
    copy = LlamaForCausalLM(model.config)
    copy.load_state_dict(model.state_dict())
    copy.generation_config = GenerationConfig(
        bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id, do_sample=False
    )
    copy.to(torch.bfloat16).save_pretrained(folder)
    (folder / "model.safetensors").chmod(0o644)
    tokenizer.save_pretrained(folder)
    # The class name that every release of transformers knows.
    change_json(folder / "tokenizer_config.json", {"tokenizer_class": "PreTrainedTokenizerFast"})


def change_json(path: Path, changes: dict[str, str]) -> None:
    """Replace some values of a JSON file."""
    path.write_text(json.dumps(json.loads(path.read_text()) | changes, indent=2) + "\n")
