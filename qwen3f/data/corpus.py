"""Build packed examples from a configuration: sources, tokenizer, and token caches or a stream."""

import hashlib
import json
import os
import zlib
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import sentencepiece
from absl import logging
from torch import Tensor
from tqdm import tqdm

from qwen3f.data.cache.token_cache import TokenCache, TokenStream, build_or_open
from qwen3f.data.length_mix import of_class, parse_length_mix
from qwen3f.data.loader import Dataset
from qwen3f.data.mixture import CYCLE, MIXTURE, Mixture, Part, make_mixture, parse_caps, parse_weights, temper
from qwen3f.data.packing.best_fit import LongDocuments
from qwen3f.data.packing.best_fit_dataset import BestFitDataset
from qwen3f.data.packing.concat import PackedDataset
from qwen3f.data.sources.documents import HOLDOUT, LimitedSource, Source, Split, describe_other_files
from qwen3f.data.sources.registry import check_name, open_source
from qwen3f.data.stream.dataset import StreamDataset
from qwen3f.data.stream.parts import stream_part
from qwen3f.data.tokenizers.sentencepiece_tokenizer import MAX_TRAINING_CHARS, TRAINER_OPTIONS, train_sentencepiece
from qwen3f.data.tokenizers.tokenizer import Tokenizer, load_tokenizer
from qwen3f.errors import UserError
from qwen3f.files import user_path

PACKINGS = ("concat", "best_fit")

STREAM_HELDOUT_DOCUMENTS = 200
"""A streamed source holds out only this many documents for validation, the first of its held-out split: a stream is
never read to its end."""

STREAM_TOKENIZER_DOCUMENTS = 10_000
"""A tokenizer is trained on this many documents of a streamed source, the first ones."""


@dataclass(frozen=True)
class DataConfig:
    """What `config.data` holds.

    Attributes:
        mixture: what `registry.open_source` opens ("embedded", "files@DIR", "fineweb@DIR", …), or several of them with
            weights: "embedded=0.7,reasoning=0.3".
        root: directory of the source, if the mixture does not name one.
        text_key: key (.jsonl) or column (.parquet) of the text.
        holdout: share of the documents held out for validation; of `reasoning` it is always `documents.HOLDOUT`.
        max_samples: use at most this many documents of each split of each source, the first ones; 0: all.
        temperature: see `mixture.temper`.
        max_epochs: how often a source is read at most, "" for no limit; see `parse_caps`.
        length_mix: shares of the examples by length of their documents, "" for all alike; see `length_mix`.
        packing: "concat" (concatenate and cut) or "best_fit" (whole documents).
        long_documents: with best_fit, "cut" or "drop" documents longer than the context.
        reset_positions: positions restart at each document.
        cross_documents: attention and targets cross document boundaries.
        streaming: read documents as they are used, instead of a token cache.
        shuffle_buffer: how many documents of a stream are shuffled together; 0: no shuffle.
        cache: directory of tokenizers and token caches; "" is $XDG_CACHE_HOME/qwen3f or ~/.cache/qwen3f.
        tokenizer: path of a SentencePiece .model or of a Qwen tokenizer's directory; "" trains one on the train split.
        vocab_size: size of the tokenizer to train; not read when `tokenizer` is given.
        num_threads: threads that tokenise for a cache.
        workers: processes that tokenise the train split, and build batches (see `loader.Loader`).
    """

    mixture: str = "embedded"
    root: str = ""
    text_key: str = "text"
    holdout: float = HOLDOUT
    max_samples: int = 0
    temperature: float = 0.0
    max_epochs: str = ""
    length_mix: str = ""
    packing: str = "concat"
    long_documents: LongDocuments = "cut"
    reset_positions: bool = True
    cross_documents: bool = False
    streaming: bool = False
    shuffle_buffer: int = 0
    cache: str = ""
    tokenizer: str = ""
    vocab_size: int = 4096
    num_threads: int = 2
    workers: int = 0


