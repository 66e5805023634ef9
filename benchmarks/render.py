"""Render docs/performance.md and its plots from the reports in benchmarks/results.

    python benchmarks/render.py

Every figure on that page comes from a report; what no report has is called not measured.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.gpu import PLANNED, WAYS
from benchmarks.speed import plots
from benchmarks.speed.outside import ROOT
from benchmarks.speed.page import NOT_MEASURED, count, gigabytes, measured_with, paragraph, table, times
from benchmarks.speed.rates import rates, ratio
from benchmarks.speed.subjects import SHAPES, Shape

RESULTS, PAGE = ROOT / "benchmarks" / "results", ROOT / "docs" / "performance.md"
Report = dict[str, Any]

OPENING = (
    "# Performance",
    "How fast training is, how much memory it takes, and whether it still trains the same. Rendered from the reports "
    "in `benchmarks/results/` by `python benchmarks/render.py`; each section ends with the command that measures it "
    "again.",
    "Rates count real tokens: those of the rows, without padding. A beginning that several rows share is computed once "
    "and counts for every row. Contenders take turns, round by round; figures are medians, ratios are medians of the "
    "rounds' ratios. Models have random weights: speed does not depend on their values, but the losses say nothing "
    "about quality.",
)


def main() -> None:
    """Write the page and its plots."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--page", type=Path, default=PAGE)
    arguments = parser.parse_args()
    reports = {name: read(arguments.results / f"{name}.json") for name in SECTIONS}
    parts = [*OPENING]
    for name, (title, section) in SECTIONS.items():
        parts.append(f"## {title}")
        if report := reports[name]:
            parts += [*section(report, arguments.page.parent), measured_with(report)]
        else:
            missing = f"{NOT_MEASURED.capitalize()}: `benchmarks/results/{name}.json` is not there."
            parts += [missing, *PLANS.get(name, [])]
    arguments.page.write_text("\n\n".join(paragraph(part) for part in parts if part) + "\n")


def read(path: Path) -> Report | None:
    """A report, or None where there is none."""
    return json.loads(path.read_text()) if path.is_file() else None


def speed_section(report: Report, folder: Path) -> list[str]:
    """Ours beside the others, by model and quantization; what was looked for; whether all trained the same."""
    parts = [
        f"LoRA rank 16 on all linear modules, {report['batch_size']} examples a step, rows of the Alpaca demo (160; 48 "
        "for 1.1B), the same token ids and labels for all, measured from outside: a process that trains one epoch and "
        "one that trains several, the tokens of the additional epochs over the difference of the two walls. Peak "
        "memory is the resident memory of the longer process. Models have 32,000 words; 24M is 288 wide with 6 layers, "
        "160M 768 with 12, 1.1B 2,048 with 22.",
        rates_table(report),
    ]
    return parts + search_told(report)


def rates_table(report: Report) -> str:
    """A line for each contender by model and quantization."""
    entries = rates(report["runs"], by=("model", "quantization", "contender"))
    found = {(e["model"], e["quantization"], e["contender"]): e for e in entries}
    rows = []
    for (model, quantization, contender), entry in found.items():
        name = (
            contender if entry.get("as") in (None, contender) else f"{contender} ({entry['as'].removeprefix('trl: ')})"
        )
        if "failed" in entry:
            rows.append([f"{model} {quantization}", name, f"does not run: {entry['failed'][:90]}", "", "", ""])
            continue
        ours = found.get((model, quantization, "finetune"))
        theirs = not contender.startswith("finetune")
        faster = ratio(ours["rounds"], entry["rounds"]) if ours and theirs else None
        rows.append(
            [
                f"{model} {quantization}",
                name,
                count(entry["tokens_per_second"]),
                gigabytes(entry["peak_bytes"]),
                times(faster) if theirs else "",
                loss_told(entry, ours),
            ]
        )
    columns = ["model", "program", "tokens/s", "peak GB", "finetune is faster by", "mean step loss"]
    return table(columns, rows, texts=2)


