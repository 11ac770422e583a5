"""A copy of the state in host memory, which a thread then writes while training goes on.

On a GPU the copy runs on a stream of its own, beside what is queued next, into pinned memory that is made once. What is
queued may read the state; before anything writes into it, `join` makes the current stream wait for the copy.
"""

import torch
from torch import Tensor

from qwen3f.checkpoint.tree import Name, spec_of


class Snapshot:
    """Host buffers for the leaves of a state, filled again by every copy.

    Memory: one state; in pinned memory up to twice that, since torch rounds each such buffer to a power of two.
    """

    def __init__(self) -> None:
        self._buffers: dict[Name, Tensor] = {}
        self._streams: dict[torch.device, torch.cuda.Stream] = {}
        self._copied: dict[torch.device, torch.cuda.Event] = {}
        self._leaves: dict[Name, Tensor] = {}  # what a copy still reads: not to be freed, and used again, before

    def reserve(self, leaves: dict[Name, Tensor]) -> None:
        """Make the buffers: touching fresh pages costs several times the copy."""
        old, self._buffers = self._buffers, {}
        for name, leaf in leaves.items():
            buffer = old.pop(name, None)
            if buffer is None or spec_of(buffer) != spec_of(leaf):
                # Contiguous always, pinned for a GPU's copies.
                buffer = torch.empty(leaf.shape, dtype=leaf.dtype, pin_memory=leaf.is_cuda)
            self._buffers[name] = buffer

    @torch.no_grad()
    def begin(self, leaves: dict[Name, Tensor]) -> dict[Name, Tensor]:
        """Begin to copy `leaves`, as they are after all work queued so far; returns the buffers.

        The buffers hold the values after `finish`. The one before must have been finished.
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
            self._copied[device] = torch.cuda.Event(blocking=True)  # a thread that waits for it sleeps
            self._copied[device].record(stream)
        for name, leaf in leaves.items():
            if not leaf.is_cuda:
                self._buffers[name].copy_(leaf)
        return self._buffers

    def join(self) -> None:
        """What is queued after this call runs after the copy. The host does not wait."""
        for device, copied in self._copied.items():
            torch.cuda.current_stream(device).wait_event(copied)

    def finish(self) -> None:
        """Wait, on the host, until the copy has ended."""
        for copied in self._copied.values():
            copied.synchronize()
        self._leaves = {}
