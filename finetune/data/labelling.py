"""Label the rows of one source: a stream of rows in, the arrays of a store out, by as many processes as pay."""

from __future__ import annotations

import multiprocessing
import signal
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from hashlib import blake2b
from itertools import chain, islice
from typing import Any

import numpy as np

from finetune.base import Base
from finetune.data.encoder import Encoder
from finetune.data.examples import Rules, TracedExample, label
from finetune.data.formats import detect_format, read_conversation
from finetune.data.rows import UNREADABLE, Conversation, Refusal, Row
from finetune.data.sources import read_rows
from finetune.data.store import ARRAYS, FIRST_OF_A_KIND, OUTCOMES
from finetune.data.template import Template, choose_template
from finetune.errors import Problem, WorkerError
from finetune.machine import quiet_libraries
from finetune.recipe import DataSection, SourceSection

UNKNOWN = "unknown"  # the format of a source whose first row has none
ROWS_AT_ONCE = 1000
ROWS_WITHOUT_WORKERS = 4000  # starting processes costs about as much as labelling so many
Found = Row | Refusal
Labelled = TracedExample | Refusal


@dataclass(frozen=True)
class Reading:
    """How the rows of one source become examples."""

    format: str
    system: str | None
    template: Template
    base: Base
    rules: Rules


def make_reading(section: SourceSection, data: DataSection, base: Base, template: Template) -> Reading:
    """How the rows of a source are read; their format is the recipe's, else that of the first row.

    A plain text has no turns to mark up: it is written as it is, between bos and eos, whatever the template.
    """
    row_format = format_of(section, data)
    written_by = choose_template("none", base, date=data.date) if row_format == "text" else template
    return Reading(row_format, data.system, written_by, base, make_rules(data))


def make_rules(data: DataSection) -> Rules:
    return Rules(
        loss_on=data.loss_on,
        max_tokens=data.max_tokens,
        too_long=data.too_long,
        truncate=data.truncate,
        special_tokens=data.special_tokens,
    )


def format_of(section: SourceSection, data: DataSection) -> str:
    """The format of a source's rows; UNKNOWN where the first row has none that is known."""
    if data.format != "auto":
        return data.format
    first = next((found for found in read_rows(section) if isinstance(found, Row)), None)
    detected = detect_format(first) if first else None
    return detected if isinstance(detected, str) else UNKNOWN


@dataclass(frozen=True)
class Piece:
    """What a stretch of a source's rows became: arrays as in a store (file as names), and the first few refusals."""

    arrays: Mapping[str, np.ndarray] = field(repr=False)
    files: tuple[str, ...]  # of each row
    refusals: tuple[Refusal, ...]
    unreadable: tuple[Refusal, ...]
    stop_token_ids: frozenset[int]
    rows_with_control_texts: int


def label_rows(found: Sequence[Found], reading: Reading, encoder: Encoder) -> list[Labelled]:
    """Each row's example or the reason why it is none, in order."""
    conversations = [
        read_any(each, format=reading.format, system=reading.system) if isinstance(each, Row) else each
        for each in found
    ]
    readable = [each for each in conversations if isinstance(each, Conversation)]
    labelled = iter(label(readable, reading.template, encoder, reading.rules))
    return [next(labelled) if isinstance(each, Conversation) else each for each in conversations]


def read_any(row: Row, *, format: str, system: str | None) -> Conversation | Refusal:
    """A row's conversation; of a source whose first row has no known format, why it has none."""
    if format != UNKNOWN:
        return read_conversation(row, format=format, system=system)
    detected = detect_format(row)
    if isinstance(detected, Refusal):
        return detected
    other = f"row: looks like {detected}, the first row of its source like nothing known; correct that one first"
    return Refusal("other_format", row.where, other)


def label_pieces(found: Iterable[Found], reading: Reading, *, workers: int) -> Iterator[Piece]:
    """The rows as pieces, in their order; the pieces do not depend on the number of processes."""
    stream = iter(found)
    first = list(islice(stream, ROWS_WITHOUT_WORKERS + 1))
    if len(first) <= ROWS_WITHOUT_WORKERS or workers < 2:
        encoder = Encoder(reading.base)
        for rows in _batches(chain(first, stream)):
            yield label_piece(rows, reading, encoder)
        return
    yield from _in_processes(_batches(chain(first, stream)), reading, workers)


def label_piece(found: Sequence[Found], reading: Reading, encoder: Encoder) -> Piece:
    """One piece: every row labelled, packed into arrays."""
    unreadable = tuple(each for each in found if isinstance(each, Refusal) and each.reason == UNREADABLE)
    rows = [each for each in found if not (isinstance(each, Refusal) and each.reason == UNREADABLE)]
    labelled = label_rows(rows, reading, encoder)
    traced = [each for each in labelled if isinstance(each, TracedExample)]
    return Piece(
        arrays=_pack(labelled, traced, [_place(each) for each in rows]),
        files=tuple(_place(each)[0] for each in rows),
        refusals=tuple(first_of_a_kind(each for each in labelled if isinstance(each, Refusal))),
        unreadable=unreadable,
        stop_token_ids=frozenset(_stop_token(each) for each in traced if not _is_cut_at_the_end(each, reading.rules)),
        rows_with_control_texts=sum(bool(each.literals) for each in traced),
    )


