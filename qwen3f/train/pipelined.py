"""Losses and outputs over a pipeline: what its slices compute, handed to the schedules of sharding.pipeline.

S sparse layers of the model · E experts
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from qwen3f import model
from qwen3f import params as P
from qwen3f.config import ModelConfig
from qwen3f.model.stage_slice import Head, SliceFn, empty_hidden, make_slice, select_leaves
from qwen3f.train import balance, losses
from qwen3f.train.objective import Figures, MicroBatch, Objective, make_head
from sharding.fsdp import sum_over
from sharding.layout import Layout
from sharding.pipeline import forward, schedule
from sharding.pipeline.cut import Slices, make_slices
from sharding.pipeline.deferred_grads import Deferred


def make_pipelined_gradients(
    cfg: ModelConfig, objective: Objective, execution: model.Execution, layout: Layout
) -> Callable[..., tuple[P.Params, losses.Terms]]:
    """fn(trained, frozen, masters, micro-batches, totals, stream) -> (this rank's sums of gradients, its Terms).

    The counterpart of train.step's `_make_summed_gradients` for pp of more than one rank (sharding.pipeline.schedule).
    masters and stream are not used. The load in Terms covers all S sparse layers, on every rank.
    """
    deferred = Deferred() if layout.pipeline.splits else None
    head = make_head(cfg, execution, layout, objective)

    def program(run: SliceFn, last: bool) -> schedule.Program:
        return _with_losses(cfg, layout, run, head, objective, last)

    sliced = _sliced(cfg, execution, layout, program, deferred)
    gradients = schedule.make_gradients(sliced, layout)

    def summed(
        trained: P.Params,
        frozen: P.Params,
        masters: P.Params,
        parts: list[MicroBatch],
        totals: losses.Totals,
        stream: Tensor | None,
    ) -> tuple[P.Params, losses.Terms]:
        order = P.abstract_params(cfg)  # all ranks must gather in the same order
        params = {path: {**trained, **frozen}[path] for path in order}
        sums, carries = gradients(params, frozenset(trained), parts, totals)
        return sums, _join(cfg, sliced.slices, carries, layout)

    return summed


def make_pipelined_outputs(
    cfg: ModelConfig, execution: model.Execution, layout: Layout, head: Callable[..., Any]
) -> Callable[[P.Params, list[MicroBatch], Any], list[Any]]:
    """fn(params, micro-batches, shared) -> [head(hidden, outer parameters, micro-batch, shared) for each micro-batch],
    without gradients; [] on ranks without the last slice."""

    def program(run: SliceFn, last: bool) -> schedule.Program:
        def of_slice(leaves: Any, micro: MicroBatch, shared: Any, carry: None, x: Tensor | None) -> tuple[Any, None]:
            return run(*leaves, micro.own, x, _bound(head, micro, shared))[0], None

        return of_slice

    return forward.make_forward(_sliced(cfg, execution, layout, program), layout)


def _sliced(
    cfg: ModelConfig,
    execution: model.Execution,
    layout: Layout,
    program: Callable[[SliceFn, bool], schedule.Program],
    deferred: Deferred | None = None,
) -> schedule.SlicedModel:
    schedule.check_compile(execution.compile)
    pp = layout.axes.pp
    slices = make_slices(cfg, layout.pipeline, pp.size)
    return schedule.SlicedModel(
        slices,
        {
            number: program(make_slice(cfg, execution, layout, slices, number, deferred), number == slices.count - 1)
            for number in slices.slices_of(pp.index)
        },
        lambda leaves: select_leaves(cfg, slices, pp.index, leaves),
        lambda micro, params, device: empty_hidden(cfg, layout, micro.own["tokens"].shape, params, device),
        frozenset(path for path, spec in P.abstract_params(cfg).items() if spec.stack),
        deferred,
    )


def _bound(head: Callable[..., Any], micro: MicroBatch, shared: Any) -> Head:
    return lambda hidden, outer: head(hidden, outer, micro, shared)


def _with_losses(
    cfg: ModelConfig,
    layout: Layout,
    run: SliceFn,
    head: Callable[..., tuple[Tensor, Figures]],
    objective: Objective,
    last: bool,
) -> schedule.Program:
    """program(leaves, micro-batch, totals, carry, x) -> (out, new carry); see schedule.SlicedModel.

    The carry is the sum of the slice's Terms over the micro-batches so far. On the last slice `out` is the scalar to
    differentiate; on the others it is the hidden states, to which the routers' losses are attached.
    """

    def program(
        leaves: Any, micro: MicroBatch, totals: losses.Totals, carry: losses.Terms | None, x: Tensor | None
    ) -> tuple[Tensor, losses.Terms]:
        out, stats = run(*leaves, micro.own, x, _bound(head, micro, totals.count))
        if last:
            loss, figures = out
        else:
            wide = torch.promote_types(out.dtype, torch.float32)
            loss = torch.zeros((), dtype=wide, device=out.device)
            figures = {name: torch.zeros_like(loss) for name in objective.reports}
        terms = losses.token_terms(loss, figures)
        if stats is not None:
            part, others = len(stats.counts) / len(cfg.sparse_layers), None if carry is None else carry.load
            terms = losses.router_terms(cfg, stats, totals, others, layout.axes, part)
            terms = terms._replace(loss=loss, figures=figures)
        whole = losses.add_router_losses(cfg, objective, loss, terms)
        return whole if last else schedule.attach(out, whole), losses.add_terms(carry, terms)

    return program


def _join(cfg: ModelConfig, slices: Slices, carries: dict[int, losses.Terms], layout: Layout) -> losses.Terms:
    """This rank's Terms: the sum over its slices, with the load of all ranks. carries: slice -> its Terms."""
    terms = [*carries.values()]
    loss, aux, z = (sum(field[1:], start=field[0]) for field in list(zip(*terms))[:3])
    figures = {name: sum(part.figures[name] for part in terms) for name in terms[0].figures}
    if not cfg.sparse_layers:
        return losses.Terms(loss, aux, z, None, figures)
    columns_SE = torch.zeros(len(cfg.sparse_layers), cfg.num_experts + 2, dtype=torch.int64, device=loss.device)
    for number, part in carries.items():
        if part.load is not None:
            rows = [row for row, layer in enumerate(cfg.sparse_layers) if layer in slices.layers_of(number)]
            counts, tokens, dropped = part.load
            columns_SE[rows] = torch.cat((counts, tokens[:, None], dropped[:, None]), 1)
    columns_SE = sum_over(columns_SE, layout.axes, ("pp",))
    load = balance.Load(columns_SE[:, :-2], columns_SE[:, -2], columns_SE[:, -1])
    return losses.Terms(loss, aux, z, load, figures)
