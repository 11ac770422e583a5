"""Function transforms: `grad_and_value` and `jit`, like those of JAX, over pytrees of torch tensors.

`torch.func.grad_and_value` refuses saved-tensor hooks (so no activation checkpointing), custom ops with a registered
autograd formula, and compiled functions. This version has the same signature and results, but uses
`torch.autograd.grad` over leaves made from the pytree, so all of these work.
"""

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from qwen3f import tree
from qwen3f.compilation import compile_static


def grad_and_value(
    fn: Callable[..., Any], argnums: int | tuple[int, ...] = 0, has_aux: bool = False
) -> Callable[..., Any]:
    """A function that returns (gradients, value), or (gradients, (value, aux)), of a scalar-valued `fn`.

    Args:
      fn: returns a 0-d floating tensor, or (that, aux) when has_aux. It must not write to its arguments.
      argnums: which positional arguments to differentiate; each is a pytree of floating tensors.
    Gradients have the structure, shape and dtype of those arguments; leaves that `fn` does not use get zeros. Value and
    aux are detached. Deviation from torch.func: only first derivatives; the result cannot be nested in torch.func
    transforms (the pure loss can).
    """

    @functools.wraps(fn)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        wanted = (argnums,) if isinstance(argnums, int) else argnums
        leaves, spec = tree.flatten(tuple(args[i] for i in wanted))
        for leaf in leaves:
            if not (isinstance(leaf, Tensor) and leaf.is_floating_point()):
                raise TypeError(f"grad_and_value: argument(s) {wanted} must hold floating tensors only, got {leaf!r}")
        with torch.enable_grad():
            variables = [_variable(leaf) for leaf in leaves]
            call = list(args)
            for i, value in zip(wanted, tree.unflatten(variables, spec)):
                call[i] = value
            result = fn(*call, **kwargs)
            value, aux = result if has_aux else (result, None)
            if not (isinstance(value, Tensor) and value.dim() == 0 and value.is_floating_point()):
                got = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
                raise TypeError(f"grad_and_value: the function must return a 0-d floating tensor, got {got}")
            gradients = torch.autograd.grad(value, variables, allow_unused=True, materialize_grads=True)
        gradients = tree.unflatten(list(gradients), spec)
        gradients = gradients[0] if isinstance(argnums, int) else gradients
        value = value.detach()
        return (gradients, (value, tree.map(_detach, aux))) if has_aux else (gradients, value)

    return wrapped


# A leaf of autograd that is always zero. Its device does not matter: a 0-d CPU tensor combines with any.
_ZERO = torch.zeros((), requires_grad=True)


def _variable(leaf: Tensor) -> Tensor:
    """The same values as a tensor that gradients can be taken for.

    torch 2.11 cannot trace requires_grad_(). Inside a compiled step, adding a zero that requires gradients does the
    same; it fuses with the cast to the compute dtype.
    """
    return leaf + _ZERO if torch.compiler.is_compiling() else leaf.detach().requires_grad_()


def _detach(x: Any) -> Any:
    return x.detach() if isinstance(x, Tensor) else x


def jit(fn: Callable[..., Any], *, compile: bool = True, donate: bool = False) -> Callable[..., Any]:
    """Compile a pure function into one graph for each shape (see compilation.py), with torch.autograd.grad inside it.

    donate: reuse the storage of the first argument, the state. `fn` must then return a tuple whose first element has
      the structure of that argument. Every changed leaf is written into the old leaf's storage and the old leaves are
      returned, so memory never holds two states. The caller must not use the old state again: it *is* the new one.
      Compiled, the write happens where the value is computed. Uncompiled, it happens after `fn`, so at its peak memory
      holds both.
    compile: False gives the same semantics without torch.compile.
    """
    body = _donating(fn) if donate else fn
    return compile_static(body) if compile else body


def _donating(fn: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(fn)
    def body(state: Any, *args: Any, **kwargs: Any) -> Any:
        new_state, *rest = fn(state, *args, **kwargs)
        old, spec = tree.flatten(state)
        new, new_spec = tree.flatten(new_state)
        if spec != new_spec:
            raise TypeError(f"donation: the state went in as {spec} and came out as {new_spec}")
        with torch.no_grad():
            for before, after in zip(old, new):
                if after is not before:
                    before.copy_(after)
        return (state, *rest)

    return body
