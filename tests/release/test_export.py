"""An export publishes a proven folder of one format or nothing, and can be verified later."""

from __future__ import annotations

import contextlib
import errno
import importlib
import io
import json
import re
import shutil
import sys
from collections import namedtuple
from pathlib import Path
from typing import Any

import pytest
import torch
from gguf import GGUFReader, quants
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from finetune.artifact import RunFolder, read_json, write_json
from finetune.base import sha256_of
from finetune.cli import main
from finetune.errors import ProofError, StorageError, UserError
from finetune.release import export as export_file
from finetune.release import export_proof as proof_file
from finetune.release import formats as formats_file
from finetune.release import merge as merge_file
from finetune.release import merging as merging_file
from finetune.release import staging as staging_file
from finetune.release import verify as verify_file
from finetune.release.export import export, export_text
from finetune.release.export_proof import prove_export
from finetune.release.gguf import write as write_file
from finetune.release.manifest import MANIFEST, describe_files
from finetune.release.proof import prove
from finetune.release.verify import verify
from tests.conftest import POCKET
from tests.release import runs
from tests.release.runs import copy_release, describe_again, random_run
from tests.release.test_merge_kinds import KINDS, make_adapter, make_base

pytestmark = pytest.mark.xdist_group("export")  # one worker makes run and release, not each
PROVE_IN_FRESH_PROCESS = proof_file.prove_in_fresh_process
Usage = namedtuple("Usage", "total used free")


def no_fresh_process(patch: pytest.MonkeyPatch) -> None:
    """The proofs without a process of their own, which takes seconds; the command-line test has the real one."""
    patch.setattr(merge_file, "prove_in_fresh_process", lambda pairs: [prove(*pair) for pair in pairs])
    patch.setattr(export_file, "prove_in_fresh_process", prove_export)
    patch.setattr(verify_file, "prove_export_in_fresh_process", prove_export)


