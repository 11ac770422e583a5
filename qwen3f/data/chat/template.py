"""Qwen3's chat formats: a list of messages as the text, or the ids, that the model reads.

Messages are dicts as in the OpenAI and Hugging Face interfaces:

    {"role": "system" | "user" | "tool", "content": str}
    {"role": "assistant", "content": str, "reasoning_content": str, "tool_calls": [call, …]}   # the last two optional

with a call {"name": str, "arguments": dict or JSON text}, alone or under the key "function". A thought may also stand
under "reasoning" or "thinking", as transformers reads it. Any other key with a value is a UserError, because the
template would drop it. Exceptions are "id", "type" and "index" of a call, and "tool_call_id" and "name" of a tool's
turn.

The text equals that of the template published with the model; `kinds` lists these templates. If the kind has thoughts,
the text keeps them as follows. Answers before the last user query lose theirs. After that query, an answer that is the
last message always has a thinking block, and an earlier answer has one if its thought is not empty. (So a rendered chat
of many turns trains the thought of its last answer only. For the others, render the beginning of the chat up to each
answer.)
Deviations: what the template skips, reads as empty or stops at (unknown roles, missing or non-string content, thoughts
where the kind has none) is a UserError. A null content is too; write "" beside tool calls.
"""

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from qwen3f.data.chat import xml_tools
from qwen3f.data.chat.kinds import HYBRID, TemplateKind, check_thinking
from qwen3f.data.tokenizers.token_text import Segment
from qwen3f.data.tokenizers.tokenizer import Tokenizer
from qwen3f.errors import UserError

Message = Mapping[str, Any]

ROLES = ("system", "user", "assistant", "tool")
_KEYS = {
    "system": ("role", "content"),
    "user": ("role", "content"),
    "assistant": ("role", "content", "reasoning_content", "thinking", "reasoning", "tool_calls"),
    "tool": ("role", "content", "tool_call_id", "name"),
}
_CALL_KEYS = ("name", "arguments")
_DEEPEST = 64  # levels of lists and objects in tools and calls
ANSWER_START = "<|im_start|>assistant\n"
"""The header of an assistant's turn: what the model writes begins after it."""
NO_THINKING = "<think>\n\n</think>\n\n"
"""An empty thinking block: what an answer without thinking begins with."""
THINK = "<think>\n"
"""What a thought begins with."""
THOUGHTS = ("reasoning_content", "thinking", "reasoning")
"""Keys that may hold a thought; the first one present counts, as in transformers 5.24."""

_TOOLS_BEFORE = (
    "# Tools\n\nYou may call one or more functions to assist with the user query.\n\n"
    "You are provided with function signatures within <tools></tools> XML tags:\n<tools>"
)
_TOOLS_AFTER = (
    "\n</tools>\n\nFor each function call, return a json object with function name and arguments within "
    "<tool_call></tool_call> XML tags:\n<tool_call>\n"
    '{"name": <function-name>, "arguments": <args-json-object>}\n</tool_call><|im_end|>\n'
)
# A switch stands alone: "/think." is one; "src/think", "/think/x" and "/thinking" are not. Chinese needs no space
# before.
_SWITCH = re.compile(r"(?<![A-Za-z0-9_/.~-])/(no_)?think(?![A-Za-z0-9_/-]|\.[A-Za-z0-9])")
# A switch and one blank beside it: a space rather than a tab; a line end only if the switch has a line of its own.
_SWITCH_AND_BLANK = re.compile(
    r" {0}|(?<!\S){0} |[^\S\r\n]{0}(?! )|\r?\n{0}(?=\r?\n|\Z)|{0}".replace("{0}", _SWITCH.pattern)
)


def render(
    messages: Sequence[Message],
    *,
    tools: Sequence[Mapping[str, Any]] | None = None,
    add_generation_prompt: bool = False,
    enable_thinking: bool | None = None,
    kind: TemplateKind = HYBRID,
) -> str:
    """The chat as text, equal to the template of a kind.

    Args:
        messages: the turns in order, see the module's text.
        tools: JSON descriptions of the functions that may be called; they go into the system turn.
        add_generation_prompt: end with the beginning of an assistant turn.
        enable_thinking: False puts an empty thinking block after the generation prompt, so that the model answers at
            once. It changes nothing else. None: the kind's default.
        kind: of the template.

    Raises:
        UserError: a message is malformed (the text names its index), or the kind cannot do this enable_thinking.
    """
    parts = segments(messages, tools, add_generation_prompt, enable_thinking, kind=kind)
    return "".join(part.text for part in parts)


