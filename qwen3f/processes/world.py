"""The ranks of a run as their host programs see them: who this one is, and what they agree on.

Collectives over devices belong to the step; here small JSON values travel between hosts, over gloo. A rank that never
comes does not end the wait: that is for the watchdog, or for the launcher, which ends all ranks when one is lost.
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
_PATIENCE = datetime.timedelta(days=7)  # rank 0 of a host may prepare a corpus for long


@dataclasses.dataclass(frozen=True)
class World:
    """
    Attributes:
      rank, size: of all ranks. local_rank: on this host.
      mesh, axes: the devices, and this rank's view of them; None and ONE where there is one rank.
      group: of gloo, for what hosts tell each other; None where there is one rank.

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
        """Every rank's value, which JSON can hold, in the order of ranks."""
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
        """The largest of the ranks' numbers: one small message, for every step."""
        if self.size == 1:
            return value
        out = torch.tensor(value)
        dist.all_reduce(out, dist.ReduceOp.MAX, group=self.group)
        return int(out)

    def together(self, work: Callable[[], T], *errors: type[Exception]) -> T:
        """work() of this rank, once every rank has done its own; if one of `errors` is raised anywhere, by all.

        All raise that of the lowest rank that failed, of the same type and with the same words. Another kind of error
        is raised at once, here alone: it ends the run.
        """
        return self.agree(work, False, *errors)[0]

    def agree(self, work: Callable[[], T], flag: bool, *errors: type[Exception]) -> tuple[T, bool]:
        """(as `together`, whether any rank's flag is set), in one small message."""
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
        """work() of this rank; the first rank of each host does its own before the others begin.

        So what the one leaves on the disk, the others find there. Errors as `together`.
        """
        before = self.together(work if self.local_rank == 0 else lambda: None, *errors)
        return self.together(work if self.local_rank else lambda: before, *errors)

    def apart(self) -> "World":
        """The same ranks with a conversation of their own, as for a thread."""
        return self if self.size == 1 else dataclasses.replace(self, group=_talk())


ALONE = World()


def open_world(shape: MeshShape, device_type: str, local_rank: int) -> World:
    """The World of a mesh as big as the default process group, which must exist. All ranks call it together."""
    if shape.size == 1:  # torchrun with one rank: there is nobody to talk to
        return ALONE
    mesh = make_mesh(shape, device_type)
    return World(dist.get_rank(), dist.get_world_size(), local_rank, mesh, axes_of(mesh), _talk())


def _talk() -> dist.ProcessGroup:
    return dist.new_group(backend="gloo", timeout=_PATIENCE)
