"""Write the page of a recipe's data: prepared data and its steps in, one self-contained HTML text out. No network."""

from __future__ import annotations

import base64
import json
import math
from collections.abc import Iterable, Iterator, Sequence
from hashlib import sha256
from html import escape
from itertools import zip_longest
from pathlib import Path

from finetune.data.account import describe_copies, later_copies
from finetune.data.page_account import account_cards, bar, counted
from finetune.data.passes import packing_of, passes_of_steps, steps_of_first_epoch
from finetune.data.prepare import PreparedData
from finetune.data.rows import DUPLICATE
from finetune.data.show import Piece, ShownPass, ShownRow, ShownStep, show_rows, shown_steps, stores_of
from finetune.data.show_text import SPLIT_WORDS, VISIBLE
from finetune.errors import Problem
from finetune.plan import TrainPlan

LONG_TOKENS = 350  # a longer row is folded until it is asked for
HELD_OUT_SHARE = 10  # one held-out row for so many training rows
TOOLBAR = """<div class="top"><div>
<input type="search" id="search" aria-label="Search the rows" autocomplete="off" spellcheck="false"
 placeholder="Search text, file:line, held out, dropped &#8230;">
<span id="count" role="status"></span>
<span class="legend"><i class="s">learned</i> <span>context</span> <i class="c">control token</i>
<i class="l">only looks like one</i> <del>cut</del></span>
</div></div>"""