def encode_chat(
    tokenizer: Tokenizer,
    messages: Sequence[Message],
    *,
    tools: Sequence[Mapping[str, Any]] | None = None,
    add_generation_prompt: bool = False,
    enable_thinking: bool | None = None,
    trust_content: bool = False,
) -> list[int]:
    """Ids of the chat, in the format of the template beside the tokenizer; see `recognise.kind_of`.

    Special tokens are read in the format's own markup only: a user, a tool or an answer that writes "<|im_end|>" gets
    the ids of these ten characters and cannot forge a turn. Deviation: transformers' apply_chat_template reads them
    everywhere. The ids are the same unless a message, tool or call contains the name of a special token.

    Args:
        tokenizer: if it has a token for <tool_call> or the like, that is one id; else it is encoded as ordinary text.
        messages: as for `render`, like tools, add_generation_prompt and enable_thinking.
        trust_content: read special tokens everywhere, as transformers does.

    Raises:
        UserError: as `render`, `recognise.kind_of` and `tokenizer.encode`.
    """
    from qwen3f.data.chat.recognise import kind_of  # here, since recognise imports this module

    parts = segments(messages, tools, add_generation_prompt, enable_thinking, kind=kind_of(tokenizer))
    return tokenizer.encode_segments((text, is_markup or trust_content) for text, is_markup in parts)


def thinking_mode(messages: Sequence[Message], default: bool = True) -> bool:
    """Whether the next answer should think, by the soft switches /think and /no_think in the chat.

    As in the Qwen3 technical report, section 4.3: switches may stand in any user turn or in the system turn, the answer
    follows the last one, and without any the model thinks (`default`). Tool responses are no place for switches.
    """
    switch = last_switch(messages)
    return default if switch is None else switch


def last_switch(messages: Sequence[Message]) -> bool | None:
    """What the last soft switch says: True is /think, False /no_think; None if there is none."""
    check_messages(messages)
    mode = None
    for message in messages:
        if message["role"] == "system" or is_query(message):
            for switch in _SWITCH.finditer(message["content"]):
                mode = switch[1] is None
    return mode


def without_switches(content: str) -> str:
    """A user's text without its soft switches, stripped. One blank beside each switch goes with it."""
    return _SWITCH_AND_BLANK.sub("", content).strip()


def segments(
    messages: Sequence[Message],
    tools: Sequence[Mapping[str, Any]] | None = None,
    add_generation_prompt: bool = False,
    enable_thinking: bool | None = None,
    keep_thinking: bool = False,
    kind: TemplateKind = HYBRID,
) -> list[Segment]:
    """The parts of `render`'s text in order: markup of the format, and content of messages, tools and calls.

    With keep_thinking, if the kind has thoughts, every answer has its thinking block, also an empty one, wherever the
    answer stands. TRL's template for training on all turns does the same (`qwen3_training.jinja` of trl 1.16).
    """
    check_messages(messages, tools)
    thinks = check_thinking(kind, enable_thinking)
    if not kind.thinks:
        _check_no_thoughts(messages, kind)
    system = messages[0]["content"] if messages[0]["role"] == "system" else None
    parts = xml_tools.system_turn(system, tools) if kind.xml else _system_turn(system, tools)
    last = len(messages) - 1
    last_query = max((i for i, message in enumerate(messages) if is_query(message)), default=last)
    for i, message in enumerate(messages):
        role = message["role"]
        if role == "user" or (role == "system" and i > 0):
            parts += [_markup(f"<|im_start|>{role}\n"), _content(message["content"]), _markup("<|im_end|>\n")]
        elif role == "assistant" and kind.thinks:
            shown = i > last_query and (i == last or bool(split_thought(message)[0]))
            parts += _assistant_turn(message, *split_thought(message), shown or keep_thinking)
        elif role == "assistant" and kind.xml and message.get("tool_calls"):
            content = xml_tools.answer(message["content"], message["tool_calls"])
            parts += [_markup(ANSWER_START), *content, _markup("<|im_end|>\n")]
        elif role == "assistant":
            parts += _assistant_turn(message, "", message["content"], False)
        elif role == "tool":
            opens = i == 0 or messages[i - 1]["role"] != "tool"
            closes = i == last or messages[i + 1]["role"] != "tool"
            if kind.xml:
                # as published: a result at the very beginning, or right after the system turn, opens no turn
                begun = i > (1 if system is not None else 0)
                parts += xml_tools.response(message["content"], opens and begun, closes)
                continue
            parts.append(_markup(("<|im_start|>user" if opens else "") + "\n<tool_response>\n"))
            parts.append(_content(message["content"]))
            parts.append(_markup("\n</tool_response>" + ("<|im_end|>\n" if closes else "")))
    if add_generation_prompt:
        block = THINK if kind.always else NO_THINKING if kind.asks and not thinks else ""
        parts.append(_markup(ANSWER_START + block))
    return parts


