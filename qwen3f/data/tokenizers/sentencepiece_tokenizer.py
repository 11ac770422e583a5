"""SentencePiece BPE with byte fallback, wrapped so that every string survives encode and decode unchanged.

Qwen3 itself ships a byte-level BPE (see `qwen_tokenizer`); this one is trained from the corpus, so that the demo needs
no download.
SentencePiece alone is lossy in three places; each is repaired here:

* it writes a space as U+2581 ("▁"), so a literal "▁" would come back as a space: it is encoded as its three bytes;
* its decoder strips and merges whitespace in corner cases: ids are decoded here, from a table of each piece's bytes;
* it reads special tokens out of text if they are user-defined: here they are control symbols, which text cannot reach
  (a document that contains "<|im_end|>" gets ordinary pieces) unless `allow_special=True`.
"""

import hashlib
import io
import re
from collections.abc import Iterable, Iterator
from functools import partial
from pathlib import Path

import numpy as np
import sentencepiece

from qwen3f.data.tokenizers.sentencepiece_export import write_tokenizer_json
from qwen3f.data.tokenizers.sentencepiece_proto import read_model
from qwen3f.data.tokenizers.token_text import check_encodable, encode_segments, encode_segments_batch, special_pattern
from qwen3f.errors import UserError
from qwen3f.files import read_bounded, write_atomically

SPECIAL_TOKENS = (
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<think>",
    "</think>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|vision_pad|>",
    "<|image_pad|>",
    "<|video_pad|>",
)

AS_TEXT = ("<think>", "</think>")
"""The SPECIAL_TOKENS that stay in a text without special tokens, as in Qwen's own files: a judge has to see where the
thought ends."""

MODEL_FILE = "tokenizer.model"
"""What Hugging Face directories, and workdirs here, call the file."""

_SPACE = "\u2581"  # SentencePiece's stand-in for a space
# Training text is cut at these. "▁" would be counted as a space (see `encode`). "▅" is how SentencePiece's trainer
# writes a character that is no piece, and it skips every line with one. (The other characters that it reserves, NUL and
# one of tab and U+001F, only get no piece.)
_RESERVED = re.compile("[\u2581\u2585]")
_SPACE_BYTES = tuple(_SPACE.encode())
_SPECIAL_PATTERN = special_pattern(SPECIAL_TOKENS)
# Text that a normalising model changes: leading, doubled and trailing spaces, a tab, CR LF, a ligature, a wide letter.
_PROBE = "  a  b\t\r\n\n ﬁＡ é\u2581 "

INDENT = 4
# A line end with the indentation that follows is one token, alone or after one or two empty lines: code is a quarter
# line ends and indentation, and a model should not spend two steps on each. Longer symbols win.
_LINE_STARTS = ["\n" * ends + _SPACE * width for ends in (1, 2, 3) for width in range(0, 8 * INDENT + 1, INDENT)]

TRAINER_OPTIONS: dict[str, object] = {
    "model_type": "bpe",
    "byte_fallback": True,
    "normalization_rule_name": "identity",
    "add_dummy_prefix": False,
    "remove_extra_whitespaces": False,
    "allow_whitespace_only_pieces": True,
    "split_digits": True,
    # Code mixes letters and punctuation ("self.assertEqual("): merging across scripts saves 8% of the tokens.
    "split_by_unicode_script": False,
    # Characters rarer than the last 0.05% are left to byte fallback instead of taking up a piece each.
    "character_coverage": 0.9995,
    # Without a piece of its own a space would fall back to the bytes of its stand-in (text in Chinese may have none).
    "required_chars": _SPACE,
    "max_sentencepiece_length": 32,  # a run of up to 32 spaces is one piece
    "max_sentence_length": 1 << 16,
    "unk_id": 0,
    "bos_id": -1,
    "eos_id": -1,
    "pad_id": -1,
    "control_symbols": list(SPECIAL_TOKENS),
    "user_defined_symbols": _LINE_STARTS,
    # Fixed, because it is written into the model file, which must not depend on the machine. It only speeds up loading.
    "num_threads": 2,
}
MAX_TRAINING_CHARS = 64 * 2**20
"""Default cap on the text a tokenizer is trained on; 31 M characters of code train in 6 s and 0.6 GB."""

