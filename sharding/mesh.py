"""The mesh: how many devices along which named axis, from text like `dp8,tp2,pp4`.

    pp  stages of layers          ep  experts, and rows of the batch
    dr  rows; weights are copies  cp  the sequence
    dp  rows; FSDP cuts weights   tp  heads and widths

dr, data replicas, makes FSDP a hybrid: its gathers stay within dp, ep and cp, and gradients are summed over dr once a
step. It can be written, dr2,dp8, or follow from how many ranks share the weights (`hybrid`).
"""

import dataclasses
import difflib
import math
import re
from collections.abc import Iterable

from qwen3f.errors import UserError

AXES = ("pp", "dr", "dp", "ep", "cp", "tp")  # ranks are numbered with the last one fastest
ROWS = ("dr", "dp", "ep")  # the axes that cut the batch's rows
FSDP = ("dp", "ep", "cp")  # those that FSDP cuts a dense weight over
DATA = ("dr", "dp", "ep", "cp")  # those over which tokens are cut
MOST_DEVICES = 2**20  # far above what there is; what is counted one by one would take for ever
_USUAL = ("pp", "dp", "ep", "cp", "tp")  # what a mistyped axis is taken for


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
    """`dp8,tp2,pp4`, in any order; empty: one device. One axis may have the size -1, which fills `devices`.

    Raises UserError for what is not an axis and a positive size; for more than MOST_DEVICES; for -1 on two axes,
    without a number of devices, or where the other axes don't divide it.
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
            raise UserError(f"config.mesh={text}: axis {axis} needs a size of at least 1, or -1 for what is left")
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
        raise UserError(f"config.mesh={text}: -1 stands on {' and '.join(open_axes)}; one axis can take what is left")
    (axis,) = open_axes
    if devices is None:
        raise UserError(
            f"config.mesh={text}: {axis}-1 takes what a number of devices leaves, and without one (as for "
            f"--config.plan=True) it can't be known; write {axis} with its size"
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
    """The mesh on which FSDP shards over `shard_size` ranks, which are all of ep and cp and a part of dp: the rest of
    dp becomes dr. 0 leaves the mesh as it is. fsdp: config.fsdp.enabled.

    Raises UserError for a size that ep, cp and a divisor of dp don't make, and for one that has no effect.
    """
    if shard_size == 0:
        return shape
    key = f"config.fsdp.shard_size={shard_size}"
    if shard_size < 0:
        raise UserError(f"{key}: write how many ranks share the weights, or 0 for all of dp, ep and cp")
    if not fsdp:
        raise UserError(f"{key} has no effect with config.fsdp.enabled=False; leave out the one or the other")
    whole = shape.ep * shape.cp
    if shard_size % whole or shape.dp % (shard_size // whole):
        sizes = ", ".join(str(whole * n) for n in divisors(shape.dp))
        raise UserError(
            f"{key} doesn't fit config.mesh with dp={shape.dp} · ep={shape.ep} · cp={shape.cp}: it is ep · cp times a "
            f"divisor of dp; write one of {sizes}"
        )
    inner = shard_size // whole
    return dataclasses.replace(shape, dr=shape.dr * (shape.dp // inner), dp=inner)


def divisors(number: int) -> list[int]:
    """Of a positive number, rising; 1 and itself among them."""
    low = [n for n in range(1, math.isqrt(number) + 1) if number % n == 0]
    return low + [number // n for n in reversed(low) if n * n != number]


def nearest(axis: str, size: int, possible: Iterable[int]) -> str:
    """For an error: the possible sizes of an axis next to one that is not, `tp2 or tp4`."""
    sizes = list(possible)
    around = {max((n for n in sizes if n < size), default=None), min((n for n in sizes if n > size), default=None)}
    return " or ".join(f"{axis}{n}" for n in sorted(around - {None}))
