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
    Logits,
    Released,
    Summed,
    compute_chosen,
    compute_released,
    compute_summed,
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

ROUNDED = "logits against the sums, rounded"
EXACT = "logits of base + adapter against the exact sums"
PROBE_ROWS = 8
PROBE_TOKENS = 512
GREEDY_PROMPTS = 5
# Two computations of the same in float32 differ by the order of summation: at most and root mean square, of one layer,
# growing with the root of the layers, both in standard deviations of the logits. A model that makes much of small
# differences, as deep random ones do, makes much of these too. How much is measured by what rounding to 16 bits moves:
# of that, this share is allowed: seven times what random models of every family give, of 2 to 16 layers alike, and four
# times what a LLaMA 2048 wide gives.
LOGITS_LIMIT_F32, RMS_LIMIT_F32 = 5e-5, 7e-6
FINE_SHARE = {"F32": 1e-3, "BF16": 1e-3, "F16": 8e-3}  # where the base is in float32, the rounding is to bfloat16
# What rounding the tuned weights to 16 bits may move a logit, at most and root mean square. Two and a half to three
# times what random two-layer models of every family give over several seeds; growing with the root of the layers, or
# with what rounding the sums is measured to do, if that is more: sharp attention, as random norms of Gemma 3's queries
# and keys make it, lets it grow faster.
LOGITS_LIMIT = {"F32": LOGITS_LIMIT_F32, "F16": 5e-2, "BF16": 0.3}
RMS_LIMIT = {"F32": RMS_LIMIT_F32, "F16": 3e-3, "BF16": 2.5e-2}
MEASURED_SHARE = 1.1  # of what rounding is measured to do
# Kullback-Leibler divergence of the next-token distributions, nats a position, mean over the probes; or MEASURED_SHARE
# of that which rounding the sums causes, if that is more.
DIVERGENCE_LIMIT = 1e-3
# Candidates of a router that base + adapter treats otherwise than the sums do, as a share of all, and how far the other
# choice may lead, in standard deviations of what the router rates by; both grow with the root of the layers.
OTHERS_LIMIT, LEAD_LIMIT = 5e-4, 1e-5
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


def fine_limit(facts: BaseFacts, rounded: Logits, exact: Logits) -> float:
    """The largest distance of two computations in float32, where rounding to 16 bits makes the first of these two."""
    measured = largest_difference(rounded, exact) / deviation(exact)
    return max(LOGITS_LIMIT_F32 * math.sqrt(facts.layers), FINE_SHARE[facts.stored_dtype] * measured)


def rounding_limit(facts: BaseFacts, rounded: Logits, exact: Logits) -> float:
    """The largest distance of a release to the exact sums: as its depth or the rounded sums say, whichever is more."""
    measured = largest_difference(rounded, exact) / deviation(exact)
    return _limit(facts, grown(LOGITS_LIMIT, facts), measured)


def divergence_limit(facts: BaseFacts, rounded: Logits, exact: Logits) -> float:
    """That of a release; where the base is in float32 it is rounded to 16 bits to measure with, no more."""
    measured = 0.0 if facts.stored_dtype == "F32" else mean_divergence(exact, rounded)
    return max(DIVERGENCE_LIMIT, MEASURED_SHARE * measured)


def prove_model(folder: Path, source: Source, onto: Onto) -> list[Proof]:
    """The release computes what the chosen base with the adapter computes, and what was trained."""
    rows = list(source.rows.examples)
    chats = source.probe_ids()
    probes = [ids[:PROBE_TOKENS] for ids in chats + [row.ids.tolist() for row in rows[:PROBE_ROWS]]]
    prompts = [ids[-PROBE_TOKENS:] for ids in [row.prompt_ids.tolist() for row in rows] or chats][:GREEDY_PROMPTS]
    released = compute_released(folder, source, probes, prompts, rows)
    chosen = compute_chosen(source, onto, probes, released)
    summed = compute_summed(source, onto, probes, released, chosen.own_routes)
    scale = deviation(chosen.logits)
    proofs = compare(source.base.facts, released, chosen, summed)
    del chosen, summed
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


