"""How documents lie in a stretch: their lengths end to end, and which earlier one each of them continues."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import accumulate


@dataclass(frozen=True)
class Documents:
    """`prefixes` names for each document an earlier one whose tokens it sees besides its own, or -1.

    A prefix has no prefix itself.
    """

    lengths: tuple[int, ...]
    prefixes: tuple[int, ...]

    @property
    def starts(self) -> tuple[int, ...]:
        return tuple(accumulate(self.lengths[:-1], initial=0))

    @property
    def prefix_lengths(self) -> tuple[int, ...]:
        return tuple(self.lengths[prefix] if prefix >= 0 else 0 for prefix in self.prefixes)

    @property
    def seen(self) -> tuple[int, ...]:
        """How many keys each document's last query sees."""
        return tuple(before + own for before, own in zip(self.prefix_lengths, self.lengths, strict=True))

    @property
    def families(self) -> list[list[int]]:
        """The documents by what they begin with: each that continues none, then all that continue it."""
        families = {number: [number] for number, prefix in enumerate(self.prefixes) if prefix < 0}
        for number, prefix in enumerate(self.prefixes):
            if prefix >= 0:
                families[prefix].append(number)
        return list(families.values())