def first_of_a_kind(refusals: Iterable[Refusal], *, seen: dict[str, int] | None = None) -> Iterator[Refusal]:
    """The first few refusals of each reason; `seen` carries the counts from one piece to the next."""
    counts = {} if seen is None else seen
    for refusal in refusals:
        counts[refusal.reason] = counts.get(refusal.reason, 0) + 1
        if counts[refusal.reason] <= FIRST_OF_A_KIND:
            yield refusal


def _pack(
    labelled: Sequence[Labelled], traced: Sequence[TracedExample], places: Sequence[tuple[str, int]]
) -> dict[str, np.ndarray]:
    examples = [each.example for each in traced]
    hashes = [_hashes(each.conversation) for each in traced]
    values: dict[str, Any] = {
        "ids": np.concatenate([example.ids for example in examples]) if examples else [],
        "learned": np.concatenate([example.learned for example in examples]) if examples else [],
        "tokens": [example.tokens for example in examples],
        "prompt_tokens": [example.prompt_tokens for example in examples],
        "cut_tokens": [example.cut_tokens for example in examples],
        "supervised_tokens": [example.supervised_tokens for example in examples],
        "straddling_tokens": [each.straddling_tokens for each in traced],
        "exact": [exact for exact, _ in hashes],
        "near": [near for _, near in hashes],
        "file": np.zeros(len(places)),  # filled in by whoever knows all files
        "line": [line for _, line in places],
        "outcome": [0 if isinstance(each, TracedExample) else 1 + _REASON_CODES[each.reason] for each in labelled],
    }
    return {name: np.asarray(values[name], dtype=dtype) for name, dtype in ARRAYS.items()}


_REASON_CODES = {reason: index for index, reason in enumerate(OUTCOMES)}


def _place(found: Found) -> tuple[str, int]:
    if isinstance(found, Row):
        return found.file, found.line
    file, _, line = found.where.rpartition(":")
    return file, int(line)


def _hashes(conversation: Conversation) -> tuple[bytes, bytes]:
    """What is said, exactly, and with case and white space folded; 128 bits, none of them zero at the end."""
    said = []
    for turn in conversation.turns:
        calls = "".join(f"\x1d{call.name}\x1d{dict(call.arguments)}" for call in turn.tool_calls)
        said.append(f"{turn.role}\x1f{turn.text}{calls}")
    whole = "\x1e".join(said)
    return _digest(whole), _digest(" ".join(whole.casefold().split()))


def _digest(text: str) -> bytes:
    # numpy's bytes type drops zeros at the end, so the last byte is never one.
    digest = blake2b(text.encode(), digest_size=16).digest()
    return digest[:-1] + bytes([digest[-1] | 1])


def _stop_token(traced: TracedExample) -> int:
    example = traced.example
    return int(example.ids[np.flatnonzero(example.learned)[-1]])


def _is_cut_at_the_end(traced: TracedExample, rules: Rules) -> bool:
    return traced.example.cut_tokens > 0 and rules.truncate == "answer"


def _batches(stream: Iterable[Found]) -> Iterator[list[Found]]:
    remaining = iter(stream)
    while rows := list(islice(remaining, ROWS_AT_ONCE)):
        yield rows


# --- in several processes ---

_label_here: Callable[[Sequence[Found]], Piece] | None = None


def _start_worker(reading: Reading) -> None:
    global _label_here  # what a worker process keeps between two pieces
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent ends us
    quiet_libraries()
    encoder = Encoder(reading.base)
    _label_here = lambda found: label_piece(found, reading, encoder)  # noqa: E731


def _work(found: Sequence[Found]) -> Piece:
    assert _label_here is not None
    return _label_here(found)


def _in_processes(batches: Iterator[list[Found]], reading: Reading, workers: int) -> Iterator[Piece]:
    """Pieces in order; never more than a few batches are read ahead, so that memory stays bounded.

    Raises:
        WorkerError: one of the processes was killed.
    """
    # Spawned, not forked: a process that has started threads (torch, tokenizers) must not be copied.
    context = multiprocessing.get_context("spawn")
    # Without what is loaded and compiled: each worker reads the tokenizer and compiles the template itself.
    fresh = replace(reading, base=replace(reading.base), template=replace(reading.template))
    pool = ProcessPoolExecutor(workers, mp_context=context, initializer=_start_worker, initargs=(fresh,))
    with pool, _worker_death_told():
        waiting: deque[Future[Piece]] = deque()
        for batch in batches:
            waiting.append(pool.submit(_work, batch))
            if len(waiting) >= 2 * workers:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()


@contextmanager
def _worker_death_told() -> Iterator[None]:
    try:
        yield
    except BrokenProcessPool as error:
        message = (
            "a process that was at work on them was killed, as the system does where memory is short: end other "
            "programs, and start again"
        )
        raise WorkerError(Problem("reading the rows", message)) from error
