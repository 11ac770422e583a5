"""Qwen's tokenizer: byte-level BPE by tiktoken, with the added tokens of the chat format.

Ids are those of the released tokenizer.json under Hugging Face's tokenizers, token for token. Text is normalised to NFC
first (see `nfc`), so `decode(encode(text)) == nfc(text)`.
"""

import base64
import hashlib
import json
import re
import shutil
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import regex
import tiktoken

from qwen3f.data.tokenizers import bpe_files
from qwen3f.data.tokenizers.bpe_export import write_config, write_vocabulary
from qwen3f.data.tokenizers.bpe_files import Vocabulary
from qwen3f.data.tokenizers.fast_bpe import encode_texts
from qwen3f.data.tokenizers.nfc import nfc
from qwen3f.data.tokenizers.piece_table import PieceTable
from qwen3f.data.tokenizers.token_text import check_encodable, encode_segments, encode_segments_batch, special_pattern
from qwen3f.errors import UserError
from qwen3f.strict_json import read_object

# Files that say nothing about how text is tokenised but belong to a Hugging Face directory.
_COMPANIONS = (bpe_files.TOKENIZER_CONFIG, "special_tokens_map.json", "added_tokens.json", "chat_template.jinja")

# A run of 999,774 blanks overflows the stack of tiktoken's regular expressions: a Rust panic, which is no Exception.
_MAX_BLANKS = 500_000
_GROUP_CHARS = 2**18  # of a thread's work at a time; about what the processor's cache holds with its arrays
_LONG_BLANK = re.compile(rf"(?<!\s)\s{{{_MAX_BLANKS}}}")


