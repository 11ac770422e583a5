"""Sources of chats: generated problems, rows of messages in local files, and the SFT data sets by name.

    reasoning, procedures    generated problems; the worked solution is the thought, the conclusion the answer
    reasoning-plain, procedures-plain    the same problems, answered by the conclusion alone
    chats@DIR    rows as in `conversation`, in .jsonl, .json (both also .gz, .zst), .parquet or .arrow
    openmathinstruct-2, numinamath-cot, ultrachat, openhermes-2.5    see `adapters/sft.py`; with @DIR a local copy

All of them are split by the same hash of the question (`documents.HOLDOUT`), so a question is held out wherever it
stands, with or without a switch.
"""

from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import Protocol

from qwen3f.data.chat.conversation import (
    COLUMNS,
    OPTIONAL_COLUMNS,
    Conversation,
    checked_messages,
    read_conversation,
)
from qwen3f.data.chat.kinds import HYBRID, TemplateKind
from qwen3f.data.chat.samples import Sample, Turns, make_samples
from qwen3f.data.sources.adapters import sft
from qwen3f.data.sources.adapters.answers import last_boxed
from qwen3f.data.sources.adapters.files import left_out, split_files
from qwen3f.data.sources.adapters.opening import raw_rows
from qwen3f.data.sources.adapters.registry import HubDataset, names, parse_mixture
from qwen3f.data.sources.adapters.rows import BadRow, LeftOut, OnBadRow, Row, RowFault
from qwen3f.data.sources.documents import HOLDOUT, Split, is_heldout, other_files, stable_hash
from qwen3f.data.sources.reasoning import FAMILIES, ReasoningSource, chat_messages
from qwen3f.errors import UserError
from qwen3f.files import user_path
from qwen3f.tasks.task import Task

_FORMAT = 4  # part of the fingerprint: raise it when the same rows would give other samples

GENERATED = {f"{family}{plain}": (family, not plain) for family in FAMILIES for plain in ("", "-plain")}
"""Generated sources: name -> (family of the problems, whether the answers have thoughts)."""

_CHATS = HubDataset("chats", "chats", "sft", COLUMNS, OPTIONAL_COLUMNS)
# For these the worked solution is judged, not the content: that repeats the data set's answer, so it is always right.
_JUDGED: dict[str, Callable[[Row], tuple[str, str]]] = {
    "openmathinstruct-2": lambda row: (row.values["generated_solution"], row.values["expected_answer"]),
    "numinamath-cot": lambda row: (row.values["solution"], last_boxed(row.values["solution"])),
}


class Rows(Protocol):
    """Where rows come from."""

    def read(self, split: Split, counts: Counter[str] | None) -> Iterator[Row | BadRow]:
        """The rows of a split, bad rows in place. It may yield rows of the other split too: the caller drops them."""
        ...

    def fingerprint(self, split: Split) -> str:
        """Changes when the rows may have changed."""
        ...


@dataclass(frozen=True)
class GeneratedRows:
    """Generated problems as rows of `conversation`."""

    problems: ReasoningSource
    thinking: bool

    def read(self, split: Split, counts: Counter[str] | None) -> Iterator[Row]:
        """As in `Rows`."""
        for number, item in enumerate(self.problems.problems(split, counts), start=1):
            values = {"messages": chat_messages(item, self.thinking), "answer": item.answer}
            yield Row(values, f"{self.problems.name}, {item.kind} {item.difficulty}, {split}:{number}")

    def fingerprint(self, split: Split) -> str:
        """As in `Rows`."""
        return f"{self.problems.fingerprint(split)} {self.thinking}"


@dataclass(frozen=True)
class FileRows:
    """Rows of a data set in local files, or of the Hub where there is no `root`."""

    dataset: HubDataset
    root: str

    def read(self, split: Split, counts: Counter[str] | None) -> Iterator[Row | BadRow]:
        """As in `Rows`. For either split all the data set's training rows; `ChatSource` holds some of them out."""
        return raw_rows(self.dataset, self.root, "", streaming=True)

    def other_files(self) -> Counter[str]:
        """As in `documents.OfFiles`."""
        return left_out(self.dataset, self.root, self.dataset.split) if self.root else Counter()

    def fingerprint(self, split: Split) -> str:
        """As in `Rows`, from path, size and time of the files. For the Hub it never changes: asking would be slow."""
        if not self.root:
            return f"{self.dataset.hub_id} {self.dataset.config}"
        root = user_path(self.root, "config.data.mixture")
        files = [(path, path.stat()) for path in split_files(self.dataset, self.root, self.dataset.split)]
        listing = [(path.relative_to(root).as_posix(), stat.st_size, stat.st_mtime_ns) for path, stat in files]
        return f"{self.dataset.name} {listing}"


