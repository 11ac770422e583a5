"""The text of a mixture: "source[=weight],…", for pretraining's sources and for the loaders' data sets alike."""

import math
from collections.abc import Mapping, Sequence
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


def parse_caps(text: str, sources: Sequence[str]) -> dict[str, float | None]:
    """Most epochs of each source: "" is no limit, "4" a limit of each, "reasoning=4,fineweb=1" of these.

    A source of the mixture is named as there, or without its directory. Raises UserError for a number that is not
    positive, or a source that is not in the mixture.
    """
    caps: dict[str, float | None] = dict.fromkeys(sources)
    if not text:
        return caps
    if "=" not in text:
        return dict.fromkeys(sources, _weight(text, f"data.max_epochs={text}"))
    for name, cap in parse_weights(text):
        named = [source for source in sources if name in (source, source.partition("@")[0])]
        if not named:
            raise UserError(f"data.max_epochs names {name!r}, which is not in the mixture: write {', '.join(sources)}.")
        caps |= dict.fromkeys(named, cap)
    return caps


def temper(weights: Mapping[str, float], sizes: Mapping[str, int], temperature: float) -> dict[str, float]:
    """Shares of the sources that `sizes` names: weight · size^(1/temperature), made to sum to 1.

    A temperature of 1 is in proportion to the sizes, a high one nearly as the weights are written, and 0 stands for
    just as written. Raises UserError for a negative one.
    """
    if not 0 <= temperature < math.inf:
        raise UserError(f"data.temperature is {temperature}: give 0 (weights as written) or a positive number.")
    largest = max(sizes.values())
    raised = {
        name: weights[name] * ((size / largest) ** (1 / temperature) if temperature else 1.0)
        for name, size in sizes.items()
    }
    return {name: weight / sum(raised.values()) for name, weight in raised.items()}


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
