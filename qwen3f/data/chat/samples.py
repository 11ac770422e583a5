"""Samples of a conversation: what one document of the token cache holds, and whether its prompt switches thinking off.

By default ("last") each answer gives a sample, with the turns before it as its prompt; "all" gives one sample, whose
answers are all trained. See `examples.chat_tokens`.

An answer without a thought must not teach a model to stop thinking unasked. So if the row has no `enable_thinking`, the
prompt of an answer without a thought ends with an empty thinking block, which is not trained,
unless a switch asks for no thought: after "/no_think" the model writes the empty block itself. With "all" turns this
is so if no answer has a thought; else every block is trained, as in TRL. This is for the template of kind hybrid. With
thinking-2507, which knows no switches, an answer without a thought has its empty block untrained too; with kinds that
have no thoughts there is no block, and a thought is a fault.

`switches` is a share of samples. To the last user turn of these, "/think" or "/no_think" is appended, as the answer's
mode requires. A sample qualifies if its row has no `enable_thinking`, its conversation has no switch of its own, and
all answers after that turn have one mode. A quarter of them get the opposite switch just before it, since the last one
wins (Qwen3 technical report, §4.3: thinking data have /think or nothing, the rest /no_think). A hash of a sample's text
decides whether it gets a switch.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Literal

import numpy as np

from qwen3f.data.chat.conversation import Conversation
from qwen3f.data.chat.examples import chat_runs
from qwen3f.data.chat.kinds import HYBRID, TemplateKind
from qwen3f.data.chat.template import Message, is_query, last_switch, segments, split_thought
from qwen3f.data.sources.adapters.rows import RowFault
from qwen3f.data.sources.documents import stable_hash
from qwen3f.data.tokenizers.tokenizer import Tokenizer

Turns = Literal["last", "all"]
TURNS = ("last", "all")

_SWITCHES = {True: "/think", False: "/no_think"}
_BOTH = 0.25  # share of the samples with a switch that have the opposite switch before it


@dataclass(frozen=True)
class Sample:
    """A chat to learn from; a document of a `documents.Source`.

    Attributes:
        messages: the turns; the last one is an answer.
        name: "file:row".
        tools: as for `examples.chat_tokens`, like all_turns and enable_thinking.
        kind: the kind of the chat template.
    """

    messages: tuple[Message, ...]
    name: str
    tools: tuple[Mapping[str, Any], ...] | None = None
    all_turns: bool = False
    enable_thinking: bool = True
    kind: TemplateKind = HYBRID

    @cached_property
    def text(self) -> str:
        """The chat as the model reads it."""
        parts = segments(self.messages, self.tools, keep_thinking=self.all_turns, kind=self.kind)
        return "".join(part.text for part in parts)

    @staticmethod
    def tokenise(
        samples: list["Sample"], tokenizer: Tokenizer, num_threads: int
    ) -> tuple[list[np.ndarray], list[np.ndarray]]:
        """(ids uint32 [n], trained bool [n]) of each as `chat_tokens`, up to its last trained token, "<|im_end|>"."""
        # The last run, the line end after the last answer, is left out.
        runs = [chat_runs(s.messages, s.tools, s.all_turns, s.enable_thinking, s.kind)[:-1] for s in samples]
        encoded = iter(tokenizer.encode_segments_batch([run for of_one in runs for run, _ in of_one], num_threads))
        all_ids, all_trained = [], []
        for of_one in runs:
            pieces = [next(encoded) for _ in of_one]
            all_ids.append(np.concatenate(pieces))
            all_trained.append(np.repeat([is_trained for _, is_trained in of_one], list(map(len, pieces))))
        return all_ids, all_trained


def make_samples(
    conversation: Conversation, turns: Turns = "last", switches: float = 0.0, kind: TemplateKind = HYBRID
) -> list[Sample]:
    """The samples of a conversation, in order.

    Args:
        conversation: checked by `conversation.checked_messages`.
        turns: "last" or "all".
        switches: a share from 0 to 1; above 0 only with "last" and the kind hybrid.
        kind: the kind of the chat template.

    Raises:
        RowFault: a thought although the row or a switch forbids it, or the kind has none.
    """
    messages = conversation.messages
    if turns == "all":
        thinks = any(map(thought_of, messages))
        for number in _answers(messages):
            check_mode(conversation, number, kind)
        enable = thinking_enabled(conversation, messages, thinks, kind)
        return [Sample(messages, conversation.name, conversation.tools, True, enable, kind)]
    return [_last_turn(conversation, number, switches, kind) for number in _answers(messages)]


def _last_turn(conversation: Conversation, number: int, switches: float, kind: TemplateKind) -> Sample:
    """The sample of the answer that is message `number`."""
    messages = conversation.messages[: number + 1]
    check_mode(conversation, number, kind)
    thinks = bool(thought_of(messages[-1]))
    enable = thinking_enabled(conversation, messages, thinks, kind)
    sample = Sample(messages, conversation.name, conversation.tools, False, enable, kind)
    if switches and conversation.enable_thinking is None and last_switch(messages[:-1]) is None:
        return _with_switch(sample, thinks, switches)
    return sample


def _with_switch(sample: Sample, thinks: bool, share: float) -> Sample:
    query = max(i for i, message in enumerate(sample.messages) if message["role"] == "user")
    content = sample.messages[query]["content"]
    if not is_query(sample.messages[query]) or not _chance("switch", sample, share):
        return sample
    if any(bool(thought_of(sample.messages[i])) != thinks for i in _answers(sample.messages) if i > query):
        return sample  # an earlier answer after the switch (a tool call) is of the other mode
    both = _chance("both", sample, _BOTH)
    written = [_SWITCHES[not thinks]] * both + [_SWITCHES[thinks]]
    asked = {**sample.messages[query], "content": " ".join([content, *written])}
    messages = (*sample.messages[:query], asked, *sample.messages[query + 1 :])
    return replace(sample, messages=messages, enable_thinking=True)


def _chance(what: str, sample: Sample, share: float) -> bool:
    """True for this share of the samples; a hash of the sample's text decides."""
    return stable_hash(f"{what} {sample.text}".encode()) < share * 2.0**64


