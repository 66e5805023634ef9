"""Talk with a target: a line typed in, the answer streamed out, the conversation kept between turns."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from finetune.data.encoder import Encoder
from finetune.data.rows import Turn
from finetune.errors import UserError
from finetune.use.generate import Sampling, conversation_prompt, stream
from finetune.use.target import Target

COMMANDS = {
    "/reset": "forget the conversation",
    "/undo": "forget the last question and its answer",
    "/quit": "leave (or Ctrl-D)",
}
LEAST_ROOM = 16  # tokens an answer must be able to have


@dataclass
class _Talk:
    """What has been said so far; grows and shrinks with the conversation."""

    target: Target
    system: str | None
    max_new_tokens: int
    sampling: Sampling
    write: Callable[[str], None]
    encoder: Encoder
    turns: list[Turn] = field(default_factory=list)  # user, assistant, user, assistant ...


def _type_line() -> str:
    return input("> ")


def _show(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()


def chat(  # noqa: PLR0913 - the options of the command, one to one
    target: Target,
    *,
    system: str | None = None,
    max_new_tokens: int = 512,
    temperature: float = 0.0,
    top_p: float = 1.0,
    seed: int = 17,
    read_line: Callable[[], str] = _type_line,
    write: Callable[[str], None] = _show,
) -> None:
    """Answer every line that `read_line` gives until /quit or EOFError; answers go to `write` piece by piece.

    Ctrl-C stops an answer, which is kept as far as it came; while nothing is being said it leaves.

    Raises:
        UserError: the target has no template, or one that takes no such system prompt; before the first line is read.
    """
    system = target.system if system is None else system
    talk = _Talk(target, system, max_new_tokens, Sampling(temperature, top_p, seed), write, Encoder(target.base))
    _ids(talk, [Turn("user", "x")])
    write(f"{target.name}. " + ", ".join(f"{name}: {does}" for name, does in COMMANDS.items()) + ".\n")
    while True:
        try:
            line = read_line().strip()
        except (EOFError, KeyboardInterrupt):
            write("\n")
            return
        if line == "/quit":
            return
        if line.startswith("/"):
            _obey(talk, line)
        elif line:
            _reply(talk, line)


def _obey(talk: _Talk, command: str) -> None:
    if command == "/reset":
        talk.turns.clear()
        talk.write("(forgotten)\n")
    elif command == "/undo":
        del talk.turns[-2:]
        talk.write(f"({len(talk.turns) // 2} questions and answers left)\n")
    else:
        talk.write(f"(no command {command}; there are {', '.join(COMMANDS)})\n")


def _reply(talk: _Talk, line: str) -> None:
    """Say the answer to one line; a line that cannot be asked changes nothing."""
    turns = [*talk.turns, Turn("user", line)]
    try:
        prompt, left_out = _fit(talk, turns)
    except UserError as error:
        talk.write(f"({error.problems[0].message})\n")
        return
    if prompt is None:
        context = talk.target.base.facts.context_tokens
        talk.write(f"(this line alone fills the {context} tokens the model reads; shorten it)\n")
        return
    if left_out:
        context = talk.target.base.facts.context_tokens
        talk.write(f"({context} tokens are full: the {left_out} oldest turns are left out; /reset starts anew)\n")
    said = _say(talk, prompt)
    if said.strip():  # an answer that never came leaves no empty turn behind
        talk.turns[:] = [*turns[left_out:], Turn("assistant", said.strip())]


def _say(talk: _Talk, prompt: Sequence[int]) -> str:
    pieces: list[str] = []
    try:
        room = talk.max_new_tokens
        for piece in stream(talk.target, prompt, max_new_tokens=room, sampling=talk.sampling):
            pieces.append(piece)
            talk.write(piece)
        talk.write("\n")
    except KeyboardInterrupt:
        talk.write(" (stopped)\n")
    return "".join(pieces)


def _fit(talk: _Talk, turns: Sequence[Turn]) -> tuple[Sequence[int] | None, int]:
    """Token ids that leave room to answer and how many of the oldest turns they do without; None where nothing fits."""
    context = talk.target.base.facts.context_tokens
    room = max(LEAST_ROOM, min(talk.max_new_tokens, context // 4))
    for left_out in range(0, len(turns), 2):
        ids = _ids(talk, turns[left_out:])
        last_chance = left_out + 2 >= len(turns)
        if len(ids) + (LEAST_ROOM if last_chance else room) <= context:
            return ids, left_out
    return None, 0


def _ids(talk: _Talk, turns: Sequence[Turn]) -> list[int]:
    before = [Turn("system", talk.system)] if talk.system is not None else []
    prompt = conversation_prompt(talk.target, [*before, *turns], talk.encoder)
    return talk.encoder.encode([prompt])[0].ids.tolist()
