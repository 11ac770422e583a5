"""Chats as training examples: the ids of `encode_chat`, with a loss on the answers only.

Counted is, of every assistant turn, what the model itself writes: all after "<|im_start|>assistant\\n", thinking and
tool calls as `chat.render` writes them, up to and with "<|im_end|>". Prompts, the turns' headers and the line end after
<|im_end|> are not.

Deviation: an answer's ids begin with its first character, as they do when the model writes it after the generation
prompt. `encode_chat` lets a token reach over that place, which changes the ids where an answer of an earlier turn
begins with a line end (and, with some tokenizers, more often).

Legend: N tokens of the chat, T = seq_len.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np

from qwen3f.data.chat.template import Message, segments
from qwen3f.data.packing.concat import IGNORED_TARGET, Example
from qwen3f.data.tokenizers.token_text import Segment
from qwen3f.data.tokenizers.tokenizer import Tokenizer

_ANSWER_START = "<|im_start|>assistant\n"
_TURN_END = "<|im_end|>"


def chat_tokens(tokenizer: Tokenizer, messages: Sequence[Message], tools: Any = None) -> tuple[list[int], list[bool]]:
    """The ids [N] of a chat, and for each whether the model is to learn to write it.

    Raises:
        UserError: as `chat.segments` and the tokenizer's `encode_segments`.
    """
    ids: list[int] = []
    counted: list[bool] = []
    for run, is_answer in _runs(segments(messages, tools)):
        piece = tokenizer.encode_segments(run)
        ids += piece
        counted += [is_answer] * len(piece)
    return ids, counted


def chat_example(ids: Sequence[int], counted: Sequence[bool], seq_len: int, pad_id: int) -> Example | None:
    """A chat as one padded example; None if it is longer than T + 1 tokens, since an answer is never cut.

    Returns:
        tokens, targets int64 [T], loss_weights float32 [T], positions int64 [T] and segments int32 [T] as in
        `PackedDataset`; a target is -100 where its token is not counted.
    """
    length = len(ids) - 1
    if length > seq_len:
        return None
    stream = np.array(ids, np.int64)
    weights = np.array(counted[1:], np.float32)
    padding = (0, seq_len - length)
    return {
        "tokens": np.pad(stream[:-1], padding, constant_values=pad_id),
        "targets": np.pad(np.where(weights > 0, stream[1:], IGNORED_TARGET), padding, constant_values=IGNORED_TARGET),
        "loss_weights": np.pad(weights, padding),
        "positions": np.pad(np.arange(length), padding),
        "segments": np.pad(np.ones(length, np.int32), padding),
    }


def _runs(parts: list[Segment]) -> list[tuple[list[Segment], bool]]:
    """The segments cut into runs: answers, and what stands between them. Joined, they are the same text."""
    runs: list[tuple[list[Segment], bool]] = [([], False)]
    for part in parts:
        is_answer = runs[-1][1]
        if part.is_markup and is_answer and part.text.endswith(_TURN_END + "\n"):
            runs[-1][0].append(Segment(part.text[:-1], True))
            runs.append(([Segment("\n", True)], False))
        else:
            runs[-1][0].append(part)
            if part.is_markup and part.text == _ANSWER_START:
                runs.append(([], True))
    return runs
