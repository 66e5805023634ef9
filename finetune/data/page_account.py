"""Write the upper part of the page: an account of the rows in, tiles, bars, a histogram and tables as HTML out."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from html import escape

from finetune.data.account import Account
from finetune.data.passes import Packing
from finetune.errors import Problem

WIDTH = 1000  # of a drawing, in its own units


def account_cards(account: Account, packing: Packing | None, problems: Sequence[Problem], total: int) -> Iterator[str]:
    """Tiles with the counts, problems if there are any, then where rows and tokens go, lengths and sources."""
    yield f"<div class=tiles>{''.join(_tiles(account, packing))}</div>"
    if problems:
        items = "".join(f"<li dir=auto><code>{escape(p.where)}</code> {escape(p.message)}</li>" for p in problems)
        heading = f"<h3>{counted(total, 'problem')} to solve before anything is trained</h3>"
        yield f'<div class="card problems">{heading}<ul class=plain>{items}</ul></div><div class=wide></div>'
    yield f"<div class=cards><div class=card><h3>Where they go</h3>{_rows_share(account)}{_tokens_share(account)}</div>"
    yield f"<div class=card><h3>Tokens a row</h3>{_histogram(account)}{_lengths(account)}</div></div>"
    yield f"<div class='card wide'><h3>Sources</h3><div class=scroll>{_sources(account)}</div></div>"
    if notes := list(_notes(account)):
        items = "".join(f"<li dir=auto>{note}</li>" for note in notes)
        yield f"<div class='card wide'><h3>Worth a look</h3><ul class=plain>{items}</ul></div>"


def counted(count: int, noun: str) -> str:
    plural = {"pass": "passes", "exact copy": "exact copies"}.get(noun, f"{noun}s")
    return f"{count:,} {noun if count == 1 else plural}"


def bar(parts: Sequence[int], *, height: int) -> str:
    """A horizontal bar; the parts keep their colours by their place, and a part that is there can be seen."""
    total = sum(parts) or 1
    widths = [max(WIDTH * part / total, 4) if part else 0 for part in parts]
    scale, position, drawn = WIDTH / (sum(widths) or 1), 0.0, []
    for index, width in enumerate(widths):
        drawn.append(f'<rect class=b{index} x="{position:.1f}" width="{width * scale:.1f}" height="{height}"/>')
        position += width * scale
    box = f'viewBox="0 0 {WIDTH} {height}" height="{height}" preserveAspectRatio="none"'
    return f'<svg {box} aria-hidden="true">{"".join(drawn)}</svg>'


def _tiles(account: Account, packing: Packing | None) -> Iterator[str]:
    shown = account.supervised_tokens + account.context_tokens
    tiles = {
        "rows read": f"{account.read:,}",
        "trained": f"{account.trained:,}",
        "held out": f"{account.eval:,}",
        "left out": f"{_total(account.dropped) + _total(account.refused):,}",
        "tokens": f"{account.tokens:,}",
        "supervised": f"{account.supervised_tokens / shown:.1%}" if shown else "none",
    }
    if packing:
        tiles["passes filled"] = f"{packing.share:.1%}"
    for name, value in tiles.items():
        yield f"<div class=tile><b class=number>{value}</b><span>{name}</span></div>"


def _rows_share(account: Account) -> str:
    reasons = {**account.dropped, **account.refused}
    parts = {"trained": account.trained, "held out": account.eval}
    parts |= {"dropped": _total(account.dropped), "refused": _total(account.refused)}
    words = ", ".join(f"{count:,} {escape(reason)}" for reason, count in reasons.items())
    return _share(f"{account.read:,} rows read", parts) + (f"<p><small>{words}</small></p>" if words else "")


def _tokens_share(account: Account) -> str:
    parts = {"supervised": account.supervised_tokens, "context": account.context_tokens}
    parts |= {"truncated": account.truncated_tokens}
    return _share(f"{account.tokens:,} tokens of trained and held-out rows", parts)


def _share(title: str, parts: Mapping[str, int]) -> str:
    listed = "".join(
        f"<li class='k{index} number'>{count:,} {name}</li>"
        for index, (name, count) in enumerate(parts.items())
        if count or index < 2
    )
    drawn = bar(list(parts.values()), height=12)
    return f"<div class=share><p class=number>{title}</p>{drawn}<ul class=keys>{listed}</ul></div>"


def _histogram(account: Account) -> str:
    if not account.histogram:
        return "<p class=dim>no rows</p>"
    width, height = 400, 120
    most = max(count for _, _, count in account.histogram)
    step = width / len(account.histogram)
    drawn = []
    for index, (start, stop, count) in enumerate(account.histogram):
        tall = max(height * count / most, 1.5) if count else 0
        shape = f'x="{index * step + 0.75:.1f}" y="{height - tall:.1f}" width="{step - 1.5:.1f}" height="{tall:.1f}"'
        title = f"{start:,} to {stop - 1:,} tokens: {counted(count, 'row')}"
        drawn.append(f"<rect class=b0 {shape}><title>{title}</title></rect>")
    last = account.histogram[-1][1]
    labels = f'<text x="0" y="{height + 15}">0</text>'
    labels += f'<text x="{width}" y="{height + 15}" text-anchor="end">{last:,} tokens</text>'
    labels += f'<text x="{width}" y="-4" text-anchor="end">tallest: {counted(most, "row")}</text>'
    box = f'viewBox="0 -16 {width} {height + 36}" role="img" aria-label="Histogram of lengths"'
    return f"<svg {box}>{''.join(drawn)}{labels}</svg>"


def _lengths(account: Account) -> str:
    words = ", ".join(f"{name} {tokens:,}" for name, tokens in account.lengths.items())
    return f"<p><small class=number>{words}</small></p>"


def _sources(account: Account) -> str:
    heads = ["source", "format", "rows", "trained", "held out", "tokens", "supervised", "weight"]
    lines = ["".join(f"<th>{head}</th>" for head in heads)]
    for each in account.sources:
        share = each.supervised_tokens / each.tokens if each.tokens else 0
        cells = [
            f"<code dir=ltr>{escape(each.source)}</code>", escape(each.format), f"{each.rows:,}", f"{each.trained:,}",
            f"{each.eval:,}", f"{each.tokens:,}", f"{share:.1%}", f"{each.weight:g}",
        ]  # fmt: skip
        lines.append("".join(f"<td>{cell}</td>" for cell in cells))
    return f"<table>{''.join(f'<tr>{line}</tr>' for line in lines)}</table>"


def _notes(account: Account) -> Iterator[str]:
    """What a person should look at, as HTML."""
    copies = account.duplicates
    if _total(copies):
        first = "".join(f"<br><small dir=auto>{escape(words)}</small>" for words in account.first_copies)
        exact = counted(copies["exact"], "exact copy")
        yield f"{exact} of earlier rows, {copies['near']:,} more but for case and white space.{first}"
    if account.leaked:
        yield f"{counted(account.leaked, 'held-out row')} that a training row says too, case and white space folded."
    if account.rows_with_control_texts:
        yield (
            f"{counted(account.rows_with_control_texts, 'row')} with text that looks like a control token and is kept "
            "as ordinary text."
        )
    if account.straddling_tokens:
        yield f"{account.straddling_tokens:,} supervised tokens begin in the context and reach into the answer."
    if account.truncated_rows:
        yield f"{counted(account.truncated_rows, 'row')} cut by {account.truncated_tokens:,} tokens in all."


def _total(counts: Mapping[str, int]) -> int:
    return sum(counts.values())
