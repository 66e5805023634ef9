"""Turn a row into a conversation: a Row of any known format in, a Conversation or the Refusal that says why not out."""

from __future__ import annotations

import re
from collections.abc import Callable, Container, Iterable, Iterator, Mapping
from typing import Any, NamedTuple

from finetune.data.rows import Conversation, Refusal, Row, Turn
from finetune.data.tool_calls import tools_of
from finetune.data.turn_rules import check_order, check_texts, with_call_ids, with_own_system
from finetune.data.turns import MESSAGES, SHAREGPT, Spoken, plain_turn, turn_of, turns_of, unlearned
from finetune.data.values import Unusable, Values, got, has_media, list_of, names_of, near_name, shown, text_of

MEDIA_COLUMNS = ("image", "images", "video", "videos", "audio", "audios")
PLACEHOLDER = re.compile(
    r"^<(?:image|video|audio|\|image\||\|video\||\|audio\|)>|^<(?:image|video|audio)>$", re.MULTILINE
)
INPUT_HEADING = "\n\n### Input:\n"


class Script(NamedTuple):
    """What a row says before its turns are checked."""

    spoken: list[Spoken]
    tools: tuple[Mapping[str, Any], ...] = ()


class Format(NamedTuple):
    """The sets of columns that identify a format, any one of them, and its reader."""

    columns: tuple[tuple[str, ...], ...]
    read: Callable[[Values], Script]


def detect_format(row: Row) -> str | Refusal:
    """The one format that the row's columns identify; a column that holds null counts only where nothing else fits."""
    found = _formats_of({column for column, value in row.values.items() if value is not None}, row.values)
    found = found or _formats_of(set(row.values), row.values)
    if len(found) == 1:
        return found[0]
    if found:
        names = " and ".join(found)
        message = f"columns: more than one format fits, got {names}; write data.format: {found[0]}, or the other"
        return Refusal("other_format", row.where, message)
    known = "; ".join(f"{name}: {' + '.join(format.columns[0])}" for name, format in FORMATS.items())
    needed = {column for format in FORMATS.values() for columns in format.columns for column in columns}
    cure = f"{_rename(row.values, needed)} ({known})"
    return Refusal("missing_column", row.where, f"columns: no known format has these, {_columns(row.values)}; {cure}")


def read_conversation(row: Row, *, format: str, system: str | None) -> Conversation | Refusal:
    """What a row of this format says; `system` goes before turns without one, but never before plain text."""
    try:
        _check_columns(row, format)
        _refuse_media(row.values)
        script = FORMATS[format].read(row.values)
        if format in ("messages", "sharegpt"):  # an Alpaca row may be text that only speaks of one, as Stanford's do
            _refuse_placeholders(script.spoken)
        if format == "text":
            return Conversation((script.spoken[0].turn,), row)
        spoken = with_own_system(row.values, script.spoken)
        check_order(spoken)
        check_texts(spoken)
        turns = with_call_ids(spoken)
    except Unusable as why:
        return Refusal(why.reason, row.where, why.message)
    if system is not None and turns[0].role != "system":
        turns = (Turn("system", system), *turns)
    return Conversation(turns, row, script.tools)


def alpaca_user_text(instruction: str, input_text: str) -> str:
    """The user's turn of an Alpaca row: the instruction, then the input under its heading if there is one."""
    return f"{instruction}{INPUT_HEADING}{input_text}" if input_text else instruction


# The formats, one reader each.


def _alpaca(values: Values) -> Script:
    spoken = []
    if values.get("history"):
        for index, pair in enumerate(list_of(values["history"], "history")):
            field = f"history[{index}]"
            if not isinstance(pair, list) or len(pair) != 2:
                raise Unusable("wrong_type", f"{field}: must be a list of two texts, {got(pair)}; write [user, answer]")
            for role, side, text in (("user", 0, pair[0]), ("assistant", 1, pair[1])):
                spoken.append(plain_turn(role, text, f"{field}[{side}]"))
    answer = "response" if values.get("output") is None and values.get("response") is not None else "output"
    other = values.get("response")
    if answer == "output" and other is not None and other != values["output"]:
        raise Unusable("wrong_type", f"response: must equal output, {got(other)}; keep one of the two columns")
    # Dolly's rows call them context and response.
    more = "context" if answer == "response" and "input" not in values else "input"
    told = values.get(more)
    instruction = text_of(values["instruction"], "instruction")
    user = alpaca_user_text(instruction, "" if told is None else text_of(told, more))
    spoken.append(Spoken(Turn("user", user), "instruction", "instruction", "user"))
    spoken.append(plain_turn("assistant", values[answer], answer))
    return Script(spoken)


def _prompt_completion(values: Values) -> Script:
    _refuse_undesired(values)
    prompt, completion = values["prompt"], values["completion"]
    if isinstance(prompt, list):
        if not isinstance(completion, list):
            what = "must be a list of messages because prompt is one"
            raise Unusable("wrong_type", f'completion: {what}, {got(completion)}; write [{{"role", "content"}}, ...]')
        before = unlearned(turns_of(prompt, "prompt", MESSAGES))
        return Script([*before, *turns_of(completion, "completion", MESSAGES)], tools_of(values))
    return Script([plain_turn("user", prompt, "prompt"), plain_turn("assistant", completion, "completion")])


def _messages(values: Values) -> Script:
    _refuse_undesired(values)
    return Script(turns_of(values["messages"], "messages", MESSAGES), tools_of(values))


def _sharegpt(values: Values) -> Script:
    _refuse_undesired(values)
    return Script(turns_of(values["conversations"], "conversations", SHAREGPT), tools_of(values))


