"""The `embedded` source: real text without a network, the Python standard library that runs this program.

It is the source code (`*.py`, with comments and docstrings) of the installed interpreter, about 13 MB, read where it
stands and never copied. The library's own tests are left out: some distributions ship none, and their tables of data
would fill the held-out split with repetitions. Other Python versions give other text, so compare bits per byte within
one version only, or beside gzip on the same text.

Near-duplicates (vendored copies, generated twins) would leak from training into the held-out split. So they are
removed before the split: a file is dropped when at least half of its shingles, runs of five non-blank lines stripped of
indentation, already occur in the files kept. Files are considered from the largest to the smallest, so a file that is a
part of another is found whichever comes first by name.
"""

import functools
import os
import sysconfig
import zlib
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from qwen3f.data.sources.documents import Document, Split, is_heldout, stable_hash
from qwen3f.errors import UserError
from qwen3f.files import decode_text, read_bounded, user_path
from qwen3f.limits import ROW_BYTES

SHINGLE_LINES = 5
DUPLICATE_CONTAINMENT = 0.5

_FORMAT = 3  # part of the fingerprint: raise it when the same files would give other documents
_SKIPPED_DIRECTORIES = {"site-packages", "dist-packages", "__pycache__", "test", "tests", "idle_test"}


@dataclass(frozen=True)
class EmbeddedSource:
    """The standard library under `root` as documents, one a file, in the order of their paths.

    Attributes:
        root: directory whose `*.py` files are read; installed packages and tests below it are not.
        holdout: share of the files held out, chosen by a stable hash of the path relative to `root`.
    """

    root: Path
    holdout: float
    name: str = "embedded"

    def documents(self, split: Split, counts: Counter[str] | None = None) -> Iterator[Document]:
        """Stream the files of `split`. Counts `near_duplicate_files`, `undecodable_files` and `empty_files` of both."""
        kept, dropped = _select(self.root, self._listing())
        if counts is not None:
            counts.update(dict(dropped))
        for relative in kept:
            if is_heldout(relative.encode(), self.holdout) == (split == "heldout"):
                yield Document(decode_text((self.root / relative).read_bytes()), relative)

    def fingerprint(self, split: Split) -> str:
        """Digest of every file's path, size and time, of `holdout`, `split` and this format's version."""
        return f"{stable_hash(repr((_FORMAT, split, self.holdout, self._listing())).encode()):016x}"

    def _listing(self) -> tuple[tuple[str, int, int], ...]:
        return tuple(_list_files(self.root))


def open_embedded(root: str = "", holdout: float = 0.05) -> EmbeddedSource:
    """The source over the running interpreter's standard library, or over the `*.py` files below `root` if given.

    Raises:
        UserError: `root` is no directory, or no `*.py` file lies below it (an interpreter packed into one zip file).
    """
    path = user_path(root or sysconfig.get_paths()["stdlib"], "config.data.root")
    if not path.is_dir():
        raise UserError(
            f"The embedded source found no directory {path}: set --config.data.root to a directory of *.py files."
        )
    source = EmbeddedSource(path, holdout)
    if next(_list_files(path), None) is None:
        raise UserError(
            f"The embedded source found no *.py file below {path}: set --config.data.root to a directory of *.py files."
        )
    return source


def _list_files(root: Path) -> Iterator[tuple[str, int, int]]:
    """(relative path, size, modification time in ns) of each *.py file, sorted by path within each directory."""
    for directory, subdirectories, files in os.walk(root):
        subdirectories[:] = sorted(d for d in subdirectories if d not in _SKIPPED_DIRECTORIES)
        for file in sorted(files):
            path = Path(directory, file)
            if file.endswith(".py") and path.is_file():
                stat = path.stat()
                yield path.relative_to(root).as_posix(), stat.st_size, stat.st_mtime_ns


@functools.lru_cache(maxsize=4)
def _select(root: Path, listing: tuple[tuple[str, int, int], ...]) -> tuple[list[str], tuple[tuple[str, int], ...]]:
    """Paths to keep, sorted, and the number of files dropped by reason. Cached by the listing, sizes and times."""
    kept: list[str] = []
    dropped: Counter[str] = Counter(near_duplicate_files=0, undecodable_files=0, empty_files=0)
    seen: set[int] = set()
    for relative, _, _ in sorted(listing, key=lambda entry: (-entry[1], entry[0])):
        content = read_bounded(root / relative, ROW_BYTES)
        try:
            content.decode()
        except UnicodeDecodeError:  # the library's own test data in other encodings
            dropped["undecodable_files"] += 1
            continue
        hashes = shingles(content)
        if not hashes:
            dropped["empty_files"] += 1
        elif len(seen.intersection(hashes)) >= DUPLICATE_CONTAINMENT * len(hashes):
            dropped["near_duplicate_files"] += 1
        else:
            kept.append(relative)
            seen |= hashes
    return sorted(kept), tuple(dropped.items())


def shingles(content: bytes) -> set[int]:
    """64-bit hashes of all runs of SHINGLE_LINES non-blank, stripped lines; of the whole text if it has fewer lines."""
    lines = [line for line in map(bytes.strip, content.split(b"\n")) if line]
    if not lines:
        return set()
    # A 32-bit hash a line is enough: two shingles collide only if all five lines do.
    line_hashes = np.fromiter(map(zlib.crc32, lines), np.uint64, len(lines))
    width = min(SHINGLE_LINES, len(lines))
    combined = np.zeros(len(lines) - width + 1, np.uint64)
    for offset in range(width):  # a polynomial over the lines modulo 2**64: order matters
        window = line_hashes[offset : offset + len(combined)]
        combined = (combined ^ window) * np.uint64(0x9E3779B97F4A7C15)
        combined ^= combined >> np.uint64(29)
    return set(combined.tolist())
