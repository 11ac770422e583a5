"""Pipeline parallelism: a rank's gradients of all micro-batches of a step, by one of torch's pipeline schedules.

A pure function around functions of the slices, which know the model: parameters and micro-batches in, sums of gradients
and what the slices carried from micro-batch to micro-batch out. torch.distributed.pipelining orders the work and sends
hidden states; it wants a module a slice, which here owns nothing: for the time of a step it holds the leaves that the
step was given.

Leaves are per-layer views of the stack, and each adds its gradient to a row of the stack's sum, in float32, whatever
dtype it has itself.
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
      slices: where the layers are.
      programs: slice -> program(leaves, micro-batch, shared, carry, x) -> (out, carry). leaves: what select gave for
        it. shared: what the step gave for all micro-batches. carry: what the slice returned for the micro-batch before,
        None for the first; tensors, kept without gradients. x: the hidden states of the slice before, None on the
        first. out: hidden states for the next slice; of the last one, in training, the scalar to differentiate.
      select: this rank's leaves, stacks as tuples of their rows, -> slice -> the leaves of its program.
      empty_hidden: (micro-batch, params, device) -> an empty tensor like the hidden states between slices.
      stacked: the paths of stacks.
      deferred: what puts off weights' gradients, where the schedule does.
    """

    slices: Slices
    programs: Mapping[int, Program]
    select: Callable[[Leaves], Mapping[int, Any]]
    empty_hidden: Callable[[Any, Params, torch.device | str], Tensor]
    stacked: Set[str]
    deferred: Deferred | None = None


Gradients = Callable[[Params, Set[str], Sequence[Any], Any], tuple[Params, dict[int, Any]]]


def check(cfg: ModelConfig, pipeline: Pipeline, compile: str, ranks: int, microbatches: int) -> None:
    """UserError for what a pipeline over `ranks` ranks cannot run; as Pipeline.check and make_slices.

    compile: the mode, as in qwen3f.model.Execution.
    """
    pipeline.check(ranks, microbatches)
    make_slices(cfg, pipeline, ranks)
    check_compile(compile)
    if pipeline.schedule in _SPLIT and cfg.gradient_checkpointing == "selective":
        raise UserError(
            f"model.gradient_checkpointing=selective with config.pipeline.schedule={pipeline.schedule}, which keeps "
            "the inputs of matrix products anyway; write none or full"
        )
    if cfg.sparse_layers and cfg.router_balance in ("hf", "global_exact"):
        raise UserError(
            f"model.router_balance={cfg.router_balance} needs what all layers or all micro-batches count, which a "
            "slice of a pipeline doesn't know; write global or micro"
        )


def check_compile(compile: str) -> None:
    """UserError for a mode that no pipeline can run in."""
    if compile == "step":
        raise UserError("config.compile=step makes one graph, which a pipeline cannot be; write config.compile=block")


def make_gradients(model: SlicedModel, layout: Layout) -> Gradients:
    """gradients(params, trainable, microbatches, shared) -> (this rank's gradients, slice -> its last carry), over pp.

    Args (of the function):
      params: this rank's shards in the compute dtype; with layout.gather_dtype, those that FSDP cuts in the master
        dtype. Stacks hold its slices' rows (Slices.layer_order_of), padding included, which nothing reads. What is in
        no stack is there on every rank.
      trainable: the paths to differentiate by.
      microbatches: of one shape; the same on all ranks of pp.
      shared: given to every program.
    Gradients have the structure of the trainable params, summed over micro-batches in float32 (float64 for float64):
    zero for padding and for what another slice uses. They still need sum_replicated, which over pp adds up what the
    first and the last slice contribute to a tied embedding.

    All ranks call it together. Between calls it keeps torch's schedule, whose receive buffers hold the hidden states of
    all micro-batches and their gradients, for each shape of micro-batches it has seen. Raises UserError as
    Pipeline.check.
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
            stage.clear_runtime_states()  # gradients at the receive buffers
        return sums, {number: adapter.end() for number, adapter in adapters.items()}

    return gradients


class _Adapter(nn.Module):
    """A slice as torch's schedules want it. The first one is called without hidden states."""

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
    """torch 2.11 first tries the connections to both neighbours; to its own rank (zbv) gloo has none."""

    def _get_init_p2p_neighbors_ops(self) -> list[torch.distributed.P2POp]:
        return [op for op in super()._get_init_p2p_neighbors_ops() if op.group_peer != self.group_rank]


class _Attach(torch.autograd.Function):
    """x itself; its backward hands the attached scalar a gradient of one, so that it need not be sent on."""

    @staticmethod
    def forward(ctx: torch.autograd.function.FunctionCtx, x: Tensor, scalar: Tensor) -> Tensor:
        ctx.save_for_backward(torch.ones_like(scalar))
        return x.view_as(x)

    @staticmethod
    def backward(ctx: torch.autograd.function.FunctionCtx, grad: Tensor) -> tuple[Tensor, Tensor]:
        return grad, *ctx.saved_tensors


def attach(x: Tensor, scalar: Tensor) -> Tensor:
    """Hidden states for the next slice, x, whose backward pass differentiates a loss of this slice as well."""
    return _Attach.apply(x, scalar) if scalar.requires_grad else x


def _build(
    model: SlicedModel,
    layout: Layout,
    own: Mapping[int, nn.Module],
    microbatches: int,
    hidden: Tensor,
    device: torch.device,
) -> tuple[pipelining.schedules._PipelineSchedule, list[pipelining.PipelineStage]]:
    """torch's schedule and its stages, for micro-batches whose hidden states are like `hidden`, on the meta device.

    Shapes are told, so that torch need not run every slice once to learn them.
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
    # losses are normalised by the whole step's weight, so the sum of micro-batches is what is wanted
    options = {"n_microbatches": microbatches, "loss_fn": lambda loss, target: loss, "scale_grads": False}
    if layout.pipeline.schedule in _SINGLE:
        return _SINGLE[layout.pipeline.schedule](made[0], **options), made
    return _MULTI[layout.pipeline.schedule](made, **options), made


def _leaves(x: Tensor, total: Tensor | None, stacked: bool) -> Tensor | tuple[Tensor, ...]:
    """A leaf, or for a stack one for each of its rows. total: where its gradient goes; None of a frozen one."""
    if total is None:
        return x.detach().unbind(0) if stacked else x.detach()
    if not stacked:
        return _leaf(x, total)
    return tuple(_leaf(row, row_total) for row, row_total in zip(x.unbind(0), total.unbind(0), strict=True))


def _leaf(x: Tensor, total: Tensor) -> Tensor:
    """The same values as something to differentiate by; what autograd accumulates goes to `total`."""

    def move(leaf: Tensor) -> None:
        # not leaf.grad = total: dynamo refuses a leaf whose gradient has another dtype than its own
        if leaf.grad is not None:  # None where an operator gave no gradient: its weight's is put off
            total.add_(leaf.grad)
            leaf.grad = None

    leaf = x.detach().requires_grad_()
    leaf.register_post_accumulate_grad_hook(move)
    return leaf


def _detach(x: Tensor | None) -> Tensor | None:
    return None if x is None else x.detach()


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)