_SAMPLE_CHARS = 4096


class SentencePieceTokenizer:
    """A loaded SentencePiece model. Immutable and safe to share between threads.

    Attributes:
        path: the model file.
        fingerprint: sha256 of the model file, in hex.
        vocab_size: number of ids; every id is in [0, vocab_size).
        eos_id: id of `<|endoftext|>`, which ends every document.
        pad_id: the same id, as in Qwen3's base models; padding is masked by segments and weights, never by id.
        stop_ids: ids that end a chat answer: `<|im_end|>` and `<|endoftext|>`.
        pads_vocab: False: a model has exactly `vocab_size` rows of embeddings.
        chat_template: see `tokenizer.Tokenizer`.
    """

    pads_vocab = False
    chat_template = ""

    def __init__(self, model: bytes, path: Path) -> None:
        self.path = Path(path)
        self._model = model
        self.fingerprint = hashlib.sha256(model).hexdigest()
        try:
            if not model:  # of which sentencepiece makes a tokenizer without pieces
                raise ValueError("an empty file")
            self._processor = sentencepiece.SentencePieceProcessor(model_proto=model)
        except (RuntimeError, ValueError) as error:
            raise UserError(
                f"{path} is not a SentencePiece model: give --config.data.tokenizer a .model file; if it is a file of "
                "the cache, delete it."
            ) from error
        self.vocab_size = self._processor.get_piece_size()
        self._special_ids = self._find_specials()
        self._hidden = frozenset(i for name, i in self._special_ids.items() if name not in AS_TEXT)
        self._byte_ids, self._piece_bytes = self._build_tables()
        self.eos_id = self._special_ids["<|endoftext|>"]
        self.pad_id = self.eos_id
        self.stop_ids = (self._special_ids["<|im_end|>"], self.eos_id)
        if self.decode(self.encode(_PROBE)) != _PROBE:
            raise UserError(
                f"{path} normalises text (spaces, line ends or letters do not survive): "
                "train it with normalization_rule_name=identity, add_dummy_prefix=False and "
                "remove_extra_whitespaces=False."
            )

    @classmethod
    def load(cls, path: str | Path) -> "SentencePieceTokenizer":
        """Read a model file.

        Raises:
            UserError: no such file, not a SentencePiece model, a special token or the byte pieces are missing, or the
                model normalises its input.
        """
        path = Path(path)
        if not path.is_file():
            raise UserError(
                f"There is no tokenizer at {path}: give --config.data.tokenizer the path of a SentencePiece "
                ".model file."
            )
        return cls(read_bounded(path), path)

    def _find_specials(self) -> dict[str, int]:
        ids = {name: self._processor.piece_to_id(name) for name in SPECIAL_TOKENS}
        missing = [name for name, i in ids.items() if not self._processor.is_control(i)]
        if missing:
            raise UserError(
                f"{self.path} lacks the control symbol(s) {', '.join(missing)}: "
                f"train it with control_symbols={','.join(SPECIAL_TOKENS)}."
            )
        return ids

    def _build_tables(self) -> tuple[list[int], list[bytes]]:
        """The id of each byte value [256], and the bytes each id stands for [vocab_size]."""
        byte_ids = [self._processor.piece_to_id(f"<0x{value:02X}>") for value in range(256)]
        if not all(self._processor.is_byte(i) for i in byte_ids):
            raise UserError(f"{self.path} has no byte pieces: train it with byte_fallback=True.")
        try:
            table = [self._processor.id_to_piece(i).replace(_SPACE, " ").encode() for i in range(self.vocab_size)]
        except UnicodeDecodeError as error:
            raise UserError(f"{self.path} has a piece that is not UTF-8 ({error}): copy it again.") from error
        for value, i in enumerate(byte_ids):
            table[i] = bytes([value])
        return byte_ids, table

    def special_id(self, name: str) -> int:
        """The id of one of SPECIAL_TOKENS; UserError for any other name."""
        if name not in self._special_ids:
            raise UserError(f"{name!r} is no special token: choose one of {', '.join(SPECIAL_TOKENS)}.")
        return self._special_ids[name]

    def encode(self, text: str, allow_special: bool = False) -> list[int]:
        """Token ids of `text`, without an end-of-text token.

        Args:
            text: any string without surrogates; `decode(encode(text)) == text`.
            allow_special: turn the literal text of a special token into its id. Only for trusted templates: with a
                user's text it would let the text forge turns.

        Raises:
            UserError: the text holds a surrogate (U+D800 to U+DFFF), which UTF-8 cannot carry.
        """
        return self.encode_segments([(text, allow_special)])

    def encode_segments(self, segments: Iterable[tuple[str, bool]]) -> list[int]:
        """Ids of (text, is_markup) segments: special tokens are read in markup only. See `token_text.Segment`."""
        return encode_segments(segments, _SPECIAL_PATTERN, self._special_ids, self._encode_plain)

    def encode_segments_batch(
        self, batch: Iterable[Iterable[tuple[str, bool]]], num_threads: int = 1
    ) -> list[np.ndarray]:
        """`encode_segments` of each as uint32 [n], on `num_threads` threads: the fast way to many chats."""
        encode = partial(self.encode_batch, num_threads=num_threads)
        return encode_segments_batch(batch, _SPECIAL_PATTERN, self._special_ids, encode)

    def encode_batch(self, texts: list[str], num_threads: int = 1) -> list[np.ndarray]:
        """`encode` of each text (specials stay text) as uint32 [n], on `num_threads` threads."""
        for text in texts:
            check_encodable(text)
        plain = [text for text in texts if _SPACE not in text]
        encoded = iter(self._processor.encode(plain, out_type=int, num_threads=num_threads) if plain else [])
        ids = (self._encode_plain(text) if _SPACE in text else next(encoded) for text in texts)
        return [np.array(each, np.uint32) for each in ids]

    def _encode_plain(self, text: str) -> list[int]:
        check_encodable(text)
        first, *rest = text.split(_SPACE)
        ids = self._processor.encode(first, out_type=int)
        for part in rest:
            ids.extend(self._byte_ids[value] for value in _SPACE_BYTES)
            ids.extend(self._processor.encode(part, out_type=int))
        return ids

    def decode(self, ids: Iterable[int], skip_special: bool = False) -> str:
        """Text of `ids`. Bytes that are no UTF-8 (a model may emit them) become U+FFFD.

        Args:
            ids: token ids.
            skip_special: leave out SPECIAL_TOKENS, but for AS_TEXT, instead of writing their names.

        Raises:
            UserError: an id outside [0, vocab_size).
        """
        return b"".join(self.token_bytes(i, skip_special) for i in ids).decode("utf-8", errors="replace")

    def token_bytes(self, token: int, skip_special: bool = False) -> bytes:
        """The bytes that one id stands for; a special token's name, or nothing with `skip_special`."""
        if not 0 <= token < self.vocab_size:
            raise UserError(
                f"Token id {token} is outside the vocabulary of {self.path}: ids are 0 to {self.vocab_size - 1}."
            )
        return b"" if skip_special and token in self._hidden else self._piece_bytes[token]

    def save(self, directory: Path) -> None:
        """Write the model as `directory`/tokenizer.model, which `load_tokenizer` reads back."""
        write_atomically(Path(directory) / MODEL_FILE, self._model)

    def export(self, directory: Path) -> None:
        """`save`, and tokenizer.json and tokenizer_config.json, from which transformers gets the same ids.

        Raises:
            UserError: a model trained elsewhere that has no such form; see `sentencepiece_export`.
        """
        try:
            model = read_model(self._model)
        except ValueError as error:
            raise UserError(f"{self.path} is damaged ({error}): copy it again.") from error
        write_tokenizer_json(model, self.path, self._special_ids, AS_TEXT, Path(directory))
        self.save(directory)


