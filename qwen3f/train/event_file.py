"""Writes TensorBoard's event files. torch's SummaryWriter is not used, because a full disk ends its writer thread.

An event is a protocol buffer, framed by its length and checksums (TensorFlow's TFRecord format).
"""

import itertools
import os
import socket
import time
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from torch import Tensor

from qwen3f.train.patient_file import PatientFile

_numbers = itertools.count()


class EventFile:
    """Writes a new event file into `directory`; a context manager. say: as PatientFile's.

    start_step: TensorBoard hides events of later steps in the directory's older files. add_… only take events; `flush`
    writes them.
    """

    def __init__(self, directory: Path, start_step: int, say: Callable[[str], None]) -> None:
        # Imported here: it takes a while, and few modules need it.
        from tensorboard.compat.proto.event_pb2 import Event, SessionLog
        from tensorboard.summary.writer.record_writer import RecordWriter
        from torch.utils.tensorboard import summary

        self._event, self._summary = Event, summary
        # TensorBoard reads a directory's files in the order of their names.
        name = f"events.out.tfevents.{int(time.time()):010d}.{socket.gethostname()}.{os.getpid()}.{next(_numbers):06d}"
        self._file = PatientFile(directory / name, say)
        self._records = RecordWriter(self._file)
        first = start_step + 1 if start_step else 0
        self._add(first, file_version="brain.Event:2")
        self._add(first, session_log=SessionLog(status=SessionLog.START))
        self.flush()

    def add_scalar(self, tag: str, value: float, step: int) -> None:
        self._add(step, summary=self._summary.scalar(tag, value))

    def add_text(self, tag: str, text: str, step: int) -> None:
        """text: Markdown."""
        self._add(step, summary=self._summary.text(tag, text))

    def add_image(self, tag: str, picture: Tensor, step: int) -> None:
        """picture: uint8 [height, width, 3], on the CPU."""
        self._add(step, summary=self._summary.image(tag, picture, dataformats="HWC"))

    def flush(self) -> None:
        self._file.flush()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._file.close()

    def _add(self, step: int, **content: Any) -> None:
        self._records.write(self._event(step=step, wall_time=time.time(), **content).SerializeToString())
