"""Chats as training examples: token ids, and for each id whether the model learns to write it.

What the model itself writes in an answer is trained: everything after "<|im_start|>assistant\\n" (thinking, answer and
tool calls as `template.render` writes them, in the kind of the tokenizer's template), up to and including "<|im_end|>".
Prompts, tool results, the turns' headers, and the line end after <|im_end|> are never trained; a model stops at
<|im_end|>. An empty thinking block is trained exactly if the prompt does not hold it: without thinking
(`enable_thinking=False`) the prompt ends with it. If the prompt opens every thought (`kinds.THINKING`), its "<think>"
is never trained.

By default only the last turn is trained, after the history as inference renders it (without thoughts); so a
conversation gives one sample for each answer. With `all_turns` one rendering trains all answers, each with its thinking
block; ids and mask equal those of TRL 1.16's Qwen3 training template, except that TRL also trains the line end after
<|im_end|>.

Deviation from transformers' ids of the same text: an answer is encoded alone, as when the model writes it after the
generation prompt, and no token spans prompt and answer. The ids differ only if no special token stands at that border
(a prompt that holds the thinking block, or a tokenizer without <think>) and the answer begins with a line end or other
blanks. See also `template.encode_chat` for names of special tokens in contents.

Legend: N tokens of the chat, T = seq_len.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np

from qwen3f.data.chat.kinds import HYBRID, TemplateKind
from qwen3f.data.chat.recognise import kind_of
from qwen3f.data.chat.template import ANSWER_START, THINK, Message, segments
from qwen3f.data.packing.concat import IGNORED_TARGET, Example
from qwen3f.data.tokenizers.token_text import Segment
from qwen3f.data.tokenizers.tokenizer import Tokenizer
from qwen3f.errors import UserError

_TURN_END = "<|im_end|>"


def chat_tokens(
    tokenizer: Tokenizer,
    messages: Sequence[Message],
    tools: Any = None,
    *,
    all_turns: bool = False,
    enable_thinking: bool = True,
) -> tuple[list[int], list[bool]]:
    """The ids [N] of a chat, and for each whether it is trained.

    Args:
        tokenizer: text to ids.
        messages: the turns, see `template`; the last one is the assistant's.
        tools: descriptions of the functions that may be called.
        all_turns: train every answer instead of the last; a last message of another role is then allowed.
        enable_thinking: False: the prompt ends with an empty thinking block, which is then not trained, and no trained
            answer may have a thought. No effect on kinds that have no thoughts.

    Raises:
        UserError: no answer at the end, or a thought where the prompt has switched thinking off; and as
            `template.segments`, `recognise.kind_of` and the tokenizer's `encode_segments`.
    """
    ids: list[int] = []
    trained: list[bool] = []
    for run, is_trained in chat_runs(messages, tools, all_turns, enable_thinking, kind_of(tokenizer)):
        piece = tokenizer.encode_segments(run)
        ids += piece
        trained += [is_trained] * len(piece)
    return ids, trained


def chat_runs(
    messages: Sequence[Message],
    tools: Any = None,
    all_turns: bool = False,
    enable_thinking: bool = True,
    kind: TemplateKind = HYBRID,
) -> list[tuple[list[Segment], bool]]:
    """The chat as runs of text, alternately not trained and trained, each to be encoded alone; see `chat_tokens`."""
    parts = segments(messages, tools, keep_thinking=all_turns, kind=kind)
    last = messages[-1]["role"]
    if last != "assistant" and not all_turns:
        raise UserError(
            f"Message {len(messages) - 1}, the last one, has the role {last!r}: end with the assistant's answer that "
            "is to be learnt."
        )
    starts = [i for i, part in enumerate(parts) if part.is_markup and part.text == ANSWER_START]
    runs: list[tuple[list[Segment], bool]] = []
    done = 0
    for start in starts if all_turns else starts[-1:]:
        begin = start + 1
        if kind.thinks and not enable_thinking:
            _check_empty_thought(parts[begin : begin + 3])
            begin += 3
        elif kind.always:
            _check_thought(parts[begin])
            begin += 1
        end = next(i for i in range(begin, len(parts)) if parts[i] == Segment(f"{_TURN_END}\n", True))
        answer = [*parts[begin:end], Segment(_TURN_END, True)]
        runs += [(parts[done:begin], False), (answer, True)]
        parts[end] = Segment("\n", True)
        done = end
    return [*runs, (parts[done:], False)]


def chat_example(ids: Sequence[int], trained: Sequence[bool], seq_len: int, pad_id: int) -> Example | None:
    """A chat as one padded example; None if it is longer than T + 1 tokens, since an answer is never cut.

    Returns:
        tokens, targets int64 [T], loss_weights float32 [T], positions int64 [T] and segments int32 [T] as in
        `PackedDataset`; a target is -100 where its token is not trained.
    """
    length = len(ids) - 1
    if length > seq_len:
        return None
    stream = np.array(ids, np.int64)
    weights = np.array(trained[1:], np.float32)
    padding = (0, seq_len - length)
    return {
        "tokens": np.pad(stream[:-1], padding, constant_values=pad_id),
        "targets": np.pad(np.where(weights > 0, stream[1:], IGNORED_TARGET), padding, constant_values=IGNORED_TARGET),
        "loss_weights": np.pad(weights, padding),
        "positions": np.pad(np.arange(length), padding),
        "segments": np.pad(np.ones(length, np.int32), padding),
    }


def _check_thought(part: Segment) -> None:
    if part.text != THINK:
        raise UserError("A prompt that holds a thinking block needs a user's turn before the answer: write one.")


def _check_empty_thought(block: list[Segment]) -> None:
    """Raises UserError unless the parts are an empty thinking block, as the prompt holds it."""
    _check_thought(block[0])
    if block[1].text:
        raise UserError(
            "The answer has a thought, but thinking is switched off (enable_thinking=False): leave out the thought, or "
            "write enable_thinking=True."
        )
