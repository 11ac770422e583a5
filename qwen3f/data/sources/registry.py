"""Open what `data.mixture` names: embedded text, generated problems, or a directory of text, JSON lines and parquet."""

import difflib
import json
import os
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pyarrow
import pyarrow.parquet

from qwen3f.data.sources.adapters.pretrain import is_text_dataset, open_dataset
from qwen3f.data.sources.adapters.registry import names
from qwen3f.data.sources.documents import HOLDOUT, Document, Source, Split, is_heldout, stable_hash
from qwen3f.data.sources.embedded import open_embedded
from qwen3f.data.sources.reasoning import ReasoningSource
from qwen3f.errors import UserError

__all__ = ["Document", "FilesSource", "Source", "Split", "open_source"]

TEXT_FILE_PART_BYTES = 2**20
"""A .txt file is one document; a larger one is cut at line ends into documents of about this size (bounded memory)."""

_FORMAT = 1  # part of the fingerprint: raise it when the same files would give other documents
_PARQUET_ROWS = 256

# One row: its text (None if null) and its name. The readers below stream them.
_Rows = Iterator[tuple[str | None, str]]


@dataclass(frozen=True)
class FilesSource:
    """All .txt, .jsonl and .parquet files below a directory, in the order of their paths.

    Attributes:
        root: the directory; hidden files and directories (a leading dot) are not read.
        text_key: the key (.jsonl) or column (.parquet) that holds the text.
        holdout: share of the documents held out, chosen by a stable hash of the text, so equal texts stay together.
    """

    name: str
    root: Path
    text_key: str
    holdout: float

    def documents(self, split: Split, counts: Counter[str] | None = None) -> Iterator[Document]:
        """Stream the documents of `split`; null and empty texts are counted as `empty_rows` and left out.

        Raises:
            UserError: a file is broken (no UTF-8, invalid JSON, truncated parquet) or lacks the text key; the message
                names the file and the row.
        """
        for path in self._files():
            for text, name in _READERS[path.suffix.lower()](path, self.text_key):
                if not text:
                    if counts is not None:
                        counts["empty_rows"] += 1
                    continue
                if is_heldout(_utf8(text, name), self.holdout) == (split == "heldout"):
                    yield Document(text, name)

    def fingerprint(self, split: Split) -> str:
        """Digest of every file's path, size and time, of the options, `split` and this format's version."""
        listing = []
        for path in self._files():
            stat = path.stat()
            listing.append((path.relative_to(self.root).as_posix(), stat.st_size, stat.st_mtime_ns))
        return f"{stable_hash(repr((_FORMAT, split, self.text_key, self.holdout, listing)).encode()):016x}"

    def _files(self) -> Iterator[Path]:
        for directory, subdirectories, files in os.walk(self.root):
            subdirectories[:] = sorted(d for d in subdirectories if not d.startswith("."))
            for file in sorted(files):
                path = Path(directory, file)
                if not file.startswith(".") and path.suffix.lower() in _READERS and path.is_file():
                    yield path


def open_source(
    mixture: str, root: str = "", text_key: str = "text", holdout: float = HOLDOUT, streaming: bool = False
) -> Source:
    """The source that `mixture` names.

    Args:
        mixture: "embedded" (see `embedded.py`), "reasoning" (see `reasoning/source.py`), "files@DIR", or
            "files" with `root` as the directory; or a local copy of a text data set of `adapters/registry.py` in the
            same way, e.g. "fineweb@DIR".
        root: directory to read; with "embedded" it replaces the standard library's; "reasoning" reads none.
        text_key: key or column of the text in .jsonl and .parquet files.
        holdout: share of the documents held out, in [0, 1); of "reasoning" it is always `documents.HOLDOUT`.
        streaming: a text data set without a directory is read from the Hub.

    Raises:
        UserError: unknown mixture, missing directory, or no readable file in it.
    """
    if not 0 <= holdout < 1:
        raise UserError(f"data.holdout is {holdout}: give a share from 0 to below 1, e.g. 0.02.")
    kind, separator, directory = mixture.partition("@")
    if kind == "embedded" and not separator:
        return open_embedded(root, holdout)
    if kind == "reasoning" and not separator:
        if root:
            raise UserError(f"data.mixture=reasoning reads no directory: leave out data.root={root!r}.")
        return ReasoningSource()
    if is_text_dataset(kind):
        return open_dataset(mixture, root, holdout, streaming)
    if kind == "files":
        if bool(root) == bool(directory):
            raise UserError(
                f"data.mixture={mixture!r} with data.root={root!r} must name one directory: "
                "write data.mixture=files@DIR, or data.mixture=files and data.root=DIR."
            )
        return _open_files(mixture, Path(root or directory).expanduser(), text_key, holdout)
    near = difflib.get_close_matches(kind, ["embedded", "reasoning", "files", *names("pretrain")], n=1)
    hint = f"did you mean {near[0]!r}?" if near else "write one of these."
    raise UserError(
        f"Unknown data.mixture {mixture!r}; there are 'embedded', 'reasoning' and 'files@DIR', and NAME@DIR for "
        f"{', '.join(names('pretrain'))}: {hint}"
    )


