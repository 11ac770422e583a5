"""Programmatic dependent launch (Hopper and later): a kernel starts while the one before it on its stream still runs.

Between two kernels of a decoding step the card idles for a microsecond or more, as long as a small one takes. A kernel
launched this way takes free places at once, has its weights fetched into L2, and waits there for the kernel before it.
It must wait before it reads or writes anything that an earlier kernel may touch, also where it then has nothing to do:
what comes later relies on the whole chain.

CUDA programming guide, "Programmatic dependent launch and synchronization". Valid under graph capture.
"""

import functools

import torch
from torch import Tensor

from kernels.backend import tl, triton

# On one H100 decoding was slower with it: Qwen3-0.6B at batch 1 676 tokens/s against 758, at 64 24,728 against 26,297.
ENABLED = False


@functools.cache
def _supported(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (9, 0)


def on(x: Tensor) -> bool:
    """Whether kernels on this tensor are launched this way: their PDL constant and their option launch_pdl."""
    return ENABLED and _supported(x.device)


@triton.jit
def wait(PDL: tl.constexpr):
    """Wait for all earlier kernels; then let the next one start."""
    if PDL:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()


@triton.jit
def prefetch(pointers):
    """Have the L2 lines of these addresses fetched; nothing waits for them."""
    tl.inline_asm_elementwise(
        "prefetch.global.L2 [$1]; mov.u32 $0, 0;", "=r,l", [pointers], dtype=tl.int32, is_pure=False, pack=1
    )
