"""A row of a data set with its origin, a row that cannot be used, and the checks that adapters share."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

from qwen3f.errors import UserError

OnBadRow = Literal["error", "skip"]
ON_BAD_ROW = ("error", "skip")

REASONS = (
    # Faults: an error, or with on_bad_row="skip" a skip that is counted.
    "broken_files",
    "empty_shards",
    "invalid_rows",
    "missing_columns",
    "null_values",
    "roles_out_of_order",
    "misplaced_thoughts",
    "different_prompts",
    "bad_images",
    # What a rule leaves out, counted always.
    "other_files",
    "empty_texts",
    "too_long",
    "no_answer",
    "unanswered",
    "wrong_answers",
    "unjudged",
    "unrated",
    "ties",
)
"""Why something was left out; the keys of every count."""


@dataclass(frozen=True)
class Row:
    """One row: its values by column, and "file:row" (rows and lines count from 1)."""

    values: Mapping[str, Any]
    name: str


@dataclass(frozen=True)
class BadRow:
    """A row, or what is left of a file, that cannot be read.

    Attributes:
        reason: one of the faults of REASONS.
        message: one line: what is wrong, where, and what to do.
    """

    reason: str
    message: str


class RowFault(Exception):
    """Raised by an adapter: this row is at fault. Becomes a UserError, or a counted skip."""

    def __init__(self, reason: str, message: str) -> None:
        super().__init__(message)
        self.reason = reason
        self.message = message


class LeftOut(Exception):
    """Raised by an adapter: its documented rule leaves this row out. Counted under `reason`, never an error."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


class Columns(NamedTuple):
    """The columns to read.

    needed: those that each row must have. optional: read if they are there. advice: what to do if one is missing.
    """

    needed: Sequence[str]
    optional: Sequence[str] = ()
    advice: str = "name the right data set, or rename the column"

    def wrong_in(self, found: Iterable[str], where: str) -> BadRow | None:
        """What is wrong if `found`, the columns of a row or of a file, lack needed ones or have a wanted one twice."""
        there = list(found)
        if twice := [column for column in (*self.needed, *self.optional) if there.count(column) > 1]:
            return BadRow(
                "broken_files", f"{where} has the column {twice[0]!r} {there.count(twice[0])} times: write it once."
            )
        missing = [column for column in self.needed if column not in there]
        if not missing:
            return None
        listed = ", ".join(map(repr, there)) or "none"
        return BadRow(
            "missing_columns",
            f"{where} has no column {', '.join(map(repr, missing))}; it has {listed}: {self.advice}.",
        )


def without_nulls(value: Any) -> Any:
    """A value of a table, without the null fields of its records.

    In a table each record has the fields of all others, filled with null. So a call without an argument looks the same
    as a call whose argument is null; both are read as the first.
    """
    if isinstance(value, Mapping):
        return {key: without_nulls(entry) for key, entry in value.items() if entry is not None}
    return [without_nulls(entry) for entry in value] if isinstance(value, list) else value


def text_of(row: Row, column: str) -> str:
    """The text of a column, which may not be null, empty or unfit for UTF-8. Raises RowFault."""
    return check_text(row.values[column], row.name, column)


def check_text(value: object, where: str, what: str, may_be_empty: bool = False) -> str:
    """The value, if it is text. Raises RowFault."""
    if value is None:
        raise RowFault("null_values", f"{where} has null under {what!r}: fill or remove the row.")
    if not isinstance(value, str):
        raise RowFault("invalid_rows", f"{where} has a {type(value).__name__} under {what!r}: write a string.")
    if not value.strip() and not may_be_empty:
        raise RowFault("null_values", f"{where} has an empty text under {what!r}: fill or remove the row.")
    try:
        value.encode()
    except UnicodeEncodeError as error:  # JSON can escape half a surrogate pair
        raise RowFault(
            "invalid_rows",
            f"{where} holds the lone surrogate U+{ord(value[error.start]):04X} under {what!r}: remove it.",
        ) from error
    return value


def list_of_dicts(row: Row, column: str) -> list[Mapping[str, Any]]:
    """The entries of a column that holds a list of records, at least one. Raises RowFault."""
    value = row.values[column]
    if value is None:
        raise RowFault("null_values", f"{row.name} has null under {column!r}: fill or remove the row.")
    if not isinstance(value, list) or not all(isinstance(entry, Mapping) for entry in value):
        raise RowFault("invalid_rows", f"{row.name} holds no list of records under {column!r}: write one.")
    if not value:
        raise RowFault("null_values", f"{row.name} has an empty list under {column!r}: fill or remove the row.")
    return value


def check_policy(on_bad_row: str) -> None:
    """Raises UserError for a policy that does not exist."""
    if on_bad_row not in ON_BAD_ROW:
        raise UserError(f"--config.data.on_bad_row is {on_bad_row!r}: write 'error' or 'skip'.")
