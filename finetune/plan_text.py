"""What `finetune plan` says to people: the values of its answer in, a readable page out."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any

from finetune.fit import as_override

WIDTH = 22
COUNTS = (
    *("steps", "examples", "eval_examples", "tokens", "supervised_tokens", "base_parameters", "trainable_parameters"),
    *("tokens_per_pass", "passes_per_step"),
)


def plan_text(values: Mapping[str, Any]) -> str:
    """The plan as lines: numbers, then every setting; what is a default, estimated or unknown is marked."""
    defaults, estimated = set(values["defaults"]), set(values["estimated"])
    lines = [_line(key, _number(values[key]), is_estimated=key in estimated) for key in COUNTS]
    lines += [*_memory(values), *_disk(values), *_seconds(values)]
    dropped = ", ".join(f"{count} {reason}" for reason, count in values["dropped"].items()) or "none"
    lines += [_line("rows dropped", dropped), *_fit(values), *_notes(values), ""]
    lines += [
        f"{key:28} {json.dumps(value, ensure_ascii=False)}{_mark(key, defaults, estimated)}"
        for key, value in values["settings"].items()
    ]
    return "\n".join(lines)


def _line(key: str, said: str, *, is_estimated: bool = False) -> str:
    return f"{key:{WIDTH}} {said}{'  (estimated)' if is_estimated else ''}"


def _number(value: float) -> str:
    return f"{value:,}" if isinstance(value, int) else f"{value:,.2f}"


def _memory(values: Mapping[str, Any]) -> Iterator[str]:
    """The base's weights, the peak of the training, that of each stage, and whether the device has as much."""
    how = values["settings"]["model.quantization"]
    yield _line("weights_gib", f"{values['weights_gib']:,.2f} ({'not quantised' if how == 'none' else how})")
    yield _line("peak_memory_gib", _number(values["peak_memory_gib"]), is_estimated=True)
    stages = ", ".join(f"{stage} {gib:,.2f}" for stage, gib in values["stages_gib"].items())
    yield _line("  by stage", stages, is_estimated=True)
    has = values["device_memory_gib"]
    if (most := max(values["peak_memory_gib"], values["stages_gib"]["load"])) > has:
        cure = "" if "fit" in values else f"; --fit {has:.0f}GiB names keys to change"
        yield _line("does not fit", f"{values['device_name']} has {has:.1f} GiB, {most:,.1f} are needed{cure}")


def _disk(values: Mapping[str, Any]) -> Iterator[str]:
    parts = ", ".join(f"{part} {gib:,.2f}" for part, gib in values["disk_parts_gib"].items())
    yield _line("disk_gib", f"{_number(values['disk_gib'])} beside the base ({parts})", is_estimated=True)


def _seconds(values: Mapping[str, Any]) -> Iterator[str]:
    """What a token costs; how long a step and all of them take, or how to find out."""
    yield _line("operations_per_token", f"{values['operations_per_token'] / 1e9:,.2f} thousand million")
    if values["seconds_per_step"] is None:
        if "uncalibrated" in values["estimated"]:
            cure = "finetune doctor --calibrate measures this machine, once; --on estimates another"
            yield _line("seconds", f"unknown: {cure}")
        return
    yield _line("seconds_per_step", f"{values['seconds_per_step']:,.3g}", is_estimated=True)
    yield _line("seconds", _duration(values["seconds"]), is_estimated=True)


def _duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:,.0f} s"
    return f"{seconds / 60:,.0f} min" if seconds < 7200 else f"{seconds / 3600:,.1f} h"


def _fit(values: Mapping[str, Any]) -> Iterator[str]:
    """What to change to fit, as `--set` takes it."""
    if (fit := values.get("fit")) is None:
        return
    yield ""
    size, peak = f"{fit['gib']:.1f} GiB", f"{fit['peak_memory_gib']:.1f} GiB"
    if fit["fits"] and not fit["changes"]:
        yield f"it fits in {size} as it is: {peak} at most (estimated)"
        return
    if not fit["fits"]:
        more = "take a smaller base, or a device with more memory"
        yield f"it does not fit in {size}, whatever is changed: {peak} at least (estimated); {more}"
        return
    how = "the training stays the same, and is slower" if fit["same_training"] else "this changes what is trained"
    yield f"it would fit in {size} with these changes: {peak} at most (estimated); {how}"
    yield from (f"  --set {as_override(*change)}" for change in fit["changes"].items())


def _notes(values: Mapping[str, Any]) -> Iterator[str]:
    """What is not known here, and what was assumed in its place."""
    assumed = list(values["assumptions"])
    if values["stop_token_ids"] is None:
        rows = (
            "" if any(line.startswith("the rows are not") for line in assumed) else ", tokens come from the rows' bytes"
        )
        assumed.insert(0, f"the base is not on this machine: its published shape was used{rows}")
    if assumed:
        yield from ("", "Assumed", *(f"  {line}" for line in assumed))


def _mark(key: str, defaults: set[str], estimated: set[str]) -> str:
    return "  (estimated)" if key in estimated else "  (default)" if key in defaults else ""
