"""A merge publishes a whole, proven folder or nothing; a release can be verified later, and damage is named."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from finetune.artifact import RunFolder, read_json, write_json
from finetune.base import TensorEntry, read_tensor_entries, sha256_of
from finetune.data.template import Template
from finetune.errors import ProofError, StorageError, UserError
from finetune.release import fresh as fresh_file
from finetune.release import merge as merge_file
from finetune.release import merging as merging_file
from finetune.release import verify as verify_file
from finetune.release.choice import choose_onto
from finetune.release.fresh import Proof, prove_in_fresh_process
from finetune.release.merge import merge, release_text
from finetune.release.proof import prove
from finetune.release.source import read_source
from finetune.release.verify import verify, verify_text
from finetune.release.weights import plan_shards, read_tensors, write_shards
from finetune.train.held_out import mean_loss
from tests.release.runs import copy_release, random_run


def prove_here(pairs: Sequence[tuple[Path, Path]]) -> list[list[Proof]]:
    """The proofs without a process of their own, which takes seconds; test_proof.py has the real one."""
    return [prove(folder, run) for folder, run in pairs]


@pytest.fixture(autouse=True)
def _no_fresh_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(merge_file, "prove_in_fresh_process", prove_here)
    monkeypatch.setattr(verify_file, "prove_in_fresh_process", prove_here)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    folder = tmp_path_factory.mktemp("run")
    made = random_run(folder, dtype="bfloat16")
    (folder / "base" / "LICENSE").write_text("the licence of the base")
    (folder / "base" / "README.md").write_text("---\nlicense: llama3.2\n---\n# the base's card\n")
    (folder / "base" / "generation_config.json").write_text('{"bos_token_id": 0, "eos_token_id": 5, "top_k": 7}')
    return made


@pytest.fixture(scope="module")
def released(run: RunFolder) -> Path:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(merge_file, "prove_in_fresh_process", prove_here)
        return merge(run.path, out=run.path.parent / "release", onto="dequantized").out


def left_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_auto_publishes_the_candidate_with_the_lower_loss(run: RunFolder, tmp_path: Path) -> None:
    lines: list[str] = []
    release = merge(run.path, out=tmp_path / "release", progress=lines.append)
    answer = json.loads(json.dumps(release.to_json()))
    assert set(answer["scores"]) == {"original", "dequantized"}
    assert answer["onto"] == min(answer["scores"], key=lambda name: answer["scores"][name])
    published = AutoModelForCausalLM.from_pretrained(release.out, dtype=torch.float32)
    rows = read_source(run.path).rows
    assert rows.origin == "held-out rows"
    assert len(rows.examples) == 6
    loss = mean_loss(published, rows.examples, tokens_per_pass=1000)
    assert answer["scores"][answer["onto"]] == pytest.approx(loss, abs=1e-5)
    assert all(proof["passed"] for proof in answer["proofs"])
    assert "scoring two candidates on 6 held-out rows" in lines
    assert left_in(tmp_path) == ["release"]
    assert "ok   no-op" in release_text(release)


def test_a_release_holds_everything_and_its_manifest_names_it(run: RunFolder, released: Path) -> None:
    manifest = read_json(released / "finetune.json")
    assert {entry["name"] for entry in manifest["files"]} | {"finetune.json"} == set(left_in(released))
    assert all(sha256_of(released / entry["name"]) == entry["sha256"] for entry in manifest["files"])
    assert (released / "LICENSE").read_text() == "the licence of the base"
    card = (released / "README.md").read_text()
    assert "license: llama3.2" in card
    assert "the base's card" not in card
    assert "logits against base + adapter" in card
    assert manifest["recipe"] == (run.path / "recipe.yaml").read_text()
    assert manifest["onto"]["chosen"] == "dequantized"
    assert not Path(manifest["run"]).is_absolute()
    assert str(run.path) not in json.dumps(manifest["plan"]["model"])


def test_the_release_stops_where_the_base_and_the_run_stop(run: RunFolder, released: Path) -> None:
    (trained,) = run.plan["stop_token_ids"]
    assert trained != 5
    config = read_json(released / "generation_config.json")
    assert config == {"bos_token_id": 0, "eos_token_id": [5, trained], "top_k": 7}


def test_an_adapter_folder_of_a_run_is_the_run(run: RunFolder) -> None:
    assert read_source(run.adapter).path == run.path


def test_an_adapter_without_its_run_is_merged_onto_the_original(run: RunFolder, tmp_path: Path) -> None:
    alone = tmp_path / "alone"
    shutil.copytree(run.adapter, alone)
    release = merge(alone, out=tmp_path / "release")
    assert release.onto.chosen == "original"
    assert read_json(release.out / "finetune.json")["rows"].startswith("none")


def test_without_the_data_nothing_is_measured_and_it_is_said(run: RunFolder, tmp_path: Path) -> None:
    moved = RunFolder(tmp_path / "run")
    shutil.copytree(run.path, moved.path)
    lock = read_json(moved.path / "lock.json")
    name = next(iter(lock["data_sha256"]))
    write_json(moved.path / "lock.json", lock | {"data_sha256": {name: "another"}})
    choice = choose_onto(read_source(moved.path), "auto")
    assert (choice.chosen, dict(choice.scores)) == ("original", {})
    assert "changed since training" in choice.reason


def test_without_held_out_rows_a_fixed_sample_of_training_rows_decides(tmp_path: Path) -> None:
    source = read_source(random_run(tmp_path, data__eval=None).path)
    assert source.rows.origin == "a sample of the training rows"
    assert [row.ids.tolist() for row in source.rows.examples] == [
        row.ids.tolist() for row in read_source(source.path).rows.examples
    ]


def test_a_failed_proof_publishes_nothing_but_its_report(
    run: RunFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(merging_file, "round_tuned", lambda weight, change, *, dtype: weight.to(dtype))
    with pytest.raises(ProofError, match="nearest value") as failure:
        merge(run.path, out=tmp_path / "release", onto="original")
    assert failure.value.code == 6
    assert left_in(tmp_path) == ["release.failed.json"]
    report = read_json(tmp_path / "release.failed.json")
    assert any(not proof["passed"] for proof in report["proofs"])


def test_another_template_than_the_trained_one_is_not_published(
    run: RunFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write = merge_file.write_tokenizer

    def write_other(folder: Path, tokenizer_folder: Path, *, template_source: str) -> None:
        write(folder, tokenizer_folder, template_source=template_source + " ")

    monkeypatch.setattr(merge_file, "write_tokenizer", write_other)
    with pytest.raises(ProofError, match="template differs"):
        merge(run.path, out=tmp_path / "release", onto="original")


def test_a_proof_that_cannot_be_carried_out_publishes_nothing(
    run: RunFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(merge_file, "prove_in_fresh_process", prove_in_fresh_process)
    monkeypatch.setattr(fresh_file, "START", "import sys; sys.exit('the process was killed')")
    with pytest.raises(ProofError, match="the process was killed"):
        merge(run.path, out=tmp_path / "release", onto="original")
    assert left_in(tmp_path) == ["release.failed.json"]


def test_an_interrupted_merge_leaves_nothing(run: RunFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(merge_file, "prove_in_fresh_process", interrupt)
    with pytest.raises(KeyboardInterrupt):
        merge(run.path, out=tmp_path / "release", onto="original")
    assert left_in(tmp_path) == []


def test_what_is_there_is_never_replaced(run: RunFolder, tmp_path: Path) -> None:
    (tmp_path / "release").mkdir()
    (tmp_path / "release" / "mine.txt").write_text("mine")
    with pytest.raises(UserError, match="not empty"):
        merge(run.path, out=tmp_path / "release")
    assert left_in(tmp_path / "release") == ["mine.txt"]


def test_a_base_that_changed_is_refused(tmp_path: Path) -> None:
    made = random_run(tmp_path / "run")
    file = tmp_path / "run" / "base" / "model.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    with pytest.raises(UserError, match="not the weights this run was trained on"):
        merge(made.path, out=tmp_path / "release")


def test_an_unfinished_run_and_a_folder_that_is_none_are_refused(run: RunFolder, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="neither a run folder"):
        merge(tmp_path, out=tmp_path / "release")
    shutil.copytree(run.path, tmp_path / "run")
    (tmp_path / "run" / "result.json").unlink()
    with pytest.raises(UserError, match="not finished"):
        merge(tmp_path / "run", out=tmp_path / "release")


def test_verify_proves_again(released: Path) -> None:
    again = verify(released)
    assert again.not_proven is None
    assert {proof.name for proof in again.proofs} >= {"files", "no-op"}


def test_verify_names_every_damaged_file(released: Path, tmp_path: Path) -> None:
    released = copy_release(released, tmp_path / "release")
    (released / "extra.txt").write_text("x")
    (released / "LICENSE").unlink()
    card = released / "README.md"
    card.write_text(card.read_text().replace("llama3.2", "llama3.1"))
    with pytest.raises(ProofError) as failure:
        verify(released)
    assert {Path(problem.where).name for problem in failure.value.problems} == {"extra.txt", "LICENSE", "README.md"}


def test_verify_without_the_run_says_what_it_could_not_prove(run: RunFolder, tmp_path: Path) -> None:
    moved = tmp_path / "run"
    shutil.copytree(run.path, moved)
    out = merge(moved, out=tmp_path / "release", onto="original").out
    shutil.rmtree(moved)
    again = verify(out)
    assert [proof.name for proof in again.proofs] == ["files"]
    assert again.not_proven is not None
    assert "no-op" in again.not_proven
    assert "ONLY the files were compared" in verify_text(again)


def test_verify_wants_a_release(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="finetune.json"):
        verify(tmp_path)


def test_shards_hold_every_tensor_once_as_transformers_reads_them(run: RunFolder, tmp_path: Path) -> None:
    base = read_source(run.path).base.facts.folder
    entries = list(read_tensor_entries(base))
    write_shards(tmp_path, entries, lambda entry, tensor: tensor, shard_bytes=100_000)
    shards = plan_shards(entries, shard_bytes=100_000)
    assert len(shards) > 3
    assert all(sum(e.bytes for e in members) <= 100_000 or len(members) == 1 for members in shards.values())
    shutil.copyfile(base / "config.json", tmp_path / "config.json")
    expected = load_file(str(base / "model.safetensors"))
    written = {entry.name: entry.file for entry in read_tensor_entries(tmp_path)}
    assert written.keys() == expected.keys()
    for name, file in written.items():
        with safe_open(str(file), framework="pt") as shard:
            assert torch.equal(shard.get_tensor(name), expected[name])
    model = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert torch.equal(model.get_parameter("model.norm.weight"), expected["model.norm.weight"])


def test_a_template_that_asks_the_date_renders_with_the_recipes(tmp_path: Path) -> None:
    source = "{{ bos_token }}{{ strftime_now('%d %b %Y') }}{% for m in messages %}{{ m['content'] }}"
    source += "{{ eos_token if m['role'] == 'assistant' else '\\n' }}{% endfor %}"
    (tmp_path / "dated.jinja").write_text(source)
    made = random_run(tmp_path / "run", data__template=str(tmp_path / "dated.jinja"), data__date="3 Oct 1990")
    template: Template = read_source(made.path).template
    assert "03 Oct 1990" in template.text(read_source(made.path).probe_conversations()[0], add_generation_prompt=True)
    release = merge(made.path, out=tmp_path / "release", onto="original")
    assert {proof.name: proof.value for proof in release.proofs}["probes whose rendering differs"] == 0


def test_files_are_read_and_never_mapped(run: RunFolder, tmp_path: Path) -> None:
    """A mapped model would count against the address space, all of it."""
    base = read_source(run.path).base.facts.folder
    entries = list(read_tensor_entries(base))

    def look(entry: TensorEntry, tensor: torch.Tensor) -> torch.Tensor:
        assert str(base) not in Path("/proc/self/maps").read_text()
        return tensor

    write_shards(tmp_path, entries, look)
    assert (tmp_path / "model.safetensors").stat().st_size > 0
    with safe_open(str(base / "model.safetensors"), framework="pt"):  # what the line above would see
        assert str(base) in Path("/proc/self/maps").read_text()


def test_a_file_that_became_shorter_is_named(run: RunFolder, tmp_path: Path) -> None:
    file = tmp_path / "model.safetensors"
    shutil.copyfile(read_source(run.path).base.facts.folder / "model.safetensors", file)
    entries = list(read_tensor_entries(tmp_path))
    with file.open("r+b") as stream:
        stream.truncate(file.stat().st_size - 10)
    with pytest.raises(StorageError, match=r"model.safetensors: ends inside"):
        list(read_tensors(entries))


def test_a_name_can_be_written_in_many_ways(run: RunFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An empty folder is taken, with or without a slash, relative, through its parent; a link or no name is refused."""
    monkeypatch.setattr(merge_file, "prove_in_fresh_process", lambda pairs: [[] for _ in pairs])
    monkeypatch.chdir(tmp_path)
    for name in ("one/", "./two", "deep/../three", "deep/er/four"):
        (tmp_path / "deep").mkdir(exist_ok=True)
        assert (merge(run.path, out=Path(name), onto="original").out / "config.json").is_file()
    (tmp_path / "empty").mkdir()
    merge(run.path, out=tmp_path / "empty", onto="original")
    (tmp_path / "link").symlink_to(tmp_path / "elsewhere")
    for name in (".", "..", "link", "deep/.."):
        with pytest.raises(UserError):
            merge(run.path, out=Path(name), onto="original")
    assert left_in(tmp_path) == ["deep", "empty", "link", "one", "three", "two"]


