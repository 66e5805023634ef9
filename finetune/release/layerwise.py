"""Compute with models that do not fit in memory: stored tensors in, logits out, one decoder layer in memory at a time.

All passes go through a layer before the next layer's weights are read. The arithmetic is transformers' own: the model's
forward is run with layers that only write down what they are called with, then the layers one by one, then the forward
again from the last layer's output.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers import Cache

from finetune.base import TensorEntry, read_tensor_entries
from finetune.model.empty import adapter_switched_off, attach_saved_adapter, empty_model
from finetune.release.parts import EMBEDDING, HEAD, REST, ModelParts, Part, Read, layer_part
from finetune.release.routes import Route, Routing
from finetune.release.weights import read_tensors

BYTES_BETWEEN_LAYERS = 1 << 29  # of passes that go through the layers together


class NotCuttable(Exception):
    """The model does something between its layers: it can only be computed whole."""


@dataclass(frozen=True)
class Pass:
    """One forward: its tokens, the positions whose logits are wanted, and whether the adapter takes part."""

    input_ids_1T: torch.Tensor
    keep: int | torch.Tensor = 0  # as transformers' logits_to_keep: so many last ones, these ones, or 0 for all
    adapted: bool = True
    cache: Cache | None = None  # keys and values of earlier tokens; these tokens' are added
    more: Mapping[str, Any] = field(default_factory=dict)  # further arguments of the forward
    route: Route = field(default_factory=Route)  # where its routers' choices are noted
    follow: Route | None = None  # choices to take in place of its own

    def arguments(self, device: str) -> dict[str, Any]:
        """What transformers' forward is called with."""
        ids = self.input_ids_1T.to(device)
        return {"input_ids": ids, "past_key_values": self.cache, "use_cache": self.cache is not None, **self.more}


