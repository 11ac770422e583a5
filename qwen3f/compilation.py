"""How this project calls torch.compile, in one place: one graph a function and shape, and few shapes.

What is fixed in compiled code, so that another value means another graph:

- all sizes: rows of a micro-batch and sequence length (a run has one of each, and its evaluation one); in step mode the
  number of micro-batches too, which are repeated in the graph;
- the form of the inputs: dtypes, which kind of mask, with or without padding marks and dropout, whether gradients are
  on, and whether a block's input needs one.

What changes from call to call without another graph: everything that is data. That is the layer (all layers of a kind
share a graph), the lengths of documents, and how many rows each expert gets: together they are tokens · top-k rows, and
each expert's share lies in offsets. Under ep the rows that come from other ranks would be a size, another one every
time; those blocks run uncompiled (qwen3f.model.block).

How many: MOST_SHAPES graphs of one function, which is one kind of block of one model, its update or its step.
A run needs three a kind of block (training, with and without a gradient of the input, and evaluation) and one
update. The number of models in a process is not limited. torch keeps compiled code until the process ends.
"""

import functools
import types
from collections.abc import Callable
from typing import Any

import torch

from qwen3f.errors import UserError

MOST_SHAPES = 128

# Of torch._dynamo.config, while a compiled function is called and with it perhaps compiled.
_SETTINGS = {
    "automatic_dynamic_shapes": False,  # else sizes that have changed once become symbols
    "recompile_limit": MOST_SHAPES,
    "trace_autograd_ops": True,  # torch.autograd.grad is part of the graph
}


def _made_anew(result: Any) -> Any:
    """The same tuples, lists and dicts. torch 2.11 gives back what a NamedTuple's _replace has made as an empty one."""
    if isinstance(result, dict):
        return {key: _made_anew(value) for key, value in result.items()}
    if hasattr(result, "_fields"):
        return type(result)(*[_made_anew(value) for value in result])
    if isinstance(result, tuple | list):
        return type(result)([_made_anew(value) for value in result])
    return result


def compile_static(fn: Callable[..., Any], *, fullgraph: bool = True) -> Callable[..., Any]:
    """`fn`, compiled anew for every shape that it is called with; torch.autograd.grad may be part of it.

    fullgraph: what can't be traced is an error. False: it runs uncompiled, and so does what exceeds MOST_SHAPES.

    Raises UserError at the call that needs more than MOST_SHAPES graphs. Don't compile the result again as part of
    another function.
    """
    # not at the top: the import takes a second, and many processes compile nothing
    from torch._dynamo import config
    from torch._dynamo.exc import FailOnRecompileLimitHit

    def entry(*args: Any, **kwargs: Any) -> Any:
        return _made_anew(fn(*args, **kwargs))

    # torch counts the graphs of a code object, and a def has one for all the functions that it makes. By that count the
    # ninth model of a process would find no room. So each function gets a code object of its own.
    name = getattr(fn, "__name__", type(fn).__name__)
    code = entry.__code__.replace(co_name=name)  # the name is for torch's logs
    own = types.FunctionType(code, entry.__globals__, name, closure=entry.__closure__)
    compiled = torch.compile(own, fullgraph=fullgraph)
    # config.patch would take 30 µs a call; this takes about as long as torch.compile(dynamic=False), which does it too
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
