"""A GGUF file becomes the base that it was made from: its weights, config and token ids."""

from __future__ import annotations

import json
import random
import shutil
from contextlib import suppress
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
from gguf import GGUFReader, GGUFWriter, quants
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, Qwen2Config, Qwen2ForCausalLM

from finetune.base import find_base_folder, load_tokenizer, read_base
from finetune.errors import FinetuneError, StorageError, UserError
from finetune.release.gguf.read import unpermute_rows
from finetune.release.gguf.read_vocabulary import tokenizer_files
from finetune.release.gguf.vocabulary import Tokenizer, tokenizer_fields
from finetune.release.gguf.write import write_gguf
from finetune.unquantise.convert import make_folder, read_unquantised
from tests.conftest import POCKET, make_tiny_base
from tests.release.models import make_base
from tests.release.test_gguf import LLAMA3_ROPE, make_model

TEXTS = (
    "The red fox, 1234 pears!",
    "  two  spaces\n\n\tand a tab",
    "Straße naïve 日本語 👩‍👩‍👧 e\u0301",
    "a<|end|>b<tool>c</s>",
    "",
)


def write(folder: Path, file: Path, quant: str, stops: tuple[int, ...] = (1,)) -> Path:
    write_gguf(folder, file, quant=quant, chat_template=None, stop_token_ids=list(stops), name="tiny")
    return file


def weights_of(path: Path) -> dict[str, torch.Tensor]:
    return {tensor.name: tensor.read() for tensor in read_unquantised(path).tensors}


def logits_of(folder: Path) -> torch.Tensor:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with torch.no_grad():
        return model(torch.arange(3, 103)[None]).logits


@pytest.mark.parametrize(
    "kind", ["llama", "llama, tied", "llama, biases", "mistral", "qwen2", "qwen3", "gemma2", "gemma3"]
)
def test_every_family_comes_back_bit_by_bit(kind: str, tmp_path: Path) -> None:
    if kind == "qwen2":  # whose tokenizer adds <|endoftext|>
        base = make_model(tmp_path / "base", classes=(Qwen2Config, Qwen2ForCausalLM), vocab_size=513)
        AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16).save_pretrained(base)
    else:
        base = make_base(tmp_path / "base", kind, dtype="bfloat16")
    file = write(base, tmp_path / "m.gguf", "bf16")
    found = weights_of(file)
    stored = load_file(base / "model.safetensors")
    assert found.keys() == stored.keys()
    for name, weight in stored.items():
        if weight.dtype == torch.bfloat16 and "norm" in name and kind.startswith("gemma"):
            # Stored with one added, in float32, as llama.cpp has it.
            torch.testing.assert_close(found[name], weight, rtol=2**-8, atol=2**-24, msg=name)
        else:
            assert torch.equal(found[name], weight), name
    if kind != "mistral":  # whose window a file does not hold
        make_folder("weights", read_unquantised(file), tmp_path / "made", {})
        torch.testing.assert_close(logits_of(tmp_path / "made"), logits_of(base), rtol=0, atol=1e-5)


@pytest.mark.parametrize("quant", ["f16", "q8_0", "q4_k_m"])
def test_blocks_are_decoded_as_transformers_does(quant: str, tmp_path: Path) -> None:
    base = make_model(tmp_path / "base", rope_parameters=LLAMA3_ROPE, tie_word_embeddings=True)
    file = write(base, tmp_path / "m.gguf", quant)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file=file.name, dtype=torch.float32)
    parameters = dict(theirs.named_parameters())
    found = weights_of(file)
    assert found.keys() == parameters.keys()
    for name, weight in parameters.items():
        assert torch.equal(found[name], weight.to(torch.float16)), name
    config = read_unquantised(file).config
    assert config["rope_parameters"] == LLAMA3_ROPE
    assert config["tie_word_embeddings"]
    assert config["dtype"] == "float16"


