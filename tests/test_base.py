"""A base folder that is not whole: every part that is missing or damaged is told with its place."""

from __future__ import annotations

import json
import shutil
import struct
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from finetune.base import convert_tokenizer, read_base
from finetune.errors import StorageError, UserError
from tests.conftest import POCKET


def header(entries: object) -> bytes:
    """A safetensors file that is all header."""
    text = json.dumps(entries).encode()
    return struct.pack("<Q", len(text)) + text


# file -> what is written in its place (None: deleted), and what is told
DAMAGES: dict[str, tuple[str, bytes | None, str]] = {
    "no config": ("config.json", None, "not a base folder: it has no config.json"),
    "config cut off": ("config.json", b'{"model_type": ', "config.json: invalid JSON"),
    "config is a list": ("config.json", b"[]", "config.json: must hold a JSON object, got list"),
    "config of no language model": (
        "config.json",
        b'{"hidden_size": 3}',
        "not the config of a language model: num_hidden_layers, vocab_size is missing",
    ),
    "no weights": ("model.safetensors", None, "no weights: model.safetensors is missing; put the base's"),
    "weights empty": ("model.safetensors", b"", "model.safetensors: damaged or incomplete weights"),
    "weights without a tensor": ("model.safetensors", header({}), "damaged or incomplete weights"),
    "weights that are text": ("model.safetensors", b"<!DOCTYPE html>" * 9, "the header is longer than the file"),
    "weights with a strange header": ("model.safetensors", header([1]), "damaged or incomplete weights"),
    "weights of an unknown type": (
        "model.safetensors",
        header({"x": {"dtype": "F3", "shape": [1], "data_offsets": [0, 0]}}),
        "unknown element type F3",
    ),
    "index without a map": ("model.safetensors.index.json", b"{}", "index.json: holds no weight_map"),
    "a shard is missing": (
        "model.safetensors.index.json", b'{"weight_map": {"x": "part-2.safetensors"}}', "part-2.safetensors is missing"
    ),
    "no tokenizer": ("tokenizer.json", None, "no tokenizer: neither tokenizer.json nor tokenizer.model is there"),
    "tokenizer cut off": ("tokenizer.json", b'{"model": ', "tokenizer.json: the tokenizer cannot be read"),
    "no tokenizer settings": ("tokenizer_config.json", None, "tokenizer_config.json is missing"),
}  # fmt: skip


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_base_is_told(tmp_path: Path, damage: str) -> None:
    name, written, told = DAMAGES[damage]
    folder = tmp_path / "base"
    shutil.copytree(POCKET, folder)
    if written is None:
        (folder / name).unlink()
    else:
        (folder / name).write_bytes(written)
    with pytest.raises((UserError, StorageError)) as caught:
        assert read_base(str(folder)).tokenizer  # read when it is first asked for
    (problem,) = caught.value.problems
    assert problem.where.startswith(str(folder))
    assert told in str(problem)


def test_a_pickle_is_named_and_never_opened(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "pytorch_model.bin").write_bytes(b"x")
    with pytest.raises(UserError, match=r"pytorch_model.bin is a pickle, which is never opened"):
        read_base(str(tmp_path))


@pytest.mark.parametrize("name", ["builtin:nothing", "builtin:", "builtin:x/pocket-llama"])
def test_an_unknown_builtin_is_told_with_the_known_ones(name: str) -> None:
    with pytest.raises(UserError, match="there are: builtin:pocket-llama"):
        read_base(name)


def test_pocket_llama_is_read_without_its_weights() -> None:
    facts = read_base("builtin:pocket-llama").facts
    assert facts.parameters * 2 == facts.stored_bytes
    assert facts.stored_bytes < (POCKET / "model.safetensors").stat().st_size
    assert {shape.leaf for shape in facts.linears} == {
        "q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"
    }  # fmt: skip


@pytest.mark.real
@pytest.mark.parametrize("name", ["llama2", "mistral", "llama3.2-instruct"])
def test_a_converted_tokenizer_stays_the_same_when_it_is_loaded_again(shared: Path, tmp_path: Path, name: str) -> None:
    source = shared / "tokenizers" / name
    convert_tokenizer(source, tmp_path)
    original, again = AutoTokenizer.from_pretrained(source), AutoTokenizer.from_pretrained(tmp_path)
    for text in ("<s>[INST] a </s>", "<|eot_id|>x", " two  spaces\n", "[INST]é 日本 👩‍👩‍👧[/INST]"):
        for special in (True, False):
            ids = again(text, add_special_tokens=special).input_ids
            assert ids == original(text, add_special_tokens=special).input_ids
            assert again.decode(ids) == original.decode(ids)
    assert (again.bos_token, again.eos_token, len(again)) == (original.bos_token, original.eos_token, len(original))
