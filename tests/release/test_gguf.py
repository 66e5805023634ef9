"""One GGUF file: what its header says, that transformers reads the same model, and that the proofs see damage."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from gguf import GGUFReader, TokenType
from safetensors.torch import load_file, save_file
from transformers import (
    AutoTokenizer,
    Gemma2Config,
    Gemma2ForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from finetune.base import load_tokenizer
from finetune.errors import StorageError, UserError
from finetune.release.gguf.architecture import permute_rows, read_model
from finetune.release.gguf.ids import FileTokenizer
from finetune.release.gguf.mix import QUANTS
from finetune.release.gguf.prove import PLAIN_PROBES, prove_gguf
from finetune.release.gguf.vocabulary import read_tokenizer, tokenizer_fields
from finetune.release.gguf.write import weight_bytes, write_gguf
from tests.conftest import POCKET

TEMPLATE = "{{ bos_token }}{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}assistant:"
CHAT = "<s>user: Who are you?\nassistant:"
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 32.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
TOKENS = 512


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A random LLaMA with rows of 256 and 512, grouped queries, tied embeddings and Llama 3's rotary scaling."""
    return make_model(tmp_path_factory.mktemp("gguf") / "model", tie_word_embeddings=True, rope_parameters=LLAMA3_ROPE)


def make_model(folder: Path, *, classes: tuple = (LlamaConfig, LlamaForCausalLM), **settings: object) -> Path:
    sizes = {"hidden_size": 256, "intermediate_size": 512, "num_attention_heads": 4, "num_key_value_heads": 2}
    sizes |= {"num_hidden_layers": 4, "vocab_size": TOKENS, "max_position_embeddings": 256}
    config = classes[0](**(sizes | {"bos_token_id": 0, "eos_token_id": 1, "initializer_range": 0.08} | settings))
    torch.manual_seed(0)
    model = classes[1](config)
    for name, weight in model.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.normal_(weight, std=0.3)
    model.save_pretrained(folder)
    short_tokenizer(folder)
    return folder


def short_tokenizer(folder: Path) -> None:
    """The first tokens of pocket-llama's byte-level BPE."""
    stored = json.loads((POCKET / "tokenizer.json").read_text(encoding="utf-8"))
    vocabulary = {text: token_id for text, token_id in stored["model"]["vocab"].items() if token_id < TOKENS}
    pairs = [pair for pair in stored["model"]["merges"] if "".join(pair) in vocabulary]
    stored["model"] |= {"vocab": vocabulary, "merges": pairs}
    (folder / "tokenizer.json").write_text(json.dumps(stored), encoding="utf-8")
    shutil.copyfile(POCKET / "tokenizer_config.json", folder / "tokenizer_config.json")


def write(folder: Path, target: Path, *, quant: str = "q4_k_m", **changed: object) -> Path:
    settings = {"chat_template": TEMPLATE, "stop_token_ids": [1], "name": "tiny"} | changed
    write_gguf(folder, target, quant=quant, **settings)
    return target


def failed(file: Path, folder: Path, *, quant: str = "q4_k_m", **changed: object) -> list[str]:
    settings = {"chat_template": TEMPLATE, "stop_token_ids": [1], "name": "tiny", "chat_texts": [CHAT]} | changed
    return [found.name for found in prove_gguf(file, folder, quant=quant, **settings) if not found.passed]


@pytest.mark.parametrize("quant", QUANTS)
def test_every_quantisation_is_proven(folder, tmp_path, quant):
    file = write(folder, tmp_path / "m.gguf", quant=quant)
    proofs = {
        found.name: found
        for found in prove_gguf(
            file, folder, quant=quant, chat_template=TEMPLATE, stop_token_ids=[1], name="tiny", chat_texts=[CHAT]
        )
    }
    assert all(found.passed for found in proofs.values())
    assert proofs["logits as transformers reads the file"].value < 1e-4
    assert proofs["rotary frequencies, largest relative difference"].value < 1e-6


