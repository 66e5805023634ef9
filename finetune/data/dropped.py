"""Refuse what a template leaves out: a written conversation in, nothing out, or the first text that is not written."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from finetune.data.spans import CLOSE, END, OPEN, Message, TemplateProblem, Written

from finetune.data.spans import short, stands_in, texts_of, values_of  # isort: skip


def refuse_dropped(written: Written, proven_shapes: set[Any]) -> None:
    """Refuse a conversation of which a part is not written.

    Each text must stand in the rendering. That alone would not see a text that also stands elsewhere, so each shape of
    conversation (roles, which texts are empty, calls) is rendered once with a name in the place of every text.

    Raises:
        TemplateProblem: a turn, a call or a tool is left out.
    """
    for index, message in enumerate(written.messages):
        for text in texts_of(message):
            if text not in written.whole and not stands_in(text, written.whole):
                raise _dropped(written, index, text)
    for tool in tool_names(written.tools):
        if not stands_in(tool, written.whole):
            raise _dropped_tool(written, tool)
    shape = (len(written.tools), *map(_shape, written.messages))
    if shape not in proven_shapes:
        _refuse_dropping_shape(written)
        proven_shapes.add(shape)


def _refuse_dropping_shape(written: Written) -> None:
    messages = [_named_message(message, index) for index, message in enumerate(written.messages)]
    tools = [_named_tool(tool, index) for index, tool in enumerate(written.tools)]
    rendered = written.write(messages, tools, False)
    for index, message in enumerate(messages):
        for name, text in zip(texts_of(message), texts_of(written.messages[index]), strict=True):
            if not stands_in(name, rendered):
                raise _dropped(written, index, text)
    for name, tool in zip(tool_names(tools), tool_names(written.tools), strict=True):
        if not stands_in(name, rendered):
            raise _dropped_tool(written, tool)


def _dropped(written: Written, index: int, text: str) -> TemplateProblem:
    what = f"the template leaves out {short(text)}; use another template, or data.drop: [template_drops_turn]"
    return written.problem("template_drops_turn", index, what)


def _dropped_tool(written: Written, tool: str) -> TemplateProblem:
    message = f"template {written.name}: it leaves out the tool {short(tool)}; use another template, or data.drop: "
    return TemplateProblem("template_drops_turn", message + "[template_drops_turn]")


def tool_names(tools: Sequence[Any]) -> Iterator[str]:
    return (tool["function"]["name"] for tool in tools)


def _shape(message: Message) -> tuple[Any, ...]:
    calls = [len(list(values_of(call["function"]["arguments"]))) for call in message.get("tool_calls", ())]
    return message["role"], not message["content"].strip(), len(message), *calls


def _named_message(message: Message, index: int) -> Message:
    named = {**message, "content": f"{OPEN}{index}{END}" if message["content"].strip() else message["content"]}
    if "tool_calls" in message:
        named["tool_calls"] = [
            {**call, "function": _renamed(call["function"], f"{CLOSE}{index}.{number}")}
            for number, call in enumerate(message["tool_calls"])
        ]
    return named


def _named_tool(tool: Any, index: int) -> Any:
    return {**tool, "function": {**tool["function"], "name": f"{END}{index}{END}"}}


def _renamed(value: Any, name: str) -> Any:
    """The same value with a name of its own in the place of every text."""
    if isinstance(value, Mapping):
        return {key: _renamed(item, f"{name}.{number}") for number, (key, item) in enumerate(value.items())}
    if isinstance(value, list | tuple):
        return [_renamed(item, f"{name}.{number}") for number, item in enumerate(value)]
    return f"{name}{END}" if isinstance(value, str) and value.strip() else value
