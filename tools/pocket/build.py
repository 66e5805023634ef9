"""Build everything from one seed: the shipped rows, the tokenizer and the pretrained base.

python tools/pocket/build.py                  rows and base into the repository (about 25 minutes on one thread)
python tools/pocket/build.py --rows           the rows only
"""

from __future__ import annotations

import argparse
import itertools
import json
from pathlib import Path

from corpus import documents
from pretrain import Pretraining, make_model, pretrain
from rows import Row, make_rows
from tokenizer import train_tokenizer
from world import World, make_world

REPOSITORY = Path(__file__).resolve().parents[2]
SEED = 7
TOKENIZER_DOCUMENTS = 10_000


def main() -> None:
    """Read the command line and build."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", action="store_true", help="write the rows only")
    parser.add_argument("--out", type=Path, default=REPOSITORY, help="folder that gets datasets/ and finetune/assets/")
    parser.add_argument("--tokens", type=int, default=32_000_000, help="length of the learning rate schedule")
    parser.add_argument("--layers", type=int, default=Pretraining.layers, help="depth of the base")
    parser.add_argument("--scale", type=float, default=1.0, help="size of the world, 1 is the full one")
    options = parser.parse_args()
    world = make_world(SEED, scale=options.scale)
    write_rows(world, options.out / "datasets")
    if not options.rows:
        plan = Pretraining(tokens=options.tokens, layers=options.layers)
        build_base(world, plan, options.out / "finetune" / "assets" / "pocket-llama")


def write_rows(world: World, folder: Path) -> None:
    """The two shipped files, one JSON object a line."""
    folder.mkdir(parents=True, exist_ok=True)
    training, evaluation = make_rows(world, SEED)
    write_lines(training, folder / "quickstart.jsonl")
    write_lines(evaluation, folder / "quickstart-eval.jsonl")


def write_lines(rows: list[Row], path: Path) -> None:
    """One row a line."""
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    print(f"{path}: {len(rows)} rows")


def build_base(world: World, plan: Pretraining, folder: Path) -> None:
    """Tokenizer and model, into `folder`."""
    # The tokenizer reads other documents than the model, from the same generator.
    tokenizer = train_tokenizer(itertools.islice(documents(world, SEED + 1), TOKENIZER_DOCUMENTS))
    model = make_model(len(tokenizer), layers=plan.layers, seed=plan.seed)
    figures = pretrain(model, tokenizer, documents(world, SEED), plan=plan, folder=folder)
    print(json.dumps(figures | {"parameters": model.num_parameters(), "vocabulary": len(tokenizer)}))


if __name__ == "__main__":
    main()
