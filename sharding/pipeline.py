"""Pipeline parallelism: a rank's gradients of all micro-batches of a step, by one of torch's pipeline schedules.

A pure function around per-stage functions: parameters and micro-batches in, sums of gradients and the rank's share of
the losses out. torch.distributed.pipelining orders the work and sends hidden states; it wants a module a stage, which
here owns nothing: for the time of a step it holds the leaves that the step was given.

Leaves are per-layer views of the stack, and each adds its gradient to a row of the stack's sum, in float32, whatever
dtype it has itself.

B batch · T sequence · D hidden · S sparse layers of the model (s: of the stage) · E experts
"""

import functools
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.distributed import pipelining
from torch.distributed.distributed_c10d import _resolve_process_group
from torch.utils.checkpoint import checkpoint

from kernels import cross_entropy
from qwen3f import model, tree
from qwen3f import params as P
from qwen3f.config import ModelConfig
from qwen3f.errors import UserError
from qwen3f.model.attention import batch_mask
from qwen3f.model.block import BlockFn, block_fn
from qwen3f.model.norm import rms_norm
from qwen3f.model.rope import rope_tables
from qwen3f.model.transformer import layer_stacks
from qwen3f.train import balance, losses
from sharding import tensor
from sharding.axes import DATA
from sharding.deferred import Deferred
from sharding.fsdp import sum_over
from sharding.layout import Layout
from sharding.stages import Pipeline, Stages, make_stages

Batch = Mapping[str, Tensor]
Gradients = Callable[[P.Params, Sequence[Batch], losses.Totals], tuple[P.Params, losses.Terms]]

_SINGLE = {"1f1b": pipelining.Schedule1F1B}
_SPLIT = {"zero_bubble": pipelining.ScheduleInterleavedZeroBubble, "zbv": pipelining.ScheduleZBVZeroBubble}
_MULTI = {"interleaved": pipelining.ScheduleInterleaved1F1B, **_SPLIT}


def check(cfg: ModelConfig, pipeline: Pipeline, execution: model.Execution, ranks: int, microbatches: int) -> None:
    """UserError for what a pipeline over `ranks` ranks cannot run; as Pipeline.check and make_stages."""
    pipeline.check(ranks, microbatches)
    make_stages(cfg, pipeline, ranks)
    if execution.compile == "step":
        raise UserError("config.compile=step makes one graph, which a pipeline cannot be; write config.compile=block")
    if pipeline.schedule in _SPLIT and execution.compile != "off":
        raise UserError(
            f"config.pipeline.schedule={pipeline.schedule} puts off weights' gradients, which compiled code cannot; "
            "write config.compile=off, or another schedule"
        )
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
      params: this rank's shards in the compute dtype. Stacks hold its stages' rows (Stages.layer_order_of), padding
        included, which nothing reads. Embedding, final norm and head are there on every rank.
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
    stages = make_stages(cfg, pipeline, axes.pp.size)
    own, deferred = stages.stages_of(axes.pp.index), Deferred() if pipeline.schedule in _SPLIT else None
    adapters = {stage: _Adapter(_make_stage(cfg, execution, layout, stages, stage, deferred)) for stage in own}
    orders = {path: stages.layer_order_of(axes.pp.index, kind) for path, kind in layer_stacks(cfg).items()}
    built: dict[object, object] = {}

    def gradients(
        params: P.Params, microbatches: Sequence[Batch], totals: losses.Totals
    ) -> tuple[P.Params, losses.Terms]:
        check(cfg, pipeline, execution, axes.pp.size, len(microbatches))
        sums = {path: torch.zeros_like(x, dtype=_wide(x.dtype)) for path, x in params.items()}
        for stage, adapter in adapters.items():
            leaves = {path: _leaf(params[path], sums[path]) for path in _outer_paths(cfg, stages, stage)}
            layers: dict[int, P.Params] = {layer: {} for layer in stages.layers_of(stage)}
            for path, order in orders.items():
                for layer, row, total in zip(order, params[path].unbind(0), sums[path].unbind(0), strict=True):
                    if layer in layers:
                        layers[layer][path.removeprefix(P.LAYERS)] = _leaf(row, total)
            adapter.begin(leaves, layers, microbatches, totals)
        key = (len(microbatches), microbatches[0]["tokens"].shape, params[P.EMBED].dtype, params[P.EMBED].device)
        if key not in built:
            built[key] = _build(cfg, pipeline, layout, stages, adapters, deferred, *key)
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


