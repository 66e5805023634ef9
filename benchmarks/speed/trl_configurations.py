"""Ways to set TRL's SFTTrainer for eight examples a step; the fastest of them is looked for, not assumed.

Packs hold about as many tokens a step as eight Alpaca rows have, so that a step stays about eight examples. `base` is
how the model is loaded; everything else goes to SFTConfig.
"""

from __future__ import annotations

from typing import Any

FREE = {"gradient_checkpointing": False}
CONFIGURATIONS: dict[str, dict[str, Any]] = {
    "defaults": {"per_device_train_batch_size": 8},
    "no checkpointing": {"per_device_train_batch_size": 8, **FREE},
    "no checkpointing, eager attention": {"per_device_train_batch_size": 8, **FREE, "base": {"attention": "eager"}},
    "4 rows x 2": {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2, **FREE},
    "2 rows x 4": {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 4, **FREE},
    "1 row x 8": {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 8, **FREE},
    "rows grouped by length": {
        "per_device_train_batch_size": 8, "train_sampling_strategy": "group_by_length", **FREE,
    },
    "padding-free": {"per_device_train_batch_size": 8, "padding_free": True, "max_length": None, **FREE},
    "padding-free, eager attention": {
        "per_device_train_batch_size": 8, "padding_free": True, "max_length": None, **FREE,
        "base": {"attention": "eager"},
    },
    "packs of 512 x 4": {"per_device_train_batch_size": 4, "packing": True, "max_length": 512, **FREE},
    "packs of 1,024 x 2": {"per_device_train_batch_size": 2, "packing": True, "max_length": 1024, **FREE},
    "packs of 2,048": {"per_device_train_batch_size": 1, "packing": True, "max_length": 2048, **FREE},
    "no autocast": {"per_device_train_batch_size": 8, "bf16": False, **FREE},
    "1 row x 8, no autocast": {
        "per_device_train_batch_size": 1, "gradient_accumulation_steps": 8, "bf16": False, **FREE,
    },
    "packs of 1,024 x 2, no autocast": {
        "per_device_train_batch_size": 2, "packing": True, "max_length": 1024, "bf16": False, **FREE,
    },
    "float32": {"per_device_train_batch_size": 8, "bf16": False, **FREE, "base": {"dtype": "float32"}},
    "packs of 2,048, compiled": {
        "per_device_train_batch_size": 1, "packing": True, "max_length": 2048, "torch_compile": True, **FREE,
    },
}  # fmt: skip