def test_q8_0_is_its_closed_formula(tmp_path: Path) -> None:
    base = make_tiny_base(tmp_path / "base", dtype="bfloat16")
    file = write(base, tmp_path / "m.gguf", "q8_0")
    raw = next(tensor for tensor in GGUFReader(file).tensors if tensor.name == "blk.1.attn_k.weight")
    blocks = np.asarray(raw.data).reshape(-1, 34)
    scales = np.ascontiguousarray(blocks[:, :2]).view(np.float16).astype(np.float32)
    rows = (blocks[:, 2:].view(np.int8) * scales).reshape(32, 64)
    order = [head * 16 + 2 * (row % 8) + row // 8 for head in range(2) for row in range(16)]  # row i lies at 2i
    wanted = torch.from_numpy(rows[order]).to(torch.float16)
    assert torch.equal(weights_of(file)["model.layers.1.self_attn.k_proj.weight"], wanted)


def test_rows_that_rotate_together_are_parted_again() -> None:
    rows = np.arange(8)[:, None]
    assert unpermute_rows(rows, 2)[:, 0].tolist() == [0, 2, 1, 3, 4, 6, 5, 7]


def test_the_embedded_bases_ids_are_the_same(tmp_path: Path) -> None:
    file = write(POCKET, tmp_path / "m.gguf", "f16")
    ours, base = read_base(str(file)), read_base("builtin:pocket-llama")
    assert ours.tokenizer_folder == ours.facts.folder
    for text in TEXTS:
        for special in (True, False):
            wanted = base.tokenizer.encode(text, add_special_tokens=special).ids
            assert ours.tokenizer.encode(text, add_special_tokens=special).ids == wanted, text
    assert ours.special_tokens == base.special_tokens
    assert (ours.bos_token, ours.eos_token) == (base.bos_token, base.eos_token)
    ids = base.tokenizer.encode(TEXTS[2]).ids
    assert ours.tokenizer.decode(ids) == base.tokenizer.decode(ids)


def test_llama_3s_tokenizer_gives_the_same_ids(shared: Path, tmp_path: Path) -> None:
    source = read_tokenizer_of(shared / "tokenizers" / "llama3.2-instruct", tmp_path / "base")
    same_ids(source, header_of(source, "llama"), shared, tmp_path)


def test_gemmas_kind_gives_the_same_ids(shared: Path, tmp_path: Path) -> None:
    """Llama 2's vocabulary in a tokenizer that, as Gemma's, puts no space before text."""
    source = read_tokenizer_of(shared / "tokenizers" / "llama2", tmp_path / "base")
    stored = json.loads((source / "tokenizer.json").read_text(encoding="utf-8")) | {"pre_tokenizer": None}
    stored["normalizer"] = {"type": "Replace", "pattern": {"String": " "}, "content": "\u2581"}
    stored["decoder"]["decoders"].pop()  # what takes the first space off
    tool = stored["added_tokens"][-1] | {"id": len(stored["model"]["vocab"]), "content": "<tool>", "special": False}
    stored["added_tokens"].append(tool | {"normalized": False})
    target = tmp_path / "never"
    shutil.copytree(source, target)
    (target / "tokenizer.json").write_text(json.dumps(stored), encoding="utf-8")
    same_ids(target, header_of(target, "gemma2"), shared, tmp_path)
    with pytest.raises(UserError, match="where its tokenizer puts spaces"):
        tokenizer_files(tmp_path / "m.gguf", header_of(source, "llama"))


def read_tokenizer_of(source: Path, folder: Path) -> Path:
    """A tokenizer in tokenizer.json form, as a base of its own."""
    make_tiny_base(folder, dtype="float32")
    for file in POCKET.glob("*token*"):
        (folder / file.name).unlink(missing_ok=True)
    for file in source.iterdir():
        shutil.copyfile(file, folder / file.name)
    return read_base(str(folder)).tokenizer_folder


def same_ids(source: Path, fields: dict, shared: Path, tmp_path: Path) -> None:
    wanted = load_tokenizer(source / "tokenizer.json")
    target = tmp_path / "back"
    target.mkdir()
    for name, text in tokenizer_files(tmp_path / "m.gguf", fields).items():
        (target / name).write_text(text, encoding="utf-8")
    found = load_tokenizer(target / "tokenizer.json")
    assert found.get_vocab() == wanted.get_vocab()
    files = [file for part in ("alpaca", "chat", "questions", "text") for file in sorted((shared / part).iterdir())]
    lines = [line for file in files if file.suffix != ".xz" for line in head(file)]
    assert len(lines) > 80
    spaces = [f"a{' ' * count}b{chr(10) * count}" for count in range(1, 40)]
    for text in [*TEXTS, *spaces, *lines]:
        assert found.encode(text).ids == wanted.encode(text).ids, text
        ids = wanted.encode(text).ids
        assert found.decode(ids) == wanted.decode(ids)


def head(file: Path) -> list[str]:
    with file.open(encoding="utf-8") as stream:
        return [line[:1000] for line in islice(stream, 20)]


def header_of(source: Path, architecture: str) -> dict:
    """The tokenizer's header fields as a file without a chat template has them."""
    settings = json.loads((source / "tokenizer_config.json").read_text(encoding="utf-8"))
    named = {name: settings.get(f"{name}_token") for name in ("bos", "eos", "unk", "pad")}
    special = {name: text["content"] if isinstance(text, dict) else text for name, text in named.items() if text}
    tokenizer = Tokenizer(source, json.loads((source / "tokenizer.json").read_text(encoding="utf-8")), special)
    rows = max(tokenizer.ids.values()) + 1
    fields = tokenizer_fields(tokenizer, rows=rows, chat_template=None, stop_token_ids=[])
    return fields | {"general.architecture": architecture}


def test_a_tokenizer_beside_the_file_takes_its_place(tmp_path: Path) -> None:
    file = write(POCKET, tmp_path / "m.gguf", "f16")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(POCKET / name, tmp_path / name)
    found = read_unquantised(file)
    assert {path.name for path in found.copied} == {"tokenizer.json", "tokenizer_config.json"}
    assert "tokenizer.json" not in found.written
    stored = json.loads((POCKET / "tokenizer.json").read_text(encoding="utf-8"))
    vocabulary = stored["model"]["vocab"]
    (a, first), (b, second) = [(text, number) for text, number in vocabulary.items() if 1000 < number < 1003][:2]
    vocabulary |= {a: second, b: first}
    (tmp_path / "tokenizer.json").write_text(json.dumps(stored), encoding="utf-8")
    with pytest.raises(UserError, match="has another id, or none"):
        read_unquantised(file)


def rewritten(file: Path, target: Path, **changed: object) -> Path:
    """The file with other header fields (None: left out), its tensors as they are."""
    reader = GGUFReader(file)
    fields = {name: field.contents() for name, field in reader.fields.items() if not name.startswith("GGUF.")}
    fields |= {name.replace("__", "."): value for name, value in changed.items()}
    writer = GGUFWriter(target, str(fields.pop("general.architecture")))
    add = {bool: writer.add_bool, int: writer.add_uint32, float: writer.add_float32, str: writer.add_string}
    for name, value in fields.items():
        if value is not None:
            (writer.add_array if isinstance(value, list) else add[type(value)])(name, value)
    for tensor in reader.tensors:
        writer.add_tensor(tensor.name, np.array(tensor.data), raw_dtype=tensor.tensor_type)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return target


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"general__architecture": "falcon"}, "a GGUF file of 'falcon' is not read"),
        ({"llama__expert_count": 8}, "a mixture of 8 experts"),
        ({"llama__rope__scaling__type": "longrope"}, "rope scaling 'longrope'"),
        ({"llama__rope__dimension_count": 8}, "rotates a part of each head"),
        ({"tokenizer__ggml__pre": "tekken"}, "put the tokenizer of its base"),
        ({"tokenizer__ggml__model": "t5"}, "read are 'gpt2' and 'llama'"),
        ({"tokenizer__ggml__tokens": None}, "holds no tokenizer"),
    ],
)
def test_what_is_not_read_is_refused(changed: dict, message: str, tmp_path: Path) -> None:
    file = write(make_tiny_base(tmp_path / "base", dtype="bfloat16"), tmp_path / "m.gguf", "bf16")
    with pytest.raises(UserError, match=message):
        read_unquantised(rewritten(file, tmp_path / "other.gguf", **changed))


