"""What a template may take of a machine: an operation's operands in, nothing or a refusal out, before it is done.

A rendering as a whole is bounded in time by its own clock, and in memory by the operating system where it can.
"""

from __future__ import annotations

import os
import re
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from types import GeneratorType
from typing import Any

import jinja2

try:
    import resource
except ImportError:  # not on Windows
    resource = None  # type: ignore[assignment]

MOST_VALUE = 1 << 24  # characters of one text that a template makes
MOST_ITEMS = 1_000_000  # items of one list
WEIGHT_OF_ITEM = 64  # one item of a list weighs as much as so many characters
MOST_WEIGHT = 1 << 26  # of what one operation looks at
MOST_BITS = 4096  # of a whole number
MOST_WIDTH = 100_000  # a number given to a filter or a method: a width, an indent, a count
MOST_SECONDS = 2.0  # of computing, for one rendering
MOST_BYTES = 160 << 20  # of memory that one rendering may add
WIDE_FORMAT = re.compile(r"%[^%a-zA-Z]*(?:\d{5,}|\*)|\{[^{}]*(?:\d{5,}|:[^{}]*\{)")
SLOW_FILTERS = {"urlize", "wordwrap", "striptags", "pprint", "xmlattr", "wordcount", "title"}
MOST_SLOW = 100_000  # characters that one of these may read


GROWING = {
    "center",
    "expandtabs",
    "format",
    "indent",
    "join",
    "ljust",
    "rjust",
    "translate",
    "zfill",
}  # methods of a text
LARGE = 10_000  # what takes long enough to look at the clock


class _Rendering:
    """When its time is over, and the memory limit that was there before it made something large."""

    def __init__(self) -> None:
        self.ends = time.thread_time() + MOST_SECONDS
        self.limit_before: tuple[int, int] | None = None


_rendering: ContextVar[_Rendering | None] = ContextVar("_rendering", default=None)


class OutOfTime(jinja2.TemplateError):
    """The template computes too long."""


def check_large() -> None:
    """Before something large is made: memory is bounded from now on, and the time must not be over.

    Raises:
        OutOfTime: it is.
    """
    rendering = _rendering.get()
    if rendering is None:
        return
    if rendering.limit_before is None:
        rendering.limit_before = _bound_memory()
    if time.thread_time() > rendering.ends:
        raise OutOfTime(f"it computes for more than {MOST_SECONDS:.0f} seconds for one conversation")


def refuse(what: str) -> None:
    raise jinja2.TemplateError(f"{what} is too large for a chat template")


def weigh(value: Any) -> int:
    """Characters and items of a value, each as often as it would be written.

    Raises:
        jinja2.TemplateError: more than any conversation needs.
    """
    if type(value) is str:
        return len(value)
    if isinstance(value, int) and value.bit_length() > MOST_BITS:
        refuse("a whole number")
    if not isinstance(value, (bytes, list, tuple, dict, range)):
        return 1
    total, waiting = 0, [value]
    while waiting:
        each = waiting.pop()
        if isinstance(each, (str, bytes, range, list, tuple, dict)):
            total += len(each) if isinstance(each, (str, bytes)) else WEIGHT_OF_ITEM * len(each)
            if total > MOST_WEIGHT:
                refuse("a value")
        if isinstance(each, (list, tuple)):
            waiting += each
        elif isinstance(each, dict):
            waiting += [*each, *each.values()]
    if total > LARGE * WEIGHT_OF_ITEM:
        check_large()
    return total


def weighed(value: Any) -> Any:
    """The value itself."""
    if type(value) is not str:
        weigh(value)
    return value


def check_operation(operator: str, left: Any, right: Any) -> None:
    """Before an operator is applied."""
    if operator == "%" and isinstance(left, str):
        check_format(left)
    elif operator == "+":
        if isinstance(left, (str, list, tuple)) and isinstance(right, (str, list, tuple)):
            _check_length(left, len(left) + len(right))
    elif operator in ("*", "**"):
        _check_product(operator, left, right)


def check_format(text: str) -> None:
    if WIDE_FORMAT.search(text):
        refuse("a width in a format")


def check_call(called: Any, arguments: tuple[Any, ...], keywords: Mapping[str, Any]) -> None:
    """Before something is called; methods of a text may make another one out of little."""
    text = getattr(getattr(called, "__wrapped__", called), "__self__", None)  # the sandbox wraps str.format
    if not isinstance(text, (str, bytes)):
        for value in (text, *arguments, *keywords.values()):
            weigh(value)
        return
    for argument in (*arguments, *keywords.values()):
        _check_argument(argument)
    name = getattr(called, "__name__", "")
    if len(text) > LARGE or name in GROWING:
        check_large()
    if name in ("format", "format_map"):
        check_format(str(text))
    elif name == "replace" and len(arguments) > 1 and isinstance(arguments[1], str):
        old = arguments[0] if isinstance(arguments[0], str) else ""
        found = text.count(old) if isinstance(text, str) else 0
        _check_length("", len(text) + found * len(arguments[1]))


