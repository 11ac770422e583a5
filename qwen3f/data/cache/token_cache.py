"""A split tokenised once and memory-mapped from then on.

A cache is a directory, named after the fingerprints of its source and its tokenizer:

    tokens-00000.bin, …  the shards: uint16 (vocabulary up to 65,536) or uint32, each document's tokens: a text's, then
                         <|endoftext|>; a chat's to the <|im_end|> of its last answer. Whole documents, as many as fill
                         `build.SHARD_BYTES` (128 MiB).
    trained-00000.bin, … for chats only, since ids do not tell it: a bit for each token of the shard, the lowest bit of
                         a byte first, says whether the model learns to write the token
    doc_offsets.bin      int64 [D + 1]: document d is tokens doc_offsets[d] … doc_offsets[d + 1] − 1 of all shards
    doc_bytes.bin        int64 [D]: length of document d's text in UTF-8 bytes
    index.json           format version, fingerprints, counts; documents, tokens, size and sha256 of each shard and its
                         trained bits, and size and sha256 of the two other files

It is written shard by shard under a temporary name beside the final one (see `build`) and published by one rename. So a
directory under the final name is complete. A killed build leaves only a `.building-*` directory, which the next build
resumes after its last whole shard. When two processes build the same cache at once, both use that of the first to
finish.

Legend: S shards, D documents.
"""

import hashlib
import json
from bisect import bisect_right
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import accumulate
from pathlib import Path
from typing import Protocol

import numpy as np
import torch

from qwen3f.data.cache.build import BYTES, FORMAT_VERSION, INDEX, OFFSETS, build, shard_name, token_dtype, trained_name
from qwen3f.data.sources.documents import Source, Split, stable_hash
from qwen3f.data.tokenizers.tokenizer import Tokenizer
from qwen3f.errors import UserError

_TOTALS = ("documents", "tokens", "bytes", "trained_tokens")


class TokenStream(Protocol):
    """Documents' tokens, one document after the other: a cache, or some of its documents."""

    doc_offsets: np.ndarray

    def read(self, start: int, stop: int) -> np.ndarray:
        """Tokens start … stop − 1 of the stream."""
        ...

    def read_trained(self, start: int, stop: int) -> np.ndarray:
        """bool [stop − start]: which of these tokens the model learns to write."""
        ...

    @property
    def has_trained(self) -> bool:
        """Whether the documents are chats, in which only some tokens are trained."""
        ...

    @property
    def num_tokens(self) -> int:
        """Tokens in all documents, end-of-text tokens included."""
        ...

    @property
    def num_docs(self) -> int:
        """Documents, at least 1."""
        ...