def train_sentencepiece(
    texts: Iterable[str], vocab_size: int, out_path: Path, max_chars: int = MAX_TRAINING_CHARS
) -> SentencePieceTokenizer:
    """Train a BPE model on `texts` and write it to `out_path` atomically.

    The result depends on the texts, their order, `vocab_size`, `max_chars` and the installed sentencepiece alone: two
    runs write the same bytes. Lines are trained on one by one, without the indentation that their line end takes along,
    so no other piece crosses a line end. U+2581 and U+2585, which SentencePiece reserves, are always their bytes.

    Args:
        texts: documents; consumed once, streaming.
        vocab_size: number of ids, special tokens and 256 byte pieces included.
        out_path: the .model file; its directory is created.
        max_chars: at most this many characters are trained on, a deterministic sample spread over all texts. It bounds
            memory (about 16 bytes a character) and time.

    Raises:
        UserError: no text, or a vocabulary too large or too small for the text (the message gives the bound).
    """
    sample = _sample_chunks(texts, max_chars)
    if not any(chunk.strip() for chunk in sample):
        raise UserError("The tokenizer has no text to train on: the corpus is empty or only whitespace.")
    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=_lines(sample),
            model_writer=model,
            vocab_size=vocab_size,
            minloglevel=2,
            **TRAINER_OPTIONS,
        )
    except RuntimeError as error:
        raise _explain(error, vocab_size) from error
    write_atomically(Path(out_path), model.getvalue())
    return SentencePieceTokenizer.load(out_path)


