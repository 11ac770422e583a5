"""Questions from a JSONL file, answers to another: rows are read when needed, and a run that stopped can be resumed.

A row is {"prompt": "…"} or {"messages": […]}. It may have any field of TextOptions, for this row only, and an "id",
which its answer gets too. A line of the answers:

    {"row": 0, "hash": "…", "id": …, "answer": "…", "finish_reason": "stop", "prompt_tokens": 9, "tokens": 31}

row: the question's number from 0; answers are in the order in which they ended. hash: of the row, its options and the
model; a later run compares it to find the rows that are done. A row whose finish_reason begins with "error" is not
done: a later run computes it again, and the new line replaces the old one.
"""

import contextlib
import dataclasses
import fcntl
import hashlib
import json
import os
import secrets
import shutil
import stat
from array import array
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO

from qwen3f.data.chat.template import check_depth, check_messages
from qwen3f.data.tokenizers.token_text import check_encodable
from qwen3f.errors import UserError
from qwen3f.infer.text_generator import Answer
from qwen3f.infer.text_request import FIELDS, NO_CHAT, Content, TextOptions, chat_messages
from qwen3f.limits import ROW_BYTES

_START = b'{"row": '  # every line of the answers begins so


@dataclasses.dataclass(frozen=True)
class Ask:
    """A question.

    number: from 0. place: "file:line", for error messages. stream: Request.stream. id: the row's "id", or None.
    """

    number: int
    place: str
    content: Content
    options: TextOptions
    stream: int
    id: Any = None

    def digest(self, model: str) -> int:
        """A hash of 64 bits of the question, its options, its random stream, its id and the model. The order of keys
        counts, since tools and calls are written in it."""
        content = self.content if isinstance(self.content, str) else list(self.content)
        options = {field.name: getattr(self.options, field.name) for field in dataclasses.fields(self.options)}
        text = json.dumps([content, options, self.stream, self.id, model]).encode()
        return max(1, int.from_bytes(hashlib.sha256(text).digest()[:8], "big"))  # 0: not answered yet


class BadRow(UserError):
    """A row that cannot be used; the message names file and line."""


def read_asks(path: Path, options: TextOptions) -> Iterator[Ask | BadRow]:
    """Yields the rows of a file; blank lines are no rows.

    options: for fields that a row does not set. A row with its own seed draws the same wherever it stands in the file;
    the draws of other rows depend on config.seed and on their number.
    """
    number = 0
    for line, text in enumerate(_lines(path), 1):
        place = f"{path}:{line}"
        if text is not None and not text.strip():
            continue
        try:
            if text is None:
                raise UserError(f"the line is {ROW_BYTES.exceeded('bytes')}")
            yield _read_ask(text, number, place, options)
        except UserError as error:
            yield BadRow(f"{place}: {error}")
        number += 1


def _lines(path: Path) -> Iterator[bytes | None]:
    """Yields the lines; None for a line that is too long."""
    most = ROW_BYTES.value()
    with path.open("rb") as file:
        while text := file.readline(most + 1):
            if len(text) <= most:
                yield text
                continue
            while not text.endswith(b"\n") and (text := file.readline(most)):
                pass
            yield None


def _read_ask(text: bytes, number: int, place: str, options: TextOptions) -> Ask:
    try:
        row = json.loads(text.decode("utf-8-sig" if number == 0 else "utf-8"))
    except UnicodeDecodeError as error:
        raise UserError(f"the line is not UTF-8 ({error.reason} at byte {error.start}); convert the file") from error
    except (ValueError, RecursionError) as error:
        raise UserError(f"the line is not JSON ({error}); write one object a line") from error
    if not isinstance(row, dict):
        raise UserError(f'the line is a JSON {type(row).__name__}; write an object such as {{"prompt": "…"}}')
    if ("prompt" in row) == ("messages" in row):
        raise UserError('write either "prompt" or "messages"')
    known = ("prompt", "messages", "id", *FIELDS)
    if unknown := [name for name in row if name not in known]:
        raise UserError(f"the field {unknown[0]!r} is unknown; write one of {', '.join(known)}")
    own = {name: row[name] for name in FIELDS if name in row}
    options = options.changed(**own) if own else options
    content = _content(row, options)
    for name in ("messages", "id"):
        check_depth(row.get(name), f'"{name}"')
        try:
            text = json.dumps(row.get(name), ensure_ascii=False, allow_nan=False)
        except ValueError as error:  # Python reads NaN, and a number such as 1e999 as infinite
            raise UserError(f'"{name}" holds a number that JSON cannot write: write it as a text') from error
        check_encodable(text)
    return Ask(number, place, content, options, 0 if "seed" in own else number, row.get("id"))


def _content(row: dict[str, Any], options: TextOptions) -> Content:
    if "prompt" in row:
        if not isinstance(row["prompt"], str) or not row["prompt"]:
            raise UserError(f'"prompt" must be a text that is not empty, got {row["prompt"]!r}')
        check_encodable(row["prompt"])
        return row["prompt"]
    if not options.chat:
        raise UserError(NO_CHAT)
    check_messages(row["messages"])
    chat_messages(row["messages"], options.system)
    return row["messages"]


