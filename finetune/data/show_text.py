"""Write shown rows for people: rows and steps in, text for a terminal out, learned tokens green or in [[ ]]."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from itertools import groupby

from finetune.data.show import Piece, ShownRow, ShownStep

RESET = "\x1b[0m"
CONTEXT, CUT, LITERAL = "2", "2;9", "4"
LEARNED = ("38;5;231;48;5;22", "38;5;231;48;5;28")  # white on two greens in turn, so that tokens can be told apart
CONTROL, LEARNED_CONTROL = "1;35", "1;38;5;219"
NAMED_TOKENS = 12  # so many learned tokens are listed by name

BIDIRECTIONAL = [0x061C, 0x200E, 0x200F, *range(0x202A, 0x202F), *range(0x2066, 0x206A)]
# A row's text must not steer the terminal: what cannot be seen is written as what it is.
VISIBLE: dict[int, str] = {
    **{code: chr(0x2400 + code) for code in range(32) if chr(code) not in "\n\t"},
    0x7F: "\u2421",
    **{code: f"<U+{code:04X}>" for code in (*range(0x80, 0xA0), *BIDIRECTIONAL, 0x200B, 0xFEFF)},
}

SPLIT_WORDS = {
    "train": "training row",
    "eval": "held-out row",
    "duplicate": "dropped: a copy of an earlier row",
    "leaked": "dropped: held out, but a training row says the same",
}


def row_text(shown: ShownRow, *, colour: bool) -> str:
    """A row's text, then where it stands, where it goes, its counts, its turns and its learned tokens."""
    return f"{_text(shown, colour=colour)}\n\n{_facts(shown)}"


def step_text(step: ShownStep, *, colour: bool) -> str:
    """Every row of a step, pass by pass."""
    lines = []
    for index, each in enumerate(step.passes, start=1):
        heading = f"step {step.number}, pass {index} of {len(step.passes)}: {_rows(each.count)}"
        fill = f"{each.tokens:,} of {each.tokens_per_pass:,} tokens ({each.share:.0%})"
        lines.append(_heading(f"{heading}, {fill}", colour=colour))
        for row in each.rows:
            example = row.traced.example
            lines += [f"--- {row.where}  {example.tokens} tokens, {example.supervised_tokens} supervised"]
            lines += [_text(row, colour=colour), ""]
    tokens = sum(each.tokens for each in step.passes)
    room = sum(each.tokens_per_pass for each in step.passes)
    count = sum(each.count for each in step.passes)
    lines.append(f"step {step.number}: {_rows(count)}, {tokens:,} tokens, {tokens / room:.0%} of the passes filled")
    return "\n".join(lines)


def _heading(text: str, *, colour: bool) -> str:
    return f"\x1b[1m{text}{RESET}" if colour else f"=== {text}"


def _rows(count: int) -> str:
    return "1 row" if count == 1 else f"{count:,} rows"


def _text(shown: ShownRow, *, colour: bool) -> str:
    return "".join(_coloured(shown) if colour else _marked(shown))


def _coloured(shown: ShownRow) -> Iterator[str]:
    for style, pieces in groupby(shown.pieces(), key=lambda piece: _style(shown, piece)):
        # A background that is still on at the line's end would fill the terminal to its edge.
        text = _visible("".join(piece.text for piece in pieces)).replace("\n", f"\u21b5{RESET}\n\x1b[{style}m")
        if text:
            yield f"\x1b[{style}m{text}{RESET}"


def _style(shown: ShownRow, piece: Piece) -> str:
    if piece.token is None:
        return CUT
    learned = shown.traced.example.learned[piece.token]
    styles = [LEARNED[piece.token % 2]] if learned else []
    if shown.is_control(piece.token):
        styles.append(LEARNED_CONTROL if learned else CONTROL)
    elif not learned:
        styles.append(CONTEXT)
    if piece.token in shown.literal_tokens:
        styles.append(LITERAL)
    return ";".join(styles)


def _marked(shown: ShownRow) -> Iterator[str]:
    """The learned tokens in [[ ]], what was cut in ~~ ~~."""
    marks = {"context": ("", ""), "learned": ("[[", "]]"), "cut": ("~~", "~~")}
    current = "context"
    for piece in shown.pieces():
        kind = "cut" if piece.token is None else "learned" if shown.traced.example.learned[piece.token] else "context"
        if kind != current:
            yield marks[current][1] + marks[kind][0]
            current = kind
        yield _visible(piece.text)
    yield marks[current][1]


def _visible(text: str) -> str:
    return text.translate(VISIBLE)


def _facts(shown: ShownRow) -> str:
    traced, example = shown.traced, shown.traced.example
    turns = ", ".join(f"{turn['role']}{' (learned)' if turn['learned'] else ''}" for turn in shown.turns())
    where = f"{shown.where}: {SPLIT_WORDS[shown.split]}, format {shown.format}, template {shown.template}"
    counts = f"{example.tokens} tokens, {example.supervised_tokens} supervised, {traced.straddling_tokens} straddling"
    lines = [where, f"{'tokens':9} {counts}, {example.cut_tokens} cut", f"{'turns':9} {turns}"]
    lines.append(f"{'learned':9} {_learned_tokens(shown)}")
    if traced.literals:
        texts = Counter(traced.text[start:end] for start, end in traced.literals)
        words = ", ".join(f"{_visible(text)!r} ({count} times)" if count > 1 else repr(_visible(text))
                          for text, count in texts.items())  # fmt: skip
        lines.append(f"{'text':9} {words}: the row's own text, read as ordinary text, not as a control token")
    return "\n".join(lines)


def _learned_tokens(shown: ShownRow) -> str:
    """The first learned tokens and the last ones, id and the vocabulary's piece."""
    tokens = [index for index, learned in enumerate(shown.traced.example.learned) if learned]
    words = [f"{shown.traced.example.ids[index]} {_visible(shown.names[index])!r}" for index in tokens]
    left_out = len(words) - NAMED_TOKENS
    if left_out > 0:
        words[NAMED_TOKENS - 2 : -2] = [f"... {left_out:,} more ..."]
    return "  ".join(words)
