"""Step 1, in the project's environment: token ids of a release's training rows, as they were trained.

    .venv/bin/python tools/gptq/rows.py RELEASE ROWS [COUNT]

ROWS is then a JSON file: "calibration", at most COUNT (512) training rows drawn with the recipe's seed, and "held_out",
rows with their supervised positions, to compare on. The run that the release was made of must still be there.
"""

from __future__ import annotations

import json
import random
import sys
from pathlib import Path

from finetune.artifact import read_json
from finetune.data.prepare import prepare_data
from finetune.recipe import load_recipe
from finetune.release.manifest import MANIFEST
from finetune.release.source import read_source


def main() -> None:
    release, target = Path(sys.argv[1]), Path(sys.argv[2])
    count = int(sys.argv[3]) if len(sys.argv) > 3 else 512
    source = read_source((release / read_json(release / MANIFEST)["run"]).resolve())
    if source.lock is None:
        raise SystemExit(f"{release}: made of an adapter without its run; its rows are not known")
    recipe = load_recipe(source.path / "recipe.yaml", source.lock["overrides"])
    rows = prepare_data(recipe.data, source.base, seed=recipe.seed).train
    chosen = random.Random(recipe.seed).sample(range(len(rows)), k=min(count, len(rows)))
    held_out = [{"ids": row.ids.tolist(), "labels": row.labels.tolist()} for row in source.rows.examples]
    calibration = [rows[index].ids.tolist() for index in chosen]
    target.write_text(json.dumps({"calibration": calibration, "held_out": held_out}))
    print(f"{target}: {len(calibration)} of {len(rows)} training rows; to compare on: {source.rows.origin}")


if __name__ == "__main__":
    main()
