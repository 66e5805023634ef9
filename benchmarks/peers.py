"""Install other toolkits into environments of their own and try each on a tiny model: which can train on this CPU.

    python benchmarks/peers.py --folder /tmp/peers --out benchmarks/results/peers_speed.json

How each is installed, configured and started: benchmarks/speed/peers.py. Where one cannot be installed or does not run,
its own last words are the result. Needs a registry to install from; 8 GB in the folder for all four.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.speed.contenders import prepare, train
from benchmarks.speed.facts import command_line, header
from benchmarks.speed.outside import Report, last_words
from benchmarks.speed.peers import PEERS, install, versions


def attempt(name: str, arguments: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Whether a peer could be installed, its versions, and per quantization its first losses or its last words."""
    started = time.perf_counter()
    notes = PEERS[name].notes
    try:
        install(name, arguments.folder)
    except RuntimeError as error:
        return {"notes": notes, "installed": False, "reason": last_words(str(error))}
    found: dict[str, Any] = {"notes": notes, "installed": True, "versions": versions(name, arguments.folder)}
    for quantization in ("none", "nf4"):
        shared, peers = arguments.shared.resolve(), arguments.folder.resolve()
        work = prepare("1M", quantization, folder=folder, shared=shared, peers=peers)
        try:
            run = train(name, work, 1)
            found[quantization] = {"ran": True, "losses": run["losses"]}
        except RuntimeError as error:
            found[quantization] = {"ran": False, "reason": last_words(str(error))}
    return {**found, "seconds": time.perf_counter() - started}


def main() -> None:
    """Try the chosen peers and write what came of it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()) / "peers")
    parser.add_argument("--shared", type=Path, default=Path("../shared/data"))
    parser.add_argument("--peers", nargs="+", choices=PEERS, default=list(PEERS))
    arguments = parser.parse_args()
    arguments.folder.mkdir(parents=True, exist_ok=True)
    report = Report(arguments.out, **header(command_line()))
    with tempfile.TemporaryDirectory(prefix="peers-") as folder:
        work = prepare("1M", "none", folder=Path(folder), shared=arguments.shared.resolve(), peers=arguments.folder)
        report.content["reference"] = train("finetune", work, 1)["losses"]
        for name in arguments.peers:
            found = attempt(name, arguments, Path(folder))
            report.content.setdefault("peers", {})[name] = found
            report.write()
            print(name, found, flush=True)


if __name__ == "__main__":
    main()