class LayerwiseModel:
    """A model of a folder whose weights are read when they are needed; `read` may change them on the way."""

    def __init__(  # noqa: PLR0913  what the model is, where its numbers come from, and how it computes
        self,
        folder: Path,
        *,
        entries: Sequence[TensorEntry] | None = None,  # other tensors than those the folder holds
        read: Read = read_tensors,
        adapter: Path | None = None,
        device: str = "cpu",
        dtype: torch.dtype = torch.float32,
        attention: str | None = None,
    ) -> None:
        self.device = device
        self.model = empty_model(folder, dtype=dtype, attention=attention)
        self.config = self.model.config
        self.modules = dict(self.model.named_modules())  # the base's own, wherever an adapter wraps them
        stored = list(read_tensor_entries(folder)) if entries is None else entries
        self.parts = ModelParts(folder, stored, self.model, read=read, device=device)
        self.layers = self.parts.layers
        self.is_cut = len(self.layers) > 0
        self.tuned = attach_saved_adapter(self.model, adapter, device=device) if adapter else None
        of_layers = {id(module) for module in self.layers.modules()}
        self.outside = [module for module in self.model.modules() if id(module) not in of_layers]
        for module in self.model.modules():
            for name, buffer in module._buffers.items():
                module._buffers[name] = None if buffer is None else buffer.to(device)
        self._put(self.parts.load((REST, 0)))  # norms outside the layers: always there

    @torch.no_grad()
    def logits(self, passes: Sequence[Pass]) -> Iterator[torch.Tensor]:
        """Of each pass in order its logits [kept positions, vocabulary], float32, on the model's device.

        The layers are read once for as many passes as fit between two layers, see BYTES_BETWEEN_LAYERS.

        Raises:
            StorageError: the files are not the model's.
        """
        waiting = list(passes)
        while waiting:
            together = waiting[: self._passes_together(waiting)]
            try:
                yield from self._layer_by_layer(together) if self.is_cut else self._whole(together)
            except NotCuttable:  # found before the first logits
                self.is_cut = False
            else:
                waiting = waiting[len(together) :]

    def _layer_by_layer(self, passes: Sequence[Pass]) -> Iterator[torch.Tensor]:
        with self._in_memory((EMBEDDING, 0)):
            runs = [self._record(one) for one in passes]
        for number in range(len(self.layers)):
            with self._in_memory(layer_part(number)):
                self._through(number, [run for run in runs if run.adapted], adapted=True)
                self._through(number, [run for run in runs if not run.adapted], adapted=False)
        with self._in_memory((HEAD, 0)):
            for one, run in zip(passes, runs, strict=True):
                with self._adapter(one.adapted, self.outside):
                    yield self._finish(one, run.hidden_1TD)

    def _whole(self, passes: Sequence[Pass]) -> Iterator[torch.Tensor]:
        with self._in_memory(*self.parts.but_rest):
            for one in passes:
                with self._adapter(one.adapted, self.model.modules()), Routing(one.route, one.follow):
                    found = self.model(**one.arguments(self.device), logits_to_keep=one.keep)
                yield found.logits[0].float()

    def _record(self, one: Pass) -> Recorded:
        """The forward with layers that change nothing: what each is called with."""
        run = Recorded(one.adapted, Routing(one.route, one.follow))
        with self._adapter(one.adapted, self.outside), _forward_of(self.layers, run.call):
            self.model.get_decoder()(**one.arguments(self.device))
        if len(run.calls) != len(self.layers):
            raise NotCuttable
        return run

    def _through(self, number: int, runs: Sequence[Recorded], *, adapted: bool) -> None:
        layer = self.layers[number]
        with self._adapter(adapted or not runs, layer.modules()):
            for run in runs:
                run.through(number, layer)

    def _finish(self, one: Pass, hidden_1TD: torch.Tensor) -> torch.Tensor:
        with _forward_of(self.layers, lambda *_args, **_kwargs: hidden_1TD):
            found: Any = self.model(inputs_embeds=hidden_1TD, use_cache=False, logits_to_keep=one.keep)
        return found.logits[0].float()

    def _passes_together(self, passes: Sequence[Pass]) -> int:
        """How many of the next passes go through the layers together: at least one."""
        width = 4 * self.config.get_text_config().hidden_size + 4096  # the rotary angles, too
        total = count = 0
        for one in passes:
            tokens = one.input_ids_1T.shape[1]
            total += tokens * (width + 2 * tokens)  # and up to two masks
            if count and total > BYTES_BETWEEN_LAYERS:
                break
            count += 1
        return count

    def _adapter(self, adapted: bool, modules: Iterable[torch.nn.Module]) -> AbstractContextManager:
        return nullcontext() if adapted or self.tuned is None else adapter_switched_off(modules)

    @contextmanager
    def _in_memory(self, *parts: Part) -> Iterator[None]:
        empty: dict[str, Any] = {}
        for part in parts:
            empty |= self._put(self.parts.load(part))
        try:
            yield
        finally:
            self._put(empty)

    def _put(self, values: Mapping[str, Any]) -> dict[str, Any]:
        """Set parameters and buffers of the base's modules; what was there before comes back."""
        before = {}
        for key, value in values.items():
            path, _, name = key.rpartition(".")
            module = self.modules[path]
            slots: dict[str, Any] = module._parameters if name in module._parameters else module._buffers
            before[key], slots[name] = slots[name], value
        return before


@dataclass
class Recorded:
    """A pass on its way through the layers: what each will be called with, and what the last one gave."""

    adapted: bool
    routing: Routing
    calls: list[tuple[tuple[Any, ...], dict[str, Any]]] = field(default_factory=list)
    hidden_1TD: Any = None

    def call(self, *args: Any, **kwargs: Any) -> Any:
        """In place of a layer's forward: note the arguments and give the input back."""
        first, *others = args or (kwargs.pop("hidden_states"),)
        if self.calls and first is not self.hidden_1TD:
            raise NotCuttable
        self.hidden_1TD = first
        self.calls.append((tuple(others), kwargs))
        return first

    def through(self, number: int, layer: torch.nn.Module) -> None:
        """Run a layer as it was called, on what the layer before gave."""
        others, kwargs = self.calls[number]
        with self.routing:
            found = layer(self.hidden_1TD, *others, **kwargs)
        self.hidden_1TD = found[0] if isinstance(found, tuple) else found
        self.calls[number] = ((), {})


@contextmanager
def _forward_of(layers: torch.nn.ModuleList, forward: Callable[..., Any]) -> Iterator[None]:
    """Every layer's forward is this function for a while."""
    for layer in layers:
        layer.forward = forward  # type: ignore[assignment]
    try:
        yield
    finally:
        for layer in layers:
            del layer.forward
