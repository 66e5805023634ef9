"""What pages of figures are made of: tables, numbers as people read them, and what a report was measured with."""

from __future__ import annotations

import textwrap
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

NOT_MEASURED = "not measured"
WIDTH = 120


def measured_with(report: Mapping[str, Any]) -> str:
    """Commands, date, machine and versions of a report."""
    machine = report["machine"]
    commands = " and ".join(f"`{command}`" for command in report["commands"])
    versions = ", ".join(f"{name} {version}" for name, version in report["versions"].items() if version)
    facts = [f"{machine['name']}, {machine['cores']} cores, {machine['memory_gib']} GiB"]
    if products := [run["product_tflops"] for run in report.get("runs", []) if "product_tflops" in run]:
        facts.append(f"bfloat16 products at {min(products):.2f}-{max(products):.2f} TFLOP/s while measuring")
    if loads := [run["load_average"] for run in report.get("runs", []) if "load_average" in run]:
        facts.append(f"load average at most {max(loads):.1f} before a process")
    return f"{commands}; {report['date']}: {', '.join(facts)}; Python {report['python']}, {versions}."


def paragraph(text: str) -> str:
    """Broken into lines, unless it is a table, a heading or a picture."""
    if text.startswith(("|", "#", "!")):
        return text
    return textwrap.fill(" ".join(text.split()), WIDTH, break_long_words=False, break_on_hyphens=False)


def table(columns: Sequence[str], rows: Iterable[Sequence[str]], *, texts: int = 1) -> str:
    """A Markdown table; the first columns, as many as `texts`, are texts, the others figures."""
    lines = [f"| {' | '.join(columns)} |", "|" + "---|" * texts + "--:|" * (len(columns) - texts)]
    return "\n".join([*lines, *(f"| {' | '.join(row)} |" for row in rows)])


def count(value: float | None) -> str:
    """Whole from 100 on, else with one decimal."""
    return NOT_MEASURED if value is None else f"{value:,.0f}" if value >= 100 else f"{value:.1f}"


def gigabytes(value: float | None) -> str:
    return NOT_MEASURED if value is None else f"{value / 1e9:.1f}"


def times(value: float | None) -> str:
    return NOT_MEASURED if value is None else f"{value:.2f}"