@dataclass(frozen=True)
class Corpus:
    """A corpus ready for training.

    Attributes:
        sources: name -> source, for each source of the mixture; of a stream, limited to its first documents.
        tokenizer: text to ids and back.
        train: packed examples of the train splits.
        names: names of the parts of `train`: a source's name, or with a length mix "source, class".
        heldout: name -> token cache of the held-out split, for `concat.eval_windows`.
        left_out: a line for each thing that was left out of `train` by a policy.
    """

    sources: dict[str, Source]
    tokenizer: Tokenizer
    train: Dataset
    names: tuple[str, ...]
    heldout: dict[str, TokenCache]
    left_out: tuple[str, ...] = ()

    @property
    def parts(self) -> tuple[Part, ...]:
        """The indexed datasets of `names`; () for a stream."""
        if isinstance(self.train, StreamDataset):
            return ()
        return self.train.parts if isinstance(self.train, Mixture) else (self.train,)

    @property
    def shares(self) -> tuple[float, ...]:
        """Each part's share of the training examples (for a stream, of the characters)."""
        if isinstance(self.train, StreamDataset):
            return tuple(weight / sum(self.train.weights) for weight in self.train.weights)
        return tuple(n / CYCLE for n in self.train.slots) if isinstance(self.train, Mixture) else (1.0,)

    def check_covers(self, examples: int, seed: int) -> None:
        """Raises UserError if max_epochs leaves fewer than `examples`. A stream is not checked: its length is
        unknown."""
        total = self.train.total(seed) if isinstance(self.train, Mixture) else None
        if total is not None and total < examples:
            raise UserError(
                f"config.data.max_epochs leaves {total} examples and the run needs {examples} up to its last step: "
                "raise it, lower --config.steps, or give more text."
            )

    def train_metrics(self, batch: dict[str, Tensor]) -> dict[str, float]:
        """What to log for a batch: the share of padding, if there can be some; what a stream has left out so far."""
        first = self.train if isinstance(self.train, StreamDataset) else self.parts[0]
        padded = isinstance(first, BestFitDataset) or (isinstance(first, StreamDataset) and first.packing == "best_fit")
        values = {"padding": (batch["segments"] == 0).float().mean().item()} if padded else {}
        if isinstance(self.train, StreamDataset):
            values |= {f"left_out/{reason}": count for reason, count in sorted(self.train.counts.items())}
        return values

    def describe(self) -> list[str]:
        """A line for each part to train on and for each source's held-out split."""
        unit = "characters" if isinstance(self.train, StreamDataset) else "examples"
        shares = [f" ({share:.2%} of the {unit})" if len(self.names) > 1 else "" for share in self.shares]
        lines = [
            f"data: {name}{share}, {part.cache.num_tokens:,} tokens in {part.cache.num_docs:,} documents to train on; "
            f"{len(part):,} examples, {part.padding:.2%} padding"
            for name, share, part in zip(self.names, shares, self.parts)
        ]
        if isinstance(self.train, StreamDataset):
            lines = [f"data: {name}{share}, streamed" for name, share in zip(self.names, shares)]
        lines += [
            f"data: {name}, {part.rows.dropped:,} documents longer than seq_len are dropped "
            "(--config.data.long_documents)"
            for name, part in zip(self.names, self.parts)
            if isinstance(part, BestFitDataset) and part.rows.dropped
        ]
        held_out = [
            f"data: {name}, {cache.num_tokens:,} tokens in {cache.num_docs:,} documents held out"
            for name, cache in self.heldout.items()
        ]
        return [*lines, *self.left_out, *describe_other_files(self.sources), *held_out]


