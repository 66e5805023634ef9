"""How far a plan is from its run: bases of several sizes trained for a few steps, prediction beside measurement.

    python benchmarks/plan_accuracy.py SHARED_DATA WORK_FOLDER [NAME...]     measure the cells that have no figures yet
    python benchmarks/plan_accuracy.py                                      write table and plot into docs/ again

Memory is the run's own `peak_memory_gib`, and beside it what the system says of the ended process. Time is what the
processor worked from the end of the first step to the end of the last, shared among its cores, so that other programs
change it little. Calibrate first: finetune doctor --calibrate. The report keeps all that a plan follows from, so that
tests/test_plan_accuracy.py can plan every cell again.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.speed.page import table
from finetune.base import BaseFacts, read_base
from finetune.calibration import Calibration, figures_of, read_calibration
from finetune.families import Model, Shape
from finetune.layout import lay_out_steps
from finetune.machine import GIB, Machine, probe_machine
from finetune.plan import DataFacts, Plan, make_plan
from finetune.recipe import load_recipe
from finetune.unseen import table_facts

ROOT = Path(__file__).resolve().parents[1]
REPORT = ROOT / "benchmarks" / "results" / "plan_accuracy.json"
PAGE, PICTURE = ROOT / "docs" / "planning.md", "planning-memory.png"
POCKET = "builtin:pocket-llama"
BEGIN, END = "<!-- benchmarks/plan_accuracy.py writes from here -->", "<!-- to here -->"
ROWS = 160  # of the Alpaca demo
SHAPES = {
    "24M": Shape(32_000, 288, 768, 6, 6, 6),
    "160M": Shape(32_000, 768, 2048, 12, 12, 12),
    "90M tied": Shape(128_256, 512, 1536, 8, 8, 2, tied=True),
    "1.1B": Shape(32_000, 2048, 5632, 22, 32, 4),
}
TOKENIZERS = {"90M tied": "llama3.2-instruct"}  # of the others Llama 2's
Report = dict[str, Any]


@dataclass(frozen=True)
class Cell:
    """One run: a base, how it is held, how its passes are laid out; so many rows a step."""

    base: str
    tokens_per_pass: int
    quantization: str = "nf4"
    recompute: str = "none"
    speedups: str = "auto"
    batch_size: int = 32
    steps: int = 4

    @property
    def name(self) -> str:
        """What is told of it in a line."""
        return f"{self.base} {self.quantization} {self.tokens_per_pass} {self.recompute} {self.speedups}"


CELLS = (
    Cell(POCKET, 2048, batch_size=16, steps=30),
    Cell(POCKET, 4096, quantization="none", speedups="none", steps=10),
    Cell("24M", 1024, quantization="none", batch_size=16, steps=8),
    Cell("24M", 4096),
    Cell("24M", 4096, speedups="none"),
    Cell("24M", 8192, recompute="all", batch_size=64),
    Cell("160M", 1024, batch_size=16),
    Cell("160M", 4096),
    Cell("160M", 4096, recompute="all"),
    Cell("160M", 4096, quantization="none"),
    Cell("160M", 4096, speedups="none", batch_size=24, steps=2),
    Cell("90M tied", 4096),
    Cell("90M tied", 8192, quantization="none", batch_size=64, steps=2),
    Cell("1.1B", 1024, batch_size=8, steps=2),
)


def main() -> None:
    """Measure what is asked for and has no figures, then write table and plot."""
    report = json.loads(REPORT.read_text()) if REPORT.is_file() else {"cells": [], "rows": {}}
    if len(sys.argv) > 1:
        shared, work, names = Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3:]
        for cell in CELLS:
            if cell.name not in [each["name"] for each in report["cells"]] and (not names or cell.name in names):
                measure(cell, shared, work, report)
    write_page(report)


# --- measuring ---


def measure(cell: Cell, shared: Path, work: Path, report: Report) -> None:
    """Train the cell and add its figures to the report's file."""
    from benchmarks.speed.facts import header

    recipe = work / cell.name.replace(" ", "-").replace(":", "-") / "recipe.json"
    recipe.parent.mkdir(parents=True, exist_ok=True)
    rows = json.loads((shared / "alpaca" / "alpaca_en_demo.json").read_text(encoding="utf-8"))[:ROWS]
    (recipe.parent / "rows.json").write_text(json.dumps(rows), encoding="utf-8")
    base = cell.base if cell.base == POCKET else str(make_base(work, cell.base, shared))
    recipe.write_text(json.dumps(recipe_of(asdict(cell), base, recipe.parent)), encoding="utf-8")
    tokenizer = row_lengths(cell, recipe, report)
    measured = train(recipe, cell.steps)
    calibration = read_calibration(probe_machine())
    report |= {**header("python benchmarks/plan_accuracy.py SHARED_DATA WORK_FOLDER")}
    report["calibration"] = figures_of(calibration) if calibration else None
    report["cells"].append({"name": cell.name, **asdict(cell), "tokenizer": tokenizer, **measured})
    REPORT.write_text(json.dumps(report, indent=1) + "\n")
    plan = predict(report["cells"][-1], report)
    sys.stdout.write(f"{cell.name}: {measured}, planned {plan.peak_memory_gib} GiB\n")
    sys.stdout.flush()


