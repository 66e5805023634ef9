"""Resolve a run: what was asked, the machine, the base and the data in; every number of the run out. Opens no file."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np

from finetune.adapter_plan import AdapterPlan as AdapterPlan
from finetune.adapter_plan import count_parameters, count_stored, plan_adapter
from finetune.adapter_plan import count_trainable as count_trainable
from finetune.adapter_problems import adapter_problems
from finetune.base import BaseFacts
from finetune.errors import Problem, raise_problems
from finetune.layout import Mixture, count_steps, cut_into_passes, lay_out_steps
from finetune.machine import GIB, Machine
from finetune.recipe import Recipe

# Bits a frozen weight takes. NF4, double quantised: 4 + 8/64 + 32/(64*256) (QLoRA, arXiv:2305.14314, section 3).
STORED_BITS = {"nf4": 4.127, "fp4": 4.127, "int8": 8.0}
CHECKPOINT_BYTES_PER_PARAMETER = {"adamw": 12, "adamw-8bit": 6, "paged-adamw-8bit": 6}  # weight and two moments
CHECKPOINT_BYTES_PER_STEP = 200  # the trainer's own log
CHECKPOINT_BYTES_BESIDE = 100_000  # random states, names, manifest
ADAPTER_BYTES_PER_PARAMETER = {"adamw": 16, "adamw-8bit": 10, "paged-adamw-8bit": 10}  # weight, gradient, two moments
STEPS_LAID_OUT = 5000  # so many steps are laid out to count their passes
AUTO_TOKENS_PER_PASS = {"cpu": 2048, "cuda": 8192}
RUNTIME_GIB = {"cpu": 1.3, "cuda": 1.2}  # the libraries themselves, before a weight is loaded
GATHERED_LOGITS_BYTES = (
    18  # per entry: logits and their gradient, each in the compute dtype and in float32, log-softmax
)
# Inputs and outputs of every linear module are kept for the backward pass; with what lies between (norms, rotary
# positions, the adapters' own products, casts) this many times as much. Fitted to a 160M LLaMA on a CPU:
# benchmarks/training_speed.py measures 4.8 GiB.
KEPT_PER_LINEAR = 3.5


@dataclass(frozen=True)
class DataFacts:
    """What a plan needs to know of the data; counts per example, in the order of the files."""

    format: str
    template: str
    template_sha256: str
    rows_read: int
    dropped: Mapping[str, int]
    train_tokens: np.ndarray
    train_supervised: np.ndarray
    truncated_tokens: int
    straddling_tokens: int  # learned tokens that begin in the context and end in the answer
    eval_tokens: np.ndarray
    stop_token_ids: tuple[int, ...]
    source_examples: tuple[int, ...]  # of the training examples, by source
    source_weights: tuple[float, ...]


@dataclass(frozen=True)
class ModelPlan:
    """How the base is loaded."""

    base: str
    revision: str | None
    folder: Path
    quantization: str
    dtype: str  # of the computations: bfloat16, float16 or float32
    device: str
    attention: str  # documents: one by one; sdpa: a dense block-diagonal mask


@dataclass(frozen=True)
class TrainPlan:
    """The training itself, every value that changes its numbers, also those nobody sets."""

    steps: int
    batch_size: int
    mixture: Mixture
    learning_rate: float
    schedule: str
    warmup_steps: int
    optimizer: str
    adam_betas: tuple[float, float]
    adam_epsilon: float
    weight_decay: float
    max_grad_norm: float
    tokens_per_pass: int
    recompute: bool
    dtype: str
    device: str
    seed: int
    evaluate_every_steps: int
    save_every_steps: int
    keep_checkpoints: int
    log_to: tuple[str, ...]
    learning_rate_ratio: float = 1.0  # of an adapter's B to that of everything else (LoRA+)


@dataclass(frozen=True)
class Plan:
    """Every number a run will use."""

    name: str
    run_folder: Path
    model: ModelPlan
    adapter: AdapterPlan
    train: TrainPlan
    examples: int
    eval_examples: int
    tokens: int  # of one trip through the training rows
    supervised_tokens: int
    truncated_tokens: int
    straddling_tokens: int  # of the supervised ones, those that begin in the context
    rows_read: int
    dropped: Mapping[str, int]
    data_format: str
    template: str
    template_sha256: str
    stop_token_ids: tuple[int, ...]
    trainable_parameters: int
    base_parameters: int
    passes_per_step: float  # mean over the run
    peak_memory_gib: float
    disk_gib: float
    settings: Mapping[str, Any]  # the recipe's keys, resolved
    defaults: tuple[str, ...]  # those of them that nobody wrote
    estimated: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values, tokens_per_pass and steps at the top level too."""
        return {"steps": self.train.steps, "tokens_per_pass": self.train.tokens_per_pass, **_plain(asdict(self))}


