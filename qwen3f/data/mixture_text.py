"""The text of a mixture: "source[=weight],…", for pretraining's sources and for the loaders' data sets alike."""

import math
from pathlib import Path

from qwen3f.errors import UserError


def parse_weights(mixture: str) -> list[tuple[str, float]]:
    """[(source, weight)]; a weight that is not written is 1.

    A source may be "name@DIR". An equals sign that belongs to the name of a directory that is there is no weight's; a
    directory whose name has a comma goes into data.root.

    Raises UserError for an empty piece, a source named twice, or a weight that is not a positive number.
    """
    parts = []
    for piece in map(str.strip, mixture.split(",")):
        source, separator, written = piece.rpartition("=")
        if not separator or _is_directory(piece):  # as in …/date=2026
            source, written = piece, "1"
        parts.append((source, _weight(written, piece)))
    names = [source for source, _ in parts]
    if not all(names) or len(set(names)) < len(names):
        raise UserError(
            f"The mixture {mixture!r} must name one or more different sources, e.g. embedded=0.7,reasoning=0.3."
        )
    return parts


def _weight(written: str, piece: str) -> float:
    try:
        weight = float(written)
    except ValueError:
        weight = 0.0
    if not 0 < weight < math.inf:
        raise UserError(f"{piece!r} has the weight {written!r}: write a positive number, e.g. fineweb=0.7.")
    return weight


def _is_directory(source: str) -> bool:
    directory = source.partition("@")[2]
    return bool(directory) and Path(directory).expanduser().is_dir()
