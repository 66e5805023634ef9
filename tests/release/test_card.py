"""A card is read by YAML, by the hub's own parser and by a Markdown renderer; licences are told by real first lines."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from huggingface_hub import ModelCard
from markdown_it import MarkdownIt

from finetune.artifact import read_json
from finetune.release import merge as merge_file
from finetune.release.card import hub_id_of, proof_table, write_card
from finetune.release.card_parts import PROOFS_MEAN, USE
from finetune.release.fresh import Proof
from finetune.release.licences import (
    LICENCES,
    data_licences,
    find_licence,
    front_matter,
    has_prefix,
    licence_files,
    licence_notes,
)
from finetune.release.merge import merge, release_text
from finetune.release.proof import prove
from tests.release.runs import random_run

PROOFS = [Proof("no-op", 0.25, 0.5, passed=True), Proof("loss | of `it`", 1.5, None, passed=True)]
LLAMA_NOTICE = "Llama 3.2 is licensed under the Llama 3.2 Community License, Copyright © Meta Platforms, Inc. "
LLAMA_NOTICE += "All Rights Reserved."


def a_manifest(**changed: Any) -> dict[str, Any]:
    settings = {"data.system": "Be | `kind`.", "data.date": "26 Jul 2024"}
    model = {"quantization": "nf4", "dtype": "bfloat16", "device": "cpu"}
    manifest = {
        "format": "safetensors",
        "base": {"id": "meta-llama/Llama-3.2-1B", "revision": "abc123", "sha256": {}},
        "adapter_sha256": "0" * 64,
        "data_sha256": {
            "/c/datasets--tatsu-lab--alpaca/snapshots/1/a.parquet": "1" * 64,
            "odd|na`me.jsonl": "2" * 64,
        },
        "data_licences": {"/c/datasets--tatsu-lab--alpaca/snapshots/1/a.parquet": "cc-by-nc-4.0"},
        "libraries": {"torch": "2.13.0"},
        "notes": [],
        "stop_token_ids": [7, 9],
        "onto": {"chosen": "original", "reason": "a|b", "scores": {"original": 0.5}, "rows": 6, "rows_from": "rows"},
        "result": {"steps": 4, "examples": 20, "train_loss": 5.0, "eval_loss": 4.5},
        "plan": {"settings": settings, "template": "alpaca", "model": model, "eval_examples": 6},
        "recipe": "name: |\n  ```\n",
        "overrides": ["train.epochs=1"],
    }
    return {**manifest, **changed}


def rendered_tables(card: str) -> list[list[list[str]]]:
    """Tables of rows of cells, as a CommonMark parser with the hub's table extension sees them."""
    tables: list[list[list[str]]] = []
    for token in MarkdownIt("commonmark").enable("table").parse(card):
        if token.type == "table_open":
            tables.append([])
        elif token.type == "tr_open":
            tables[-1].append([])
        elif token.type == "inline" and token.level and tables and token.level >= 4:
            tables[-1][-1].append("".join(child.content for child in token.children or ()))
    return tables


def llama_base(folder: Path) -> Path:
    folder.mkdir()
    (folder / "README.md").write_text('---\nlicense: "llama3.2"\nextra_gated_prompt: |\n  license: mit\n---\n# x\n')
    return folder


@pytest.mark.parametrize("format", [*USE, "safetensors"])
def test_the_front_matter_is_what_the_hub_reads(tmp_path: Path, format: str) -> None:
    card = write_card(a_manifest(format=format), PROOFS, name="Llama-x", base_folder=llama_base(tmp_path / "base"))
    head = yaml.safe_load(card.split("---")[1])
    read = ModelCard(card)  # the hub's own parser
    assert read.data.to_dict() == head
    assert head["license"] == "llama3.2"
    assert head["base_model"] == "meta-llama/Llama-3.2-1B"
    assert head["base_model_relation"] == ("adapter" if "adapter" in format else "finetune")
    assert head["datasets"] == ["tatsu-lab/alpaca"]
    assert head["pipeline_tag"] == "text-generation"
    assert head["library_name"] in {"transformers", "gguf", "peft"}
    assert card.count("\n# ") == 1


def test_a_licence_the_hub_does_not_know_has_a_name_and_a_link(tmp_path: Path) -> None:
    (tmp_path / "LICENSE").write_text(
        "Qwen RESEARCH LICENSE AGREEMENT\n\nQwen RESEARCH LICENSE AGREEMENT Release Date:"
    )
    card = write_card(a_manifest(), PROOFS, name="x", base_folder=tmp_path)
    head = yaml.safe_load(card.split("---")[1])
    assert (head["license"], head["license_name"]) == ("other", "qwen-research")
    assert head["license_link"].startswith("https://")
    assert "**Built with Qwen**" in card