def make_plan(
    recipe: Recipe,
    machine: Machine,
    base: BaseFacts,
    data: DataFacts,
    *,
    token_ids: Mapping[str, int | None] = MappingProxyType({}),
) -> Plan:
    """The resolved run; the same arguments always give the same plan. `token_ids`: those of adapter.train_tokens.

    Raises:
        UserError: targets that the base does not have, a dtype the machine cannot compute, or rows longer than the
            base's context; all at once.
    """
    adapter = plan_adapter(recipe, base, token_ids)
    problems = adapter_problems(recipe, adapter, base, token_ids)
    problems += _machine_problems(recipe, machine) + _context_problems(recipe, base, data)
    raise_problems(problems)
    dtype = _resolve_dtype(recipe, machine)
    train = _train_plan(recipe, machine, data, dtype)
    stored = count_stored(adapter, base)
    return Plan(
        name=recipe.name,
        run_folder=recipe.run_folder,
        model=_model_plan(recipe, machine, base, dtype),
        adapter=adapter,
        train=train,
        examples=len(data.train_tokens),
        eval_examples=len(data.eval_tokens),
        tokens=int(data.train_tokens.sum()),
        supervised_tokens=int(data.train_supervised.sum()),
        truncated_tokens=data.truncated_tokens,
        straddling_tokens=data.straddling_tokens,
        rows_read=data.rows_read,
        dropped=data.dropped,
        data_format=data.format,
        template=data.template,
        template_sha256=data.template_sha256,
        stop_token_ids=data.stop_token_ids,
        trainable_parameters=count_parameters(adapter, base),
        base_parameters=base.parameters,
        passes_per_step=_passes_per_step(train, data),
        peak_memory_gib=round(_peak_memory_gib(recipe, base, data, train, stored), 3),
        disk_gib=round((run_bytes(train, stored) + base.stored_bytes) / GIB, 3),  # with the merged weights
        settings=_settings(recipe, train, adapter, data, dtype),
        defaults=tuple(key for key in recipe.settings() if key not in recipe.given_keys()),
        estimated=("peak_memory_gib", "disk_gib", *(["passes_per_step"] if train.steps > STEPS_LAID_OUT else [])),
    )


def run_bytes(train: TrainPlan, trainable: int) -> int:
    """What the run folder takes at most: the checkpoints kept, the one that is being written, and the adapter."""
    per_parameter = CHECKPOINT_BYTES_PER_PARAMETER[train.optimizer]
    checkpoint = trainable * per_parameter + train.steps * CHECKPOINT_BYTES_PER_STEP + CHECKPOINT_BYTES_BESIDE
    saves = math.ceil(train.steps / train.save_every_steps)
    return min(train.keep_checkpoints + 1, saves) * checkpoint + 4 * trainable


def _passes_per_step(train: TrainPlan, data: DataFacts) -> float:
    """The mean over the run; of a very long run over its first steps."""
    steps = min(train.steps, STEPS_LAID_OUT)
    layout = lay_out_steps(train.mixture, batch_size=train.batch_size, steps=steps, seed=train.seed)
    tokens = data.train_tokens.tolist()
    passes = [cut_into_passes([tokens[i] for i in step], tokens_per_pass=train.tokens_per_pass) for step in layout]
    return sum(map(len, passes)) / steps


def _machine_problems(recipe: Recipe, machine: Machine) -> list[Problem]:
    problems = []
    if recipe.model.dtype == "float16" and machine.device == "cpu":
        problems.append(Problem("model.dtype", "float16 is for GPUs; on a CPU write auto, bfloat16 or float32"))
    if recipe.train.optimizer == "paged-adamw-8bit" and machine.device == "cpu":
        problems.append(Problem("train.optimizer", "paging needs a GPU; on a CPU write adamw or adamw-8bit"))
    return problems


def _context_problems(recipe: Recipe, base: BaseFacts, data: DataFacts) -> list[Problem]:
    longest = int(max(data.train_tokens.max(), data.eval_tokens.max(initial=0)))
    if longest <= base.context_tokens:
        return []
    return [
        Problem(
            "data.max_tokens",
            f"the longest row has {longest} tokens, {base.base} reads {base.context_tokens}; "
            f"set data.max_tokens: {base.context_tokens} and data.too_long: drop or truncate, or shorten the rows",
        )
    ]


def _resolve_dtype(recipe: Recipe, machine: Machine) -> str:
    if recipe.model.dtype != "auto":
        return recipe.model.dtype
    return "bfloat16" if machine.computes_bfloat16 else "float32"


