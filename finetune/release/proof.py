"""Prove a release: its folder and its run in, comparisons with the trained model out; prints them when run."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from finetune.artifact import read_json
from finetune.base import BaseFacts, TensorEntry, read_tensor_entries
from finetune.data.examples import Example
from finetune.machine import quiet_libraries
from finetune.model.adapter import load_adapter
from finetune.model.delta import quantized_weights
from finetune.model.load import load_base
from finetune.release.delta import Onto
from finetune.release.fresh import Proof, proof
from finetune.release.manifest import MANIFEST, damaged_files
from finetune.release.proof_files import prove_text, prove_weights
from finetune.release.source import Source, read_source
from finetune.release.weights import read_tensors
from finetune.train.trainer import autocast, mean_loss

PROBE_ROWS = 8
POSITIONS = 32  # per probe, its last ones: logits of a large vocabulary take memory
PROBE_TOKENS = 512
GREEDY_PROMPTS = 5
GREEDY_TOKENS = 24
TOKENS_PER_PASS = 2048
# The largest difference of a logit that rounding the tuned weights may cause, in standard deviations of the logits, per
# square root of the layers: each layer is rounded independently, so that errors add like a random walk. Four times what
# random two-layer LLaMAs give (float32 3.8e-6, float16 3.2e-3, bfloat16 3.1e-2; float32 is summation order as much as
# rounding); trained models lie lower (stories260K, float32: 2e-6; a five-layer model in bfloat16: 7e-3).
LOGITS_LIMIT = {"F32": 1.5e-5, "F16": 1.3e-2, "BF16": 0.12}
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


def logits_limit(facts: BaseFacts) -> float:
    """What rounding the tuned weights to the stored dtype may move a logit, in standard deviations of the logits."""
    return LOGITS_LIMIT[facts.stored_dtype] * math.sqrt(facts.layers)


def prove_model(folder: Path, source: Source, onto: Onto) -> list[Proof]:
    """The release computes what the chosen base with the adapter computes, and what was trained."""
    rows = list(source.rows.examples)
    probes = source.probe_ids() + [example.ids.tolist() for example in rows[:PROBE_ROWS]]
    probes = [ids[:PROBE_TOKENS] for ids in probes]
    reference = load_adapter(load_chosen_base(source, onto), source.adapter)
    tuned = probe_logits(reference, probes)
    with reference.disable_adapter():
        base = probe_logits(reference, probes)
    answers = greedy_answers(reference, rows[:GREEDY_PROMPTS], source.stop_token_ids)
    del reference
    release = load_plain(folder, source.model.device)
    released = probe_logits(release, probes)
    release_loss = mean_loss(release, rows, tokens_per_pass=TOKENS_PER_PASS) if rows else None
    greedy = greedy_gap(release, answers)
    del release
    trained, trained_loss, differing = _as_trained(source, onto, probes, rows)
    limit, scale = logits_limit(source.base.facts), torch.cat(tuned).std().item()
    effect = _rms(tuned, base)
    proofs = [
        proof("logits against base + adapter", _largest(released, tuned) / scale, limit),
        proof("no-op", _rms(released, tuned) / effect if effect else math.inf, NO_OP_LIMIT),
        proof("logits against the model as trained", _largest(released, trained) / scale, None),
    ]
    if onto.name == "dequantized":
        proofs.append(proof("dequantised weights that the trained model does not hold", differing, 0))
    if release_loss is not None and trained_loss is not None:
        proofs.append(proof("loss of the release", release_loss, trained_loss * (1 + LOSS_SHARE) + LOSS_LIMIT))
        proofs.append(proof("loss of the model as trained", trained_loss, None))
        proofs.append(proof("greedy answers", greedy / scale, 2 * limit))
    return proofs


def load_plain(folder: Path, device: str) -> PreTrainedModel:
    """A model folder as any transformers user loads it, computing in float32."""
    model: Any = AutoModelForCausalLM.from_pretrained(str(folder), dtype=torch.float32, device_map={"": device})
    return model.requires_grad_(False)


def load_chosen_base(source: Source, onto: Onto) -> PreTrainedModel:
    """The base in float32, its linears as the deltas meet them."""
    model = load_plain(source.base.facts.folder, source.model.device)
    if onto.name == "dequantized":
        for name, weight in chosen_weights(source, onto):
            model.get_parameter(name).data.copy_(weight)
    return model


def chosen_weights(source: Source, onto: Onto) -> Iterator[tuple[str, torch.Tensor]]:
    """Name and chosen value of every linear's weight, one at a time."""
    for entry, tensor in read_tensors(linear_entries(source)):
        yield entry.name, onto.weight(tensor)