def _system_turn(system: str | None, tools: Sequence[Mapping[str, Any]] | None) -> list[Segment]:
    start, end = _markup("<|im_start|>system\n"), _markup("<|im_end|>\n")
    if not tools:
        return [] if system is None else [start, _content(system), end]
    parts = [start]
    if system is not None:
        parts += [_content(system), _markup("\n\n")]
    parts.append(_markup(_TOOLS_BEFORE))
    for tool in tools:
        parts += [_markup("\n"), _content(_json(tool))]
    return [*parts, _markup(_TOOLS_AFTER)]


def split_thought(message: Message) -> tuple[str, str]:
    """(thought, content) of an assistant's message, as the template takes them.

    The thought is the value under one of THOUGHTS, or else what stands before a "</think>" in the content, with or
    without a "<think>".
    """
    content = message["content"]
    reasoning = next((message[key] for key in THOUGHTS if message.get(key) is not None), None)
    if reasoning is None:
        reasoning = ""
        if "</think>" in content:
            reasoning = content.split("</think>")[0].rstrip("\n").split("<think>")[-1].lstrip("\n")
            content = content.split("</think>")[-1].lstrip("\n")
    return reasoning, content


def _assistant_turn(message: Message, reasoning: str, content: str, shows_thinking: bool) -> list[Segment]:
    parts = [_markup(ANSWER_START)]
    if shows_thinking:
        parts += [_markup(THINK), _content(reasoning.strip("\n")), _markup("\n</think>\n\n")]
        parts.append(_content(content.lstrip("\n")))
    else:
        parts.append(_content(content))
    for n, entry in enumerate(message.get("tool_calls") or []):
        call = entry.get("function") or entry
        arguments = call["arguments"]
        parts += [
            _markup(("\n" if content or n else "") + '<tool_call>\n{"name": "'),
            _content(call["name"]),
            _markup('", "arguments": '),
            _content(arguments if isinstance(arguments, str) else _json(arguments)),
            _markup("}\n</tool_call>"),
        ]
    return [*parts, _markup("<|im_end|>\n")]


def is_query(message: Message) -> bool:
    """Whether the message is a user's turn, and not a tool's response written as one."""
    content = message["content"]
    return message["role"] == "user" and not (
        content.startswith("<tool_response>") and content.endswith("</tool_response>")
    )


def _markup(text: str) -> Segment:
    return Segment(text, True)


def _content(text: str) -> Segment:
    return Segment(text, False)


def _json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)