class AnswerFile:
    """The file of the answers; see the module's docstring. A context manager that locks the file for this process.

    Args:
      path: created if it does not exist. An incomplete last line, from a run that was killed, is cut off. The first
        `write` removes the lines of rows that failed.
      model: names the model, for hashes.
      rows: number of questions.

    Raises UserError, and changes nothing, if another process has locked the file or if it holds something else.
    """

    def __init__(self, path: Path, model: str, rows: int) -> None:
        self.path, self.model, self.count = path, model, 0
        self._done = array("Q", bytes(8 * rows))  # the hash of each row that is answered
        self._failed = False  # whether the file has lines of rows that failed
        self._stack = contextlib.ExitStack()

    def __enter__(self) -> "AnswerFile":
        with self._stack as stack:
            try:
                # unbuffered: else `close` would have to write the buffer, and could fail
                self._file = stack.enter_context(self.path.open("a+b", buffering=0))
            except OSError as error:
                raise UserError(f"config.out={self.path} cannot be opened ({error.strerror}); name a file") from error
            if not stat.S_ISREG(os.fstat(self._file.fileno()).st_mode):
                raise UserError(f"config.out={self.path} is a pipe or a device; name a file")
            self._lock(self._file)
            self._read()
            self._stack = stack.pop_all()
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        try:
            with self._stack:
                os.fsync(self._file.fileno())
        except OSError as error:
            if kind is None:
                raise self._unwritten(error) from error

    def has(self, ask: Ask) -> bool:
        """Whether the file has the row's answer. Raises UserError if it has the answer to another row or other settings
        under this number."""
        there = self._done[ask.number]
        if there and there != ask.digest(self.model):
            raise UserError(
                f"config.out={self.path} has an answer to row {ask.number} that does not belong to {ask.place}: the "
                "row, the settings or the model have changed; choose another --config.out, or restore them"
            )
        return bool(there)

    def write(self, ask: Ask, answer: Answer) -> None:
        line = {"row": ask.number, "hash": f"{ask.digest(self.model):016x}"}
        if ask.id is not None:
            line["id"] = ask.id
        line |= {
            "answer": answer.text,
            "finish_reason": answer.finish_reason,
            "prompt_tokens": answer.prompt_tokens,
            "tokens": answer.tokens,
        }
        text = memoryview((json.dumps(line, ensure_ascii=False) + "\n").encode())
        try:
            if self._failed:
                self._drop_failed()
            while text:
                text = text[self._file.write(text) :]
        except OSError as error:
            raise self._unwritten(error) from error

    def _drop_failed(self) -> None:
        """Replace the file by one without the lines of rows that failed. The replacement is atomic."""
        path = self.path.resolve()
        fresh = path.with_name(f"{path.name}.{secrets.token_hex(8)}.new")
        try:
            with path.open("rb") as lines, fresh.open("xb") as kept:
                shutil.copymode(path, fresh)
                kept.writelines(line for line in lines if not _failed(json.loads(line)))
                kept.flush()
                os.fsync(kept.fileno())
            file = self._stack.enter_context(fresh.open("a+b", buffering=0))
            self._lock(file)
            fresh.replace(path)
        except BaseException:
            fresh.unlink(missing_ok=True)
            raise
        self._file, self._failed = file, False

    def _lock(self, file: BinaryIO) -> None:
        try:
            fcntl.flock(file.fileno(), fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise self._taken() from error
        except OSError:  # a file system without locks
            pass

    def _read(self) -> None:
        end = 0
        with self.path.open("rb") as lines:
            if not os.path.samestat(os.fstat(lines.fileno()), os.fstat(self._file.fileno())):
                raise self._taken()  # the process that holds the lock has just replaced the file
            for number, text in enumerate(lines, 1):
                if not text.endswith(b"\n"):
                    if text[: len(_START)] != _START[: len(text)]:
                        raise self._foreign(number)
                    self._file.truncate(end)
                    return
                end += len(text)
                self._note(text, number)

    def _note(self, text: bytes, number: int) -> None:
        try:
            line = json.loads(text)
            row, digest = line["row"], int(line["hash"], 16)
            if not (text.startswith(_START) and isinstance(row, int) and 0 < digest < 2**64 and row >= 0):
                raise ValueError
        except (ValueError, TypeError, KeyError, RecursionError) as error:
            raise self._foreign(number) from error
        if row >= len(self._done):
            raise UserError(
                f"config.out={self.path}, line {number} answers row {row}, but there are only {len(self._done)} rows; "
                "choose another --config.out"
            )
        if _failed(line):
            self._failed = True
            return
        self.count += not self._done[row]
        self._done[row] = digest

    def _taken(self) -> UserError:
        return UserError(f"config.out={self.path}: another process writes to it; wait, or choose another file")

    def _unwritten(self, error: OSError) -> UserError:
        return UserError(
            f"config.out={self.path} cannot be written ({error.strerror}): repair that, then run the same command"
        )

    def _foreign(self, number: int) -> UserError:
        return UserError(f"config.out={self.path}, line {number} is not an answer of this program; choose another file")


def _failed(line: dict[str, Any]) -> bool:
    return str(line.get("finish_reason")).startswith("error")


def survey(asks: Iterator[Ask | BadRow], on_bad_row: str) -> tuple[int, int]:
    """(number of rows, number of bad ones among them). Raises the first bad one unless on_bad_row is "skip"."""
    rows = bad = 0
    for ask in asks:
        rows += 1
        if isinstance(ask, BadRow):
            if on_bad_row != "skip":
                raise ask
            bad += 1
    return rows, bad


def prompt_asks(prompts: str | Sequence[str], options: TextOptions) -> Iterator[Ask]:
    """config.prompt or config.prompts as rows. Raises UserError for a prompt that is empty or no text."""
    one = isinstance(prompts, str)
    for number, prompt in enumerate([prompts] if one else prompts):
        place = "config.prompt" if one else f"config.prompts[{number}]"
        if not isinstance(prompt, str) or not prompt:
            raise UserError(f"{place}: every prompt must be a text that is not empty")
        try:
            check_encodable(prompt)
        except UserError as error:
            raise UserError(f"{place}: {error}") from error
        yield Ask(number, place, prompt, options, number)
