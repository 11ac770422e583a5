"""A pair: two answers to one prompt, of which the first is better, as two samples of a chat.

A row is {"chosen": [message, …], "rejected": [message, …]} with messages as in `chat.template`, both with the same
turns before the last answer, and may have

    tools, enable_thinking   as in `chat.conversation`
    margin                   a positive number: how much better the first is; 1 where there is none

Both answers have the same prompt, to the id: it is encoded apart from them. Where either has a thought, or a switch
asks for none, the model writes the thinking block of both itself; else the prompt ends with an empty one.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from qwen3f.data.chat.conversation import Conversation, checked_messages, read_tools
from qwen3f.data.chat.kinds import HYBRID, TemplateKind
from qwen3f.data.chat.samples import Sample, check_mode, thinking_enabled, thought_of
from qwen3f.data.chat.template import Message, split_thought
from qwen3f.data.sources.adapters.dpo import Preference
from qwen3f.data.sources.adapters.rows import LeftOut, Row, RowFault, list_of_dicts

COLUMNS = ("chosen", "rejected")
OPTIONAL_COLUMNS = ("tools", "enable_thinking", "margin")


@dataclass(frozen=True)
class Pair:
    """
    Attributes:
        chosen, rejected: the better and the worse answer, each behind the same prompt.
        margin: how much better the one is; positive.
        question: what decides its split, see `Conversation.question`.
    """

    chosen: Sample
    rejected: Sample
    margin: float
    question: bytes

    def __iter__(self) -> Iterator[Sample]:
        return iter((self.chosen, self.rejected))


def read_pair(row: Row, template: TemplateKind = HYBRID) -> Pair:
    """The pair of a row in the module's form. Raises RowFault with file and row, LeftOut."""
    tools, enable_thinking = read_tools(row), row.values.get("enable_thinking")
    if not isinstance(enable_thinking, bool | None):
        raise RowFault("invalid_rows", f"{row.name} has enable_thinking={enable_thinking!r}: write true or false.")
    margin = row.values.get("margin")
    margin = 1.0 if margin is None else margin
    if isinstance(margin, bool) or not isinstance(margin, int | float) or not 0 < margin < math.inf:
        raise RowFault("invalid_rows", f"{row.name} has margin={margin!r}: write a positive number.")
    chats = [list_of_dicts(row, column) for column in COLUMNS]
    options = {"tools": tools, "enable_thinking": enable_thinking, "margin": float(margin), "template": template}
    return make_pair(*chats, row.name, **options)


def of_preference(preference: Preference, name: str, template: TemplateKind = HYBRID) -> Pair:
    """The pair of a data set with ratings, whose difference is the margin. Raises RowFault, LeftOut."""
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

    name: "file:row". template: of the model's chats. Raises RowFault for what `checked_messages` refuses, prompts that
    differ, and a thought where the row or a switch asks for none or the template has none; LeftOut for answers that are
    the same.
    """
    both = []
    for side, messages in zip(COLUMNS, (chosen, rejected)):
        checked = checked_messages(messages, f"{name}, {side}", tools)
        if len(checked) < len(messages):
            raise RowFault("invalid_rows", f"{name}, {side}, goes on behind the last answer: end with that.")
        both.append(Conversation(checked, f"{name}, {side}", tools, enable_thinking))
    better, worse = both
    if better.messages[:-1] != worse.messages[:-1]:
        raise RowFault(
            "different_prompts",
            f"{name}: the turns before the last answer differ between chosen and rejected: write the same ones.",
        )
    if _written(better.messages[-1]) == _written(worse.messages[-1]):
        raise LeftOut("ties")
    last = len(better.messages) - 1
    for one in both:
        check_mode(one, last, template)
    thinks = any(bool(thought_of(one.messages[last])) for one in both)
    enabled = thinking_enabled(better, better.messages, thinks, template)
    samples = (Sample(one.messages, one.name, tools, False, enabled, template) for one in both)
    return Pair(*samples, margin, better.question)


def _written(answer: Message) -> tuple[Any, ...]:
    """What of an answer the model writes."""
    return (*map(str.strip, split_thought(answer)), answer.get("tool_calls") or [])
