"""Write a token cache: shard by shard, published by one rename, resumed after a kill.

A build works in a directory `.building-<name>-*` beside the final one. It holds a lock on it, which ends with the
process. A shard is written while its documents are tokenised, with its trained bits beside it, if there are any. When
the shard is full, both are flushed to the disk with the offsets of its documents, and then `progress.json` lists it.
The next build of the same cache takes over such a directory if its lock is free: it skips the documents of the listed
shards and writes the unfinished shard again. A build that fails removes its directory.
"""

import fcntl
import hashlib
import json
import os
import shutil
import tempfile
from array import array
from collections import Counter
from collections.abc import Iterator
from contextlib import closing, contextmanager, nullcontext
from itertools import chain, islice
from pathlib import Path
from typing import Any

import numpy as np
from absl import logging
from tqdm import tqdm

from qwen3f.data.sources.documents import Source, Split
from qwen3f.data.stream.tokens import Tokens, tokenised_documents
from qwen3f.data.tokenizers.tokenizer import Tokenizer
from qwen3f.errors import UserError
from qwen3f.files import sync, write_atomically

FORMAT_VERSION = 2
OFFSETS, BYTES, INDEX = "doc_offsets.bin", "doc_bytes.bin", "index.json"

SHARD_BYTES = 128 * 2**20
"""A shard of tokens ends with the document that brings it to this size. A kill loses at most one unfinished shard."""

_BATCH_CHARS = 4 * 2**20  # text in memory at a time, beyond the largest single document
_PROGRESS, _LOCK = "progress.json", "lock"


def shard_name(number: int) -> str:
    """File of the shard `number`, from 0."""
    return f"tokens-{number:05}.bin"


def trained_name(number: int) -> str:
    """File of the trained bits of the shard `number`."""
    return f"trained-{number:05}.bin"


def token_dtype(vocab_size: int) -> np.dtype:
    """The type of a cache's tokens: uint16 if every id fits, else uint32."""
    return np.dtype(np.uint16 if vocab_size <= 2**16 else np.uint32)


def build(
    source: Source,
    split: Split,
    tokenizer: Tokenizer,
    path: Path,
    num_threads: int,
    workers: int,
    progress: bool,
) -> None:
    """Write the cache of `split` at `path`, which does not exist yet. See `token_cache.build_or_open`."""
    source_print = source.fingerprint(split)
    path.parent.mkdir(parents=True, exist_ok=True)
    with _working_directory(path) as directory:
        stats, shards, arrays = _write_shards(source, split, tokenizer, directory, num_threads, workers, progress)
        if source.fingerprint(split) != source_print:
            raise UserError(f"The files of {source.name} changed while they were tokenised: run again.")
        index = {
            "format": FORMAT_VERSION,
            "source": {"name": source.name, "split": split, "fingerprint": source_print},
            "tokenizer": tokenizer.fingerprint,
            "vocab_size": tokenizer.vocab_size,
            "stats": stats,
            "shards": shards,
            "arrays": arrays,
        }
        write_atomically(directory / INDEX, json.dumps(index, indent=2).encode())
        sync(directory)
        _publish(directory, path)
        for name in (_PROGRESS, _LOCK):  # only now: without a lock another build could take the directory
            (path / name).unlink(missing_ok=True)
        logging.info("tokenised %s of %s: %s", split, source.name, stats)


@contextmanager
def _working_directory(path: Path) -> Iterator[Path]:
    """A directory that this build alone uses: one that a killed build left, else a new one."""
    prefix = f".building-{path.name}-"
    for directory in sorted(path.parent.glob(f"{prefix}*")):
        if (lock := _lock(directory)) is not None:
            break
    else:
        directory = Path(tempfile.mkdtemp(dir=path.parent, prefix=prefix))
        lock = _lock(directory)
    try:
        yield directory
    except Exception:  # but not an interrupt: after that the next build resumes
        shutil.rmtree(directory, ignore_errors=True)
        raise
    finally:
        if lock is not None:
            os.close(lock)
    shutil.rmtree(directory, ignore_errors=True)  # still there only if another process published first


