"""report.html into a workdir."""

from pathlib import Path

from qwen3f.files import write_atomically
from qwen3f.report.page import render
from qwen3f.report.read import read

NAME = "report.html"


def write_report(workdir: Path) -> Path:
    """Of a run's or a pipeline's directory; a page is there wholly or not at all. Returns its path.

    Raises UserError if `workdir` is neither's, OSError if it cannot be written.
    """
    path = Path(workdir) / NAME
    write_atomically(path, render(read(Path(workdir))).encode(errors="replace"))
    return path
