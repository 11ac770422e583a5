"""Pipeline parallelism: a rank's gradients of all micro-batches of a step, by one of torch's pipeline schedules.

A pure function around per-stage functions: parameters and micro-batches in, sums of gradients and the rank's share of
the losses out. torch.distributed.pipelining orders the work and sends hidden states; it wants a module a stage, which
here owns nothing: for the time of a step it holds the leaves that the step was given.

Leaves are per-layer views of the stack, and each adds its gradient to a row of the stack's sum, in float32, whatever
dtype it has itself.

B batch · T sequence · D hidden · S sparse layers of the model · E experts
"""

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.distributed import pipelining
from torch.distributed.distributed_c10d import _resolve_process_group

from qwen3f import model, tree
from qwen3f import params as P
from qwen3f.config import ModelConfig
from qwen3f.errors import UserError
from qwen3f.model.stage_slice import Batch, Layers, SliceFn, check_compile, empty_hidden, make_slice, select_leaves
from qwen3f.train import balance
from qwen3f.train import objective as losses
from sharding.fsdp import sum_over
from sharding.layout import Layout
from sharding.pipeline.cut import Pipeline, Slices, make_slices
from sharding.pipeline.deferred_grads import Deferred

Gradients = Callable[[P.Params, Sequence[Batch], losses.Totals], tuple[P.Params, losses.Terms]]

_SINGLE = {"1f1b": pipelining.Schedule1F1B}
_SPLIT = {"zero_bubble": pipelining.ScheduleInterleavedZeroBubble, "zbv": pipelining.ScheduleZBVZeroBubble}
_MULTI = {"interleaved": pipelining.ScheduleInterleaved1F1B, **_SPLIT}


def check(cfg: ModelConfig, pipeline: Pipeline, execution: model.Execution, ranks: int, microbatches: int) -> None:
    """UserError for what a pipeline over `ranks` ranks cannot run; as Pipeline.check and make_slices."""
    pipeline.check(ranks, microbatches)
    make_slices(cfg, pipeline, ranks)
    check_compile(execution)
    if pipeline.schedule in _SPLIT and cfg.gradient_checkpointing == "selective":
        raise UserError(
            f"model.gradient_checkpointing=selective with config.pipeline.schedule={pipeline.schedule}, which keeps "
            "the inputs of matrix products anyway; write none or full"
        )
    if cfg.sparse_layers and cfg.router_balance in ("hf", "global_exact"):
        raise UserError(
            f"model.router_balance={cfg.router_balance} needs what all layers or all micro-batches count, which a "
            "stage of a pipeline doesn't know; write global or micro"
        )


def make_gradients(cfg: ModelConfig, pipeline: Pipeline, execution: model.Execution, layout: Layout) -> Gradients:
    """gradients(params, microbatches, totals) -> (this rank's gradients, its Terms), over pp of more than one rank.

    Args (of the function):
      params: this rank's shards in the compute dtype; with layout.gather_dtype, those that FSDP cuts in the master
        dtype. Stacks hold its stages' rows (Slices.layer_order_of), padding included, which nothing reads. Embedding,
        final norm and head are there on every rank.
      microbatches: of one shape; the same on all ranks of pp.
      totals: of the whole step.
    Gradients have the structure of params, summed over micro-batches in float32 (float64 for float64): zero for padding
    and for what another stage uses. They still need sum_replicated, which over pp adds up what the first and the last
    stage contribute to a tied embedding. Terms need losses.sum_ranks; their load has rows for all S layers, on each
    rank those of all stages.

    All ranks call it together. Between calls it keeps torch's schedule, whose receive buffers hold the hidden states of
    all micro-batches and their gradients, for each shape of micro-batches it has seen. Raises UserError as check.
    """
    axes = layout.axes
    stages = make_slices(cfg, pipeline, axes.pp.size)
    own, deferred = stages.slices_of(axes.pp.index), Deferred() if pipeline.schedule in _SPLIT else None
    programs = {stage: make_slice(cfg, execution, layout, stages, stage, deferred) for stage in own}
    adapters = {
        stage: _Adapter(_with_losses(cfg, layout, run, last=stage == stages.count - 1))
        for stage, run in programs.items()
    }
    built: dict[object, object] = {}

    def gradients(
        params: P.Params, microbatches: Sequence[Batch], totals: losses.Totals
    ) -> tuple[P.Params, losses.Terms]:
        check(cfg, pipeline, execution, axes.pp.size, len(microbatches))
        sums = {path: torch.zeros_like(x, dtype=_wide(x.dtype)) for path, x in params.items()}
        leaves = {path: _leaves(x, sums[path], path.startswith(P.LAYERS)) for path, x in params.items()}
        for stage, given in select_leaves(cfg, stages, axes.pp.index, leaves).items():
            adapters[stage].begin(*given, microbatches, totals)
        hidden = empty_hidden(cfg, layout, microbatches[0]["tokens"].shape, params, "meta")
        key = (len(microbatches), hidden.shape, hidden.dtype, params[P.EMBED].device)
        if key not in built:
            built[key] = _build(pipeline, layout, stages, adapters, deferred, len(microbatches), hidden, key[-1])
        schedule, torch_stages = built[key]
        numbers = torch.arange(len(microbatches))
        with torch.enable_grad():
            schedule.step(index=numbers, target=numbers, return_outputs=False)
        for stage in torch_stages:
            stage.clear_runtime_states()  # gradients at the receive buffers
        terms = [adapter.end() for adapter in adapters.values()]
        return sums, _join(cfg, stages, own, terms, layout)

    return gradients