def _open_files(name: str, root: Path, text_key: str, holdout: float) -> FilesSource:
    if root.is_file():
        raise UserError(f"{root} is a file: give the directory that holds it, e.g. data.mixture=files@{root.parent}.")
    if not root.is_dir():
        raise UserError(f"There is no directory {root}: give data.mixture=files@DIR an existing one.")
    source = FilesSource(name, root, text_key, holdout)
    if next(source._files(), None) is None:
        raise UserError(
            f"No {', '.join(_READERS)} file lies below {root}: put the text there or name another directory."
        )
    return source


def _read_txt(path: Path, text_key: str) -> _Rows:
    offset = 0
    line = 1
    whole = path.stat().st_size <= TEXT_FILE_PART_BYTES
    with path.open("rb") as file:
        while content := b"".join(file.readlines(TEXT_FILE_PART_BYTES)):
            try:
                text = content.decode()
            except UnicodeDecodeError as error:
                raise UserError(
                    f"{path} is not UTF-8 at byte {offset + error.start}: convert the file to UTF-8."
                ) from error
            yield text, str(path) if whole else f"{path}:{line}"
            offset += len(content)
            line += content.count(b"\n")
    if offset == 0:
        yield "", str(path)


def _read_jsonl(path: Path, text_key: str) -> _Rows:
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue  # a blank line at the end is usual and holds no row
            name = f"{path}:{number}"
            try:
                row = json.loads(line.decode())
            except UnicodeDecodeError as error:
                raise UserError(
                    f"{name} is not UTF-8 at byte {error.start} of the line: convert the file to UTF-8."
                ) from error
            except json.JSONDecodeError as error:
                raise UserError(
                    f"{name} is not valid JSON ({error.msg} at character {error.pos}): write one object a line."
                ) from error
            if not isinstance(row, dict):
                raise UserError(f'{name} is a JSON {type(row).__name__}: write an object like {{"{text_key}": "..."}}.')
            if text_key not in row:
                raise UserError(
                    f"{name} has no key {text_key!r}; it has {_listed(row)}: set data.text_key to one of these."
                )
            yield _checked(row[text_key], text_key, name), name


def _read_parquet(path: Path, text_key: str) -> _Rows:
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            columns = file.schema_arrow.names
            if text_key not in columns:
                raise UserError(
                    f"{path} has no column {text_key!r}; it has {_listed(columns)}: set data.text_key to one of these."
                )
            number = 0
            for batch in file.iter_batches(batch_size=_PARQUET_ROWS, columns=[text_key]):
                for scalar in batch.column(0):
                    number += 1
                    name = f"{path}:{number}"
                    try:
                        value = scalar.as_py()
                    except UnicodeDecodeError as error:
                        raise UserError(
                            f"{name} is not UTF-8 at byte {error.start} of the row: write the column as UTF-8."
                        ) from error
                    yield _checked(value, text_key, name), name
    except (pyarrow.ArrowException, OSError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"{path} is no complete parquet file ({reason}): copy or write it again.") from error


_READERS: dict[str, Callable[[Path, str], _Rows]] = {
    ".txt": _read_txt,
    ".jsonl": _read_jsonl,
    ".parquet": _read_parquet,
}


def _checked(value: object, text_key: str, name: str) -> str | None:
    if value is None or isinstance(value, str):
        return value
    raise UserError(f"{name} has a value of type {type(value).__name__} under {text_key!r}: write a string or null.")


def _utf8(text: str, name: str) -> bytes:
    try:
        return text.encode()
    except UnicodeEncodeError as error:  # JSON can escape half a surrogate pair
        raise UserError(
            f"{name} holds the lone surrogate U+{ord(text[error.start]):04X} at character {error.start}: remove it."
        ) from error


def _listed(names: object) -> str:
    return ", ".join(map(repr, names)) or "none"
