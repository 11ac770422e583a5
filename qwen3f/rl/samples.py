"""Every completion of a run, kept: workdir/samples/step-N.jsonl, a line each; the oldest files go."""

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from qwen3f.files import write_atomically

FOLDER = "samples"


def write_samples(workdir: Path, step: int, lines: Sequence[dict[str, Any]], keep: int) -> None:
    """A step's file, whole or not at all. keep: of the last so many steps; 0: of all. NaN is written as null."""
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
