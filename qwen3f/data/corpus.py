"""From a configuration to examples: source, tokenizer, token caches, packed dataset."""

import hashlib
import json
import os
import zlib
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import sentencepiece
from absl import logging
from tqdm import tqdm

from qwen3f.data.documents import Source, Split
from qwen3f.data.mixture import CYCLE, Mixture, make_mixture
from qwen3f.data.mixture_text import parse_weights
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
        mixture: what `sources.open_source` opens ("embedded", "files@DIR", "fineweb@DIR", …), or several of them with
            weights: "embedded=0.7,reasoning=0.3".
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
        sources: name -> documents, by split; one for each part of the mixture.
        tokenizer: text to ids and back.
        train: packed examples of the train splits.
        heldout: name -> token cache of the held-out split, for `packing.eval_windows`.
    """

    sources: dict[str, Source]
    tokenizer: Tokenizer
    train: PackedDataset | Mixture
    heldout: dict[str, TokenCache]

    @property
    def caches(self) -> tuple[TokenCache, ...]:
        """Token caches of the train splits, in the order of `sources`."""
        return tuple(part.cache for part in (self.train.parts if isinstance(self.train, Mixture) else (self.train,)))

    @property
    def shares(self) -> tuple[float, ...]:
        """Shares of the training examples, in the order of `sources`."""
        return tuple(n / CYCLE for n in self.train.slots) if isinstance(self.train, Mixture) else (1.0,)


def prepare(cfg: DataConfig, seq_len: int, progress: bool = True) -> Corpus:
    """Open the corpus; trains the tokenizer and tokenises both splits unless they are in the cache.

    Several processes may do this at once: each file is published atomically and they agree on its content.

    Args:
        cfg: what to read and where to cache it.
        seq_len: length T of the training examples, in tokens.
        progress: show progress bars on stderr.

    Raises:
        UserError: see `parse_weights`, `make_mixture`, `open_source`, `load_tokenizer`, `train_sentencepiece`,
            `build_or_open` and `PackedDataset`.
    """
    if cfg.num_threads < 1:
        raise UserError(f"data.num_threads is {cfg.num_threads}: give at least 1.")
    weights = dict(parse_weights(cfg.mixture))
    if cfg.root and len(weights) > 1:
        raise UserError("data.root is the directory of one source: write NAME@DIR in the mixture instead.")
    sources = {name: open_source(name, cfg.root, cfg.text_key, cfg.holdout) for name in weights}
    cache_dir = cache_directory(cfg.cache)
    if cfg.tokenizer:
        tokenizer = load_tokenizer(cfg.tokenizer)
    else:
        tokenizer = _trained_tokenizer(list(sources.values()), cfg.vocab_size, cache_dir, progress)

    def tokenised(split: Split) -> dict[str, TokenCache]:
        return {
            name: build_or_open(source, split, tokenizer, cache_dir, cfg.num_threads, progress)
            for name, source in sources.items()
        }

    # The held-out splits first: they are small, and an empty one is reported before the long work.
    heldout, caches = tokenised("heldout"), tokenised("train")
    packed = [PackedDataset(cache, seq_len, cfg.reset_positions, cfg.cross_documents) for cache in caches.values()]
    train = packed[0] if len(packed) == 1 else make_mixture(packed, list(weights.values()))
    return Corpus(sources, tokenizer, train, heldout)


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


def _trained_tokenizer(sources: list[Source], vocab_size: int, cache_dir: Path, progress: bool) -> Tokenizer:
    """The tokenizer of the train splits: held-out text has no part in it."""
    prints = [source.fingerprint("train") for source in sources]
    settings = [*prints, MAX_TRAINING_CHARS, TRAINER_OPTIONS, sentencepiece.__version__]
    key = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:16]
    path = cache_dir / f"tokenizer-{vocab_size}-{key}.model"
    if path.exists():
        return load_tokenizer(path)
    streamed = (document for source in sources for document in source.documents("train"))
    documents = tqdm(streamed, "read for tokenizer", unit=" docs", disable=not progress, leave=False)
    tokenizer = train_sentencepiece((document.text for document in documents), vocab_size, path)
    names = ", ".join(source.name for source in sources)
    logging.info("trained a tokenizer of %d pieces on %s: %s", vocab_size, names, path)
    return tokenizer


def gzip_bits_per_byte(sources: Iterable[Source]) -> float:
    """Bits per byte of `gzip -9` over the concatenated held-out text: a floor any model should beat.

    Raises:
        UserError: there is no held-out text.
    """
    compressor = zlib.compressobj(9, zlib.DEFLATED, wbits=31)  # 31: gzip's header and trailer
    read = written = 0
    for source in sources:
        for document in source.documents("heldout"):
            content = document.text.encode()
            read += len(content)
            written += len(compressor.compress(content))
    if read == 0:
        raise UserError("Empty corpus: no document is in a heldout split: raise data.holdout.")
    return 8 * (written + len(compressor.flush())) / read