def guarded_filter(name: str, run: Callable[..., Any]) -> Callable[..., Any]:
    """A filter that first looks at what it is given; a lazy value is read, so that it can be looked at."""
    takes_context = getattr(run, "jinja_pass_arg", None) is not None
    most = MOST_SLOW if name in SLOW_FILTERS else MOST_WEIGHT

    def guarded(*arguments: Any, **keywords: Any) -> Any:
        given = [_read(value) for value in arguments]
        weight = 0
        for place, value in enumerate(given):
            if place or not takes_context:
                weight += weigh(value) if place == takes_context else _check_argument(value)
        weight += sum(_check_argument(value) for value in keywords.values())
        if name == "format":
            check_format(str(given[takes_context]))
        if weight > most:
            refuse(f"what the filter {name} reads")
        if weight > LARGE or name in GROWING:
            check_large()
        return run(*given, **keywords)

    if takes_context:
        guarded.jinja_pass_arg = run.jinja_pass_arg  # type: ignore[attr-defined]
    return guarded


def guarded_test(run: Callable[..., Any]) -> Callable[..., Any]:
    """A test (`is eq`, `is in`, ...) that first looks at what it compares."""
    takes_context = getattr(run, "jinja_pass_arg", None) is not None

    def guarded(*arguments: Any, **keywords: Any) -> Any:
        for value in arguments[takes_context:]:
            weigh(value)
        return run(*arguments, **keywords)

    if takes_context:
        guarded.jinja_pass_arg = run.jinja_pass_arg  # type: ignore[attr-defined]
    return guarded


def joined(pieces: Any) -> str:
    """The pieces as one text, as Jinja's own concat."""
    pieces = list(pieces)
    if len(pieces) > LARGE:
        check_large()
    _check_length("", sum(map(len, pieces)))
    return "".join(pieces)


def joined_values(values: Any) -> str:
    """The operands of `~` as one text."""
    return joined([str(weighed(value)) for value in values])


@contextmanager
def bounded() -> Iterator[None]:
    """Inside, this process may grow by MOST_BYTES (asking for more raises MemoryError) and compute for MOST_SECONDS."""
    rendering = _Rendering()
    token = _rendering.set(rendering)
    try:
        yield
    finally:
        _rendering.reset(token)
        if rendering.limit_before is not None and resource is not None:
            resource.setrlimit(resource.RLIMIT_AS, rendering.limit_before)


def _bound_memory() -> tuple[int, int] | None:
    """The limits that were there before; None where Linux is not there to tell a process's size, or a lower one is."""
    if resource is None or sys.platform != "linux":
        return None
    before = resource.getrlimit(resource.RLIMIT_AS)
    allowed = _virtual_bytes() + MOST_BYTES
    if before[0] != resource.RLIM_INFINITY and before[0] <= allowed:
        return None
    resource.setrlimit(resource.RLIMIT_AS, (allowed, before[1]))
    return before


def _virtual_bytes() -> int:
    descriptor = os.open("/proc/self/statm", os.O_RDONLY)
    try:
        return int(os.read(descriptor, 64).split()[0]) * os.sysconf("SC_PAGE_SIZE")
    finally:
        os.close(descriptor)


def _read(value: Any) -> Any:
    if not isinstance(value, GeneratorType):
        return value
    read: list[Any] = []
    weight = 0
    for item in value:
        weight += weigh(item) + 1
        if weight > MOST_WEIGHT or len(read) > MOST_ITEMS:
            refuse("a list")
        if weight > LARGE:
            check_large()
        read.append(item)
    return read


def _check_argument(value: Any) -> int:
    if isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) > MOST_WIDTH:
        refuse("a number given to a filter or a method")
    return weigh(value)


def _check_product(operator: str, left: Any, right: Any) -> None:
    if isinstance(left, int) and isinstance(right, int):
        bits = left.bit_length() * abs(right) if operator == "**" else left.bit_length() + right.bit_length()
        if bits > MOST_BITS:
            refuse("a whole number")
        return
    for sized, count in ((left, right), (right, left)):
        if isinstance(sized, (str, list, tuple)) and isinstance(count, int):
            _check_length(sized, len(sized) * count)


def _check_length(value: Any, length: int) -> None:
    if length > (MOST_VALUE if isinstance(value, str) else MOST_ITEMS):
        refuse("a text" if isinstance(value, str) else "a list")
