"""Our chat templates in Go's text/template, as Ollama's TEMPLATE: what a model was trained with in, the equal one out.

templates/*.gotmpl say what finetune/data/templates/*.jinja say, with [bos], [eos] and [first_bos] where the tokenizer's
own stand; [trim] is the template TRIM. Ollama gives `.Messages`, each with `.Role` and `.Content`; neighbours of one
role come joined. A last message that is an answer is one that the model shall continue: nothing closes it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from finetune.data.rows import Turn
from finetune.data.template import Template, TemplateProblem
from finetune.release.ollama.go_expression import GoTemplateError
from finetune.release.ollama.go_template import parse
from finetune.release.source import PROBES

FILES = {file.stem: file for file in sorted((Path(__file__).parent / "templates").glob("*.gotmpl"))}
SYSTEMS = (None, "Answer in one word.", "\n Two lines,\n and space around them. \u00a0\n")
# What Python's str.strip takes away, by the length in UTF-8. Go's templates have no such function, so that one calls
# itself with the rest until no white space is left; `len (slice . 1)` is the length less one.
SPACES = (
    r'" " "\n" "\t" "\r" "\v" "\f" "\x1c" "\x1d" "\x1e" "\x1f"',
    r'"\u0085" "\u00a0"',
    " ".join(rf'"\u{code:04x}"' for code in (0x1680, *range(0x2000, 0x200B), 0x2028, 0x2029, 0x202F, 0x205F, 0x3000)),
)


@dataclass(frozen=True)
class Tokens:
    """What a template may write of the tokenizer's; with `adds_bos` Ollama puts bos before the whole by itself."""

    bos: str
    eos: str
    adds_bos: bool


def equal_template(trained: Template, tokens: Tokens) -> tuple[str, str] | None:
    """Name and source of the one of ours that writes every probe as `trained` does, or None."""
    for name in FILES:
        source = go_source(name, tokens)
        if differing_probes(source, trained, tokens) == 0:
            return name, source
    return None


def go_source(name: str, tokens: Tokens) -> str:
    """One of our templates for a tokenizer."""
    source = FILES[name].read_text(encoding="utf-8").removesuffix("\n")
    values = {"[trim]": TRIM, "[first_bos]": "" if tokens.adds_bos else tokens.bos, "[bos]": tokens.bos}
    for mark, value in (values | {"[eos]": tokens.eos}).items():
        source = source.replace(mark, value)
    return source


def differing_probes(source: str, trained: Template, tokens: Tokens) -> int:
    """How many probe conversations Ollama, with this template, writes in another way than training did.

    Those that training's template refuses are left out; if it refuses all, one is counted as differing.
    """
    differing = compared = 0
    for turns in probe_conversations():
        try:
            wanted = trained.text(turns, add_generation_prompt=True)
        except TemplateProblem:
            continue
        compared += 1
        differing += ollama_text(source, turns, tokens) != wanted
    return differing if compared else 1


def probe_conversations() -> list[list[Turn]]:
    """The probes of every release, without a system turn and with two, and answers with white space around them."""
    texts = [*PROBES, ("Go on.", "  \n An answer with space around it.\u3000\n", "\u2003And?\x1f ")]
    conversations = []
    for system in SYSTEMS:
        first = [] if system is None else [Turn("system", system)]
        for probe in texts:
            turns = [Turn("assistant" if place % 2 else "user", text) for place, text in enumerate(probe)]
            conversations.append([*first, *turns])
    return conversations


def ollama_text(source: str, turns: Sequence[Turn], tokens: Tokens) -> str | None:
    """What Ollama hands to the model for these turns, bos included; None where the template cannot be executed."""
    messages = [{"Role": turn.role, "Content": turn.text} for turn in turns]
    system = "\n\n".join(turn.text for turn in turns if turn.role == "system")
    try:
        text = parse(source).render({"Messages": messages, "System": system, "Response": ""})
    except GoTemplateError:
        return None
    return (tokens.bos if tokens.adds_bos else "") + text


def _trim() -> str:
    cases = []
    for size, spaces in enumerate(SPACES, start=1):
        cut = f"len (slice . {size})"
        cases.append((f"and (ge (len .) {size}) (eq (slice . 0 {size}) {spaces})", f"slice . {size}"))
        cases.append((f"and (ge (len .) {size}) (eq (slice . ({cut})) {spaces})", f"slice . 0 ({cut})"))
    lines = [f'{{{{- else if {case} }}}}{{{{ template "trim" ({rest}) }}}}' for case, rest in cases]
    lines[0] = lines[0].replace("else if", "if", 1)
    return "\n".join(['{{- define "trim" }}', *lines, "{{- else }}{{ . }}{{ end }}", "{{- end }}"])


TRIM = _trim()
