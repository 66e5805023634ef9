"""Combine adapters of one base: what each changes in a tensor and a formula in, the exact combined values out.

Everything is defined on deltas, tuned minus base, of whole tensors in float64, whatever made them. For LoRA the delta
is s * B * A itself; the factors of different adapters are never mixed.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from finetune.base import TensorEntry
from finetune.errors import Problem, UserError, raise_problems
from finetune.release.changes import EMBEDDING, HEAD, read_changes, release_entries
from finetune.release.delta import Change, Delta, Onto, one_thread, round_to, tuned_blocks
from finetune.release.source import Source

DEFAULT_DENSITY = {"ties": 0.2, "dare": 0.5}  # TIES: a fifth, as arXiv:2306.01708; DARE: our choice
DEFAULT_SEED = 17


@dataclass(frozen=True)
class Formula:
    """How deltas become one: a weight for each, the method, the share of elements it keeps, the seed it draws by."""

    method: str
    weights: tuple[float, ...]
    density: float | None = None
    seed: int | None = None

    def to_json(self) -> dict[str, Any]:
        return {**vars(self), "weights": list(self.weights)}


def make_formula(
    runs: int, *, weights: Sequence[float], method: str | None, density: float | None, seed: int | None
) -> Formula:
    """The formula of a command line, with defaults in the place of what was not said.

    Raises:
        UserError: weights that do not fit the runs, an unknown method, or an option that would do nothing.
    """
    chosen = method or "linear"
    problems = []
    if chosen not in METHODS:
        problems.append(Problem("--method", f"{method!r} is not possible; write one of {', '.join(METHODS)}"))
    if len(weights) != runs:
        example = " ".join(["0.5"] * runs)
        message = f"{len(weights)} given for {runs} runs; give each its own in the same order, e.g. --weights {example}"
        problems.append(Problem("--weights", message))
    if not np.isfinite(np.array(weights)).all() or not any(weights):
        problems.append(Problem("--weights", f"{list(weights)}: finite numbers are needed, and one that is not 0"))
    if density is not None and not 0 < density <= 1:
        problems.append(Problem("--density", f"{density} is not possible; write a number above 0, at most 1"))
    if density is not None and chosen in ("linear", "cat"):
        problems.append(Problem("--density", f"{chosen} drops nothing, it is for ties or dare; leave it out"))
    if seed is not None and chosen != "dare":
        problems.append(Problem("--seed", f"{chosen} draws nothing, it is for dare; leave it out"))
    raise_problems(problems)
    kept = DEFAULT_DENSITY.get(chosen) if density is None else density
    drawn = (DEFAULT_SEED if seed is None else seed) if chosen == "dare" else None
    return Formula(chosen, tuple(map(float, weights)), kept, drawn)


@dataclass(frozen=True)
class Combining:
    """The tensors of a release of several adapters, each where its base values lie, and what becomes of them."""

    entries: Sequence[TensorEntry]
    changes: Sequence[Mapping[str, Change]]  # of each run by stored name
    formula: Formula
    quantized: frozenset[str]  # the linears' weights, if the runs computed with other values than those stored
    onto: Onto

    @property
    def rounded(self) -> frozenset[str]:
        """The tensors that a release holds computed and rounded; all others are the base's bytes."""
        return self.quantized.union(*self.changes)

    def meets(self, entry: TensorEntry, tensor: torch.Tensor) -> torch.Tensor:
        """The values of a stored tensor that the combined delta is added to."""
        return self.onto.weight(tensor) if entry.name in self.quantized else tensor

    def tuned(self, entry: TensorEntry, tensor: torch.Tensor) -> torch.Tensor:
        """A tensor as the release holds it: each element rounded once."""
        if entry.name not in self.rounded:
            return tensor
        with one_thread():
            weight = self.meets(entry, tensor)
            deltas = [delta_of(weight, changes.get(entry.name)) for changes in self.changes]
            return round_to(weight.double() + combine(deltas, self.formula, entry.name), tensor.dtype)


def make_combining(sources: Sequence[Source], formula: Formula, onto: Onto) -> Combining:
    """What several runs' adapters together make of their base.

    Raises:
        UserError: an adapter cannot be merged, or does not fit the base.
        StorageError: a damaged file.
    """
    folder = sources[0].base.facts.folder
    changes = [read_changes(source.adapter, folder) for source in sources]
    union: dict[str, Change] = {}
    for each in changes:
        union |= each
    entries = release_entries(folder, union)
    if HEAD in union and len(entries) == 1 + len(release_entries(folder, {})):
        # Untied by one of them: what another makes of its embedding, it makes of its tied head too.
        changes = [{**_tied_head(each), **each} for each in changes]
    is_quantized = onto.name == "dequantized" and onto.quantization != "none"
    linears = frozenset(f"{linear.module}.weight" for linear in sources[0].base.facts.linears)
    return Combining(entries, changes, formula, linears if is_quantized else frozenset(), onto)


