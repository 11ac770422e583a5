"""Programmatic dependent launch (Hopper and later): a kernel starts while the one before it on its stream still runs.

Between two kernels of a decoding step the card idles for a microsecond or more, as long as a small one takes. Within
`chain()` a kernel of decoding starts when all programs of the one before have called `release`, begins to read, and
calls `wait` before it touches what that one computes.

What a kernel may do before its wait: read what the kernel just before it does not write. All earlier ones have ended by
then, since that kernel released this one after its own wait. So weights, tables and the cache of earlier tokens may be
read, what the kernel before has computed may not; and nothing may be written. Every kernel waits, also where it then
has nothing to do: what comes later relies on the whole chain.

When to release: at once where the next kernel has much to read before its wait (one row: its weights). Else near the
end: a program that starts early takes its place on a multiprocessor that happens to be free, so large programs, one a
multiprocessor, end up two on one and none on another.

Outside `chain()` a kernel is launched as usual: nothing says there that the kernel before it did not write a weight.

CUDA programming guide, "Programmatic dependent launch and synchronization". Valid under graph capture.
"""

import contextlib
import contextvars
import functools
from collections.abc import Iterator

import torch
from torch import Tensor

from kernels.backend import tl, triton

_CHAINED: contextvars.ContextVar[bool] = contextvars.ContextVar("chained", default=False)


@contextlib.contextmanager
def chain() -> Iterator[None]:
    """Within, kernels are launched dependently where the card can. The caller promises, for each kernel in it: the one
    just before it on the stream does not write what this one reads as weight, table, angle, length, residual or cache.
    """
    token = _CHAINED.set(True)
    try:
        yield
    finally:
        _CHAINED.reset(token)


@functools.cache
def _supported(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (9, 0)


def on(x: Tensor) -> bool:
    """Whether kernels on this tensor are launched this way: their PDL constant and their option launch_pdl."""
    return _CHAINED.get() and _supported(x.device)


@triton.jit
def wait(PDL: tl.constexpr):
    """Wait for all earlier kernels."""
    if PDL:
        tl.extra.cuda.gdc_wait()


@triton.jit
def release(PDL: tl.constexpr):
    """Let the next kernel start once all programs have come here. After the wait: see above."""
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