class _Adapter(nn.Module):
    """A stage as torch's schedules want it. The first stage is called without hidden states."""

    def __init__(self, run: Callable[..., tuple[Tensor, losses.Terms]]) -> None:
        super().__init__()
        self.run = run
        self.given: tuple | None = None
        self.terms: losses.Terms | None = None

    def begin(self, *given: object) -> None:
        self.given, self.terms = given, None

    def end(self) -> losses.Terms:
        terms, self.given, self.terms = self.terms, None, None
        return terms

    def forward(self, x_BTD: Tensor | None = None, *, index: Tensor) -> Tensor:
        outer, layers, microbatches, totals = self.given
        others = None if self.terms is None else self.terms.load
        out, terms = self.run(outer, layers, microbatches[int(index)], totals, others, x_BTD)
        self.terms = losses.add_terms(self.terms, tree.map(_detach, terms))
        return out


class _Stage(pipelining.PipelineStage):
    """torch 2.11 first tries the connections to both neighbours; to its own rank (zbv) gloo has none."""

    def _get_init_p2p_neighbors_ops(self) -> list[torch.distributed.P2POp]:
        return [op for op in super()._get_init_p2p_neighbors_ops() if op.group_peer != self.group_rank]


def _with_losses(
    cfg: ModelConfig, layout: Layout, run: SliceFn, last: bool
) -> Callable[..., tuple[Tensor, losses.Terms]]:
    """step(outer, layers, batch, totals, others, x) -> (hidden states for the next stage or what is differentiated,
    Terms). others: the load of the step's earlier micro-batches. The rest as stage_program.make_slice."""

    def step(
        outer: P.Params,
        layers: Layers,
        batch: Batch,
        totals: losses.Totals,
        others: balance.Load | None,
        x: Tensor | None,
    ) -> tuple[Tensor, losses.Terms]:
        out, stats = run(outer, layers, batch, x, totals.weight)
        loss = out if last else torch.zeros((), dtype=_wide(out.dtype), device=out.device)
        terms = losses.token_terms(loss)
        if stats is not None:
            part = len(stats.counts) / len(cfg.sparse_layers)
            terms = losses.router_terms(cfg, stats, totals, others, layout.axes, part)._replace(loss=loss)
        objective = losses.add_router_losses(cfg, loss, terms)
        if last:
            return objective, terms
        return (_Attach.apply(out, objective) if objective.requires_grad else out), terms

    return step


class _Attach(torch.autograd.Function):
    """x itself; its backward hands the attached scalar a gradient of one, so that it need not be sent on."""

    @staticmethod
    def forward(ctx: torch.autograd.function.FunctionCtx, x: Tensor, scalar: Tensor) -> Tensor:
        ctx.save_for_backward(torch.ones_like(scalar))
        return x.view_as(x)

    @staticmethod
    def backward(ctx: torch.autograd.function.FunctionCtx, grad: Tensor) -> tuple[Tensor, Tensor]:
        return grad, *ctx.saved_tensors


def _join(
    cfg: ModelConfig, stages: Slices, own: Sequence[int], terms: Sequence[losses.Terms], layout: Layout
) -> losses.Terms:
    """A rank's Terms from those of its stages; its load from those of all ranks."""
    loss, aux, z = (sum(field[1:], start=field[0]) for field in list(zip(*terms))[:3])
    if not cfg.sparse_layers:
        return losses.Terms(loss, aux, z, None)
    columns_SE = torch.zeros(len(cfg.sparse_layers), cfg.num_experts + 2, dtype=torch.int64, device=loss.device)
    for stage, part in zip(own, terms):
        if part.load is not None:
            rows = [row for row, layer in enumerate(cfg.sparse_layers) if layer in stages.layers_of(stage)]
            counts, tokens, dropped = part.load
            columns_SE[rows] = torch.cat((counts, tokens[:, None], dropped[:, None]), 1)
    columns_SE = sum_over(columns_SE, layout.axes, ("pp",))
    return losses.Terms(loss, aux, z, balance.Load(columns_SE[:, :-2], columns_SE[:, -2], columns_SE[:, -1]))


def _build(
    pipeline: Pipeline,
    layout: Layout,
    stages: Slices,
    own: Mapping[int, nn.Module],
    deferred: Deferred | None,
    microbatches: int,
    hidden: Tensor,
    device: torch.device,
) -> tuple[pipelining.schedules._PipelineSchedule, list[pipelining.PipelineStage]]:
    """torch's schedule and its stages, for micro-batches whose hidden states are like `hidden`, on the meta device.

    Shapes are told, so that torch need not run every stage once to learn them.
    """
    hidden = hidden.requires_grad_()
    loss = torch.empty((), dtype=_wide(hidden.dtype), device="meta", requires_grad=True)
    group = _resolve_process_group(layout.axes.pp.group)
    made = [
        _Stage(
            adapter,
            stage,
            stages.count,
            device,
            input_args=() if stage == 0 else (hidden,),
            output_args=(loss if stage == stages.count - 1 else hidden,),
            group=group,
            dw_builder=deferred.take if deferred else None,
        )
        for stage, adapter in own.items()
    ]
    # losses are normalised by the whole step's weight, so the sum of micro-batches is what is wanted
    options = {"n_microbatches": microbatches, "loss_fn": lambda loss, target: loss, "scale_grads": False}
    if pipeline.schedule in _SINGLE:
        return _SINGLE[pipeline.schedule](made[0], **options), made
    return _MULTI[pipeline.schedule](made, **options), made


def _leaves(x: Tensor, total: Tensor, stacked: bool) -> Tensor | tuple[Tensor, ...]:
    """A leaf, or for a stack one for each of its rows."""
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
