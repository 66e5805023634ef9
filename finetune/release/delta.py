"""What an adapter adds to each weight: an adapter folder in, exact tuned weights in float64 out."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from finetune.errors import Problem, StorageError, UserError, raise_problems
from finetune.model.load import dequantize_like_base

PREFIX = "base_model.model."
MAGNITUDE = "lora_magnitude_vector"
ELEMENTS_AT_ONCE = 1 << 23  # 64 MiB in float64
DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
# Settings of PEFT's LoraConfig that change the arithmetic; any other value than these is refused.
PLAIN: dict[str, Any] = {"peft_type": "LORA", "bias": "none", "layer_replication": None, "modules_to_save": None}
FALSY = (
    *("rank_pattern", "alpha_pattern", "fan_in_fan_out", "lora_bias", "target_parameters", "trainable_token_indices"),
    *("use_qalora", "use_bdlora", "alora_invocation_tokens", "arrow_config", "kasa_config", "velora_config"),
    *("monteclora_config", "megatron_config"),
)


@dataclass(frozen=True)
class Delta:
    """One module's delta as trained. O = out features, I = in features, R = rank; `magnitude_O` with DoRA only."""

    a_RI: torch.Tensor
    b_OR: torch.Tensor
    magnitude_O: torch.Tensor | None
    scale: float


def read_deltas(folder: Path) -> dict[str, Delta]:
    """The deltas of an adapter folder, by the stored name of the weight they change.

    Raises:
        UserError: the adapter does something that a merge cannot represent.
        StorageError: the adapter's file is damaged.
    """
    config = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
    _refuse_what_cannot_be_merged(folder, config)
    try:
        tensors = load_file(str(folder / "adapter_model.safetensors"))
    except (SafetensorError, OSError) as error:
        raise StorageError(Problem(str(folder), f"the adapter cannot be read ({error}); train it again")) from error
    parts: dict[str, dict[str, torch.Tensor]] = {}
    for key, tensor in tensors.items():
        module, part = _split_key(folder, key)
        parts.setdefault(module, {})[part] = tensor
    scale = scale_of(config)
    return {f"{module}.weight": _delta(folder, module, found, scale) for module, found in sorted(parts.items())}


def scale_of(config: Mapping[str, Any]) -> float:
    """alpha / rank, or alpha / sqrt(rank) for rank-stabilised LoRA (arXiv:2312.03732)."""
    rank = config["r"]
    return float(config["lora_alpha"] / (math.sqrt(rank) if config.get("use_rslora") else rank))


def tuned_blocks(weight_OI: torch.Tensor, delta: Delta | None) -> Iterator[tuple[slice, torch.Tensor]]:
    """Blocks of rows of the exact tuned weight, float64, in order: W + s*B*A, with DoRA scaled to the magnitude.

    Without a delta the weight itself. DoRA: m * (W + s*B*A) / row norm (arXiv:2402.09353, equation 5; in PEFT
    tuners/lora/dora.py the norm is that of the same sum).
    """
    rows = max(1, ELEMENTS_AT_ONCE // weight_OI.shape[1])
    a_RI = delta.a_RI.double() if delta else weight_OI.new_empty(0)
    for start in range(0, weight_OI.shape[0], rows):
        block = slice(start, min(start + rows, weight_OI.shape[0]))
        tuned = weight_OI[block].double()
        if delta is not None:
            tuned += delta.scale * (delta.b_OR[block].double() @ a_RI)
            if delta.magnitude_O is not None:
                tuned *= (delta.magnitude_O[block].double() / tuned.norm(dim=1))[:, None]
        yield block, tuned


def round_tuned(weight_OI: torch.Tensor, delta: Delta | None, *, dtype: torch.dtype) -> torch.Tensor:
    """The tuned weight, each element rounded once from float64 to its nearest value in `dtype`."""
    rounded = torch.empty(weight_OI.shape, dtype=dtype)
    for block, tuned in tuned_blocks(weight_OI, delta):
        rounded[block] = round_to(tuned, dtype)
    return rounded


def round_to(values: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """float64 values rounded to `dtype`; to 16 bits through float32, which moves a tie by 2^-13 of a step at most."""
    return values.float().to(dtype)


@dataclass(frozen=True)
class Onto:
    """Which values of the base the delta is added to: `original` as stored, `dequantized` as the run computed with."""

    name: str
    quantization: str
    dtype: torch.dtype  # the run's compute dtype, in which quantised weights become values again
    device: str

    def weight(self, stored_OI: torch.Tensor) -> torch.Tensor:
        """A linear's weight as the delta meets it."""
        if self.name == "original" or self.quantization == "none":
            return stored_OI
        on_device = stored_OI.to(self.device)  # the same arithmetic as at training, where it can be had
        return dequantize_like_base(on_device, quantization=self.quantization, dtype=self.dtype).cpu()


def _refuse_what_cannot_be_merged(folder: Path, config: Mapping[str, Any]) -> None:
    odd = [key for key, plain in PLAIN.items() if config.get(key, plain) != plain]
    odd += [key for key in FALSY if config.get(key)]
    if not isinstance(config.get("init_lora_weights", True), bool) and config["init_lora_weights"] != "gaussian":
        odd.append("init_lora_weights")  # PiSSA and its kin move a part of the base into the adapter
    cure = "cannot be merged exactly; merge it with the tool that made it, or train without it"
    raise_problems(Problem(f"{folder}: {key}", f"{config.get(key)!r} {cure}") for key in odd)


def _split_key(folder: Path, key: str) -> tuple[str, str]:
    for part in ("lora_A", "lora_B", MAGNITUDE):
        head, found, tail = key.removeprefix(PREFIX).rpartition(f".{part}")
        if found and tail in {"", ".weight"}:
            return head, part
    raise UserError(Problem(str(folder), f"holds {key}, which is no part of a LoRA; it cannot be merged"))


def _delta(folder: Path, module: str, parts: Mapping[str, torch.Tensor], scale: float) -> Delta:
    missing = [part for part in ("lora_A", "lora_B") if part not in parts]
    if missing:
        raise StorageError(Problem(str(folder), f"{module}: {missing[0]} is missing; the adapter is incomplete"))
    if not all(torch.isfinite(tensor).all() for tensor in parts.values()):
        raise StorageError(
            Problem(str(folder), f"{module}: holds values that are not finite; take an earlier checkpoint")
        )
    return Delta(parts["lora_A"], parts["lora_B"], parts.get(MAGNITUDE), scale)
