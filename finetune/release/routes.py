"""Which experts a model's routers choose: written down, or taken from another model's pass.

Rounding a weight can turn the choice between two experts that a router rates alike, and one token goes another way.
So two models are compared on the way of one of them, and what the other would have chosen is judged by itself.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.overrides import TorchFunctionMode


@dataclass
class Route:
    """The choices of one pass in order, filled while it is computed; N = tokens, K = chosen of each."""

    chosen: list[torch.Tensor] = field(default_factory=list)  # [N, K]
    rated: int = 0  # candidates among which they were made: tokens times experts, summed over layers
    # Of a pass that follows another's route: how many candidates it would have treated otherwise, and the largest lead
    # of its own choice over the one taken, in standard deviations of the values it was made by.
    others: int = 0
    lead: float = 0.0


class Routing(TorchFunctionMode):
    """Inside, every choice of some among more is noted in `route`; with `follow` that route's are taken instead.

    All routers of transformers choose with torch.topk along the last dimension.
    """

    def __init__(self, route: Route, follow: Route | None) -> None:
        super().__init__()
        self.route, self.follow = route, follow

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        if func not in (torch.topk, torch.Tensor.topk):
            return found
        values = args[0] if args else (kwargs or {})["input"]
        count, of = found.indices.shape[-1], values.shape[-1]
        is_choice = count < of and found.indices.shape[:-1] == values.shape[:-1]
        return self._choose(values, found) if is_choice else found

    def _choose(self, values: torch.Tensor, own: Any) -> Any:
        route = self.route
        route.rated += values.numel()
        if self.follow is None:
            route.chosen.append(own.indices.flatten(0, -2))
            return own
        taken = self.follow.chosen[len(route.chosen)].reshape(own.indices.shape)
        route.chosen.append(taken.flatten(0, -2))
        taken_values = values.gather(-1, taken)
        nothing = torch.zeros_like(values, dtype=torch.bool)
        differs = nothing.scatter(-1, own.indices, True) != nothing.scatter(-1, taken, True)
        if differs.any():
            lead = (own.values.amin(dim=-1) - taken_values.amin(dim=-1)).max()
            route.others += int(differs.sum())
            route.lead = max(route.lead, (lead / values[values.isfinite()].std()).item())
        return torch.return_types.topk((taken_values, taken))


def joined(parts: Sequence[Route]) -> Route:
    """The route of a text whose pieces were computed one after the other."""
    chosen = [torch.cat(together) for together in zip(*(part.chosen for part in parts), strict=True)]
    return Route(chosen, sum(part.rated for part in parts))


def share_of_others(routes: Sequence[Route]) -> float:
    """Of all candidates, those that would have been treated otherwise."""
    return sum(route.others for route in routes) / max(1, sum(route.rated for route in routes))


def largest_lead(routes: Sequence[Route]) -> float:
    """Of all routes."""
    return max((route.lead for route in routes), default=0.0)