def linear_entries(source: Source) -> list[TensorEntry]:
    """The stored tensors of the base's linears."""
    names = {f"{linear.module}.weight" for linear in source.base.facts.linears}
    return [entry for entry in read_tensor_entries(source.base.facts.folder) if entry.name in names]


def probe_logits(model: torch.nn.Module, probes: Sequence[Sequence[int]]) -> list[torch.Tensor]:
    """Logits [positions, vocabulary] at the last positions of every probe, float32, on the CPU."""
    model.eval()
    device = next(model.parameters()).device
    with torch.no_grad():
        return [
            model(input_ids=torch.tensor([list(ids)], device=device), use_cache=False, logits_to_keep=POSITIONS)
            .logits[0]
            .float()
            .cpu()
            for ids in probes
        ]


def greedy_answers(model: Any, rows: Sequence[Example], stops: Sequence[int]) -> list[tuple[list[int], torch.Tensor]]:
    """Prompt and greedy answer of each row, with the logits [answer, vocabulary] that chose it."""
    answers = []
    device = next(model.parameters()).device
    for row in rows:
        prompt = row.prompt_ids.tolist()
        written = model.generate(
            input_ids=torch.tensor([prompt], device=device),
            attention_mask=torch.ones(1, len(prompt), dtype=torch.long, device=device),
            do_sample=False,
            max_new_tokens=GREEDY_TOKENS,
            eos_token_id=list(stops) or None,
            pad_token_id=stops[0] if stops else 0,
        )[0].tolist()
        answers.append((written, _answer_logits(model, written, len(prompt))))
    return answers


def greedy_gap(model: Any, answers: Sequence[tuple[list[int], torch.Tensor]]) -> float:
    """0 where the model would write the same answers; else the largest gap, at the first difference of an answer,
    between the logits that the other model gave to its own token and to this model's."""
    largest = 0.0
    for written, logits_AV in answers:
        own = _answer_logits(model, written, len(written) - logits_AV.shape[0]).argmax(dim=1)
        theirs = torch.tensor(written[-logits_AV.shape[0] :])
        different = (own != theirs).nonzero().flatten().tolist()
        if different:
            logits_V = logits_AV[different[0]]
            largest = max(largest, (logits_V[theirs[different[0]]] - logits_V[own[different[0]]]).abs().item())
    return largest


def main() -> None:
    """`python -m finetune.release.proof FOLDER RUN [FOLDER RUN]...` prints a JSON list of lists of proofs."""
    quiet_libraries()
    folders, runs = map(Path, sys.argv[1::2]), map(Path, sys.argv[2::2])
    proofs = [[found.to_json() for found in prove(*pair)] for pair in zip(folders, runs, strict=True)]
    sys.stdout.write(json.dumps(proofs) + "\n")


def _as_trained(
    source: Source, onto: Onto, probes: Sequence[Sequence[int]], rows: Sequence[Example]
) -> tuple[list[torch.Tensor], float | None, int]:
    """Logits and loss of the quantised base with the adapter, and how many weights it holds that `onto` does not."""
    model = load_adapter(load_base(source.model), source.adapter)
    with torch.no_grad(), autocast(source.model.device, source.model.dtype):
        logits = probe_logits(model, probes)
        loss = mean_loss(model, rows, tokens_per_pass=TOKENS_PER_PASS) if rows else None
    differing = 0
    if onto.name == "dequantized":
        held = dict(quantized_weights(model))
        chosen = {name.removesuffix(".weight"): weight for name, weight in chosen_weights(source, onto)}
        differing = len(held.keys() ^ chosen.keys()) + sum(
            int((held[name].cpu() != chosen[name]).sum()) for name in held.keys() & chosen.keys()
        )
    return logits, loss, differing


def _answer_logits(model: Any, written: Sequence[int], prompt_tokens: int) -> torch.Tensor:
    answer = len(written) - prompt_tokens
    ids = torch.tensor([list(written)], device=next(model.parameters()).device)
    with torch.no_grad():
        return model(input_ids=ids, use_cache=False, logits_to_keep=answer + 1).logits[0, :-1].float().cpu()


def _largest(some: Sequence[torch.Tensor], others: Sequence[torch.Tensor]) -> float:
    return max((a - b).abs().max().item() for a, b in zip(some, others, strict=True))


def _rms(some: Sequence[torch.Tensor], others: Sequence[torch.Tensor]) -> float:
    squares = torch.cat([(a - b).double().square().flatten() for a, b in zip(some, others, strict=True)])
    return squares.mean().sqrt().item()


if __name__ == "__main__":
    main()
