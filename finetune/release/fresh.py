"""Prove releases in a process that has seen nothing but the files: pairs of folder and run in, proofs out."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from finetune.errors import NumericsError, Problem, ProofError, StorageError, UserError
from finetune.trust import hand_over_to_child

# The child finds this very package, wherever the command was started from, and may run what this process may.
START = """import sys
sys.path.insert(0, sys.argv.pop(1))
from finetune.machine import refuse_fetched_code
from finetune.trust import take_over
refuse_fetched_code()
take_over(sys.argv.pop(1))
from {} import main
main()"""
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
        UserError, StorageError: what the process says of run, base or release.
    """
    found = answer_of("finetune.release.proof", [str(path) for pair in pairs for path in pair])
    return [[Proof(**values) for values in proofs] for proofs in found]


def answer_of(module: str, arguments: Sequence[str]) -> Any:
    """The JSON that a module's main() prints last, in a process of its own.

    Raises:
        ProofError: the process ended without an answer.
        UserError, StorageError: what the process says of run, base or release.
    """
    # -P: no module of the current folder is imported
    command = [sys.executable, "-P", "-c", START.format(module), str(PACKAGE_PARENT), hand_over_to_child(), *arguments]
    answer = subprocess.run(command, capture_output=True, text=True, check=False)
    lines = answer.stdout.strip().splitlines()
    if answer.returncode or not lines:
        message = f"the proof could not be carried out: {_why_it_ended(answer.returncode, answer.stderr)}"
        raise ProofError(Problem(arguments[0], message))
    found = json.loads(lines[-1])
    if isinstance(found, dict):
        kind = next(kind for kind in (UserError, StorageError, NumericsError, ProofError) if kind.code == found["code"])
        raise kind(Problem(**problem) for problem in found["problems"])
    return found


def _why_it_ended(code: int, errors: str) -> str:
    if code == -signal.SIGKILL:
        return "its process was killed, as it is when memory runs out; close other programs, or take a larger machine"
    return (errors.strip().splitlines() or ["it gave no reason"])[-1]


def proof_lines(proofs: Sequence[Proof]) -> list[str]:
    """What a person reads of proofs: one line each, with both figures."""
    lines = []
    for found in proofs:
        limit = "recorded only" if found.limit is None else f"at most {found.limit:.6g}"
        lines.append(f"  {'ok  ' if found.passed else 'FAIL'} {found.name}: {found.value:.6g} ({limit})")
    return lines


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
