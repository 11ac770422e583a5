"""A copy of the state in host memory, which a thread writes to disk while training continues.

On a GPU the copy runs on its own stream, at the same time as work that is queued later, into pinned memory that is
allocated once. Later work may read the state; before anything writes into it, `join` makes the current stream wait for
the copy.
"""

import torch
from torch import Tensor

from qwen3f.checkpoint.tree import Name, spec_of


class Snapshot:
    """Host buffers for the leaves of a state, which every copy reuses.

    Memory: that of the state; for pinned memory up to twice that, because torch rounds every buffer to a power of two.
    """

    def __init__(self) -> None:
        self._buffers: dict[Name, Tensor] = {}
        self._streams: dict[torch.device, torch.cuda.Stream] = {}
        self._copied: dict[torch.device, torch.cuda.Event] = {}
        self._leaves: dict[Name, Tensor] = {}  # keeps the tensors alive that a copy in progress reads

    def reserve(self, leaves: dict[Name, Tensor]) -> None:
        """Allocate the buffers. The first access to new memory takes several times as long as the copy."""
        old, self._buffers = self._buffers, {}
        for name, leaf in leaves.items():
            buffer = old.pop(name, None)
            if buffer is None or spec_of(buffer) != spec_of(leaf):
                # always contiguous; pinned for copies from a GPU
                buffer = torch.empty(leaf.shape, dtype=leaf.dtype, pin_memory=leaf.is_cuda)
            self._buffers[name] = buffer

    @torch.no_grad()
    def begin(self, leaves: dict[Name, Tensor]) -> dict[Name, Tensor]:
        """Start to copy `leaves`, with their values after all work queued so far. Returns the buffers.

        The buffers have the values after `finish`. An earlier copy must be finished first.
        """
        self.reserve(leaves)
        self._leaves = leaves
        for device in {leaf.device for leaf in leaves.values() if leaf.is_cuda}:
            stream = self._streams.setdefault(device, torch.cuda.Stream(device))
            stream.wait_stream(torch.cuda.current_stream(device))
            with torch.cuda.stream(stream):
                for name, leaf in leaves.items():
                    if leaf.device == device:
                        self._buffers[name].copy_(leaf, non_blocking=True)
            self._copied[device] = torch.cuda.Event(blocking=True)  # blocking: a waiting thread sleeps
            self._copied[device].record(stream)
        for name, leaf in leaves.items():
            if not leaf.is_cuda:
                self._buffers[name].copy_(leaf)
        return self._buffers

    def join(self) -> None:
        """Make GPU work that is queued after this call wait for the copy. The host does not wait."""
        for device, copied in self._copied.items():
            torch.cuda.current_stream(device).wait_event(copied)

    def finish(self) -> None:
        """Wait, on the host, until the copy is complete."""
        for copied in self._copied.values():
            copied.synchronize()
        self._leaves = {}