@pytest.mark.parametrize(
    "settings",
    [
        {"tie_word_embeddings": False, "num_key_value_heads": 4, "attention_bias": True, "mlp_bias": True},
        {"head_dim": 32, "rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0}},
        {"hidden_size": 64, "intermediate_size": 172, "dtype": torch.bfloat16},
        {"classes": (Qwen2Config, Qwen2ForCausalLM), "vocab_size": TOKENS + 1},  # its tokenizer adds <|endoftext|>
        {"classes": (Gemma2Config, Gemma2ForCausalLM), "head_dim": 64, "query_pre_attn_scalar": 64},
    ],
    ids=["multi-head with biases", "narrow heads", "rows of no multiple of 32", "qwen2", "gemma2"],
)
def test_other_shapes_are_proven(tmp_path, settings):
    folder = make_model(tmp_path / "model", **settings)
    assert failed(write(folder, tmp_path / "m.gguf"), folder) == []


def test_the_embedded_base_and_stories_are_proven(tmp_path, shared):
    for folder, stop in ((POCKET, 1), (shared / "weights" / "stories260K", 2)):
        settings = {"chat_template": None, "stop_token_ids": [stop], "chat_texts": ()}
        changed = {key: value for key, value in settings.items() if key != "chat_texts"}
        assert failed(write(folder, tmp_path / "m.gguf", **changed), folder, **settings) == []


def test_header_says_what_config_and_tokenizer_say(folder, tmp_path):
    reader = GGUFReader(write(folder, tmp_path / "m.gguf"))
    fields = {key: field.contents() for key, field in reader.fields.items()}
    config = json.loads((folder / "config.json").read_text())
    expected = {
        "general.architecture": "llama",
        "general.name": "tiny",
        "general.file_type": 15,
        "llama.block_count": config["num_hidden_layers"],
        "llama.context_length": config["max_position_embeddings"],
        "llama.embedding_length": config["hidden_size"],
        "llama.feed_forward_length": config["intermediate_size"],
        "llama.attention.head_count": config["num_attention_heads"],
        "llama.attention.head_count_kv": config["num_key_value_heads"],
        "llama.rope.dimension_count": 64,
        "llama.rope.freq_base": 500000.0,
        "llama.vocab_size": TOKENS,
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "gpt-2",
        "tokenizer.ggml.bos_token_id": 0,
        "tokenizer.ggml.eos_token_id": 1,
        "tokenizer.ggml.add_bos_token": False,
        "tokenizer.chat_template": TEMPLATE,
    }
    assert {key: fields[key] for key in expected} == expected
    assert len(reader.tensors) == 2 + 4 * 9 + 1  # embedding and last norm; layers; rotary factors; tied: no output


def test_size_is_known_before_writing(folder, tmp_path):
    for quant in ("f16", "q4_k_m"):
        size = write(folder, tmp_path / "m.gguf", quant=quant).stat().st_size
        assert 0 < size - weight_bytes(folder, quant) < 50_000  # the header, with 512 tokens


def test_rows_without_a_token_are_marked_unused(folder):
    tokenizer = read_tokenizer(folder)
    fields = tokenizer_fields(tokenizer, rows=TOKENS + 2, chat_template=None, stop_token_ids=[])
    assert fields["tokenizer.ggml.tokens"][-2:] == ["[PAD512]", "[PAD513]"]
    assert fields["tokenizer.ggml.token_type"][-3:] == [TokenType.NORMAL, TokenType.UNUSED, TokenType.UNUSED]
    with pytest.raises(UserError, match="holds id 511, the embedding has 500 rows"):
        tokenizer_fields(tokenizer, rows=500, chat_template=None, stop_token_ids=[])


def test_a_tokenizer_that_composes_text_is_written_with_a_note(folder, tmp_path):
    copy = copy_of(folder, tmp_path)
    stored = json.loads((copy / "tokenizer.json").read_text(encoding="utf-8")) | {"normalizer": {"type": "NFC"}}
    (copy / "tokenizer.json").write_text(json.dumps(stored), encoding="utf-8")
    settings = {"chat_template": None, "stop_token_ids": [1], "name": "tiny"}
    report = write_gguf(copy, tmp_path / "m.gguf", quant="q8_0", **settings)
    assert [note for note in report.notes if "NFC" in note]
    assert failed(report.file, copy, quant="q8_0", chat_template=None, chat_texts=["e\u0301"]) == []


def test_several_stop_tokens_are_all_named(folder):
    tokenizer = read_tokenizer(folder)
    fields = tokenizer_fields(tokenizer, rows=TOKENS, chat_template=None, stop_token_ids=[7, 1, 9])
    assert [fields[f"tokenizer.ggml.{name}_token_id"] for name in ("eos", "eot", "eom")] == [1, 7, 9]
    with pytest.raises(UserError, match="three at most"):
        tokenizer_fields(tokenizer, rows=TOKENS, chat_template=None, stop_token_ids=[1, 2, 3, 4])


@pytest.mark.parametrize(("writes_bos", "adds_bos"), [(True, True), (False, False)])
def test_bos_is_added_only_where_a_chat_has_it(shared, tmp_path, writes_bos, adds_bos):
    """llama.cpp takes off the bos that a template wrote before it adds one; a template without one is left alone."""
    template = TEMPLATE if writes_bos else TEMPLATE.removeprefix("{{ bos_token }}")
    tokenizer = read_tokenizer(shared / "weights" / "stories260K")
    fields = tokenizer_fields(tokenizer, rows=512, chat_template=template, stop_token_ids=[2])
    assert tokenizer.adds_bos
    assert fields["tokenizer.ggml.add_bos_token"] is adds_bos
    text = CHAT if writes_bos else CHAT.removeprefix("<s>")
    reference = load_tokenizer(tokenizer.folder / "tokenizer.json")
    assert FileTokenizer(fields).encode_chat(text) == reference.encode(text, add_special_tokens=False).ids


@pytest.mark.real
@pytest.mark.parametrize(("name", "rows"), [("llama2", 32000), ("mistral", 32768), ("llama3.2-instruct", 128256)])
def test_published_tokenizers_keep_their_ids(shared, tmp_path, name, rows):
    folder = tmp_path / name
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_attention_heads": 2, "num_key_value_heads": 1}
    LlamaForCausalLM(LlamaConfig(**sizes, num_hidden_layers=1, vocab_size=rows)).save_pretrained(folder)
    for file in (shared / "tokenizers" / name).iterdir():
        shutil.copyfile(file, folder / file.name)
    tokenizer = read_tokenizer(folder)
    reference = load_tokenizer(tokenizer.folder / "tokenizer.json")
    theirs = AutoTokenizer.from_pretrained(folder)
    turns = [[{"role": "user", "content": text}] for text in PLAIN_PROBES]
    chats = [theirs.apply_chat_template(turn, tokenize=False) for turn in turns]
    plain = FileTokenizer(tokenizer_fields(tokenizer, rows=rows, chat_template=None, stop_token_ids=[]))
    assert [plain.encode(text) for text in PLAIN_PROBES] == [reference.encode(text).ids for text in PLAIN_PROBES]
    fields = tokenizer_fields(tokenizer, rows=rows, chat_template=theirs.chat_template, stop_token_ids=[])
    expected = [reference.encode(chat, add_special_tokens=False).ids for chat in chats]
    assert [FileTokenizer(fields).encode_chat(chat) for chat in chats] == expected


def test_rows_that_rotate_together_become_neighbours():
    rows = np.arange(8, dtype=np.float32)[:, None]
    assert permute_rows(rows, 2)[:, 0].tolist() == [0, 2, 1, 3, 4, 6, 5, 7]


@pytest.mark.parametrize(
    ("file", "change", "told"),
    [
        ("config.json", {"model_type": "mamba"}, "not for 'mamba'"),
        ("config.json", {"rope_parameters": {"rope_type": "longrope"}}, "longrope"),
        ("config.json", {"hidden_act": "gelu"}, "silu"),
        ("config.json", {"num_hidden_layers": 5}, "blk.4.attn_q.weight: missing"),
        ("tokenizer.json", {"pre_tokenizer": {"type": "Whitespace"}}, "pre-tokenizer is none that llama.cpp"),
        ("tokenizer.json", {"pre_tokenizer": None}, "pre-tokenizer is none that llama.cpp"),
        ("tokenizer.json", {"normalizer": {"type": "Lowercase"}}, "Lowercase has no counterpart"),
    ],
    ids=lambda value: str(value)[:24],
)
def test_what_a_file_cannot_hold_is_refused(folder, tmp_path, file, change, told):
    copy = copy_of(folder, tmp_path)
    values = json.loads((copy / file).read_text(encoding="utf-8")) | change
    (copy / file).write_text(json.dumps(values), encoding="utf-8")
    with pytest.raises(UserError, match=told.replace(".", r"\.")):
        write(copy, tmp_path / "m.gguf")


def test_unknown_quantisation_and_weights_too_large_for_f16_are_refused(folder, tmp_path):
    with pytest.raises(UserError, match="q3_x"):
        write(folder, tmp_path / "m.gguf", quant="q3_x")
    large = copy_of(folder, tmp_path)
    weights = load_file(large / "model.safetensors")
    weights["model.layers.2.mlp.up_proj.weight"][3, 3] = 7e4
    save_file(weights, large / "model.safetensors")
    with pytest.raises(UserError, match="take bf16"):
        write(large, tmp_path / "m.gguf", quant="f16")


def copy_of(folder: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(folder, tmp_path / "copy"))


# Each mutation changes a file that was right, and names a proof that must fail then.
def tensor_of(file: Path, name: str) -> np.ndarray:
    return next(tensor.data for tensor in GGUFReader(file, "r+").tensors if tensor.name == name)


def unpermute(file: Path) -> None:
    data = tensor_of(file, "blk.1.attn_q.weight")
    data[:] = data.reshape(4, 32, 2, -1).swapaxes(1, 2).reshape(data.shape).copy()


def swap_tensors(file: Path) -> None:
    gate, up = tensor_of(file, "blk.2.ffn_gate.weight"), tensor_of(file, "blk.2.ffn_up.weight")
    gate[:], up[:] = up.copy(), gate.copy()


def block_scale(file: Path) -> None:
    data = tensor_of(file, "blk.2.ffn_gate.weight")
    data[7, 0] ^= 0x10  # the low byte of the float16 scale of one block: 1.6 % of it


def sub_block_scale(file: Path) -> None:
    tensor_of(file, "blk.2.ffn_gate.weight")[7, 4] ^= 0x01


def one_weight(file: Path) -> None:
    tensor_of(file, "blk.2.ffn_gate.weight")[7, 16] ^= 0x01


def norm(file: Path) -> None:
    tensor_of(file, "blk.0.attn_norm.weight")[3] += np.float32(1e-7)


def rotary_factor(file: Path) -> None:
    tensor_of(file, "rope_freqs.weight")[20] *= np.float32(1.001)


def replace_bytes(old: bytes, new: bytes) -> Callable[[Path], None]:
    def mutate(file: Path) -> None:
        content = file.read_bytes()
        assert content.count(old) == 1
        assert len(old) == len(new)
        file.write_bytes(content.replace(old, new))

    return mutate


MUTATIONS = {
    "rows of q not permuted": (unpermute, "quantised weights beyond their type's bound"),
    "two tensors swapped": (swap_tensors, "quantised weights beyond their type's bound"),
    "scale of a block": (block_scale, "quantised weights that are not their block's nearest value"),
    "scale of a sub-block": (sub_block_scale, "quantised weights that are not their block's nearest value"),
    "one weight": (one_weight, "quantised weights that are not their block's nearest value"),
    "one norm": (norm, "unquantised weights that changed"),
    "one rotary factor": (rotary_factor, "rotary frequencies, largest relative difference"),
    "tensor renamed": (replace_bytes(b"blk.3.ffn_up.weight", b"blk.3.ffn_ux.weight"), "tensor names, shapes and types"),
    "rotary base": (
        replace_bytes(
            b"llama.rope.freq_base\x06\x00\x00\x00" + np.float32(500000).tobytes(),
            b"llama.rope.freq_base\x06\x00\x00\x00" + np.float32(10000).tobytes(),
        ),
        "header fields that differ from config and tokenizer",
    ),
    "bos flag": (
        replace_bytes(b"add_bos_token\x07\x00\x00\x00\x00", b"add_bos_token\x07\x00\x00\x00\x01"),
        "header fields that differ from config and tokenizer",
    ),
    "chat template": (
        replace_bytes(b"{% endfor %}assistant:", b"{% endfor %}assistanT:"),
        "header fields that differ from config and tokenizer",
    ),
}


@pytest.mark.parametrize("name", MUTATIONS)
def test_a_damaged_file_fails_its_proof(folder, tmp_path, name):
    mutate, proof = MUTATIONS[name]
    file = write(folder, tmp_path / "m.gguf")
    mutate(file)
    assert proof in failed(file, folder)


def test_merges_in_another_order_fail(folder, tmp_path):
    copy = copy_of(folder, tmp_path)
    stored = json.loads((copy / "tokenizer.json").read_text(encoding="utf-8"))
    stored["model"]["merges"].reverse()
    (copy / "tokenizer.json").write_text(json.dumps(stored), encoding="utf-8")
    file = write(copy, tmp_path / "m.gguf")
    assert failed(file, folder) == ["header fields that differ from config and tokenizer"]
    reader = FileTokenizer({key: field.contents() for key, field in GGUFReader(file).fields.items()})
    reference = load_tokenizer(folder / "tokenizer.json")
    assert any(reader.encode(text) != reference.encode(text).ids for text in PLAIN_PROBES)


def test_a_model_of_another_folder_fails(folder, tmp_path):
    other = make_model(tmp_path / "other", tie_word_embeddings=True, rope_parameters=LLAMA3_ROPE, initializer_range=0.1)
    assert "quantised weights beyond their type's bound" in failed(write(other, tmp_path / "m.gguf"), folder)


def test_rows_that_were_never_permuted_fail_two_proofs(folder, tmp_path, monkeypatch):
    monkeypatch.setattr("finetune.release.gguf.write.permute_rows", lambda rows, heads: rows)
    file = write(folder, tmp_path / "m.gguf", quant="f32")
    assert failed(file, folder, quant="f32") == ["unquantised weights that changed", "logits against the source"]


def test_a_cut_file_is_a_damaged_file(folder, tmp_path):
    file = write(folder, tmp_path / "m.gguf")
    file.write_bytes(file.read_bytes()[:-1000])
    with pytest.raises(StorageError, match="not a whole GGUF file"):
        failed(file, folder)


def test_a_layer_too_many_in_the_folder_is_refused(folder, tmp_path):
    copy = copy_of(folder, tmp_path)
    config = json.loads((copy / "config.json").read_text()) | {"num_hidden_layers": 3}
    (copy / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match="has no such tensor"):
        read_model(copy)
