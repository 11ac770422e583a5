"""A conversation as it stands in a row of data, checked before anything is rendered.

A row is {"messages": [message, …]} with messages as in `template`, and may have

    tools            list of the functions' descriptions
    enable_thinking  how the prompts are rendered: false puts an empty thinking block at their end; see `samples`
    answer           the right final answer, for the judge of a task

The checks are stricter than the template's: user and assistant alternate, tool results stand only between an answer
that calls tools and the next answer, the first user turn is a question, no answer is empty, a thought within an
answer's content stands at its beginning, and a call's arguments are an object. A thought is moved to
`reasoning_content`, whichever key the row has it under; a thought of white space alone counts as none. Turns after the
last answer are left out.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from qwen3f.data.chat.template import (
    THOUGHTS,
    Message,
    check_messages,
    is_query,
    render,
    split_thought,
    without_switches,
)
from qwen3f.data.sources.adapters.rows import Row, RowFault, check_text, list_of_dicts
from qwen3f.errors import UserError

COLUMNS = ("messages",)
OPTIONAL_COLUMNS = ("tools", "enable_thinking", "answer")

_BEFORE = {"user": ("system", "assistant"), "assistant": ("user", "tool"), "tool": ("assistant", "tool")}


@dataclass(frozen=True)
class Conversation:
    """A conversation that can be learnt from.

    Attributes:
        messages: the turns up to the last answer.
        name: "file:row".
        tools: descriptions of the functions that may be called.
        enable_thinking: how its prompts are rendered; None: `samples` decides.
        judged: (the text to judge, the right final answer), for the judge of a task; None: the row gives no right
            answer.
    """

    messages: tuple[Message, ...]
    name: str
    tools: tuple[Mapping[str, Any], ...] | None = None
    enable_thinking: bool | None = None
    judged: tuple[str, str] | None = None

    @property
    def question(self) -> bytes:
        """The first user turn without /think and /no_think; it decides the split, so a question is in one split."""
        first = next(message["content"] for message in self.messages if message["role"] == "user")
        return without_switches(first).encode()


def read_conversation(row: Row) -> Conversation:
    """The conversation of a row, whose form the module's docstring says. Raises RowFault, with file and row."""
    messages = checked_messages(list_of_dicts(row, "messages"), row.name, tools := read_tools(row))
    enable_thinking = row.values.get("enable_thinking")
    if not isinstance(enable_thinking, bool | None):
        raise RowFault("invalid_rows", f"{row.name} has enable_thinking={enable_thinking!r}: write true or false.")
    gold = row.values.get("answer")
    judged = None if gold is None else (messages[-1]["content"], check_text(gold, row.name, "answer"))
    return Conversation(messages, row.name, tools, enable_thinking, judged)


def checked_messages(
    messages: Sequence[Message], name: str, tools: Sequence[Mapping[str, Any]] | None = None
) -> tuple[Message, ...]:
    """The messages up to the last answer.

    Args:
        messages: as a row has them.
        name: "file:row", for the message of a fault.
        tools: as a row has them; they are checked too.

    Raises:
        RowFault: a message that `template.check_messages` refuses, or that breaks a rule of the module's docstring.
    """
    try:
        check_messages(messages, tools)
    except UserError as error:
        raise RowFault("invalid_rows", f"{name}: {error}") from None
    messages = [_without_blank_thought(_with_one_thought(message)) for message in messages]
    for number, message in enumerate(messages):
        fault = _order_fault(messages, number) or _content_fault(message) or _question_fault(messages, number)
        if fault:
            reason, text = fault
            raise RowFault(reason, f"{name}: Message {number} {text}")
    last = max((i for i, message in enumerate(messages) if message["role"] == "assistant"), default=None)
    if last is None:
        raise RowFault("unanswered", f"{name} has no assistant's turn: write the answer that is to be learnt.")
    for number, message in enumerate(messages):
        for text in split_thought(message) if message["role"] == "assistant" else ():  # not all thoughts are rendered
            check_text(text, f"{name}: Message {number}", "messages", may_be_empty=True)
    check_text(render(messages, tools=tools), name, "messages")  # for lone surrogates in tools and calls
    return tuple(messages[: last + 1])