def loss_told(entry: dict[str, Any], ours: dict[str, Any] | None) -> str:
    """The mean step loss of a run, and by how much it differs from ours; packs cut steps elsewhere."""
    losses = entry["losses"]
    if not losses:
        return ""
    shown = f"{sum(losses) / len(losses):.3f}"
    same = ours is not None and ours["supervised_tokens"] == entry["supervised_tokens"]
    return shown if same or ours is None else f"{shown} (other labels: {entry['supervised_tokens']})"


def search_told(report: Report) -> list[str]:
    """Every way to set TRL that was tried, the fastest first."""
    parts = []
    for key, tried in report.get("search", {}).items():
        ordered = sorted(tried.items(), key=lambda item: -item[1].get("tokens_per_second", 0))
        rows = [
            [
                name,
                count(run["tokens_per_second"]),
                gigabytes(run["peak_bytes"]),
                *map(str, (run["steps"], run["labelled_tokens"])),
            ]
            if "tokens_per_second" in run
            else [name, f"fails: {run['reason'][:80]}", "", "", ""]
            for name, run in ordered
        ]
        parts += [
            f"TRL's settings tried with {key}: a few steps each, the rate of those after the first. One that leaves "
            "labels out is not chosen.",
            table(["SFTConfig", "tokens/s", "peak GB", "steps", "labels"], rows),
        ]
    return parts


def peers_section(report: Report, folder: Path) -> list[str]:
    """Which other toolkits can train on this CPU, and with which versions."""
    rows = []
    for name, found in report["peers"].items():
        versions = found.get("versions", {})
        shown = ", ".join(f"{n} {v}" for n, v in versions.items())
        outcome = [told(found.get(q)) for q in ("none", "nf4")] if found["installed"] else [found["reason"][:120], ""]
        rows.append([name, *outcome, shown or "", found["notes"]])
    return [
        "Other toolkits, each in an environment of its own with the same torch, told to train the same tokens "
        "(`benchmarks/speed/peers.py` has every setting). First loss of a tiny model beside finetune's "
        f"{report['reference'][0]:.3f}.",
        table(["toolkit", "none", "nf4", "versions", "notes"], rows, texts=5),
    ]


def peers_rate_section(report: Report, folder: Path) -> list[str]:
    """The same measurement with few rows, for they are slow here."""
    runs = [run for run in report["runs"] if not run.get("failed")]
    alone = [run for run in runs if sum(other["contender"] == run["contender"] for other in runs) == 1]
    return [
        "Those of them that have a path for a CPU, with the settings of `benchmarks/speed/peers.py`, measured as above "
        "on the first 8 rows (one step an epoch, three epochs less one).",
        rates_table(report),
        *(
            f"{run['contender']} was broken off: one epoch took {run['wall_seconds']:.0f} seconds with loading, "
            f"{run['cpu_seconds'] / run['wall_seconds']:.1f} cores at work, {gigabytes(run['peak_bytes'])} GB."
            for run in alone
        ),
    ]


def told(outcome: dict[str, Any] | None) -> str:
    if outcome is None:
        return NOT_MEASURED
    if not outcome["ran"]:
        return f"does not run: {outcome['reason']}"
    return f"trains, first loss {outcome['losses'][0]:.3f}" if outcome["losses"] else "trains"


def ablation_section(report: Report, folder: Path) -> list[str]:
    """What each piece gains, alone left out."""
    entries = rates(report["runs"], by=("model", "quantization", "way"))
    found = {(e["model"], e["quantization"], e["way"]): e for e in entries}
    rows = []
    for (model, quantization, way), entry in found.items():
        if "failed" in entry:
            rows.append([f"{model} {quantization}", way, f"fails: {entry['failed'][:80]}", "", "", ""])
            continue
        whole = found.get((model, quantization, "all"))
        slower = ratio(whole["rounds"], entry["rounds"]) if whole and way != "all" else None
        cells = [
            count(entry["tokens_per_second"]),
            times(slower) if way != "all" else "",
            gigabytes(entry["peak_bytes"]),
        ]
        rows.append([f"{model} {quantization}", way, *cells, count(entry["tokens_per_cpu_second"])])
    columns = ["model", "pieces", "tokens/s", "all is faster by", "peak GB", "tokens per processor second"]
    return [
        "Training with all pieces of our own (`train.speedups`), with each one alone left out, and with none, which is "
        "the libraries' code over rows laid end to end.",
        table(columns, rows),
    ]


