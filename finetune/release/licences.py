"""What the base's licence asks of whoever gives a fine-tuned model away: a base's folder and name in, duties out."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path

NOTICE = "NOTICE"
LICENCE_FILES = re.compile(r"(licen[cs]e|notice|use[_-]policy|copying)([._-].*)?", re.IGNORECASE)
TEXT_SUFFIXES = {"", ".txt", ".md", ".rst"}
READ_CHARACTERS = 4000  # the title of a licence stands at its beginning
FRONT_MATTER = re.compile(r"\A---\s*\n(.*?)\n---\s*(?:\n|\Z)", re.DOTALL)


@dataclass(frozen=True)
class Licence:
    """One licence: how it is recognised, and what it asks of those who distribute a model made from the base."""

    name: str
    ids: tuple[str, ...]  # `license` or `license_name` in the front matter of a hub card
    link: str
    title: str = ""  # regular expression for the beginning of its text
    hub_names: str = ""  # regular expression for the last part of a base's name; empty: not told by a name
    display: str = ""  # to be shown in the documentation of the model
    prefix: str = ""  # the model's name has to begin with it
    notice: str = ""  # to be kept in a text file called NOTICE
    duties: tuple[str, ...] = ()  # everything else, in our own words


COPY = "Give a copy of the licence along."
CHANGED = "Say in every changed file, or beside it, that it was changed."
COMPANY_OF_700_MILLION = (
    "A company whose products had more than 700 million monthly users when the base came out needs Meta's own leave."
)
NOT_IN_THE_EU = (
    "For its models that also read images, the use policy grants no rights to people who live, or companies that have "
    "their seat, in the European Union; users of a product that contains them are not concerned."
)


def _llama(version: str, *, more: tuple[str, ...] = ()) -> Licence:
    """Llama 3.1 and later: the same demands under another number (section 1.b of each agreement)."""
    number, path = version.replace(".", r"\."), version.replace(".", "_")
    policy = f"Follow the acceptable use policy: https://www.llama.com/llama{path}/use-policy."
    return Licence(
        name=f"Llama {version} Community License",
        ids=(f"llama{version}",),
        link=f"https://github.com/meta-llama/llama-models/blob/main/models/llama{path}/LICENSE",
        title=rf"llama\s+{number}\s+community\s+license",
        hub_names=rf"(meta[-_])?llama[-_]?{number}(?![.\d])",
        display="Built with Llama",
        prefix="Llama",
        notice=f"Llama {version} is licensed under the Llama {version} Community License, "
        "Copyright © Meta Platforms, Inc. All Rights Reserved.",
        duties=(COPY, policy, COMPANY_OF_700_MILLION, *more),
    )


# Sources: section 1.b and 2 of LICENSE in github.com/meta-llama/llama-models (models/llama3_1, 3_2, 3_3, llama4),
# meta-llama/llama3 and meta-llama/llama; USE_POLICY.md beside them for the European Union; for the others the text
# behind `link`. As of November 2026. An aid to memory and no legal advice: the texts decide.
LICENCES: tuple[Licence, ...] = (
    _llama("4", more=(NOT_IN_THE_EU,)),
    _llama("3.3"),
    _llama("3.2", more=(NOT_IN_THE_EU,)),
    _llama("3.1"),
    Licence(
        name="Meta Llama 3 Community License",
        ids=("llama3",),
        link="https://github.com/meta-llama/llama3/blob/main/LICENSE",
        title=r"meta\s+llama\s+3\s+community\s+license",
        hub_names=r"(meta[-_])?llama[-_]?3(?![.\d])",
        display="Built with Meta Llama 3",
        prefix="Llama 3",
        notice="Meta Llama 3 is licensed under the Meta Llama 3 Community License, "
        "Copyright © Meta Platforms, Inc. All Rights Reserved.",
        duties=(
            COPY,
            "Follow the acceptable use policy: https://llama.meta.com/llama3/use-policy.",
            COMPANY_OF_700_MILLION,
            "Do not improve other language models with it or with what it writes.",
        ),
    ),
    Licence(
        name="Llama 2 Community License",
        ids=("llama2",),
        link="https://github.com/meta-llama/llama/blob/main/LICENSE",
        title=r"llama\s+2\s+community\s+license",
        hub_names=r"codellama|(meta[-_])?llama[-_]?2(?![.\d])",
        notice="Llama 2 is licensed under the LLAMA 2 Community License, "
        "Copyright (c) Meta Platforms, Inc. All Rights Reserved.",
        duties=(
            COPY,
            "Follow the acceptable use policy: https://ai.meta.com/llama/use-policy.",
            COMPANY_OF_700_MILLION,
            "Do not improve other language models with it or with what it writes.",
        ),
    ),
    Licence(
        name="Gemma Terms of Use",
        ids=("gemma",),
        link="https://ai.google.dev/gemma/terms",
        title=r"gemma\s+terms\s+of\s+use",
        hub_names=r"gemma[-_](2b|7b|1\.1|[23]n?[-_])",
        notice="Gemma is provided under and subject to the Gemma Terms of Use found at ai.google.dev/gemma/terms",
        duties=(
            COPY,
            CHANGED,
            "Bind those who get the model to the use restrictions: https://ai.google.dev/gemma/prohibited_use_policy.",
        ),
    ),
    Licence(
        name="Qwen Research License",
        ids=("qwen-research",),
        link="https://huggingface.co/Qwen/Qwen2.5-3B/blob/main/LICENSE",
        title=r"qwen\s+research\s+license",
        display="Built with Qwen",
        notice="Qwen is licensed under the Qwen RESEARCH LICENSE AGREEMENT, "
        "Copyright (c) Alibaba Cloud. All Rights Reserved.",
        duties=(COPY, CHANGED, "Research and evaluation only; commercial use needs a licence of Alibaba Cloud."),
    ),
    Licence(
        name="Qwen License",
        ids=("qwen", "tongyi-qianwen"),
        link="https://huggingface.co/Qwen/Qwen2.5-72B/blob/main/LICENSE",
        title=r"(tongyi\s+qianwen|qwen)\s+license",
        display="Built with Qwen",
        notice="Qwen is licensed under the Qwen LICENSE AGREEMENT, Copyright (c) Alibaba Cloud. All Rights Reserved.",
        duties=(COPY, CHANGED, "Products with more than 100 million monthly users need a licence of Alibaba Cloud."),
    ),
    Licence(
        name="Mistral AI Research License",
        ids=("mrl",),
        link="https://mistral.ai/licenses/MRL-0.1.md",
        title=r"mistral\s+ai\s+research\s+license",
        notice="Licensed by Mistral AI under the Mistral AI Research License",
        duties=(COPY, CHANGED, "Research only; commercial use needs a licence of Mistral AI."),
    ),
    Licence(
        name="DeepSeek License",
        ids=("deepseek", "deepseek-license"),
        link="https://github.com/deepseek-ai/DeepSeek-V2/blob/main/LICENSE-MODEL",
        title=r"deepseek\s+license\s+agreement",
        duties=(COPY, CHANGED, "Bind those who get the model to the use restrictions of its attachment A."),
    ),
    Licence(
        name="TII Falcon License",
        ids=("falcon-llm-license", "falcon-180b-tii-license"),
        link="https://falconllm.tii.ae/falcon-terms-and-conditions.html",
        title=r"(tii\s+falcon|falcon\s+llm|falcon\s+180b\s+tii)\s+license",
        display="Built using Falcon LLM technology from the Technology Innovation Institute",
        duties=(COPY, CHANGED, "Follow the acceptable use policy, and bind those who get the model to it."),
    ),
    Licence(
        name="Apache License 2.0",
        ids=("apache-2.0",),
        link="https://www.apache.org/licenses/LICENSE-2.0",
        title=r"apache\s+license\s+version\s+2\.0",
        duties=(COPY, CHANGED, "Keep the base's copyright lines, and its NOTICE file where it has one."),
    ),
    Licence(
        name="MIT License",
        ids=("mit",),
        link="https://opensource.org/license/mit",
        title=r"mit\s+license|permission is hereby granted, free of charge, to any person obtaining a copy",
        duties=("Keep the base's copyright line and the licence's text.",),
    ),
)


@dataclass(frozen=True)
class Found:
    """What is known of a base's licence."""

    licence: Licence | None
    by: str  # in words, how it was recognised
    declared: dict[str, str]  # license, license_name and license_link of the base's card
    files: tuple[str, ...]  # licence texts and notices in the base's folder

    @property
    def has_text(self) -> bool:
        return any(not name.lower().startswith("notice") for name in self.files)