def delta_of(weight: torch.Tensor, change: Change | None) -> torch.Tensor:
    """What a change adds to a tensor: float64, in the tensor's shape."""
    if change is None:
        return torch.zeros(weight.shape, dtype=torch.float64)
    if is_plain(change):
        assert isinstance(change, Delta)
        return change.scale * (change.b_OR.double() @ change.a_RI.double())
    rows_OI = weight.reshape(-1, weight.shape[-1]) if weight.dim() > 1 else weight.reshape(1, -1)
    delta_OI = torch.empty(rows_OI.shape, dtype=torch.float64)
    for block, tuned in tuned_blocks(weight, change):
        delta_OI[block] = tuned - rows_OI[block].double()
    return delta_OI.reshape(weight.shape)


def is_plain(change: Change) -> bool:
    """Whether a change is scale * B * A and nothing more."""
    if not isinstance(change, Delta):
        return False
    return change.magnitude_O is None and change.magnitude_I is None and change.start is None


def combine(deltas: Sequence[torch.Tensor], formula: Formula, name: str) -> torch.Tensor:
    """The combined delta of one tensor; `name`, the tensor's, takes part in what DARE draws."""
    return METHODS[formula.method](deltas, formula, name)


def dare_draws(seed: int, run: int, name: str) -> np.random.Philox:
    """The source of random numbers for one run's tensor: the same on every machine, whatever else is merged."""
    digest = hashlib.sha256(f"{seed}/{run}/{name}".encode()).digest()
    return np.random.Philox(key=int.from_bytes(digest[:16], "little"))


def _linear(deltas: Sequence[torch.Tensor], formula: Formula, name: str) -> torch.Tensor:
    """sum_i w_i d_i; what a concatenation of the ranks computes, so `cat` is the same on whole tensors."""
    total = torch.zeros_like(deltas[0])
    for weight, delta in zip(formula.weights, deltas, strict=True):
        total.add_(delta, alpha=weight)
    return total


def _ties(deltas: Sequence[torch.Tensor], formula: Formula, name: str) -> torch.Tensor:
    """Trim, elect a sign, mean of those that agree (arXiv:2306.01708, algorithm 1), each delta times its weight.

    Trimming keeps the elements of the largest magnitude, all of them where the last ones are equal. Where the trimmed
    deltas cancel to 0 no sign is elected, and the base's value stays.
    """
    assert formula.density is not None
    trimmed = [weight * _trim(delta, formula.density) for weight, delta in zip(formula.weights, deltas, strict=True)]
    elected = torch.stack(trimmed).sum(dim=0).sign_()
    total, agreeing = torch.zeros_like(elected), torch.zeros_like(elected)
    for delta in trimmed:
        agrees = delta.sign() == elected
        total.add_(delta.where(agrees, torch.zeros_like(delta)))
        agreeing.add_(agrees)
    return total.div_(agreeing.clamp_(min=1))


def _trim(delta: torch.Tensor, density: float) -> torch.Tensor:
    sizes = delta.abs().flatten()
    kept = max(1, round(density * sizes.numel()))
    threshold = sizes.kthvalue(sizes.numel() - kept + 1).values
    return delta.where(delta.abs() >= threshold, torch.zeros_like(delta))


def _dare(deltas: Sequence[torch.Tensor], formula: Formula, name: str) -> torch.Tensor:
    """Drop elements at random, divide the others by the share that stays (arXiv:2311.03099), then add."""
    assert formula.density is not None
    assert formula.seed is not None
    total = torch.zeros_like(deltas[0])
    for run, (weight, delta) in enumerate(zip(formula.weights, deltas, strict=True)):
        draws = np.random.Generator(dare_draws(formula.seed, run, name)).random(delta.numel())
        stays = torch.from_numpy(draws < formula.density).reshape(delta.shape)
        total.add_(delta * stays / formula.density, alpha=weight)
    return total


def _tied_head(changes: Mapping[str, Change]) -> dict[str, Change]:
    embedding = next((change for name, change in changes.items() if name.endswith(EMBEDDING)), None)
    return {HEAD: embedding} if embedding else {}


def refuse_unknown_form(form: str, method: str) -> None:
    """Refuse to write a combination that is no adapter as one.

    Raises:
        UserError: the form is unknown, or the method's result has no low rank.
    """
    if form not in FORMS:
        raise UserError(Problem("--as", f"{form!r} is not possible; write one of {', '.join(FORMS)}"))
    if form == "adapter" and method not in ("linear", "cat"):
        message = f"what {method} gives has no low rank; write it as weights, then run finetune extract on the result"
        raise UserError(Problem("--as", message))


FORMS = ("weights", "adapter")
METHODS: dict[str, Callable[[Sequence[torch.Tensor], Formula, str], torch.Tensor]] = {
    "linear": _linear,
    "cat": _linear,
    "ties": _ties,
    "dare": _dare,
}
