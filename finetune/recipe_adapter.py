"""The adapter section of a recipe: each method brings its own keys, and none of another's."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Annotated, Any, Literal, get_args

from pydantic import AfterValidator, BeforeValidator, ConfigDict, Field
from pydantic_core import PydanticCustomError

from finetune.recipe_problems import Expects
from finetune.recipe_types import LARGEST_NUMBER, UNIQUE_ITEMS, Count, Names, Positive, Section, Text, each_once

Method = Literal["lora", "rslora", "dora", "ia3", "vera", "oft"]
Start = Literal["default", "pissa", "olora"]
Whole = Literal["embed_tokens", "lm_head"]

LOW_RANK = {"rank", "alpha", "dropout", "rank_by", "alpha_by", "learning_rate_ratio", "train_tokens", "also_train"}
# What a method needs beside method, targets, layers and from, which all have.
KEYS_OF: dict[str, set[str]] = {
    "lora": LOW_RANK | {"start"},
    "rslora": LOW_RANK,
    "dora": LOW_RANK,
    "ia3": set(),
    "vera": {"rank", "dropout"},
    "oft": {"block_size"},
}
TWIN_RANK = 8  # a start from the base takes no more directions than the smallest linear has
OWN_KEYS = set.union(*KEYS_OF.values())

VIRTUAL = (
    "trains virtual tokens: they stand once in front of a row of the batch, while a row of ours is many examples end "
    "to end, so that only the first would see them; and nothing can be merged into a base; write lora or ia3"
)
NOT_METHODS = {
    **dict.fromkeys(("prompt", "prompt-tuning", "prefix", "prefix-tuning", "p-tuning", "ptuning"), VIRTUAL),
    "boft": "has other factors where its CUDA kernel cannot be compiled at start (PEFT 0.21), so that the same recipe "
    "would train another adapter on another machine; write oft",
    "adalora": "changes its ranks while it trains, which a resumed run could not repeat; write lora with rank_by",
    "qlora": "is lora on a 4-bit base: write lora, and model.quantization: nf4",
    "lora+": "is lora with adapter.learning_rate_ratio: 16",
}
PLAIN = "so that it would start as the plain one"
NOT_STARTS = {
    "eva": f"needs a pass over the data before the adapter is attached, which PEFT leaves out without a word, {PLAIN}",
    "lora_ga": f"needs gradients of the data before the adapter is attached, which PEFT leaves out, {PLAIN}",
    "loftq": "replaces the quantised base by another one (and needs a GPU): step 0 would not be the base",
    "corda": "needs covariances of the data before the adapter is attached, and fails on a 4-bit base",
    "gaussian": "differs from the default in nothing but the spread of A; write default",
}


def _known(refused: Mapping[str, str]) -> BeforeValidator:
    """Refuse what people know from elsewhere, with the reason."""

    def check(value: Any) -> Any:
        if isinstance(value, str) and value in refused:
            raise PydanticCustomError("refused", "{value} {reason}", {"value": value, "reason": refused[value]})
        return value

    return BeforeValidator(check)


def _only_own_keys() -> dict[str, Any]:
    """For editors: a key that the method does not have is wrong."""
    return {
        "allOf": [
            {
                "if": {"properties": {"method": {"const": method}}, "required": ["method"][: method != "lora"]},
                "then": {"properties": dict.fromkeys(sorted(OWN_KEYS - keys), False)},
            }
            for method, keys in KEYS_OF.items()
        ]
    }


class AdapterSection(Section):
    """The adapter: the trainable delta."""

    model_config = ConfigDict(json_schema_extra=_only_own_keys())

    method: Annotated[Method, _known(NOT_METHODS)] = Field(default="lora", description="The kind of adapter")
    rank: Count = Field(default=16, description="Rank of the two adapter matrices")
    alpha: Positive = Field(default=32, description="Scale of the delta: alpha / rank (rslora: alpha / sqrt(rank))")
    dropout: Annotated[float, Field(ge=0, lt=1)] = Field(
        default=0.0, description="Chance that an input of the adapter is dropped"
    )
    targets: Annotated[
        Literal["all-linear", "attention", "mlp", "experts"] | Names,
        Expects("all-linear, attention, mlp, experts, or a list of these and of module names, each once"),
    ] = Field(default="all-linear", description="The modules that get a delta")
    layers: Annotated[
        Annotated[str, Field(pattern=r"^[0-9]+-[0-9]+$")]
        | Annotated[
            tuple[Annotated[int, Field(ge=0, le=LARGEST_NUMBER)], ...],
            Field(min_length=1, json_schema_extra=UNIQUE_ITEMS),
            AfterValidator(each_once),
        ]
        | None,
        Expects("a range as 8-15, a list of layer numbers from 0, each once, or null for all layers"),
    ] = Field(default=None, description="The layers that get a delta: 8-15, [0, 1, 2], or null for all")
    rank_by: Annotated[dict[Text, Count] | None, Expects("a mapping of module names to ranks, 1 or more")] = Field(
        default=None, description="Other ranks: {the end of a module's path: rank}; a pattern of Python's re"
    )
    alpha_by: Annotated[dict[Text, Positive] | None, Expects("a mapping of module names to numbers above 0")] = Field(
        default=None, description="Other alphas: {the end of a module's path: alpha}; a pattern of Python's re"
    )
    start: Annotated[Start, _known(NOT_STARTS)] = Field(
        default="default", description="Where the matrices start; at step 0 the model is the base with each of them"
    )
    learning_rate_ratio: Annotated[float, Field(gt=0)] = Field(
        default=1.0, description="The learning rate of B in that of A, which is train.learning_rate (LoRA+: 16)"
    )
    block_size: Annotated[
        Annotated[int, Field(ge=2, le=LARGEST_NUMBER)] | None, Expects("a whole number, 2 or more, or null for 32")
    ] = Field(
        default=None, description="Inputs that one rotation of oft mixes, null for 32; divides every target's inputs"
    )
    train_tokens: Annotated[tuple[Text, ...], AfterValidator(each_once), Field(json_schema_extra=UNIQUE_ITEMS)] = Field(
        default=(), description="Tokens of the tokenizer whose rows of embedding and head are trained too"
    )
    also_train: Annotated[tuple[Whole, ...], AfterValidator(each_once), Field(json_schema_extra=UNIQUE_ITEMS)] = Field(
        default=(), description="Modules that are trained whole: embed_tokens, lm_head"
    )
    from_: Text | None = Field(
        default=None, alias="from", description="Folder of an adapter to start from; null starts fresh"
    )

    @property
    def idle_keys(self) -> frozenset[str]:
        """The keys of other methods, which decide nothing here."""
        return frozenset(OWN_KEYS - KEYS_OF[self.method])

    def for_a_twin(self) -> dict[str, Any]:
        """The section for a small copy of the base: no layer numbers, no adapter of another size, ranks that fit."""
        given = self.model_dump(mode="json", by_alias=True, exclude_unset=True)
        twin = {key: value for key, value in given.items() if key not in ("layers", "from")}
        for key in ("rank_by", "alpha_by"):
            twin |= {key: _without_numbers(twin[key])} if twin.get(key) else {}
        if self.start != "default":
            twin["rank"] = min(self.rank, TWIN_RANK)
            twin |= {"rank_by": dict.fromkeys(twin["rank_by"], TWIN_RANK)} if twin.get("rank_by") else {}
        return twin

    def twin_learning_rate(self, asked: float) -> float:
        """A rate at which a few steps change the weights by more than a rounding to 16 bits, as a whole run's does.

        At 1e-4 the five steps of a twin do not, and a good recipe would be told that its release does nothing.
        """
        return max(asked, 0.05 if self.method in ("ia3", "vera") else 1e-3)


def _without_numbers(patterns: Mapping[str, Any]) -> dict[str, Any]:
    """Those that name no layer."""
    return {pattern: value for pattern, value in patterns.items() if not any(map(str.isdigit, pattern))}


def keys_of_other_methods(section: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """The keys written in an adapter section that its method does not have, each with what to do."""
    method = section.get("method", "lora")
    if method not in get_args(Method):
        return  # said elsewhere
    for key in section:
        if key in OWN_KEYS - KEYS_OF[method]:
            having = ", ".join(name for name, keys in KEYS_OF.items() if key in keys)
            yield key, f"is no key of {method}, only of {having}; remove it"
