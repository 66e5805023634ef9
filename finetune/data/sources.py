"""Read a source: a file, a folder or a hub data set in, rows out, each with the file and line it stands on."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from difflib import get_close_matches
from functools import partial
from pathlib import Path

from finetune.data.hub import PREFIX, hub_files
from finetune.data.json_rows import read_json
from finetune.data.json_values import field_name
from finetune.data.parquet import read_parquet
from finetune.data.rows import UNREADABLE, Refusal, Row
from finetune.data.stream import COMPRESSIONS, LARGEST_ROW, Damaged, Flaw, Found, check_file, read_chunks
from finetune.data.tables import read_paragraphs, read_table
from finetune.errors import UserError
from finetune.recipe import SourceSection

READERS: dict[str, Callable[..., Iterator[Found]]] = {
    ".json": read_json,
    ".jsonl": read_json,
    ".ndjson": read_json,
    ".csv": partial(read_table, delimiter=","),
    ".tsv": partial(read_table, delimiter="\t"),
    ".txt": read_paragraphs,
    ".parquet": read_parquet,
}
KNOWN = f"{', '.join(READERS)} (all but the last also with {', '.join(COMPRESSIONS)} behind it)"


def read_rows(source: SourceSection, *, limit: int = LARGEST_ROW) -> Iterator[Row | Refusal]:
    """The source's records in order, each a row or the reason why it is none; memory does not grow with the source.

    `source.rows` counts the records that are refused too. No row is larger than `limit` bytes.
    """
    found = _first(_records(source.source, limit=limit), source.rows)
    return _renamed(found, source) if source.columns else found


def source_files(source: SourceSection) -> list[Path]:
    """The files of a source that can be read, in the order they are read; none where it is missing."""
    files = _find(source.source)
    return [] if isinstance(files, Refusal) else [path for _, path in files if _opens(path)]


def _opens(path: Path) -> bool:
    try:
        check_file(path)
    except Damaged:
        return False
    return True


def _records(source: str, *, limit: int) -> Iterator[Row | Refusal]:
    files = _find(source)
    if isinstance(files, Refusal):
        yield files
        return
    for name, path in files:
        for line, found in read_file(path, limit=limit):
            if isinstance(found, Flaw):
                yield Refusal(found.reason, f"{name}:{line}", found.message)
            else:
                yield Row(found, name, line)


def read_file(path: Path, *, limit: int) -> Iterator[Found]:
    """(line, row or flaw) of every record of one file, and a last flaw where it cannot be read to its end."""
    kind, compression = _kind(path.name)
    count = 0
    try:
        check_file(path)
        if kind == ".parquet":
            if compression:
                raise Damaged("is a Parquet file compressed twice; unpack it")
            records = read_parquet(path, limit=limit)
        else:
            records = READERS[kind](read_chunks(path, compression), limit=limit)
        for count, record in enumerate(records, start=1):  # noqa: B007
            yield record
        if count == 0:
            raise Damaged("holds no rows; it needs at least one")
    except Damaged as damage:
        yield damage.line, damage.flaw


def _kind(name: str) -> tuple[str, str]:
    """The suffix that says how rows are written, "" for an unknown one, and that of the compression."""
    stem, suffix = os.path.splitext(name.lower())
    compression = suffix if suffix in COMPRESSIONS else ""
    kind = os.path.splitext(stem)[1] if compression else suffix
    return (kind if kind in READERS else ""), compression


# --- which files ---


def _find(source: str) -> list[tuple[str, Path]] | Refusal:
    """The files of a source, each with the name that messages give it."""
    if source.startswith(PREFIX):
        try:
            return list(hub_files(source))
        except UserError as error:
            return Refusal(UNREADABLE, error.problems[0].where, error.problems[0].message)
    path = Path(source).expanduser()
    try:
        if path.is_dir():
            return _files_in(path, source)
        if not path.exists() and not path.is_symlink():
            return _missing(path, source)
    except (OSError, ValueError) as error:  # no permission on the way, a name too long, a NUL in it
        reason = error.strerror if isinstance(error, OSError) else str(error)
        place = f" {error.filename}" if isinstance(error, OSError) and error.filename else ""
        return Refusal(UNREADABLE, source, f"source: cannot look at{place} ({reason}); correct the path or permissions")
    if not _kind(path.name)[0]:
        return Refusal(UNREADABLE, source, f"source: a name of unknown kind; let it end in {KNOWN}")
    return [(source, path)]


def _missing(path: Path, source: str) -> Refusal:
    there = sorted(each.name for each in path.parent.iterdir() if _kind(each.name)[0]) if path.parent.is_dir() else []
    nearby = [*get_close_matches(path.name, there, n=5), *there]
    hint = f"; in the same folder: {', '.join(dict.fromkeys(nearby[:5]))}" if nearby else ""
    cure = "correct the path, which starts at the current folder"
    return Refusal(UNREADABLE, source, f"source: no such data file; {cure}{hint}")


def _files_in(folder: Path, source: str) -> list[tuple[str, Path]] | Refusal:
    """The data files below a folder, sorted by path; hidden ones and those of other kinds do not count."""
    found, seen = [], set()
    for root, folders, names in os.walk(folder, onerror=_stop, followlinks=True):
        here = os.stat(root)
        if (here.st_dev, here.st_ino) in seen:  # a link that leads back
            folders.clear()
            continue
        seen.add((here.st_dev, here.st_ino))
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        found += [Path(root, name) for name in names if not name.startswith(".") and _kind(name)[0]]
    if not found:
        return Refusal(UNREADABLE, source, f"source: a folder without a data file; put one in that ends in {KNOWN}")
    below = {path.relative_to(folder): path for path in found}
    return [(f"{source.rstrip('/') or ''}/{_printable(name)}", below[name]) for name in sorted(below)]


def _stop(error: OSError) -> None:
    """A folder that may not be opened is told; os.walk would pass over it."""
    raise error


def _printable(name: Path) -> str:
    return os.fsencode(name).decode("utf-8", "backslashreplace")


# --- rows and columns ---


def _first(records: Iterable[Row | Refusal], rows: int | None) -> Iterator[Row | Refusal]:
    count = 0
    for record in records:
        yield record
        count += isinstance(record, Row) or record.reason != UNREADABLE
        if count == rows:
            return


def _renamed(records: Iterable[Row | Refusal], source: SourceSection) -> Iterator[Row | Refusal]:
    columns: Mapping[str, str] = source.columns or {}
    missing, first = set(columns), None
    for record in records:
        if isinstance(record, Refusal):
            yield record
            continue
        first = first or record
        missing -= record.values.keys()
        values = {columns.get(name, name): value for name, value in record.values.items()}
        if len(values) < len(record.values):
            yield _collision(record, columns)
            return
        yield Row(values, record.file, record.line)
    for name in sorted(missing if first else ()):
        seen = ", ".join(map(field_name, first.values))  # type: ignore[union-attr]
        message = f"{field_name(name)}: data's key columns renames it, but no row has it; the first row has: {seen}"
        yield Refusal("missing_column", first.where, message)  # type: ignore[union-attr]


def _collision(row: Row, columns: Mapping[str, str]) -> Refusal:
    names = [columns.get(name, name) for name in row.values]
    twice = next(name for name in names if names.count(name) > 1)
    theirs = " and ".join(field_name(name) for name in row.values if columns.get(name, name) == twice)
    cure = "rename each to another name in data's key columns; the rest of the source was not read"
    return Refusal(
        UNREADABLE, row.where, f"{field_name(twice)}: two columns of the row get this name, {theirs}; {cure}"
    )