def _lock(directory: Path) -> int | None:
    """A descriptor that locks the directory; None if another process locks it or has just published it."""
    try:
        handle = os.open(directory / _LOCK, os.O_CREAT | os.O_RDWR)
    except FileNotFoundError:
        return None
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(handle)
        return None
    return handle


def _publish(temporary: Path, path: Path) -> None:
    temporary.chmod(0o755)  # mkdtemp's 0o700 would lock out other users of a shared cache
    try:
        os.rename(temporary, path)
    except OSError:
        # A directory that is not empty is never replaced: another process published the same cache first.
        if not path.exists():
            raise


def _write_shards(
    source: Source,
    split: Split,
    tokenizer: Tokenizer,
    directory: Path,
    num_threads: int,
    workers: int,
    progress: bool,
) -> tuple[dict[str, int], list[dict[str, Any]], dict[str, dict[str, Any]]]:
    """Stream the split into shards. Returns the counts, a record for each shard, and one for each of the other
    files."""
    counts: Counter[str] = Counter()
    shards = _read_progress(directory)
    passed = _total(shards)
    dtype = token_dtype(tokenizer.vocab_size)
    with (
        _DigestingFile(directory / OFFSETS, 8 * (passed["documents"] + 1) if shards else 0) as offsets_file,
        _DigestingFile(directory / BYTES, 8 * passed["documents"]) as bytes_file,
        tqdm(desc=f"tokenise {split}", unit="B", unit_scale=True, disable=not progress, leave=False) as bar,
        closing(_tokenised(source, split, tokenizer, counts, passed["documents"], num_threads, workers)) as documents,
    ):
        if shards:
            logging.info("resuming %s after %d shards, %d documents", directory, len(shards), passed["documents"])
            bar.update(passed["text_bytes"])
        else:
            offsets_file.write(np.zeros(1, np.int64).tobytes())
        tokens = passed["tokens"]
        for first in documents:
            lengths, sizes, record = _write_shard(directory, len(shards), chain([first], documents), dtype, bar)
            offsets_file.write((tokens + np.cumsum(lengths)).tobytes())
            bytes_file.write(sizes.tobytes())
            offsets_file.flush()
            bytes_file.flush()
            tokens += record["tokens"]
            shards.append(record)
            write_atomically(directory / _PROGRESS, json.dumps(shards).encode())
        if not shards:
            raise UserError(_describe_empty(source, split, counts))
        total = _total(shards)
        stats = {"documents": total["documents"], "tokens": total["tokens"], "bytes": total["text_bytes"]}
        if "trained" in shards[0]:
            stats["trained_tokens"] = sum(shard["trained"]["tokens"] for shard in shards)
        stats |= counts
        return stats, shards, {file.path.name: file.record() for file in (offsets_file, bytes_file)}


def _write_shard(
    directory: Path, number: int, documents: Iterator[tuple[Tokens, int]], dtype: np.dtype, bar: tqdm
) -> tuple[np.ndarray, np.ndarray, dict[str, Any]]:
    """Take documents until the shard is full. Returns each document's number of tokens and of UTF-8 bytes, int64 [D]
    each, and the shard's record for the index."""
    lengths, sizes = array("q"), array("q")
    (first, _), documents = _peeked(documents)
    bits_file = nullcontext() if first.trained is None else _BitFile(directory / trained_name(number))
    with _DigestingFile(directory / shard_name(number), 0) as file, bits_file as bits:
        for tokens, text_bytes in documents:
            file.write(tokens.ids.astype(dtype).tobytes())
            if bits is not None:
                bits.write(tokens.trained)
            lengths.append(len(tokens.ids))
            sizes.append(text_bytes)
            bar.update(text_bytes)
            if file.size >= SHARD_BYTES:
                break
        file.flush()
        trained = {} if bits is None else {"trained": bits.flush()}
    record = {"documents": len(lengths), "tokens": sum(lengths), "text_bytes": sum(sizes), **trained, **file.record()}
    return np.array(lengths, np.int64), np.array(sizes, np.int64), record


