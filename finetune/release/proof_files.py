"""What a release's files say, without running it: weights against the exact sum, text against training's encoder."""

from __future__ import annotations

from dataclasses import replace
from datetime import datetime
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch

from finetune.artifact import read_json
from finetune.base import TensorEntry, read_tensor_entries
from finetune.data.encoder import Encoder
from finetune.model.load import load_tokenizer
from finetune.release.delta import Change, Onto, one_thread, round_to, tuned_blocks
from finetune.release.fresh import Proof, proof
from finetune.release.merging import make_merging
from finetune.release.source import Source
from finetune.release.weights import read_tensor, same_bytes

TIE = 1e-3  # of the distance between two neighbouring values; nearer to a tie than this, both neighbours count


def prove_weights(folder: Path, source: Source, onto: Onto) -> list[Proof]:
    """Same tensors as the base; each tuned element the nearest value to the exact one; all other tensors unchanged."""
    merging = make_merging(source, onto)
    wanted = {entry.name: entry for entry in merging.entries}
    released = {entry.name: entry for entry in read_tensor_entries(folder)}
    odd = [name for name in wanted.keys() | released.keys() if _shape(wanted.get(name)) != _shape(released.get(name))]
    proofs = [proof("tensor names, shapes and dtypes", len(odd), 0)]
    if odd:
        return proofs
    not_nearest = changed = 0
    for name, entry in wanted.items():
        if name not in merging.rounded:
            changed += not same_bytes(entry, released[name])
        else:
            meets = merging.meets(entry, read_tensor(entry))
            not_nearest += count_not_nearest(read_tensor(released[name]), meets, merging.changes.get(name))
    proofs.append(proof("tuned elements that are not the nearest value", not_nearest, 0))
    proofs.append(proof("other tensors that changed", changed, 0))
    return proofs


def count_not_nearest(written: torch.Tensor, weight: torch.Tensor, change: Change | None) -> int:
    """How many written elements are not their dtype's nearest value to the exact one, ties apart."""
    count = 0
    rows_OI = written.reshape(-1, written.shape[-1]) if written.dim() > 1 else written.reshape(1, -1)
    with one_thread():
        for block, exact in tuned_blocks(weight, change):
            nearest = round_to(exact, written.dtype)
            if torch.equal(nearest, rows_OI[block]):
                continue
            here, there = rows_OI[block].double(), nearest.double()
            farther = (here - exact).abs() - (there - exact).abs()
            count += int((~(farther <= TIE * (here - there).abs())).sum())
    return count


def prove_text(folder: Path, source: Source) -> list[Proof]:
    """The release's tokenizer, template and stop tokens are training's."""
    tokenizer: Any = load_tokenizer(folder)
    encoder = Encoder(source.base)
    template = source.template
    texts, conversations = source.probe_texts(), source.probe_conversations()
    today = replace(template, date=datetime.now())  # transformers tells a template the clock's date, and only that
    ours = [encoding.ids.tolist() for encoding in encoder.encode(texts)]
    theirs = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts]
    rendered = [
        tokenizer.apply_chat_template(
            [{"role": turn.role, "content": turn.text} for turn in turns],
            tokenize=False,
            add_generation_prompt=True,
        )
        for turns in conversations
    ]
    expected = [today.text(turns, add_generation_prompt=True) for turns in conversations]
    trained_template = source.plan["template_sha256"] if source.plan else template.sha256
    written_template = (folder / "chat_template.jinja").read_text(encoding="utf-8")
    stops = set(stop_ids(read_json(folder / "generation_config.json"))) ^ expected_stops(source)
    return [
        proof("probes whose ids differ", sum(a != b for a, b in zip(ours, theirs, strict=True)), 0),
        proof("probes whose rendering differs", sum(a != b for a, b in zip(expected, rendered, strict=True)), 0),
        proof("template differs", int(sha256(written_template.encode()).hexdigest() != trained_template), 0),
        proof("stop tokens that differ", len(stops), 0),
    ]


def expected_stops(source: Source) -> set[int]:
    """The base's stop tokens and those the run trained."""
    return set(stop_ids(base_generation_config(source.base.facts.folder))) | set(source.stop_token_ids)


def base_generation_config(folder: Path) -> dict[str, Any]:
    """The base's generation_config.json; without one, what its config says of special tokens."""
    file = folder / "generation_config.json"
    if file.is_file():
        return read_json(file)
    config = read_json(folder / "config.json")
    return {key: config[key] for key in ("bos_token_id", "eos_token_id", "pad_token_id") if config.get(key) is not None}


def stop_ids(generation_config: dict[str, Any]) -> list[int]:
    """The end-of-sequence ids as a list."""
    ids = generation_config.get("eos_token_id")
    return [] if ids is None else ids if isinstance(ids, list) else [ids]


def _shape(entry: TensorEntry | None) -> tuple[str, tuple[int, ...]] | None:
    return (entry.dtype, entry.shape) if entry else None
