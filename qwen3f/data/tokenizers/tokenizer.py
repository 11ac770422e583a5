"""Text to ids and back: one interface to both kinds of tokenizer, and what opens either.

* tiktoken: Qwen's byte-level BPE, from the files of a Qwen3 model (`qwen_tokenizer`);
* sentencepiece: a BPE with byte fallback, trained from a corpus (`sentencepiece_tokenizer`).

Nothing is downloaded.
"""

import os
from collections.abc import Iterable
from pathlib import Path
from typing import Literal, Protocol

import numpy as np

from qwen3f.data.tokenizers import bpe_files
from qwen3f.data.tokenizers.qwen_tokenizer import QwenTokenizer
from qwen3f.data.tokenizers.sentencepiece_tokenizer import MODEL_FILE, SentencePieceTokenizer
from qwen3f.errors import UserError
from qwen3f.files import user_path

PATH_VARIABLE = "QWEN3F_TOKENIZER"
"""Environment variable with the path of a tokenizer, for `Tokenizer` without one."""


class Tokenizer(Protocol):
    """What every tokenizer has, and the call that opens one: `Tokenizer(backend="tiktoken", path="Qwen3-8B")`.

    The methods are documented in `QwenTokenizer` and `SentencePieceTokenizer`; `token_text.StreamDecoder` decodes with
    either as ids arrive.

    Args:
        backend: "tiktoken" or "sentencepiece".
        path: as for `load_tokenizer`; without it the environment variable QWEN3F_TOKENIZER says.

    Raises:
        UserError: another backend, no path, or a tokenizer of the other kind there; else as `load_tokenizer`.
    """

    path: Path
    fingerprint: str
    vocab_size: int
    eos_id: int
    pad_id: int
    stop_ids: tuple[int, ...]
    pads_vocab: bool
    chat_template: str  # the kind that the user chose (data.chat.kinds); "": that of the file beside the tokenizer

    # The classes that match the protocol don't inherit from it, so Python never calls its __init__.
    def __new__(cls, backend: Literal["tiktoken", "sentencepiece"], path: str | Path | None = None) -> "Tokenizer":
        return _open(backend, path)

    def special_id(self, name: str) -> int: ...

    def encode(self, text: str, allow_special: bool = False) -> list[int]: ...

    def encode_segments(self, segments: Iterable[tuple[str, bool]]) -> list[int]: ...

    def encode_segments_batch(
        self, batch: Iterable[Iterable[tuple[str, bool]]], num_threads: int = 1
    ) -> list[np.ndarray]: ...

    def encode_batch(self, texts: list[str], num_threads: int = 1) -> list[np.ndarray]: ...

    def decode(self, ids: Iterable[int], skip_special: bool = False) -> str: ...

    def token_bytes(self, token: int, skip_special: bool = False) -> bytes: ...

    def save(self, directory: Path) -> None: ...

    def export(self, directory: Path) -> None: ...


def load_tokenizer(path: str | Path, chat_template: str = "") -> Tokenizer:
    """Open the tokenizer at `path`, of either kind.

    Args:
        path: a sentencepiece .model file; a directory that holds a tokenizer.model, or else Qwen's tokenizer.json,
            vocab.json + merges.txt or qwen.tiktoken; or one of those files. (A tokenizer.json beside a tokenizer.model
            is the same tokenizer's form for transformers.)
        chat_template: the kind of its chats, see `data.chat.kinds`; "" for that of the template beside it.

    Raises:
        UserError: there is none, or it is damaged or unsuited; the message names the file.
    """
    tokenizer = _load(user_path(path, "config.data.tokenizer"))
    tokenizer.chat_template = chat_template
    return tokenizer


def _load(path: Path) -> Tokenizer:
    if path.is_file() and path.suffix == ".model":
        return SentencePieceTokenizer.load(path)
    if (path / MODEL_FILE).is_file():
        return SentencePieceTokenizer.load(path / MODEL_FILE)
    if path.exists() and bpe_files.find_form(path) is not None:
        return QwenTokenizer.load(path)
    raise UserError(
        f"There is no tokenizer at {path}, which is no SentencePiece .model file and no directory with tokenizer.json, "
        "vocab.json and merges.txt, or qwen.tiktoken of Qwen: put one there; a run that trains may also write "
        "--config.data.tokenizer=PATH."
    )


def _open(backend: str, path: str | Path | None) -> Tokenizer:
    kinds = {"tiktoken": QwenTokenizer, "sentencepiece": SentencePieceTokenizer}
    if backend not in kinds:
        raise UserError(f"Tokenizer(backend={backend!r}): write one of {', '.join(kinds)}.")
    place = path or os.environ.get(PATH_VARIABLE)
    if not place:
        raise UserError(
            f"Tokenizer(backend={backend!r}) needs its files: write path=DIR, the directory of a Qwen3 model or a "
            f"SentencePiece .model, or set {PATH_VARIABLE}."
        )
    tokenizer = load_tokenizer(place)
    if not isinstance(tokenizer, kinds[backend]):
        other = next(name for name in kinds if name != backend)
        raise UserError(f"{place} is no tokenizer for {backend}: write Tokenizer(backend={other!r}, path=…).")
    return tokenizer
