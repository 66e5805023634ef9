"""What the commands say to people: the values of an answer in, lines of text out; and a line while rows are read."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import dropwhile
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.progress import Progress

BAR_CHARACTERS = 40
EIGHTHS = " \u258f\u258e\u258d\u258c\u258b\u258a\u2589\u2588"


def train_text(result: Mapping[str, Any]) -> str:
    held_out = "" if result["eval_loss"] is None else f", held-out loss {result['eval_loss']:.4f}"
    held_out += f"; the adapter is that of step {result['adapter_step']}" if result.get("adapter_step") else ""
    run = result["run"]
    return (
        f"{result['steps']} steps, {result['examples']} examples, {result['supervised_tokens']:,} supervised tokens\n"
        f"training loss {result['train_loss']:.4f} (last 20 steps){held_out}\n"
        f"{result['seconds']:.0f} s, {result['tokens_per_second']:,.0f} tokens/s, "
        f"peak {result['peak_memory_gib']:.2f} GiB\n"
        f"{run}/adapter loads with plain PEFT; the loss curve is {run}/loss.png\n"
        f"next: finetune chat {run}, or finetune merge {run} --out releases/{Path(run).name}"
    )


def check_text(values: Mapping[str, Any], *, colour: bool) -> str:
    """The account of `finetune check`; its problems are told elsewhere."""
    if values["rows"] is None and not values["rehearsal"]:
        return "" if values["problems"] else "the recipe can be read; nothing else was asked"
    known = values["rows"] is not None
    of_rows = [_counts(values), _lengths(values), _sources(values["sources"]), list(_notes(values))] if known else []
    sections = [*([] for _ in range(0 if known else 4)), *of_rows, _rehearsal(values["rehearsal"]), _proofs(values)]
    titles = ["Rows and tokens", "Tokens a row", "Sources", "Worth a look", "Rehearsal on a twin", "Proofs"]
    told = []
    for title, lines in zip(titles, sections, strict=True):
        if lines:
            told.append("\n".join([f"\x1b[1m{title}\x1b[0m" if colour else title, *(f"  {line}" for line in lines)]))
    return "\n\n".join(told)


def _counts(values: Mapping[str, Any]) -> list[str]:
    rows, tokens = values["rows"], values["tokens"]
    dropped, refused = sum(rows["dropped"].values()), sum(rows["refused"].values())
    trained = f"{rows['trained']:,} trained + {rows['eval']:,} held out"
    share = tokens["supervised"] / max(tokens["supervised"] + tokens["context"], 1)
    lines = [f"{'rows read':14} {rows['read']:,} = {trained} + {dropped:,} dropped + {refused:,} refused"]
    lines += [f"{kind:14} {_reasons(rows[kind])}" for kind in ("dropped", "refused") if rows[kind]]
    lines.append(
        f"{'tokens':14} {tokens['total']:,} = {tokens['supervised']:,} supervised ({share:.1%}) + "
        f"{tokens['context']:,} context + {tokens['truncated']:,} truncated"
    )
    if packing := values.get("packing"):
        lines.append(
            f"{'packing':14} {packing['share']:.1%} of {packing['tokens_per_pass']:,} tokens a pass used, "
            f"{packing['passes_per_step']:.2f} passes a step"
        )
    return lines


def _reasons(counts: Mapping[str, int]) -> str:
    return ", ".join(f"{count:,} {reason}" for reason, count in counts.items())


def _lengths(values: Mapping[str, Any]) -> list[str]:
    bars = list(dropwhile(lambda bar: not bar[2], values["histogram"]))
    if not bars:
        return []
    most = max(count for _, _, count in bars)
    spans = [f"{start:,} - {stop - 1:,}" for start, stop, _ in bars]
    width = max(map(len, spans))
    lines = [", ".join(f"{name} {tokens:,}" for name, tokens in values["lengths"].items())]
    lines += [
        f"{span:>{width}}  {_bar(count / most)} {count:,}" for span, (_, _, count) in zip(spans, bars, strict=True)
    ]
    return lines


def _bar(share: float) -> str:
    eighths = max(1, round(share * BAR_CHARACTERS * 8)) if share else 0
    return (EIGHTHS[8] * (eighths // 8) + EIGHTHS[eighths % 8]).strip()


def _sources(sources: Sequence[Mapping[str, Any]]) -> list[str]:
    heads = ["source", "format", "rows", "trained", "held out", "tokens", "supervised", "weight"]
    keys = ["source", "format", "rows", "trained", "eval", "tokens", "supervised_tokens", "weight"]
    table = [heads, *([_cell(source[key]) for key in keys] for source in sources)]
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    return [
        "  ".join(
            f"{cell:{'<' if at < 2 else '>'}{width}}" for at, (cell, width) in enumerate(zip(line, widths, strict=True))
        )
        for line in table
    ]


def _cell(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else f"{value:,}" if isinstance(value, int) else str(value)


def _notes(values: Mapping[str, Any]) -> Iterator[str]:
    copies = values["duplicates"]
    if any(copies.values()):
        yield f"copies of earlier rows: {copies['exact']:,} exact, {copies['near']:,} but for case and white space"
        yield from (f"  {words}" for words in values["first_copies"])
    told = {
        "leaked": "held-out rows that a training row says too, case and white space folded",
        "rows_with_control_texts": "rows with text that looks like a control token, kept as ordinary text",
        "straddling_tokens": "supervised tokens that begin in the context and reach into the answer",
        "truncated_rows": "rows with tokens cut off",
    }
    yield from (f"{words}: {values[key]:,}" for key, words in told.items() if values[key])


def _rehearsal(rehearsal: Mapping[str, Any] | None) -> list[str]:
    if rehearsal is None:
        return []
    stages = ", ".join(f"{stage} {seconds:.1f} s" for stage, seconds in rehearsal["seconds"].items())
    found = "  (done before, nothing it depends on has changed)" if rehearsal["state"] == "found" else ""
    return [f"{rehearsal['state']}: {stages}{found}" if stages else rehearsal["state"], *rehearsal["notes"]]


def _proofs(values: Mapping[str, Any]) -> list[str]:
    """Every proof of the rows; of the rehearsal's, which are many, those that fail."""
    told = [proof for proof in values["proofs"] if not (proof["passed"] and proof["name"].startswith("rehearsal: "))]
    lines = [f"{'ok  ' if proof['passed'] else 'no  '} {proof['name']}: {proof['value']:,.6g}" for proof in told]
    held = len(values["proofs"]) - len(told)
    return [*lines, f"ok   {held} proofs of the rehearsal (each with --json)"] if held else lines


