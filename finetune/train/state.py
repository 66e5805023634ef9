"""The state of a training as plain files: optimizer, schedule, scaler and random numbers, in safetensors and JSON.

state.safetensors holds the tensors, state.json everything else, with a note where each tensor belongs; no pickle.
"""

from __future__ import annotations

import json
import random
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from safetensors.torch import load_file, save_file

from finetune.errors import NumericsError, Problem, StorageError, raise_problems
from finetune.model.adapter import stored_tensors

TENSORS, REST, WEIGHTS = "state.safetensors", "state.json", "adapter_model.safetensors"
RANDOM = "random-{:03}.json"  # of a rank


class Stateful(Protocol):
    """A part of the training with a state: an optimizer, a schedule, a scaler."""

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state_dict: dict[str, Any]) -> Any: ...


def save_state(
    folder: Path,
    *,
    model: torch.nn.Module,
    optimizer: torch.optim.Optimizer,
    parts: Mapping[str, Stateful],
    random_states: Sequence[bytes],
) -> None:
    """Write state.safetensors and state.json, and random-NNN.json for every rank, from its `random_state_bytes`.

    Raises:
        NumericsError: a trained weight or a tensor of the optimizer is not finite; nothing was written.
    """
    tensors: dict[str, torch.Tensor] = {}
    parameters = _optimized(model, optimizer)
    names = [parameter["name"] for parameter in parameters]
    states = {name: part.state_dict() for name, part in {"optimizer": optimizer, **parts}.items()}
    rest = {
        "parameters": parameters,
        **{name: _take_out(state, name, tensors) for name, state in states.items()},
    }
    _refuse_non_finite({name: p for name, p in model.named_parameters() if p.requires_grad}, names)
    _refuse_non_finite(tensors, names)
    # Copies, because safetensors refuses tensors that share memory, as the code books of 8-bit Adam do.
    save_file({name: tensor.detach().to("cpu", copy=True).contiguous() for name, tensor in tensors.items()},
              folder / TENSORS)  # fmt: skip
    (folder / REST).write_text(json.dumps(rest, allow_nan=False) + "\n", encoding="utf-8")
    for rank, state in enumerate(random_states):
        (folder / RANDOM.format(rank)).write_bytes(state)


def load_state(
    folder: Path, *, model: torch.nn.Module, optimizer: torch.optim.Optimizer, parts: Mapping[str, Stateful]
) -> None:
    """Give optimizer and parts the state they were saved with; the random numbers are `load_random_state`'s.

    Raises:
        StorageError: the state is that of another model, optimizer or precision.
    """
    rest, tensors = _read(folder)
    now = _optimized(model, optimizer)
    saved = {name for name in rest if name not in ("parameters", "optimizer")}
    if rest["parameters"] != now or saved != parts.keys():
        pairs = zip(rest["parameters"], now, strict=False)
        other = next((f"{was} was saved, {here} is here" for was, here in pairs if was != here), "")
        counts = f"{len(rest['parameters'])} parameters and {sorted(saved)}, here {len(now)} and {sorted(parts)}"
        raise StorageError(Problem(str(folder / REST), f"is the state of another training: {other or counts}"))
    for name, part in {"optimizer": optimizer, **parts}.items():
        state = _put_back(rest[name], tensors)
        if name == "optimizer":
            _refuse_other_groups(folder, state, optimizer.state_dict())
        part.load_state_dict(state)


def random_state_bytes() -> bytes:
    """Where Python's, NumPy's and torch's generators are in this process, as JSON."""
    tensors: dict[str, torch.Tensor] = {}
    rest = _take_out(_random_state(), "random", tensors)
    written = {name: bytes(tensor.tolist()).hex() for name, tensor in tensors.items()}
    return (json.dumps({"random": rest, "tensors": written}) + "\n").encode()


def load_random_state(folder: Path, *, rank: int = 0) -> bool:
    """Set Python's, NumPy's and torch's generators, of every device, to where they were; False if this rank is new.

    Raises:
        StorageError: the checkpoint was written with another number of GPUs.
    """
    file = folder / RANDOM.format(rank)
    if not file.exists():
        return False
    saved = json.loads(file.read_text(encoding="utf-8"))
    tensors = {
        name: torch.frombuffer(bytearray.fromhex(value), dtype=torch.uint8) for name, value in saved["tensors"].items()
    }
    state = _put_back(saved["random"], tensors)
    devices = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if len(state["cuda"]) != devices:
        message = f"was saved with {len(state['cuda'])} GPUs, here are {devices}; the same numbers cannot be drawn"
        raise StorageError(Problem(str(file), message))
    random.setstate(state["python"])
    np.random.set_state(state["numpy"])  # noqa: NPY002 - the global generator, which libraries draw from
    torch.set_rng_state(state["torch"])
    if state["cuda"]:
        torch.cuda.set_rng_state_all(state["cuda"])
    return True