def _sample_chunks(texts: Iterable[str], max_chars: int) -> list[str]:
    """Chunks of `texts` totalling at most `max_chars` characters, each kept with the same probability.

    Chunk n is kept while mix(n) stays below a threshold that halves whenever the kept text outgrows the cap: one pass,
    bounded memory, no random state.
    """
    kept: list[tuple[int, str]] = []
    threshold, total, number = 1 << 32, 0, 0
    for text in texts:
        for start in range(0, len(text), _SAMPLE_CHARS):
            priority = _mix(number)
            number += 1
            if priority >= threshold:
                continue
            chunk = text[start : start + _SAMPLE_CHARS]
            kept.append((priority, chunk))
            total += len(chunk)
            while total > max_chars and threshold > 1:
                threshold //= 2
                kept = [(p, c) for p, c in kept if p < threshold]
                total = sum(len(c) for _, c in kept)
    return [chunk for _, chunk in kept]


def _mix(number: int) -> int:
    """A 32-bit integer hash (Murmur3's finaliser): neighbouring numbers give unrelated values."""
    number = (number + 0x9E3779B9) & 0xFFFFFFFF
    number = ((number ^ (number >> 16)) * 0x85EBCA6B) & 0xFFFFFFFF
    number = ((number ^ (number >> 13)) * 0xC2B2AE35) & 0xFFFFFFFF
    return number ^ (number >> 16)


def _lines(chunks: list[str]) -> Iterator[str]:
    yield " "  # sentencepiece 0.2.0 aborts the process if a required character does not occur
    for chunk in chunks:
        for line in chunk.split("\n"):
            text = line.lstrip(" ")
            indentation = min((len(line) - len(text)) // INDENT, 8) * INDENT
            yield from filter(None, _RESERVED.split(line[indentation:]))


def _explain(error: RuntimeError, vocab_size: int) -> UserError:
    text = str(error)
    if found := re.search(r"too high.*?<= (\d+)", text):
        return UserError(
            f"A vocabulary of {vocab_size} is too large for this corpus: set model.vocab_size to {found[1]} or less, "
            "or give more text."
        )
    if found := re.search(r"smaller than required_chars\. \d+ vs (\d+)", text):
        return UserError(
            f"A vocabulary of {vocab_size} is too small for this corpus: set model.vocab_size to {found[1]} or more "
            "(specials, 256 bytes and the common characters need an id each)."
        )
    return UserError(f"SentencePiece could not train a vocabulary of {vocab_size}: {text}")