def _make_stage(
    cfg: ModelConfig, execution: model.Execution, layout: Layout, stages: Stages, stage: int, deferred: Deferred | None
) -> Callable[..., tuple[Tensor, losses.Terms]]:
    """run(outer, layers, batch, totals, others, x) -> (hidden states for the next stage or what is differentiated,
    Terms).

    outer: what the stage uses of embedding, norm and head. layers: layer -> its parameters. others: the load of the
    step's earlier micro-batches. x [B, T, D]; None on the first stage.
    """
    axes, first, last = layout.axes, stage == 0, stage == stages.count - 1
    kinds = {layer: cfg.is_sparse(layer) for layer in stages.layers_of(stage)}
    blocks = {sparse: _block(cfg, execution, sparse, layout, deferred) for sparse in {*kinds.values()}}
    whole = model.make_outer(cfg, layout)

    def run(
        outer: P.Params,
        layers: Mapping[int, P.Params],
        batch: Batch,
        totals: losses.Totals,
        others: balance.Load | None,
        x: Tensor | None,
    ) -> tuple[Tensor, losses.Terms]:
        tokens, positions = batch["tokens"], batch.get("positions")
        if positions is None:
            positions = torch.arange(tokens.shape[1], device=tokens.device).expand(tokens.shape)
        outer = whole(outer)
        if first:
            x = tensor.embedding(tokens, outer[P.EMBED], axes.tp)
        cos, sin = rope_tables(cfg, positions, x.dtype)
        mask = batch_mask(batch, execution.attention, cfg.head_dim, axes.cp)
        real = model.real_tokens(batch)
        routed = []
        for layer, sparse in kinds.items():
            x, *stats = blocks[sparse](layers[layer], x, cos, sin, mask, real if sparse else None, None)
            if sparse:
                routed.append(stats)
        zero = torch.zeros((), dtype=_wide(x.dtype), device=x.device)
        objective, terms = zero, losses.Terms(zero, zero, zero, None)
        if routed:
            stats = model.RouterStats(*(torch.stack(field) for field in zip(*routed, strict=True)))
            objective, terms = _router_losses(cfg, layout, stats, len(routed) / len(cfg.sparse_layers), totals, others)
        if not last:
            return (_Attach.apply(x, objective) if objective.requires_grad else x), terms
        hidden = rms_norm(x, outer[P.FINAL_NORM], cfg.rms_norm_eps)
        loss = _token_loss(execution, layout, hidden, model.head_weight(cfg, outer), batch, totals.weight)
        return loss + objective, terms._replace(loss=loss)

    return run


def _block(
    cfg: ModelConfig, execution: model.Execution, sparse: bool, layout: Layout, deferred: Deferred | None
) -> BlockFn:
    """As block_fn; with its weights' gradients put off. Recomputation then stands around `deferred`."""
    if deferred is None:
        return block_fn(cfg, execution, sparse, layout)
    run = deferred.within(block_fn(cfg.replace(gradient_checkpointing="none"), execution, sparse, layout))
    if cfg.gradient_checkpointing == "none":
        return run
    return functools.partial(checkpoint, run, use_reentrant=False, preserve_rng_state=False)