@dataclass(frozen=True, eq=False)  # by identity: comparing the arrays would read them
class TokenCache:
    """An opened cache; the arrays are read-only views of the files.

    Attributes:
        path: the directory.
        shards: uint16 or uint32 [tokens of the shard]; concatenated they are the stream.
        doc_offsets: int64 [D + 1], rising from 0 to num_tokens.
        doc_bytes: int64 [D], UTF-8 bytes of each document's text.
        vocab_size: of the tokenizer that made it; every token is below it.
        stats: counts of the build: documents, tokens, bytes, for chats trained_tokens, and what the source left out by
            reason (empty_rows, ...).
        trained: the trained bits of each shard, uint8 [ceil(tokens of the shard / 8)]; () for texts.
        starts: [S + 1], where each shard begins in the stream, and the stream's end.
    """

    path: Path
    shards: tuple[np.ndarray, ...]
    doc_offsets: np.ndarray
    doc_bytes: np.ndarray
    vocab_size: int
    stats: dict[str, int]
    trained: tuple[np.ndarray, ...] = ()
    starts: list[int] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "starts", list(accumulate(map(len, self.shards), initial=0)))

    def __reduce__(self) -> tuple[Callable[[Path], "TokenCache"], tuple[Path]]:
        return open_cache, (self.path,)  # another process maps the files itself

    def read(self, start: int, stop: int) -> np.ndarray:
        """Tokens start … stop − 1 of the stream; a view where they lie in one shard."""
        first = bisect_right(self.starts, start, 1, len(self.shards)) - 1
        begin = self.starts[first]
        if stop <= self.starts[first + 1]:
            return self.shards[first][start - begin : stop - begin]
        last = bisect_right(self.starts, stop - 1, 1, len(self.shards)) - 1
        inner = self.shards[first + 1 : last]
        return np.concatenate(
            [self.shards[first][start - begin :], *inner, self.shards[last][: stop - self.starts[last]]]
        )

    def read_trained(self, start: int, stop: int) -> np.ndarray:
        """As in `TokenStream`."""
        if not self.trained:
            return np.ones(stop - start, bool)
        first = bisect_right(self.starts, start, 1, len(self.shards)) - 1
        last = bisect_right(self.starts, stop - 1, 1, len(self.shards)) - 1
        parts = []
        for n in range(first, last + 1):
            begin, end = max(start - self.starts[n], 0), min(stop, self.starts[n + 1]) - self.starts[n]
            bits = np.unpackbits(self.trained[n][begin // 8 : -(-end // 8)], bitorder="little")
            parts.append(bits[begin % 8 : begin % 8 + end - begin].view(bool))
        return np.concatenate(parts)

    @property
    def has_trained(self) -> bool:
        """As in `TokenStream`."""
        return bool(self.trained)

    @property
    def left_out(self) -> dict[str, int]:
        """What the source left out while both splits were read, by reason."""
        return {key: n for key, n in self.stats.items() if n and key not in _TOTALS}

    @property
    def num_tokens(self) -> int:
        """Tokens in all documents, end-of-text tokens included."""
        return self.starts[-1]

    @property
    def num_docs(self) -> int:
        """Documents, at least 1."""
        return len(self.doc_bytes)


def build_or_open(
    source: Source,
    split: Split,
    tokenizer: Tokenizer,
    cache_dir: Path,
    num_threads: int = 1,
    workers: int = 0,
    progress: bool = False,
) -> TokenCache:
    """Open the cache of `split` below `cache_dir`, tokenising the source first if there is none.

    Building needs little memory: one document, about 4 M characters of text and their tokens (three times that for each
    worker), and 16 bytes for each document of a shard.

    Args:
        source: corpus to read.
        split: "train" or "heldout".
        tokenizer: maps text to ids; part of the cache's name.
        cache_dir: parent directory of all caches; created if missing.
        num_threads: threads that tokenise, in each of the workers if there are any.
        workers: processes that tokenise; 0: this one does. Neither number changes a file.
        progress: show a progress bar on stderr while building.

    Raises:
        UserError: the split has no document, the source is broken or changed meanwhile, or the cache found is damaged.
    """
    path = cache_path(source, split, tokenizer, cache_dir)
    if not path.exists():
        build(source, split, tokenizer, path, num_threads, workers, progress)
    return open_cache(path)


def cache_path(source: Source, split: Split, tokenizer: Tokenizer, cache_dir: Path) -> Path:
    """Where the cache of `split` is, or will be."""
    key = stable_hash(json.dumps([FORMAT_VERSION, source.fingerprint(split), tokenizer.fingerprint]).encode())
    return Path(cache_dir) / f"tokens-{split}-{key:016x}"


def open_cache(path: Path) -> TokenCache:
    """Map an existing cache; checks the sizes of its files (`verify` checks their content).

    Raises:
        UserError: index.json is missing, unreadable or contradicts itself, or a file's size is wrong; the message names
            the file.
    """
    index = _read_index(path)
    vocab_size, stats = index["vocab_size"], index["stats"]
    num_docs, num_tokens = stats["documents"], stats["tokens"]
    lengths = [shard["tokens"] for shard in index["shards"]]
    shards = tuple(_map(path / shard_name(n), token_dtype(vocab_size), length) for n, length in enumerate(lengths))
    trained = tuple(
        _map(path / trained_name(n), np.dtype(np.uint8), -(-shard["tokens"] // 8))
        for n, shard in enumerate(index["shards"])
        if "trained" in shard
    )
    doc_offsets = _map(path / OFFSETS, np.dtype(np.int64), num_docs + 1)
    doc_bytes = _map(path / BYTES, np.dtype(np.int64), num_docs)
    if sum(lengths) != num_tokens or len(trained) not in (0, len(shards)):
        raise UserError(f"The token cache's file {path / INDEX} is corrupt: delete the directory {path}.")
    if doc_offsets[0] != 0 or doc_offsets[-1] != num_tokens:
        raise UserError(f"The token cache's file {path / OFFSETS} is corrupt: delete the directory {path}.")
    return TokenCache(path, shards, doc_offsets, doc_bytes, vocab_size, stats, trained)


def verify(cache: TokenCache) -> None:
    """Compare the sha256 of each file with the one recorded when it was written (reads everything).

    Raises:
        UserError: a file's content has changed; the message names it.
    """
    index = _read_index(cache.path)
    shards = {shard_name(n): shard for n, shard in enumerate(index["shards"])}
    bits = {trained_name(n): shard["trained"] for n, shard in enumerate(index["shards"]) if "trained" in shard}
    for name, recorded in {**shards, **bits, **index["arrays"]}.items():
        with (cache.path / name).open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        if digest != recorded["sha256"]:
            raise UserError(f"{cache.path / name} is corrupt (sha256 differs): delete the directory {cache.path}.")


def _map(file: Path, dtype: np.dtype, length: int) -> np.ndarray:
    """A read-only view of a file that must hold exactly `length` numbers."""
    expected, found = length * dtype.itemsize, file.stat().st_size if file.is_file() else None
    if found != expected:
        state = "is missing" if found is None else f"has {found} bytes instead of {expected}"
        raise UserError(f"The token cache's file {file} {state}: delete the directory {file.parent} to build it again.")
    # Not np.memmap, which keeps a descriptor of each file: a process may have 1,024, a large cache has more shards.
    content = torch.from_file(str(file), shared=False, size=expected, dtype=torch.uint8).numpy()
    content.setflags(write=False)
    return content.view(dtype)


def _read_index(path: Path) -> dict:
    try:
        index = json.loads((path / INDEX).read_bytes())
        version = index["format"]
        complete = {"vocab_size", "stats", "shards", "arrays"} <= index.keys()
        complete = complete and {"documents", "tokens"} <= index["stats"].keys()
        complete = complete and all({"tokens", "sha256"} <= shard.keys() for shard in index["shards"])
        complete = complete and {OFFSETS, BYTES} == index["arrays"].keys()
        if complete:
            bits = [shard["trained"] for shard in index["shards"] if "trained" in shard]
            complete = all("sha256" in record for record in (*index["arrays"].values(), *bits))
            counts = [index["vocab_size"], *index["stats"].values(), *(shard["tokens"] for shard in index["shards"])]
            if not all(type(count) is int and 0 <= count < 2**63 for count in counts):
                raise TypeError("a count is no number")
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise UserError(f"The token cache's file {path / INDEX} is unreadable: delete the directory {path}.") from error
    if version != FORMAT_VERSION or not complete:
        raise UserError(f"{path} is no token cache of format {FORMAT_VERSION}: delete the directory.")
    return index