def _preference(values: Values) -> Script:
    if "chosen" in values:
        return _chosen(values)
    if not isinstance(values["label"], bool):
        raise Unusable("wrong_type", f"label: must be true or false, {got(values['label'])}; write one of them")
    if values.get("messages") is not None:
        return _messages(values)
    return _sharegpt(values) if values.get("conversations") is not None else _prompt_completion(values)


def _chosen(values: Values) -> Script:
    """The prompt's turns, not learned, then the chosen side, without the prompt where it repeats that."""
    column = next((name for name in ("prompt", "conversations", "messages") if values.get(name) is not None), None)
    style = SHAREGPT if column == "conversations" else MESSAGES
    chosen = values["chosen"]
    if isinstance(chosen, str):
        after = [plain_turn("assistant", chosen, "chosen")]
    elif isinstance(chosen, dict):
        after = [turn_of(chosen, "chosen", style)]
    elif isinstance(chosen, list):
        after = turns_of(chosen, "chosen", style)
    else:
        what = f"must be the answer, as text, a turn or a list of turns, {got(chosen)}"
        raise Unusable("wrong_type", f"chosen: {what}; write it in one of these forms")
    if column is None:
        if len(after) == 1:
            raise Unusable("missing_column", f"prompt: missing, {_columns(values)}; {_rename(values, {'prompt'})}")
        before, after = after[:-1], after[-1:]
    elif isinstance(values[column], str):
        before = [plain_turn("user", values[column], column)]
    else:
        before = turns_of(values[column], column, style)
    opening = [said.turn for said in before]
    if [said.turn for said in after[: len(before)]] == opening:
        after = after[len(before) :]
    return Script([*unlearned(before), *after], tools_of(values))


def _whole_text(values: Values) -> Script:
    said = plain_turn("assistant", values["text"], "text")
    if not said.turn.text.strip():
        raise Unusable(
            "empty_answer", "text: must say something, got nothing but white space; write it or delete the row"
        )
    return Script([said])


def _refuse_undesired(values: Values) -> None:
    if values.get("label") is False:
        cure = "drop such rows with data.drop: [undesired_answer], or rename a label that means something else"
        raise Unusable("undesired_answer", f"label: must be true for an answer that is learned, got false; {cure}")


def _columns(values: Values) -> str:
    return f"got {names_of(values)}"


# Which columns make a format.


def _formats_of(columns: set[str], values: Values) -> list[str]:
    """Every format that these columns fit; `preference` covers the others, and `text` fits only alone."""
    if "label" in columns and not isinstance(values["label"], bool):
        columns = columns - {"label"}  # a class of something, not a verdict
    found = [name for name, format in FORMATS.items() if _fits(columns, format)]
    if "preference" in found:
        return ["preference"]
    return [name for name in found if name != "text"] or found


def _fits(columns: Container[str], format: Format) -> bool:
    for needed in format.columns:
        for column in needed:
            if column not in columns:
                break
        else:
            return True
    return False


def _check_columns(row: Row, format: str) -> None:
    """The row has the format's columns, and not another format's with null in all of its own."""
    known = FORMATS[format]
    fits = _fits(row.values, known)
    if fits and any(row.values.get(column) is not None for columns in known.columns for column in columns):
        return
    other = detect_format(row)
    if isinstance(other, str) and other != format:
        what = f"this row looks like {other}, {_columns(row.values)}, but its source is read as {format}"
        cure = "give each format a source of its own, or drop such rows with data.drop: [other_format]"
        raise Unusable("other_format", f"columns: {what}, as its first row or data.format says; {cure}")
    if not fits:
        needed = min(known.columns, key=lambda columns: sum(column not in row.values for column in columns))
        missing = next(column for column in needed if column not in row.values)
        what = f"this column of {format} is missing, {_columns(row.values)}"
        raise Unusable("missing_column", f"{missing}: {what}; {_rename(row.values, {missing})}")


def _refuse_media(values: Values) -> None:
    """No row with an image, sound or video in a column of its own: its text alone would be another lesson."""
    for column in MEDIA_COLUMNS:
        if values.get(column):
            raise has_media(column, got(values[column]))


def _refuse_placeholders(spoken: Iterable[Spoken]) -> None:
    """No user's turn in which a line says where the image lies; between <image> and </image> it is somebody's XML."""
    for said in spoken:
        text = said.turn.text
        if "<" in text and said.turn.role == "user" and (match := PLACEHOLDER.search(text)) and "</" not in text:
            raise has_media(said.text_field, got(match[0].strip()))


def _rename(values: Values, wanted: Iterable[str]) -> str:
    """The cure for a missing column: the name that is near, or how to rename one."""
    pairs: Iterator[tuple[str | None, str]] = ((near_name(values, column), column) for column in sorted(wanted))
    near, column = next(((near, column) for near, column in pairs if near and near not in wanted), (None, "NAME"))
    if near:
        return f"did you mean '{column}' by {shown(near)}? rename it, or map it with the source's columns key"
    return "rename its columns, or map them with the source's columns key"


FORMATS: dict[str, Format] = {
    "preference": Format(
        (
            ("prompt", "chosen"),
            ("conversations", "chosen"),
            ("messages", "chosen"),
            ("chosen", "rejected"),  # the prompt is the beginning of both
            ("messages", "label"),
            ("conversations", "label"),
            ("prompt", "completion", "label"),
        ),
        _preference,
    ),
    "alpaca": Format((("instruction", "output"), ("instruction", "response")), _alpaca),
    "messages": Format((("messages",),), _messages),
    "sharegpt": Format((("conversations",),), _sharegpt),
    "prompt-completion": Format((("prompt", "completion"),), _prompt_completion),
    "text": Format((("text",),), _whole_text),
}