def make_wide_base(folder: Path, **_: Any) -> Path:
    """A random LLaMA of one layer with rows of 256, which q4_k_m stores in its own blocks."""
    tokenizer = AutoTokenizer.from_pretrained(POCKET)
    torch.manual_seed(0)
    shape = {"hidden_size": 256, "intermediate_size": 256, "num_hidden_layers": 1, "num_attention_heads": 4}
    ids = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    config = LlamaConfig(**shape, **ids, vocab_size=len(tokenizer), max_position_embeddings=512, initializer_range=0.1)
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def wide_run(tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(runs, "make_tiny_base", make_wide_base)
        return random_run(tmp_path_factory.mktemp("wide"), model__quantization="none", data__eval=2)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    made = random_run(tmp_path_factory.mktemp("tiny"), model__quantization="none")
    (made.path.parent / "base" / "LICENSE").write_text("the licence of the base")
    return made


@pytest.fixture(scope="module")
def release(run: RunFolder) -> Path:
    """The run, merged: what most tests export from, because it takes no merge."""
    with pytest.MonkeyPatch.context() as patch:
        no_fresh_process(patch)
        return export(str(run.path), format="safetensors", out=run.path.parent / "release").out


@pytest.fixture(scope="module")
def exported(release: Path) -> Path:
    with pytest.MonkeyPatch.context() as patch:
        no_fresh_process(patch)
        return export(str(release), format="gguf", out=release.parent / "exported").out


@pytest.fixture(autouse=True)
def _no_fresh_process(monkeypatch: pytest.MonkeyPatch) -> None:
    no_fresh_process(monkeypatch)


def left_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_a_run_becomes_one_gguf_file_that_holds_the_merged_model(wide_run: RunFolder, tmp_path: Path) -> None:
    done = export(str(wide_run.path), format="gguf", quant="q4_k_m", out=tmp_path / "out")
    assert left_in(tmp_path) == ["out"]
    assert left_in(done.out) == ["README.md", "finetune.json", "run-q4_k_m.gguf"]
    reader = GGUFReader(done.out / "run-q4_k_m.gguf")
    assert {tensor.tensor_type.name for tensor in reader.tensors} == {"F32", "Q4_K", "Q6_K"}
    names = {found.name for found in done.proofs}
    assert {
        "merge: no-op",
        "logits as transformers reads the file",
        "quantised weights beyond their type's bound",
    } <= names
    assert all(found.passed for found in done.proofs)
    again = verify(done.out)  # merged once more: the weights of the run, not those of the base
    assert again.not_proven is None
    assert "weight files that are not those exported" in {found.name for found in again.proofs}


@pytest.mark.parametrize(("quant", "limit"), [pytest.param("f16", 0.005, marks=pytest.mark.soak), ("q8_0", 0.02)])
def test_gguf_and_transformers_read_the_release(
    release: Path, exported: Path, tmp_path: Path, quant: str, limit: float
) -> None:
    out = exported if quant == "q8_0" else export(str(release), format="gguf", quant=quant, out=tmp_path / "out").out
    stored = load_file(str(release / "model.safetensors"))
    file = out / f"release-{quant}.gguf"
    tensors = {tensor.name: tensor for tensor in GGUFReader(file).tensors}
    down = tensors["blk.1.ffn_down.weight"]
    read = torch.from_numpy(quants.dequantize(down.data, down.tensor_type))
    wanted = stored["model.layers.1.mlp.down_proj.weight"].float()
    assert (read - wanted).norm() < limit * wanted.norm()
    model = AutoModelForCausalLM.from_pretrained(out, gguf_file=file.name, dtype=torch.float32)
    reference = AutoModelForCausalLM.from_pretrained(release, dtype=torch.float32)
    ids = torch.tensor([AutoTokenizer.from_pretrained(release)("the red fox sells pears")["input_ids"]])
    with torch.no_grad():
        wanted, found = reference(ids).logits, model(ids).logits
    assert (found - wanted).abs().max() < 20 * limit * wanted.std()


def test_the_manifest_names_every_file_and_the_run(run: RunFolder, release: Path, exported: Path) -> None:
    manifest = read_json(exported / MANIFEST)
    assert {entry["name"] for entry in manifest["files"]} | {MANIFEST} == set(left_in(exported))
    assert all(sha256_of(exported / entry["name"]) == entry["sha256"] for entry in manifest["files"])
    assert (exported / manifest["run"]).resolve() == run.path.resolve()
    assert (exported / manifest["made_of"]["path"]).resolve() == release.resolve()
    assert manifest["merge_proofs"] == read_json(release / MANIFEST)["proofs"]
    assert (exported / "LICENSE").read_text() == "the licence of the base"
    card = (exported / "README.md").read_text()
    assert "library_name: gguf" in card
    assert "release-q8_0.gguf" in card


def test_notes_of_the_file_are_told_and_recorded(
    release: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(write_file, "text_notes", lambda *_: ["plain text gets one more space"])
    monkeypatch.setattr(export_file, "prove_in_fresh_process", lambda *_: [])
    done = export(str(release), format="gguf", quant="f32", out=tmp_path / "out")
    assert done.to_json()["notes"] == ["plain text gets one more space"]
    assert "note: plain text gets one more space" in export_text(done)
    assert read_json(done.out / MANIFEST)["notes"] == ["plain text gets one more space"]


def test_an_adapter_loads_with_plain_peft_and_is_proven(run: RunFolder, tmp_path: Path) -> None:
    from peft import PeftModel

    done = export(str(run.path), format="adapter", out=tmp_path / "out")
    base = AutoModelForCausalLM.from_pretrained(run.path.parent / "base", dtype=torch.float32)
    tuned = PeftModel.from_pretrained(base, str(done.out))
    assert tuned.peft_config["default"].r == 4
    proofs = {found.name: found.value for found in done.proofs}
    assert proofs["logits with plain peft against base + delta"] < 1e-5
    assert AutoTokenizer.from_pretrained(done.out).chat_template
    assert verify(done.out).not_proven is None


@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`:UserWarning")  # PEFT's opinion of such
def test_an_adapter_that_trained_more_than_linears_is_exported_and_proven(tmp_path: Path) -> None:
    """DoRA, and a head of its own on a tied base: what read_deltas would refuse; changed on the way, it is seen."""
    made = random_run(tmp_path / "run", dtype="bfloat16", tied=True, model__quantization="none", adapter__method="dora")
    weights, config = made.adapter / "adapter_model.safetensors", made.adapter / "adapter_config.json"
    tensors, head = load_file(str(weights)), "base_model.model.lm_head.weight"
    embedding = load_file(str(tmp_path / "run" / "base" / "model.safetensors"))["model.embed_tokens.weight"]
    save_file(tensors | {head: embedding.flip(0).contiguous()}, str(weights), metadata={"format": "pt"})
    write_json(config, read_json(config) | {"modules_to_save": ["lm_head"]})
    done = export(str(made.path), format="adapter", out=tmp_path / "out")
    assert {found.name: found.value for found in done.proofs}["logits with plain peft against base + delta"] < 1e-5
    changed = copy_release(done.out, tmp_path / "changed")
    save_file(tensors | {head: embedding}, str(changed / "adapter_model.safetensors"), metadata={"format": "pt"})
    describe_again(changed)
    with pytest.raises(ProofError, match="plain peft"):
        verify(changed)


@pytest.mark.soak
@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`:UserWarning")
@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_adapter_that_merges_is_exported_as_an_adapter(kind: str, tmp_path: Path) -> None:
    base = make_base(tmp_path / "base", KINDS[kind])
    adapter = make_adapter(tmp_path / "adapter", base, **KINDS[kind].settings)
    done = export(str(adapter), format="adapter", out=tmp_path / "out")
    assert all(found.passed for found in done.proofs)


def test_an_adapter_with_another_delta_is_not_published(
    run: RunFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    copy = shutil.copyfile

    def copy_changed(source: Path, target: Path) -> None:
        copy(source, target)
        if target.name == "adapter_model.safetensors":
            tensors = load_file(str(target))
            name = next(name for name in tensors if "layers.1.mlp.down_proj.lora_B" in name)
            save_file(tensors | {name: tensors[name] * 1.01}, str(target))

    monkeypatch.setattr(formats_file.shutil, "copyfile", copy_changed)
    with pytest.raises(ProofError, match="plain peft"):
        export(str(run.path), format="adapter", out=tmp_path / "out")
    assert left_in(tmp_path) == ["out.failed.json"]


def swap_two_tensors(tensor: Any, kind: Any) -> Any:
    """Layer 0 gets the up projection of layer 1, as a writer with a wrong order would do it."""
    if tensor.name == "blk.0.ffn_up.weight":
        tensor = tensor.__class__(tensor.name, OTHERS["blk.1.ffn_up.weight"], tensor.heads, tensor.offset)
    return ENCODE(tensor, kind)


ENCODE, OTHERS = write_file.encode_tensor, {}


@pytest.mark.parametrize("quant", [pytest.param("f16", marks=pytest.mark.soak), "q8_0"])
def test_a_writer_that_mixes_up_two_tensors_publishes_nothing(
    release: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, quant: str
) -> None:
    OTHERS.update({tensor.name: tensor.entry for tensor in write_file.read_model(release).tensors})
    monkeypatch.setattr(write_file, "encode_tensor", swap_two_tensors)
    with pytest.raises(ProofError) as failure:
        export(str(release), format="gguf", quant=quant, out=tmp_path / "out")
    assert failure.value.code == 6
    assert left_in(tmp_path) == ["out.failed.json"]
    assert any(not found["passed"] for found in read_json(tmp_path / "out.failed.json")["proofs"])


def test_a_merge_that_fails_on_the_way_publishes_nothing(
    run: RunFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    exact = merging_file.round_tuned
    monkeypatch.setattr(merging_file, "round_tuned", lambda weight, delta, *, dtype: exact(weight, None, dtype=dtype))
    with pytest.raises(ProofError, match="nearest value") as failure:
        export(str(run.path), format="gguf", out=tmp_path / "out")
    assert left_in(tmp_path) == ["out.failed.json"]
    assert str(failure.value.problems[-1].where) == str(tmp_path / "out.failed.json")
    assert ".partial" not in str(failure.value) + (tmp_path / "out.failed.json").read_text()


def test_an_interrupted_export_leaves_nothing(release: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(export_file, "prove_in_fresh_process", interrupt)
    with pytest.raises(KeyboardInterrupt):
        export(str(release), format="gguf", out=tmp_path / "out")
    assert left_in(tmp_path) == []


def test_a_full_disk_is_seen_before_anything_is_written(
    run: RunFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(staging_file.shutil, "disk_usage", lambda _: Usage(10**9, 10**9 - 10**6, 10**6))
    for format in ("gguf", "adapter"):
        with pytest.raises(StorageError, match=r"0\.1 GB are needed for a while, 0\.0 GB are free") as failure:
            export(str(run.path), format=format, out=tmp_path / "there" / "out")
        assert failure.value.code == 3
    assert left_in(tmp_path) == []


def test_a_disk_that_becomes_full_leaves_nothing(
    release: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_space(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(formats_file, "write_gguf", no_space)
    with pytest.raises(StorageError, match="became full") as failure:
        export(str(release), format="gguf", out=tmp_path / "out")
    assert failure.value.code == 3
    assert left_in(tmp_path) == []


def test_a_folder_that_cannot_be_made_is_named(release: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    for out in (tmp_path / "file" / "out", Path(".")):
        with pytest.raises(UserError):
            export(str(release), format="gguf", out=out)
    assert left_in(tmp_path) == ["file"]


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"format": "onnx"}, "write one of safetensors, adapter, gguf, gguf-adapter, ollama, compressed-tensors"),
        ({"format": "gguf", "quant": "q3"}, "write one of f32, f16"),
        ({"format": "safetensors", "quant": "q8_0"}, "leave it out"),
        ({"format": "adapter", "onto": "original"}, "nothing is merged for adapter; leave it out"),
        ({"format": "gguf-adapter", "quant": "q8_0"}, "it is for gguf or ollama; leave it out"),
        ({"format": "gguf", "without_template": True}, "only ollama's Modelfile has one"),
    ],
)
def test_what_is_not_possible_is_refused_with_what_is(
    run: RunFolder, tmp_path: Path, options: dict[str, Any], told: str
) -> None:
    with pytest.raises(UserError, match=told):
        export(str(run.path), out=tmp_path / "out", **options)
    assert left_in(tmp_path) == []


def test_every_format_is_proven_verified_and_told_in_the_help(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    formats = set(formats_file.FORMATS)
    assert formats == set(proof_file.AGAINST)
    assert {*formats, "safetensors", "combined", "extracted"} == set(verify_file.AGAIN)
    monkeypatch.setattr(sys, "argv", ["finetune", "export", "--help"])
    with pytest.raises(SystemExit):
        main()
    told = re.sub(r"-\s+", "-", re.sub(r"\s+", " ", capsys.readouterr().out))  # a line may break after a hyphen
    assert all(f" {name} (" in told for name in formats)
    assert all(f" {quant}" in told for quant in formats_file.QUANTS)


def test_what_is_not_merged_takes_no_onto_and_gives_no_adapter(release: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="merged already"):
        export(str(release), format="gguf", onto="original", out=tmp_path / "out")
    for format in ("adapter", "gguf-adapter"):
        with pytest.raises(UserError, match="holds no adapter"):
            export(str(release), format=format, out=tmp_path / "out")


@pytest.mark.parametrize("format", ["gguf-adapter", "compressed-tensors"])
def test_the_other_formats_are_published_proven_and_verified(
    run: RunFolder, release: Path, tmp_path: Path, format: str
) -> None:
    target = run.path if format == "gguf-adapter" else release
    done = export(str(target), format=format, out=tmp_path / "out")
    manifest = read_json(done.out / MANIFEST)
    assert manifest["format"] == format
    assert manifest["notes"] == list(done.notes)
    assert left_in(tmp_path) == ["out"]
    assert verify(done.out).not_proven is None
    if format == "compressed-tensors":
        stops = read_json(done.out / "generation_config.json")
        write_json(done.out / "generation_config.json", stops | {"eos_token_id": 7})
        write_json(done.out / MANIFEST, manifest | {"files": describe_files(done.out)})
        with pytest.raises(ProofError, match="stop token files that changed"):
            verify(done.out)


def test_two_exports_to_one_name_do_not_meet(release: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(export_file, "prove_in_fresh_process", lambda *_: [])
    with staging_file.work_folder(tmp_path / "out"), pytest.raises(UserError, match="another process is writing"):
        export(str(release), format="gguf", out=tmp_path / "out")
    (tmp_path / ".out.partial" / "release").mkdir(parents=True)  # as a killed process leaves it
    (tmp_path / ".out.partial" / "release" / "half").write_text("x")
    export(str(release), format="gguf", out=tmp_path / "out")
    assert left_in(tmp_path) == ["out"]


def test_what_is_there_stays_and_an_export_is_no_target(exported: Path, release: Path, tmp_path: Path) -> None:
    before = left_in(exported)
    with pytest.raises(UserError, match="not empty"):
        export(str(release), format="gguf", out=exported)
    assert left_in(exported) == before
    with pytest.raises(UserError, match="is a gguf export"):
        export(str(exported), format="gguf", out=tmp_path / "out")


def test_verify_without_the_model_proves_the_file_by_itself(exported: Path, tmp_path: Path) -> None:
    moved = copy_release(exported, tmp_path / "far" / "moved")
    again = verify(moved)
    assert again.not_proven is not None
    assert "not there any more; not proven again: tensor names" in again.not_proven
    assert {found.name for found in again.proofs} >= {"files", "template differs", "weights that are not finite"}


def test_verify_sees_that_the_model_is_another_now(
    exported: Path, release: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(verify_file, "prove_export_in_fresh_process", lambda *_: [])  # no other proof sees it first
    moved = copy_release(exported, tmp_path / "exported")
    weights = copy_release(release, tmp_path / "release") / "model.safetensors"
    tensors = load_file(str(weights))
    tensors["model.norm.weight"][0] += 1
    save_file(tensors, str(weights), metadata={"format": "pt"})
    with pytest.raises(ProofError, match="weight files that are not those exported"):
        verify(moved)


def test_verify_sees_damage_and_another_template(exported: Path, tmp_path: Path) -> None:
    damaged = copy_release(exported, tmp_path / "damaged")
    file = damaged / "release-q8_0.gguf"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    with pytest.raises(ProofError, match="sha256"):
        verify(damaged)
    place = content.index(b"### Response:")
    content[place : place + 3] = b"+++"
    file.write_bytes(content)
    manifest = read_json(damaged / MANIFEST)
    write_json(damaged / MANIFEST, manifest | {"files": describe_files(damaged)})
    with pytest.raises(ProofError, match="template differs"):
        verify(damaged)


def answer_here(module: str, arguments: list[str]) -> Any:
    """What the proving process prints, without the seconds that a process takes to import everything."""
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(io.StringIO()) as printed:
        patch.setattr(sys, "argv", [module, *arguments])
        importlib.import_module(module).main()
    return json.loads(printed.getvalue())


@pytest.mark.parametrize("fresh", [False, pytest.param(True, marks=pytest.mark.soak)])
def test_the_command_answers_in_json_and_asks_a_fresh_process(
    release: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *, fresh: bool
) -> None:
    out = tmp_path / "out"
    command = ["export", str(release), "--format", "gguf", "--quant", "bf16", "--out", str(out), "--json"]
    monkeypatch.setattr(export_file, "prove_in_fresh_process", PROVE_IN_FRESH_PROCESS)
    if not fresh:
        monkeypatch.setattr(proof_file, "answer_of", answer_here)
    monkeypatch.setattr(sys, "argv", ["finetune", *command])
    with pytest.raises(SystemExit) as end:
        main()
    assert not end.value.code
    answer = json.loads(capsys.readouterr().out)
    assert {"out", "proofs", "files", "notes"} <= answer.keys()
    assert answer["files"] == describe_files(out)
    assert {"name", "value", "limit", "passed"} == answer["proofs"][0].keys()
    assert "logits against the source" in {found["name"] for found in answer["proofs"]}