@dataclass(frozen=True)
class ChatSource:
    """A `documents.Source` of `Sample`s.

    Attributes:
        name: what the user wrote in the mixture.
        rows: where they come from.
        read: a row to a conversation; raises RowFault, LeftOut.
        turns, switches: see `make_samples`.
        task: keeps only conversations whose answer it judges right; None: all.
        on_bad_row: "error" or "skip".
        kind: the kind of the chat template.
    """

    name: str
    rows: Rows
    read: Callable[[Row], Conversation] = field(repr=False)
    turns: Turns = "last"
    switches: float = 0.0
    task: Task | None = None
    on_bad_row: OnBadRow = "error"
    kind: TemplateKind = HYBRID

    def documents(self, split: Split, counts: Counter[str] | None = None) -> Iterator[Sample]:
        """Stream the samples of `split`; what is left out is counted by reason (`rows.REASONS`).

        Raises:
            UserError: a row that cannot be used, with file and row, unless on_bad_row is "skip".
        """
        counts = Counter() if counts is None else counts
        for row in self.rows.read(split, counts):
            try:
                conversation, samples = self._samples(row)
            except RowFault as fault:
                if self.on_bad_row == "error":
                    raise UserError(f"{fault.message} (--config.data.on_bad_row=skip leaves such rows out)") from None
                counts[fault.reason] += 1
            except LeftOut as left:
                counts[left.reason] += 1
            else:
                if is_heldout(conversation.question, HOLDOUT) == (split == "heldout"):
                    yield from samples

    def fingerprint(self, split: Split) -> str:
        """As in `Source`."""
        settings = (self.turns, self.switches, self.task.name if self.task else None, self.on_bad_row, self.kind.name)
        parts = (_FORMAT, split, HOLDOUT, self.rows.fingerprint(split), settings)
        return f"{stable_hash(repr(parts).encode()):016x}"

    def other_files(self) -> Counter[str]:
        """As in `documents.OfFiles`."""
        return other_files(self.rows)

    def _samples(self, row: Row | BadRow) -> tuple[Conversation, list[Sample]]:
        if isinstance(row, BadRow):
            raise RowFault(row.reason, row.message)
        conversation = self.read(row)
        if self.task is not None:
            _check_right(conversation, self.task)
        return conversation, make_samples(conversation, self.turns, self.switches, self.kind)


def open_chats(name: str, root: str, problems: ReasoningSource, **options: object) -> ChatSource:
    """The source that a mixture names; see the module's text.

    Args:
        name: as in the mixture.
        root: directory of a source that does not name one.
        problems: what the generated sources read.
        options: of `ChatSource`: turns, switches, task, on_bad_row, kind.

    Raises:
        UserError: an unknown name, or a directory that is missing or holds no file.
    """
    check_name(name)
    kind, at, directory = name.partition("@")
    if kind in GENERATED and not at:
        family, thinking = GENERATED[kind]
        return ChatSource(name, GeneratedRows(problems.family(family), thinking), read_conversation, **options)
    if kind == "chats":
        if bool(root) == bool(directory):
            raise UserError(
                f"--config.data.mixture={name!r} with --config.data.root={root!r} must name one directory: write "
                "chats@DIR."
            )
        rows = FileRows(_CHATS, directory or root)
        rows.fingerprint("train")  # a missing directory is an error now, not while reading
        return ChatSource(name, rows, read_conversation, **options)
    (part,) = parse_mixture(name, root, "sft")
    rows = FileRows(part.dataset, part.root)
    rows.fingerprint("train")
    return ChatSource(name, rows, partial(read_dataset, part.dataset.name), **options)


def check_name(name: str) -> None:
    """Raises UserError for a name in a mixture that no source has; looks at no directory."""
    kind, at, _ = name.partition("@")
    if not (kind in GENERATED and not at) and kind not in ("chats", *names("sft")) and "/" not in kind:
        known = ", ".join([*GENERATED, "chats@DIR", *names("sft")])
        raise UserError(f"Unknown source {name!r} in --config.data.mixture: write one of {known}.")


def read_dataset(dataset: str, row: Row) -> Conversation:
    """The conversation of a row of one of the SFT data sets. Raises RowFault, LeftOut."""
    messages = checked_messages(sft.ADAPTERS[dataset](row), row.name)
    judged = _JUDGED[dataset](row) if dataset in _JUDGED else None
    return Conversation(messages, row.name, judged=judged)


def _check_right(conversation: Conversation, task: Task) -> None:
    """Raises LeftOut unless the task judges the answer right."""
    if conversation.judged is None:
        raise LeftOut("no_answer")
    verdict = task.judge(*conversation.judged)
    if verdict != 1.0:
        raise LeftOut("unjudged" if verdict is None else "wrong_answers")
