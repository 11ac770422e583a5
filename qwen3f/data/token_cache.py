"""A split tokenised once and memory-mapped from then on.

A cache is a directory, named after the fingerprints of its source and its tokenizer:

    tokens.bin       uint16 (vocabulary up to 65,536) or uint32 [N]: each document's tokens, then <|endoftext|>
    doc_offsets.bin  int64 [D + 1]: document d is tokens[doc_offsets[d] : doc_offsets[d + 1]]
    doc_bytes.bin    int64 [D]: length of document d's text in UTF-8 bytes
    meta.json        format version, fingerprints, counts, and size and sha256 of each file

It is written under a temporary name beside its place (see `cache_build`) and published by one rename. So a directory
under the final name is complete, a build that was killed leaves only a `.building-*` directory, with which the next
build goes on, and when two processes build the same cache at once the first to finish is used by both.
"""

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np

from qwen3f.data.cache_build import build
from qwen3f.data.cache_files import BYTES, FORMAT_VERSION, META, OFFSETS, TOKENS, token_dtype
from qwen3f.data.documents import Source, Split, stable_hash
from qwen3f.data.tokenizer import Tokenizer
from qwen3f.errors import UserError


class TokenStream(Protocol):
    """Documents' tokens, one document after the other: a cache, or some of its documents."""

    doc_offsets: np.ndarray

    def read(self, start: int, stop: int) -> np.ndarray:
        """Tokens start … stop − 1 of the stream."""
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
        tokens: uint16 or uint32 [num_tokens].
        doc_offsets: int64 [num_docs + 1], rising from 0 to num_tokens.
        doc_bytes: int64 [num_docs], UTF-8 bytes of each document's text.
        vocab_size: of the tokenizer that made it; every token is below.
        stats: counts of the build: documents, tokens, bytes, and what the source left out by reason (empty_rows, ...).
    """

    path: Path
    tokens: np.ndarray
    doc_offsets: np.ndarray
    doc_bytes: np.ndarray
    vocab_size: int
    stats: dict[str, int]

    def __reduce__(self) -> tuple[Callable[[Path], "TokenCache"], tuple[Path]]:
        return open_cache, (self.path,)  # another process maps the files itself

    def read(self, start: int, stop: int) -> np.ndarray:
        """Tokens start … stop − 1 of the stream."""
        return self.tokens[start:stop]

    @property
    def num_tokens(self) -> int:
        """Tokens in all documents, end-of-text tokens included."""
        return len(self.tokens)

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
    progress: bool = False,
) -> TokenCache:
    """Open the cache of `split` below `cache_dir`, tokenising the source first if there is none.

    Building streams: beside one document it holds about 4 M characters of text and their tokens.

    Args:
        source: corpus to read.
        split: "train" or "heldout".
        tokenizer: maps text to ids; part of the cache's name.
        cache_dir: parent directory of all caches; created if missing.
        num_threads: threads that tokenise.
        progress: show a progress bar on stderr while building.

    Raises:
        UserError: the split has no document, the source is broken or changed meanwhile, or the cache found is damaged.
    """
    source_print = source.fingerprint(split)
    key = stable_hash(json.dumps([FORMAT_VERSION, source_print, tokenizer.fingerprint]).encode())
    path = Path(cache_dir) / f"tokens-{split}-{key:016x}"
    if not path.exists():
        build(source, split, tokenizer, path, source_print, num_threads, progress)
    return open_cache(path)


def open_cache(path: Path) -> TokenCache:
    """Map an existing cache; checks the sizes of its files (`verify` checks their content).

    Raises:
        UserError: meta.json is missing or unreadable, or a file's size is wrong; the message names the file.
    """
    meta = _read_meta(path)
    vocab_size, stats = meta["vocab_size"], meta["stats"]
    num_docs, num_tokens = stats["documents"], stats["tokens"]
    arrays = {}
    for name, dtype, length in (
        (TOKENS, token_dtype(vocab_size), num_tokens),
        (OFFSETS, np.dtype(np.int64), num_docs + 1),
        (BYTES, np.dtype(np.int64), num_docs),
    ):
        file = path / name
        expected, found = length * dtype.itemsize, file.stat().st_size if file.is_file() else None
        if found != expected:
            state = "is missing" if found is None else f"has {found} bytes instead of {expected}"
            raise UserError(f"The token cache's file {file} {state}: delete the directory {path} to build it again.")
        arrays[name] = np.asarray(np.memmap(file, dtype, mode="r"))  # a plain view is faster to slice
    if arrays[OFFSETS][0] != 0 or arrays[OFFSETS][-1] != num_tokens:
        raise UserError(f"The token cache's file {path / OFFSETS} is corrupt: delete the directory {path}.")
    return TokenCache(path, arrays[TOKENS], arrays[OFFSETS], arrays[BYTES], vocab_size, stats)


def verify(cache: TokenCache) -> None:
    """Compare the sha256 of each file with the one recorded when it was written (reads everything).

    Raises:
        UserError: a file's content has changed; the message names it.
    """
    for name, recorded in _read_meta(cache.path)["files"].items():
        with (cache.path / name).open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        if digest != recorded["sha256"]:
            raise UserError(f"{cache.path / name} is corrupt (sha256 differs): delete the directory {cache.path}.")


def _read_meta(path: Path) -> dict:
    try:
        meta = json.loads((path / META).read_bytes())
        version = meta["format"]
        complete = {"vocab_size", "stats", "files"} <= meta.keys() and {"documents", "tokens"} <= meta["stats"].keys()
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"The token cache's file {path / META} is unreadable: delete the directory {path}.") from error
    if version != FORMAT_VERSION or not complete:
        raise UserError(f"{path} is no token cache of format {FORMAT_VERSION}: delete the directory.")
    return meta