def prepare(cfg: DataConfig, seq_len: int, progress: bool = True) -> Corpus:
    """Open the corpus; trains the tokenizer and tokenises both splits unless they are in the cache.

    Several processes may do this at once: each file is published atomically and they agree on its content.

    Args:
        cfg: what to read and where to cache it.
        seq_len: length T of the training examples, in tokens.
        progress: show progress bars on stderr.

    Raises:
        UserError: settings that exclude each other; and see `parse_weights`, `make_mixture`, `open_source`,
            `load_tokenizer`, `train_sentencepiece`, `build_or_open`, `PackedDataset` and `BestFitDataset`.
    """
    check(cfg)
    weights = dict(parse_weights(cfg.mixture))
    if cfg.root and len(weights) > 1:
        raise UserError("config.data.root is the directory of one source: write NAME@DIR in the mixture instead.")
    caps = parse_caps(cfg.max_epochs, list(weights))
    sources = {
        name: _limited(open_source(name, cfg.root, cfg.text_key, cfg.holdout, cfg.streaming), cfg.max_samples)
        for name in weights
    }
    cache_dir = cache_directory(cfg.cache)
    if cfg.tokenizer:
        tokenizer = load_tokenizer(cfg.tokenizer)
    else:
        most = STREAM_TOKENIZER_DOCUMENTS if cfg.streaming else 0
        sample = [_limited(source, most) for source in sources.values()]
        tokenizer = _trained_tokenizer(sample, cfg.vocab_size, cache_dir, progress)

    def tokenised(split: Split, most: int = 0, workers: int = 0) -> dict[str, TokenCache]:
        return {
            name: build_or_open(_limited(source, most), split, tokenizer, cache_dir, cfg.num_threads, workers, progress)
            for name, source in sources.items()
        }

    # The held-out splits first: they are small, and an empty one is reported before the long work.
    heldout = tokenised("heldout", STREAM_HELDOUT_DOCUMENTS if cfg.streaming else 0)
    if cfg.streaming:
        train = _stream(cfg, sources, list(weights.values()), list(caps.values()), tokenizer, seq_len)
        first = {name: _limited(source, STREAM_HELDOUT_DOCUMENTS) for name, source in sources.items()}
        return Corpus(first, tokenizer, train, tuple(weights), heldout)
    caches = tokenised("train", workers=cfg.workers)
    streams, shares = _by_length(cfg, caches, weights, seq_len)
    packed = [_pack(cfg, stream, tokenizer, seq_len) for _, stream in streams.values()]
    limits = [caps[source] for source, _ in streams.values()]
    if len(packed) == 1 and limits == [None]:
        train = packed[0]
    else:
        flag = "--config.data.length_mix" if cfg.length_mix else MIXTURE
        flag = f"--config.data.temperature={cfg.temperature}" if cfg.temperature else flag
        train = make_mixture(packed, shares, max_epochs=limits, flag=flag)
    return Corpus(sources, tokenizer, train, tuple(streams), heldout, tuple(_left_out(caches, streams)))


def check(cfg: DataConfig) -> None:
    """Raises UserError for values that cannot work, alone or together."""
    for name, _ in parse_weights(cfg.mixture):
        check_name(name)
    if cfg.num_threads < 1:
        raise UserError(f"config.data.num_threads is {cfg.num_threads}: give at least 1.")
    for key in ("max_samples", "shuffle_buffer", "workers"):
        if getattr(cfg, key) < 0:
            raise UserError(f"config.data.{key} is {getattr(cfg, key)}: give 0 or more.")
    if cfg.packing not in PACKINGS:
        raise UserError(f"config.data.packing is {cfg.packing!r}: write one of {', '.join(PACKINGS)}.")
    if cfg.packing == "best_fit" and cfg.cross_documents:
        raise UserError(
            "config.data.packing=best_fit keeps documents apart: write --config.data.cross_documents=False."
        )
    for key in ("temperature", "length_mix") if cfg.streaming else ():
        if value := getattr(cfg, key):
            raise UserError(
                f"config.data.{key}={value!r} needs the token counts of a cache: write --config.data.streaming=False "
                f"or --config.data.{key}={type(value)()!r}."
            )
    if cfg.shuffle_buffer and not cfg.streaming:
        raise UserError(
            "config.data.shuffle_buffer is for streams, a cache is shuffled whole: write "
            "--config.data.shuffle_buffer=0."
        )


def _limited(source: Source, most: int) -> Source:
    return LimitedSource(source, most) if most else source


def _by_length(
    cfg: DataConfig, caches: dict[str, TokenCache], weights: dict[str, float], seq_len: int
) -> tuple[dict[str, tuple[str, TokenStream]], list[float]]:
    """({name: (its source, token stream)} to train on, their weights).

    With a length mix, the sources that have documents of a class divide the share of the class by their weights.
    """
    mix = parse_length_mix(cfg.length_mix)
    if not mix:
        shares = temper(weights, {name: cache.num_tokens for name, cache in caches.items()}, cfg.temperature)
        return {name: (name, cache) for name, cache in caches.items()}, list(shares.values())
    streams: dict[str, tuple[str, TokenStream]] = {}
    out: list[float] = []
    for kind, share in mix.items():
        found = {name: of_class(cache, kind, seq_len) for name, cache in caches.items()}
        there = {name: stream for name, stream in found.items() if stream is not None}
        if not there:
            raise UserError(
                f"config.data.length_mix={cfg.length_mix!r}: no source has a {kind} document at seq_len={seq_len} (see "
                "qwen3f/data/length_mix.py for the bounds): give other data, or write --config.data.length_mix=''."
            )
        shares = temper(weights, {name: stream.num_tokens for name, stream in there.items()}, cfg.temperature)
        for name, stream in there.items():
            streams[f"{name}, {kind}"] = (name, stream)
            out.append(share * shares[name])
    return streams, out