def load_weights(folder: Path, model: torch.nn.Module) -> None:
    """Copy the saved adapter into the model's, bit by bit.

    Raises:
        StorageError: a weight is missing, left over, or of another shape or dtype.
    """
    saved = load_file(folder / WEIGHTS)
    here = stored_tensors(model)
    raise_problems(
        (
            Problem(str(folder / WEIGHTS), f"{name}: {_kind(saved.get(name))} was saved, {_kind(here.get(name))} fits")
            for name in sorted(saved.keys() | here.keys())
            if _kind(saved.get(name)) != _kind(here.get(name))
        ),
        error=StorageError,
    )
    with torch.no_grad():
        for name, parameter in here.items():
            parameter.copy_(saved[name])


def _kind(tensor: torch.Tensor | None) -> str:
    return "nothing" if tensor is None else f"{str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)}"


def _optimized(model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> list[dict[str, str]]:
    """Name and kind of the optimizer's parameters, in its own order, which its state is numbered by."""
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    return [{"name": names[id(parameter)], "kind": _kind(parameter)} for parameter in parameters]


def _random_state() -> dict[str, Any]:
    kind, keys, position, has_gauss, gauss = np.random.get_state(legacy=True)  # noqa: NPY002
    return {
        "python": random.getstate(),
        "numpy": (kind, keys.tolist(), position, has_gauss, gauss),  # type: ignore[union-attr]
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
    }


def _refuse_non_finite(tensors: Mapping[str, torch.Tensor], names: list[str]) -> None:
    for name, tensor in tensors.items():
        if tensor.is_floating_point() and not torch.isfinite(tensor).all():
            known = _spoken_name(name, names)
            message = f"{known} is not finite; this step is not saved, the checkpoints before it are as they were"
            raise NumericsError(Problem("checkpoint", message))


def _spoken_name(name: str, names: list[str]) -> str:
    """optimizer.state.3.exp_avg as "exp_avg of NAME", other names as they are."""
    head, _, rest = name.partition("optimizer.state.")
    if head or not rest:
        return name
    number, _, key = rest.partition(".")
    return f"{key.rpartition('.')[2]} of {names[int(number)]}"


def _refuse_other_groups(folder: Path, saved: dict[str, Any], here: dict[str, Any]) -> None:
    for was, now in zip(saved["param_groups"], here["param_groups"], strict=True):
        if was.keys() != now.keys() or was["params"] != now["params"]:
            message = f"is the state of another optimizer: it has {sorted(was)}, this one {sorted(now)}"
            raise StorageError(Problem(str(folder / REST), message))


def _read(folder: Path) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    return json.loads((folder / REST).read_text(encoding="utf-8")), load_file(folder / TENSORS)


def _take_out(value: Any, path: str, tensors: dict[str, torch.Tensor]) -> Any:
    """`value` as JSON can hold it; its tensors go to `tensors` under their path."""
    if isinstance(value, torch.Tensor):
        tensors[path] = value
        return {"$tensor": path, "kind": _kind(value)}
    if isinstance(value, dict):
        items = [(key, _take_out(item, f"{path}.{key}", tensors)) for key, item in value.items()]
        return dict(items) if all(isinstance(key, str) for key in value) else {"$items": items}
    if isinstance(value, list | tuple):
        items = [_take_out(item, f"{path}.{index}", tensors) for index, item in enumerate(value)]
        return {"$tuple": items} if isinstance(value, tuple) else items
    return value


def _put_back(value: Any, tensors: Mapping[str, torch.Tensor]) -> Any:
    """The inverse of `_take_out`, exactly: tuples stay tuples and numbered keys numbers."""
    if isinstance(value, list):
        return [_put_back(item, tensors) for item in value]
    if not isinstance(value, dict):
        return value
    if "$tensor" in value:
        name = value["$tensor"]
        if _kind(tensors.get(name)) != value["kind"]:
            message = f"{name}: {value['kind']} was saved, {_kind(tensors.get(name))} is there"
            raise StorageError(Problem(TENSORS, message))
        return tensors[name]
    if "$tuple" in value:
        return tuple(_put_back(item, tensors) for item in value["$tuple"])
    if "$items" in value:
        return {key: _put_back(item, tensors) for key, item in value["$items"]}
    return {key: _put_back(item, tensors) for key, item in value.items()}
