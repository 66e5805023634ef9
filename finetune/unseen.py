"""Plan a base that is not on this machine: its shape from the table of families, its tokens from the rows' bytes."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from finetune.base import BaseFacts, ExpertShape, LinearShape
from finetune.data.estimate import assumed_facts, estimate_facts
from finetune.data.hub import can_be_had
from finetune.data.template import template_without_base
from finetune.families import Family, Model, Shape, count_parameters, find_family, has_experts
from finetune.plan import DataFacts
from finetune.recipe import Recipe

# Bytes of English instructions and answers a token: Llama 2 4.2, Mistral 4.3, Llama 3.2 4.9
# (benchmarks/bytes_per_token.py).
BYTES_PER_TOKEN, BYTES_PER_TOKEN_LARGE = 4.2, 4.9
LARGE_VOCABULARY = 65_536
# Which of ours is nearest in length to a chat variant's own template, by the token that ends its turns.
NEAREST = {"<|eot_id|>": "llama3", "<|eot|>": "llama3", "<|im_end|>": "chatml", "<|end|>": "zephyr"}
CHAT_NAMES = ("instruct", "chat", "-it", "vicuna", "distill", "qwen3-", "phi")
WINDOWED = ("gemma2", "gemma3", "gemma3_text", "llama4", "phi3")  # some layers see a part of the context only
ESTIMATED = (
    *("tokens", "supervised_tokens", "passes_per_step", "peak_memory_gib", "disk_gib"),
    *("data.template", "train.tokens_per_pass"),
)
# Of data sets that recipes name, as their pages on the hub state them.
KNOWN_ROWS = {
    "tatsu-lab/alpaca": 52_002,
    "yahma/alpaca-cleaned": 51_760,
    "timdettmers/openassistant-guanaco": 9_846,
}
NOT_HERE = (
    "the rows are not on this machine: {rows:,} of them, each taken to be as long as data.max_tokens allows "
    "({tokens:,}), so that tokens, memory and time are the most that they can be"
)
UNKNOWN = ("stop_token_ids", "template_sha256", "straddling_tokens", "truncated_tokens")


def find_facts(recipe: Recipe, model: Model) -> tuple[BaseFacts, DataFacts, tuple[str, ...]]:
    """The facts of a base known by its published shape only and of the rows, and what was assumed of the rows.

    Raises:
        UserError: rows that cannot be read.
    """
    facts = table_facts(model, revision=recipe.model.revision)
    asked = recipe.data.template
    template = template_without_base(
        nearest_template(model) if asked == "auto" else asked,
        bos_token="<s>",
        eos_token=find_family(model.family).stop_tokens[-1],
        date=recipe.data.date,
    )
    if (rows := _count_rows_elsewhere(recipe)) is not None:
        tokens = min(recipe.data.max_tokens, facts.context_tokens)
        assumed = assumed_facts(recipe.data, template, rows=rows, tokens=tokens)
        return facts, assumed, (NOT_HERE.format(rows=rows, tokens=tokens),)
    per_token = BYTES_PER_TOKEN_LARGE if facts.vocabulary > LARGE_VOCABULARY else BYTES_PER_TOKEN
    return facts, estimate_facts(recipe.data, template, bytes_per_token=per_token), ()


def _count_rows_elsewhere(recipe: Recipe) -> int | None:
    """Rows of data sets that are not on this machine and cannot be had now; None where they can, or are not known.

    Where train.max_steps says how long the run is, as many rows as it sees.
    """
    sources = recipe.data.sources
    if not all(each.source.startswith("hub:") for each in sources) or all(can_be_had(each.source) for each in sources):
        return None
    counts = [KNOWN_ROWS.get(each.source.split(":")[1].lower()) for each in sources]
    if None not in counts:
        return sum(min(count, each.rows or count) for count, each in zip(counts, sources, strict=True) if count)
    return recipe.train.max_steps and recipe.train.max_steps * recipe.train.batch_size


def mark_unseen(values: dict[str, Any]) -> dict[str, Any]:
    """A plan's values with what is estimated named, and what is unknown None."""
    of_time = [] if values["seconds"] is None else ["seconds_per_step", "seconds"]
    uncalibrated = ["uncalibrated"] if "uncalibrated" in values["estimated"] else []
    return values | dict.fromkeys(UNKNOWN) | {"estimated": [*ESTIMATED, *of_time, *uncalibrated]}