def check_messages(messages: Sequence[Message], tools: Sequence[Mapping[str, Any]] | None = None) -> None:
    """Raises UserError, with its number, for a message or a tool that cannot be rendered."""
    if isinstance(messages, str | Mapping) or not messages:
        raise UserError('A chat needs a list of at least one message: write [{"role": "user", "content": "…"}].')
    for i, message in enumerate(messages):
        if not isinstance(message, Mapping):
            raise UserError(f"Message {i} is a {type(message).__name__}: write a dict with role and content.")
        if message.get("role") not in ROLES:
            raise UserError(f"Message {i} has the role {message.get('role')!r}: write one of {', '.join(ROLES)}.")
        _check_text(message, "content", f"Message {i}")
        _check_keys(message, _KEYS[message["role"]], f"Message {i}")
        if message["role"] == "assistant":
            thoughts = [key for key in THOUGHTS if message.get(key) is not None]
            for key in thoughts:
                _check_text(message, key, f"Message {i}")
            if len({message[key] for key in thoughts}) > 1:
                raise UserError(f"Message {i} has two thoughts, {' and '.join(thoughts)}: leave one of them out.")
            _check_calls(message.get("tool_calls"), f"Message {i}")
    check_tools(tools or (), "Tool")


def check_tools(tools: Sequence[Mapping[str, Any]], name: str) -> None:
    """Raises UserError, beginning with `name`, for a tool that is no JSON description of a function."""
    for n, tool in enumerate(tools):
        if not isinstance(tool, Mapping):
            raise UserError(f"{name} {n} is a {type(tool).__name__}: write its JSON description as a dict.")
        _check_json(tool, f"{name} {n}")


def _check_calls(calls: Any, where: str) -> None:
    if isinstance(calls, str | Mapping) or not isinstance(calls or [], Sequence):
        raise UserError(f"{where} has tool_calls of type {type(calls).__name__}: write a list of calls.")
    for n, entry in enumerate(calls or []):
        call = (entry.get("function") or entry) if isinstance(entry, Mapping) else entry
        if not isinstance(call, Mapping) or "arguments" not in call:
            raise UserError(f'{where}, tool call {n}: write {{"name": "…", "arguments": {{…}}}}.')
        _check_text(call, "name", f"{where}, tool call {n}")
        _check_keys(call, (*_CALL_KEYS, "id", "type", "index"), f"{where}, tool call {n}")
        _check_keys(entry, (*_CALL_KEYS, "function", "id", "type", "index"), f"{where}, tool call {n}")
        _check_json(call["arguments"], f"{where}, tool call {n}")


def _check_no_thoughts(messages: Sequence[Message], kind: TemplateKind) -> None:
    for i, message in enumerate(messages):
        if message["role"] == "assistant" and any(message.get(key) for key in THOUGHTS):
            raise UserError(
                f"Message {i} has a thought, and the model's chat template, of the kind {kind.name}, has no place for "
                f"one: leave it out, or choose a template that has one, --config.chat_template={HYBRID.name}."
            )


def _check_keys(holder: Mapping[str, Any], known: Sequence[str], where: str) -> None:
    """Raises UserError for a key that says something and would be dropped."""
    for key, value in holder.items():
        if key not in known and not (value is None or value in ("", [], {}, ())):
            hint = " or rename it to reasoning_content" if "though" in str(key) or "reason" in str(key) else ""
            raise UserError(
                f"{where} has the key {key!r}, which the chat template would drop (it has {', '.join(known)}): "
                f"leave it out{hint}."
            )


def _check_text(holder: Mapping[str, Any], key: str, where: str) -> None:
    if not isinstance(holder.get(key), str):
        found = f"{key} of type {type(holder[key]).__name__}" if key in holder else f"no {key}"
        raise UserError(f"{where} has {found}: write a string ('' if there is nothing to say).")


def _check_json(value: Any, where: str) -> None:
    try:
        _json(value)
    except (TypeError, ValueError, RecursionError) as error:
        raise UserError(
            f"{where} cannot be written as JSON ({error}): use dicts, lists, strings and numbers."
        ) from error
    check_depth(value, where)


def check_depth(value: Any, where: str) -> None:
    """Raises UserError, beginning with `where`, for a JSON value that is nested so deeply that json, which recurses,
    could write it in one place and not in another."""
    inner = [value]
    for _ in range(_DEEPEST):
        parts = [part.values() if isinstance(part, Mapping) else part for part in inner if _nests(part)]
        inner = [one for part in parts for one in part]
    if any(map(_nests, inner)):
        raise UserError(f"{where} is nested more than {_DEEPEST} levels deep: make it flatter.")


def _nests(value: Any) -> bool:
    return isinstance(value, Mapping | list | tuple)