def compare(facts: BaseFacts, released: Released, chosen: Chosen, summed: Summed) -> list[Proof]:
    """The release computes what the rounded sums compute, and base + adapter what the exact ones compute."""
    scale = deviation(chosen.logits)
    measured = rms_difference(summed.on_routes, summed.rounded) / scale
    limit = max(RMS_LIMIT_F32 * math.sqrt(facts.layers), FINE_SHARE[facts.stored_dtype] * measured)
    stored = summed.on_routes if facts.stored_dtype == "F32" else summed.rounded
    by_rounding = rms_difference(released.logits, stored) / scale
    by_peft = rms_difference([*summed.logits, *summed.on_routes], [*chosen.logits, *chosen.on_routes]) / scale
    return [
        proof(ROUNDED, by_rounding, limit),
        proof(EXACT, by_peft, limit),
        *_logit_proofs(facts, released, chosen, summed),
        *(_route_proofs(facts, released, chosen, summed) if chosen.routes else []),
    ]


def _logit_proofs(facts: BaseFacts, released: Released, chosen: Chosen, summed: Summed) -> list[Proof]:
    """What rounding does to the logits, all models sending each token to the experts that the release chose."""
    ours, theirs, sums = released.logits, chosen.on_routes, (summed.rounded, summed.on_routes)
    scale, missed = deviation(chosen.logits), rms_difference(ours, theirs)
    limit = rounding_limit(facts, *sums)
    return [
        proof("logits against base + adapter", largest_difference(ours, theirs) / scale, limit),
        proof(
            "logits against base + adapter, root mean square",
            missed / scale,
            _limit(facts, grown(RMS_LIMIT, facts), rms_difference(*sums) / scale),
        ),
        proof("divergence from base + adapter", mean_divergence(theirs, ours), divergence_limit(facts, *sums)),
        proof("no-op", missed / chosen.effect if chosen.effect else math.inf, NO_OP_LIMIT),
        proof(_greedy_name(greedy_tokens(facts)), chosen.greedy_gap / scale, 2 * limit),
    ]


def _route_proofs(facts: BaseFacts, released: Released, chosen: Chosen, summed: Summed) -> list[Proof]:
    """Where base + adapter by itself chooses other experts than the release, it is rounding that makes them differ."""
    deep, share = math.sqrt(facts.layers), FINE_SHARE[facts.stored_dtype]
    turned = max(largest_lead(summed.routes), largest_lead(summed.rounded_routes))
    others, lead = OTHERS_LIMIT * deep, max(LEAD_LIMIT * deep, share * turned)
    measured_share, measured_lead = (MEASURED_SHARE * of(summed.routes) for of in (share_of_others, largest_lead))
    free = mean_divergence(chosen.logits, released.logits)
    free_limit = divergence_limit(facts, summed.rounded, summed.logits)
    of_sums, of_rounding = "experts that the exact sums choose otherwise", "experts chosen otherwise"
    return [
        proof(f"{of_sums}, share", share_of_others(summed.own_routes), others),
        proof(f"{of_sums}, their lead", largest_lead(summed.own_routes), lead),
        proof(f"{of_rounding}, share", share_of_others(chosen.routes), measured_share + others),
        proof(f"{of_rounding}, their lead", largest_lead(chosen.routes), measured_lead + lead),
        proof("divergence, each model choosing its experts", free, free_limit),
    ]


def _limit(facts: BaseFacts, floor: float, measured: float) -> float:
    """How far rounding may move the release: as the model's depth or the rounded sums say, whichever is more."""
    share = FINE_SHARE["F32"] if facts.stored_dtype == "F32" else MEASURED_SHARE
    return max(floor, share * measured)


def _greedy_name(tokens: int) -> str:
    return "greedy answers" if tokens == GREEDY_TOKENS else f"greedy answers, first {tokens} tokens"


if __name__ == "__main__":
    main()