def _left_out(caches: dict[str, TokenCache], streams: dict[str, tuple[str, TokenStream]]) -> Iterator[str]:
    for name, cache in caches.items():
        if cache.left_out:
            listed = ", ".join(f"{n:,} {reason}" for reason, n in cache.left_out.items())
            yield f"data: {name}, left out while reading both splits: {listed}"
        if unused := cache.num_docs - sum(stream.num_docs for source, stream in streams.values() if source == name):
            yield f"data: {name}, {unused:,} documents are of no class of --config.data.length_mix"


def _pack(cfg: DataConfig, stream: TokenStream, tokenizer: Tokenizer, seq_len: int) -> Part:
    if cfg.packing == "best_fit":
        return BestFitDataset(stream, seq_len, cfg.reset_positions, cfg.long_documents, tokenizer.pad_id)
    return PackedDataset(stream, seq_len, cfg.reset_positions, cfg.cross_documents)


def _stream(
    cfg: DataConfig,
    sources: dict[str, Source],
    weights: list[float],
    caps: list[float | None],
    tokenizer: Tokenizer,
    seq_len: int,
) -> StreamDataset:
    if any(cap is not None and cap != int(cap) for cap in caps):
        raise UserError(f"config.data.max_epochs={cfg.max_epochs!r}: a stream is read whole; write whole numbers.")
    return StreamDataset(
        parts=tuple(map(stream_part, sources.values())),
        weights=tuple(weights),
        max_epochs=tuple(None if cap is None else int(cap) for cap in caps),
        tokenizer=tokenizer,
        seq_len=seq_len,
        packing=cfg.packing,
        long_documents=cfg.long_documents,
        reset_positions=cfg.reset_positions,
        cross_documents=cfg.cross_documents,
        buffer=cfg.shuffle_buffer,
    )


def cache_directory(configured: str = "") -> Path:
    """Directory of caches: `configured`, or qwen3f below $XDG_CACHE_HOME or else below ~/.cache. It is created.

    Raises:
        UserError: it cannot be created.
    """
    base = os.environ.get("XDG_CACHE_HOME") or user_path("~/.cache", "config.data.cache")
    path = user_path(configured, "config.data.cache") if configured else Path(base, "qwen3f")
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(
            f"The cache directory {path} cannot be made ({error.strerror}): set --config.data.cache."
        ) from error
    return path


def _trained_tokenizer(sources: list[Source], vocab_size: int, cache_dir: Path, progress: bool) -> Tokenizer:
    """The tokenizer trained on the train splits alone; from the cache if it is there."""
    prints = [source.fingerprint("train") for source in sources]
    settings = [*prints, MAX_TRAINING_CHARS, TRAINER_OPTIONS, sentencepiece.__version__]
    key = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:16]
    path = cache_dir / f"tokenizer-{vocab_size}-{key}.model"
    if path.exists():
        return load_tokenizer(path)
    counts: Counter[str] = Counter()
    streamed = (document for source in sources for document in source.documents("train", counts))
    documents = tqdm(streamed, "read for tokenizer", unit=" docs", disable=not progress, leave=False)
    names = ", ".join(source.name for source in sources)
    try:
        tokenizer = train_sentencepiece((document.text for document in documents), vocab_size, path)
    except UserError as error:
        left_out = ", ".join(f"{count:,} {reason}" for reason, count in counts.items() if count)
        raise UserError(f"{names}: {error}{f' Left out: {left_out}.' if left_out else ''}") from None
    logging.info("trained a tokenizer of %d pieces on %s: %s", vocab_size, names, path)
    return tokenizer


def gzip_bits_per_byte(sources: Iterable[Source], max_docs: int = 0) -> float:
    """Bits per byte of `gzip -9` over the concatenated held-out text: a floor any model should beat.

    max_docs: of each source only the first documents, as in the evaluation; 0: all.

    Raises:
        UserError: there is no held-out text.
    """
    compressor = zlib.compressobj(9, zlib.DEFLATED, wbits=31)  # 31: gzip's header and trailer
    read = written = 0
    for source in sources:
        for document in islice(source.documents("heldout"), max_docs or None):
            content = document.text.encode()
            read += len(content)
            written += len(compressor.compress(content))
    if read == 0:
        raise UserError("Empty corpus: no document is in a heldout split: raise --config.data.holdout.")
    return 8 * (written + len(compressor.flush())) / read
