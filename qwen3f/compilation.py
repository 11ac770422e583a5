"""All calls of torch.compile: one graph for each function and shape, and few shapes.

Compiled code has these values fixed; another value needs another graph:

- all sizes: rows of a micro-batch and sequence length (a run has one of each, its evaluation another); in step mode
  also the number of micro-batches, which are unrolled in the graph;
- the form of the inputs: dtypes, kind of mask, with or without padding marks and dropout, whether gradients are on, and
  whether the input of a block needs a gradient.

Everything that is data can change without another graph: the layer (all layers of a kind share a graph), the lengths of
documents, and the number of rows of each expert (together they are tokens · top-k rows, and offsets separate the
experts). With ep the number of rows from other ranks would be a size that changes in every call; those blocks run
uncompiled (qwen3f.model.block).

A function (a kind of block of one model, its update, or its step) can have at most MOST_SHAPES graphs. A run needs
three for each kind of block (training, with and without a gradient of the input, and evaluation) and one for the
update. The number of models in a process is not limited. torch keeps compiled code until the process ends.
"""

import functools
import types
from collections.abc import Callable
from typing import Any

import torch

from qwen3f.errors import UserError

MOST_SHAPES = 128

# Settings of torch._dynamo.config during a call of a compiled function, which may compile it.
_SETTINGS = {
    "automatic_dynamic_shapes": False,  # else sizes that have changed once become symbolic
    "recompile_limit": MOST_SHAPES,
    "trace_autograd_ops": True,  # torch.autograd.grad is part of the graph
}


def _made_anew(result: Any) -> Any:
    """The result in new tuples, lists and dicts. torch 2.11 returns a NamedTuple made by _replace as an empty one."""
    if isinstance(result, dict):
        return {key: _made_anew(value) for key, value in result.items()}
    if hasattr(result, "_fields"):
        return type(result)(*[_made_anew(value) for value in result])
    if isinstance(result, tuple | list):
        return type(result)([_made_anew(value) for value in result])
    return result


def compile_static(fn: Callable[..., Any], *, fullgraph: bool = True) -> Callable[..., Any]:
    """`fn`, compiled once for every shape that it is called with; torch.autograd.grad may be part of it.

    fullgraph: code that can't be traced is an error. False: it runs uncompiled, and so do calls beyond MOST_SHAPES.

    Raises UserError at the call that needs more than MOST_SHAPES graphs. Don't compile the result again as part of
    another function.
    """
    # not at the top: the import takes a second, and many processes compile nothing
    from torch._dynamo import config
    from torch._dynamo.exc import FailOnRecompileLimitHit

    def entry(*args: Any, **kwargs: Any) -> Any:
        return _made_anew(fn(*args, **kwargs))

    # torch counts graphs by code object, and a def has the same code object for all functions that it makes. Then the
    # limit would count the models of a process together. So each function gets its own code object.
    name = getattr(fn, "__name__", type(fn).__name__)
    code = entry.__code__.replace(co_name=name)  # the name is for torch's logs
    own = types.FunctionType(code, entry.__globals__, name, closure=entry.__closure__)
    compiled = torch.compile(own, fullgraph=fullgraph)
    # config.patch would take 30 µs for each call. torch.compile(dynamic=False) uses this faster patcher too.
    change = config._make_closure_patcher(**_SETTINGS)

    @functools.wraps(fn)
    def call(*args: Any, **kwargs: Any) -> Any:
        restore = change()
        try:
            return compiled(*args, **kwargs)
        except FailOnRecompileLimitHit as error:
            raise UserError(
                f"{name} was called with more than {MOST_SHAPES} shapes, each of which is compiled; use fewer batch "
                "sizes and lengths, or write --config.compile=off"
            ) from error
        finally:
            restore()

    return call