def test_tables_survive_bars_and_backticks(tmp_path: Path) -> None:
    card = write_card(a_manifest(), PROOFS, name="a|b `c` <b> _d_", base_folder=tmp_path)
    data, figures, proofs = rendered_tables(card)
    assert data[1] == ["a.parquet of tatsu-lab/alpaca", "cc-by-nc-4.0", "1" * 64]
    assert data[2] == ["odd|na`me.jsonl", "not stated", "2" * 64]
    assert [row[1] for row in figures[1:]] == ["5.0000", "4.5000", "0.5000"]
    assert "last 4 of 4 steps" in figures[1][2]
    assert "6 held-out rows" in figures[2][2]
    assert proofs[1:] == [["no-op", "0.25", "0.5"], ["loss | of `it`", "1.5", "recorded only"]]
    html = MarkdownIt("commonmark").render(card.split("---", 2)[2])
    assert "<h1>a|b `c` &lt;b&gt; _d_</h1>" in html
    assert '<code class="language-yaml">name: |\n  ```\n</code>' in html
    assert "train.epochs=1" in html


def test_a_loss_of_16_bits_is_not_said_of_fewer(tmp_path: Path) -> None:
    figures = {}
    for format in ("safetensors", "gguf"):
        card = write_card(a_manifest(format=format, quant="q4_0"), PROOFS, name="x", base_folder=tmp_path)
        figures[format] = rendered_tables(card)[1][3][0]
        assert ("Then it was written as gguf (q4_0)" in card) == (format == "gguf")
    assert figures == {
        "safetensors": "loss merged onto the original weights, this release",
        "gguf": "loss merged onto the original weights, what this was made of",
    }


def test_every_format_says_how_it_is_used_and_what_its_proofs_cannot_show(tmp_path: Path) -> None:
    assert USE.keys() == PROOFS_MEAN.keys()
    for format in USE:
        card = write_card(a_manifest(format=format), PROOFS, name="demo", base_folder=tmp_path)
        assert "do not show" in card or "nothing was measured" in card
        assert "None of them says that the answers are right" in card
        assert "Be | `kind`." in card
        assert "26 Jul 2024" in card
        assert "token id 7 or 9" in card
        assert "{" not in card.split("## Use")[1].split("## Licence")[0].replace("[{", "").replace("}]", "")


def test_a_base_alone_and_an_adapter_without_its_run_have_cards_too(tmp_path: Path) -> None:
    bare = {"format": "gguf", "quant": "q8_0", "notes": ["mind the gap"], "onto": None, "stop_token_ids": [1]}
    bare |= {"base": {"id": "builtin:pocket-llama", "revision": None, "sha256": {}}, "tensor_types": {"Q8_0": 3}}
    (tmp_path / "x-q8_0.gguf").write_bytes(b"123")
    card = write_card(bare, PROOFS, name="x", base_folder=tmp_path, folder=tmp_path)
    assert "not fine-tuned" in card
    assert "llama-cli -m x-q8_0.gguf" in card
    assert "q8_0, 3 bytes, tensors: 3 Q8_0" in card
    assert "- mind the gap" in card
    assert "## Data" not in card
    alone = a_manifest(format="adapter", plan=None, result=None, recipe=None, data_sha256={}, onto=None)
    card = write_card(alone, PROOFS, name="x", base_folder=tmp_path)
    assert "the adapter came without its run" in card
    assert "## Recipe" not in card


def test_paths_of_this_machine_stay_here(tmp_path: Path) -> None:
    base = {"id": str(tmp_path / "secret" / "mine"), "revision": None, "sha256": {}}
    data = {str(tmp_path / "secret" / "rows.jsonl"): "0" * 64}
    card = write_card(a_manifest(base=base, data_sha256=data), PROOFS, name="x", base_folder=tmp_path)
    assert "secret" not in card
    assert "base_model:" not in card
    assert "`mine`" in card


def test_a_base_in_the_hubs_cache_is_known_by_its_hub_id() -> None:
    path = "/home/me/.cache/huggingface/hub/models--meta-llama--Llama-3.2-1B/snapshots/4e20de"
    assert hub_id_of(path, "models") == "meta-llama/Llama-3.2-1B"
    assert hub_id_of(path, "datasets") is None
    assert hub_id_of("builtin:pocket-llama", "models") is None
    assert hub_id_of("./a/b", "models") is None


