"""Rates from walls: runs of one and of several epochs in, tokens per second by contender out."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

Run = Mapping[str, Any]


def rates(runs: Iterable[Run], *, by: Sequence[str]) -> list[dict[str, Any]]:
    """One entry per value of `by`: the rate of every round, their median, the largest peak, the first step losses."""
    groups: dict[tuple, dict[int, dict[int, Run]]] = {}
    failed: dict[tuple, str] = {}
    for run in runs:
        key = tuple(run[name] for name in by)
        if run.get("failed"):
            failed[key] = run["reason"]
        else:
            groups.setdefault(key, {}).setdefault(run["round"], {})[run["epochs"]] = run
    entries = []
    for key, rounds in groups.items():
        whole = {number: pair for number, pair in rounds.items() if len(pair) == 2}
        if whole:
            entries.append({**dict(zip(by, key, strict=True)), **_summary(whole)})
    for key, reason in failed.items():
        entries.append({**dict(zip(by, key, strict=True)), "failed": reason})
    return entries


def _summary(rounds: Mapping[int, Mapping[int, Run]]) -> dict[str, Any]:
    """The figures of one contender; a pair is the run of one epoch and that of several."""
    speeds = {number: _rate(pair, "wall_seconds") for number, pair in sorted(rounds.items())}
    longest = [pair[max(pair)] for pair in rounds.values()]
    first = longest[0]
    return {
        "as": first.get("as"),
        "tokens_per_second": statistics.median(speeds.values()),
        "rounds": speeds,
        "tokens_per_cpu_second": statistics.median(_rate(pair, "cpu_seconds") for pair in rounds.values()),
        "peak_bytes": max(run["peak_bytes"] for run in longest),
        "losses": first["losses"],
        "tokens": first["tokens"],
        "supervised_tokens": first.get("supervised_tokens", first.get("labelled_tokens")),
        "product_tflops": statistics.median(run.get("product_tflops", float("nan")) for run in longest),
    }


def _rate(pair: Mapping[int, Run], clock: str) -> float:
    short, long = pair[min(pair)], pair[max(pair)]
    return (long["tokens"] - short["tokens"]) / (long[clock] - short[clock])


def ratio(ours: Mapping[int, float], theirs: Mapping[int, float]) -> float:
    """Median of the round-by-round ratios; both were measured one after the other."""
    return statistics.median(ours[number] / theirs[number] for number in ours.keys() & theirs.keys())