def _router_losses(
    cfg: ModelConfig,
    layout: Layout,
    stats: model.RouterStats,
    part: float,
    totals: losses.Totals,
    others: balance.Load | None,
) -> tuple[Tensor, losses.Terms]:
    """(what is differentiated, Terms without a next-token loss) of a stage that has `part` of the sparse layers."""
    counts, tokens, dropped = balance.load_of(stats)
    columns_sE = sum_over(torch.cat((counts, tokens[:, None], dropped[:, None]), 1), layout.axes, DATA)
    load = balance.Load(columns_sE[:, :-2], columns_sE[:, -2], columns_sE[:, -1])
    share = part / layout.axes.tp.size  # the routers of all ranks of tp see the same tokens
    aux = share * balance.balance_loss(cfg.router_balance, stats, load, others, totals.tokens)
    z = share * balance.z_loss(stats, totals.tokens)
    objective = cfg.router_aux_loss_coef * aux + cfg.router_z_loss_coef * z
    return objective, losses.Terms(torch.zeros_like(aux), aux, z, load)


class _Attach(torch.autograd.Function):
    """x itself; its backward hands the attached scalar a gradient of one, so that it need not be sent on."""

    @staticmethod
    def forward(ctx: torch.autograd.function.FunctionCtx, x: Tensor, scalar: Tensor) -> Tensor:
        ctx.save_for_backward(torch.ones_like(scalar))
        return x.view_as(x)

    @staticmethod
    def backward(ctx: torch.autograd.function.FunctionCtx, grad: Tensor) -> tuple[Tensor, Tensor]:
        return grad, *ctx.saved_tensors


def _token_loss(
    execution: model.Execution, layout: Layout, hidden: Tensor, head: Tensor, batch: Batch, weight: Tensor
) -> Tensor:
    """losses.make_loss's number from hidden states after the final norm."""
    tp = layout.axes.tp
    rest = (head, batch["targets"].flatten(), batch["loss_weights"].flatten())
    if tp.size > 1:
        total = tensor.linear_cross_entropy(hidden, *rest, tp) / tp.size
    elif execution.loss == "reference":
        total = cross_entropy.reference(hidden.flatten(0, 1), *rest)
    else:
        total = cross_entropy.linear_cross_entropy(hidden.flatten(0, 1), *rest, float32_sum=True)
    divisor = weight.to(total)
    return total / torch.where(divisor > 0, divisor, 1.0)


def _join(
    cfg: ModelConfig, stages: Stages, own: Sequence[int], terms: Sequence[losses.Terms], layout: Layout
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
    cfg: ModelConfig,
    pipeline: Pipeline,
    layout: Layout,
    stages: Stages,
    own: Mapping[int, nn.Module],
    deferred: Deferred | None,
    microbatches: int,
    shape: torch.Size,
    dtype: torch.dtype,
    device: torch.device,
) -> tuple[pipelining.schedules._PipelineSchedule, list[pipelining.PipelineStage]]:
    """torch's schedule and its stages, for micro-batches whose tokens have this shape.

    Shapes are told, so that torch need not run every stage once to learn them.
    """
    rows, length = shape
    hidden = torch.empty(
        (rows, length // layout.axes.tp.size, cfg.hidden_size), dtype=dtype, device="meta", requires_grad=True
    )
    loss = torch.empty((), dtype=_wide(dtype), device="meta", requires_grad=True)
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


def _outer_paths(cfg: ModelConfig, stages: Stages, stage: int) -> list[str]:
    """What the stage uses besides layers, on all ranks in the same order: they are gathered together."""
    head = P.EMBED if cfg.tie_word_embeddings else P.HEAD
    return [P.EMBED] * (stage == 0) + [P.FINAL_NORM, head] * (stage == stages.count - 1)


def _leaf(x: Tensor, total: Tensor) -> Tensor:
    """The same values as something to differentiate by; what autograd accumulates goes to `total`."""
    leaf = x.detach().requires_grad_()
    leaf.grad_dtype = total.dtype
    leaf.grad = total
    return leaf


def _detach(x: Tensor | None) -> Tensor | None:
    return None if x is None else x.detach()


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)