def find_licence(base_folder: Path, base_id: str) -> Found:
    """The licence by its text, else by what the base's card says, else by the base's name alone."""
    files = licence_files_of(base_folder)
    said = front_matter(base_folder / "README.md")
    declared = {key: said[key] for key in ("license", "license_name", "license_link") if said.get(key)}
    names = [declared[key].lower() for key in ("license_name", "license") if key in declared]
    for licence in LICENCES:
        for file in files:
            if licence.title and _begins_as(file, licence.title):
                return Found(licence, f"its text, {file.name}", declared, _names(files))
    for licence in LICENCES:
        if set(names) & set(licence.ids):
            return Found(licence, "the base's own card", declared, _names(files))
    last = base_id.rstrip("/").rsplit("/", 1)[-1]
    for licence in LICENCES if not names else ():
        if licence.hub_names and re.match(licence.hub_names, last, re.IGNORECASE):
            return Found(licence, "the base's name alone; check it", declared, _names(files))
    return Found(None, "the base's own card" if declared else "", declared, _names(files))


def licence_files(base_folder: Path, base_id: str) -> dict[str, str]:
    """Name and text of every file that has to lie beside the weights because of the base's licence."""
    texts = {file.name: file.read_text(encoding="utf-8", errors="replace") for file in licence_files_of(base_folder)}
    licence = find_licence(base_folder, base_id).licence
    # The text of the licence quotes its notice too; the notice has to stand in a file of its own nevertheless.
    name = next((name for name in texts if name.lower().startswith("notice")), NOTICE)
    if licence is not None and licence.notice and licence.notice not in texts.get(name, ""):
        texts[name] = "\n\n".join(part for part in (texts.get(name, "").strip(), licence.notice) if part) + "\n"
    return texts


