"""Questions in a JSONL file, answers in another: rows are read as they are needed, and a run that stopped goes on.

A row is {"prompt": "…"} or {"messages": […]}, beside it any field of TextOptions for this row alone, and an "id" that
its answer gets too. A line of the answers:

    {"row": 0, "hash": "…", "id": …, "answer": "…", "finish_reason": "stop", "prompt_tokens": 9, "tokens": 31}

row: the question's number from 0; answers stand in the order in which they ended. hash: of the row, of how it is
answered, and of the model; by it a later run knows what is done. A row whose finish_reason begins with "error" is not:
a later run asks it again, and its new line takes the place of the old one.
"""

import contextlib
import dataclasses
import fcntl
import hashlib
import json
import os
import shutil
from array import array
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO

from qwen3f.data.chat.template import check_messages
from qwen3f.data.tokenizers.token_text import check_encodable
from qwen3f.errors import UserError
from qwen3f.infer.text_generator import Answer
from qwen3f.infer.text_request import FIELDS, NO_CHAT, Content, TextOptions, chat_messages
from qwen3f.limits import ROW_BYTES

_START = b'{"row": '  # of every line of the answers


@dataclasses.dataclass(frozen=True)
class Ask:
    """A question.

    number: from 0. place: "file:line", for messages. stream: of its draws. id: as the row has it.
    """

    number: int
    place: str
    content: Content
    options: TextOptions
    stream: int
    id: Any = None

    def digest(self, model: str) -> int:
        """64 bits that change with the question, with how it is answered, and with the model."""
        content = self.content if isinstance(self.content, str) else list(self.content)
        values = [content, dataclasses.asdict(self.options), self.stream, self.id, model]
        text = json.dumps(values, sort_keys=True).encode()
        return max(1, int.from_bytes(hashlib.sha256(text).digest()[:8], "big"))  # 0: not answered yet


class BadRow(UserError):
    """A row that cannot be asked; the message names file and line."""


def read_asks(path: Path, options: TextOptions) -> Iterator[Ask | BadRow]:
    """The rows of a file, one by one; blank lines are none.

    options: what rows leave open. A row with a seed of its own draws the same wherever it stands; the others' draws
    depend on config.seed and on their number.
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
    """Lines; None for one that is too long."""
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
    try:
        text = json.dumps([content, row.get("id")], ensure_ascii=False, allow_nan=False)
    except ValueError as error:  # Python reads NaN, and a number such as 1e999 as infinite
        raise UserError('"id" holds a number that JSON cannot carry: write it as a text') from error
    check_encodable(text)
    return Ask(number, place, content, options, 0 if "seed" in own else number, row.get("id"))


def _content(row: dict[str, Any], options: TextOptions) -> Content:
    if "prompt" in row:
        if not isinstance(row["prompt"], str) or not row["prompt"]:
            raise UserError(f'"prompt" must be a text that is not empty, got {row["prompt"]!r}')
        return row["prompt"]
    if not options.chat:
        raise UserError(NO_CHAT)
    check_messages(row["messages"])
    chat_messages(row["messages"], options.system)
    return row["messages"]


class AnswerFile:
    """The answers, which grow; see the module's text. A context manager: nobody else writes meanwhile.

    Args:
      path: made if it is not there. What a run that was killed left of a last line is cut off. The first answer that is
        written takes the lines of rows that failed away.
      model: names the model, for hashes.
      rows: number of questions.

    Raises UserError, with nothing changed: another process writes there, or it holds something else.
    """

    def __init__(self, path: Path, model: str, rows: int) -> None:
        self.path, self.model, self.count = path, model, 0
        self._done = array("Q", bytes(8 * rows))  # the hash of each row that is answered
        self._failed = False  # whether there are lines of rows that failed
        self._stack = contextlib.ExitStack()

    def __enter__(self) -> "AnswerFile":
        with self._stack as stack:
            try:
                # no buffer, which `close` would have to write
                self._file = stack.enter_context(self.path.open("a+b", buffering=0))
            except OSError as error:
                raise UserError(f"config.out={self.path} cannot be opened ({error.strerror}); name a file") from error
            if not self._file.seekable():
                raise UserError(f"config.out={self.path} is a pipe or a terminal; name a file")
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
        """Whether the row is answered. Raises UserError if another one is, or the same in another way."""
        there = self._done[ask.number]
        if there and there != ask.digest(self.model):
            raise UserError(
                f"config.out={self.path} holds for row {ask.number} another answer than {ask.place} asks for: the "
                "row, the settings or the model have changed; choose another config.out, or write what they were"
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
        """Put a file without the lines of rows that failed in this one's place, where one of both is at any time."""
        path = self.path.resolve()
        fresh = path.with_name(path.name + ".new")
        try:
            with path.open("rb") as lines, fresh.open("wb") as kept:
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
                raise self._taken()  # who holds the lock has just put another file there
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
                f"config.out={self.path}, line {number} answers row {row}, and there are {len(self._done)} rows; "
                "choose another config.out"
            )
        if _failed(line):
            self._failed = True
            return
        self.count += not self._done[row]
        self._done[row] = digest

    def _taken(self) -> UserError:
        return UserError(f"config.out={self.path}: another process writes there; wait for it")

    def _unwritten(self, error: OSError) -> UserError:
        return UserError(
            f"config.out={self.path} cannot be written ({error.strerror}): mend that; the same command then goes on"
        )

    def _foreign(self, number: int) -> UserError:
        return UserError(
            f"config.out={self.path}, line {number} is no answer that this program has written; choose another file"
        )


def _failed(line: dict[str, Any]) -> bool:
    return str(line.get("finish_reason")).startswith("error")


def survey(asks: Iterator[Ask | BadRow], on_bad_row: str) -> tuple[int, int]:
    """(rows, bad ones among them). Raises the first bad one unless on_bad_row is "skip"."""
    rows = bad = 0
    for ask in asks:
        rows += 1
        if isinstance(ask, BadRow):
            if on_bad_row != "skip":
                raise ask
            bad += 1
    return rows, bad


def prompt_asks(prompts: str | Sequence[str], options: TextOptions) -> Iterator[Ask]:
    """config.prompt or config.prompts as rows. Raises UserError for one that is no text."""
    one = isinstance(prompts, str)
    for number, prompt in enumerate([prompts] if one else prompts):
        place = "config.prompt" if one else f"config.prompts[{number}]"
        if not isinstance(prompt, str) or not prompt:
            raise UserError(f"{place}: every prompt must be a text that is not empty")
        yield Ask(number, place, prompt, options, number)