def linear_section(report: Report, folder: Path) -> list[str]:
    """What a token costs in longer passes and longer documents."""
    from benchmarks.linear_cost import DOCUMENT_OF_PASSES, medians

    points = medians(report["runs"])
    picture = folder / "performance-length.png"
    plots.draw_lengths(points, picture)
    names = {"auto": "own pieces", "none": "libraries"}
    rows = [
        [
            f"{point['document_tokens']:,}",
            f"{point['pass_tokens']:,}",
            names[point["way"]],
            count(point["tokens_per_second"]),
            count(point["microseconds_per_token"]),
            gigabytes(point["peak_bytes"]),
        ]
        for point in sorted(points, key=lambda p: (p["pass_tokens"], p["document_tokens"], p["way"]))
    ]
    columns = ["tokens of a document", "tokens of a pass", "code", "tokens/s", "microseconds a token", "peak GB"]
    return [
        f"Forward and backward of one pass of a random {report['model']} model in {report['quantization']}: documents "
        "of 256 tokens in passes of growing length, then longer documents in passes of 8,192 tokens. Every token is "
        "learned.",
        f"![What a token costs in longer passes and in longer documents]({picture.name})",
        table(columns, rows),
        where_it_bends(SHAPES[report["model"]], max(point["document_tokens"] for point in points)),
        what_a_pass_costs([p for p in points if p["way"] == "auto" and p["document_tokens"] == DOCUMENT_OF_PASSES]),
    ]


def what_a_pass_costs(points: list[dict[str, Any]]) -> str:
    """Why short passes cost more a token: the line through the shortest and the longest, seconds by tokens."""
    short, *_, long = sorted(points, key=lambda point: point["pass_tokens"])
    seconds = [point["pass_tokens"] / point["tokens_per_second"] for point in (short, long)]
    slope = (seconds[1] - seconds[0]) / (long["pass_tokens"] - short["pass_tokens"])
    fixed = seconds[0] - slope * short["pass_tokens"]
    more = long["tokens_per_second"] / short["tokens_per_second"] - 1
    return (
        f"A token of a pass of {short['pass_tokens']:,} costs {more:.0%} more than one of {long['pass_tokens']:,}: "
        f"every pass takes {1000 * fixed:.0f} milliseconds besides its tokens, for each operation has to be begun."
    )


def where_it_bends(shape: Shape, longest: int) -> str:
    """By operations, why a token costs more in a longer document."""
    attention = 2 * shape.hidden**2 * (1 + shape.key_value_heads / shape.heads)
    frozen = shape.layers * (attention + 3 * shape.hidden * shape.inner) + shape.vocabulary * shape.hidden
    products = 4 * frozen / 1e6  # forward, and the gradient of the input
    per_token = 7 * shape.layers * shape.hidden / 1e6  # 2 forward, 5 backward, half of all pairs
    return (
        "Passes cost what their tokens cost. Documents bend the line because a token meets all tokens of its document "
        f"before it: the frozen products take {products:.0f} million operations a token however long it is, attention "
        f"{per_token * 256:.1f} million in one of 256 tokens, {per_token * 1024:.0f} in one of 1,024, "
        f"{per_token * longest:.0f} in one of {longest:,}. The wider a model, the later that bend comes."
    )


