"""Tools and calls as Qwen3-Coder's chat template writes them: XML, each parameter in an element of its own.

The text equals that of the template published with Qwen3-Coder-30B-A3B-Instruct. So a parameter that is no text, list
or object is written as Python writes it (True, None), though that looks odd.
"""

import json
from collections.abc import Mapping, Sequence
from typing import Any

from qwen3f.data.tokenizers.token_text import Segment
from qwen3f.errors import UserError

SYSTEM = "You are Qwen, a helpful AI assistant that can interact with a computer to solve tasks."
"""The system text of a chat that has tools but no system turn."""

_BEFORE = "\n\n# Tools\n\nYou have access to the following tools:\n\n<tools>"
_AFTER = (
    "\n</tools>\n\nIf you choose to call a tool ONLY reply in the following format with NO suffix:\n\n"
    "<tool_call>\n<function=example_function_name>\n<parameter=example_parameter_1>\nvalue_1\n</parameter>\n"
    "<parameter=example_parameter_2>\nvalue_2\n</parameter>\n</function>\n</tool_call>\n\n"
    "<IMPORTANT>\nReminder:\n"
    "- Function calls MUST follow the specified format: the tool calling block MUST begin with an opening <tool_call> "
    "tag and end with a closing </tool_call> tag.\n"
    "- Required parameters MUST be specified\n"
    "- You may provide optional reasoning for your function call in natural language BEFORE the function call, but NOT "
    "after\n"
    "- If there is no function call available, answer the question like normal with your current knowledge and do not "
    "tell the user about function calls\n"
    "</IMPORTANT>"
)


def system_turn(system: str | None, tools: Sequence[Mapping[str, Any]] | None) -> list[Segment]:
    """The system turn; [] if there is neither a system text nor a tool."""
    if system is None and not tools:
        return []
    parts = [Segment("<|im_start|>system\n", True), Segment(SYSTEM if system is None else system, False)]
    if tools:
        described = "".join(_described(tool) for tool in tools)
        parts += [Segment(_BEFORE, True), Segment(described, False), Segment(_AFTER, True)]
    return [*parts, Segment("<|im_end|>\n", True)]


def answer(content: str, calls: Sequence[Mapping[str, Any]]) -> list[Segment]:
    """What an assistant's turn with `calls` holds after its header.

    Raises UserError for arguments that are no object: the template goes through them by name.
    """
    text = content.strip()
    parts = [Segment(f"{text}\n", False)] if text else []
    for number, entry in enumerate(calls):
        call = entry.get("function") or entry
        if not isinstance(call["arguments"], Mapping):
            raise UserError(
                f"Tool call {number} has arguments of type {type(call['arguments']).__name__}: write a dict."
            )
        start = ("\n" if text or number else "") + "<tool_call>\n<function="
        parts += [Segment(start, True), Segment(call["name"], False), Segment(">\n", True)]
        for name, value in call["arguments"].items():
            parts += [Segment("<parameter=", True), Segment(name, False), Segment(">\n", True)]
            parts += [Segment(_text(value), False), Segment("\n</parameter>\n", True)]
        parts.append(Segment("</function>\n</tool_call>", True))
    return parts


def response(content: str, opens: bool, closes: bool) -> list[Segment]:
    """A tool's result. opens, closes: whether it is the first, and the last, result of its turn."""
    before = ("<|im_start|>user\n" if opens else "") + "<tool_response>\n"
    after = "\n</tool_response>\n" + ("<|im_end|>\n" if closes else "")
    return [Segment(before, True), Segment(content, False), Segment(after, True)]


def _described(tool: Mapping[str, Any]) -> str:
    tool = tool.get("function") or tool
    parameters = tool.get("parameters")
    fields = parameters.get("properties") if isinstance(parameters, Mapping) else None
    lines = [f"\n<function>\n<name>{tool.get('name', '')}</name>", *_description(tool), "\n<parameters>"]
    for name, field in fields.items() if isinstance(fields, Mapping) else ():
        field = field if isinstance(field, Mapping) else {}
        kind = [f"\n<type>{field['type']}</type>"] if "type" in field else []
        lines += [f"\n<parameter>\n<name>{name}</name>", *kind, *_description(field)]
        lines += [_others(field, ("name", "type", "description")), "\n</parameter>"]
    lines += [_others(parameters, ("type", "properties")), "\n</parameters>"]
    lines += [_others(tool, ("type", "name", "description", "parameters")), "\n</function>"]
    return "".join(lines)


def _description(holder: Mapping[str, Any]) -> list[str]:
    return [f"\n<description>{str(holder['description']).strip()}</description>"] if "description" in holder else []


def _others(holder: Any, handled: tuple[str, ...]) -> str:
    """An XML element for each key that is not in `handled`."""
    items = holder.items() if isinstance(holder, Mapping) else ()
    return "".join(f"\n<{key}>{_text(value)}</{key}>" for key, value in items if key not in handled)


def _text(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False) if isinstance(value, Mapping | list | tuple) else str(value)
