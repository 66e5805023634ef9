"""The labelled rows of one source: found in the cache, or made now and kept there."""

from __future__ import annotations

import importlib.metadata
from collections.abc import Callable
from hashlib import sha256
from pathlib import Path

import numpy as np

from finetune.base import Base, sha256_of
from finetune.data.rows import Refusal
from finetune.data.sources import read_rows, source_files
from finetune.data.store import StoredRows, StoreWriter, key_of, open_store, own_folder, tokens_folder
from finetune.data.template import Template
from finetune.recipe import DataSection, SourceSection

Progress = Callable[[str, int], None]  # a source's name and how many of its rows are done


def stored_rows(
    section: SourceSection,
    data: DataSection,
    base: Base,
    template: Template,
    *,
    workers: int,
    progress: Progress | None,
) -> StoredRows:
    """Every row of a source, labelled; the same bytes read in the same way are labelled once."""
    key = _key(section, data, base, template)
    name = key or f"unkeyed-{sha256(section.source.encode()).hexdigest()}"
    folder = (tokens_folder() if key else own_folder()) / name
    stored = open_store(folder) if key else None
    return stored or _label(section, data, base, template, folder=folder, workers=workers, progress=progress)


def _label(  # noqa: PLR0913 - everything a source's labels depend on, and how it is done
    section: SourceSection,
    data: DataSection,
    base: Base,
    template: Template,
    *,
    folder: Path,
    workers: int,
    progress: Progress | None,
) -> StoredRows:
    # Only now the libraries that make text and tokens: rows that are cached need none of them.
    from finetune.data.labelling import first_of_a_kind, label_pieces, make_reading

    reading = make_reading(section, data, base, template)
    writer = StoreWriter(folder)
    seen: dict[str, int] = {}
    files: dict[str, int] = {}
    refusals: list[Refusal] = []
    unreadable: list[Refusal] = []
    stops: set[int] = set()
    rows = control_texts = largest_id = 0
    try:
        for piece in label_pieces(read_rows(section), reading, workers=workers):
            numbers = [files.setdefault(name, len(files)) for name in piece.files]
            writer.append({**piece.arrays, "file": np.asarray(numbers)})
            refusals += first_of_a_kind(piece.refusals, seen=seen)
            unreadable += piece.unreadable
            stops |= piece.stop_token_ids
            control_texts += piece.rows_with_control_texts
            largest_id = max(largest_id, int(piece.arrays["ids"].max(initial=0)))
            rows += len(numbers)
            if progress:
                progress(section.source, rows)
        return writer.publish(
            {
                "format": reading.format,
                "files": list(files),
                "refusals": [[each.reason, each.where, each.message] for each in refusals],
                "unreadable": [[each.reason, each.where, each.message] for each in unreadable],
                "stop_token_ids": sorted(stops),
                "largest_id": largest_id,
                "rows_with_control_texts": control_texts,
            }
        )
    finally:
        writer.discard()


def _key(section: SourceSection, data: DataSection, base: Base, template: Template) -> str | None:
    """The store's name, or None where a file cannot be read, so that the bytes are not known."""
    try:
        files = [(str(file), sha256_of(file)) for file in source_files(section)]
        tokenizer = sha256_of(base.tokenizer_folder / "tokenizer.json")
    except OSError:
        return None
    if not files:
        return None
    return key_of(
        {
            "source": section.source,
            "rows": section.rows,
            "columns": section.columns,
            "files": files,
            "format": data.format,
            "system": data.system,
            "rules": [data.loss_on, data.max_tokens, data.too_long, data.truncate, data.special_tokens],
            "template": [template.name, template.source, template.bos_token, template.eos_token, str(template.date)],
            "tokenizer": tokenizer,
            "libraries": [importlib.metadata.version(name) for name in ("tokenizers", "jinja2", "numpy")],
        }
    )