def make_base(work: Path, name: str, shared: Path) -> Path:
    """A LLaMA with random weights and a real tokenizer, made once."""
    from benchmarks.speed.subjects import Shape as Sizes
    from benchmarks.speed.subjects import make_base as make

    shape, folder = SHAPES[name], work / f"base-{name.replace(' ', '-')}"
    sizes = Sizes(shape.hidden, shape.intermediate, shape.layers, shape.heads, shape.key_value_heads)
    sizes = Sizes(**{**asdict(sizes), "vocabulary": shape.vocabulary, "tied": shape.tied})
    folder.mkdir(parents=True, exist_ok=True)
    if not (folder / "config.json").exists():
        make(folder, sizes, shared / "tokenizers" / TOKENIZERS.get(name, "llama2"))
    return folder


def recipe_of(cell: dict[str, Any], base: str, folder: Path) -> dict[str, Any]:
    """The recipe of a cell, as JSON values."""
    train = {key: cell[key] for key in ("batch_size", "tokens_per_pass", "recompute", "speedups")}
    return {
        "version": 1,
        "name": "plan-accuracy",
        "model": {"base": base, "quantization": cell["quantization"]},
        "data": {"train": str(folder / "rows.json"), "template": "alpaca", "max_tokens": 1024, "too_long": "drop"},
        "train": {**train, "max_steps": cell["steps"]},
        "output": {"folder": str(folder / "run")},
    }


def row_lengths(cell: Cell, recipe: Path, report: Report) -> str:
    """The tokenizer's name; the report then holds the lengths of the rows in its tokens."""
    from finetune.data.prepare import prepare_data

    name = POCKET if cell.base == POCKET else TOKENIZERS.get(cell.base, "llama2")
    if name not in report["rows"]:
        asked = load_recipe(recipe)
        facts = prepare_data(asked.data, read_base(asked.model.base), seed=asked.seed).facts
        lengths = {"tokens": facts.train_tokens.tolist(), "supervised": facts.train_supervised.tolist()}
        report["rows"][name] = lengths
    return name


def train(recipe: Path, steps: int) -> dict[str, Any]:
    """Peak memory by the run itself and from outside, and processor seconds a step after the first."""
    metrics, out = recipe.parent / "run" / "metrics.jsonl", recipe.parent / "answer.json"
    command = [sys.executable, str(ROOT / "cli.py"), "train", str(recipe), "--json"]
    with out.open("w") as answer:
        process = subprocess.Popen(command, stdout=answer)
    seen: dict[int, float] = {}
    while not (ended := os.wait4(process.pid, os.WNOHANG))[0]:
        done = metrics.read_bytes().count(b"\n") if metrics.exists() else 0
        seen.setdefault(min(done, steps), processor_seconds(process.pid))
        time.sleep(0.02)
    _, status, usage = ended
    process.returncode = os.waitstatus_to_exitcode(status)
    if status:
        raise SystemExit(f"{recipe}: {' '.join(command)} failed")
    seen.pop(0, None)
    first, last = min(seen), max(seen)
    seconds = (seen[last] - seen[first]) / (last - first) / len(os.sched_getaffinity(0))
    found = json.loads(out.read_text())
    return {
        "measured_gib": round(found["peak_memory_gib"], 4),
        "outside_gib": round(usage.ru_maxrss * 1024 / GIB, 4),
        "seconds_per_step": round(seconds, 3),
        "timed": [first, last],  # from the end of this step to the end of that one
    }


def processor_seconds(process: int) -> float:
    ticks = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[11:13]
    return sum(map(int, ticks)) / os.sysconf("SC_CLK_TCK")


# --- planning again ---


def predict(cell: dict[str, Any], report: Report) -> Plan:
    """The plan of a measured cell, from the report alone: shape, lengths of the rows, machine and calibration."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "recipe.json"
        file.write_text(json.dumps(recipe_of(cell, cell["base"], file.parent)), encoding="utf-8")
        recipe = load_recipe(file)
    data, calibration = data_of(cell, report), calibration_of(report)
    return make_plan(recipe, machine_of(report), facts_of(cell), data, calibration=calibration)


def planned_seconds(cell: dict[str, Any], plan: Plan, report: Report) -> float:
    """Of the steps that were timed: an average step's, by how many tokens they have."""
    assert plan.seconds_per_step is not None
    steps = lay_out_steps(plan.train.mixture, batch_size=cell["batch_size"], steps=cell["steps"], seed=plan.train.seed)
    tokens = [int(data_of(cell, report).train_tokens[step].sum()) for step in steps]
    timed = tokens[slice(*cell["timed"])]
    return plan.seconds_per_step * (sum(timed) / len(timed)) / (sum(tokens) / len(tokens))


