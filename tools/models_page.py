"""Render docs/models.md: the table of families and the outcome of their rehearsals in, a page out.

    python tools/models_page.py

tests/tools/test_models_page.py compares the page in the repository with this rendering.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from finetune.families import FAMILIES, MODELS, Family, Model, count_parameters, find_family  # noqa: E402

PAGE = ROOT / "docs" / "models.md"
OUTCOME = ROOT / "benchmarks" / "results" / "families.json"
HEAD = """# Models

What is known of published bases, and what was proven for their architectures. Any other base of one of these
architectures works in the same way: `finetune check` rehearses it on a small twin before its weights are loaded.

Every model of this page is planned with nothing on disk ([planning.md](planning.md)). With `--offline`, `finetune
check` also rehearses a recipe whose base is one of them and not here: the twin has the published shape; the rest of its
config (transformers' defaults), the tokenizer (pocket-llama's with the base's control tokens) and a template of the
base's own are stand-ins, and rows that are not here are the quickstart's. Its answer names them. Rows with images are
refused, or dropped with `data.drop: [has_media]`: of a model with a vision tower the text side is trained.

This page is rendered from `finetune/families.py` and `benchmarks/results/families.json` by `tools/models_page.py`; a
test compares them.

## Families

`own`: the template in the chat variant's tokenizer; base variants have none and get `alpaca`. Tied: the head is the
embedding.
"""
PROVEN = """
## What was proven, by architecture

Parameters: the closed form of `finetune/families.py` equals the count of transformers' own modules, for every model
below (`tests/test_families.py`). The other columns are the rehearsal of a small twin (`benchmarks/families.py`): random
weights in the proportions of the published config, stored in bfloat16, five steps, stopped and resumed bit by bit,
merged, reloaded from the disk and compared with base + adapter, exported as GGUF where that is written for the
architecture. More types, methods and ways to store a base: `tests/release/test_families.py`. A twin shows that every
stage handles the architecture; it says nothing about how well a published model learns.
"""
MODELS_HEAD = """
## Every model of the table
"""


def page(outcome: Mapping[str, Any]) -> str:
    """The whole page as Markdown."""
    failures = list(_failures(outcome))
    lines = [HEAD, *_table(_family_rows()), PROVEN, *_table(_proof_rows(outcome))]
    lines += ["", *(failures or ["Nothing failed."])]
    return "\n".join([*lines, MODELS_HEAD, *_table(_model_rows())]) + "\n"


def _family_rows() -> Iterator[list[str]]:
    yield [
        "family",
        "architecture",
        "sizes",
        "context",
        "tied",
        "template",
        "stop tokens",
        "licence",
        "where it differs",
    ]
    for family in FAMILIES:
        models = [model for model in MODELS if model.family == family.name]
        ties = {model.shape.tied for model in models}
        yield [
            family.name,
            f"`{family.model_type}`",
            ", ".join(dict.fromkeys(_billions(model) for model in models)),
            ", ".join(dict.fromkeys(f"{_context(model, family):,}" for model in models)),
            "some" if len(ties) > 1 else "yes" if ties == {True} else "no",
            family.template,
            " ".join(f"`{_cell(token)}`" for token in family.stop_tokens),
            family.licence,
            family.differs or "-",
        ]


def _proof_rows(outcome: Mapping[str, Any]) -> Iterator[list[str]]:
    yield ["architecture", "left alone", "LoRA on the unquantised base", "QLoRA (nf4)", "GGUF"]
    for kind in dict.fromkeys(family.model_type for family in FAMILIES):
        alone = next(family.leave_alone for family in FAMILIES if family.model_type == kind)
        found = outcome.get(kind, {})
        none, nf4 = found.get("none", {}), found.get("nf4", {})
        yield [f"`{kind}`", ", ".join(alone) or "-", _ending(none), _ending(nf4), _gguf(none)]


def _ending(found: Mapping[str, Any]) -> str:
    if not found:
        return "not rehearsed"
    if found["state"] != "done":
        return "**fails**, see below"
    return f"{found['proofs']} proofs hold"


def _gguf(found: Mapping[str, Any]) -> str:
    if found.get("state") != "done":
        return "-"
    return "no" if any(note.startswith("no GGUF") for note in found["notes"]) else "proven"


def _failures(outcome: Mapping[str, Any]) -> Iterator[str]:
    for kind, by_quantization in outcome.items():
        for quantization, found in by_quantization.items():
            for problem in found["problems"]:
                yield f"- `{kind}`, quantization {quantization}: {problem}"


def _model_rows() -> Iterator[list[str]]:
    yield ["model", "family", "parameters", "layers", "width", "vocabulary", "context"]
    for model in MODELS:
        shape = model.shape
        yield [
            f"`{model.id}`",
            model.family,
            f"{count_parameters(shape):,}",
            str(shape.layers + shape.cross_layers),
            f"{shape.hidden:,}",
            f"{shape.vocabulary:,}",
            f"{_context(model, find_family(model.family)):,}",
        ]


def _table(rows: Iterator[list[str]]) -> list[str]:
    head, *body = rows
    return [f"| {' | '.join(row)} |" for row in (head, ["---"] * len(head), *body)]


def _billions(model: Model) -> str:
    count = count_parameters(model.shape) / 1e9
    return f"{count:.1f}B" if count < 10 else f"{count:.0f}B"


def _context(model: Model, family: Family) -> int:
    return model.context_tokens or family.context_tokens


def _cell(text: str) -> str:
    return text.replace("|", "\\|")


if __name__ == "__main__":
    PAGE.write_text(page(json.loads(OUTCOME.read_text(encoding="utf-8"))), encoding="utf-8")