def parity_section(report: Report, folder: Path) -> list[str]:
    """Gradients, loss curves and repeats beside plain transformers and PEFT."""
    runs = {(run["check"], run["quantization"]): run for run in report["runs"]}
    parts = [
        f"A random {report['shape']} model, LoRA rank 16 on all linear modules, Alpaca rows, against plain "
        f"transformers and PEFT. Limits: a cosine of {report['limits']['cosine']}, {report['limits']['nats']} nat."
    ]
    rows = [gradients_told(run) for (check, _), run in runs.items() if check == "gradients"]
    if rows:
        columns = [
            "gradients of every A and B against float32",
            "own pieces: smallest cosine",
            "largest relative error",
        ]
        parts.append(table([*columns, "libraries: smallest cosine", "largest relative error"], rows))
    curves = {quantization: run for (check, quantization), run in runs.items() if check == "curves"}
    curves = {quantization: run for quantization, run in curves.items() if not run.get("failed")}
    if curves:
        picture = folder / "performance-parity.png"
        plots.draw_curves({q: run["losses"] for q, run in curves.items()}, picture)
        rows = [[q, *(f"{run['last'][way]:.4f}" for way in ("auto", "none", "plain"))] for q, run in curves.items()]
        parts.append(f"![The loss curves of the three ways]({picture.name})")
        columns = [f"mean loss of the last 50 of {report['steps']} steps", "own pieces", "libraries", "plain PEFT"]
        parts.append(table(columns, rows))
    for (check, quantization), run in runs.items():
        if check == "repeats" and not run.get("failed"):
            same = "equal to the bit" if run["equal"] else "NOT equal"
            parts.append(f"Two runs of {run['steps']} steps in {quantization}: losses and adapter file {same}.")
    return parts


def gradients_told(run: Report) -> list[str]:
    if run.get("failed"):
        return [run["quantization"], f"fails: {run['reason'][:80]}", "", "", ""]
    figures = []
    for way in ("auto", "none"):
        figures += [f"{min(run['cosines'][way].values()):.6f}", f"{max(run['relative_errors'][way].values()):.4f}"]
    return [f"{run['quantization']}, {len(run['cosines']['auto'])} tensors", *figures]


def eight_bits_section(report: Report, folder: Path) -> list[str]:
    """What int8 gains in tokens a second, and what it costs in loss."""
    from benchmarks.eight_bits import summary

    speeds = rates([run for run in report["runs"] if run["check"] == "speed"], by=("model", "way"))
    found = {(entry["model"], entry["way"]): entry for entry in speeds if "failed" not in entry}
    rows = []
    for model in dict.fromkeys(entry["model"] for entry in speeds):
        exact, coarse = found.get((model, "auto")), found.get((model, "int8"))
        if not (exact and coarse):
            continue
        figures = [count(each["tokens_per_second"]) for each in (exact, coarse)]
        peaks = [gigabytes(each["peak_bytes"]) for each in (exact, coarse)]
        rows.append([f"{model} nf4", *figures, times(ratio(coarse["rounds"], exact["rounds"])), *peaks])
    columns = ["model", "exact, tokens/s", "int8, tokens/s", "int8 is faster by", "exact, peak GB", "int8, peak GB"]
    parts = [
        "`model.compute: int8` rounds frozen weights to 8 bits with a scale for each output, and the rows they are "
        "multiplied by with a scale for each row, while training; what is evaluated or released is computed exactly. "
        "The forward product of `down_proj`, the adapter's own products, attention and head stay as they are. Nobody "
        "gets it without asking; for small models it gains nothing.",
        table(columns, rows),
    ]
    told = summary(report["runs"])
    rows = []
    if all(told[way]["curve"] for way in told):
        name = f"24M, random: mean loss of the last 50 of {report['steps']} steps"
        rows.append([name, *(f"{told[way]['curve']:.4f}" for way in ("auto", "int8"))])
    for number, pair in enumerate(zip(*(told[way]["held_out"] for way in ("auto", "int8")), strict=False)):
        rows.append([f"embedded base, quickstart, seed {number + 1}: held-out loss", *(f"{each:.4f}" for each in pair)])
    if all(told[way]["seconds"] for way in told):
        rows.append(["the same: seconds", *(count(told[way]["seconds"]) for way in ("auto", "int8"))])
    return [*parts, table(["what it trains", "exact", "int8"], rows)] if rows else parts


