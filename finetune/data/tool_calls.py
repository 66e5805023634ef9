"""The tools of a row and the calls that one turn makes of them, as chat templates want them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from finetune.data.rows import ToolCall
from finetune.data.values import Unusable, Values, check_json, from_json, got, needed_value, optional_text, text_of

FUNCTION_CALL = "function_call"  # a ShareGPT role whose text is the call itself, and a key of old OpenAI turns


def tools_of(values: Values) -> tuple[Mapping[str, Any], ...]:
    """The tools of a row as chat templates want them: each {"type": "function", "function": {...}}."""
    tools = values.get("tools")
    if isinstance(tools, str):
        tools = from_json(tools, "tools") if tools.strip() else None
    if tools is None:
        return ()
    if not isinstance(tools, list):
        raise Unusable("bad_tool_call", f"tools: must be a list, or JSON text of one, {got(tools)}; put it in a list")
    return tuple(_tool(tool, f"tools[{index}]") for index, tool in enumerate(tools))


def _tool(tool: Any, field: str) -> Mapping[str, Any]:
    if not isinstance(tool, dict):
        cure = 'write {"type": "function", "function": {...}}'
        raise Unusable("bad_tool_call", f"{field}: must be an object, {got(tool)}; {cure}")
    wrapped = "function" in tool
    if (wrapped or isinstance(tool.get("name"), str)) and tool.get("type", "function") != "function":
        raise Unusable("bad_tool_call", f"{field}.type: must be 'function', {got(tool['type'])}; no other is known")
    function = tool["function"] if wrapped else {key: value for key, value in tool.items() if key != "type"}
    inside = f"{field}.function" if wrapped else field
    if not isinstance(function, dict):
        raise Unusable("bad_tool_call", f"{inside}: must be an object, {got(function)}; write its name and parameters")
    _tool_name(function, inside)
    check_json(tool, field)
    return tool if wrapped else {"type": "function", "function": function}


def calls_of(said: Values, field: str, role: str) -> tuple[ToolCall, ...]:
    """The calls of a turn in OpenAI's form, also in the old one with a single `function_call`."""
    key = "tool_calls" if said.get("tool_calls") or not said.get(FUNCTION_CALL) else FUNCTION_CALL
    calls = said.get(key)
    if calls is None or calls == []:
        return ()
    if role != "assistant":
        what = f"only an assistant's turn can call tools, got it on a turn of {role}"
        raise Unusable("bad_tool_call", f"{field}.{key}: {what}; delete this key")
    if key == FUNCTION_CALL:
        return (_call(calls, f"{field}.{key}"),)
    if not isinstance(calls, list):
        raise Unusable("bad_tool_call", f"{field}.{key}: must be a list of calls, {got(calls)}; put it in a list")
    return tuple(_call(call, f"{field}.{key}[{index}]") for index, call in enumerate(calls))


def calls_in_text(value: Any, field: str) -> tuple[ToolCall, ...]:
    calls = from_json(text_of(value, field), field) if isinstance(value, str) else value
    if isinstance(calls, list) and calls:
        return tuple(_call(call, f"{field}[{index}]") for index, call in enumerate(calls))
    return (_call(calls, field),)


def _call(call: Any, field: str) -> ToolCall:
    """One call; its id is the row's own, or empty."""
    if not isinstance(call, dict):
        raise Unusable("bad_tool_call", f'{field}: must be an object, {got(call)}; write {{"name", "arguments"}}')
    own_id = optional_text(call, "id", field, reason="bad_tool_call") or ""
    function = call
    if "function" in call:
        function, field = call["function"], f"{field}.function"
        if not isinstance(function, dict):
            cure = 'write {"name", "arguments"}'
            raise Unusable("bad_tool_call", f"{field}: must be an object, {got(function)}; {cure}")
    name = _tool_name(function, field)
    arguments_field = f"{field}.arguments"
    arguments = needed_value(function, "arguments", arguments_field, reason="bad_tool_call")
    if isinstance(arguments, str):
        arguments = from_json(text_of(arguments, arguments_field), arguments_field)
    if not isinstance(arguments, dict):
        what = f"must be an object, or JSON text of one, {got(arguments)}"
        raise Unusable("bad_tool_call", f"{arguments_field}: {what}; write {{}} where there are none")
    check_json(arguments, arguments_field)
    return ToolCall(name, arguments, own_id)


def _tool_name(function: Values, field: str) -> str:
    name = needed_value(function, "name", f"{field}.name", reason="bad_tool_call")
    if not isinstance(name, str) or not name.strip():
        raise Unusable("bad_tool_call", f"{field}.name: must be the name of a tool, {got(name)}; write it")
    return text_of(name, f"{field}.name")
