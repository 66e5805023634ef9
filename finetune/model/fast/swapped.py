"""What a swap into faster code did: how many modules it took, what it keeps in memory, what it left alone and why."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Swapped:
    """`left` names the modules that stay the library's, each with the reason."""

    count: int
    kept_bytes: int
    left: Mapping[str, str]
