"""Tell a message's own text from control tokens: what a row says in, the ranges that are only text out.

A user may write `</s>`. The template writes it too, and means the token. Both look the same once they are one text, so
the row's own is written with a stand-in for its first character, rendered, and found again by place.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from finetune.data.spans import Span, TemplateProblem

PRIVATE = 0x100000  # plane 16, which Unicode gives no meaning; one stand-in for each first character


@dataclass(frozen=True)
class Controls:
    """The texts of a tokenizer's control tokens, ready to be looked for.

    `heads` and `tails` are their proper beginnings and ends: a text that ends in a head or begins with a tail can
    become a control token together with what the template writes beside it.
    """

    pattern: re.Pattern[str]  # leftmost-longest, as tokenizers looks for them
    starts: re.Pattern[str]  # every place where one starts, overlapping ones too
    heads: frozenset[str]
    tails: frozenset[str]
    firsts: frozenset[str]
    lasts: frozenset[str]
    all_texts: str
    longest: int

    def touched_by(self, text: str) -> bool:
        """Whether the text holds a control token's text, or could become one together with its neighbours."""
        if self.pattern.search(text):
            return True
        core = text.strip()
        return self._may_join(core) or (core != text and self._may_join(text))

    def touches(self, value: Any) -> bool:
        """The same of a JSON value: its texts, and keys that hold a whole control token's text."""
        if isinstance(value, str):
            return self.touched_by(value)
        if isinstance(value, Mapping):
            return any(self.pattern.search(key) or self.touches(item) for key, item in value.items())
        return isinstance(value, list | tuple) and any(map(self.touches, value))

    def places_in(self, text: str, *, edges: bool = True) -> set[int]:
        """The characters of a text that need a stand-in, so that none of it is taken for a control token."""
        places = {match.start() for match in self.starts.finditer(text)}
        if edges:
            skipped = len(text) - len(text.lstrip())
            places |= {skipped + place for place in self._edges(text.strip())}.union(self._edges(text))
        return places

    def _may_join(self, text: str) -> bool:
        # Nearly every row ends here: a short text, or the last letter of a token near its beginning, is rare enough.
        short = len(text) < self.longest
        near = not (self.lasts.isdisjoint(text[: self.longest]) and self.firsts.isdisjoint(text[-self.longest :]))
        return (short or near) and any(True for _ in self._edges(text))

    def _edges(self, text: str) -> Iterator[int]:
        """Where an unfinished control token starts at the edges of a text, if there is one."""
        if text and len(text) < self.longest and text in self.all_texts:
            yield 0
        lengths = range(1, min(len(text) + 1, self.longest))
        if any(text[:length] in self.tails for length in lengths):
            yield 0
        yield from (len(text) - length for length in lengths if text[-length:] in self.heads)


@lru_cache(maxsize=8)
def controls_of(texts: tuple[str, ...]) -> Controls:
    """The search for these texts; empty ones are no texts."""
    known = sorted({text for text in texts if text}, key=len, reverse=True)
    either = "|".join(map(re.escape, known)) or "(?!)"
    return Controls(
        pattern=re.compile(either),
        starts=re.compile(f"(?={either})"),
        heads=frozenset(text[:end] for text in known for end in range(1, len(text))),
        tails=frozenset(text[start:] for text in known for start in range(1, len(text))),
        firsts=frozenset(text[0] for text in known),
        lasts=frozenset(text[-1] for text in known),
        all_texts="\0".join(known),
        longest=len(known[0]) if known else 0,
    )


def find_literals(
    whole: str, said: Sequence[Any], controls: Controls, render: Callable[[Callable[[Any], Any]], str], *, name: str
) -> tuple[Span, ...]:
    """The ranges of `whole` that read like control tokens and hold at least one character of the row's own.

    `said` is all that the row says; `render` writes the same conversation after a function was put over each of its
    values. `name` is the template's.

    Raises:
        TemplateProblem: private-use characters stand beside such a text, or the template writes something else when
            the text is changed, so that it looks at control tokens in what a row says.
    """
    texts = list(_strings_of(said))
    stand_ins = {text[place] for text in texts for place in controls.places_in(text)}
    if any(max(text, default="") >= chr(PRIVATE) for text in texts):
        message = f"template {name}: private-use characters (U+100000 and above) stand beside the text of a control"
        raise TemplateProblem("private_characters", message + " token; remove either")
    there = {character: chr(PRIVATE + index) for index, character in enumerate(sorted(stand_ins))}
    back = {ord(stand_in): character for character, stand_in in there.items()}
    marked = render(lambda value: _with_stand_ins(value, controls, there))
    if marked.translate(back) != whole:
        message = f"template {name}: what it writes depends on the text of a control token inside a turn, so that its"
        raise TemplateProblem("template_unproven", message + " place cannot be proven; change the row's text")
    found = (match.span() for match in controls.pattern.finditer(whole))
    return tuple((start, end) for start, end in found if max(marked[start:end]) >= chr(PRIVATE))


def _strings_of(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        yield from value
        for item in value.values():
            yield from _strings_of(item)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _strings_of(item)


def _with_stand_ins(value: Any, controls: Controls, there: Mapping[str, str]) -> Any:
    if isinstance(value, str):
        return _put(value, controls.places_in(value), there)
    if isinstance(value, Mapping):
        # Keys are the format's or the tool's, and a template may look at them: only a whole control token is changed.
        return {
            _put(key, controls.places_in(key, edges=False), there): _with_stand_ins(item, controls, there)
            for key, item in value.items()
        }
    if isinstance(value, list | tuple):
        return [_with_stand_ins(item, controls, there) for item in value]
    return value


def _put(text: str, places: set[int], there: Mapping[str, str]) -> str:
    letters = list(text)
    for place in places:
        letters[place] = there[letters[place]]
    return "".join(letters)