def _with_one_thought(message: Message) -> Message:
    """The message with its thought under `reasoning_content`, if it has one under another key."""
    others = [message[key] for key in THOUGHTS[1:] if message.get(key) is not None]
    if not others:
        return message
    kept = {key: value for key, value in message.items() if key not in THOUGHTS}
    return {**kept, "reasoning_content": others[0]}


def _without_blank_thought(message: Message) -> Message:
    """The message; a thought of white space alone becomes empty, since a template would render it as a thought."""
    if message["role"] != "assistant":
        return message
    thought, content = split_thought(message)
    if thought.strip() or not thought.strip("\n"):
        return message
    if message.get("reasoning_content") is None:  # it stands in the content, perhaps with "\r\n" around it
        content = content.lstrip()
    return {**message, "reasoning_content": "", "content": content}


def read_tools(row: Row) -> tuple[Mapping[str, Any], ...] | None:
    tools = row.values.get("tools")
    if not isinstance(tools, list | None):
        raise RowFault("invalid_rows", f"{row.name} has tools of type {type(tools).__name__}: write a list of objects.")
    return tuple(tools) if tools else None


def _order_fault(messages: Sequence[Message], number: int) -> tuple[str, str] | None:
    role = messages[number]["role"]
    before = messages[number - 1] if number else None
    if role == "system" or before is None:
        if (role, number) in (("system", 0), ("user", 0)):
            return None
        return "roles_out_of_order", f"has the role {role!r}: begin with one system's turn or none, then a user's."
    if before["role"] not in _BEFORE[role]:
        allowed = " or ".join(_BEFORE[role])
        return "roles_out_of_order", f"has the role {role!r} after {before['role']!r}: write it after {allowed}."
    if role == "tool" and before["role"] == "assistant" and not before.get("tool_calls"):
        return "roles_out_of_order", "is a tool's result, but the answer before it calls no tool: write its tool_calls."
    return None


def _question_fault(messages: Sequence[Message], number: int) -> tuple[str, str] | None:
    """The fault of a first user turn that is no question: without one the template writes no thinking block."""
    message, before = messages[number], messages[number - 1] if number else None
    if message["role"] != "user" or is_query(message) or (before and before["role"] != "system"):
        return None
    return "invalid_rows", "is a tool's result within <tool_response>: begin with a question."


def _content_fault(message: Message) -> tuple[str, str] | None:
    if message["role"] != "assistant":
        return None
    content = message["content"]
    if content.lstrip().startswith("<think>"):
        if "</think>" not in content:
            return "misplaced_thoughts", "begins with <think> and never ends it: write </think>, or remove the row."
        if message.get("reasoning_content") is not None:
            return "misplaced_thoughts", "has a thought in its content beside reasoning_content: leave one of them out."
    if message.get("reasoning_content") is None and "</think>" in content:
        thought, _, rest = content.partition("</think>")
        before, begin, inner = thought.partition("<think>")
        if "</think>" in rest or "<think>" in inner or (begin and before.strip()):
            return "misplaced_thoughts", (
                "has text that the chat template would drop, before its <think> or between two of its <think> or "
                "</think>: write the thought under reasoning_content, or remove the row."
            )
    for n, entry in enumerate(message.get("tool_calls") or []):
        arguments = (entry.get("function") or entry)["arguments"]
        if not isinstance(arguments, Mapping):
            kind = "text" if isinstance(arguments, str) else f"a {type(arguments).__name__}"
            return "invalid_rows", f'has arguments as {kind} in tool call {n}: write an object, {{"name": value, …}}.'
    if not split_thought(message)[1].strip() and not message.get("tool_calls"):
        return "empty_texts", "is an empty answer: write its text, or remove the row."
    return None
