"""A rank's view of the run: its number, and exchange of small values with the other ranks.

The step's collectives are on devices. Here the host programs exchange small JSON values over gloo. There is no timeout
for a rank that does not answer: the watchdog ends such a run, or the launcher, when a rank is lost.
"""

import dataclasses
import datetime
import json
from collections.abc import Callable
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh

from sharding.axes import ONE, Axes, axes_of, make_mesh
from sharding.mesh import MeshShape

T = TypeVar("T")
_PATIENCE = datetime.timedelta(days=7)  # a host's first rank may tokenise a corpus for a long time


@dataclasses.dataclass(frozen=True)
class World:
    """One rank of a run.

    Attributes:
      rank, size: this rank's number, and the number of ranks. local_rank: this rank's number on its host.
      mesh, axes: the mesh of devices, and this rank's view of it; None and ONE if there is one rank.
      group: the gloo group for exchange between ranks; None if there is one rank.

    Every rank must call the same methods in the same order, from one thread.
    """

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    mesh: DeviceMesh | None = None
    axes: Axes = ONE
    group: dist.ProcessGroup | None = None

    @property
    def main(self) -> bool:
        """Whether this is the rank that writes logs."""
        return self.rank == 0

    def gather(self, value: Any) -> list[Any]:
        """Every rank's value, in the order of ranks. Values must be JSON-like."""
        return [json.loads(text) for text in self.gather_bytes(json.dumps(value).encode())]

    def gather_bytes(self, content: bytes) -> list[bytes]:
        """Every rank's bytes, in the order of ranks; all are sent padded to the longest."""
        if self.size == 1:
            return [content]
        lengths = [torch.zeros(1, dtype=torch.int64) for _ in range(self.size)]
        dist.all_gather(lengths, torch.tensor([len(content)]), group=self.group)
        padded = torch.zeros(max(1, int(max(lengths))), dtype=torch.uint8)
        padded[: len(content)] = torch.frombuffer(bytearray(content), dtype=torch.uint8) if content else 0
        contents = [torch.empty_like(padded) for _ in range(self.size)]
        dist.all_gather(contents, padded, group=self.group)
        return [bytes(x[: int(n)].numpy()) for x, n in zip(contents, lengths)]

    def first(self, value: T) -> T:
        """Rank 0's value."""
        return self.gather(value if self.main else None)[0]

    def highest(self, value: int) -> int:
        """The largest of the ranks' numbers. One small message, so it can be called at every step."""
        if self.size == 1:
            return value
        out = torch.tensor(value)
        dist.all_reduce(out, dist.ReduceOp.MAX, group=self.group)
        return int(out)

    def together(self, work: Callable[[], T], *errors: type[Exception]) -> T:
        """Run work() on every rank, and wait for all; returns this rank's result.

        If work() raises one of `errors` on some rank, all ranks raise an error of the same type and text, that of the
        lowest such rank. Any other error is raised at once on its rank alone, which ends the run.
        """
        return self.agree(work, False, *errors)[0]

    def agree(self, work: Callable[[], T], flag: bool, *errors: type[Exception]) -> tuple[T, bool]:
        """(result as of `together`, whether any rank's flag is set), with one small message for both."""
        result, error = None, None
        try:
            result = work()
        except errors as failure:
            error = failure
        worst = self.highest(2 if error is not None else int(flag))
        if worst < 2:
            return result, bool(worst)
        kind = next((i for i, kind in enumerate(errors) if isinstance(error, kind)), None)
        told = self.gather(None if error is None else [kind, str(error)])
        failed = next(rank for rank, report in enumerate(told) if report is not None)
        if failed == self.rank:
            raise error
        kind, words = told[failed]
        raise errors[kind](words) from error

    def first_on_host(self, work: Callable[[], T], *errors: type[Exception]) -> T:
        """Run work() on each host's first rank, then on the other ranks; returns this rank's result.

        So the others find the files that the first one wrote. Errors as `together`.
        """
        before = self.together(work if self.local_rank == 0 else lambda: None, *errors)
        return self.together(work if self.local_rank else lambda: before, *errors)

    def apart(self) -> "World":
        """The same ranks with another gloo group, for use in another thread."""
        return self if self.size == 1 else dataclasses.replace(self, group=_talk())


ALONE = World()


def open_world(shape: MeshShape, device_type: str, local_rank: int) -> World:
    """The World for a mesh of the default process group's size. That group must exist. All ranks call it together."""
    if shape.size == 1:  # torchrun with one rank
        return ALONE
    mesh = make_mesh(shape, device_type)
    return World(dist.get_rank(), dist.get_world_size(), local_rank, mesh, axes_of(mesh), _talk())


def _talk() -> dist.ProcessGroup:
    return dist.new_group(backend="gloo", timeout=_PATIENCE)
