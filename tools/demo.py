"""The main job on the embedded base: train, evaluate before and after, merge with proofs, export to GGUF with proofs.

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

from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table

from finetune.errors import FinetuneError
from finetune.machine import quiet_libraries, share_cores
from finetune.release.fresh import Proof

RECIPE = Path("recipes/quickstart.yaml")
HELD_OUT = "datasets/quickstart-eval.jsonl"
RUN, RELEASE, BASE = Path("runs/demo"), Path("releases/demo"), "builtin:pocket-llama"
GGUF, QUANT = Path("releases/demo-gguf"), "q4_k_m"
SHOWN_ANSWERS = 5
SHOWN_CHARACTERS = 44


def main() -> None:
    """Run the five steps; tables on the way, and at the end what lies where."""
    quiet_libraries()
    share_cores()
    from finetune.release.export import export
    from finetune.release.merge import merge
    from finetune.run import run
    from finetune.use.evaluate import evaluate

    started = time.perf_counter()
    console = Console(highlight=False)
    for folder in (RUN, RELEASE, GGUF):  # the demo's own names; other runs and releases stay
        shutil.rmtree(folder, ignore_errors=True)
    say(console, f"finetune train {RECIPE} --out {RUN}")
    run(RECIPE, out=RUN)
    say(console, f"finetune evaluate {RUN} --against {BASE} --data {HELD_OUT}")
    tuned, base = evaluate(str(RUN), data=HELD_OUT, against=BASE).targets
    console.print(score_table({"base": base, "tuned": tuned}))
    say(console, f"finetune merge {RUN} --out {RELEASE}")
    release = merge(RUN, out=RELEASE)
    console.print(f"merged onto the {release.onto.chosen} weights: {release.onto.reason}")
    console.print(proof_table(release.proofs))
    say(console, f"finetune export {RELEASE} --format gguf --quant {QUANT} --out {GGUF}")
    console.print(proof_table(export(str(RELEASE), format="gguf", quant=QUANT, out=GGUF).proofs))
    say(console, f"finetune evaluate {RELEASE} --data {HELD_OUT}")
    (merged,) = evaluate(str(RELEASE), data=HELD_OUT).targets
    console.print(answer_table({"base": base, "tuned": tuned, "merged": merged}))
    right = 100 * merged.exact_match
    console.print(
        f"the merged weights answer {right:.0f} % of all {len(merged.rows)} rows exactly, loss {merged.loss:.3f}"
    )
    console.print(ending(time.perf_counter() - started))


def ending(seconds: float) -> str:
    """What lies where, and what to do next."""
    file = next(GGUF.glob("*.gguf"))
    lines = {
        "run": f"{RUN}  (adapter, metrics.jsonl, loss.png)",
        "release": f"{RELEASE}  (merged weights, model card, manifest with the proofs)",
        "gguf": f"{file}  ({file.stat().st_size / 1e6:.1f} MB, for llama.cpp)",
        "next": f"finetune chat {RELEASE}",
        "": "finetune recipes copy quickstart --to my-first-recipe",
        " ": f"finetune push {RELEASE} YOU/NAME --dry-run",
    }
    return (
        "\n"
        + "\n".join(f"{name + ':' if name.strip() else '':9}{line}" for name, line in lines.items())
        + (f"\n{seconds:.0f} s")
    )


def say(console: Console, command: str) -> None:
    """Show the command that does what comes next."""
    console.print(f"\n[bold]$ {command}[/bold]", soft_wrap=True)


def proof_table(proofs: Sequence[Proof]) -> Table:
    """What must be nothing at all in one line; below it what was measured, and what it may be at most."""
    table = Table(title=f"{len(proofs)} proofs by a new process, all passed", title_justify="left", box=SIMPLE)
    table.add_column("proof", overflow="fold")
    table.add_column("measured", justify="right")
    table.add_column("at most", justify="right")
    exact = [found.name for found in proofs if found.limit == 0]
    table.add_row(", ".join(exact), "0", "0")
    for found in proofs:
        if found.limit != 0:
            limit = "recorded" if found.limit is None else f"{found.limit:.3g}"
            table.add_row(found.name, f"{found.value:.3g}", limit)
    return table


def score_table(scores: dict) -> Table:
    """Exact match over unseen entities and over all rows, the loss, and correct beginnings."""
    table = Table(title="300 held-out rows, exact match in %", title_justify="left")
    table.add_column("which")
    table.add_column("rows", justify="right")
    for name in scores:
        table.add_column(name, justify="right")
    rows = next(iter(scores.values())).rows
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