def test_a_damaged_file_is_told(tmp_path: Path) -> None:
    base = make_tiny_base(tmp_path / "base", dtype="bfloat16")
    file = write(base, tmp_path / "m.gguf", "bf16")
    content = file.read_bytes()
    for place, damaged in {"short": content[:5000], "tensors": content[:-40000], "magic": b"GG" + content}.items():
        other = tmp_path / f"{place}.gguf"
        other.write_bytes(damaged)
        with pytest.raises(StorageError, match="damaged or no GGUF file"):
            read_unquantised(other)
    with pytest.raises(StorageError, match="missing, so that there is no"):
        read_unquantised(rewritten(file, tmp_path / "deeper.gguf", llama__block_count=3))


def test_any_header_is_read_or_refused(tmp_path: Path) -> None:
    file = write(make_model(tmp_path / "base", hidden_size=32, intermediate_size=32), tmp_path / "m.gguf", "bf16")
    content, chance = file.read_bytes(), random.Random(5)
    end = content.index(b"token_embd.weight") + 400
    for _ in range(60):
        damaged = bytearray(content)
        for _ in range(chance.randint(1, 3)):
            damaged[chance.randrange(8, end if chance.random() < 0.5 else 1200)] = chance.randrange(256)
        file.write_bytes(damaged)
        with suppress(FinetuneError):
            read_unquantised(file)


def test_two_files_in_a_folder_are_no_base(tmp_path: Path) -> None:
    for name in ("a.gguf", "b.gguf"):
        (tmp_path / name).touch()
    with pytest.raises(UserError, match="holds 2 .gguf files"):
        find_base_folder(str(tmp_path))


def test_every_type_that_can_be_decoded_is_known() -> None:
    assert {"Q2_K", "Q3_K", "Q5_K", "Q6_K", "IQ4_XS", "BF16"} <= {kind.name for kind in quants._type_traits}
