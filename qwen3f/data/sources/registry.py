"""Open what `data.mixture` names: embedded text, generated problems, a data set, or a directory of files."""

import difflib
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from qwen3f.data.sources.adapters.files import SUFFIXES, TEXT_SUFFIXES, data_files
from qwen3f.data.sources.adapters.pretrain import is_text_dataset, open_dataset
from qwen3f.data.sources.adapters.readers import read_file
from qwen3f.data.sources.adapters.registry import names
from qwen3f.data.sources.adapters.rows import BadRow, Columns, Row, RowFault, check_text
from qwen3f.data.sources.documents import HOLDOUT, Document, Source, Split, split_documents, stable_hash
from qwen3f.data.sources.embedded import open_embedded
from qwen3f.data.sources.reasoning import ReasoningSource
from qwen3f.errors import UserError
from qwen3f.files import user_path

__all__ = ["Document", "FilesSource", "Source", "Split", "open_source"]

_FORMAT = 4  # part of the fingerprint: raise it when the same files would give other documents
_SUFFIXES = (*TEXT_SUFFIXES, *SUFFIXES)
_NAMED = 3  # files with nothing but white space that are named, at most


@dataclass(frozen=True)
class FilesSource:
    """All files below a directory that `adapters.readers` reads, in the order of their paths.

    Attributes:
        root: the directory; hidden files and directories (a leading dot) are not read.
        text_key: the key or column that holds the text; a text file is text itself.
        holdout: share of the documents held out, chosen by a stable hash of the text, so equal texts stay together. If
            there are so few documents that one split would be empty, the last part of the text is held out instead.
    """

    name: str
    root: Path
    text_key: str
    holdout: float

    def documents(self, split: Split, counts: Counter[str] | None = None) -> Iterator[Document]:
        """Stream the documents of `split`. Counted and left out: null, empty and blank texts, empty files.

        Raises:
            UserError: a file is broken (no UTF-8, invalid JSON, cut off), too large, or lacks the text key; the message
                names the file and the row.
        """
        return split_documents(self._all(Counter() if counts is None else counts), split, self.holdout)

    def _all(self, counts: Counter[str]) -> Iterator[Document]:
        """Both splits together."""
        columns = Columns([self.text_key], advice="set --config.data.text_key to one of these")
        blank: set[str] = set()
        for row in (row for path in data_files(self.root, _SUFFIXES)[0] for row in read_file(path, columns)):
            if isinstance(row, BadRow):
                if row.reason != "empty_shards":
                    raise UserError(row.message)
                counts[row.reason] += 1
            elif (text := self._text(row)) and not text.isspace():
                yield Document(text, row.name)
            elif text and Path(row.name).is_file() and len(blank) < _NAMED:
                blank.add(row.name)
                counts[f"file of blanks alone: {row.name}"] += 1
            else:
                counts["empty_rows"] += 1

    def other_files(self) -> Counter[str]:
        """As in `OfFiles`."""
        return data_files(self.root, _SUFFIXES)[1]

    def _text(self, row: Row) -> str | None:
        value = row.values[self.text_key]
        try:
            return None if value is None else check_text(value, row.name, self.text_key, may_be_empty=True)
        except RowFault as fault:
            raise UserError(fault.message) from None

    def fingerprint(self, split: Split) -> str:
        """Digest of every file's path, size and time, of the options, `split` and this format's version."""
        listing = []
        for path in data_files(self.root, _SUFFIXES)[0]:
            stat = path.stat()
            listing.append((path.relative_to(self.root).as_posix(), stat.st_size, stat.st_mtime_ns))
        return f"{stable_hash(repr((_FORMAT, split, self.text_key, self.holdout, listing)).encode()):016x}"


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
        raise UserError(f"config.data.holdout is {holdout}: give a share from 0 to below 1, e.g. 0.02.")
    check_name(mixture)
    kind, _, directory = mixture.partition("@")
    if kind == "embedded":
        return open_embedded(root, holdout)
    if kind == "reasoning":
        if root:
            raise UserError(f"config.data.mixture=reasoning reads no directory: leave out --config.data.root={root!r}.")
        return ReasoningSource()
    if is_text_dataset(kind):
        return open_dataset(mixture, root, holdout, streaming)
    if bool(root) == bool(directory):
        raise UserError(
            f"config.data.mixture={mixture!r} with config.data.root={root!r} must name one directory: "
            "write --config.data.mixture=files@DIR."
        )
    place = user_path(root or directory, "config.data.root" if root else "config.data.mixture")
    return _open_files(mixture, place, text_key, holdout)


def check_name(name: str) -> None:
    """Raises UserError for a name in a mixture that no source has; looks at no directory."""
    kind, at, _ = name.partition("@")
    if (kind in ("embedded", "reasoning") and not at) or kind == "files" or is_text_dataset(kind):
        return
    near = difflib.get_close_matches(kind, ["embedded", "reasoning", "files", *names("pretrain")], n=1)
    hint = f"did you mean {near[0]!r}?" if near else "write one of these."
    hint += " A comma separates sources; a directory with a comma in its name is given by --config.data.root."
    raise UserError(
        f"Unknown config.data.mixture {name!r}; there are 'embedded', 'reasoning' and 'files@DIR', and NAME@DIR for "
        f"{', '.join(names('pretrain'))}: {hint}"
    )


def _open_files(name: str, root: Path, text_key: str, holdout: float) -> FilesSource:
    if root.is_file():
        raise UserError(
            f"{root} is a file: give the directory that holds it, e.g. --config.data.mixture=files@{root.parent}."
        )
    if not root.is_dir():
        raise UserError(f"There is no directory {root}: give --config.data.mixture=files@DIR an existing one.")
    source = FilesSource(name, root, text_key, holdout)
    if not data_files(root, _SUFFIXES)[0]:
        raise UserError(
            f"No {', '.join(_SUFFIXES)} file lies below {root}: put the text there or name another directory."
        )
    return source