def stage_line(line: str) -> None:
    """One line on stderr where a stage begins, on a terminal or not: it takes seconds, and a log should show where."""
    sys.stderr.write(f"{line}\n")
    sys.stderr.flush()


def _number(value: Any) -> str:
    return f"{value:,.2f}" if isinstance(value, float) else f"{value:,}"


@contextmanager
def reading_line() -> Iterator[Any]:
    """Counts the rows while they are read, on a terminal's stderr; gone afterwards, never there otherwise."""
    line: Progress | None = None
    tasks: dict[str, Any] = {}

    def tell(source: str, rows: int) -> None:
        nonlocal line
        if line is None:
            line = _start_line()
        task = tasks[source] if source in tasks else tasks.setdefault(source, line.add_task(source, total=None))
        line.update(task, completed=rows)

    try:
        yield tell if sys.stderr.isatty() else None
    finally:
        if line is not None:
            line.stop()


def _start_line() -> Progress:
    from rich.console import Console
    from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

    columns = [SpinnerColumn(), TextColumn("reading {task.description}: {task.completed:,} rows", markup=False)]
    line = Progress(*columns, TimeElapsedColumn(), console=Console(stderr=True), transient=True)
    line.start()
    return line


def cache_text(caches: Sequence[Any], total_bytes: int, *, cleared: bool) -> str:
    """One line a cache: how much it holds, where, and what for."""
    lines = [f"{each.kind:12} {each.entries:5} entries {each.bytes / 2**20:9,.1f} MiB  {each.holds}" for each in caches]
    lines += [f"{'':12} in {caches[0].folder.parent}"]
    return "\n".join([*lines, f"removed {total_bytes / 2**20:,.1f} MiB"] if cleared else lines)
