"""The mesh: how many devices along which named axis, from text like `dp8,tp2,pp4`."""

import dataclasses
import difflib
import math
import re

from qwen3f.errors import UserError

AXES = ("pp", "dp", "ep", "cp", "tp")


@dataclasses.dataclass(frozen=True)
class MeshShape:
    """Sizes along the named axes; an axis that was not named has size 1."""

    pp: int = 1
    dp: int = 1
    ep: int = 1
    cp: int = 1
    tp: int = 1

    @property
    def size(self) -> int:
        return math.prod(dataclasses.astuple(self))


def parse_mesh(text: str) -> MeshShape:
    """`dp8,tp2,pp4`, in any order; empty: one device. Raises UserError for what is not an axis and a positive size."""
    sizes: dict[str, int] = {}
    for part in filter(None, (p.strip() for p in text.split(","))):
        match = re.fullmatch(r"([a-z]+)(\d+)", part)
        if match is None or match[1] not in AXES:
            close = difflib.get_close_matches(match[1] if match else part, AXES, n=1, cutoff=0.5)
            hint = f"did you mean '{close[0]}'? " if close else ""
            raise UserError(f"mesh '{text}': '{part}' is not an axis and a size; {hint}write e.g. dp8,tp2 with {AXES}")
        axis = match[1]
        if axis in sizes:
            raise UserError(f"mesh '{text}': axis {axis} stands twice")
        sizes[axis] = int(match[2])
        if sizes[axis] < 1:
            raise UserError(f"mesh '{text}': axis {axis} needs a size of at least 1")
    return MeshShape(**sizes)
