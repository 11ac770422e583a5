"""Pretraining: the pure step, and its evaluation.

B rows of the global batch · M micro-batches · T sequence
"""

import functools
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from qwen3f import model, rng, tree
from qwen3f import params as P
from qwen3f.config import ModelConfig
from qwen3f.errors import UserError
from qwen3f.train import balance, optimizer
from qwen3f.train import objective as losses
from qwen3f.train.schedule import Schedule
from qwen3f.train.state import TrainState
from qwen3f.transforms import grad_and_value, jit
from sharding.fsdp import sum_over, sum_replicated
from sharding.layout import ONE_DEVICE, Layout
from sharding.mesh import ROWS
from sharding.pipeline import forward as forward_pipeline
from sharding.pipeline import schedule as pipeline
from sharding.sequence_split import split_sequence
from sharding.state import local_shards, on_shards

Batch = Mapping[str, Tensor]
Metrics = dict[str, Tensor]
TrainStep = Callable[[TrainState, Batch], tuple[TrainState, Metrics]]


def make_train_step(
    cfg: ModelConfig,
    hyper: optimizer.AdamW,
    schedule: Schedule,
    *,
    microbatches: int = 1,
    compute_dtype: torch.dtype | None = None,
    execution: model.Execution = model.EAGER,
    cross_documents: bool = False,
    donate: bool = False,
    before_update: Callable[[], None] | None = None,
    layout: Layout = ONE_DEVICE,
) -> TrainStep:
    """step(state, batch) -> (state, metrics), pure: the same state and batch give the same result, bit for bit.

    Args:
      microbatches: the batch is cut into this many equal parts, whose gradients are summed; the loss is normalised
        by the weight of the whole batch, so the cut changes nothing.
      compute_dtype: dtype of the forward and backward pass (None: the parameters'). Master weights, moments and the
        update keep the parameters' dtype.
      cross_documents: attention ignores document boundaries.
      donate: the state's storage is reused for the new state (see transforms.jit); the old state must not be used.
      before_update: called when the gradients have been queued and nothing has been written into the state yet; as one
        graph (execution.compile="step"), before the whole step. A copy of the donated state that is under way is joined
        there.
      layout: the mesh that the step runs on. The state's leaves are then DTensors (sharding.state), the batch is this
        rank's share: its rows of every micro-batch, cut over dr, dp and ep (rows equal over cp and tp). All ranks call
        the step together; the new state and metrics are those of one device.

    Metrics (0-d tensors on the device): loss (nats a predicted token, before the update, without the routers' losses),
      aux_loss (the balancing loss without its coefficient; 0 for a dense model), grad_norm before and
      grad_norm_clipped after clipping, lr, tokens (predicted in this batch), finite (1 if loss and gradient norm are;
      otherwise parameters and moments are left as they were). A sparse model adds router_z_loss and what
      balance.load_metrics gives.

    Raises UserError when the batch size is no multiple of microbatches, and for what a mesh cannot do: Muon, which
    needs whole matrices; attention_dropout; one graph with ep, whose splits the host must know.
    """
    axes, placed = layout.axes, layout.place(cfg)
    master_sums = layout.gather_dtype is not None
    check_mesh(cfg, hyper, execution, layout)
    if master_sums and layout.gather_dtype != compute_dtype:
        raise ValueError(f"layout.gather_dtype={layout.gather_dtype} must be compute_dtype={compute_dtype}, or None")
    decay = P.decays(cfg)
    wait = before_update or (lambda: None)

    options = {"dropout": cfg.attention_dropout > 0, "layout": layout}
    objective = grad_and_value(losses.make_objective(cfg, execution, **options), has_aux=True)
    # A lone micro-batch is the whole step: it knows all counts.
    count_first = cfg.router_balance == "global_exact" and bool(cfg.sparse_layers) and microbatches > 1
    count = losses.make_load(cfg, execution, **options) if count_first else None
    pipelined = pipeline.make_gradients(cfg, layout.pipeline, execution, layout) if axes.pp.size > 1 else None

    def gradients(state: TrainState, batch: Batch) -> tuple[P.Params, losses.Terms]:
        batch = split_sequence(_visible(batch, cross_documents), axes.cp)
        totals = losses.sum_totals(cfg, batch, axes)
        compute = {
            k: p if master_sums and placed[k].fsdp else p.to(compute_dtype or p.dtype) for k, p in state.params.items()
        }
        stream = rng.fold(state.seed, state.step) if cfg.attention_dropout else None
        parts = [
            (part, None if stream is None else rng.fold(stream, index))
            for index, part in enumerate(split_batch(batch, microbatches))
        ]
        if pipelined is not None:
            grads, terms = pipelined(compute, [part for part, _ in parts], totals)
        else:
            grads, terms = one_by_one(compute, state.params, parts, totals)
        return sum_replicated(grads, placed, axes), losses.sum_ranks(terms, axes)

    def one_by_one(
        compute: P.Params, masters: P.Params, parts: list[tuple[Batch, Tensor | None]], totals: losses.Totals
    ) -> tuple[P.Params, losses.Terms]:
        whole = None
        if count is not None:
            for part in parts:
                whole = balance.add(whole, count(compute, *part))
        grads, terms = None, None
        for part, part_stream in parts:
            others = whole if terms is None or whole is not None else terms.load
            part_grads, (_, part_terms) = objective(_unstack(compute), part, totals, others, part_stream)
            grads = _accumulate(grads, part_grads, masters, only=microbatches == 1)
            terms = losses.add_terms(terms, part_terms)
        return grads, terms

    def apply_gradients(
        state: TrainState, grads: P.Params, terms: losses.Terms, batch: Batch
    ) -> tuple[TrainState, Metrics]:
        norm = optimizer.global_norm(grads, placed, axes)
        scale = optimizer.clip_factor(norm, hyper.clip_norm)
        finite = torch.isfinite(norm) & torch.isfinite(terms.loss)
        lr = schedule(state.step)
        params, opt = optimizer.update(
            hyper, decay, state.params, grads, state.opt, step=state.step, lr=lr, scale=scale, apply=finite
        )
        tokens = sum_over(losses.batch_tokens(batch), axes, ROWS)
        rows = batch["tokens"].shape[0] * axes.rows[1]
        # A step whose update was withheld has consumed its data all the same.
        new = TrainState(state.step + 1, params, opt, state.seed, state.tokens_seen + tokens, state.position + rows)
        metrics = {
            "loss": terms.loss,
            "aux_loss": terms.aux_loss,
            "grad_norm": norm,
            "grad_norm_clipped": norm * scale,
            "lr": lr,
            "tokens": tokens,
            "finite": finite,
        }
        if terms.load is not None:
            metrics |= {"router_z_loss": terms.z_loss, **balance.load_metrics(terms.load)}
        return new, metrics

    if execution.compile == "step":

        def whole(state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
            return apply_gradients(state, *gradients(state, batch), batch)

        whole_graph = jit(whole, donate=donate)

        def step(state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
            wait()
            return whole_graph(state, batch)

        return on_shards(step)

    finish = jit(apply_gradients, compile=execution.compile == "block", donate=donate)

    def step(state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
        grads, terms = gradients(state, batch)
        wait()
        return finish(state, grads, terms, batch)

    return on_shards(step)


def make_eval_step(
    cfg: ModelConfig,
    *,
    compute_dtype: torch.dtype | None = None,
    execution: model.Execution = model.EAGER,
    cross_documents: bool = False,
    microbatches: int = 1,
    layout: Layout = ONE_DEVICE,
) -> Callable[[P.Params, Batch], tuple[Tensor, Tensor]]:
    """eval_step(params, batch) -> (summed nats, summed weight) over the batch's predicted tokens.

    microbatches: the batch is cut into this many equal parts, which pass one after another; any number does, under pp
    too, where as many as in training keep all ranks at work. It changes nothing, except where experts have a capacity:
    that is counted from the tokens of a micro-batch, as in training.

    On a mesh params are DTensors, the batch is this rank's share, and the sums are those of all ranks. Under pp all
    schedules evaluate alike. Raises UserError when the batch size is no multiple of microbatches, and for what a
    pipeline cannot be cut into or compiled as.
    """
    axes = layout.axes
    if axes.pp.size > 1:
        share = forward_pipeline.make_loss(cfg, execution, layout)
    else:
        loss_fn = losses.make_loss(cfg, execution, layout=layout)

        def share(params: P.Params, parts: list[Batch], total_weight: float) -> Tensor:
            return functools.reduce(torch.add, (loss_fn(params, part, total_weight) for part in parts))

    @torch.no_grad()
    def eval_step(params: P.Params, batch: Batch) -> tuple[Tensor, Tensor]:
        compute = {k: p.to(compute_dtype or p.dtype) for k, p in local_shards(params).items()}
        seen = split_sequence(_visible(batch, cross_documents), axes.cp)
        nats = share(compute, split_batch(seen, microbatches), 1.0)
        return sum_over(nats, axes), sum_over(losses.batch_weight(batch), axes, ROWS)

    return eval_step


def check_mesh(cfg: ModelConfig, hyper: optimizer.AdamW, execution: model.Execution, layout: Layout) -> None:
    """UserError for what a mesh cannot do, as make_train_step lists it."""
    axes = layout.axes
    if axes.shape.size == 1:
        return
    if axes.ep.size > 1 and cfg.sparse_layers and execution.compile == "step":
        raise UserError(
            f"config.compile=step with ep={axes.ep.size}, whose splits the host must know: write compile=block, or use "
            "dp for ep"
        )
    if isinstance(hyper, optimizer.Muon):
        raise UserError("optimizer.kind=muon needs whole matrices, which a mesh cuts; write optimizer.kind=adamw")
    if cfg.attention_dropout > 0:
        raise UserError("model.attention_dropout is not supported on a mesh; set it to 0 or train on one device")


def _visible(batch: Batch, cross_documents: bool) -> Batch:
    """What the model gets to see: without segments, attention crosses document boundaries; padding stays known."""
    if not cross_documents or "segments" not in batch:
        return batch
    return {key: value for key, value in batch.items() if key != "segments"} | {"real": batch["segments"] != 0}


def split_batch(batch: Batch, parts: int) -> list[Batch]:
    """Equal parts along the batch dimension; UserError when it does not divide."""
    rows = batch["tokens"].shape[0]
    if rows % parts:
        raise UserError(f"batch_size {rows} cannot be cut into {parts} equal microbatches; make it a multiple")
    chunks = {key: value.split(rows // parts) for key, value in batch.items()}
    return [{key: values[i] for key, values in chunks.items()} for i in range(parts)]


def _unstack(params: P.Params) -> dict[str, Tensor | tuple[Tensor, ...]]:
    """Stacked leaves as tuples of per-layer views, so that each layer's gradient is a leaf of its own."""
    return {path: leaf.unbind(0) if path.startswith(P.LAYERS) else leaf for path, leaf in params.items()}


def _stack(leaf: Tensor | tuple[Tensor, ...]) -> Tensor:
    return torch.stack(leaf) if isinstance(leaf, tuple) else leaf


def _accumulate(total: P.Params | None, part: dict[str, object], like: P.Params, only: bool) -> P.Params:
    """Add one micro-batch's per-layer gradients to the stacked sum, kept in the master dtype.

    A lone micro-batch needs no sum: its gradients are stacked as they are, and the update casts them.
    """
    if only:
        # pop: a leaf's layers are freed as soon as they are stacked
        return {path: _stack(part.pop(path)) for path in list(part)}
    if total is None:
        return {
            path: torch.stack([x.to(like[path].dtype) for x in g]) if isinstance(g, tuple) else g.to(like[path].dtype)
            for path, g in part.items()
        }
    rows = {path: leaf.unbind(0) if isinstance(part[path], tuple) else leaf for path, leaf in total.items()}
    torch._foreach_add_(tree.leaves(rows), tree.leaves(part))
    return total