def facts_of(cell: dict[str, Any]) -> BaseFacts:
    if cell["base"] == POCKET:
        return read_base(POCKET).facts
    return table_facts(Model("Llama 2", cell["base"], SHAPES[cell["base"]], context_tokens=8192))


def data_of(cell: dict[str, Any], report: Report) -> DataFacts:
    """The rows as a plan sees them."""
    lengths = report["rows"][cell["tokenizer"]]
    tokens, supervised = np.array(lengths["tokens"]), np.array(lengths["supervised"])
    return DataFacts(
        format="alpaca",
        template="alpaca",
        template_sha256="",
        rows_read=ROWS,
        dropped={},
        train_tokens=tokens,
        train_supervised=supervised,
        truncated_tokens=0,
        straddling_tokens=0,
        eval_tokens=tokens[:0],
        stop_token_ids=(),
        source_examples=(len(tokens),),
        source_weights=(1.0,),
    )


def machine_of(report: Report) -> Machine:
    told = report["machine"]
    memory = told["memory_gib"]
    return Machine("cpu", told["name"], told["cores"], memory, memory, computes_bfloat16=told["computes_bfloat16"])


def calibration_of(report: Report) -> Calibration | None:
    if not (figures := report["calibration"]):
        return None
    products = {dtype: tuple((n, rate) for n, rate in each) for dtype, each in figures["products"].items()}
    return Calibration(**{**figures, "products": products})


# --- telling ---


def write_page(report: Report) -> None:
    """Put the table between its marks in docs/planning.md, and the plot beside it."""
    cells = [(cell, predict(cell, report)) for cell in report["cells"]]
    draw([(cell["measured_gib"], plan.peak_memory_gib) for cell, plan in cells], PAGE.parent / PICTURE)
    columns = ["base", "weights", "tokens a pass", "recompute", "speedups"]
    columns += [f"{what} {unit}" for unit in ("GiB", "s a step") for what in ("planned", "measured")]
    rows = [[*settings_told(cell), *figures_told(cell, plan, report)] for cell, plan in cells]
    machine, versions = report["machine"], ", ".join(f"{name} {v}" for name, v in report["versions"].items() if v)
    told = f"{report['date']}, {machine['name']}, {machine['cores']} core of it: {versions}."
    parts = [f"![Planned against measured memory]({PICTURE})", table(columns, rows, texts=5), told]
    text = PAGE.read_text(encoding="utf-8")
    before, after = text.split(BEGIN)[0], text.split(END)[1]
    PAGE.write_text(before + "\n\n".join([BEGIN, *parts, END]) + after, encoding="utf-8")


def settings_told(cell: dict[str, Any]) -> list[str]:
    return [str(cell[key]) for key in ("base", "quantization", "tokens_per_pass", "recompute", "speedups")]


def figures_told(cell: dict[str, Any], plan: Plan, report: Report) -> list[str]:
    figures = plan.peak_memory_gib, cell["measured_gib"], planned_seconds(cell, plan, report), cell["seconds_per_step"]
    return [f"{figure:.2f}" for figure in figures]


def draw(points: list[tuple[float, float]], path: Path) -> None:
    """Planned over measured GiB, one point a cell, with the lines of 10 % more and less."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(4.6, 4.2), dpi=100, constrained_layout=True)
    ends = np.array([0.8 * min(map(min, points)), 1.2 * max(map(max, points))])
    axes.fill_between(ends, 0.9 * ends, 1.1 * ends, color="#0b6e4f", alpha=0.15, linewidth=0, label="within 10 %")
    axes.plot(ends, ends, color="#0b6e4f", linewidth=1)
    axes.scatter(*zip(*points, strict=True), s=18, color="#4059ad", zorder=3, label="a run")
    axes.set(xscale="log", yscale="log", xlabel="measured, GiB", ylabel="planned, GiB", xlim=ends, ylim=ends)
    ticks = [each for each in (0.5, 1, 2, 4, 8, 16) if ends[0] <= each <= ends[1]]
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_locator(mpl.ticker.FixedLocator(ticks))
        axis.set_major_formatter(mpl.ticker.FormatStrFormatter("%g"))
        axis.set_minor_formatter(mpl.ticker.NullFormatter())
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    figure.savefig(path)
    pyplot.close(figure)


if __name__ == "__main__":
    main()