def _model_plan(recipe: Recipe, machine: Machine, base: BaseFacts, dtype: str) -> ModelPlan:
    return ModelPlan(
        base=base.base,
        revision=base.revision,
        folder=base.folder,
        quantization=recipe.model.quantization,
        dtype=dtype,
        device=machine.device,
        attention="documents" if base.isolates_by_documents else "sdpa",
    )


def _train_plan(recipe: Recipe, machine: Machine, data: DataFacts, dtype: str) -> TrainPlan:
    asked = recipe.train
    mixture = Mixture(data.source_examples, data.source_weights)
    per_epoch = mixture.examples_per_epoch
    steps = asked.max_steps or count_steps(per_epoch, batch_size=asked.batch_size, epochs=asked.epochs)
    automatic = max(AUTO_TOKENS_PER_PASS[machine.device], int(data.train_tokens.max()))
    warmup_steps = asked.warmup if isinstance(asked.warmup, int) else math.ceil(asked.warmup * steps)
    return TrainPlan(
        steps=steps,
        batch_size=asked.batch_size,
        mixture=mixture,
        learning_rate=asked.learning_rate,
        schedule=asked.schedule,
        warmup_steps=warmup_steps,
        optimizer=asked.optimizer,
        adam_betas=(0.9, 0.999),
        adam_epsilon=1e-8,
        weight_decay=asked.weight_decay,
        max_grad_norm=asked.max_grad_norm,
        tokens_per_pass=automatic if asked.tokens_per_pass == "auto" else asked.tokens_per_pass,
        recompute=asked.recompute == "all",
        dtype=dtype,
        device=machine.device,
        seed=recipe.seed,
        evaluate_every_steps=recipe.evaluate.every_steps,
        save_every_steps=recipe.output.save_every_steps,
        keep_checkpoints=recipe.output.keep_checkpoints,
        log_to=recipe.output.log_to,
        learning_rate_ratio=recipe.adapter.learning_rate_ratio,
    )


def _peak_memory_gib(recipe: Recipe, base: BaseFacts, data: DataFacts, train: TrainPlan, trainable: int) -> float:
    """Arithmetic estimate: runtime + stored weights + adapters + activations and logits of the largest pass."""
    element_bytes = 4 if train.dtype == "float32" else 2
    in_linears = sum(linear.in_features * linear.out_features for linear in base.linears)
    linear_bits = STORED_BITS.get(recipe.model.quantization, 8 * element_bytes)
    weights = in_linears * linear_bits / 8 + (base.parameters - in_linears) * element_bytes
    adapters = trainable * ADAPTER_BYTES_PER_PARAMETER[train.optimizer]
    pass_tokens = max(min(train.tokens_per_pass, int(np.sort(data.train_tokens)[-train.batch_size :].sum())), 1)
    kept_per_layer = sum(linear.in_features + linear.out_features for linear in base.linears) / max(base.layers, 1)
    layers_kept = 1 if train.recompute else base.layers
    activations = pass_tokens * kept_per_layer * layers_kept * element_bytes * KEPT_PER_LINEAR
    activations += pass_tokens * base.hidden_size * base.layers * element_bytes
    supervised_share = float(data.train_supervised.sum()) / max(int(data.train_tokens.sum()), 1)
    logits = pass_tokens * supervised_share * base.vocabulary * GATHERED_LOGITS_BYTES
    return RUNTIME_GIB[train.device] + (weights + adapters + activations + logits) / GIB


def memory_problem(plan: Plan, machine: Machine) -> Problem | None:
    """What to lower if the run does not fit the machine; None if it does."""
    if plan.peak_memory_gib <= machine.device_memory_gib:
        return None
    message = (
        f"about {plan.peak_memory_gib:.1f} GiB are needed, {machine.device_name} has "
        f"{machine.device_memory_gib:.1f} GiB; lower train.tokens_per_pass (now {plan.train.tokens_per_pass}), set "
        "train.recompute: all, or model.quantization: nf4"
    )
    return Problem("memory", message)


def _settings(recipe: Recipe, train: TrainPlan, adapter: AdapterPlan, data: DataFacts, dtype: str) -> dict[str, Any]:
    return recipe.settings() | {
        "model.dtype": dtype,
        "adapter.targets": [*adapter.targets, *adapter.experts],
        "adapter.block_size": adapter.block_size or None,
        "data.format": data.format,
        "data.template": data.template,
        "train.tokens_per_pass": train.tokens_per_pass,
        "train.recompute": "all" if train.recompute else "none",
        "train.warmup": train.warmup_steps,
        "train.max_steps": train.steps,
    }


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(key): _plain(inner) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(inner) for inner in value]
    return str(value) if isinstance(value, Path) else value
