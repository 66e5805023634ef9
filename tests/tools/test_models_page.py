"""docs/models.md is what tools/models_page.py renders from the table of families and the recorded rehearsals."""

from __future__ import annotations

import json

from finetune.families import FAMILIES, MODELS
from tools.models_page import OUTCOME, PAGE, page


def test_the_page_is_rendered_from_the_table() -> None:
    outcome = json.loads(OUTCOME.read_text(encoding="utf-8"))
    assert PAGE.read_text(encoding="utf-8") == page(outcome), "run: python tools/models_page.py"
    assert set(outcome) == {family.model_type for family in FAMILIES}


def test_the_page_names_every_model_and_every_failure() -> None:
    outcome = json.loads(OUTCOME.read_text(encoding="utf-8"))
    text = page(outcome)
    assert all(f"| `{model.id}` |" in text for model in MODELS)
    found = {"state": "failed", "problems": ["it broke"], "proofs": 3, "notes": [], "seconds": {}}
    text = page(outcome | {"llama": {"none": found, "nf4": found}})
    assert text.count("- `llama`, quantization nf4: it broke\n") == 1
    assert "| `llama` | - | **fails**, see below | **fails**, see below | - |" in text