def test_two_at_once_do_not_mix(run: RunFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """While one merge proves, a second one for the same name is refused and touches nothing."""
    told = []

    def second(pairs: Sequence[tuple[Path, Path]]) -> list[list[Proof]]:
        before = left_in(pairs[0][0])
        with pytest.raises(UserError, match="another process is writing"):
            merge(run.path, out=tmp_path / "release", onto="original")
        told.append(left_in(pairs[0][0]) == before)
        return [[]]

    monkeypatch.setattr(merge_file, "prove_in_fresh_process", second)
    merge(run.path, out=tmp_path / "release", onto="original")
    assert told == [True]
    assert left_in(tmp_path) == ["release"]


def test_what_a_killed_merge_left_is_removed_by_the_next_one(
    run: RunFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    left = tmp_path / ".release.partial" / "release"
    left.mkdir(parents=True)
    (left / "model.safetensors").write_bytes(b"half")
    (tmp_path / ".other.partial").mkdir()  # of another merge, which may be alive
    monkeypatch.setattr(merge_file, "prove_in_fresh_process", lambda pairs: [[] for _ in pairs])
    merge(run.path, out=tmp_path / "release", onto="original")
    assert left_in(tmp_path) == [".other.partial", "release"]


@pytest.mark.parametrize("kills", [4, pytest.param(46, marks=pytest.mark.soak)])
def test_a_merge_that_is_killed_leaves_nothing_or_a_whole_release(tmp_path: Path, kills: int) -> None:
    script = Path(__file__).parents[2] / "benchmarks" / "merge_kills.py"
    command = [sys.executable, str(script), str(tmp_path), "--kills", str(kills), "--seed", "3"]
    command += ["--proof-here", "--proof-seconds", "1"] if kills < 10 else []
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert report["killed_while_running"] > kills / 2
    assert report["mixed"] == []
    assert report["earlier_release_unchanged"]
    assert report["a_merge_afterwards"] == {"exit_code": 0, "names": ["good", "out"]}
    assert report["two_at_once"] == {"exit_codes": [0, 2], "left": "release"}