def table_facts(model: Model, *, revision: str | None = None) -> BaseFacts:
    """A base's facts from its published shape, stored in 16 bits."""
    family, shape = find_family(model.family), model.shape
    parameters = count_parameters(shape)
    return BaseFacts(
        base=model.id,
        revision=revision,
        folder=Path(model.id),
        model_type=family.model_type,
        layers=shape.layers + shape.cross_layers,
        hidden_size=shape.hidden,
        vocabulary=shape.vocabulary,
        context_tokens=model.context_tokens or family.context_tokens,
        tied_embeddings=shape.tied,
        stored_dtype="BF16",
        parameters=parameters,
        stored_bytes=2 * parameters,
        linears=tuple(linears(shape, family)),
        isolates_by_documents=family.model_type not in WINDOWED,
        experts=tuple(experts(shape)),
        image_layers=tuple(range(shape.layers, shape.layers + shape.cross_layers)),
        has_vision=shape.vision is not None,
        active_experts=shape.experts.active if shape.experts else 0,
    )


def linears(shape: Shape, family: Family) -> Iterator[LinearShape]:
    """The linear modules that an adapter can target, as a base's files would name them; experts are none."""
    queries, keys = shape.heads * shape.head, shape.key_value_heads * shape.head
    for layer in range(shape.layers):
        at = f"model.layers.{layer}"
        yield from _attention(shape, f"{at}.self_attn", queries, keys, fused=family.model_type == "phi3")
        if has_experts(shape, layer):
            if shape.experts and shape.experts.shared_intermediate:
                yield from _mlp(shape, f"{at}.mlp.shared_experts", shape.experts.shared_intermediate)
        elif family.model_type == "phi3":
            yield LinearShape(f"{at}.mlp.gate_up_proj", 2 * shape.intermediate, shape.hidden)
            yield LinearShape(f"{at}.mlp.down_proj", shape.hidden, shape.intermediate)
        else:
            yield from _mlp(shape, f"{at}.mlp", shape.intermediate)
    for layer in range(shape.layers, shape.layers + shape.cross_layers):
        yield from _attention(shape, f"model.layers.{layer}.cross_attn", queries, keys, fused=False)
        yield from _mlp(shape, f"model.layers.{layer}.mlp", shape.intermediate)


def experts(shape: Shape) -> Iterator[ExpertShape]:
    """The fused parameters of every layer that has experts."""
    if not shape.experts:
        return
    count, width = shape.experts.count, shape.experts.intermediate
    for layer in range(shape.layers):
        if has_experts(shape, layer):
            yield ExpertShape(f"model.layers.{layer}.mlp.experts.gate_up_proj", count, 2 * width, shape.hidden)
            yield ExpertShape(f"model.layers.{layer}.mlp.experts.down_proj", count, shape.hidden, width)


def _attention(shape: Shape, at: str, queries: int, keys: int, *, fused: bool) -> Iterator[LinearShape]:
    if latent := shape.latent:
        query_outputs = shape.heads * (latent.no_rope_size + latent.rope_size)
        if latent.query_rank:
            yield LinearShape(f"{at}.q_a_proj", latent.query_rank, shape.hidden)
            yield LinearShape(f"{at}.q_b_proj", query_outputs, latent.query_rank)
        else:
            yield LinearShape(f"{at}.q_proj", query_outputs, shape.hidden)
        expanded = shape.heads * (latent.no_rope_size + latent.value_size)
        yield LinearShape(f"{at}.kv_a_proj_with_mqa", latent.key_value_rank + latent.rope_size, shape.hidden)
        yield LinearShape(f"{at}.kv_b_proj", expanded, latent.key_value_rank)
        yield LinearShape(f"{at}.o_proj", shape.hidden, shape.heads * latent.value_size)
        return
    if fused:
        yield LinearShape(f"{at}.qkv_proj", queries + 2 * keys, shape.hidden)
    else:
        yield LinearShape(f"{at}.q_proj", queries, shape.hidden)
        yield LinearShape(f"{at}.k_proj", keys, shape.hidden)
        yield LinearShape(f"{at}.v_proj", keys, shape.hidden)
    yield LinearShape(f"{at}.o_proj", shape.hidden, queries)


def _mlp(shape: Shape, at: str, intermediate: int) -> Iterator[LinearShape]:
    yield LinearShape(f"{at}.gate_proj", intermediate, shape.hidden)
    yield LinearShape(f"{at}.up_proj", intermediate, shape.hidden)
    yield LinearShape(f"{at}.down_proj", shape.hidden, intermediate)


def nearest_template(model: Model) -> str:
    """The template that `auto` would find, or the one of ours that is nearest to it in length."""
    family = find_family(model.family)
    if not any(word in model.id.lower() for word in CHAT_NAMES):
        return "alpaca"
    return NEAREST.get(family.stop_tokens[0], "chatml") if family.template == "own" else family.template