def write_licence_files(folder: Path, base_folder: Path, base_id: str) -> None:
    """Write what `licence_files` names into the folder of a release."""
    for name, text in licence_files(base_folder, base_id).items():
        (folder / name).write_text(text, encoding="utf-8")


def licence_notes(base_folder: Path, base_id: str, name: str) -> list[str]:
    """What its maker has to know before the model `name` is given away; empty where nothing is to be done."""
    found = find_licence(base_folder, base_id)
    licence = found.licence
    notes = []
    if licence is not None and not has_prefix(name, licence):
        notes.append(
            f"the {licence.name} asks for a model name that begins with {licence.prefix!r}; {name!r} does not: "
            "choose another folder name, or at least another repository name, before you give it away"
        )
    if licence is not None and COPY in licence.duties and not found.has_text and licence.notice:
        notes.append(
            f"the {licence.name} asks for a copy of it beside the model, and the base's folder has none: save the "
            f"text of {licence.link} there as LICENSE and write the release again"
        )
    if re.search(r"llama[-_]?\d", base_id, re.IGNORECASE) and licence is not None and "Llama" not in licence.name:
        notes.append(f"the base's name speaks of Llama, its licence is the {licence.name}; read what its card says")
    return notes


def data_licences(files: Iterable[str]) -> dict[str, str]:
    """The licence of each data file by its name, where the README.md of its folder or data set states one."""
    return {name: licence for name in files if (licence := _data_licence(Path(name).expanduser()))}


def _data_licence(file: Path) -> str | None:
    """From the front matter of the README.md of a hub data set, or of one beside the file that speaks of it."""
    for folder in list(file.parents)[:3]:
        card = folder / "README.md"
        if card.is_file():
            values = front_matter(card)
            is_about_it = folder.parent.name == "snapshots" or file.name in card.read_text("utf-8", errors="replace")
            return (values.get("license_name") or values.get("license")) if is_about_it else None
        if folder.parent.name == "snapshots":
            return None
    return None


def has_prefix(name: str, licence: Licence) -> bool:
    """Whether a model's name begins as the licence asks; case and the signs between words do not count."""
    return _plain(name).startswith(_plain(licence.prefix))


def licence_files_of(folder: Path) -> list[Path]:
    """The licence texts, notices and use policies of a base's folder."""
    if not folder.is_dir():
        return []
    return sorted(
        file
        for file in folder.iterdir()
        if file.is_file() and LICENCE_FILES.fullmatch(file.name) and file.suffix.lower() in TEXT_SUFFIXES
    )


def front_matter(card: Path) -> dict[str, str]:
    """The one-line values at the head of a hub card; of a list the first. Nothing of what cannot be read.

    No YAML: a stranger's card may be broken anywhere, and one line is enough to know a licence.
    """
    if not card.is_file():
        return {}
    head = FRONT_MATTER.match(card.read_text(encoding="utf-8", errors="replace").replace("\r\n", "\n"))
    lines = head.group(1).split("\n") if head else []
    values: dict[str, str] = {}
    for line, after in zip_longest(lines, lines[1:], fillvalue=""):
        if (match := re.match(r"([\w-]+):(?:\s+(.*))?$", line)) is None:
            continue
        value = _bare(match.group(2) or "")
        if not value and (item := re.match(r"\s*-\s+(.*)$", after)):
            value = _bare(item.group(1))
        values.setdefault(match.group(1), value.strip("[]").split(",")[0].strip() if value.startswith("[") else value)
    return values


def _bare(value: str) -> str:
    value = re.sub(r"\s+#.*$", "", value.strip())
    return value[1:-1] if len(value) > 1 and value[0] == value[-1] and value[0] in "'\"" else value


def _begins_as(file: Path, title: str) -> bool:
    text = file.read_text(encoding="utf-8", errors="replace")[:READ_CHARACTERS]
    return bool(re.search(title, " ".join(re.sub(r"[^\w.]+", " ", text).split()), re.IGNORECASE))


def _names(files: Sequence[Path]) -> tuple[str, ...]:
    return tuple(file.name for file in files)


def _plain(name: str) -> str:
    return re.sub(r"[\W_]+", "", name).lower()
