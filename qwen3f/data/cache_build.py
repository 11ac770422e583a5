"""Writing a token cache: streamed, published by one rename, gone on with after a kill.

A build works in a directory `.building-<name>-*` beside its place, which it holds by a lock that ends with its process.
After each batch the arrays are flushed to the disk, then `progress.json` says how far they are. The next build of the
same cache takes over such a directory whose lock is free: it cuts the arrays to what was recorded and passes over the
documents that are in them. A build that fails removes its directory.
"""

import fcntl
import hashlib
import json
import os
import shutil
import tempfile
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import islice
from pathlib import Path

import numpy as np
from absl import logging
from tqdm import tqdm

from qwen3f.data.cache_files import BYTES, FORMAT_VERSION, META, OFFSETS, TOKENS, token_dtype
from qwen3f.data.documents import Source, Split
from qwen3f.data.tokenizer import Tokenizer
from qwen3f.errors import UserError
from qwen3f.files import write_atomically

_BATCH_CHARS = 4 * 2**20  # text in memory at a time, beyond the largest single document
_PROGRESS, _LOCK = "progress.json", "lock"


def build(
    source: Source,
    split: Split,
    tokenizer: Tokenizer,
    path: Path,
    source_print: str,
    num_threads: int,
    progress: bool,
) -> None:
    """Write the cache of `split` at `path`, which is not there yet. See `token_cache.build_or_open`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with _working_directory(path) as directory:
        stats, files = _write_arrays(source, split, tokenizer, directory, num_threads, progress)
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
        write_atomically(directory / META, json.dumps(meta, indent=2).encode())
        _publish(directory, path)
        for name in (_PROGRESS, _LOCK):  # not before: without a lock another build could take the directory over
            (path / name).unlink(missing_ok=True)
        logging.info("tokenised %s of %s: %s", split, source.name, stats)


@contextmanager
def _working_directory(path: Path) -> Iterator[Path]:
    """A directory that is this build's alone: one that was left behind, else a new one."""
    prefix = f".building-{path.name}-"
    for directory in sorted(path.parent.glob(f"{prefix}*")):
        if (lock := _lock(directory)) is not None:
            break
    else:
        directory = Path(tempfile.mkdtemp(dir=path.parent, prefix=prefix))
        lock = _lock(directory)
    try:
        yield directory
    except Exception:  # not an interrupt: after one the next build goes on
        shutil.rmtree(directory, ignore_errors=True)
        raise
    finally:
        if lock is not None:
            os.close(lock)
    shutil.rmtree(directory, ignore_errors=True)  # where another process has published first


def _lock(directory: Path) -> int | None:
    """A descriptor that holds the directory, or None if another process does or has just published it."""
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


def _write_arrays(
    source: Source, split: Split, tokenizer: Tokenizer, directory: Path, num_threads: int, progress: bool
) -> tuple[dict[str, int], dict[str, dict[str, object]]]:
    """Stream the split into the three array files; returns the counts, and size and sha256 by file."""
    counts: Counter[str] = Counter()
    dtype = token_dtype(tokenizer.vocab_size)
    end = np.array(tokenizer.eos_id, dtype).tobytes()
    done = _read_progress(directory)
    with (
        _DigestingFile(directory / TOKENS, done["tokens"] * dtype.itemsize) as tokens_file,
        _DigestingFile(directory / OFFSETS, 8 * (done["documents"] + 1) if done["documents"] else 0) as offsets_file,
        _DigestingFile(directory / BYTES, 8 * done["documents"]) as bytes_file,
        tqdm(desc=f"tokenise {split}", unit="B", unit_scale=True, disable=not progress, leave=False) as bar,
    ):
        files = (tokens_file, offsets_file, bytes_file)
        if done["documents"]:
            logging.info("going on with %s after %d documents", directory, done["documents"])
            bar.update(done["bytes"])
        else:
            offsets_file.write(np.zeros(1, np.int64).tobytes())
        for texts in _batches(source, split, counts, done["documents"]):
            encoded = tokenizer.encode_batch(texts, num_threads)
            lengths = np.array([len(ids) + 1 for ids in encoded], np.int64)
            sizes = np.array([len(text.encode()) for text in texts], np.int64)
            for ids in encoded:
                tokens_file.write(ids.astype(dtype).tobytes() + end)
            offsets_file.write((done["tokens"] + np.cumsum(lengths)).tobytes())
            bytes_file.write(sizes.tobytes())
            new = {"documents": len(texts), "tokens": int(lengths.sum()), "bytes": int(sizes.sum())}
            done = {key: done[key] + new[key] for key in done}
            for file in files:
                file.flush()
            write_atomically(directory / _PROGRESS, json.dumps(done).encode())
            bar.update(new["bytes"])
        if not done["documents"]:
            raise UserError(_describe_empty(source, split, counts))
        return {**done, **counts}, {file.path.name: file.record() for file in files}


def _read_progress(directory: Path) -> dict[str, int]:
    """What a build that was killed had recorded, else zeros. It was on the disk before it was recorded."""
    path = directory / _PROGRESS
    return json.loads(path.read_bytes()) if path.exists() else {"documents": 0, "tokens": 0, "bytes": 0}


def _batches(source: Source, split: Split, counts: Counter[str], passed: int) -> Iterator[list[str]]:
    """Texts of the documents after the first `passed`, some millions of characters at a time."""
    texts: list[str] = []
    chars = 0
    for document in islice(source.documents(split, counts), passed, None):
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
    """A file that is written on from a size, and knows its sha256."""

    def __init__(self, path: Path, size: int) -> None:
        self.path = path
        self._size = size

    def __enter__(self) -> "_DigestingFile":
        self.path.touch()
        os.truncate(self.path, self._size)
        with self.path.open("rb") as file:
            self._digest = hashlib.file_digest(file, "sha256")
        self._file = self.path.open("ab")
        return self

    def write(self, content: bytes) -> None:
        self._file.write(content)
        self._digest.update(content)
        self._size += len(content)

    def flush(self) -> None:
        """Returns when all that was written is on the disk."""
        self._file.flush()
        os.fsync(self._file.fileno())

    def record(self) -> dict[str, object]:
        """Size and sha256 of all that was written."""
        return {"bytes": self._size, "sha256": self._digest.hexdigest()}

    def __exit__(self, *exception: object) -> None:
        self._file.close()
