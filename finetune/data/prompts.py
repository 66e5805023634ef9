"""Read the prompts that a run is asked while it trains: a file in; turns as token ids out, or every line's problem."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from finetune.base import Base
from finetune.data.encoder import Encoder
from finetune.data.formats import alpaca_user_text
from finetune.data.rows import Refusal, Row, Turn
from finetune.data.sources import read_rows
from finetune.data.template import Template, TemplateProblem
from finetune.data.tool_calls import tools_of
from finetune.data.turn_rules import check_order, check_texts, with_own_system
from finetune.data.turns import MESSAGES, Spoken, plain_turn, turns_of
from finetune.data.values import Unusable, Values, names_of, text_of
from finetune.errors import Problem, UserError, raise_problems
from finetune.recipe import SourceSection

ROWS = (".jsonl", ".ndjson", ".json")  # any other name: plain text, one prompt a line
TEXT, NO_ROOM = "a UTF-8 text file with one prompt a line, or .jsonl", "needs 1 to {} tokens to leave room to answer"


@dataclass(frozen=True)
class Prompt:
    """What is asked: the text of the user's turn, or the turns where there are more; and their token ids."""

    asked: str | list[dict[str, str]]
    ids: tuple[int, ...]


def read_prompts(file: str, base: Base, template: Template, *, system: str | None) -> tuple[Prompt, ...]:
    """The prompts of a file as the template writes them, in order; `system` goes before those without a system turn.

    A line of a .jsonl file has `prompt` (a text or messages), `messages`, or Alpaca's `instruction` and `input`; an
    answer at the end of it is left out.

    Raises:
        UserError: every line that cannot be asked, or a file that cannot be read or holds no prompt.
    """
    encoder, prompts, problems = Encoder(base), [], []
    context = base.facts.context_tokens
    for where, read in _turns(file):
        if isinstance(read, str):
            problems.append(Problem(where, read))
            continue
        turns = (Turn("system", system), *read) if system is not None and read[0].role != "system" else read
        try:
            ids = encoder.encode([template.render_prompt(turns, control_texts=encoder.special_texts)])[0].ids
        except TemplateProblem as problem:
            problems.append(Problem(where, str(problem)))
            continue
        if not 0 < len(ids) < context:
            problems.append(Problem(where, f"has {len(ids)} tokens; a prompt {NO_ROOM.format(context - 1)}"))
        prompts.append(Prompt(_asked(read), tuple(ids.tolist())))
    raise_problems(problems)
    if not prompts:
        raise UserError(Problem("evaluate.prompts", f"{file} holds no prompt; give {TEXT}"))
    return tuple(prompts)


def _turns(file: str) -> Iterator[tuple[str, tuple[Turn, ...] | str]]:
    """Place and turns of every prompt, or what is wrong with it."""
    if Path(file).suffix.lower() not in ROWS:
        yield from _lines(file)
        return
    for found in read_rows(SourceSection(source=file)):
        if isinstance(found, Refusal):
            yield found.where, found.message
        else:
            yield found.where, _turns_of_row(found)


def _lines(file: str) -> Iterator[tuple[str, tuple[Turn, ...] | str]]:
    try:
        lines = Path(file).expanduser().read_text(encoding="utf-8-sig").splitlines()
    except (OSError, ValueError) as error:
        raise UserError(Problem("evaluate.prompts", f"{file} cannot be read ({error}); give {TEXT}")) from error
    for number, line in enumerate(lines, start=1):
        if line.strip():
            yield f"{file}:{number}", (Turn("user", line),)


def _turns_of_row(row: Row) -> tuple[Turn, ...] | str:
    try:
        if tools_of(row.values):
            raise Unusable("bad_tool_call", "tools: a prompt has none; take the row out")
        spoken = with_own_system(row.values, _spoken(row.values))
        if spoken[-1].turn.role == "assistant":  # a row of the data: its answer is what the model is asked for
            spoken = spoken[:-1]
        answered = [*spoken, plain_turn("assistant", "x", "answer")]
        check_order(answered)
        check_texts(answered)
    except Unusable as why:
        return why.message
    return tuple(said.turn for said in spoken)


def _spoken(values: Values) -> list[Spoken]:
    if values.get("messages") is not None:
        return turns_of(values["messages"], "messages", MESSAGES)
    if isinstance(values.get("prompt"), list):
        return turns_of(values["prompt"], "prompt", MESSAGES)
    if values.get("prompt") is not None:
        return [plain_turn("user", values["prompt"], "prompt")]
    if values.get("instruction") is None:
        message = f"columns: prompt, messages or instruction is needed, got {names_of(values)}; rename one"
        raise Unusable("missing_column", message)
    told = values.get("input")
    user = alpaca_user_text(
        text_of(values["instruction"], "instruction"), "" if told is None else text_of(told, "input")
    )
    return [Spoken(Turn("user", user), "instruction", "instruction", "user")]


def _asked(turns: tuple[Turn, ...]) -> Any:
    return turns[0].text if len(turns) == 1 else [{"role": turn.role, "content": turn.text} for turn in turns]
