"""Pipeline parallelism: a rank's gradients of all micro-batches of a step, by one of torch's pipeline schedules.

make_gradients returns a pure function. It takes parameters and micro-batches, calls the slices' functions, which know
the model, and returns sums of gradients and each slice's last carry (what a slice passes from one micro-batch to the
next). torch.distributed.pipelining orders the work and sends hidden states. It needs one nn.Module per slice; these
modules own no parameters and only hold the leaves of the current step.

Leaves are per-layer views of the stacks. Each leaf adds its gradient to a row of the stack's sum, which is float32
whatever the leaf's dtype.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence, Set
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed import pipelining
from torch.distributed.distributed_c10d import _resolve_process_group

from qwen3f import tree
from qwen3f.config import ModelConfig
from qwen3f.errors import UserError
from sharding.layout import Layout
from sharding.pipeline.cut import Pipeline, Slices, make_slices
from sharding.pipeline.deferred_grads import Deferred

Params = dict[str, Tensor]
Leaves = Mapping[str, Tensor | tuple[Tensor, ...]]
Program = Callable[[Any, Any, Any, Any, Tensor | None], tuple[Any, Any]]

_SINGLE = {"1f1b": pipelining.Schedule1F1B}
_SPLIT = {"zero_bubble": pipelining.ScheduleInterleavedZeroBubble, "zbv": pipelining.ScheduleZBVZeroBubble}
_MULTI = {"interleaved": pipelining.ScheduleInterleaved1F1B, **_SPLIT}


@dataclasses.dataclass(frozen=True)
class SlicedModel:
    """A model as a pipeline sees it: functions of the slices that this rank has.

    Attributes:
      slices: which slice and rank holds which layers.
      programs: slice -> program(leaves, micro-batch, shared, carry, x) -> (out, carry). leaves: from select. shared: a
        value that all micro-batches of the step get. carry: the carry that the slice returned for the previous
        micro-batch (None for the first), a pytree of tensors, detached. x: the previous slice's hidden states, None on
        the first slice. out: hidden states for the next slice; in training the last slice returns the scalar to
        differentiate instead.
      select: (this rank's leaves; a stack is a tuple of its rows) -> {slice: the leaves of its program}.
      empty_hidden: (micro-batch, params, device) -> an empty tensor like the hidden states between slices.
      stacked: the paths of parameters that are stacks.
      deferred: the mode that defers weights' gradients; None if the schedule does not split the backward pass.
    """

    slices: Slices
    programs: Mapping[int, Program]
    select: Callable[[Leaves], Mapping[int, Any]]
    empty_hidden: Callable[[Any, Params, torch.device | str], Tensor]
    stacked: Set[str]
    deferred: Deferred | None = None


Gradients = Callable[[Params, Set[str], Sequence[Any], Any], tuple[Params, dict[int, Any]]]


def check(cfg: ModelConfig, pipeline: Pipeline, compile: str, ranks: int, microbatches: int) -> None:
    """UserError for a configuration that a pipeline over `ranks` ranks cannot run (also Pipeline.check, make_slices).

    compile: the mode, as in qwen3f.model.Execution.
    """
    pipeline.check(ranks, microbatches)
    make_slices(cfg, pipeline, ranks)
    check_compile(compile)
    if pipeline.schedule in _SPLIT and cfg.gradient_checkpointing == "selective":
        raise UserError(
            f"model.gradient_checkpointing=selective saves nothing with config.pipeline.schedule={pipeline.schedule}, "
            "which keeps the inputs of matrix products anyway; write none or full"
        )
    if cfg.sparse_layers and cfg.router_balance in ("hf", "global_exact"):
        raise UserError(
            f"model.router_balance={cfg.router_balance} needs the experts' counts of all layers or all micro-batches, "
            "which a stage of a pipeline doesn't know; write model.router_balance=global or micro"
        )


def check_compile(compile: str) -> None:
    """UserError for a compilation mode that a pipeline cannot use."""
    if compile == "step":
        raise UserError(
            "config.compile=step compiles the step into one graph, which a pipeline cannot be; write "
            "config.compile=block"
        )


def make_gradients(model: SlicedModel, layout: Layout) -> Gradients:
    """gradients(params, trainable, microbatches, shared) -> (this rank's gradients, {slice: its last carry}).

    Args (of the function):
      params: this rank's shards in the compute dtype; with layout.gather_dtype, those that FSDP cuts are in the master
        dtype. Stacks hold the rows of this rank's slices (Slices.layer_order_of) and padding rows, which nothing reads.
        Parameters outside the stacks are present on every rank.
      trainable: the paths to differentiate by.
      microbatches: all of one shape; the same on all ranks of pp.
      shared: passed to every program.
    Gradients have the structure of the trainable params and are summed over micro-batches in float32 (float64 for
    float64). They are zero for padding and for parameters that only other slices use. They still need sum_replicated:
    over pp it adds the first and the last slice's gradients of a tied embedding.

    All ranks call it together. For each shape of micro-batches it has seen, it keeps torch's schedule, whose receive
    buffers hold the hidden states of all micro-batches and their gradients. Raises UserError as Pipeline.check.
    """
    pp = layout.axes.pp
    adapters = {number: _Adapter(run) for number, run in model.programs.items()}
    built: dict[object, object] = {}

    def gradients(
        params: Params, trainable: Set[str], microbatches: Sequence[Any], shared: Any
    ) -> tuple[Params, dict[int, Any]]:
        layout.pipeline.check(pp.size, len(microbatches))
        sums = {path: torch.zeros_like(x, dtype=_wide(x.dtype)) for path, x in params.items() if path in trainable}
        leaves = {path: _leaves(x, sums.get(path), path in model.stacked) for path, x in params.items()}
        for number, given in model.select(leaves).items():
            adapters[number].begin(given, microbatches, shared)
        hidden = model.empty_hidden(microbatches[0], params, "meta")
        device = next(iter(params.values())).device
        key = (len(microbatches), hidden.shape, hidden.dtype, device)
        if key not in built:
            built[key] = _build(model, layout, adapters, len(microbatches), hidden, device)
        schedule, torch_stages = built[key]
        numbers = torch.arange(len(microbatches))
        with torch.enable_grad():
            schedule.step(index=numbers, target=numbers, return_outputs=False)
        for stage in torch_stages:
            stage.clear_runtime_states()  # frees the gradients of the receive buffers
        return sums, {number: adapter.end() for number, adapter in adapters.items()}

    return gradients


class _Adapter(nn.Module):
    """A slice as an nn.Module, for torch's schedules, which call the first slice's without hidden states.

    begin, before a step, sets what the program gets; end, after it, returns the last carry.
    """

    def __init__(self, run: Program) -> None:
        super().__init__()
        self.run = run
        self.given: tuple | None = None
        self.carry: Any = None

    def begin(self, *given: object) -> None:
        self.given, self.carry = given, None

    def end(self) -> Any:
        carry, self.given, self.carry = self.carry, None, None
        return carry

    def forward(self, x_BTD: Tensor | None = None, *, index: Tensor) -> Tensor:
        leaves, microbatches, shared = self.given
        out, carry = self.run(leaves, microbatches[int(index)], shared, self.carry, x_BTD)
        self.carry = tree.map(_detach, carry)
        return out


class _Stage(pipelining.PipelineStage):
    """torch 2.11 first tests the connections to both neighbours. With zbv a neighbour can be on the same rank; gloo has
    no connection from a rank to itself, so that one is skipped."""

    def _get_init_p2p_neighbors_ops(self) -> list[torch.distributed.P2POp]:
        return [op for op in super()._get_init_p2p_neighbors_ops() if op.group_peer != self.group_rank]


class _Attach(torch.autograd.Function):
    """Returns x. Its backward pass gives the attached scalar a gradient of one, so the scalar is not sent on."""

    @staticmethod
    def forward(ctx: torch.autograd.function.FunctionCtx, x: Tensor, scalar: Tensor) -> Tensor:
        ctx.save_for_backward(torch.ones_like(scalar))
        return x.view_as(x)

    @staticmethod
    def backward(ctx: torch.autograd.function.FunctionCtx, grad: Tensor) -> tuple[Tensor, Tensor]:
        return grad, *ctx.saved_tensors


def attach(x: Tensor, scalar: Tensor) -> Tensor:
    """x, hidden states for the next slice; their backward pass also differentiates `scalar`, a loss of this slice."""
    return _Attach.apply(x, scalar) if scalar.requires_grad else x


def _build(
    model: SlicedModel,
    layout: Layout,
    own: Mapping[int, nn.Module],
    microbatches: int,
    hidden: Tensor,
    device: torch.device,
) -> tuple[pipelining.schedules._PipelineSchedule, list[pipelining.PipelineStage]]:
    """torch's schedule and its stages. hidden: a tensor on the meta device, shaped as a micro-batch's hidden states.

    own: slice -> its module, for this rank's slices. Shapes are given, so torch need not run every slice to learn them.
    """
    hidden, count = hidden.requires_grad_(), model.slices.count
    loss = torch.empty((), dtype=_wide(hidden.dtype), device="meta", requires_grad=True)
    group = _resolve_process_group(layout.axes.pp.group)
    made = [
        _Stage(
            adapter,
            number,
            count,
            device,
            input_args=() if number == 0 else (hidden,),
            output_args=(loss if number == count - 1 else hidden,),
            group=group,
            dw_builder=model.deferred.take if model.deferred else None,
        )
        for number, adapter in own.items()
    ]
    # each loss is already divided by the whole step's weight, so micro-batches are summed, not averaged
    options = {"n_microbatches": microbatches, "loss_fn": lambda loss, target: loss, "scale_grads": False}
    if layout.pipeline.schedule in _SINGLE:
        return _SINGLE[layout.pipeline.schedule](made[0], **options), made
    return _MULTI[layout.pipeline.schedule](made, **options), made


def _leaves(x: Tensor, total: Tensor | None, stacked: bool) -> Tensor | tuple[Tensor, ...]:
    """The parameter as a leaf; a stack as one leaf per row. total: the sum of its gradients; None if it is frozen."""
    if total is None:
        return x.detach().unbind(0) if stacked else x.detach()
    if not stacked:
        return _leaf(x, total)
    return tuple(_leaf(row, row_total) for row, row_total in zip(x.unbind(0), total.unbind(0), strict=True))


def _leaf(x: Tensor, total: Tensor) -> Tensor:
    """x as a leaf of the autograd graph, without a copy; its gradients are added to `total`."""

    def move(leaf: Tensor) -> None:
        # not leaf.grad = total: dynamo refuses a leaf whose gradient has a different dtype
        if leaf.grad is not None:  # None: the weight's gradient is deferred
            total.add_(leaf.grad)
            leaf.grad = None

    leaf = x.detach().requires_grad_()
    leaf.register_post_accumulate_grad_hook(move)
    return leaf


def _detach(x: Tensor | None) -> Tensor | None:
    return None if x is None else x.detach()


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)
