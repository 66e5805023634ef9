"""Bases as text sees them: pocket-llama, and real tokenizers beside a weight file that holds next to nothing."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from finetune.base import TOKENIZER_FILES, Base, read_base
from finetune.data.encoder import Encoder
from finetune.data.examples import Rules, TracedExample, label
from finetune.data.rows import Conversation, Row, Turn
from finetune.data.template import Template, choose_template
from tests.conftest import POCKET

DATE = "26 Jul 2024"


@pytest.fixture(scope="session")
def pocket() -> Base:
    return read_base("builtin:pocket-llama")


@pytest.fixture(scope="session")
def alpaca(pocket: Base) -> Template:
    return choose_template("alpaca", pocket, date=DATE)


@pytest.fixture(scope="session")
def real_base(shared: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Base]:
    """A base that carries one of the real tokenizers, by its folder's name."""
    known: dict[str, Base] = {}

    def get(name: str) -> Base:
        if name not in known:
            known[name] = base_around(shared / "tokenizers" / name, tmp_path_factory.mktemp("base") / name)
        return known[name]

    return get


@pytest.fixture(scope="session")
def oracle(shared: Path) -> Callable[[str], PreTrainedTokenizerBase]:
    """A tokenizer as transformers loads it from the original files, once."""
    known: dict[str, PreTrainedTokenizerBase] = {}

    def get(name: str) -> PreTrainedTokenizerBase:
        if name not in known:
            known[name] = AutoTokenizer.from_pretrained(POCKET if name == "pocket" else shared / "tokenizers" / name)
        return known[name]

    return get


def base_around(tokenizer: Path, folder: Path, *, vocabulary: int = 200_000) -> Base:
    """A base with the tokenizer of another folder; its only tensor is one number."""
    folder.mkdir()
    config = {"model_type": "llama", "num_hidden_layers": 1, "hidden_size": 32, "vocab_size": vocabulary}
    (folder / "config.json").write_text(json.dumps(config))
    save_file({"model.embed_tokens.weight": np.zeros((1, 1), np.float32)}, folder / "model.safetensors")
    for name in TOKENIZER_FILES:
        if (tokenizer / name).is_file():
            shutil.copyfile(tokenizer / name, folder / name)
    return read_base(str(folder))


def conversation(*texts: str, system: str | None = None, line: int = 1, train: Sequence[bool] = ()) -> Conversation:
    """User and assistant in turn, after a system turn if there is one; `train` says which answers are learned."""
    trained = [*train, *[True] * (len(texts) // 2 - len(train))]
    turns = [
        Turn("assistant", text, trained[index // 2]) if index % 2 else Turn("user", text)
        for index, text in enumerate(texts)
    ]
    before = [Turn("system", system)] if system is not None else []
    return Conversation((*before, *turns), Row({}, "rows.jsonl", line))


def example_of(
    whole: Conversation, base: Base, template: Template, *, loss_on: str = "assistant", **rules: Any
) -> TracedExample:
    """The example of one conversation, which must not be refused."""
    (traced,) = label([whole], template, Encoder(base), Rules(loss_on, **{"max_tokens": 100_000} | rules))
    assert isinstance(traced, TracedExample), traced
    return traced