# The first lines of the real texts, and what a stranger's card writes.
@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("LLAMA 3.2 COMMUNITY LICENSE AGREEMENT\n\nLlama 3.2 Version Release Date: September 25, 2024", "Llama 3.2 "),
        ("**LLAMA 3.3 COMMUNITY LICENSE AGREEMENT**\n\n Llama 3.3 Version Release Date", "Llama 3.3 "),
        ("LLAMA 3.1 COMMUNITY LICENSE AGREEMENT\nLlama 3.1 Version", "Llama 3.1 "),
        ("META LLAMA 3 COMMUNITY LICENSE AGREEMENT\n\nMeta Llama 3 Version Release Date", "Meta Llama 3 "),
        ("LLAMA 4 COMMUNITY LICENSE AGREEMENT\n\nLlama 4 Version Effective Date: April 5, 2025", "Llama 4 "),
        ("LLAMA 2 COMMUNITY LICENSE AGREEMENT\t\nLlama 2 Version Release Date: July 18, 2023", "Llama 2 "),
        (
            "                                 Apache License\n                           Version 2.0, January 2004",
            "Apache",
        ),
        ("MIT License\n\nCopyright (c) 2025 somebody", "MIT"),
        ("DEEPSEEK LICENSE AGREEMENT\n\nVersion 1.0, 23 October 2023", "DeepSeek"),
        ("Tongyi Qianwen LICENSE AGREEMENT\n\nTongyi Qianwen Release Date: August 3, 2023", "Qwen License"),
        ("All rights reserved by nobody.", None),
    ],
)
def test_a_licence_is_known_by_its_text(tmp_path: Path, text: str, name: str | None) -> None:
    (tmp_path / "LICENSE.txt").write_text(text)
    found = find_licence(tmp_path, "me/base").licence
    assert (found.name if found else None) == name or (found and name and found.name.startswith(name))


@pytest.mark.parametrize(
    ("base", "name"),
    [
        ("meta-llama/Llama-3.2-1B-Instruct", "Llama 3.2 Community License"),
        ("meta-llama/Meta-Llama-3.1-8B", "Llama 3.1 Community License"),
        ("meta-llama/Meta-Llama-3-8B", "Meta Llama 3 Community License"),
        ("meta-llama/Llama-3.3-70B-Instruct", "Llama 3.3 Community License"),
        ("meta-llama/Llama-4-Scout-17B-16E", "Llama 4 Community License"),
        ("meta-llama/Llama-2-7b-hf", "Llama 2 Community License"),
        ("/models/Llama-3.2-1B/", "Llama 3.2 Community License"),
        ("google/gemma-2-9b", "Gemma Terms of Use"),
        ("google/gemma-4-9b", None),  # Apache-2.0
        ("TinyLlama/TinyLlama-1.1B", None),
        ("me/Llama-3.25-odd", None),
        ("me/llama-30b", None),
    ],
)
def test_without_a_card_and_a_text_the_name_has_to_do(tmp_path: Path, base: str, name: str | None) -> None:
    found = find_licence(tmp_path, base)
    assert (found.licence.name if found.licence else None) == name
    if name:
        assert "name alone" in found.by


