"""A split tokenised once and memory-mapped from then on.

A cache is a directory, named after the fingerprints of its source and its tokenizer:

    tokens.bin       uint16 (vocabulary up to 65,536) or uint32 [N]: each document's tokens, then <|endoftext|>
    doc_offsets.bin  int64 [D + 1]: document d is tokens[doc_offsets[d] : doc_offsets[d + 1]]
    doc_bytes.bin    int64 [D]: length of document d's text in UTF-8 bytes
    meta.json        format version, fingerprints, counts, and size and sha256 of each file

It is written under a temporary name beside its place and published by one rename. So a directory under the final name
is complete, a build that was killed leaves only a `.building-*` directory that nobody opens, and when two processes
build the same cache at once the first to finish is used by both.
"""

import hashlib
import json
import os
import shutil
import tempfile
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from absl import logging
from tqdm import tqdm

from qwen3f.data.documents import Source, Split, stable_hash
from qwen3f.data.tokenizer import Tokenizer
from qwen3f.errors import UserError

FORMAT_VERSION = 1

_TOKENS, _OFFSETS, _BYTES, _META = "tokens.bin", "doc_offsets.bin", "doc_bytes.bin", "meta.json"
_BATCH_CHARS = 4 * 2**20  # text in memory at a time while building, beyond the largest single document


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
        _build(source, split, tokenizer, path, source_print, num_threads, progress)
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
        (_TOKENS, _token_dtype(vocab_size), num_tokens),
        (_OFFSETS, np.dtype(np.int64), num_docs + 1),
        (_BYTES, np.dtype(np.int64), num_docs),
    ):
        file = path / name
        expected, found = length * dtype.itemsize, file.stat().st_size if file.is_file() else None
        if found != expected:
            state = "is missing" if found is None else f"has {found} bytes instead of {expected}"
            raise UserError(f"The token cache's file {file} {state}: delete the directory {path} to build it again.")
        arrays[name] = np.asarray(np.memmap(file, dtype, mode="r"))  # a plain view is faster to slice
    if arrays[_OFFSETS][0] != 0 or arrays[_OFFSETS][-1] != num_tokens:
        raise UserError(f"The token cache's file {path / _OFFSETS} is corrupt: delete the directory {path}.")
    return TokenCache(path, arrays[_TOKENS], arrays[_OFFSETS], arrays[_BYTES], vocab_size, stats)


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
        meta = json.loads((path / _META).read_bytes())
        version = meta["format"]
        complete = {"vocab_size", "stats", "files"} <= meta.keys() and {"documents", "tokens"} <= meta["stats"].keys()
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"The token cache's file {path / _META} is unreadable: delete the directory {path}.") from error
    if version != FORMAT_VERSION or not complete:
        raise UserError(f"{path} is no token cache of format {FORMAT_VERSION}: delete the directory.")
    return meta


def _token_dtype(vocab_size: int) -> np.dtype:
    return np.dtype(np.uint16 if vocab_size <= 2**16 else np.uint32)


def _build(
    source: Source,
    split: Split,
    tokenizer: Tokenizer,
    path: Path,
    source_print: str,
    num_threads: int,
    progress: bool,
) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(dir=path.parent, prefix=".building-"))
    try:
        stats, files = _write_arrays(source, split, tokenizer, temporary, num_threads, progress)
        if source.fingerprint(split) != source_print:
            raise UserError(f"The files of {source.name} changed while they were tokenised: run again.")
        meta = {
            "format": FORMAT_VERSION,
            "source": {"name": source.name, "split": split, "fingerprint": source_print},
            "tokenizer": tokenizer.fingerprint,
            "vocab_size": tokenizer.vocab_size,
            "stats": stats,
            "files": files,
        }
        with _DigestingFile(temporary / _META) as file:
            file.write(json.dumps(meta, indent=2).encode())
        _publish(temporary, path)
        logging.info("tokenised %s of %s: %s", split, source.name, stats)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _publish(temporary: Path, path: Path) -> None:
    temporary.chmod(0o755)  # mkdtemp's 0o700 would lock out other users of a shared cache
    try:
        os.rename(temporary, path)
    except OSError:
        # A directory that is not empty is never replaced: another process published the same cache first.
        if not path.exists():
            raise


def _write_arrays(
    source: Source, split: Split, tokenizer: Tokenizer, directory: Path, num_threads: int, progress: bool
) -> tuple[dict[str, int], dict[str, dict[str, object]]]:
    """Stream the split into the three array files; returns the counts, and size and sha256 by file."""
    counts: Counter[str] = Counter()
    dtype = _token_dtype(tokenizer.vocab_size)
    num_docs = num_tokens = num_bytes = 0
    with (
        _DigestingFile(directory / _TOKENS) as tokens_file,
        _DigestingFile(directory / _OFFSETS) as offsets_file,
        _DigestingFile(directory / _BYTES) as bytes_file,
        tqdm(desc=f"tokenise {split}", unit="B", unit_scale=True, disable=not progress, leave=False) as bar,
    ):
        offsets_file.write(np.zeros(1, np.int64).tobytes())
        for texts in _batches(source, split, counts):
            encoded = tokenizer.encode_batch(texts, num_threads)
            lengths = np.array([len(ids) + 1 for ids in encoded], np.int64)
            sizes = np.array([len(text.encode()) for text in texts], np.int64)
            for ids in encoded:
                ids.append(tokenizer.eos_id)
                tokens_file.write(np.array(ids, dtype).tobytes())
            offsets_file.write((num_tokens + np.cumsum(lengths)).tobytes())
            bytes_file.write(sizes.tobytes())
            num_docs += len(texts)
            num_tokens += int(lengths.sum())
            num_bytes += int(sizes.sum())
            bar.update(int(sizes.sum()))
    if num_docs == 0:
        raise UserError(_describe_empty(source, split, counts))
    stats = {"documents": num_docs, "tokens": num_tokens, "bytes": num_bytes, **counts}
    return stats, {file.path.name: file.record for file in (tokens_file, offsets_file, bytes_file)}


def _batches(source: Source, split: Split, counts: Counter[str]) -> Iterator[list[str]]:
    texts: list[str] = []
    chars = 0
    for document in source.documents(split, counts):
        texts.append(document.text)
        chars += len(document.text)
        if chars >= _BATCH_CHARS:
            yield texts
            texts, chars = [], 0
    if texts:
        yield texts


def _describe_empty(source: Source, split: Split, counts: Counter[str]) -> str:
    left_out = ", ".join(f"{count} {reason}" for reason, count in counts.items() if count)
    return (
        f"Empty corpus: {source.name} has no document in its {split} split"
        f"{f' (left out: {left_out})' if left_out else ''}: give more documents (each .txt file and each row is one) "
        f"or {'raise' if split == 'heldout' else 'lower'} data.holdout."
    )


class _DigestingFile:
    """A file that knows its sha256 and reaches the disk before it is closed."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.record: dict[str, object] = {}
        self._digest = hashlib.sha256()
        self._size = 0

    def __enter__(self) -> "_DigestingFile":
        self._file = self.path.open("wb")
        return self

    def write(self, content: bytes) -> None:
        self._file.write(content)
        self._digest.update(content)
        self._size += len(content)

    def __exit__(self, *exception: object) -> None:
        with self._file:
            self._file.flush()
            os.fsync(self._file.fileno())
        self.record = {"bytes": self._size, "sha256": self._digest.hexdigest()}
