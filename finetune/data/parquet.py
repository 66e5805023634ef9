"""Parquet: a file in, rows out, with those types only that JSON has."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from finetune.data.json_values import field_name
from finetune.data.rows import UNREADABLE
from finetune.data.stream import Flaw, Found, too_large

if TYPE_CHECKING:
    import pyarrow

BATCH_BYTES = 16 * 2**20


def read_parquet(path: Path, *, limit: int) -> Iterator[Found]:
    """The rows of a Parquet file, numbered from 1 in place of a line; lists and structs become lists and objects."""
    import pyarrow
    from pyarrow.parquet import ParquetFile

    number = 0
    try:
        with ParquetFile(path) as file:
            for row in _rows(file, limit=limit):
                number += 1
                yield number, row
    except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as error:
        what = f"is damaged after row {number:,}" if number else "is no Parquet file, or is damaged"
        reason = field_name(str(error).partition(". ")[0].strip() or type(error).__name__)
        yield number + 1, Flaw(UNREADABLE, f"file: {what} ({reason}); copy it again; the rest of it was not read")


def _rows(file: Any, *, limit: int) -> Iterator[dict[str, Any] | Flaw]:
    import pyarrow.types as types

    if flaw := _schema_flaw(file.schema_arrow):
        yield flaw
        return
    floats = any(_any_type(each, types.is_floating) for each in file.schema_arrow.types)
    for batch in file.iter_batches(batch_size=_batch_rows(file.metadata)):
        yield from _rows_of(batch, limit=limit, floats=floats)


def _batch_rows(metadata: Any) -> int:
    size = sum(metadata.row_group(index).total_byte_size for index in range(metadata.num_row_groups))
    return max(1, min(4096, BATCH_BYTES * max(metadata.num_rows, 1) // max(size, 1)))


def _rows_of(batch: pyarrow.RecordBatch, *, limit: int, floats: bool) -> Iterator[dict[str, Any] | Flaw]:
    try:
        rows = batch.to_pylist()
    except UnicodeDecodeError:
        if batch.num_rows > 1:  # only the row that holds the bytes is refused
            for index in range(batch.num_rows):
                yield from _rows_of(batch.slice(index, 1), limit=limit, floats=floats)
        else:
            yield Flaw("invalid_text", f"{_undecodable(batch)}: holds bytes that are not UTF-8; write it as UTF-8 text")
        return
    large = batch.nbytes > limit
    for row in rows:
        if large and _size(row) > limit:
            yield too_large(limit)
        elif floats and (name := next((name for name, value in row.items() if _holds_nan(value)), None)):
            yield Flaw("wrong_type", f"{field_name(name)}: holds NaN or an infinite number; write a number or null")
        else:
            yield row


def _undecodable(batch: pyarrow.RecordBatch) -> str:
    for name, column in zip(batch.schema.names, batch.columns, strict=True):
        try:
            column.to_pylist()
        except UnicodeDecodeError:
            return field_name(name)
    return "row"


def _size(value: Any) -> int:
    if isinstance(value, str):
        return len(value.encode())
    if isinstance(value, dict):
        return sum(_size(each) for each in value.values())
    return sum(map(_size, value)) if isinstance(value, list) else 8


def _holds_nan(value: Any) -> bool:
    if isinstance(value, float):
        return not math.isfinite(value)
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return any(map(_holds_nan, inner))


def _schema_flaw(schema: pyarrow.Schema) -> Flaw | None:
    cure = "write it as text, a number, a list or a struct, or leave the column out"
    for name, kind in zip(schema.names, schema.types, strict=True):
        if schema.names.count(name) > 1:
            return Flaw(UNREADABLE, f"{field_name(name)}: two columns have this name; rename or delete one")
        if (other := _type_unlike_json(kind)) is not None:
            return Flaw(
                UNREADABLE, f"{field_name(name)}: of the type {field_name(str(other))}, unknown to JSON; {cure}"
            )
    return None


def _inner_types(kind: pyarrow.DataType) -> list[pyarrow.DataType]:
    import pyarrow.types as types

    if types.is_struct(kind):
        return [field.type for field in kind]
    if types.is_list(kind) or types.is_large_list(kind) or types.is_fixed_size_list(kind) or types.is_dictionary(kind):
        return [kind.value_type]
    return []


def _type_unlike_json(kind: pyarrow.DataType) -> pyarrow.DataType | None:
    """The type itself, or one inside it, whose values JSON cannot hold."""
    import pyarrow.types as types

    if types.is_struct(kind) and len({field.name for field in kind}) != kind.num_fields:
        return kind
    if inner := _inner_types(kind):
        return next((found for each in inner if (found := _type_unlike_json(each)) is not None), None)
    plain = (types.is_string, types.is_large_string, types.is_string_view, types.is_boolean, types.is_integer)
    return None if any(is_it(kind) for is_it in (*plain, types.is_floating, types.is_null)) else kind


def _any_type(kind: pyarrow.DataType, is_it: Any) -> bool:
    return is_it(kind) or any(_any_type(each, is_it) for each in _inner_types(kind))