class QwenTokenizer:
    """A loaded Qwen tokenizer. Its results never change, and it is safe to share between threads.

    Attributes:
        path: the directory or file it was loaded from.
        fingerprint: sha256 of tokens, added tokens and pattern, in hex: the same for the three forms of file.
        vocab_size: number of ids; every id is in [0, vocab_size). Qwen3's has 151,669.
        eos_id: id of `<|endoftext|>`, which ends every document.
        pad_id: the same id; padding is masked by segments and weights, never by id.
        stop_ids: ids that end a chat answer: `<|im_end|>` and `<|endoftext|>`.
        pads_vocab: True: a model may have more rows of embeddings than there are ids (Qwen3's have 151,936), not fewer.
        chat_template: see `tokenizer.Tokenizer`.
    """

    pads_vocab = True
    chat_template = ""

    def __init__(self, vocabulary: Vocabulary, path: Path, form: tuple[Path, ...]) -> None:
        self.path = Path(path)
        self._vocabulary = vocabulary
        self._form = form
        ranks = {token: i for i, token in enumerate(vocabulary.tokens)}
        # Special tokens are found here, not by tiktoken: text is normalised between them, never across.
        self._encoding = tiktoken.Encoding(
            "qwen", pat_str=bpe_files.PATTERN, mergeable_ranks=ranks, special_tokens={}, explicit_n_vocab=len(ranks)
        )
        self._special_ids = {name: token.id for name, token in vocabulary.added.items()}
        self._tables: list[PieceTable] = []  # those that no thread uses now; what they hold changes no result
        self._pattern = special_pattern(self._special_ids)
        self._hidden = frozenset(token.id for token in vocabulary.added.values() if token.special)
        by_id = sorted(self._special_ids, key=self._special_ids.__getitem__)
        self._bytes = [*vocabulary.tokens, *(name.encode() for name in by_id)]
        self.vocab_size = len(self._bytes)
        self.eos_id = self._special_ids["<|endoftext|>"]
        self.pad_id = self.eos_id
        self.stop_ids = (self._special_ids["<|im_end|>"], self.eos_id)
        self.fingerprint = _fingerprint(vocabulary, by_id)

    @classmethod
    def load(cls, path: str | Path) -> "QwenTokenizer":
        """Read the tokenizer in a directory: tokenizer.json, else vocab.json + merges.txt, else qwen.tiktoken.

        The path of one of these files chooses its form. Takes about a second.

        Raises:
            UserError: no such file, or a damaged or different one; the message names it.
        """
        path = Path(path)
        form = bpe_files.find_form(path)
        if form is None:
            raise UserError(
                f"There is no Qwen tokenizer at {path}: give a directory with tokenizer.json, with vocab.json and "
                "merges.txt, or with qwen.tiktoken."
            )
        return cls(bpe_files.read_vocabulary(form), path, form)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_tables": []}  # another process fills its own

    def special_id(self, name: str) -> int:
        """The id of one of the added tokens; UserError for any other name."""
        if name not in self._special_ids:
            raise UserError(f"{name!r} is no special token: choose one of {', '.join(self._special_ids)}.")
        return self._special_ids[name]

    def encode(self, text: str, allow_special: bool = False) -> list[int]:
        """Token ids of `text`, without an end-of-text token.

        Args:
            text: any string without surrogates.
            allow_special: turn the literal text of an added token into its id, as transformers does by default. Only
                for trusted templates: with a user's text it would let the text forge turns.

        Raises:
            UserError: the text holds a surrogate (U+D800 to U+DFFF), which UTF-8 cannot carry.
        """
        return self.encode_segments([(text, allow_special)])

    def encode_segments(self, segments: Iterable[tuple[str, bool]]) -> list[int]:
        """Ids of (text, is_markup) segments: added tokens are read in markup only. See `token_text.Segment`."""
        return encode_segments(segments, self._pattern, self._special_ids, self._encode_plain)

    def encode_segments_batch(
        self, batch: Iterable[Iterable[tuple[str, bool]]], num_threads: int = 1
    ) -> list[np.ndarray]:
        """`encode_segments` of each as uint32 [n], on `num_threads` threads: the fast way to many chats."""
        encode = partial(self.encode_batch, num_threads=num_threads)
        return encode_segments_batch(batch, self._pattern, self._special_ids, encode)

    def encode_batch(self, texts: list[str], num_threads: int = 1) -> list[np.ndarray]:
        """`encode` of each text (specials stay text) as uint32 [n], on `num_threads` threads: the fast way to many ids.

        Lines of ASCII go through a `PieceTable`, other lines through tiktoken.
        """
        with ThreadPoolExecutor(num_threads) as threads:
            return [ids for group in threads.map(self._encode_group, _groups(texts)) for ids in group]

    def _encode_group(self, texts: list[str]) -> list[np.ndarray]:
        table = self._tables.pop() if self._tables else PieceTable(self._encoding._encode_single_piece)
        try:
            return encode_texts(texts, table, self._encode_composed)
        finally:
            self._tables.append(table)

    def _encode_plain(self, text: str) -> list[int]:
        check_encodable(text)
        return self._encode_composed(nfc(text))

    def _encode_composed(self, text: str) -> list[int]:
        if len(text) >= _MAX_BLANKS and _LONG_BLANK.search(text):
            pieces = regex.findall(bpe_files.PATTERN, text)
            return [i for piece in pieces for i in self._encoding._encode_single_piece(piece)]
        return self._encoding.encode_ordinary(text)

    def decode(self, ids: Iterable[int], skip_special: bool = False) -> str:
        """Text of `ids`. Bytes that are no UTF-8 (a model may emit them) become U+FFFD.

        Args:
            ids: token ids. Those from vocab_size on, the padding of a model's vocabulary, give no text, as in
                transformers.
            skip_special: leave out the control tokens instead of writing their names. Qwen's files count `<think>`,
                `<tool_call>`, `<tool_response>` and the code-completion tokens as text: they stay, as in transformers.

        Raises:
            UserError: a negative id.
        """
        return b"".join(self.token_bytes(i, skip_special) for i in ids).decode("utf-8", errors="replace")

    def token_bytes(self, token: int, skip_special: bool = False) -> bytes:
        """The bytes that one id stands for, as `decode` takes them; not always whole characters."""
        if token < 0:
            raise UserError(f"Token id {token} is negative: ids of {self.path} are 0 to {self.vocab_size - 1}.")
        if token >= self.vocab_size or (skip_special and token in self._hidden):
            return b""
        return self._bytes[token]

    def save(self, directory: Path) -> None:
        """Write the files of a Hugging Face tokenizer into `directory`, from which `load` gives an equal one.

        The files it was loaded from are copied, with the other tokenizer files beside them. qwen.tiktoken, which
        transformers cannot read, is written as vocab.json, merges.txt and tokenizer_config.json instead. If no file
        lists the added tokens, they are added to the copied tokenizer_config.json. The directory that it was loaded
        from does not change.

        Raises:
            UserError: a file it was loaded from is gone.
        """
        directory = Path(directory)
        directory.mkdir(parents=True, exist_ok=True)
        if self._form[0].suffix == ".tiktoken":
            write_vocabulary(self._vocabulary, directory)
            return
        source = self._form[0].parent
        names = [file.name for file in self._form]
        # vocab.json and merges.txt repeat tokenizer.json; some programs read only those.
        others = [name for name in (bpe_files.VOCAB, bpe_files.MERGES, *_COMPANIONS) if name not in names]
        for name in names + [name for name in others if (source / name).is_file()]:
            if not (source / name).is_file():
                raise UserError(f"The tokenizer's file {source / name} is gone: it was there when it was loaded.")
            if not (directory / name).exists() or not (source / name).samefile(directory / name):
                shutil.copyfile(source / name, directory / name)
        if len(self._form) == 2 and not directory.samefile(source):
            config = source / bpe_files.TOKENIZER_CONFIG
            own = read_object(config) if config.is_file() else None
            if own is None or own.get("added_tokens_decoder") is None:
                write_config(self._vocabulary, directory, own)

    def export(self, directory: Path) -> None:
        """`save`: its files are what transformers reads."""
        self.save(directory)


def _groups(texts: list[str]) -> Iterator[list[str]]:
    """The texts in groups of about `_GROUP_CHARS` characters."""
    group: list[str] = []
    chars = 0
    for text in texts:
        group.append(text)
        chars += len(text)
        if chars >= _GROUP_CHARS:
            yield group
            group, chars = [], 0
    if group:
        yield group


def _fingerprint(vocabulary: Vocabulary, names: list[str]) -> str:
    tokens = [base64.b64encode(token).decode() for token in vocabulary.tokens]
    return hashlib.sha256(json.dumps([bpe_files.PATTERN, tokens, names]).encode()).hexdigest()
