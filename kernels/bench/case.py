"""One row of the benchmark: a kernel at a shape, its inputs, and everything that computes the same."""

import dataclasses
import functools
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from kernels.bench import timing

Entry = Callable[..., Tensor | tuple[Tensor, ...]]


@dataclasses.dataclass(frozen=True)
class Case:
    """
    Attributes:
      kernel, shape: what the table says.
      inputs: makes fresh random inputs on the device; those that require gradients are differentiated.
      entries: name -> function of the inputs, "ours" first. A rival that raises (not installed, out of memory) is left
        out of the table with the reason.
      forward, backward: bytes that a perfect kernel moves, each input and output once; or FLOPs (see `unit`).
      unit: "bytes" or "flops".
      joint: forward and backward are timed together (gradients are made in the forward); `forward` counts both.
      copies: above 0, so many sets of inputs are called in turn within one CUDA graph, for calls of microseconds.
    """

    kernel: str
    shape: str
    inputs: Callable[[], tuple[object, ...]]
    entries: Mapping[str, Entry]
    forward: float
    backward: float
    unit: str
    joint: bool = False
    copies: int = 0


@dataclasses.dataclass(frozen=True)
class Measured:
    """Milliseconds; backward None where there is none of its own. note: why there is no figure."""

    forward: float | None
    backward: float | None
    note: str = ""


def measure(case: Case, name: str) -> Measured:
    entry, inputs = case.entries[name], case.inputs()
    wanted = [x for x in inputs if isinstance(x, Tensor) and x.requires_grad]
    try:
        outputs = _tensors(entry(*inputs))
    except Exception as error:
        if name == "ours":
            raise
        name = "" if isinstance(error, NotImplementedError) else f"{type(error).__name__}: "
        return Measured(None, None, name + str(error).partition("\n")[0][:80])
    if case.copies:
        sets = [inputs, *(case.inputs() for _ in range(case.copies - 1))]
        return Measured(timing.milliseconds_in_a_graph([functools.partial(entry, *x) for x in sets]), None)
    differentiable = [y for y in outputs if y.requires_grad]
    grads = [torch.randn_like(y) for y in differentiable]
    if case.joint:

        def both() -> None:
            ys = [y for y in _tensors(entry(*inputs)) if y.requires_grad]
            torch.autograd.grad(ys, wanted, grads)

        return Measured(timing.milliseconds(both), None)
    # Inputs keep requires_grad: what a forward pass stores for its backward is part of its cost.
    forward = timing.milliseconds(lambda: entry(*inputs))
    if not wanted:
        return Measured(forward, None)
    backward = timing.milliseconds(lambda: torch.autograd.grad(differentiable, wanted, grads, retain_graph=True))
    return Measured(forward, backward)


def _tensors(outputs: Tensor | tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return (outputs,) if isinstance(outputs, Tensor) else tuple(y for y in outputs if isinstance(y, Tensor))
