"""Which implementation of an operator runs: Triton on CUDA, the plain formula on a CPU, Triton's interpreter in tests.

Kernel files import triton from this module, so that the package can also be imported on platforms without Triton
(macOS). There the formulas run, and `triton` and `tl` are empty stand-ins.
"""

import contextlib
import os
from collections.abc import Iterator
from types import SimpleNamespace

import torch
from torch import Tensor

try:
    import triton
    import triton.language as tl
except ImportError:  # no Triton for this platform
    triton = SimpleNamespace(jit=lambda fn=None, **options: fn or (lambda kernel: kernel))
    tl = SimpleNamespace(constexpr=object)

_interpreting = False


def runs_triton(*tensors: Tensor) -> bool:
    """Whether an operator on these tensors runs its Triton kernel: not for float64, as kernels sum in float32."""
    return all(x.dtype != torch.float64 and (x.is_cuda or _interpreting) for x in tensors)


@contextlib.contextmanager
def interpreted() -> Iterator[None]:
    """A context in which operators on CPU tensors run their kernels in Triton's interpreter: slow, for tests.

    Raises RuntimeError unless TRITON_INTERPRET=1 was set before triton was first imported.
    """
    global _interpreting
    if os.environ.get("TRITON_INTERPRET") != "1":
        raise RuntimeError(
            "Triton's interpreter needs TRITON_INTERPRET=1 in the environment before kernels are imported"
        )
    before, _interpreting = _interpreting, True
    try:
        yield
    finally:
        _interpreting = before


def check_devices(**tensors: Tensor) -> None:
    """ValueError naming the argument unless all tensors lie on the first one's device."""
    (first_name, first), *rest = tensors.items()
    for name, x in rest:
        if x.device != first.device:
            raise ValueError(f"{name} is on {x.device}, {first_name} on {first.device}; put them on one device")