def test_what_the_base_says_goes_before_its_name(tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text("---\nlicense: mit\n---\n")
    found = find_licence(tmp_path, "deepseek-ai/DeepSeek-R1-Distill-Llama-3.1-8B")
    assert found.licence is not None
    assert found.licence.name == "MIT License"
    (note,) = licence_notes(tmp_path, "deepseek-ai/DeepSeek-R1-Distill-Llama-3.1-8B", "x")
    assert "speaks of Llama" in note
    (tmp_path / "README.md").write_text("---\nlicense: bespoke\n---\n")
    assert find_licence(tmp_path, "me/Llama-3.2-x").licence is None


def test_the_notice_stands_in_a_file_of_its_own(tmp_path: Path) -> None:
    base = llama_base(tmp_path / "base")
    (base / "LICENSE").write_text(f"LLAMA 3.2 COMMUNITY LICENSE AGREEMENT ... “{LLAMA_NOTICE}”")
    (base / "USE_POLICY.md").write_text("be good")
    (base / "licenses.json").write_text("no licence text")
    files = licence_files(base, "me/x")
    assert files.keys() == {"LICENSE", "USE_POLICY.md", "NOTICE"}
    assert files["NOTICE"] == LLAMA_NOTICE + "\n"
    (base / "Notice.txt").write_text("their own words\n")
    files = licence_files(base, "me/x")
    assert files["Notice.txt"] == f"their own words\n\n{LLAMA_NOTICE}\n"
    assert "NOTICE" not in files
    (base / "Notice.txt").write_text(LLAMA_NOTICE)
    assert licence_files(base, "me/x")["Notice.txt"] == LLAMA_NOTICE


def test_a_name_begins_as_the_licence_asks() -> None:
    by_id = {name: licence for licence in LICENCES for name in licence.ids}
    assert all(has_prefix(name, by_id["llama3.2"]) for name in ("Llama-x", "llama3-x", "LLAMA_x", "Llama"))
    assert not any(has_prefix(name, by_id["llama3.2"]) for name in ("my-Llama", "Meta-Llama-3", "demo", "Lama"))
    assert has_prefix("Llama-3-x", by_id["llama3"])
    assert not has_prefix("Llama-x", by_id["llama3"])
    assert has_prefix("anything", by_id["llama2"])


@pytest.mark.parametrize(
    "head",
    [
        "license: apache-2.0",
        "license: 'apache-2.0'  # yes",
        'license:    "apache-2.0"\r\nx: 1',
        "license:\n- apache-2.0\n- mit",
        "license: [apache-2.0, mit]",
        "a: |\n  license: mit\nlicense: apache-2.0",
        "a: {b: c}\nlicense: apache-2.0\nb: [1,\n 2]",
    ],
)
def test_front_matter_is_read_as_yaml_reads_it(tmp_path: Path, head: str) -> None:
    card = tmp_path / "README.md"
    card.write_bytes(f"---\n{head}\n---\n# title\nlicense: gpl\n".encode())
    said = yaml.safe_load(head)["license"]
    assert front_matter(card)["license"] == (said[0] if isinstance(said, list) else said) == "apache-2.0"


@pytest.mark.parametrize(
    "content", [b"", b"---\n", b"---\n: : [\n---\n", b"\xff\xfe---", b"# license: mit\n", b"---\n---\n"]
)
def test_front_matter_that_is_broken_says_nothing(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "README.md").write_bytes(content)
    assert "license" not in front_matter(tmp_path / "README.md")


def test_the_licence_of_data_is_that_of_its_own_readme(tmp_path: Path) -> None:
    for folder, about in (("mine", "about `rows.jsonl`"), ("other", "about something else"), ("none", "")):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "rows.jsonl").write_text("{}")
        if about:
            (tmp_path / folder / "README.md").write_text(f"---\nlicense: cc0-1.0\n---\n{about}\n")
    snapshot = tmp_path / "hub" / "datasets--a--b" / "snapshots" / "1"
    (snapshot / "data").mkdir(parents=True)
    (snapshot / "README.md").write_text("---\nlicense:\n- odc-by\n---\n")
    files = {name: str(tmp_path / name / "rows.jsonl") for name in ("mine", "other", "none")}
    hub_file = str(snapshot / "data" / "x.parquet")
    assert data_licences([*files.values(), hub_file]) == {files["mine"]: "cc0-1.0", hub_file: "odc-by"}
    assert data_licences(["datasets/quickstart.jsonl"]) == {"datasets/quickstart.jsonl": "apache-2.0"}


def test_a_merge_onto_a_llama_carries_notice_and_tells_of_the_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(merge_file, "prove_in_fresh_process", lambda pairs: [prove(*pair) for pair in pairs])
    run = random_run(tmp_path, dtype="bfloat16", model__quantization="none")
    (tmp_path / "base" / "README.md").write_text("---\nlicense: llama3.2\n---\n")
    release = merge(run.path, out=tmp_path / "helper")
    assert (release.out / "NOTICE").read_text() == LLAMA_NOTICE + "\n"
    assert any("'helper'" in note and "'Llama'" in note for note in release.to_json()["notes"])
    assert any("'Llama'" in line and line.startswith("note:") for line in release_text(release).splitlines())
    card = (release.out / "README.md").read_text()
    assert "**Built with Llama**" in card
    assert "'helper' does not" in card
    named = {entry["name"] for entry in read_json(release.out / "finetune.json")["files"]}
    assert named >= {"NOTICE", "README.md"}
    again = merge(run.path, out=tmp_path / "Llama-helper")
    assert not any("'Llama'" in note for note in again.notes)


def test_proofs_are_a_table_of_three_columns() -> None:
    lines = proof_table(PROOFS).splitlines()
    assert lines[0].split(" | ") == ["| what", "measured", "at most |"]
    assert re.fullmatch(r"\| no-op \| 0\.25 \| 0\.5 \|", lines[2])
