"""Computes the gradients of linear layers' weights later than the rest of the backward pass.

Zero-bubble schedules (Qi et al. 2023, arXiv:2401.10241) fill their bubbles with this work. A backward pass under
`Deferred` computes everything except one product per linear layer, dyᵀ·x, for which it keeps x and dy. So autograd
walks the graph once and recomputes once, and operators that compute gradients in their forward pass (the fused loss)
work. torch's pipelining can instead walk the graph twice; such operators allow only one walk, and torch 2.11 computes
wrong gradients for operators with several outputs.

N tokens · I inputs · O outputs
"""

import functools
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.graph import GradientEdge, get_gradient_edge
from torch.overrides import TorchFunctionMode

Put = tuple[GradientEdge, Tensor, Tensor]


class Deferred(TorchFunctionMode):
    """A torch function mode. F.linear (also within nn.Linear) defers the gradient of its weight. Compiled code is not
    affected.

    Run the forward pass within the mode, and its recomputation too. autograd leaves the mode when it calls a recomputed
    function, so wrap that function itself (`within`).
    """

    def __init__(self) -> None:
        super().__init__()
        self.waiting: list[Put] = []

    def __torch_function__(
        self, func: Callable, types: Sequence[type], args: tuple = (), kwargs: dict | None = None
    ) -> object:
        kwargs = kwargs or {}
        if func is F.linear and torch.is_grad_enabled():
            return self._linear(*args, **kwargs)
        return func(*args, **kwargs)

    def _linear(self, input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        if not weight.requires_grad:
            return F.linear(input, weight, bias)
        return _Linear.apply(input, weight, bias, get_gradient_edge(weight), self)

    def within(self, fn: Callable[..., object]) -> Callable[..., object]:
        """fn, run within the mode."""

        @functools.wraps(fn)
        def run(*args: object) -> object:
            with self:
                return fn(*args)

        return run

    def take(self) -> Callable[[], None]:
        """A function that computes and accumulates the gradients deferred so far. The mode's list becomes empty."""
        waiting, self.waiting = self.waiting, []
        return functools.partial(_accumulate, waiting)


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: torch.autograd.function.FunctionCtx,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        edge: GradientEdge,
        deferred: Deferred,
    ) -> Tensor:
        ctx.save_for_backward(x, weight)
        # where the gradient goes: saved weights may come back as recomputed copies
        ctx.edge, ctx.deferred, ctx.has_bias = edge, deferred, bias is not None
        return F.linear(x, weight, bias)

    @staticmethod
    def backward(ctx: torch.autograd.function.FunctionCtx, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, weight_OI = ctx.saved_tensors
        ctx.deferred.waiting.append((ctx.edge, x.detach(), dy))
        return dy @ weight_OI, None, dy.flatten(0, -2).sum(0) if ctx.has_bias else None, None, None


def _accumulate(waiting: list[Put]) -> None:
    """Compute the deferred gradients and pass them to autograd.

    Gradients of leaves are passed on one by one, so that only one is in memory. Gradients of weights that FSDP gathered
    go in one backward call, because weights gathered together are reduce-scattered together.
    """
    gathered = []
    for edge, x, dy in waiting:
        grad_OI = dy.flatten(0, -2).t() @ x.flatten(0, -2)
        if edge.node.next_functions:
            gathered.append((edge, grad_OI))
        else:
            torch.autograd.backward((edge,), (grad_OI,))
    if gathered:
        torch.autograd.backward(*zip(*gathered))
