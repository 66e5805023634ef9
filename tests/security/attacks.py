"""Hostile files: a folder and a marker in, something that would write the marker if it were run out. Never run here."""

# ruff: noqa: E501 - a payload stands on one line

from __future__ import annotations

import json
import pickle
import shutil
import zipfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from tests.conftest import POCKET


class Payload:
    """A pickle of this writes the marker when it is loaded."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple:
        return Path.touch, (self.marker,)


def code(marker: Path) -> str:
    return f"import pathlib\npathlib.Path({str(marker)!r}).touch()\n"


def write_pickle(file: Path, marker: Path) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(pickle.dumps(Payload(marker), protocol=2))


def write_torch_zip(file: Path, marker: Path) -> None:
    """The form torch.save writes: a zip whose data.pkl is the pickle."""
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("archive/data.pkl", pickle.dumps(Payload(marker), protocol=2))
        archive.writestr("archive/version", "3\n")
        archive.writestr("archive/byteorder", "little")


def base(folder: Path, *, config: Mapping = {}, tokenizer: Mapping = {}, without: tuple[str, ...] = ()) -> Path:  # noqa: B006
    """pocket-llama by links, some of its settings changed."""
    folder.mkdir(parents=True)
    for file in POCKET.iterdir():
        if file.name not in without:
            (folder / file.name).symlink_to(file)
    for name, values in (("config.json", config), ("tokenizer_config.json", tokenizer)):
        if values:
            changed = json.loads((POCKET / name).read_text()) | dict(values)
            (folder / name).unlink()
            (folder / name).write_text(json.dumps(changed))
    return folder


CONFIG_CODE = "from transformers import LlamaConfig\nclass C(LlamaConfig):\n    model_type = 'evil'\n"
TOKENIZER_CODE = "from transformers import PreTrainedTokenizerFast\nclass T(PreTrainedTokenizerFast):\n    pass\n"
AUTO_MAP = {"auto_map": {"AutoConfig": "evil.C", "AutoModelForCausalLM": "evil.M"}}


def own_code(folder: Path, marker: Path, **changes: Mapping) -> None:
    base(folder, **changes)  # type: ignore[arg-type]
    (folder / "evil.py").write_text(code(marker) + CONFIG_CODE + TOKENIZER_CODE)


@dataclass(frozen=True)
class Attack:
    """How its folder is made; what is typed there (FOLDER stands for it); which stock call falls for it, if one does."""

    make: Callable[[Path, Path], None]
    typed: tuple[str, ...]
    stock: str | None
    exits: tuple[int, ...] = (2, 3)


GENERATE = ("generate", "FOLDER", "--prompt", "x", "--max-new-tokens", "1")


def weights_as(name: str, write: Callable[[Path, Path], None] = write_pickle) -> Callable[[Path, Path], None]:
    def make(folder: Path, marker: Path) -> None:
        base(folder, without=("model.safetensors",))
        write(folder / name, marker)

    return make


def sharded(folder: Path, marker: Path) -> None:
    weights_as("pytorch_model-00001-of-00001.bin")(folder, marker)
    index = {"weight_map": {"model.embed_tokens.weight": "pytorch_model-00001-of-00001.bin"}}
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def adapter(folder: Path, marker: Path, *, name: str = "adapter_model.bin", **extra: object) -> None:
    folder.mkdir(parents=True)
    settings = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": 4, "lora_alpha": 8, "target_modules": ["q_proj"]}
    settings |= {"base_model_name_or_path": str(POCKET), **extra}
    (folder / "adapter_config.json").write_text(json.dumps(settings))
    write_pickle(folder / name, marker)


def data_as(name: str, write: Callable[[Path, Path], None] = write_pickle) -> Callable[[Path, Path], None]:
    def make(folder: Path, marker: Path) -> None:
        folder.mkdir(parents=True)
        write(folder / name, marker)
        recipe = {"version": 1, "name": "x", "model": {"base": "builtin:pocket-llama"}, "data": {"train": name}}
        (folder / "r.json").write_text(json.dumps(recipe))

    return make


def gguf(folder: Path, marker: Path) -> None:
    folder.mkdir(parents=True)
    write_pickle(folder / "model.gguf", marker)
    digest = __import__("hashlib").sha256((folder / "model.gguf").read_bytes()).hexdigest()
    files = [{"name": "model.gguf", "bytes": (folder / "model.gguf").stat().st_size, "sha256": digest}]
    manifest = {"files": files, "run": None, "proofs": [], "onto": None, "format": "gguf", "template_sha256": ""}
    (folder / "finetune.json").write_text(json.dumps(manifest))


def shadow(name: str) -> Callable[[Path, Path], None]:
    """A model folder with a module that Python would import in place of a library, for whoever works inside it."""

    def make(folder: Path, marker: Path) -> None:
        base(folder, tokenizer={"tokenizer_class": "LlamaTokenizer", "x": name})  # converted in a child process
        (folder / f"{name}.py").write_text(code(marker) + "raise ImportError('shadow')\n")

    return make


def recipe(text: str) -> Callable[[Path, Path], None]:
    def make(folder: Path, marker: Path) -> None:
        folder.mkdir(parents=True)
        (folder / "r.yaml").write_text(text.replace("MARKER", str(marker)))

    return make


ALL: dict[str, Attack] = {
    **{
        f"weights in {name}": Attack(weights_as(name), GENERATE, "torch_load")
        for name in ("pytorch_model.bin", "consolidated.00.pth", "model.pt", "model.ckpt", "tf_model.h5")
    },
    "weights in a torch zip": Attack(weights_as("pytorch_model.bin", write_torch_zip), GENERATE, "torch_load"),
    "a pickle called safetensors": Attack(weights_as("model.safetensors"), GENERATE, None),
    "a torch zip called safetensors": Attack(weights_as("model.safetensors", write_torch_zip), GENERATE, None),
    "shards that are pickles": Attack(sharded, GENERATE, "torch_load"),
    "an adapter_model.bin": Attack(adapter, GENERATE, "torch_load"),
    "an adapter_model.bin to merge": Attack(adapter, ("merge", "FOLDER", "--out", "out"), "torch_load"),
    "an adapter_model.bin to export": Attack(
        adapter, ("export", "FOLDER", "--format", "safetensors", "--out", "out"), "torch_load"
    ),
    "an adapter that is a pickle called safetensors": Attack(
        lambda folder, marker: adapter(folder, marker, name="adapter_model.safetensors"), GENERATE, None
    ),
    "rows in a pickle": Attack(data_as("rows.pkl"), ("check", "r.json"), "torch_load"),
    "rows in a pickle called jsonl": Attack(data_as("rows.jsonl"), ("check", "r.json"), "torch_load"),
    "rows in a pickle called parquet": Attack(data_as("rows.parquet"), ("check", "r.json"), "torch_load"),
    "rows in a torch file": Attack(data_as("rows.pt", write_torch_zip), ("check", "r.json"), "torch_load"),
    "a GGUF that is a pickle": Attack(gguf, ("verify", "FOLDER"), "torch_load", exits=(2, 3, 6)),
    "auto_map in config.json": Attack(
        lambda f, m: own_code(f, m, config={**AUTO_MAP, "model_type": "evil"}), GENERATE, "auto_config"
    ),
    "auto_map beside a known model_type": Attack(
        lambda f, m: own_code(f, m, config=AUTO_MAP), GENERATE, "auto_config"
    ),
    "auto_map to plan with": Attack(
        lambda f, m: (own_code(f, m, config=AUTO_MAP), data_as("rows.jsonl")(f / "d", m), write_recipe(f)),
        ("plan", "FOLDER/r.json"),
        "auto_config",
    ),
    "auto_map in a nested config": Attack(
        lambda f, m: own_code(f, m, config={"text_config": {"auto_map": {"AutoConfig": "evil.C"}}}), GENERATE, None
    ),
    "auto_map in tokenizer_config.json": Attack(
        lambda f, m: own_code(f, m, tokenizer={"auto_map": {"AutoTokenizer": ["evil.T", "evil.T"]}, "tokenizer_class": "T"}),
        GENERATE,
        "auto_tokenizer",
    ),
    "auto_map in processor_config.json": Attack(
        lambda f, m: (
            own_code(f, m),
            (f / "processor_config.json").write_text(json.dumps({"auto_map": {"AutoProcessor": "evil.C"}})),
        ),
        GENERATE,
        "auto_processor",
    ),
    "the code of another repository": Attack(
        lambda f, m: own_code(f, m, config={"auto_map": {"AutoConfig": "someone/else--evil.C"}}), GENERATE, None
    ),
    "an unknown model_type": Attack(lambda f, m: own_code(f, m, config={"model_type": "evil"}), GENERATE, None),
    "trust_remote_code in a config": Attack(
        lambda f, m: own_code(f, m, config={"trust_remote_code": True}), GENERATE, None
    ),
    "trust_remote_code deep in a config": Attack(
        lambda f, m: own_code(f, m, config={"text_config": {"decoder": [{"trust_remote_code": True}]}}), GENERATE, None
    ),
    "a kernel to fetch": Attack(
        lambda f, m: own_code(f, m, config={"_attn_implementation_internal": "evil/kernel"}), GENERATE, None
    ),
    "a kernel to fetch, the new key": Attack(
        lambda f, m: own_code(f, m, config={"attn_implementation": "evil/kernel:fn"}), GENERATE, None
    ),
    "custom_generate": Attack(
        lambda f, m: (own_code(f, m), replace(f / "generation_config.json", json.dumps({"custom_generate": "./evil"}))),
        GENERATE,
        None,
    ),
    "an adapter's parent_library": Attack(
        lambda f, m: adapter(f, m, auto_mapping={"parent_library": "evil", "base_model_class": "C"}), GENERATE, None
    ),
    "a module called transformers where one works": Attack(shadow("transformers"), ("generate", ".", "--prompt", "x"), "python_c", (0, 2)),
    "a recipe with a Python object": Attack(
        recipe("version: !!python/object/apply:os.system ['touch MARKER']\n"),
        ("check", "r.yaml"),
        "yaml_unsafe",
    ),
    "a recipe that sets the environment": Attack(
        recipe("version: 1\nname: x\nenv: {LD_PRELOAD: MARKER}\nmodel: {base: builtin:pocket-llama, trust_remote_code: true}\n"),
        ("check", "r.yaml"),
        None,
    ),
    "a recipe that trusts code": Attack(
        recipe("version: 1\nname: x\ntrust_remote_code: true\nmodel: {base: builtin:pocket-llama}\ndata: {train: MARKER}\n"),
        ("check", "r.yaml", "--set", "model.trust_remote_code=true"),
        None,
    ),
}  # fmt: skip


def replace(file: Path, text: str) -> None:
    file.unlink(missing_ok=True)
    file.write_text(text)


def write_recipe(folder: Path) -> None:
    rows = folder / "rows.jsonl"
    rows.write_text('{"instruction": "a", "output": "b"}\n')
    values = {"version": 1, "name": "x", "model": {"base": str(folder)}, "data": {"train": str(rows)}}
    (folder / "r.json").write_text(json.dumps(values))
    shutil.rmtree(folder / "d", ignore_errors=True)
