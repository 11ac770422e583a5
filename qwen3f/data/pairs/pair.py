"""A pair: a better and a worse answer to one prompt, as two samples of a chat.

A row is {"chosen": [message, …], "rejected": [message, …]} with messages as in `chat.template`, both with the same
turns before the last answer, and may have

    tools, enable_thinking   as in `chat.conversation`
    margin                   a positive number within float32: how much better the first answer is; 1 if it is missing

The prompts of both answers have the same token ids: a prompt is encoded apart from its answer. If either answer has a
thought, or a switch says /no_think, both answers begin with a thinking block, which the model writes; otherwise the
prompt ends with an empty one.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from qwen3f.data.chat import xml_tools
from qwen3f.data.chat.conversation import Conversation, checked_messages, read_tools
from qwen3f.data.chat.kinds import HYBRID, TemplateKind
from qwen3f.data.chat.samples import Sample, check_mode, thinking_enabled, thought_of
from qwen3f.data.chat.template import Message, split_thought
from qwen3f.data.sources.adapters.dpo import Preference
from qwen3f.data.sources.adapters.rows import LeftOut, Row, RowFault, list_of_dicts

COLUMNS = ("chosen", "rejected")
OPTIONAL_COLUMNS = ("tools", "enable_thinking", "margin")

_LARGEST = float(np.finfo(np.float32).max)


@dataclass(frozen=True)
class Pair:
    """A better and a worse answer to the same prompt.

    Attributes:
        chosen, rejected: the better and the worse answer, each after the same prompt.
        margin: how much better `chosen` is; positive.
        question: what decides its split, see `Conversation.question`.
    """

    chosen: Sample
    rejected: Sample
    margin: float
    question: bytes

    def __iter__(self) -> Iterator[Sample]:
        return iter((self.chosen, self.rejected))


def read_pair(row: Row, template: TemplateKind = HYBRID) -> Pair:
    """The pair of a row, whose form the module's docstring says. Raises RowFault with file and row, LeftOut."""
    tools, enable_thinking = read_tools(row), row.values.get("enable_thinking")
    if not isinstance(enable_thinking, bool | None):
        raise RowFault("invalid_rows", f"{row.name} has enable_thinking={enable_thinking!r}: write true or false.")
    margin = row.values.get("margin")
    margin = 1.0 if margin is None else margin
    if isinstance(margin, bool) or not isinstance(margin, int | float) or not 0 < margin <= _LARGEST:
        raise RowFault(
            "invalid_rows", f"{row.name} has margin={margin!r}: write a positive number of at most {_LARGEST:.1e}."
        )
    chats = [list_of_dicts(row, column) for column in COLUMNS]
    options = {"tools": tools, "enable_thinking": enable_thinking, "margin": float(margin), "template": template}
    return make_pair(*chats, row.name, **options)


def of_preference(preference: Preference, name: str, template: TemplateKind = HYBRID) -> Pair:
    """The pair of a data set with ratings; the margin is their difference. Raises RowFault, LeftOut."""
    chats = [
        [*preference.prompt, {"role": "assistant", "content": text}]
        for text in (preference.chosen, preference.rejected)
    ]
    return make_pair(*chats, name, margin=preference.ratings[0] - preference.ratings[1], template=template)


def make_pair(
    chosen: Sequence[Message],
    rejected: Sequence[Message],
    name: str,
    *,
    tools: tuple[Mapping[str, Any], ...] | None = None,
    enable_thinking: bool | None = None,
    margin: float = 1.0,
    template: TemplateKind = HYBRID,
) -> Pair:
    """The pair of two chats that differ in their last answer alone.

    name: "file:row". template: of the model's chats. Raises RowFault for what `checked_messages` refuses, for prompts
    that differ, and for a thought although the row or a switch forbids it or the template has none; LeftOut for answers
    that are the same.
    """
    both = []
    for side, messages in zip(COLUMNS, (chosen, rejected)):
        checked = checked_messages(messages, f"{name}, {side}", tools)
        if len(checked) < len(messages):
            raise RowFault("invalid_rows", f"{name}, {side}, has turns after the last answer: remove them.")
        both.append(Conversation(checked, f"{name}, {side}", tools, enable_thinking))
    better, worse = both
    *prompt, chosen_answer = (_written(message, template) for message in better.messages)
    *other_prompt, rejected_answer = (_written(message, template) for message in worse.messages)
    if prompt != other_prompt:
        raise RowFault(
            "different_prompts",
            f"{name}: the turns before the last answer differ between chosen and rejected: write the same ones.",
        )
    if _stripped(*chosen_answer) == _stripped(*rejected_answer):
        raise LeftOut("ties")
    last = len(better.messages) - 1
    for one in both:
        for number, message in enumerate(one.messages):
            if message["role"] == "assistant" and (number == last or not template.thinks):
                check_mode(one, number, template)
    thinks = any(bool(thought_of(one.messages[last])) for one in both)
    enabled = thinking_enabled(better, better.messages, thinks, template)
    samples = (Sample(one.messages, one.name, tools, False, enabled, template) for one in both)
    return Pair(*samples, margin, better.question)


def _written(message: Message, template: TemplateKind) -> tuple[str, ...]:
    """The parts of a message that the template writes: role, thought, content and calls, but not the calls' ids."""
    role, content = message["role"], message["content"]
    if role != "assistant":
        return role, content
    calls = message.get("tool_calls") or []
    if template.xml:
        written = [part.text for part in xml_tools.answer("", calls)]
    else:
        functions = [entry.get("function") or entry for entry in calls]
        written = [
            text for call in functions for text in (call["name"], json.dumps(call["arguments"], ensure_ascii=False))
        ]
    return role, *split_thought(message), *written


def _stripped(role: str, thought: str, content: str, *calls: str) -> tuple[str, ...]:
    """`_written` of an answer, with the blanks around its thought and its content removed."""
    return role, thought.strip(), content.strip(), *calls
