"""Programmatic dependent launch (Hopper and later): a kernel starts while the one before it on its stream still runs.

Between two kernels of a decoding step the card idles for a microsecond or more, which is as long as a small kernel
takes. Within `chain()`, a decoding kernel starts when all programs of the previous kernel have called `release`. It
starts to read, and calls `wait` before it uses results of the previous kernel.

Before its wait a kernel may only read tensors that the previous kernel does not write: weights, tables, the cache of
earlier tokens. Kernels before the previous one have ended by then, because the previous kernel calls release after its
own wait. Before its wait a kernel must not write anything. Every kernel must wait, even one with nothing left to do,
because later kernels rely on the whole chain.

When to release: at once, if the next kernel has much to read before its wait (with one row: its weights). Otherwise
near the end. A program that starts early is placed on any multiprocessor that is free, so of large programs, meant for
one multiprocessor each, two may share one while another stays idle.

Outside `chain()` kernels are launched as usual, because there the previous kernel may have written a weight.

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
    """A context in which decoding kernels are launched dependently, if the card supports it.

    The caller promises for each kernel: the previous kernel on the stream does not write the weights, table, angles,
    lengths, residual or earlier cache entries that this kernel reads.
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
    """Whether kernels on this tensor are launched dependently: the value for their PDL and launch_pdl."""
    return _CHAINED.get() and _supported(x.device)


@triton.jit
def wait(PDL: tl.constexpr):
    """Wait for all earlier kernels."""
    if PDL:
        tl.extra.cuda.gdc_wait()


@triton.jit
def release(PDL: tl.constexpr):
    """Let the next kernel start once all programs have called this. Only after `wait`."""
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
