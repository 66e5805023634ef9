"""The main job on the embedded base: train, merge with proof, evaluate base, tuned and merged side by side.

It calls what the commands call and prints each command, so that every line can be typed again. `make demo` runs it.
"""

from __future__ import annotations

import os
import shutil
import sys
import time
from collections.abc import Sequence
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"

from rich.console import Console
from rich.table import Table

from finetune.errors import FinetuneError
from finetune.machine import quiet_libraries, share_cores

RECIPE = Path("recipes/quickstart.yaml")
HELD_OUT = "datasets/quickstart-eval.jsonl"
RUN, RELEASE, BASE = Path("runs/demo"), Path("releases/demo"), "builtin:pocket-llama"
SHOWN_ANSWERS = 5
SHOWN_CHARACTERS = 44


def main() -> None:
    """Run the four steps and end with the tables."""
    quiet_libraries()
    share_cores()
    from finetune.release.merge import merge, release_text
    from finetune.run import run
    from finetune.use.evaluate import evaluate

    started = time.perf_counter()
    console = Console()
    for folder in (RUN, RELEASE):  # the demo's own names; other runs and releases stay
        shutil.rmtree(folder, ignore_errors=True)
    say(console, f"finetune train {RECIPE} --out {RUN}")
    run(RECIPE, out=RUN)
    say(console, f"finetune merge {RUN} --out {RELEASE}")
    console.print(release_text(merge(RUN, out=RELEASE)), highlight=False)
    say(console, f"finetune evaluate {RUN} --against {BASE} --data {HELD_OUT} --by kind")
    tuned, base = evaluate(str(RUN), data=HELD_OUT, against=BASE, by="kind").targets
    say(console, f"finetune evaluate {RELEASE} --data {HELD_OUT} --by kind")
    (merged,) = evaluate(str(RELEASE), data=HELD_OUT, by="kind").targets
    scores = {"base": base, "tuned": tuned, "merged": merged}
    console.print(score_table(scores))
    console.print(answer_table(scores))
    console.print(f"run:      {RUN}  (adapter, metrics.jsonl, loss.png)", highlight=False)
    console.print(f"release:  {RELEASE}  (merged weights, model card, manifest with the proofs)", highlight=False)
    console.print(f"next:     finetune chat {RELEASE}", highlight=False)
    console.print("          finetune recipes copy quickstart --to my-first-recipe", highlight=False)
    console.print(f"{time.perf_counter() - started:.0f} s", highlight=False)


def say(console: Console, command: str) -> None:
    """Show the command that does what comes next."""
    console.print(f"\n[bold]$ {command}[/bold]", highlight=False)


def score_table(scores: dict) -> Table:
    """Exact match per kind of task, then over unseen entities and all rows, the loss, and correct beginnings."""
    table = Table(title="300 held-out rows, exact match in %", title_justify="left")
    table.add_column("kind")
    table.add_column("rows", justify="right")
    for name in scores:
        table.add_column(name, justify="right")
    rows = next(iter(scores.values())).rows
    for kind in sorted({row.values["kind"] for row in rows}):
        add_share(table, kind, scores, [row.values["kind"] == kind for row in rows])
    table.add_section()
    add_share(table, "entities in no training row", scores, [bool(row.values.get("unseen")) for row in rows])
    add_share(table, "all", scores, [True] * len(rows))
    table.add_section()
    table.add_row("loss on answer tokens", "", *(f"{score.loss:.3f}" for score in scores.values()))
    begins = [score.to_json()["begins_correctly"] for score in scores.values()]
    table.add_row("answer begins correctly", "", *(f"{100 * share:.0f}" for share in begins))
    return table


def add_share(table: Table, title: str, scores: dict, chosen: Sequence[bool]) -> None:
    """One line: exact match over the chosen rows, for every target."""
    cells = []
    for score in scores.values():
        picked = [row.correct for row, keep in zip(score.rows, chosen, strict=True) if keep]
        cells.append(f"{100 * sum(picked) / len(picked):.0f}")
    table.add_row(title, str(sum(chosen)), *cells)


def answer_table(scores: dict) -> Table:
    """The first row of five kinds: the question, the right answer, and what each target says."""
    table = Table(title="Five questions", title_justify="left", show_lines=True)
    for column in ("question", "right", *scores):
        table.add_column(column, overflow="fold")
    rows = {}
    for index, row in enumerate(next(iter(scores.values())).rows):
        rows.setdefault(row.values["kind"], index)
    for index in list(rows.values())[:SHOWN_ANSWERS]:
        row = next(iter(scores.values())).rows[index]
        question = " ".join(filter(None, (row.values["instruction"], row.values["input"])))
        table.add_row(question, row.expected, *(shorten(score.rows[index].text or "") for score in scores.values()))
    return table


def shorten(text: str) -> str:
    """One line of a text that may be long."""
    line = " ".join(text.split())
    return line if len(line) <= SHOWN_CHARACTERS else line[:SHOWN_CHARACTERS] + "..."


if __name__ == "__main__":
    try:
        main()
    except FinetuneError as error:
        print(error, file=sys.stderr)
        sys.exit(error.code)
