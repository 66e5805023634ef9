"""Several LoRA adapters as one, rank on rank: plain low-rank matrices and weights in, a PEFT adapter folder out."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from finetune.artifact import write_json
from finetune.base import BaseFacts
from finetune.errors import Problem, UserError, raise_problems
from finetune.release.adapter_file import PREFIX, WEIGHTS
from finetune.release.algebra import Formula, is_plain
from finetune.release.delta import Delta, read_deltas
from finetune.release.source import Source

Pair = tuple[torch.Tensor, torch.Tensor]  # A [rank, in] and B [out, rank]


def write_stacked(folder: Path, sources: Sequence[Source], formula: Formula) -> None:
    """B = [w1 s1 B1 | w2 s2 B2 | ...] over A = [A1; A2; ...], whose product is sum_i w_i s_i B_i A_i.

    Raises:
        UserError: an adapter holds something else than low-rank matrices of linears.
        StorageError: a damaged file.
    """
    deltas = [read_plain(source) for source in sources]
    pairs = {name: stack(deltas, formula, name) for name in sorted({name for each in deltas for name in each})}
    write_lora(folder, pairs, sources[0].base.facts, revision=sources[0].model.revision)


def read_plain(source: Source) -> dict[str, Delta]:
    """An adapter's low-rank matrices by stored weight; refuses what is no sum of products, such as DoRA.

    Raises:
        UserError: there is something else.
        StorageError: a damaged file.
    """
    try:
        deltas = read_deltas(source.adapter)
    except UserError as error:
        cure = Problem("--as", "only plain LoRAs become one adapter; leave it out to get a merged model")
        raise UserError([*error.problems, cure]) from error
    message = "has a trained magnitude (DoRA), which no LoRA can hold; leave --as adapter out"
    raise_problems(Problem(f"{source.path}: {name}", message) for name, delta in deltas.items() if not is_plain(delta))
    return deltas


def stack(deltas: Sequence[Mapping[str, Delta]], formula: Formula, name: str) -> Pair:
    """The matrices of one weight, all ranks on one another, in float32."""
    rows, columns = [], []
    for weight, each in zip(formula.weights, deltas, strict=True):
        if name in each:
            rows.append(each[name].a_RI.double())
            columns.append(weight * each[name].scale * each[name].b_OR.double())
    return torch.cat(rows).float(), torch.cat(columns, dim=1).float()


def write_lora(folder: Path, pairs: Mapping[str, Pair], facts: BaseFacts, *, revision: str | None) -> None:
    """adapter_config.json and adapter_model.safetensors of a LoRA with scale 1, by stored weight [out, in]."""
    modules = [name.removesuffix(".weight") for name in pairs]
    ranks = {module: pair[0].shape[0] for module, pair in zip(modules, pairs.values(), strict=True)}
    tensors = {}
    for module, (a_RI, b_OR) in zip(modules, pairs.values(), strict=True):
        tensors[f"{PREFIX}{module}.lora_A.weight"] = a_RI.contiguous()
        tensors[f"{PREFIX}{module}.lora_B.weight"] = b_OR.contiguous()
    save_file(tensors, str(folder / WEIGHTS), metadata={"format": "pt"})
    write_json(folder / "adapter_config.json", _lora_config(ranks, facts, revision))


def _lora_config(ranks: Mapping[str, int], facts: BaseFacts, revision: str | None) -> dict[str, Any]:
    rank = Counter(ranks.values()).most_common(1)[0][0]
    others = {module.replace(".", r"\."): each for module, each in ranks.items() if each != rank}
    return {
        "base_model_name_or_path": facts.base,
        "bias": "none",
        "inference_mode": True,
        "init_lora_weights": True,
        "lora_alpha": rank,  # of each module its own rank: the scale is 1 everywhere
        "lora_dropout": 0.0,
        "alpha_pattern": others,
        "modules_to_save": None,
        "peft_type": "LORA",
        "r": rank,
        "rank_pattern": others,
        "revision": revision,
        "target_modules": _targets(set(ranks), facts),
        "task_type": "CAUSAL_LM",
        "use_dora": False,
        "use_rslora": False,
    }


def _targets(modules: set[str], facts: BaseFacts) -> list[str]:
    """Short names where every linear of that name is adapted, as other programs expect them; else whole paths."""
    endings = {module.rpartition(".")[2] for module in modules}
    meant = {linear.module for linear in facts.linears if linear.module.rpartition(".")[2] in endings}
    if not modules <= {linear.module for linear in facts.linears}:
        odd = sorted(modules - {linear.module for linear in facts.linears})
        raise UserError(Problem(odd[0], "the adapters change this module, which is no linear of the base"))
    return sorted(endings if meant == modules else modules)
