"""Planted defects of base, tokenizer, template, recipe and data: `finetune check` tells each, with its cure."""

from __future__ import annotations

import json
import re
import shutil
import struct
from collections import namedtuple
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from finetune import base_problems
from finetune.base import Base, read_base, read_header
from finetune.base_problems import find_base_problems
from finetune.check import check
from finetune.errors import FinetuneError, StorageError
from finetune.machine import probe_machine
from finetune.recipe import Recipe
from finetune.rehearsal import Rehearsed
from finetune.rehearse import Rehearsal, prove_names
from tests.conftest import alpaca_rows, make_tiny_base, write_recipe

Change = Callable[[Path], object]


@dataclass(frozen=True)
class Defect:
    """What is done to a base's folder, to the rows and the recipe; and what is told: where, and words of it."""

    told: tuple[str, str]
    base: Change = lambda folder: None
    rows: Callable[[list[dict]], object] = lambda rows: None
    settings: dict[str, Any] = field(default_factory=dict)


def config(**values: Any) -> Change:
    return json_file("config.json", **values)


def json_file(name: str, **values: Any) -> Change:
    """Other values of keys; None takes the key away."""

    def change(folder: Path) -> None:
        file = folder / name
        kept = {**(json.loads(file.read_text()) if file.exists() else {}), **values}
        file.write_text(json.dumps({key: value for key, value in kept.items() if value is not None}))

    return change


def weights(change: Callable[[dict[str, torch.Tensor]], object]) -> Change:
    def rewrite(folder: Path) -> None:
        file = folder / "model.safetensors"
        tensors = load_file(file)
        change(tensors)
        save_file({name: tensor.clone() for name, tensor in tensors.items()}, file, metadata={"format": "pt"})

    return rewrite


def rename(old: str, new: str) -> Change:
    return weights(lambda tensors: tensors.update({new: tensors.pop(old)}))


def cut(name: str, *, by: int) -> Change:
    return lambda folder: (folder / name).write_bytes((folder / name).read_bytes()[:-by])


def only_file(name: str) -> Change:
    """The weights in another form only."""

    def change(folder: Path) -> None:
        (folder / "model.safetensors").unlink()
        (folder / name).write_bytes(b"GGUF")

    return change


