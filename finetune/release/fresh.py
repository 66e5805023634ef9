"""Prove releases in a process that has seen nothing but the files: pairs of folder and run in, proofs out."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from finetune.errors import Problem, ProofError

# The child finds this very package, wherever the command was started from.
START = "import sys; sys.path.insert(0, sys.argv.pop(1)); from finetune.release.proof import main; main()"
PACKAGE_PARENT = Path(__file__).resolve().parents[2]


@dataclass(frozen=True)
class Proof:
    """One comparison: what was measured, what it may be at most (None: only recorded), and whether it holds."""

    name: str
    value: float
    limit: float | None
    passed: bool

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def proof(name: str, value: float, limit: float | None) -> Proof:
    """A proof that passes when the value is a number and not above the limit."""
    return Proof(name, value, limit, value == value and (limit is None or value <= limit))


def prove_in_fresh_process(pairs: Sequence[tuple[Path, Path]]) -> list[list[Proof]]:
    """The proofs of each (release folder, run) pair, in order; one process for all of them.

    Raises:
        ProofError: the process ended without an answer.
    """
    arguments = [str(path) for pair in pairs for path in pair]
    command = [sys.executable, "-c", START, str(PACKAGE_PARENT), *arguments]
    answer = subprocess.run(command, capture_output=True, text=True, check=False)
    lines = answer.stdout.strip().splitlines()
    if answer.returncode or not lines:
        reason = (answer.stderr.strip().splitlines() or ["it gave no reason"])[-1]
        raise ProofError(Problem(str(pairs[0][0]), f"the proof could not be carried out: {reason}"))
    return [[Proof(**values) for values in proofs] for proofs in json.loads(lines[-1])]


def failed_problems(folder: Path, proofs: Sequence[Proof]) -> list[Problem]:
    """One problem per failed proof, with both numbers."""
    return [
        Problem(f"{folder}: proof {found.name}", f"{found.value:.6g}, at most {found.limit:.6g} was allowed")
        for found in proofs
        if not found.passed and found.limit is not None
    ] + [
        Problem(f"{folder}: proof {found.name}", f"is {found.value}, not a number")
        for found in proofs
        if not found.passed and found.limit is None
    ]