def _peeked(documents: Iterator[tuple[Tokens, int]]) -> tuple[tuple[Tokens, int], Iterator[tuple[Tokens, int]]]:
    first = next(documents)
    return first, chain([first], documents)


def _read_progress(directory: Path) -> list[dict[str, Any]]:
    """The shards that a killed build had finished; [] for a new build. They were on disk before they were recorded."""
    path = directory / _PROGRESS
    return json.loads(path.read_bytes()) if path.exists() else []


def _total(shards: list[dict[str, Any]]) -> dict[str, int]:
    return {key: sum(shard[key] for shard in shards) for key in ("documents", "tokens", "text_bytes")}


def _tokenised(
    source: Source,
    split: Split,
    tokenizer: Tokenizer,
    counts: Counter[str],
    passed: int,
    num_threads: int,
    workers: int,
) -> Iterator[tuple[Tokens, int]]:
    """Tokens of each document after the first `passed`, and the UTF-8 bytes of its text."""
    documents = islice(source.documents(split, counts), passed, None)
    sized = ((document, len(document.text.encode())) for document in documents)
    return tokenised_documents(sized, tokenizer, workers, num_threads, _BATCH_CHARS)


def _describe_empty(source: Source, split: Split, counts: Counter[str]) -> str:
    left_out = ", ".join(f"{count} {reason}" for reason, count in counts.items() if count)
    return (
        f"Empty corpus: {source.name} has no document in its {split} split"
        f"{f' (left out: {left_out})' if left_out else ''}: give more documents (each .txt file and each row is one) "
        f"or {'raise' if split == 'heldout' else 'lower'} --config.data.holdout."
    )


class _DigestingFile:
    """A file that is cut to `size` bytes and then appended to, and knows its sha256."""

    def __init__(self, path: Path, size: int) -> None:
        self.path = path
        self.size = size

    def __enter__(self) -> "_DigestingFile":
        self.path.touch()
        os.truncate(self.path, self.size)
        with self.path.open("rb") as file:
            self._digest = hashlib.file_digest(file, "sha256")
        self._file = self.path.open("ab")
        return self

    def write(self, content: bytes) -> None:
        self._file.write(content)
        self._digest.update(content)
        self.size += len(content)

    def flush(self) -> None:
        """Returns when all that was written is on the disk."""
        self._file.flush()
        os.fsync(self._file.fileno())

    def record(self) -> dict[str, object]:
        """Size and sha256 of all that was written."""
        return {"bytes": self.size, "sha256": self._digest.hexdigest()}

    def __exit__(self, *exception: object) -> None:
        self._file.close()


class _BitFile:
    """A new file of bits, the lowest of a byte first."""

    def __init__(self, path: Path) -> None:
        self._file = _DigestingFile(path, 0)
        self._rest = np.zeros(0, bool)
        self._ones = 0

    def __enter__(self) -> "_BitFile":
        self._file.__enter__()
        return self

    def write(self, bits: np.ndarray) -> None:
        self._ones += int(bits.sum())
        bits = np.concatenate([self._rest, bits])
        whole = len(bits) // 8 * 8
        self._file.write(np.packbits(bits[:whole], bitorder="little").tobytes())
        self._rest = bits[whole:]

    def flush(self) -> dict[str, object]:
        """Fills the last byte with zeros; returns, when all is on the disk, how many bits are set, size and sha256."""
        self._file.write(np.packbits(self._rest, bitorder="little").tobytes())
        self._rest = self._rest[:0]
        self._file.flush()
        return {"tokens": self._ones, **self._file.record()}

    def __exit__(self, *exception: object) -> None:
        self._file.__exit__(*exception)