def demo_section(report: Report, folder: Path) -> list[str]:
    """The quickstart's training with our own pieces and without."""
    from benchmarks.demo_time import summary

    names = {"auto": "own pieces", "none": "libraries"}
    rows = [
        [
            names[way],
            count(entry["wall_seconds"]),
            count(entry["cpu_seconds"]),
            gigabytes(entry["peak_bytes"]),
            f"{entry['last_loss']:.4f}",
        ]
        for way, entry in summary(report["runs"]).items()
    ]
    columns = ["training of `make demo`", "seconds", "processor seconds", "peak GB", "training loss, last 20 steps"]
    return ["The whole process: imports, loading, 250 steps, evaluations, saving.", table(columns, rows)]


def gpu_section(report: Report, folder: Path) -> list[str]:
    """Work points on a GPU, one line each; what was planned and never run says so."""
    groups: dict[tuple, list[dict[str, Any]]] = {}
    for run in report.get("runs", []):
        groups.setdefault((run["model"], run["quantization"], run["point"], run["way"]), []).append(run)
    rows = []
    for place in dict.fromkeys(cell[:3] for cell in PLANNED):
        ways = [gpu_cell(groups.get((*place, way), [])) if (*place, way) in PLANNED else "" for way in WAYS]
        rows.append([" ".join(place), *ways, *gpu_facts(groups.get((*place, "auto"), []))])
    names = {"auto": "own pieces", "none": "libraries", "fp8": "own pieces in fp8"}
    columns = ["model, weights, work point", *(names.get(way, way) for way in WAYS), "peak GB", "of the product rate"]
    text = (
        "One NVIDIA GPU, random weights made on it, real tokens per second; work points as `python benchmarks/gpu.py "
        "--help` has them: W1, W2, W3 are 8, 16, 128 documents of Alpaca's lengths a step, W4 eight rows of 2,048, "
        "W5 as W3 in passes of 32,768, W6 one row of 2,048 with recomputation. The last two columns are of our own "
        "pieces: memory allocated, and 4 operations for each token and parameter of the layers' products as a share of "
        "the rate of a large bfloat16 product on the same GPU."
    )
    return [text, table(columns, rows)]


def gpu_cell(runs: list[dict[str, Any]]) -> str:
    """The median rate, or why there is none."""
    found = [run["tokens_per_second"] for run in runs if not run.get("failed")]
    if found:
        return count(statistics.median(found))
    return f"fails: {runs[0]['reason'][:60]}" if runs else NOT_MEASURED


def gpu_facts(runs: list[dict[str, Any]]) -> list[str]:
    """Peak memory and share of the product rate of our own pieces."""
    done = [run for run in runs if not run.get("failed")]
    if not done:
        return ["", ""]
    shares = [r["tokens_per_second"] * r["flops_per_token_of_layers"] / 1e12 / r["product_tflops"] for r in done]
    peak = max(run.get("peak_allocated_bytes", 0) for run in done)
    return [gigabytes(peak), f"{100 * statistics.median(shares):.0f} %"]


Section = Callable[[Report, Path], list[str]]
SECTIONS: dict[str, tuple[str, Section]] = {
    "training_speed": ("Beside other programs", speed_section),
    "peers_speed": ("Other toolkits", peers_section),
    "peers_rate_speed": ("Other toolkits' speed", peers_rate_section),
    "ablation_speed": ("What each piece gains", ablation_section),
    "linear_cost_speed": ("Longer passes, longer documents", linear_section),
    "parity_speed": ("The same training", parity_section),
    "demo_speed": ("The first run", demo_section),
    "eight_bits_speed": ("In 8 bits", eight_bits_section),
    "gpu_speed": ("On a GPU", gpu_section),
}
PLANS = {"gpu_speed": gpu_section({"runs": []}, PAGE.parent)}  # what would be measured

if __name__ == "__main__":
    main()
