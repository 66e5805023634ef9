"""Read what the user asked for: a YAML file and --set overrides in, a frozen Recipe or all its problems out."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, ConfigDict, Field, ValidationError
from pydantic_core import PydanticCustomError

from finetune.errors import Problem, UserError, raise_problems
from finetune.recipe_adapter import AdapterSection, keys_of_other_methods
from finetune.recipe_overrides import lay_over, read_overrides
from finetune.recipe_problems import Expects, explain, show
from finetune.recipe_types import LARGEST_NUMBER, UNIQUE_ITEMS, Count, Fraction, Section, Text, each_once
from finetune.recipe_yaml import Document, Flaw, Keys, read_document, read_recipe_file

LARGEST_SEED = 2**32 - 1  # numpy's limit


def _only_name_in_braces(folder: str) -> str:
    if set("{}") & set(folder.replace("{name}", "")):
        raise PydanticCustomError("unknown_placeholder", "unknown placeholder")
    return folder


Logger = Literal["tensorboard", "wandb", "mlflow", "trackio"]
Speedup = Literal["attention", "linears", "weights", "layers", "head", "prefix"]
DropReason = Literal[  # the reasons of finetune/data/rows.py
    "invalid_json",
    "invalid_text",
    "invalid_table",
    "row_too_large",
    "not_an_object",
    "other_format",
    "missing_column",
    "wrong_type",
    "bad_turns",
    "has_media",
    "bad_tool_call",
    "empty_prompt",
    "empty_answer",
    "undesired_answer",
    "template_refuses",
    "template_drops_turn",
    "template_unproven",
    "private_characters",
    "never_stops",
    "too_long",
    "no_supervised_token",
]


class ModelSection(Section):
    """The base: what is loaded, frozen, and how it is stored in memory."""

    base: Text = Field(description="The base model: a hub id, a folder, or builtin:NAME")
    revision: Text | None = Field(default=None, description="Hub commit to pin; null takes the newest")
    quantization: Literal["nf4", "fp4", "int8", "none"] = Field(
        default="nf4", description="How the frozen weights are stored; nf4 is double quantised in blocks of 64"
    )
    dtype: Literal["auto", "bfloat16", "float16", "float32"] = Field(
        default="auto", description="The type of the computations"
    )
    compute: Literal["auto", "int8", "fp8"] = Field(
        default="auto",
        description="Training's products with frozen weights: auto is exact, int8 (CPU) and fp8 (GPU) round to 8 bits",
    )


class SourceSection(Section):
    """One source of rows, where more is to be said than its path."""

    source: Text = Field(description="A file, a folder of files, or hub:OWNER/NAME[:SPLIT]")
    rows: Count | None = Field(
        default=None, description="How many of its rows are read, from the first; null reads all"
    )
    weight: Annotated[float, Field(gt=0, le=100)] = Field(
        default=1.0,
        description="How often each of its rows is trained on in one epoch; 0.5 takes another half each epoch",
    )
    columns: dict[Text, Text] | None = Field(
        default=None, description="Its columns under other names: {name in the file: name that a format knows}"
    )


class DataSection(Section):
    """The data: which rows, and how they become tokens and labels."""

    train: Annotated[
        Text | SourceSection | Annotated[tuple[Text | SourceSection, ...], Field(min_length=1)],
        Expects("a path, hub:OWNER/NAME, a source with keys (source, rows, weight, columns), or a list of these"),
    ] = Field(description="The training rows: a path, a folder, hub:OWNER/NAME[:SPLIT], or a list of sources")
    eval: Annotated[
        Fraction | Count | Text | SourceSection | None,
        Expects("a fraction between 0 and 1, a whole number of rows, a path, a source, or null for no evaluation"),
    ] = Field(
        default=None, description="Rows held out: a fraction or a number of the training rows, or a source of its own"
    )
    format: Literal["auto", "alpaca", "messages", "sharegpt", "prompt-completion", "preference", "text"] = Field(
        default="auto", description="The shape of a row; auto looks at the first row of each source"
    )
    template: Annotated[
        Literal["auto", "none", "alpaca", "vicuna", "llama2", "llama3", "chatml", "mistral", "zephyr"]
        | Annotated[str, Field(pattern=r"\S\.jinja$")],
        Expects(
            "auto, none, alpaca, vicuna, llama2, llama3, chatml, mistral, zephyr or a path that ends in .jinja",
        ),
    ] = Field(default="auto", description="The chat template; auto takes the base's own, else alpaca")
    loss_on: Literal["assistant", "last-assistant", "everything"] = Field(
        default="assistant", description="The part of a conversation that is learned"
    )
    max_tokens: Count = Field(default=2048, description="Longest example in tokens")
    too_long: Literal["error", "drop", "truncate"] = Field(
        default="error", description="What happens to a longer example"
    )
    truncate: Literal["prompt", "answer"] = Field(
        default="prompt",
        description="The side that too_long: truncate cuts: the oldest words of the prompt, or the end of the answer",
    )
    empty_answer: Literal["error", "drop"] = Field(
        default="error", description="What happens to a row without an answer"
    )
    special_tokens: Literal["text", "control"] = Field(
        default="text",
        description="What a control token's text means inside a row: ordinary text, or the control token",
    )
    deduplicate: Literal["none", "exact", "near"] = Field(
        default="none", description="Drop later copies of a row; near: also those equal but for case and white space"
    )
    leaked: Literal["keep", "drop", "error"] = Field(
        default="keep",
        description="What happens to a held-out row that is a training row too (case, white space folded)",
    )
    drop: Annotated[tuple[DropReason, ...], AfterValidator(each_once), Field(json_schema_extra=UNIQUE_ITEMS)] = Field(
        default=(), description="Reasons for which a row is dropped and counted instead of refused"
    )
    system: str | None = Field(default=None, description="System prompt of rows that have none of their own")
    date: Text = Field(default="26 Jul 2024", description="The date told to a template that asks the clock")

    @property
    def sources(self) -> tuple[SourceSection, ...]:
        """The sources of the training rows, one or several, all in the long form."""
        several = self.train if isinstance(self.train, tuple) else (self.train,)
        return tuple(SourceSection(source=each) if isinstance(each, str) else each for each in several)

    @property
    def eval_source(self) -> SourceSection | None:
        """The source of evaluation rows, or None where they are held out or there are none."""
        if isinstance(self.eval, str):
            return SourceSection(source=self.eval)
        return self.eval if isinstance(self.eval, SourceSection) else None

    @property
    def all_sources(self) -> tuple[SourceSection, ...]:
        """The sources of the training rows, and last that of the evaluation rows if they have one of their own."""
        return (*self.sources, *([self.eval_source] if self.eval_source else []))

    @property
    def dropped_reasons(self) -> frozenset[str]:
        """Why a row is dropped and counted instead of refused."""
        further = {"empty_answer": self.empty_answer, "too_long": self.too_long}
        return frozenset({*self.drop, *(reason for reason, choice in further.items() if choice == "drop")})


class TrainSection(Section):
    """The training: how long, how fast, with which optimizer."""

    model_config = ConfigDict(
        json_schema_extra={
            "not": {"required": ["epochs", "max_steps"], "properties": {"max_steps": {"type": "integer"}}}
        }
    )

    objective: Literal["sft"] = Field(default="sft", description="What is optimised: sft is supervised fine-tuning")
    epochs: Count = Field(default=3, description="Trips through the data; has no effect where max_steps is given")
    max_steps: Count | None = Field(default=None, description="Optimizer steps, in place of epochs")
    batch_size: Count = Field(default=16, description="Examples per optimizer step, all devices together")
    tokens_per_pass: Annotated[Literal["auto"] | Count, Expects("auto or a whole number, 1 or more")] = Field(
        default="auto", description="Tokens of one forward and backward pass; changes speed and memory only"
    )
    recompute: Literal["auto", "none", "all"] = Field(
        default="auto", description="Recompute activations to save memory; changes speed and memory only"
    )
    speedups: Annotated[
        Literal["auto", "none"]
        | Annotated[
            tuple[Speedup, ...], Field(min_length=1, json_schema_extra=UNIQUE_ITEMS), AfterValidator(each_once)
        ],
        Expects("auto, none, or a list of attention, linears, weights, layers, head, prefix, each once"),
    ] = Field(
        default="auto",
        description="Parts of a pass computed by our own code, not the libraries'; changes speed and memory only",
    )
    learning_rate: Annotated[float, Field(gt=0)] = Field(
        default=2e-4, description="Highest learning rate of the schedule"
    )
    schedule: Literal["cosine", "linear", "constant"] = Field(
        default="cosine", description="How the learning rate falls after the warmup"
    )
    warmup: Annotated[
        Annotated[float, Field(ge=0, lt=1)] | Annotated[int, Field(ge=0, le=LARGEST_NUMBER)],
        Expects("a fraction of the steps (0 or more, less than 1) or a whole number of steps"),
    ] = Field(default=0.03, description="Steps in which the learning rate rises: a fraction of all steps, or a number")
    optimizer: Literal["adamw", "adamw-8bit", "paged-adamw-8bit"] = Field(default="adamw", description="The optimizer")
    weight_decay: Annotated[float, Field(ge=0)] = Field(default=0.0, description="Decoupled weight decay")
    max_grad_norm: Annotated[float, Field(gt=0)] = Field(
        default=1.0, description="The gradient's norm is clipped to this"
    )


class EvaluateSection(Section):
    """The evaluation during training."""

    every_steps: Count = Field(default=100, description="Optimizer steps between two evaluations")
    prompts: Text | None = Field(
        default=None,
        description="A file of prompts that are answered greedily at every evaluation, into samples.jsonl; "
        "one a line, or .jsonl with prompt, messages or instruction",
    )
    patience: Count | None = Field(
        default=None, description="Evaluations in a row without a lower held-out loss that end the run; null: none do"
    )


class OutputSection(Section):
    """The run folder and what is kept in it."""

    folder: Annotated[Text, AfterValidator(_only_name_in_braces)] = Field(
        default="runs/{name}", description="The run folder; {name} becomes the recipe's name"
    )
    save_every_steps: Count = Field(default=200, description="Optimizer steps between two checkpoints")
    keep_checkpoints: Count = Field(default=2, description="How many of the newest checkpoints are kept")
    keep_best: bool = Field(
        default=False, description="Keep the checkpoint with the lowest held-out loss, too, and make it the adapter"
    )
    log_to: Annotated[tuple[Logger, ...], AfterValidator(each_once), Field(json_schema_extra=UNIQUE_ITEMS)] = Field(
        default=(), description="Loggers beside metrics.jsonl, which is always written"
    )


class Recipe(Section):
    """A finetune recipe: everything a user can ask of a training run."""

    # Not Literal[1], which pydantic lets true and 1.0 pass for.
    version: Annotated[int, Field(ge=1, le=1, json_schema_extra={"const": 1}), Expects("1")] = Field(
        description="The version of the recipe format, 1"
    )
    name: Annotated[
        str,
        Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", max_length=100),
        Expects("text of at most 100 letters, digits, dots, underscores and hyphens, the first a letter or digit"),
    ] = Field(description="The name of the run: letters, digits, dots, underscores and hyphens")
    seed: Annotated[int, Field(ge=0, le=LARGEST_SEED)] = Field(default=17, description="The source of all randomness")
    model: ModelSection
    adapter: AdapterSection = AdapterSection()
    data: DataSection
    train: TrainSection = TrainSection()
    evaluate: EvaluateSection = EvaluateSection()
    output: OutputSection = OutputSection()

    @property
    def run_folder(self) -> Path:
        """`output.folder` with the name filled in; `~` is the home folder."""
        return Path(self.output.folder.replace("{name}", self.name)).expanduser()

    def settings(self) -> dict[str, Any]:
        """Every value as "section.key", in the recipe's order; values are plain JSON ones.

        `output.folder` has the name filled in; `train.epochs` is None where max_steps counts instead, and an
        adapter's key where its method has none.
        """
        flat = _flat(self.model_dump(mode="json", by_alias=True))
        flat["output.folder"] = self.output.folder.replace("{name}", self.name)
        flat |= {f"adapter.{key}": None for key in self.adapter.idle_keys}
        if self.train.max_steps is not None:
            flat["train.epochs"] = None
        return flat

    def given_keys(self) -> frozenset[str]:
        """The keys that the recipe or --set wrote, as "section.key"; every other setting is a default."""
        return frozenset(_flat(self.model_dump(mode="json", by_alias=True, exclude_unset=True)))


def _flat(sections: Mapping[str, Any]) -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in sections.items():
        flat |= {f"{name}.{key}": inner for key, inner in value.items()} if isinstance(value, dict) else {name: value}
    return flat


def recipe_schema() -> dict[str, Any]:
    """JSON Schema (draft 2020-12) of a recipe, for editors."""
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **Recipe.model_json_schema(by_alias=True)}


# --- from text to a Recipe ---


def load_recipe(path: Path, overrides: Sequence[str] = ()) -> Recipe:
    """The recipe in a YAML or JSON file, with "section.key=VALUE" overrides laid over it.

    An override of train.max_steps takes the place of the file's train.epochs, and the other way round.

    Raises:
        UserError: with every problem: those of the file in the order of its lines, then those of the overrides.
    """
    document = read_document(read_recipe_file(path))
    changes, problems = read_overrides(overrides, recipe=Recipe)
    if not isinstance(document.values, dict):
        found = "the file is empty" if document.values is None else f"found {show(document.values)}"
        headless = Flaw(1, (), f"a recipe is a mapping of sections (version, name, model, data, ...); {found}")
        raise UserError([*_in_file(document.flaws or (headless,), path), *problems])
    recipe, errors = _validate(lay_over(document.values, changes, recipe=Recipe))
    unread = [flaw.keys for flaw in document.flaws if flaw.unread and flaw.keys not in changes]
    flaws = list(document.flaws)
    for keys, message in errors:
        if keys[:2] in changes:
            inside = "".join(f"{key}: " for key in keys[2:] if isinstance(key, str))
            problems.append(Problem(changes[keys[:2]].where, inside + message))
        elif not any(_inside(keys, other) or _inside(other, keys) for other in unread):
            flaws.append(Flaw(_nearest_line(keys, document), keys, message))
    raise_problems([*_in_file(flaws, path), *problems])
    assert recipe is not None
    return recipe


def _validate(values: Mapping[str, Any]) -> tuple[Recipe | None, list[tuple[Keys, str]]]:
    """The recipe, or None, and every (keys, message) that is wrong."""
    errors: list[tuple[Keys, str]] = []
    train = values["train"]
    if isinstance(train, dict) and "epochs" in train and train.get("max_steps") is not None:
        errors.append((("train", "max_steps"), "stands beside train.epochs; keep one of the two"))
    adapter = values["adapter"]
    if isinstance(adapter, dict):
        errors += [(("adapter", key), message) for key, message in keys_of_other_methods(adapter)]
    try:
        # Through JSON: a list may become a tuple, while 32 stays unlike "32".
        return Recipe.model_validate_json(json.dumps(values)), errors
    except ValidationError as error:
        details = error.errors(include_url=False)
        return None, errors + list(explain(details, values=values, recipe=Recipe))


def _inside(keys: Keys, outer: Keys) -> bool:
    return keys[: len(outer)] == outer


def _nearest_line(keys: Keys, document: Document) -> int:
    """The line of a key, of the section where it is missing, or of the file's first key."""
    return next(document.lines[keys[:n]] for n in range(len(keys), -1, -1) if keys[:n] in document.lines)


def _visible(key: str) -> str:
    """A key as it is, or with escapes where it holds what nobody can see, as a no-break space."""
    return key if key.isprintable() else key.encode("unicode_escape").decode()


def _in_file(flaws: Sequence[Flaw], path: Path) -> list[Problem]:
    def where(flaw: Flaw) -> str:
        column = f":{flaw.column}" if flaw.column else ""
        keys = ".".join(_visible(key) for key in flaw.keys if isinstance(key, str))
        return f"{path}:{flaw.line}{column}" + (f": {keys}" if keys else "")

    return [Problem(where(flaw), flaw.message) for flaw in sorted(flaws, key=lambda flaw: flaw.line)]
