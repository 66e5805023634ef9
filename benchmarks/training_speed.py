"""Real tokens per second of training: finetune beside TRL and other toolkits, measured from outside the programs.

Random LLaMAs of 24M, 160M and 1.1B parameters (vocabulary 32,000), LoRA rank 16 on all linear modules, the first rows
of the Alpaca demo, 8 examples a step, the same token ids and labels for all. A measurement is a process that trains one
epoch and a process that trains several; the rate is the tokens of the additional epochs over the difference of the two
walls, so that imports, loading and saving do not count. Contenders take turns. Padding does not count.

    python benchmarks/training_speed.py --out benchmarks/results/training_speed.json

TRL's settings are `defaults`, or the fastest of those in benchmarks/speed/trl_configurations.py, looked for with
--search (a process of few steps for each; the search is written into the same file and used by later calls):

    python benchmarks/training_speed.py --search --models 160M --out benchmarks/results/training_speed.json

Other toolkits take part once benchmarks/peers.py has installed them:

    python benchmarks/training_speed.py --contenders finetune llamafactory unsloth axolotl litgpt --out ...

What is in the file already is not measured again, so that a call that was broken off goes on.
"""

from __future__ import annotations

import argparse
import itertools
import sys
import tempfile
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.speed.contenders import CONFIGURATIONS, known, prepare, train, train_with_trl
from benchmarks.speed.facts import command_line, header, moment
from benchmarks.speed.ours import train_ours
from benchmarks.speed.outside import Report, last_words
from benchmarks.speed.rates import rates
from benchmarks.speed.subjects import BATCH_SIZE, SHAPES

BEST = "trl: best"
SEARCH_SECONDS = 600.0  # of one configuration at most


def search(report: Report, arguments: argparse.Namespace, folder: Path) -> None:
    """One process for every way to set TRL: the rate of its steps, the first left out."""
    content = report.content.setdefault("search", {})
    for model, quantization in itertools.product(arguments.models, arguments.quantization):
        found = content.setdefault(f"{model} {quantization}", {})
        work = prepare(model, quantization, folder=folder, **sources(arguments), rows=arguments.search_rows)
        for name in arguments.configurations:
            if name not in found:
                found[name] = tried(name, work)
                report.write()
                print(model, quantization, name, found[name], file=sys.stderr, flush=True)


def tried(name: str, work: Any) -> dict[str, Any]:
    """Tokens per second inside the trainer, or why there are none."""
    try:
        run = train_with_trl(work, CONFIGURATIONS[name], 1, limit_seconds=SEARCH_SECONDS)
    except RuntimeError as error:
        return {"reason": last_words(str(error))}
    tokens = run["tokens_up_to_step"]
    rate = (tokens[-1] - tokens[0]) / sum(run["step_seconds"][1:])
    kept = ("tokens", "labelled_tokens", "steps", "losses", "peak_bytes", "wall_seconds")
    return {"tokens_per_second": rate, **{key: run[key] for key in kept}}


def fastest(report: Report, model: str, quantization: str) -> str:
    """The name of TRL's fastest configuration: of the search with this size, else of one with this quantization."""
    searches: dict[str, Any] = report.content.get("search", {})
    if not searches:
        sys.exit(f"{BEST}: nothing was looked for yet; use --search first")
    key = max(searches, key=lambda k: (k.split() == [model, quantization], k.endswith(f" {quantization}")))
    worked = {name: run for name, run in searches[key].items() if "tokens_per_second" in run}
    labels = max(run["labelled_tokens"] for run in worked.values())  # packs shorter than a row cut some off
    whole = [name for name, run in worked.items() if run["labelled_tokens"] == labels]
    return max(whole, key=lambda name: worked[name]["tokens_per_second"])


def compare(report: Report, arguments: argparse.Namespace, folder: Path) -> None:
    """All rounds; in each the contenders one after the other, first with one epoch, then with more."""
    for model, quantization in itertools.product(arguments.models, arguments.quantization):
        work = prepare(model, quantization, folder=folder, **sources(arguments), rows=arguments.rows)
        train_ours(work.recipe, work.folder, "train.max_steps=1")  # fills its caches
        several = arguments.epochs or SHAPES[model].epochs
        common = {"model": model, "quantization": quantization}
        keys = [
            {**common, "contender": contender, "round": number, "epochs": epochs}
            for number in range(arguments.rounds)
            for contender in arguments.contenders
            for epochs in (1, several)
        ]

        def measure(key: dict[str, Any], work: Any = work) -> dict[str, Any]:
            contender = key["contender"]
            if contender == BEST:
                contender = f"trl: {fastest(report, key['model'], key['quantization'])}"
            return {"as": contender, **moment(), **train(contender, work, key["epochs"])}

        report.fill(keys, measure)


def sources(arguments: argparse.Namespace) -> dict[str, Path]:
    """Where rows and peers come from."""
    return {"shared": arguments.shared.resolve(), "peers": arguments.peers.resolve()}


def contender(name: str) -> str:
    return name if name == BEST else known(name)


def main() -> None:
    """Parse the command line, measure, and print the rates."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="the report, which is added to")
    parser.add_argument("--shared", type=Path, default=Path("../shared/data"), help="the folder of real data")
    parser.add_argument("--models", nargs="+", choices=SHAPES, default=["24M", "160M"])
    parser.add_argument("--quantization", nargs="+", choices=["nf4", "none"], default=["nf4", "none"])
    parser.add_argument("--contenders", nargs="+", type=contender, default=["finetune", "trl: defaults", BEST])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--rows", type=int, default=0, help="other than the size's own number")
    parser.add_argument("--epochs", type=int, default=0, help="of the longer process, other than the size's own")
    parser.add_argument("--search", action="store_true", help="look for TRL's fastest configuration instead")
    parser.add_argument("--configurations", nargs="+", choices=CONFIGURATIONS, default=list(CONFIGURATIONS))
    parser.add_argument("--search-rows", type=int, default=32)
    parser.add_argument("--peers", type=Path, default=Path(tempfile.gettempdir()) / "peers")
    arguments = parser.parse_args()
    report = Report(arguments.out, batch_size=BATCH_SIZE, **header(command_line()))
    with tempfile.TemporaryDirectory(prefix="training-speed-") as folder:
        (search if arguments.search else compare)(report, arguments, Path(folder))
    for line in rates(report.content["runs"], by=("model", "quantization", "contender")):
        print(line)


if __name__ == "__main__":
    main()
