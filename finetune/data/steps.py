"""A run's steps as a Hugging Face dataset: lists of example numbers in, one record a step out. The door to datasets."""

from __future__ import annotations

from collections.abc import Sequence

from datasets import Dataset  # type: ignore[attr-defined]


def steps_dataset(steps: Sequence[Sequence[int]]) -> Dataset:
    """One record a step; its column `step` holds the numbers of the examples."""
    return Dataset.from_dict({"step": [list(step) for step in steps]})
