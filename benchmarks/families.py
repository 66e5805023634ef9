"""Rehearse a small twin of every published architecture: train, resume, merge, export, prove; the outcome as JSON.

    python benchmarks/families.py [ARCHITECTURE]...

Random weights in the published config's proportions, 20 rows, pocket-llama's tokenizer, computed in float32, stored in
bfloat16, LoRA on all linear modules, once unquantised and once in nf4. docs/models.md is rendered from the outcome.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
OUTCOME = ROOT / "benchmarks" / "results" / "families.json"
QUANTIZATIONS = ("none", "nf4")


def rehearse_family(kind: str, quantization: str, folder: Path) -> dict[str, Any]:
    """How the rehearsal of an architecture's twin ends: its state, problems, number of proofs, and notes."""
    from transformers import AutoTokenizer

    from finetune.recipe import load_recipe
    from finetune.rehearsal import twin_recipe
    from finetune.rehearse import carry_out
    from finetune.twin import make_twin
    from tests.conftest import POCKET, alpaca_rows, write_recipe
    from tests.test_families import published_config

    tokenizer = AutoTokenizer.from_pretrained(POCKET)
    published_config(kind, tokenizer).save_pretrained(folder / "published")
    tokenizer.save_pretrained(folder / "published")
    make_twin(folder / "published", folder / "base", stored_dtype="BF16")
    settings = {"model__quantization": quantization, "model__dtype": "float32"}
    recipe = load_recipe(write_recipe(folder, folder / "base", alpaca_rows(20), **settings))
    work = folder / "work"
    work.mkdir()
    (work / "recipe.json").write_text(json.dumps(twin_recipe(recipe, work)), encoding="utf-8")
    _prove_in_this_process()
    done = carry_out(work / "recipe.json", folder / "base", "BF16", work)
    broken = [proof for proof in done["proofs"] if proof["limit"] is not None and not proof["value"] <= proof["limit"]]
    problems = [f"{each['where']}: {each['message']}".replace(f"{folder}/", "") for each in done["problems"]]
    problems += [f"{proof['name']}: {proof['value']}, at most {proof['limit']}" for proof in broken]
    state = "failed" if problems else "done"
    return {"state": state, "problems": problems, "proofs": len(done["proofs"]), "notes": done["notes"]}


def _prove_in_this_process() -> None:
    """From the disk all the same, but without a fresh process for each, which imports torch anew."""
    from finetune.release import export, export_proof, merge, proof

    merge.prove_in_fresh_process = lambda pairs: [proof.prove(*pair) for pair in pairs]
    export.prove_in_fresh_process = lambda folder, against: list(export_proof.prove_export(folder, against))


def main() -> None:
    from tests.test_families import CONFIGS

    found = json.loads(OUTCOME.read_text(encoding="utf-8")) if OUTCOME.is_file() else {}
    for kind in sys.argv[1:] or sorted(CONFIGS):
        for quantization in QUANTIZATIONS:
            with tempfile.TemporaryDirectory() as folder:
                os.environ["XDG_CACHE_HOME"] = f"{folder}/cache"
                found.setdefault(kind, {})[quantization] = rehearse_family(kind, quantization, Path(folder))
            print(kind, quantization, found[kind][quantization], flush=True)
            OUTCOME.write_text(json.dumps(dict(sorted(found.items())), indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
