"""Examples of several stored sources as one list: read from disk one by one, when they are asked for."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import overload

import numpy as np

from finetune.data.examples import Example
from finetune.data.store import StoredRows


@dataclass(frozen=True)
class Pool:
    """Examples of several sources counted as one list, in the order of the sources."""

    stores: tuple[StoredRows, ...]

    def array(self, name: str) -> np.ndarray:
        """One value per example of all sources."""
        return np.concatenate([store.arrays[name] for store in self.stores])

    def source_of(self) -> np.ndarray:
        return np.repeat(np.arange(len(self.stores)), [store.examples for store in self.stores])

    def where(self, example: int) -> str:
        """file:line of an example."""
        for store in self.stores:
            if example < store.examples:
                return store.where(int(store.row_of_example[example]))
            example -= store.examples
        raise IndexError(example)


@dataclass(frozen=True)
class Examples(Sequence[Example]):
    """Some of the examples of a pool, read from disk one by one when they are asked for."""

    pool: Pool = field(repr=False)
    chosen: np.ndarray = field(repr=False)  # numbers in the pool, int64

    @cached_property
    def tokens(self) -> np.ndarray:
        """Tokens of each example."""
        return self.pool.array("tokens")[self.chosen]

    @cached_property
    def supervised_tokens(self) -> np.ndarray:
        return self.pool.array("supervised_tokens")[self.chosen]

    @cached_property
    def _firsts(self) -> np.ndarray:
        return np.cumsum([0, *(store.examples for store in self.pool.stores)])

    def __len__(self) -> int:
        return len(self.chosen)

    @overload
    def __getitem__(self, index: int) -> Example: ...
    @overload
    def __getitem__(self, index: slice) -> Examples: ...
    def __getitem__(self, index: int | slice) -> Example | Examples:
        if isinstance(index, slice):
            return Examples(self.pool, self.chosen[index])
        number = int(self.chosen[index])
        source = int(np.searchsorted(self._firsts, number, side="right")) - 1
        store, example = self.pool.stores[source], number - int(self._firsts[source])
        start, end = store.starts[example : example + 2]
        return Example(
            ids=store.arrays["ids"][start:end],
            learned=store.arrays["learned"][start:end],
            where=store.where(int(store.row_of_example[example])),
            prompt_tokens=int(store.arrays["prompt_tokens"][example]),
            cut_tokens=int(store.arrays["cut_tokens"][example]),
        )
