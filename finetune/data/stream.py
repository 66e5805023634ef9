"""The bytes of a data file: a path in, chunks and lines out, decompressed and never whole in memory."""

from __future__ import annotations

import bz2
import codecs
import json
import lzma
import os
import stat
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from finetune.data.rows import UNREADABLE

LARGEST_ROW = 64 * 2**20  # bytes
CHUNK = 2**20
# Compressed bytes taken at once: zstd can make 64,000 bytes of one, so this bounds a chunk at about 128 MiB.
PIECE = 2048

MAGIC = {  # how a file starts that is not what its name says
    b"\x1f\x8b": "compressed with gzip; let its name end in .gz",
    b"\xfd7zXZ\x00": "compressed with xz; let its name end in .xz",
    b"\x28\xb5\x2f\xfd": "compressed with zstd; let its name end in .zst",
    b"BZh": "compressed with bzip2; let its name end in .bz2",
    b"PK\x03\x04": "a zip archive or an Office file; unpack it, or save the table as CSV",
    b"PAR1": "a Parquet file; let its name end in .parquet",
}


@dataclass(frozen=True, slots=True)
class Flaw:
    """Why a row, or with `unreadable` the rest of a file, cannot be used; `message` is `field: why; cure`."""

    reason: str
    message: str


# The line a record starts on, and its columns or why it has none.
Found = tuple[int, dict[str, Any] | Flaw]


class Damaged(Exception):
    """A file that cannot be read, or not beyond `line`; the text is `what is wrong; what to do`."""

    line = 1

    @property
    def flaw(self) -> Flaw:
        return Flaw(UNREADABLE, f"file: {self}")


def check_file(path: Path) -> None:
    """Look before opening: a pipe would wait for ever, and a folder is no file.

    Raises:
        Damaged: if the path is there and is not a file that can be opened.
    """
    try:
        mode = path.stat().st_mode
        if not stat.S_ISREG(mode):
            raise Damaged("neither a file nor a folder but a pipe, socket or device; save the rows in a file")
        os.close(os.open(path, os.O_RDONLY))
    except PermissionError as error:
        raise Damaged("may not be read by you; change its permissions (chmod u+r)") from error
    except OSError as error:
        raise Damaged(f"cannot be opened ({error.strerror}); correct the path or the link") from error


def read_chunks(path: Path, compression: str) -> Iterator[bytes]:
    """The file's bytes, decompressed, without a UTF-8 mark.

    Raises:
        Damaged: where the bytes end early, or are those of another kind of file.
    """
    try:
        with path.open("rb") as file:
            chunks = _inflate(file, compression) if compression else iter(lambda: file.read(CHUNK), b"")
            yield from _checked(chunks)
    except OSError as error:
        raise Damaged(f"reading stopped ({error.strerror or error}); copy the file again") from error


def _checked(chunks: Iterator[bytes]) -> Iterator[bytes]:
    head = b""
    for chunk in chunks:
        head += chunk
        if len(head) >= 8:
            break
    for magic, what in MAGIC.items():
        if head.startswith(magic):
            raise Damaged(f"is {what}")
    if head[:4] == b"\0\0\0\0":
        raise Damaged("starts with NUL bytes, as a file does whose copy was cut; copy it again")
    encoding = json.detect_encoding(head)
    if not encoding.startswith("utf-8"):
        raise Damaged(f"is {encoding.upper()[:6]} text; save it as UTF-8")
    yield head.removeprefix(codecs.BOM_UTF8)
    yield from chunks


# --- compressed files ---


def _zlib() -> Any:
    return zlib.decompressobj(wbits=31)  # 31: gzip, with its check sum


def _zstd() -> Any:
    try:
        import zstandard
    except ImportError as error:
        raise Damaged("needs a package that is not installed; run `pip install zstandard`, or unpack it") from error
    return zstandard.ZstdDecompressor().decompressobj()


COMPRESSIONS: dict[str, Callable[[], Any]] = {
    ".gz": _zlib,
    ".xz": lambda: lzma.LZMADecompressor(lzma.FORMAT_XZ),
    ".bz2": bz2.BZ2Decompressor,
    ".zst": _zstd,
}


def _inflate(file: BinaryIO, compression: str) -> Iterator[bytes]:
    """One decompressor after another: a file may hold several compressed parts, with zeros between them."""
    parts, size, part = 0, 0, None
    piece = file.read(PIECE)
    while piece:
        if part is None and parts and not piece.strip(b"\0"):
            piece = file.read(PIECE)
            continue
        part = part or COMPRESSIONS[compression]()
        data = _unpack(part, piece, known=f"after {size:,} unpacked bytes" if size or parts else f"or no {compression}")
        size += len(data)
        if data:
            yield data
        piece = part.unused_data if part.eof else b""
        if part.eof:
            parts, part = parts + 1, None
        piece = piece or file.read(PIECE)
    if part is not None:
        raise Damaged(f"ends in the middle, after {size:,} unpacked bytes; copy it again")


def _unpack(part: Any, piece: bytes, *, known: str) -> bytes:
    try:
        return part.decompress(piece)
    except Exception as error:
        # Each library has its own exception, one of them with no other base than Exception.
        if not isinstance(error, (zlib.error, lzma.LZMAError, OSError, ValueError, EOFError)) and not _is_zstd(error):
            raise
        raise Damaged(f"is damaged, {known}; copy it again") from error


def _is_zstd(error: Exception) -> bool:
    return type(error).__module__.startswith("zstandard")


# --- lines ---


class Lines:
    """The lines of a stream, each with its end (\\n, \\r\\n or \\r); None for one that is too large.

    `number` is that of the line handed out last, `quotes` how many quotation marks the last one too large held.
    """

    def __init__(self, chunks: Iterator[bytes], *, limit: int) -> None:
        self._chunks = chunks
        self._limit = limit
        self.number = 0
        self.quotes = 0

    def __iter__(self) -> Iterator[bytes | None]:
        try:
            yield from self._split()
        except Damaged as damage:
            damage.line = self.number + 1
            raise

    def _split(self) -> Iterator[bytes | None]:
        parts: list[bytes] = []
        size, skipped = 0, False
        for chunk in self._chunks:
            split = b"\n" in chunk or b"\r" in chunk or (parts and parts[-1].endswith(b"\r"))
            parts.append(chunk)
            size += len(chunk)
            if split:
                *whole, rest = _cut(b"".join(parts))
                for line in whole:
                    yield self._next(line, skipped=skipped)
                    skipped = False
                parts, size = [rest] if rest else [], len(rest)
            elif size > self._limit:
                self._forget(parts, already=skipped)
                parts, size, skipped = [], 0, True
        if parts or skipped:
            yield self._next(b"".join(parts), skipped=skipped)

    def _next(self, line: bytes, *, skipped: bool) -> bytes | None:
        self.number += 1
        if not skipped and len(line) <= self._limit:
            return line
        self._forget([line], already=skipped)
        return None

    def _forget(self, parts: list[bytes], *, already: bool) -> None:
        found = sum(part.count(b'"') for part in parts)
        self.quotes = self.quotes + found if already else found


def _cut(data: bytes) -> list[bytes]:
    """Whole lines, and what is left: a \\r at the end may be the first half of \\r\\n."""
    lines = data.splitlines(keepends=True)
    return lines if lines and not lines[-1].endswith(b"\n") else [*lines, b""]


def too_large(limit: int) -> Flaw:
    size = f"{limit // 2**20} MiB" if limit >= 2**20 else f"{limit} bytes"
    return Flaw("row_too_large", f"row: larger than {size}; split or delete it")
