"""What happens without this package's care: the libraries' own calls on the same hostile files. Attacks run here."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

PICKLES = ("*.bin", "*.pth", "*.pt", "*.ckpt", "*.h5", "*.safetensors", "*.pkl", "*.jsonl", "*.parquet", "*.gguf")


def torch_load(folder: Path) -> None:
    import torch

    for file in sorted(file for pattern in PICKLES for file in folder.glob(pattern) if not file.is_symlink()):
        try:
            torch.load(file, weights_only=False)
        except Exception:  # noqa: S112  after it ran
            continue


def auto_config(folder: Path) -> None:
    from transformers import AutoConfig

    AutoConfig.from_pretrained(str(folder), trust_remote_code=True)


def auto_tokenizer(folder: Path) -> None:
    from transformers import AutoTokenizer

    AutoTokenizer.from_pretrained(str(folder), trust_remote_code=True)


def auto_processor(folder: Path) -> None:
    from transformers import AutoProcessor

    AutoProcessor.from_pretrained(str(folder), trust_remote_code=True)


def python_c(folder: Path) -> None:
    name = next(file.stem for file in folder.glob("*.py"))
    subprocess.run([sys.executable, "-c", f"import {name}"], cwd=folder, capture_output=True, check=False)


def yaml_unsafe(folder: Path) -> None:
    import yaml

    yaml.unsafe_load((folder / "r.yaml").read_text())


def template(source: str) -> str:
    """A chat template in plain Jinja."""
    import jinja2

    return jinja2.Environment().from_string(source).render(messages=[{"role": "user", "content": "x"}], os_name=os.name)
