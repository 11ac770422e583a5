"""One row of the benchmark: a kernel at a shape, its inputs, and all implementations that are compared."""

import dataclasses
import functools
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from kernels.bench import timing

Entry = Callable[..., Tensor | tuple[Tensor, ...]]


class LeftOut(Exception):
    """Raised by an implementation that does not run on a case. Its text is the reason, such as "does not fit"."""


@dataclasses.dataclass(frozen=True)
class Case:
    """One row of the table.

    Attributes:
      kernel, shape: texts for the table.
      inputs: makes new random inputs on the device; those that require gradients are differentiated.
      entries: name -> function of the inputs, "ours" first. For a rival that raises (not installed, out of memory) the
        table shows the reason instead of a time.
      forward, backward: bytes that a perfect kernel moves (each input and output once), or FLOPs (see `unit`).
      unit: "bytes" or "flops".
      joint: time forward and backward pass together (gradients are made in the forward pass); `forward` counts both.
      copies: if above 0, this many sets of inputs are used in turn within one CUDA graph, for calls of microseconds.
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
    """Milliseconds; backward is None if it is not timed separately. note: why there is no time."""

    forward: float | None
    backward: float | None
    note: str = ""


def measure(case: Case, name: str) -> Measured:
    entry, inputs = case.entries[name], case.inputs()
    wanted = [x for x in inputs if isinstance(x, Tensor) and x.requires_grad]
    try:
        outputs = _tensors(entry(*inputs))
    except Exception as error:  # a rival may raise anything: not installed, another interface, out of memory
        if name == "ours":
            raise
        name = "" if isinstance(error, LeftOut) else f"{type(error).__name__}: "
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
    # inputs keep requires_grad, because saving tensors for the backward pass is part of the forward pass's cost
    forward = timing.milliseconds(lambda: entry(*inputs))
    if not wanted:
        return Measured(forward, None)
    backward = timing.milliseconds(lambda: torch.autograd.grad(differentiable, wanted, grads, retain_graph=True))
    return Measured(forward, backward)


def _tensors(outputs: Tensor | tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return (outputs,) if isinstance(outputs, Tensor) else tuple(y for y in outputs if isinstance(y, Tensor))