def two_shards(folder: Path) -> None:
    """An index of two shards, of which the second is not there."""
    tensors = load_file(folder / "model.safetensors")
    index = {name: f"model-0000{1 + at % 2}-of-00002.safetensors" for at, name in enumerate(tensors)}
    (folder / "model.safetensors").rename(folder / "model-00001-of-00002.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))


def damaged_header(folder: Path) -> None:
    file = folder / "model.safetensors"
    content = bytearray(file.read_bytes())
    (length,) = struct.unpack("<Q", content[:8])
    content[8 + length // 2] = 0x7B  # one byte
    file.write_bytes(content)


def more_tokens(folder: Path) -> None:
    """A pad token one above the last embedding, as a resized tokenizer has it."""
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    last = json.loads((folder / "config.json").read_text())["vocab_size"]
    pad = {**tokenizer["added_tokens"][0], "id": last, "content": "[PAD]"}
    tokenizer["added_tokens"].append(pad)
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    json_file("tokenizer_config.json", pad_token="[PAD]")(folder)


def nan(tensors: dict[str, torch.Tensor]) -> None:
    tensors["model.layers.1.mlp.up_proj.weight"][3, 5] = float("nan")


def other_head(tensors: dict[str, torch.Tensor]) -> None:
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"] + 1


def template(text: str) -> dict[str, Any]:
    return {"data__template": text}


def longer(rows: list[dict]) -> None:
    rows[2]["output"] = "pear " * 900


HEAD = "model.embed_tokens.weight"
# What to do stands after what is wrong, and says it as an order or names what is possible.
CURE = re.compile(
    r"[;:?(] ?.*\b(fetch|write|correct|give|name|choose|use|put|set|drop|delete|did you mean|install|report|move|end|"
    r"works?|run|add|make|leave|download|convert)\b"
)
TURNS = "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endfor %}"
TURNS += "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
FIRST_ONLY = "{{ messages[0].content }} -> {% if messages|length > 1 %}{{ eos_token }}{% endif %}"
DEFECTS: dict[str, Defect] = {
    "a shard is missing": Defect(("base", "model-00002-of-00002.safetensors is missing"), two_shards),
    "a shard is shorter than its header says": Defect(
        ("base/model.safetensors", "damaged or incomplete weights"), cut("model.safetensors", by=100)
    ),
    "a byte of the header is damaged": Defect(("base/model.safetensors", "fetch the file again"), damaged_header),
    "weights are a pickle": Defect(
        ("base", "pytorch_model.bin is a pickle, which is never opened"), only_file("pytorch_model.bin")
    ),
    "weights are a damaged GGUF file": Defect(("base/m.gguf", "damaged or no GGUF file"), only_file("m.gguf")),
    "a weight is not a number": Defect(
        ("base/model.safetensors", "model.layers.1.mlp.up_proj.weight has 1 weights that are NaN"), weights(nan)
    ),
    "weights are quantised already": Defect(
        ("base", "stored in I8, quantised already"),
        weights(lambda all: all.update({"model.layers.0.mlp.up_proj.weight": torch.ones(128, 64, dtype=torch.int8)})),
    ),
    "a module has another name": Defect(
        ("base", "the files hold no model.layers.0.self_attn.q_proj.weight, which would be random numbers"),
        rename("model.layers.0.self_attn.q_proj.weight", "model.layers.0.self_attn.query.weight"),
    ),
    "a layer more than the config has": Defect(
        ("base", "transformers has no place for model.layers.2.mlp.up_proj.weight"),
        weights(lambda all: all.update({"model.layers.2.mlp.up_proj.weight": torch.ones(128, 64)})),
    ),
    "a layer less than the config has": Defect(
        ("base", "model.layers.2.input_layernorm.weight, model.layers.2.mlp.down_proj.weight"),
        config(num_hidden_layers=3),
    ),
    "a config of other sizes": Defect(
        ("base", "has another shape than config.json says"), config(intermediate_size=192)
    ),
    "an untied head is not stored": Defect(
        ("base/config.json", "tie_word_embeddings is false, but no lm_head.weight is stored"),
        weights(lambda all: all.pop("lm_head.weight")),
    ),
    "a head of its own, tied by the config": Defect(
        ("base/config.json", "tie_word_embeddings is true, but another head is stored"),
        lambda folder: (config(tie_word_embeddings=True)(folder), weights(other_head)(folder)),
    ),
    "a config without layers": Defect(
        ("base/config.json", "num_hidden_layers is missing"), config(num_hidden_layers=None)
    ),
    "an unknown kind of positions": Defect(
        ("base/config.json", "'spiral' is no kind of rotary positions"),
        config(rope_parameters={"rope_type": "spiral", "rope_theta": 10000.0}),
    ),
    "an unknown architecture": Defect(
        ("base", "transformers knows no model_type 'llama9'"), config(model_type="llama9")
    ),
    "a base with code of its own": Defect(
        ("base", "asks for Python code of its own (auto_map)"), config(auto_map={"AutoModel": "modeling.Own"})
    ),
    "generation settings are no JSON": Defect(
        ("base/generation_config.json", "invalid JSON"),
        lambda folder: (folder / "generation_config.json").write_text('{"eos_token_id": '),
    ),
    "a stop token that the base does not have": Defect(
        ("base/generation_config.json", "eos_token_id: 99999 is none of the base's"),
        json_file("generation_config.json", eos_token_id=[1, 99999]),
    ),
    "one token more than embeddings": Defect(
        ("base/tokenizer_config.json", "pad_token: '[PAD]' is token 3072, the base has 3072 embeddings"), more_tokens
    ),
    "another base's tokenizer": Defect(
        ("base", "give the base the tokenizer it was trained with"), config(vocab_size=700)
    ),
    "no end token": Defect(
        ("data.template", "eos_token (it names none)"), json_file("tokenizer_config.json", eos_token=None)
    ),
    "an end token that is several tokens": Defect(
        ("base/tokenizer_config.json", "eos_token: '</stop>' is not one token"),
        json_file("tokenizer_config.json", eos_token="</stop>"),
        settings={"data__template": "own.jinja"},
    ),
    "a template with foreign control tokens": Defect(
        ("data.template", "<|start_header_id|>"), settings=template("llama3")
    ),
    "a template whose end is several tokens": Defect(
        ("rows.jsonl:1", "stop"), lambda folder: (folder / "chat_template.jinja").write_text(TURNS)
    ),
    "a template that leaves a turn out": Defect(
        ("rows.jsonl:1", "leaves out"), lambda folder: (folder / "chat_template.jinja").write_text(FIRST_ONLY)
    ),
    "a template that is not valid": Defect(
        ("data.template", "correct it, or choose another"),
        lambda folder: (folder / "chat_template.jinja").write_text("{% for m in messages %}"),
    ),
    "an unknown target": Defect(
        ("adapter.targets", "no linear module is called 'query_proj'"), settings={"adapter__targets": ["query_proj"]}
    ),
    "an unknown objective": Defect(
        ("recipe.json:1: train.objective", "did you mean 'sft'"), settings={"train__objective": "sftt"}
    ),
    "an unknown method": Defect(
        ("recipe.json:1: adapter.method", "did you mean 'lora'"), settings={"adapter__method": "lorra"}
    ),
    "an unknown quantisation": Defect(
        ("recipe.json:1: model.quantization", "did you mean 'nf4'"), settings={"model__quantization": "nf5"}
    ),
    "a type that this machine does not compute": Defect(
        ("model.dtype", "float16 is for GPUs"), settings={"model__dtype": "float16"}
    ),
    "rows longer than the context": Defect(
        ("data.max_tokens", "the longest row has"), rows=longer, settings={"data__max_tokens": 5000}
    ),
    "an empty answer": Defect(("rows.jsonl:4", "must be an answer"), rows=lambda rows: rows[3].update(output=" ")),
    "a row with an image": Defect(
        ("rows.jsonl:4", "image: must not be there"), rows=lambda rows: rows[3].update(image="fox.png")
    ),
    "training rows held out": Defect(
        ("rows.jsonl", "training row"),
        rows=lambda rows: rows.extend(dict(row) for row in rows[:]),
        settings={"data__eval": 8, "data__leaked": "error"},
    ),
    "a library that is not installed": Defect(
        ("output.log_to", "wandb is not installed"), settings={"output__log_to": ["wandb"]}
    ),
}


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_base(tmp_path_factory.mktemp("sound") / "base", dtype="float32")


def names_only(recipe: Recipe, base: Base) -> Rehearsed:
    """The first stage of the rehearsal, without a process of its own."""
    rehearsal = Rehearsal()
    try:
        prove_names(rehearsal, base.facts.folder)
    except FinetuneError as error:
        return Rehearsed("failed", {}, (), (), error.problems)
    return Rehearsed("done", {}, tuple(rehearsal.proofs))


def problems_of(folder: Path, defect: Defect) -> list[tuple[str, str]]:
    rows = alpaca_rows(20)
    for row in rows:
        row["output"] = row["output"] or "pear"
    defect.rows(rows)
    if defect.settings.get("data__template") == "own.jinja":
        (folder / "own.jinja").write_text("{% for m in messages %}{{ m.content }}</s>{% endfor %}")
    settings = {
        **defect.settings,
        **({"data__template": str(folder / "own.jinja")} if (folder / "own.jinja").exists() else {}),
    }
    try:
        error = check(write_recipe(folder, folder / "base", rows, **settings), rehearse=names_only).error()
    except FinetuneError as refused:
        error = refused
    return [(problem.where, problem.message) for problem in error.problems] if error else []


@pytest.mark.parametrize("name", DEFECTS)
def test_a_planted_defect_is_told_with_its_cure(sound: Path, tmp_path: Path, name: str) -> None:
    defect = DEFECTS[name]
    shutil.copytree(sound, tmp_path / "base")
    defect.base(tmp_path / "base")
    told = problems_of(tmp_path, defect)
    where, words = defect.told
    found = [said for place, said in told if place.removeprefix(f"{tmp_path}/").startswith(where) and words in said]
    assert found, told
    assert all(CURE.search(said) for said in found), found


def test_a_sound_base_is_told_nothing(sound: Path, tmp_path: Path) -> None:
    shutil.copytree(sound, tmp_path / "base")
    assert problems_of(tmp_path, Defect(("", ""))) == []


def test_a_damaged_file_is_storages_and_bad_rows_are_told_beside_it(sound: Path, tmp_path: Path) -> None:
    shutil.copytree(sound, tmp_path / "base")
    damaged_header(tmp_path / "base")
    error = check(write_recipe(tmp_path, tmp_path / "base", [{"instruction": "x", "output": " "}])).error()
    assert isinstance(error, StorageError)
    assert [Path(problem.where).name for problem in error.problems] == ["model.safetensors", "rows.jsonl:1"]
    assert error.answer["rows"] is None


def test_no_pad_token_is_no_defect(sound: Path, tmp_path: Path) -> None:
    """Rows lie end to end, so that nothing is ever padded."""
    shutil.copytree(sound, tmp_path / "base")
    json_file("tokenizer_config.json", pad_token=None)(tmp_path / "base")
    config(pad_token_id=None)(tmp_path / "base")
    assert problems_of(tmp_path, Defect(("", ""))) == []


def test_too_little_memory_is_told_with_the_keys_to_lower(
    sound: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(sound, tmp_path / "base")
    small = replace(probe_machine(), device_memory_gib=0.5)
    monkeypatch.setattr("finetune.check.probe_machine", lambda: small)
    ((where, message),) = problems_of(tmp_path, Defect(("", "")))
    assert where == "memory"
    assert "has 0.5 GiB; lower train.tokens_per_pass" in message


def test_a_disk_without_room_is_told_with_both_figures(
    sound: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(sound, tmp_path / "base")
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(10**9, 10**9 - 1000, 1000))
    ((where, message),) = problems_of(tmp_path, Defect(("", "")))
    assert where == str(tmp_path)
    assert "are free; make room, name a folder on another disk" in message


@pytest.mark.parametrize(
    ("shape", "module", "words"),
    [
        ((4, 96), "model.layers.0.self_attn.q_proj", "lora_A.weight is 96 wide, model.layers.0.self_attn.q_proj of"),
        ((4, 64), "model.layers.7.self_attn.q_proj", "holds weights for model.layers.7.self_attn.q_proj, which"),
    ],
)
def test_an_adapter_of_another_base_is_told_before_the_run_folder_is_made(
    sound: Path, tmp_path: Path, shape: tuple[int, int], module: str, words: str
) -> None:
    shutil.copytree(sound, tmp_path / "base")
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    (adapter / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 4, "lora_alpha": 8}))
    save_file(
        {
            f"base_model.model.{module}.lora_A.weight": torch.ones(shape),
            f"base_model.model.{module}.lora_B.weight": torch.ones(64, 4),
        },
        adapter / "adapter_model.safetensors",
    )
    told = problems_of(tmp_path, Defect(("", ""), settings={"adapter__from": str(adapter)}))
    assert [where for where, message in told if words in message] == ["adapter.from"], told
    assert not (tmp_path / "run").exists()


def test_what_was_found_sound_is_not_read_again_until_it_changes(
    sound: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(sound, tmp_path / "base")
    assert find_base_problems(read_base(str(tmp_path / "base"))) == []
    read = []
    monkeypatch.setattr(base_problems, "_count_infinite", lambda entry: read.append(entry.name) or 0)
    assert find_base_problems(read_base(str(tmp_path / "base"))) == []
    assert read == []
    weights(nan)(tmp_path / "base")
    find_base_problems(read_base(str(tmp_path / "base")))
    assert "model.layers.1.mlp.up_proj.weight" in read


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_every_infinite_weight_is_counted(tmp_path: Path, dtype: torch.dtype) -> None:
    """Against torch's own isfinite, over all 65,536 patterns of sixteen bits where the type has as many."""
    bits = torch.arange(-(2**15), 2**15, dtype=torch.int16)
    values = bits.view(dtype) if dtype != torch.float32 else torch.stack([bits * 0, bits], 1).flatten().view(dtype)
    save_file({"x": values}, tmp_path / "x.safetensors")
    (entry,) = read_header(tmp_path / "x.safetensors")
    assert base_problems._count_infinite(entry) == int((~values.isfinite()).sum()) > 100


def test_there_are_thirty_of_them() -> None:
    assert len(DEFECTS) >= 30
