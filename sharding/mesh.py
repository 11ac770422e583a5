"""The mesh: how many devices along which named axis, from text like `dp8,tp2,pp4`.

    pp  stages of layers          ep  experts, and rows of the batch
    dr  rows; weights are copies  cp  the sequence
    dp  rows; FSDP cuts weights   tp  heads and widths

dr (data replicas) makes FSDP hybrid: weights are gathered within dp, ep and cp only, and gradients are summed over dr
once a step. Write it in the mesh (dr2,dp8), or let `hybrid` derive it from config.fsdp.shard_size.
"""

import dataclasses
import difflib
import math
import re
from collections.abc import Iterable

from qwen3f.errors import UserError

AXES = ("pp", "dr", "dp", "ep", "cp", "tp")  # ranks are numbered with the last one fastest
ROWS = ("dr", "dp", "ep")  # the axes that cut the batch's rows
FSDP = ("dp", "ep", "cp")  # the axes that FSDP cuts a dense weight over
DATA = ("dr", "dp", "ep", "cp")  # the axes that cut the batch's tokens
MOST_DEVICES = 2**20  # far above real clusters; a plan that loops over more devices would not end
_USUAL = ("pp", "dp", "ep", "cp", "tp")  # suggestions for a mistyped axis


@dataclasses.dataclass(frozen=True)
class MeshShape:
    """Sizes along the named axes; an axis that was not named has size 1."""

    pp: int = 1
    dr: int = 1
    dp: int = 1
    ep: int = 1
    cp: int = 1
    tp: int = 1

    @property
    def size(self) -> int:
        return self.pp * self.dr * self.dp * self.ep * self.cp * self.tp

    def __str__(self) -> str:
        """As parse_mesh takes it."""
        return ",".join(f"{axis}{size}" for axis, size in dataclasses.asdict(self).items() if size > 1)


def parse_mesh(text: str, devices: int | None = None) -> MeshShape:
    """The shape that a text such as `dp8,tp2,pp4` names; axes in any order, empty text for one device.

    One axis may have the size -1: it becomes `devices` divided by the other sizes. Raises UserError for a part that is
    not an axis and a positive size; for more than MOST_DEVICES; and for -1 on two axes, without `devices`, or where the
    other sizes don't divide `devices`.
    """
    sizes: dict[str, int] = {}
    for part in filter(None, (p.strip() for p in text.split(","))):
        match = re.fullmatch(r"([a-z]+)(-1|\d{1,9})", part)
        if match is None or match[1] not in AXES:
            close = difflib.get_close_matches(match[1] if match else part.lower(), _USUAL, n=1, cutoff=0.5)
            hint = f"did you mean '{close[0]}'? " if close and close[0] != part else ""
            axes = ", ".join(AXES)
            raise UserError(
                f"config.mesh={text}: '{part}' is not an axis and a size; {hint}write e.g. dp8,tp2 with axes of {axes}"
            )
        axis = match[1]
        if axis in sizes:
            raise UserError(f"config.mesh={text}: axis {axis} stands twice; write it once")
        sizes[axis] = int(match[2])
        if sizes[axis] == 0:
            raise UserError(
                f"config.mesh={text}: axis {axis} needs a size of at least 1, or -1 for all remaining devices"
            )
    shape = MeshShape(**_fill(text, sizes, devices))
    if shape.size > MOST_DEVICES:
        raise UserError(f"config.mesh={text}: {shape.size:,} devices are more than {MOST_DEVICES:,}; write lower sizes")
    return shape


def _fill(text: str, sizes: dict[str, int], devices: int | None) -> dict[str, int]:
    """Sizes with a number in the place of -1."""
    open_axes = [axis for axis, size in sizes.items() if size == -1]
    if not open_axes:
        return sizes
    if len(open_axes) > 1:
        raise UserError(
            f"config.mesh={text}: only one axis can have the size -1, but {' and '.join(open_axes)} have it; write a "
            "number for the others"
        )
    (axis,) = open_axes
    if devices is None:
        raise UserError(
            f"config.mesh={text}: {axis}-1 takes all remaining devices, but the number of devices is unknown here (as "
            f"with --config.plan=True); write {axis} with its size"
        )
    taken = math.prod(size for size in sizes.values() if size != -1)
    if devices % taken:
        others = ",".join(f"{name}{size}" for name, size in sizes.items() if name != axis)
        raise UserError(
            f"config.mesh={text}: {devices} devices are no multiple of {others} = {taken}, so no {axis} fills them; "
            "write other sizes"
        )
    return sizes | {axis: devices // taken}


def hybrid(shape: MeshShape, shard_size: int, fsdp: bool = True) -> MeshShape:
    """The mesh on which FSDP shards the weights over `shard_size` ranks: dp is split into a smaller dp and a dr.

    shard_size: the new dp · ep · cp; 0 leaves the mesh as it is. fsdp: config.fsdp.enabled. Raises UserError unless
    shard_size is ep · cp times a divisor of dp, and for a shard_size without FSDP.
    """
    if shard_size == 0:
        return shape
    key = f"config.fsdp.shard_size={shard_size}"
    if shard_size < 0:
        raise UserError(f"{key}: write how many ranks share the weights, or 0 for all of dp, ep and cp")
    if not fsdp:
        raise UserError(f"{key} has no effect with config.fsdp.enabled=False; leave out one of the two")
    whole = shape.ep * shape.cp
    if shard_size % whole or shape.dp % (shard_size // whole):
        sizes = ", ".join(str(whole * n) for n in divisors(shape.dp))
        raise UserError(
            f"{key} doesn't fit config.mesh with dp={shape.dp} · ep={shape.ep} · cp={shape.cp}: it must be ep · cp "
            f"times a divisor of dp; write one of {sizes}"
        )
    inner = shard_size // whole
    return dataclasses.replace(shape, dr=shape.dr * (shape.dp // inner), dp=inner)


def divisors(number: int) -> list[int]:
    """All divisors of a positive number in rising order, 1 and the number included."""
    low = [n for n in range(1, math.isqrt(number) + 1) if number % n == 0]
    return low + [number // n for n in reversed(low) if n * n != number]


def nearest(axis: str, size: int, possible: Iterable[int]) -> str:
    """For an error message: the possible sizes just below and just above a wrong one, e.g. "tp2 or tp4"."""
    sizes = list(possible)
    around = {max((n for n in sizes if n < size), default=None), min((n for n in sizes if n > size), default=None)}
    return " or ".join(f"{axis}{n}" for n in sorted(around - {None}))