def thinking_enabled(
    conversation: Conversation, messages: tuple[Message, ...], thinks: bool, kind: TemplateKind
) -> bool:
    if conversation.enable_thinking is not None:
        return conversation.enable_thinking
    return thinks or (kind.asks and last_switch(messages[:-1]) is False)


def check_mode(conversation: Conversation, number: int, kind: TemplateKind) -> None:
    """Raises RowFault if message `number` has a thought although its prompt forbids it or the kind has none."""
    message, where = conversation.messages[number], f"{conversation.name}: Message {number} has a thought"
    written = thought_of(message) or "<think>" in message["content"] or "</think>" in message["content"]
    if not kind.thinks and written:
        raise RowFault(
            "misplaced_thoughts",
            f"{where}, and the model's chat template, of the kind {kind.name}, has no place for one: leave the row "
            f"out, or choose a template that has one, --config.chat_template={HYBRID.name}.",
        )
    if not thought_of(message):
        return
    if conversation.enable_thinking is False:
        raise RowFault("misplaced_thoughts", f"{where}, but enable_thinking is false: leave one of them out.")
    if kind.asks and last_switch(conversation.messages[:number]) is False:
        raise RowFault("misplaced_thoughts", f"{where} after /no_think: leave one of them out, or write /think last.")


def _answers(messages: tuple[Message, ...]) -> Iterator[int]:
    return (i for i, message in enumerate(messages) if message["role"] == "assistant")


def thought_of(message: Message) -> str:
    return split_thought(message)[0].strip() if message["role"] == "assistant" else ""
