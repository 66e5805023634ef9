"""Prove a release: its folder and its run in, comparisons with the trained model out; prints them when run."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from finetune.artifact import read_json
from finetune.base import BaseFacts
from finetune.errors import FinetuneError
from finetune.machine import quiet_libraries
from finetune.release.compared import (
    GREEDY_TOKENS,
    Chosen,
    Released,
    compute_chosen,
    compute_released,
    compute_trained,
    greedy_tokens,
)
from finetune.release.delta import Onto
from finetune.release.fresh import Proof, proof
from finetune.release.manifest import MANIFEST, damaged_files
from finetune.release.measure import deviation, largest_difference, mean_divergence, rms_difference
from finetune.release.proof_files import prove_text, prove_weights
from finetune.release.routes import largest_lead, share_of_others
from finetune.release.source import Source, read_source
from finetune.trust import is_trusted

PROBE_ROWS = 8
PROBE_TOKENS = 512
GREEDY_PROMPTS = 5
# What rounding the tuned weights may move a logit, at most and root mean square, in standard deviations of the logits.
# Both are for one layer and grow with the root of the layers: each is rounded independently, so that errors add like a
# random walk. Two and a half to three times what random two-layer models of every family give over several seeds;
# Gemma 3 gives most (largest: float32 2.0e-5, float16 2.0e-2, bfloat16 0.11; root mean square: 1.1e-3, 8.6e-3), a LLaMA
# a half to a fourth of it; a layer left out, another run's adapter or alpha for alpha / rank move them by 1 and 0.2 or
# more. Trained models lie lower (stories260K, float32: 2e-6; five layers in bfloat16: 7e-3).
LOGITS_LIMIT = {"F32": 5e-5, "F16": 5e-2, "BF16": 0.3}
RMS_LIMIT = {"F16": 3e-3, "BF16": 2.5e-2}
# In float32, where it is summation order as much as rounding: what the sum is worth whatever the model's depth.
RMS_LIMIT_F32 = 1e-5
# Kullback-Leibler divergence of the next-token distributions, nats a position, mean over the probes; and where rounding
# turns some tokens to other experts (random models of four experts, bfloat16: up to 1.1e-3).
DIVERGENCE_LIMIT, FREE_DIVERGENCE_LIMIT = 1e-3, 1e-2
# Candidates of a router that rounding may turn, as a share of all, and how far the other choice may lead, in standard
# deviations of what the router rates by; both grow with the root of the layers. Two and a half to four times what
# random models of four and eight experts give (bfloat16: 8e-3 and 1.4e-2; float32: none).
OTHERS_LIMIT = {"F32": 5e-4, "F16": 2.5e-3, "BF16": 0.02}
LEAD_LIMIT = {"F32": 1e-5, "F16": 6e-3, "BF16": 0.05}
# Distance to base + adapter in units of what the adapter changes, root mean square: a merge that does nothing gives 1,
# one with a doubled delta about 1, rounding to bfloat16 0.002 to 0.02. Above a half the adapter drowns in rounding.
NO_OP_LIMIT = 0.5
# Nats a token that a release may be worse than the model as trained: a constant and a share of the trained loss.
# Merging onto the original weights costs 0.4 % (stories260K) to 0.8 % of the loss; onto the dequantised ones nothing.
LOSS_LIMIT, LOSS_SHARE = 0.02, 0.02


def prove(folder: Path, run: Path) -> list[Proof]:
    """Every proof of a release, from the files on disk alone.

    A folder with damaged files or other tensors than the base's is not loaded: only these proofs come back then.
    """
    manifest = read_json(folder / MANIFEST)
    proofs = [proof("files", len(damaged_files(folder, manifest["files"])), 0)]
    if not proofs[0].passed:
        return proofs
    source = read_source(run)
    onto = make_onto(source, manifest["onto"]["chosen"])
    proofs += prove_weights(folder, source, onto) + prove_text(folder, source)
    return proofs + prove_model(folder, source, onto) if proofs[1].passed else proofs


def make_onto(source: Source, name: str) -> Onto:
    """The values of the run's base that a delta is added to."""
    return Onto(name, source.model.quantization, getattr(torch, source.model.dtype), source.model.device)


def grown(limits: Mapping[str, float], facts: BaseFacts) -> float:
    """A limit for what rounding to the stored dtype does in one layer, for as many as the model has."""
    return limits[facts.stored_dtype] * math.sqrt(facts.layers)


