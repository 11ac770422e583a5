"""Rows of the text data sets as documents, and a local copy of one as a source for the token cache.

All of them hold the document in the column `text`; other columns are not read:

* HuggingFaceFW/fineweb, configuration sample-10BT (also id, dump, url, date, language, language_score, token_count);
* cerebras/SlimPajama-627B (also meta);
* open-web-math/open-web-math (also url, date, metadata);
* EleutherAI/proof-pile-2, its subsets arxiv and algebraic-stack (also meta; the third is the data set above). Some of
  its shards are empty on the Hub: read it with on_bad_row="skip", which counts them;
* emozilla/pg19 (also short_book_title, publication_date, url).
"""

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass

from qwen3f.data.sources.adapters.files import left_out, split_files
from qwen3f.data.sources.adapters.opening import raw_rows
from qwen3f.data.sources.adapters.registry import HubDataset, names, parse_mixture
from qwen3f.data.sources.adapters.rows import BadRow, LeftOut, OnBadRow, Row, RowFault, check_text
from qwen3f.data.sources.documents import Document, Split, is_heldout, stable_hash
from qwen3f.errors import UserError
from qwen3f.files import user_path

STAGES = {
    1: "fineweb,slimpajama",
    2: "open-web-math,proof-pile-2-arxiv,proof-pile-2-algebraic-stack",
    3: "pg19",
}
"""The data sets of each stage of pretraining, in equal parts of characters."""

_FORMAT = 1  # part of the fingerprint: raise it when the same files would give other documents


def document(row: Row) -> Document:
    """The text with its origin. Raises RowFault; LeftOut for an empty text."""
    text = check_text(row.values["text"], row.name, "text", may_be_empty=True)
    if not text:
        raise LeftOut("empty_texts")
    return Document(text, row.name)


@dataclass(frozen=True)
class DatasetSource:
    """A local copy of a text data set, read like any `documents.Source`.

    Attributes:
        name: what the user wrote as `data.mixture`.
        dataset: which data set.
        root: directory of the copy; its training files are read. "" reads the Hub.
        holdout: share of the documents held out, chosen by a stable hash of the text, so equal texts stay together.
    """

    name: str
    dataset: HubDataset
    root: str
    holdout: float

    def documents(self, split: Split, counts: Counter[str] | None = None) -> Iterator[Document]:
        """Stream the documents of `split`. Counted and left out: null and empty texts, empty shards.

        Raises:
            UserError: a file is broken or lacks the column; the message names the file and the row.
        """
        for row in raw_rows(self.dataset, self.root, "", streaming=True):
            try:
                found = usable(row)
            except LeftOut as left:
                if counts is not None:
                    counts[left.reason] += 1
                continue
            if is_heldout(found.text.encode(), self.holdout) == (split == "heldout"):
                yield found

    def other_files(self) -> Counter[str]:
        """As in `documents.OfFiles`."""
        return left_out(self.dataset, self.root, self.dataset.split) if self.root else Counter()

    def fingerprint(self, split: Split) -> str:
        """Digest of every file's path, size and time, of the options, `split` and this format's version."""
        if not self.root:  # there is no cheap way to see that data on the Hub changed
            hub = (_FORMAT, self.dataset.hub_id, self.dataset.config, split, self.holdout)
            return f"{stable_hash(repr(hub).encode()):016x}"
        listing, root = [], user_path(self.root, "config.data.mixture")
        for path in split_files(self.dataset, self.root, self.dataset.split):
            stat = path.stat()
            listing.append((path.relative_to(root).as_posix(), stat.st_size, stat.st_mtime_ns))
        parts = (_FORMAT, self.dataset.name, split, self.holdout, listing)
        return f"{stable_hash(repr(parts).encode()):016x}"


def open_dataset(mixture: str, root: str, holdout: float, streaming: bool = False) -> DatasetSource:
    """The source of "name@DIR", of "name" with `root`, or, when streaming, of "name" on the Hub.

    Raises:
        UserError: no directory is given (a token cache needs the whole corpus at hand), or none is there.
    """
    parts = parse_mixture(mixture, root, "pretrain")
    if len(parts) > 1:
        raise UserError(f"config.data.mixture={mixture!r} names {len(parts)} data sets: write one, e.g. fineweb@DIR.")
    (part,) = parts
    source = DatasetSource(mixture, part.dataset, part.root, holdout)
    if not part.root and streaming:
        return source
    if not part.root:
        raise UserError(
            f"data.mixture={mixture} needs a local copy: write {part.dataset.name}@DIR or --config.data.root=DIR; or "
            "read it from the Hub with --config.data.streaming=True."
        )
    split_files(part.dataset, part.root, part.dataset.split)  # a missing directory is an error now, not while reading
    return source


def is_text_dataset(name: str) -> bool:
    """Whether `name` is the short name of a data set that `open_dataset` opens."""
    return name in names("pretrain")


def usable(row: Row | BadRow, on_bad_row: OnBadRow = "error") -> Document:
    """The document of a row. Null texts and empty shards are left out, as in `sources.registry.FilesSource`.

    Raises LeftOut; UserError, with file and row, for what cannot be read, or LeftOut with on_bad_row="skip".
    """
    try:
        if not isinstance(row, Row):
            raise RowFault(row.reason, row.message)
        return document(row)
    except RowFault as fault:
        if on_bad_row == "skip" or fault.reason in ("null_values", "empty_shards"):
            raise LeftOut(fault.reason) from None
        raise UserError(fault.message) from None
