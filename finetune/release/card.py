"""The model card of a release: what it was made from, with which figures, and what was proven; plain Markdown."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from finetune.release.fresh import Proof

LICENSE_LINE = re.compile(r"^license:\s*(\S+)\s*$", re.MULTILINE)
LICENSE_FILES = ("LICENSE", "LICENSE.txt", "LICENSE.md")


def write_card(manifest: Mapping[str, Any], proofs: Sequence[Proof], *, name: str, base_folder: Path) -> str:
    """README.md of a release: front matter, origin, recipe, figures and proofs."""
    base = manifest["base"]["id"]
    license_name = license_of(base_folder)
    front = ["library_name: transformers", *([f"license: {license_name}"] if license_name else [])]
    front += ["tags: [finetune, lora]"] if Path(base).exists() else [f"base_model: {base}", "tags: [finetune, lora]"]
    parts = [
        "---\n" + "\n".join(front) + "\n---",
        f"# {name}",
        f"A fine-tuned version of `{base}`: its adapter was merged onto the {_onto_text(manifest['onto'])}.",
        "## Licence\n\n" + _license_text(base, base_folder, license_name),
        "## Data\n\n" + _data_text(manifest),
        "## Figures\n\n" + _figures_text(manifest),
        "## Proofs\n\nMade by a fresh process from the files of this folder before it got its name.\n\n"
        + proof_table(proofs),
        "A chat template that asks for the date was told the recipe's while training and proving; "
        "a server tells it its own.",
    ]
    if manifest["recipe"]:
        parts.append("## Recipe\n\n```yaml\n" + manifest["recipe"].strip() + "\n```")
    return "\n\n".join(parts) + "\n"


def license_of(base_folder: Path) -> str | None:
    """The licence that the front matter of the base's own card names, or None."""
    card = base_folder / "README.md"
    found = LICENSE_LINE.search(card.read_text(encoding="utf-8")) if card.is_file() else None
    return found.group(1) if found else None


def proof_table(proofs: Sequence[Proof]) -> str:
    """The proofs as a Markdown table."""
    rows = [
        f"| {found.name} | {found.value:.6g} | {'recorded only' if found.limit is None else f'{found.limit:.6g}'} |"
        for found in proofs
    ]
    return "\n".join(["| what | measured | at most |", "|---|--:|--:|", *rows])


def _onto_text(onto: Mapping[str, Any]) -> str:
    if onto["chosen"] == "original":
        return f"base's own weights ({onto['reason']})"
    return f"weights as the quantised base computes with ({onto['reason']})"


def _license_text(base: str, folder: Path, license_name: str | None) -> str:
    files = [name for name in LICENSE_FILES if (folder / name).is_file()]
    if license_name:
        return f"The base's: {license_name}." + (f" Its text: {files[0]}." if files else "")
    return f"The base's; its text: {files[0]}." if files else f"See the base, `{base}`."


def _data_text(manifest: Mapping[str, Any]) -> str:
    files = manifest["data_sha256"]
    return "\n".join(f"- `{Path(name).name}`, sha256 `{digest}`" for name, digest in files.items()) or "Not known."


def _figures_text(manifest: Mapping[str, Any]) -> str:
    result, onto = manifest["result"], manifest["onto"]
    lines = []
    if result:
        lines.append(
            f"- {result['steps']} steps over {result['examples']} examples, training loss {result['train_loss']:.4f}"
        )
    for candidate, loss in onto["scores"].items():
        lines.append(f"- loss merged onto the {candidate} weights, over {onto['rows']} {onto['rows_from']}: {loss:.4f}")
    return "\n".join(lines) or "None were recorded."
