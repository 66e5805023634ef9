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
from finetune.adapter_plan import count_parameters, count_stored, in_layers, is_target, plan_adapter, rank_of
from finetune.adapter_plan import count_trainable as count_trainable
from finetune.adapter_problems import adapter_problems
from finetune.base import BaseFacts
from finetune.calibration import Calibration
from finetune.compute_problems import compute_problems
from finetune.errors import Problem, raise_problems
from finetune.layout import Mixture, count_steps, lay_out_steps
from finetune.machine import GIB, Machine
from finetune.plan_cost import ELEMENT_BYTES, Costs, count_steps_contents, peak_memory_gib, seconds_per_step
from finetune.plan_layout import AUTO_TOKENS_PER_PASS as AUTO_TOKENS_PER_PASS
from finetune.plan_layout import Layout, Lowered, layout_problems, possible_layouts
from finetune.plan_stages import disk_gib, expert_seconds, operations_per_token, stages_gib, stored_weight_bytes
from finetune.recipe import Recipe

CHECKPOINT_BYTES_PER_PARAMETER = {"adamw": 12, "adamw-8bit": 6, "paged-adamw-8bit": 6}  # weight and two moments
CHECKPOINT_BYTES_PER_STEP = 200  # the trainer's own log
CHECKPOINT_BYTES_BESIDE = 100_000  # random states, names, manifest
SURELY_NEEDED = 0.9  # of the memory that is estimated
MOST_OF_MEMORY = 0.8  # of the machine's, that a layout left to `auto` may take
STEPS_LAID_OUT = 5000  # so many steps are laid out to count their passes


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
    speedups: tuple[str, ...] = ()  # what our own code computes of a pass: names of plan_layout.SPEEDUPS
    open_keys: tuple[str, ...] = ()  # of the layout: those that the recipe leaves to `auto`
    lowered: tuple[Lowered, ...] = ()  # what became of the layout after out of memory
    patience: int | None = None  # evaluations without a lower loss that end the run
    prompts: str | None = None  # a file of them, answered at every evaluation
    keep_best: bool = False  # the checkpoint with the lowest held-out loss, which becomes the adapter
    compute: str = "auto"  # of products with frozen weights while training: auto (exact), int8 or fp8


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
    seconds_per_step: float | None  # None: this machine is not calibrated
    seconds: float | None  # of all steps, without evaluations and saves
    weights_gib: float  # of the loaded base
    stages_gib: Mapping[str, float]  # peak of load, step, evaluate, merge
    disk_parts_gib: Mapping[str, float]  # base, run, release
    operations_per_token: float  # floating-point ones of the products, of training
    settings: Mapping[str, Any]  # the recipe's keys, resolved
    defaults: tuple[str, ...]  # those of them that nobody wrote
    estimated: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values, tokens_per_pass and steps at the top level too."""
        return {"steps": self.train.steps, "tokens_per_pass": self.train.tokens_per_pass, **_plain(asdict(self))}


def make_plan(  # noqa: PLR0913 - all that a plan follows from
    recipe: Recipe,
    machine: Machine,
    base: BaseFacts,
    data: DataFacts,
    *,
    token_ids: Mapping[str, int | None] = MappingProxyType({}),
    begun: Mapping[str, Any] | None = None,
    calibration: Calibration | None = None,
) -> Plan:
    """The resolved run; the same arguments always give the same plan. `token_ids`: those of adapter.train_tokens.

    `begun`: the settings in plan.json of a run that goes on, whose layout it keeps. Without a `calibration` of this
    machine the seconds are None.

    Raises:
        UserError: targets that the base does not have, a dtype the machine cannot compute, or rows longer than the
            base's context; all at once.
    """
    adapter = plan_adapter(recipe, base, token_ids)
    problems = adapter_problems(recipe, adapter, base, token_ids)
    problems += _machine_problems(recipe, machine) + _context_problems(recipe, base, data)
    problems += _held_out_problems(recipe, data)
    dtype, longest = _resolve_dtype(recipe, machine), int(data.train_tokens.max())
    layouts = list(possible_layouts(recipe, base, longest=longest, device=machine.device, begun=begun))
    problems += layout_problems(recipe, base) + compute_problems(recipe, machine, base, layouts[0], dtype=dtype)
    raise_problems(problems)
    for layout in layouts:
        train = _train_plan(recipe, machine, data, dtype, layout)
        costs = _costs(recipe, base, data, train, adapter)
        if peak_memory_gib(costs) <= MOST_OF_MEMORY * machine.device_memory_gib:
            break
    seconds = _seconds_per_step(costs, calibration)
    run_folder_bytes = run_bytes(train, costs.stored)
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
        trainable_parameters=costs.trainable,
        base_parameters=base.parameters,
        passes_per_step=costs.steps.passes,
        peak_memory_gib=round(peak_memory_gib(costs, calibration), 3),
        seconds_per_step=None if seconds is None else round(seconds, 4),
        seconds=None if seconds is None else round(seconds * train.steps, 1),
        weights_gib=round(_weights_gib(costs), 3),
        stages_gib={name: round(gib, 3) for name, gib in stages_gib(costs, calibration).items()},
        disk_parts_gib={name: round(gib, 3) for name, gib in disk_gib(base, run_bytes=run_folder_bytes).items()},
        operations_per_token=round(operations_per_token(costs)),
        disk_gib=round((run_folder_bytes + base.stored_bytes) / GIB, 3),  # with the merged weights
        settings=_settings(recipe, train, adapter, data, layout),
        defaults=tuple(key for key in recipe.settings() if key not in recipe.given_keys()),
        estimated=(
            *("peak_memory_gib", "disk_gib"),
            *(["passes_per_step"] if train.steps > STEPS_LAID_OUT else []),
            *(["uncalibrated"] if calibration is None else ["seconds_per_step", "seconds"] if seconds else []),
        ),
    )


def _seconds_per_step(costs: Costs, calibration: Calibration | None) -> float | None:
    """None where the machine is not calibrated, or the config does not say how many experts a token meets."""
    if calibration is None or (costs.base.experts and not costs.base.active_experts):
        return None
    return seconds_per_step(costs, calibration) + expert_seconds(costs, calibration)


def _weights_gib(costs: Costs) -> float:
    element = ELEMENT_BYTES[costs.dtype]
    return stored_weight_bytes(costs.base, quantization=costs.quantization, element_bytes=element) / GIB


def run_bytes(train: TrainPlan, trainable: int) -> int:
    """What the run folder takes at most: the checkpoints kept, the one that is being written, and the adapter.

    With the best one, which is kept beside the newest.
    """
    per_parameter = CHECKPOINT_BYTES_PER_PARAMETER[train.optimizer]
    checkpoint = trainable * per_parameter + train.steps * CHECKPOINT_BYTES_PER_STEP + CHECKPOINT_BYTES_BESIDE
    saves = math.ceil(train.steps / train.save_every_steps)
    if train.keep_best:
        saves += math.ceil(train.steps / train.evaluate_every_steps)
    return min(train.keep_checkpoints + 1 + train.keep_best, saves) * checkpoint + 4 * trainable


def _costs(recipe: Recipe, base: BaseFacts, data: DataFacts, train: TrainPlan, adapter: AdapterPlan) -> Costs:
    """What decides memory and time; of a very long run its first steps."""
    steps = min(train.steps, STEPS_LAID_OUT)
    layout = lay_out_steps(train.mixture, batch_size=train.batch_size, steps=steps, seed=train.seed)
    targets = [each for each in in_layers(base.linears, adapter) if is_target(each.module, adapter.targets)]
    return Costs(
        base=base,
        quantization=recipe.model.quantization,
        dtype=train.dtype,
        device=train.device,
        optimizer=train.optimizer,
        trainable=count_parameters(adapter, base),
        stored=count_stored(adapter, base),
        ranks=sum(rank_of(adapter, each.module) for each in targets),
        recompute=train.recompute,
        speedups=train.speedups,
        compute=train.compute,
        steps=count_steps_contents(
            layout, data.train_tokens, data.train_supervised, tokens_per_pass=train.tokens_per_pass
        ),
    )


def _machine_problems(recipe: Recipe, machine: Machine) -> list[Problem]:
    problems = []
    if recipe.model.dtype == "float16" and machine.device == "cpu":
        problems.append(Problem("model.dtype", "float16 is for GPUs; on a CPU write auto, bfloat16 or float32"))
    if recipe.train.optimizer == "paged-adamw-8bit" and machine.device == "cpu":
        problems.append(Problem("train.optimizer", "paging needs a GPU; on a CPU write adamw or adamw-8bit"))
    return problems


def _held_out_problems(recipe: Recipe, data: DataFacts) -> list[Problem]:
    asked = {"evaluate.patience": recipe.evaluate.patience, "output.keep_best": recipe.output.keep_best}
    if len(data.eval_tokens):
        return []
    message = "needs held-out rows, and there are none; name them with data.eval, or leave it out"
    return [Problem(key, message) for key, value in asked.items() if value]


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


def _train_plan(recipe: Recipe, machine: Machine, data: DataFacts, dtype: str, layout: Layout) -> TrainPlan:
    asked = recipe.train
    mixture = Mixture(data.source_examples, data.source_weights)
    per_epoch = mixture.examples_per_epoch
    steps = asked.max_steps or count_steps(per_epoch, batch_size=asked.batch_size, epochs=asked.epochs)
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
        tokens_per_pass=layout.tokens_per_pass,
        recompute=layout.recompute,
        dtype=dtype,
        device=machine.device,
        seed=recipe.seed,
        evaluate_every_steps=recipe.evaluate.every_steps,
        save_every_steps=recipe.output.save_every_steps,
        keep_checkpoints=recipe.output.keep_checkpoints,
        log_to=recipe.output.log_to,
        learning_rate_ratio=recipe.adapter.learning_rate_ratio,
        speedups=layout.speedups,
        prompts=recipe.evaluate.prompts,
        patience=recipe.evaluate.patience,
        keep_best=recipe.output.keep_best,
        open_keys=tuple(key for key in ("tokens_per_pass", "recompute") if getattr(asked, key) == "auto"),
        compute=recipe.model.compute,
    )


def memory_problem(plan: Plan, machine: Machine, *, free_gib: float | None = None) -> Problem | None:
    """What to lower if the run does not fit the machine, or what is free of its memory now; None if it does."""
    has, lower = f"{machine.device_memory_gib:.1f} GiB", "lower"
    if plan.peak_memory_gib <= machine.device_memory_gib:
        if free_gib is None or plan.peak_memory_gib * SURELY_NEEDED <= free_gib:
            return None
        has, lower = f"{free_gib:.1f} of {has} free now", "end other programs, lower"
    message = (
        f"about {plan.peak_memory_gib:.1f} GiB are needed, {machine.device_name} has {has}; {lower} "
        f"train.tokens_per_pass (now {plan.train.tokens_per_pass}), "
        "set train.recompute: all, or model.quantization: nf4"
    )
    return Problem("memory", message)


def _settings(
    recipe: Recipe, train: TrainPlan, adapter: AdapterPlan, data: DataFacts, layout: Layout
) -> dict[str, Any]:
    return {
        **recipe.settings(),
        **layout.settings(),
        "model.dtype": train.dtype,
        "adapter.targets": [*adapter.targets, *adapter.experts],
        "adapter.block_size": adapter.block_size or None,
        "data.format": data.format,
        "data.template": data.template,
        "train.warmup": train.warmup_steps,
        "train.max_steps": train.steps,
    }


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(key): _plain(inner) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(inner) for inner in value]
    return str(value) if isinstance(value, Path) else value
