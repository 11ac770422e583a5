"""From a configuration to examples: source, tokenizer, token caches, packed dataset."""

import hashlib
import json
import os
import zlib
from dataclasses import dataclass
from pathlib import Path

import sentencepiece
from absl import logging
from tqdm import tqdm

from qwen3f.data.documents import Source
from qwen3f.data.packing import PackedDataset
from qwen3f.data.sentencepiece_tokenizer import MAX_TRAINING_CHARS, TRAINER_OPTIONS, train_sentencepiece
from qwen3f.data.sources import open_source
from qwen3f.data.token_cache import TokenCache, build_or_open
from qwen3f.data.tokenizer import Tokenizer, load_tokenizer
from qwen3f.errors import UserError


@dataclass(frozen=True)
class DataConfig:
    """What `config.data` holds.

    Attributes:
        mixture: what `sources.open_source` opens: "embedded", "files@DIR", "fineweb@DIR", …
        root: directory of the mixture, where it does not name one.
        text_key: key (.jsonl) or column (.parquet) of the text.
        holdout: share of the documents held out for validation.
        cache: directory of tokenizers and token caches; "" is $XDG_CACHE_HOME/qwen3f or ~/.cache/qwen3f.
        reset_positions: positions restart at each document.
        cross_documents: attention and targets cross document boundaries.
        tokenizer: path of a SentencePiece .model or of a Qwen tokenizer's directory; "" trains one on the train split.
        vocab_size: size of the tokenizer to train; not read when `tokenizer` is given.
        num_threads: threads that tokenise.
    """

    mixture: str = "embedded"
    root: str = ""
    text_key: str = "text"
    holdout: float = 0.05
    cache: str = ""
    reset_positions: bool = True
    cross_documents: bool = False
    tokenizer: str = ""
    vocab_size: int = 4096
    num_threads: int = 2


@dataclass(frozen=True)
class Corpus:
    """A corpus ready for training.

    Attributes:
        source: the documents, by split.
        tokenizer: text to ids and back.
        train: packed examples of the train split.
        heldout: token cache of the held-out split, for `packing.eval_windows`.
    """

    source: Source
    tokenizer: Tokenizer
    train: PackedDataset
    heldout: TokenCache


def prepare(cfg: DataConfig, seq_len: int, progress: bool = True) -> Corpus:
    """Open the corpus; trains the tokenizer and tokenises both splits unless they are in the cache.

    Several processes may do this at once: each file is published atomically and they agree on its content.

    Args:
        cfg: what to read and where to cache it.
        seq_len: length T of the training examples, in tokens.
        progress: show progress bars on stderr.

    Raises:
        UserError: see `open_source`, `load_tokenizer`, `train_sentencepiece`, `build_or_open` and `PackedDataset`.
    """
    if cfg.num_threads < 1:
        raise UserError(f"data.num_threads is {cfg.num_threads}: give at least 1.")
    source = open_source(cfg.mixture, cfg.root, cfg.text_key, cfg.holdout)
    cache_dir = cache_directory(cfg.cache)
    if cfg.tokenizer:
        tokenizer = load_tokenizer(cfg.tokenizer)
    else:
        tokenizer = _trained_tokenizer(source, cfg.vocab_size, cache_dir, progress)
    # The held-out split first: it is small, and an empty one is reported before the long work.
    heldout = build_or_open(source, "heldout", tokenizer, cache_dir, cfg.num_threads, progress)
    train = build_or_open(source, "train", tokenizer, cache_dir, cfg.num_threads, progress)
    return Corpus(source, tokenizer, PackedDataset(train, seq_len, cfg.reset_positions, cfg.cross_documents), heldout)


def cache_directory(configured: str = "") -> Path:
    """Directory of caches: as configured, else below $XDG_CACHE_HOME, else below ~/.cache.

    Raises:
        UserError: the path is taken by something that is no directory.
    """
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    path = Path(configured).expanduser() if configured else Path(base, "qwen3f")
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"The cache directory {path} cannot be made ({error.strerror}): set data.cache.") from error
    return path


def _trained_tokenizer(source: Source, vocab_size: int, cache_dir: Path, progress: bool) -> Tokenizer:
    """The tokenizer of the train split: held-out text has no part in it."""
    settings = [source.fingerprint("train"), MAX_TRAINING_CHARS, TRAINER_OPTIONS, sentencepiece.__version__]
    key = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:16]
    path = cache_dir / f"tokenizer-{vocab_size}-{key}.model"
    if path.exists():
        return load_tokenizer(path)
    documents = tqdm(source.documents("train"), "read for tokenizer", unit=" docs", disable=not progress, leave=False)
    tokenizer = train_sentencepiece((document.text for document in documents), vocab_size, path)
    logging.info("trained a tokenizer of %d pieces on %s: %s", vocab_size, source.name, path)
    return tokenizer


def gzip_bits_per_byte(source: Source) -> float:
    """Bits per byte of `gzip -9` over the concatenated held-out text: a floor any model should beat.

    Raises:
        UserError: the held-out split is empty.
    """
    compressor = zlib.compressobj(9, zlib.DEFLATED, wbits=31)  # 31: gzip's header and trailer
    read = written = 0
    for document in source.documents("heldout"):
        content = document.text.encode()
        read += len(content)
        written += len(compressor.compress(content))
    if read == 0:
        raise UserError(f"Empty corpus: {source.name} has no document in its heldout split: raise data.holdout.")
    return 8 * (written + len(compressor.flush())) / read
