"""Writes report.html to a workdir."""

from pathlib import Path

from qwen3f.files import write_atomically
from qwen3f.report.page import render
from qwen3f.report.read import read

NAME = "report.html"


def write_report(workdir: Path) -> Path:
    """Writes the report of a run or a pipeline, atomically. Returns its path.

    Raises UserError if `workdir` has neither, OSError if it cannot be written.
    """
    path = Path(workdir) / NAME
    write_atomically(path, render(read(Path(workdir))).encode(errors="replace"))
    return path
