"""Check the turns of a row together: who may follow whom, what may be empty, which call a tool answers."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from itertools import count
from typing import NoReturn

from finetune.data.rows import ToolCall, Turn
from finetune.data.turns import Spoken, plain_turn
from finetune.data.values import Unusable, Values, got, shown

NEXT = {  # what may follow; "calls" is an assistant's turn that calls tools
    "start": ("user",),
    "user": ("assistant",),
    "assistant": ("user",),
    "calls": ("tool",),
    "tool": ("tool", "assistant"),
}


def with_own_system(values: Values, spoken: list[Spoken]) -> list[Spoken]:
    """The turns behind the row's own `system` column, if that says something."""
    if values.get("system") is None:
        return spoken
    said = plain_turn("system", values["system"], "system")
    if not said.turn.text.strip():
        return spoken
    if spoken[0].turn.role != "system":
        return [said, *spoken]
    if spoken[0].turn.text != said.turn.text:
        what = f"must equal the system turn at {spoken[0].text_field}, {got(said.turn.text)}"
        raise Unusable("bad_turns", f"system: {what}; keep one of the two")
    return spoken


def check_order(spoken: Sequence[Spoken]) -> None:
    state = "start"
    for index, said in enumerate(spoken):
        role = said.turn.role
        if role == "system" and index == 0:
            continue
        if role not in NEXT[state]:
            _refuse_order(state, said)
        state = "calls" if said.turn.tool_calls else role
    last = spoken[-1]
    if last.turn.role != "assistant":
        what = f"the last turn must be the assistant's, got {shown(last.word)}"
        raise Unusable("bad_turns", f"{last.role_field}: {what}; add the answer, or delete this turn")


def _refuse_order(state: str, said: Spoken) -> NoReturn:
    role = said.turn.role
    place = {
        "start": "the first turn",
        "calls": "the turn after a tool call",
        "tool": "the turn after a tool's answer",
    }.get(state, f"the turn after {'an' if state == 'assistant' else 'a'} {state} turn")
    if role == "system":
        cure = "a system turn is possible only at the start"
    elif state == "start":
        cure = "delete the turns before the user's first, or write the question that they answer"
    elif role == state:
        cure = "join the two turns into one"
    elif role == "tool":
        cure = "write the assistant's call before it"
    else:
        cure = "add the missing turn, or delete this one"
    what = f"{place} must be of {' or '.join(NEXT[state])}, got {shown(said.word)}"
    raise Unusable("bad_turns", f"{said.role_field}: {what}; {cure}")


def check_texts(spoken: Sequence[Spoken]) -> None:
    """Something must be asked, each answer that is learned must say something, and one must be learned."""
    questions, asked, learned = 0, False, False
    for said in spoken:
        turn = said.turn
        if turn.role == "user":
            questions += 1
            question = said
        if turn.role in ("user", "system"):
            asked = asked or bool(turn.text.strip())
        elif turn.role == "assistant":
            learned = learned or turn.train
    if not asked and questions == 1:
        what = "empty, and there is no input either" if question.text_field == "instruction" else "nothing is asked"
        cure = "write what is asked, or delete the row"
        raise Unusable("empty_prompt", f"{question.text_field}: {what}, got {shown(question.turn.text)}; {cure}")
    _check_answers(spoken)
    if not learned:
        field = spoken[-1].role_field.rpartition(".")[0]
        cure = "let one be learned, or delete the row"
        raise Unusable("no_supervised_token", f"{field}.train: one assistant turn must be learned, got none; {cure}")


def _check_answers(spoken: Sequence[Spoken]) -> None:
    for said in spoken:
        turn = said.turn
        if turn.role != "assistant" or turn.tool_calls or turn.text.strip():
            continue
        if turn.train or said is spoken[-1]:
            cure = "write the answer, delete the row, or drop such rows with data.drop: [empty_answer]"
            raise Unusable("empty_answer", f"{said.text_field}: must be an answer, got {shown(turn.text)}; {cure}")


def with_call_ids(spoken: Sequence[Spoken]) -> tuple[Turn, ...]:
    """The turns with an id of nine letters or digits on every call, and the same one on the turn that answers it."""
    turns = [said.turn for said in spoken]
    if not any(turn.tool_calls for turn in turns):
        return tuple(turns)
    kept = {call.id for turn in turns for call in turn.tool_calls if _is_strict_id(call.id)}
    new_ids = (made for number in count() if (made := f"call{number:05d}"[-9:]) not in kept)
    unanswered: list[tuple[ToolCall, str]] = []  # the row's calls and their ids here
    for index, turn in enumerate(turns):
        if turn.role == "assistant":
            calls = _distinct_calls(turn.tool_calls, spoken[index])
            ids = [call.id if _is_strict_id(call.id) else next(new_ids) for call in calls]
            unanswered = list(zip(calls, ids, strict=True))
            renamed = tuple(replace(call, id=id) for call, id in unanswered)
            turns[index] = replace(turn, tool_calls=renamed) if calls else turn
        elif turn.role == "tool":
            answered = _answered_call(spoken[index], [call for call, _ in unanswered])
            turns[index] = replace(turn, tool_call_id=unanswered.pop(answered)[1])
    return tuple(turns)


def _distinct_calls(calls: tuple[ToolCall, ...], said: Spoken) -> tuple[ToolCall, ...]:
    times = Counter(call.id for call in calls if call.id)
    if twice := next((id for id in times if times[id] > 1), None):
        field = said.role_field.rpartition(".")[0]
        raise Unusable("bad_tool_call", f"{field}.tool_calls: ids must differ, {got(twice)} twice; give each its own")
    return calls


def _answered_call(said: Spoken, unanswered: Sequence[ToolCall]) -> int:
    """Which open call this tool's turn answers: by id, else the next one of its tool's name, else the next one."""
    field, turn = said.role_field.rpartition(".")[0], said.turn
    if not unanswered:
        what = f"the assistant's turn has no call left to answer, got one more turn of {said.word}"
        raise Unusable("bad_tool_call", f"{said.role_field}: {what}; delete it or add its call")
    places = list(range(len(unanswered)))
    if turn.tool_call_id:
        same = [place for place in places if unanswered[place].id == turn.tool_call_id]
        places = same or [place for place in places if not unanswered[place].id]
    if not places:
        open_ids = ", ".join(shown(call.id) for call in unanswered[:5])
        what = f"must be the id of an open call ({open_ids}), {got(turn.tool_call_id)}"
        raise Unusable("bad_tool_call", f"{field}.tool_call_id: {what}; write one of these")
    return next((place for place in places if unanswered[place].name == turn.name), places[0])


def _is_strict_id(id: str) -> bool:
    return len(id) == 9 and id.isascii() and id.isalnum()
