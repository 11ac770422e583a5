"""Sources of pairs: generated ones, rows of chats in local files, and the preference data sets by name.

    right-or-wrong, boxed-or-not, short-or-padded, and each with -plain     see `generated`
    pairs@DIR              rows as in `pair`, in .jsonl (also .gz, .zst), .json, .parquet or .arrow files
    ultrafeedback@DIR      see `adapters/dpo.py`

All of them are split by the same hash of the question (`documents.HOLDOUT`).
"""

from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Protocol

from qwen3f.data.chat.kinds import HYBRID, TemplateKind
from qwen3f.data.chat.samples import Sample
from qwen3f.data.chat.sources import FileRows
from qwen3f.data.pairs.generated import GENERATED, GeneratedPairs
from qwen3f.data.pairs.pair import COLUMNS, OPTIONAL_COLUMNS, Pair, of_preference, read_pair
from qwen3f.data.sources.adapters.dpo import ultrafeedback
from qwen3f.data.sources.adapters.registry import HubDataset, names, parse_mixture
from qwen3f.data.sources.adapters.rows import BadRow, LeftOut, OnBadRow, Row, RowFault
from qwen3f.data.sources.documents import HOLDOUT, Split, is_heldout, stable_hash
from qwen3f.data.sources.reasoning import ReasoningSource
from qwen3f.errors import UserError

_FORMAT = 3  # part of the fingerprint: raise it when the same rows would give other pairs
_PAIRS = HubDataset("pairs", "pairs", "dpo", COLUMNS, OPTIONAL_COLUMNS)


class PairRows(Protocol):
    """Where pairs come from."""

    def read(self, split: Split, counts: Counter[str] | None) -> Iterator[Callable[[TemplateKind], Pair]]:
        """For each pair of a split a function that makes it, or raises RowFault or LeftOut.

        It may yield pairs of the other split too: the caller drops them.
        """
        ...

    def fingerprint(self, split: Split) -> str:
        """Changes when the pairs may have changed."""
        ...


@dataclass(frozen=True)
class FilePairs:
    """Pairs of rows of a data set in local files, or of the Hub; `make` reads one."""

    rows: FileRows
    make: Callable[[Row, TemplateKind], Pair] = field(repr=False)

    def read(self, split: Split, counts: Counter[str] | None) -> Iterator[Callable[[TemplateKind], Pair]]:
        """As in `PairRows`."""
        for row in self.rows.read(split, counts):
            yield lambda template, row=row: self._pair(row, template)

    def fingerprint(self, split: Split) -> str:
        """As in `PairRows`."""
        return self.rows.fingerprint(split)

    def _pair(self, row: Row | BadRow, template: TemplateKind) -> Pair:
        if isinstance(row, BadRow):
            raise RowFault(row.reason, row.message)
        return self.make(row, template)


@dataclass(frozen=True)
class PairSource:
    """A `documents.Source` of pairs of `Sample`s: document 2k is the better answer of pair k, 2k + 1 the worse.

    Attributes:
        name: what the user wrote in the mixture.
        rows: where they come from.
        on_bad_row: "error" or "skip".
        template: the kind of the chat template.
        most: read at most this many pairs of a split, the first ones; 0: all.
    """

    name: str
    rows: PairRows
    on_bad_row: OnBadRow = "error"
    template: TemplateKind = HYBRID
    most: int = 0

    def pairs(self, split: Split, counts: Counter[str] | None = None) -> Iterator[Pair]:
        """Stream the pairs of `split`; what is left out is counted by reason (`rows.REASONS`).

        Raises:
            UserError: a row that cannot be used, with file and row, unless on_bad_row is "skip".
        """
        counts, given = Counter() if counts is None else counts, 0
        for make in self.rows.read(split, counts):
            try:
                pair = make(self.template)
            except RowFault as fault:
                if self.on_bad_row == "error":
                    raise UserError(f"{fault.message} (--config.data.on_bad_row=skip leaves such rows out)") from None
                counts[fault.reason] += 1
            except LeftOut as left:
                counts[left.reason] += 1
            else:
                if is_heldout(pair.question, HOLDOUT) == (split == "heldout"):
                    yield pair
                    given += 1
                    if given == self.most:
                        return

    def documents(self, split: Split, counts: Counter[str] | None = None) -> Iterator[Sample]:
        """Both answers of each of `pairs`."""
        for pair in self.pairs(split, counts):
            yield from pair

    def fingerprint(self, split: Split) -> str:
        """As in `Source`."""
        settings = (self.on_bad_row, self.template.name, self.most)
        parts = (_FORMAT, "pairs", split, HOLDOUT, self.rows.fingerprint(split), *settings)
        return f"{stable_hash(repr(parts).encode()):016x}"


def open_pairs(
    name: str,
    root: str,
    problems: ReasoningSource,
    on_bad_row: OnBadRow = "error",
    template: TemplateKind = HYBRID,
) -> PairSource:
    """The source that a mixture names; see the module's text.

    Args:
        name: as in the mixture.
        root: directory of a source that does not name one.
        problems: what the generated sources are made of.
        on_bad_row: "error" or "skip".
        template: the kind of the chat template.

    Raises:
        UserError: an unknown name, or a directory that is missing or holds no file.
    """
    check_name(name)
    kind, at, directory = name.partition("@")
    if kind in GENERATED and not at:
        return PairSource(name, GeneratedPairs(kind, problems), on_bad_row, template)
    if kind == "pairs":
        if bool(root) == bool(directory):
            raise UserError(
                f"--config.data.mixture={name!r} with --config.data.root={root!r} must name one directory: write "
                "pairs@DIR."
            )
        rows = FilePairs(FileRows(_PAIRS, directory or root), read_pair)
    else:
        (part,) = parse_mixture(name, root, "dpo")
        rows = FilePairs(FileRows(part.dataset, part.root), _of_ultrafeedback)
    rows.fingerprint("train")  # a missing directory is an error now, not while reading
    return PairSource(name, rows, on_bad_row, template)


def check_name(name: str) -> None:
    """Raises UserError for a name in a mixture that no source has; looks at no directory."""
    kind, at, _ = name.partition("@")
    if not (kind in GENERATED and not at) and kind not in ("pairs", *names("dpo")) and "/" not in kind:
        known = ", ".join([*GENERATED, "pairs@DIR", *(f"{name}@DIR" for name in names("dpo"))])
        raise UserError(f"Unknown source {name!r} in --config.data.mixture: write one of {known}.")


def _of_ultrafeedback(row: Row, template: TemplateKind) -> Pair:
    return of_preference(ultrafeedback(row), row.name, template)