def prove_model(folder: Path, source: Source, onto: Onto) -> list[Proof]:
    """The release computes what the chosen base with the adapter computes, and what was trained."""
    facts, rows = source.base.facts, list(source.rows.examples)
    chats = source.probe_ids()
    probes = [ids[:PROBE_TOKENS] for ids in chats + [row.ids.tolist() for row in rows[:PROBE_ROWS]]]
    prompts = [ids[-PROBE_TOKENS:] for ids in [row.prompt_ids.tolist() for row in rows] or chats][:GREEDY_PROMPTS]
    released = compute_released(folder, source, probes, prompts, rows)
    chosen = compute_chosen(source, onto, probes, released)
    proofs = [*_logit_proofs(facts, released, chosen), *_route_proofs(facts, released, chosen)]
    scale = deviation(chosen.logits)
    del chosen
    trained, trained_loss, differing = compute_trained(source, onto, probes, rows)
    moved = largest_difference(released.logits, trained) / scale
    proofs.append(proof("logits against the model as trained", moved, None))
    if onto.name == "dequantized":
        proofs.append(proof("dequantised weights that the trained model does not hold", differing, 0))
    if released.loss is not None and trained_loss is not None:
        proofs.append(proof("loss of the release", released.loss, trained_loss * (1 + LOSS_SHARE) + LOSS_LIMIT))
        proofs.append(proof("loss of the model as trained", trained_loss, None))
    return proofs


def load_plain(folder: Path, device: str) -> PreTrainedModel:
    """A model folder as any transformers user loads it, computing in float32."""
    model: Any = AutoModelForCausalLM.from_pretrained(
        str(folder), dtype=torch.float32, device_map={"": device}, trust_remote_code=is_trusted(folder)
    )
    return model.requires_grad_(False)


def main() -> None:
    """`python -m finetune.release.proof FOLDER RUN [FOLDER RUN]...` prints a JSON list of lists of proofs.

    What a user can cause is printed too: the exit code and the problems, in place of the list.
    """
    quiet_libraries()
    pairs = zip(map(Path, sys.argv[1::2]), map(Path, sys.argv[2::2]), strict=True)
    try:
        answer: Any = [[found.to_json() for found in prove(*pair)] for pair in pairs]
    except FinetuneError as error:
        answer = {"code": error.code, "problems": [vars(problem) for problem in error.problems]}
    sys.stdout.write(json.dumps(answer) + "\n")


def _logit_proofs(facts: BaseFacts, released: Released, chosen: Chosen) -> list[Proof]:
    """What rounding does to the logits, both models sending each token to the experts that the release chose."""
    ours, theirs = released.logits, chosen.on_routes
    scale, limit = deviation(chosen.logits), grown(LOGITS_LIMIT, facts)
    missed = rms_difference(ours, theirs)
    rms_limit = RMS_LIMIT_F32 if facts.stored_dtype == "F32" else grown(RMS_LIMIT, facts)
    return [
        proof("logits against base + adapter", largest_difference(ours, theirs) / scale, limit),
        proof("logits against base + adapter, root mean square", missed / scale, rms_limit),
        proof("divergence from base + adapter", mean_divergence(theirs, ours), DIVERGENCE_LIMIT),
        proof("no-op", missed / chosen.effect if chosen.effect else math.inf, NO_OP_LIMIT),
        proof(_greedy_name(greedy_tokens(facts)), chosen.greedy_gap / scale, 2 * limit),
    ]


def _route_proofs(facts: BaseFacts, released: Released, chosen: Chosen) -> list[Proof]:
    """Where base + adapter by itself chooses other experts than the release, these are rated alike, and few."""
    if not chosen.routes:
        return []
    free = mean_divergence(chosen.logits, released.logits)
    return [
        proof("divergence, each model choosing its experts", free, FREE_DIVERGENCE_LIMIT),
        proof("experts chosen otherwise, share", share_of_others(chosen.routes), grown(OTHERS_LIMIT, facts)),
        proof("experts chosen otherwise, their lead", largest_lead(chosen.routes), grown(LEAD_LIMIT, facts)),
    ]


def _greedy_name(tokens: int) -> str:
    return "greedy answers" if tokens == GREEDY_TOKENS else f"greedy answers, first {tokens} tokens"


if __name__ == "__main__":
    main()