def write_page(
    prepared: PreparedData, *, name: str, plan: TrainPlan | None, problems: Sequence[Problem], rows: int
) -> str:
    """The account, then the first training rows in the order of training, a few held-out ones, and those left out.

    Without a plan (there are problems) the rows stand in the order of the sources.
    """
    steps, shown = _steps(prepared, plan, rows)
    held_out = show_rows(
        prepared, prepared.eval, range(min(len(prepared.eval), max(1, rows // HELD_OUT_SHARE))), split="eval"
    )
    packing = packing_of(plan, prepared.train.tokens) if plan else None
    total = prepared.account.total_problems + len(problems) - len(prepared.account.problems)
    everything = [*shown, *held_out.values()]
    body = [
        *_heading(prepared, name),
        *account_cards(prepared.account, packing, problems, total),
        "</main>",
        TOOLBAR,
        "<main>",
        *_section("Training rows", _extent(prepared, plan, len(shown)), _training(steps, shown)),
        *_section("Held-out rows", f"{len(held_out):,} of {len(prepared.eval):,}", map(_row_html, held_out.values())),
        *_section("Rows left out", "the first few of each reason", _left_out(prepared)),
    ]
    return _document(name, "\n".join(body), _vocabulary(everything))


def _steps(prepared: PreparedData, plan: TrainPlan | None, rows: int) -> tuple[list[ShownStep], list[ShownRow]]:
    """The first epoch's first steps, and the rows of them that are shown; without a plan no steps."""
    if plan is None:
        return [], list(
            show_rows(prepared, prepared.train, range(min(rows, len(prepared.train))), split="train").values()
        )
    count = min(math.ceil(rows / plan.batch_size), steps_of_first_epoch(plan))
    layout = passes_of_steps(plan, prepared.train.tokens, steps=count)
    steps = list(shown_steps(prepared, plan, layout, rows=rows))
    return steps, [row for step in steps for each in step.passes for row in each.rows]


def _extent(prepared: PreparedData, plan: TrainPlan | None, shown: int) -> str:
    if plan is None:
        return f"{shown:,} of {len(prepared.train):,}, in the order of the sources: with problems there is no plan"
    epoch = plan.mixture.examples_per_epoch
    steps = counted(steps_of_first_epoch(plan), "step")
    return f"{shown:,} of the {counted(epoch, 'row')} of the first epoch ({steps} of {plan.steps:,}), in training order"


def _heading(prepared: PreparedData, name: str) -> Iterator[str]:
    base, template = prepared.base.facts.base, prepared.template
    yield f"<h1>{escape(name)}</h1>"
    yield f"<p class=dim>What the model will see. Base <code>{escape(base)}</code>, template {escape(template.name)} "
    yield f"<code>{template.sha256[:12]}</code>, format {escape(prepared.facts.format)}, "
    yield f"loss on {escape(prepared.section.loss_on)}, at most {prepared.section.max_tokens:,} tokens a row.</p>"


def _section(title: str, extent: str, rows: Iterable[str]) -> Iterator[str]:
    found = list(rows)
    if found:
        yield f"<section class=group><h2>{title} <small>{extent}</small></h2>"
        yield from found
        yield "</section>"


def _training(steps: Sequence[ShownStep], shown: Sequence[ShownRow]) -> Iterator[str]:
    yield from (_step_html(step) for step in steps)
    yield from ([] if steps else map(_row_html, shown))


def _step_html(step: ShownStep) -> str:
    passes = [_pass_html(each, at, len(step.passes)) for at, each in enumerate(step.passes, start=1) if each.rows]
    tokens, rows = sum(each.tokens for each in step.passes), sum(each.count for each in step.passes)
    share = tokens / sum(each.tokens_per_pass for each in step.passes)
    facts = f"{counted(rows, 'row')}, {tokens:,} tokens, {counted(len(step.passes), 'pass')}, {share:.0%} full"
    heading = f"<div class=line><h3>Step {step.number:,}</h3><small class=number>{facts}</small></div>"
    return f'<section class="step group">{heading}{"".join(passes)}</section>'


def _pass_html(shown: ShownPass, index: int, count: int) -> str:
    extent = counted(shown.count, "row")
    if len(shown.rows) < shown.count:
        extent = f"{len(shown.rows):,} of {extent} shown"
    fill = bar([shown.tokens, max(0, shown.tokens_per_pass - shown.tokens)], height=8)
    facts = f"{extent}, {shown.tokens:,} of {shown.tokens_per_pass:,} tokens"
    words = f"<b>Pass {index} of {count}</b>{fill}<span class='dim number'>{facts}, {shown.share:.0%}</span>"
    heading = f"<div class=line>{words}</div>"
    return f'<div class="pass group">{heading}{"".join(map(_row_html, shown.rows))}</div>'


def _row_html(shown: ShownRow) -> str:
    traced, example = shown.traced, shown.traced.example
    tags = [] if shown.split == "train" else [SPLIT_WORDS[shown.split]]
    tags += [f"{example.cut_tokens:,} cut"] if example.cut_tokens else []
    tags += [f"{traced.straddling_tokens:,} straddling"] if traced.straddling_tokens else []
    header = [f"<span class=where dir=ltr>{_escaped(shown.where)}</span>"]
    header += [f"<span class=tag>{tag}</span>" for tag in tags]
    header.append(f"<span class=number>{example.tokens:,} tokens, {example.supervised_tokens:,} supervised</span>")
    ids = " ".join(map(str, example.ids.tolist()))
    pieces = list(shown.pieces())
    text = "".join(_piece_html(shown, *pair) for pair in zip_longest(pieces, pieces[1:]))
    is_long = len(traced.offsets) > LONG_TOKENS
    more = f"<button type=button>Show all {len(traced.offsets):,} tokens</button>" if is_long else ""
    kind = "row long" if is_long else "row"
    body = f'<header>{"".join(header)}</header><div class=text data-ids="{ids}">{text}</div>{more}'
    return f'<article class="{kind}">{body}</article>'


def _piece_html(shown: ShownRow, piece: Piece, following: Piece | None) -> str:
    text = _escaped(piece.text)
    if piece.token is None:
        return f"<del>{text}</del>"
    flags = {
        "s": shown.traced.example.learned[piece.token],
        "c": shown.is_control(piece.token),
        "l": piece.token in shown.literal_tokens,
        "m": piece.text and following is not None and not following.text,
        "e": not piece.text,
    }
    names = " ".join(name for name, is_set in flags.items() if is_set)
    return f'<i class="{names}">{text}</i>' if names else f"<i>{text}</i>"


def _escaped(text: str) -> str:
    """HTML whose text content is the text: every sign that means something to HTML, or cannot be seen, is marked.

    Only NUL, which HTML cannot hold, becomes its picture.
    """
    return escape(text).translate(_MARKED)


# A newline shows where it is; a carriage return would be read as a newline, and a direction mark would turn the line.
_MARKED = {code: f"<u data-c={escape(shown)}>{chr(code)}</u>" for code, shown in VISIBLE.items() if code}
_MARKED |= {0: "\u2400", 10: "<b>\n</b>", 13: "<u data-c=\u240d>&#13;</u>"}


def _left_out(prepared: PreparedData) -> Iterator[str]:
    """The refusals that are kept in words, and the first copies where copies are dropped."""
    for store in stores_of(prepared):
        for refusal in (*store.unreadable, *store.refusals):
            fate = "dropped" if refusal.reason in prepared.section.dropped_reasons else "refused"
            yield _left_out_html(refusal.where, f"{fate}: {refusal.reason}", refusal.message)
    pool, kind = prepared.train.pool, prepared.section.deduplicate
    if kind != "none":
        for words in describe_copies(pool, later_copies(pool, kind))[1]:
            yield _left_out_html("", f"dropped: {DUPLICATE}", words)


def _left_out_html(where: str, reason: str, message: str) -> str:
    tag = f'<span class="tag{" bad" if reason.startswith("refused") else ""}">{escape(reason)}</span>'
    header = f"<header><span class=where dir=ltr>{_escaped(where)}</span>{tag}</header>"
    return f'<article class="row short">{header}<div dir=auto>{_escaped(message)}</div></article>'


def _vocabulary(rows: Iterable[ShownRow]) -> str:
    """The vocabulary's piece of every id that is shown, as JSON that cannot end the element it stands in."""
    names = {
        token: name for row in rows for token, name in zip(row.traced.example.ids.tolist(), row.names, strict=True)
    }
    return json.dumps(names, ensure_ascii=True, separators=(",", ":")).replace("<", "\\u003c")


def _document(name: str, body: str, vocabulary: str) -> str:
    # The hashes let this style and this script run and nothing else, whatever a row holds; nothing can be fetched.
    style, script = _asset("page.css"), _asset("page.js")
    allowed = f"style-src '{_hash(style)}'; script-src '{_hash(script)}'"
    policy = f"default-src 'none'; {allowed}; base-uri 'none'; form-action 'none'"
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="{policy}">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="referrer" content="no-referrer">
<title>{escape(name)}: what the model will see</title>
<style>{style}</style>
</head>
<body>
<main>
{body}
</main>
<div id="tip" hidden></div>
<script type="application/json" id="vocabulary">{vocabulary}</script>
<script>{script}</script>
</body>
</html>
"""


def _asset(name: str) -> str:
    return Path(__file__).with_name(name).read_text(encoding="utf-8")


def _hash(text: str) -> str:
    return f"sha256-{base64.b64encode(sha256(text.encode()).digest()).decode()}"
