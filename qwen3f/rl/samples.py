"""Writes every completion of a step to workdir/samples/step-N.jsonl, one line each, and deletes the oldest files."""

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from qwen3f.files import write_atomically

FOLDER = "samples"


def write_samples(workdir: Path, step: int, lines: Sequence[dict[str, Any]], keep: int) -> None:
    """Writes the file of a step, atomically. keep: keep the files of this many last steps; 0: all. NaN becomes null."""
    folder = workdir / FOLDER
    text = "".join(json.dumps(_plain(line), ensure_ascii=False, allow_nan=False) + "\n" for line in lines)
    write_atomically(folder / f"step-{step:08d}.jsonl", text.encode())
    if keep:
        for old in sorted(folder.glob("step-*.jsonl"))[:-keep]:
            old.unlink()


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(x) for key, x in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value
