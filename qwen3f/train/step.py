"""The pure training step of every stage: gradients of an objective, and the optimizer's update.

B rows of the global batch · M micro-batches · K updates · T sequence length
"""

import dataclasses
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from kernels import cross_entropy
from qwen3f import model, rng, tree
from qwen3f import params as P
from qwen3f.config import ModelConfig
from qwen3f.errors import UserError
from qwen3f.train import balance, losses, optimizer
from qwen3f.train.hyper import AdamW
from qwen3f.train.objective import Batch, MicroBatch, Objective
from qwen3f.train.pipelined import make_pipelined_gradients
from qwen3f.train.schedule import Schedule
from qwen3f.train.state import TrainState
from qwen3f.transforms import grad_and_value, jit
from sharding.axes import Axes
from sharding.fsdp import sum_over, sum_replicated
from sharding.layout import ONE_DEVICE, Layout
from sharding.mesh import ROWS
from sharding.sequence_split import split_sequence
from sharding.state import on_shards

Metrics = dict[str, Tensor]
TrainStep = Callable[[TrainState, Batch], tuple[TrainState, Metrics]]


@dataclasses.dataclass(frozen=True)
class StepOptions:
    """How a step computes. What it minimises is the Objective.

    Attributes:
      optimizer, schedule: for the update. The learning rate and the bias correction count updates, not steps.
      microbatches: an update's rows are cut into this many equal parts, whose gradients are summed. The loss is divided
        by the count of the whole batch, so the number of parts changes no result, except where something depends on one
        part alone: dropout's mask, the balancing loss (unless router_balance="global_exact"), and which experts are
        full (moe_drop_tokens).
      microbatch_rows: if not 0, replaces microbatches: rows of a micro-batch on this rank; their number follows.
      updates: the batch is cut into this many equal parts, in order; each gets its own update. TrainState.step counts
        batches, so a state has had step · updates updates.
      compute_dtype: dtype of the forward and backward pass (None: the parameters'). Master weights, moments and the
        update keep the parameters' dtype.
      cross_documents: attention ignores document boundaries.
      donate: the state's storage is reused for the new state (see transforms.jit); the old state must not be used.
      before_update: called before anything is written into the donated state, after the first gradients have been
        queued (with execution.compile="step", before the step). The loop waits there for a checkpoint's copy of the
        state that is in progress.
      layout: the mesh that the step runs on. On a mesh the state's leaves are DTensors (sharding.state), and the batch
        holds this rank's rows of every micro-batch: rows are cut over dr, dp and ep, and equal over cp, tp and pp. All
        ranks call the step together. The new state and metrics equal those of one device.
    """

    optimizer: AdamW
    schedule: Schedule
    microbatches: int = 1
    microbatch_rows: int = 0
    updates: int = 1
    compute_dtype: torch.dtype | None = None
    execution: model.Execution = model.EAGER
    cross_documents: bool = False
    donate: bool = False
    before_update: Callable[[], None] | None = None
    layout: Layout = ONE_DEVICE

    def parts_of(self, batch: Batch) -> int:
        """How many micro-batches an update's batch is cut into."""
        rows = batch["tokens"].shape[0]
        if not self.microbatch_rows:
            return self.microbatches
        if rows % self.microbatch_rows:
            raise UserError(
                f"a rank's batch has {rows} rows, which is no multiple of the {self.microbatch_rows} rows of a "
                "micro-batch (StepOptions.microbatch_rows)"
            )
        return rows // self.microbatch_rows


def make_train_step(cfg: ModelConfig, objective: Objective, options: StepOptions) -> TrainStep:
    """step(state, batch) -> (state, metrics), pure: the same state and batch give the same result, bit for bit.

    Metrics (0-d tensors on the device):
      loss: the objective's, before the update, without the routers' losses; for NEXT_TOKEN nats per predicted token.
      grad_norm, grad_norm_clipped: before and after clipping. lr: the learning rate. tokens: predicted in this batch.
      finite: whether loss and gradient norm are; if not, parameters and moments stay as they were.
      The objective's figures. For a sparse model also aux_loss and router_z_loss (the routers' losses without their
      coefficients) and balance.load_metrics, whose expert_load is [S, E].
    With several updates per step these are means over the updates, except lr (the last), tokens (the sum) and finite
    (all updates are); withheld is then the number of updates that were not finite.

    Raises UserError for a batch that does not divide or is malformed (`check_batch`), for rates without a matching
    parameter, and for what a mesh cannot do: attention_dropout; config.compile=step with ep, because the host must know
    ep's splits; an invariant execution with experts, or over pp, cp or tp.
    """
    check_mesh(cfg, options.execution, options.layout)
    optimizer.check_rates(options.optimizer, P.abstract_params(cfg))
    gradients, update = _make_gradients(cfg, objective, options), _make_update(cfg, options)
    wait = options.before_update or (lambda: None)
    whole_graph = options.execution.compile == "step"
    finish = jit(update, compile=options.execution.compile == "block", donate=options.donate and not whole_graph)

    def run(state: TrainState, batch: Batch, before: Callable[[], None]) -> tuple[TrainState, Metrics]:
        rows = batch["tokens"].shape[0] * options.layout.axes.rows[1]
        consumed = batch.get("consumed", torch.full_like(state.position, rows))
        parts = split_batch(batch, options.updates)
        history, counts = [], []
        for number, part in enumerate(parts):
            grads, terms, count = gradients(state, part, number)
            if number == 0:
                before()
            examples = consumed if number == len(parts) - 1 else None
            state, metrics = finish(state, grads, terms, count, part, torch.full_like(state.step, number), examples)
            history.append(metrics)
            counts.append(count)
        return state, history[0] if len(history) == 1 else _together(history, torch.stack(counts))

    graph = jit(lambda state, batch: run(state, batch, lambda: None), donate=options.donate) if whole_graph else None

    def step(state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
        check_batch(batch, cfg.vocab_size)
        if graph is None:
            return run(state, batch, wait)
        wait()
        return graph(state, batch)

    return on_shards(step)


def check_batch(batch: Batch, vocab_size: int) -> None:
    """UserError for a batch that lacks a key or whose tensors differ in shape; on the CPU also for ids outside the
    vocabulary (on another device this check would wait for it)."""
    shape = batch["tokens"].shape if "tokens" in batch else None
    for key in ("tokens", "targets", "loss_weights"):
        if key not in batch:
            raise UserError(f"the batch has no {key!r} [B, T]; it has {', '.join(sorted(batch)) or 'nothing'}")
        if batch[key].shape != shape:
            raise UserError(f"the batch's {key!r} has shape {list(batch[key].shape)}, its 'tokens' {list(shape)}")
    model.check_tokens(batch["tokens"])
    for key, other in (("tokens", None), ("targets", cross_entropy.IGNORE)):
        ids = batch[key]
        if type(ids) is not Tensor or ids.device.type != "cpu" or not ids.numel():  # LocalTensors have another type
            continue
        ids = ids if other is None else torch.where(ids == other, 0, ids)
        least, most = int(ids.min()), int(ids.max())
        if least < 0 or most >= vocab_size:
            raise UserError(
                f"the batch's {key!r} go from {least} to {most}; with model.vocab_size={vocab_size} they must lie in "
                f"0..{vocab_size - 1}{'' if other is None else f', or be {other}'}"
            )


def check_mesh(cfg: ModelConfig, execution: model.Execution, layout: Layout) -> None:
    """UserError for what a mesh, or an invariant execution, cannot do; make_train_step lists it."""
    axes = layout.axes
    if execution.invariant and (cfg.sparse_layers or max(axes.pp.size, axes.cp.size, axes.tp.size) > 1):
        raise UserError(
            "config.attention=invariant takes a model without experts, and no pp, cp or tp in config.mesh; leave those "
            "out, or write --config.attention=auto"
        )
    if axes.shape.size == 1:
        return
    if axes.ep.size > 1 and cfg.sparse_layers and execution.compile == "step":
        raise UserError(
            f"config.compile=step with ep={axes.ep.size}, where the host must know how many rows each rank gets, is "
            "not supported; write compile=block, or dp in place of ep in config.mesh"
        )
    if cfg.attention_dropout > 0:
        raise UserError("config.model.attention_dropout is not supported on a mesh; set it to 0 or train on one device")


def check_recomputation(cfg: ModelConfig, execution: model.Execution) -> None:
    """UserError for recomputation that torch 2.13 can't compile into one graph. Its own error would not tell a user
    what is wrong. torch 2.11 can compile it."""
    policy, recent = cfg.gradient_checkpointing, torch.__version__ >= (2, 13)
    whole = policy == "full" or (policy == "selective" and cfg.sparse_layers)
    if recent and execution.compile == "step" and whole:
        raise UserError(
            f"config.compile=step with config.model.gradient_checkpointing={policy}: torch {torch.__version__} can't "
            "compile this model's recomputation into one graph; write --config.compile=block"
        )


def _make_gradients(
    cfg: ModelConfig, objective: Objective, options: StepOptions
) -> Callable[[TrainState, Batch, int], tuple[P.Params, losses.Terms, Tensor]]:
    """gradients(state, an update's batch, its number) -> (gradients of the trained parameters, the update's Terms, the
    divisor of its loss).

    Gradients are this rank's shards, summed over ranks; Terms are those of all ranks.
    """
    layout, axes = options.layout, options.layout.axes
    placed, masters = layout.place(cfg), layout.gather_dtype is not None
    if masters and layout.gather_dtype != options.compute_dtype:
        raise ValueError(f"layout.gather_dtype={layout.gather_dtype} must be compute_dtype={options.compute_dtype}")
    make = make_pipelined_gradients if axes.pp.size > 1 else _make_summed_gradients
    summed = make(cfg, objective, options.execution, layout)

    def gradients(state: TrainState, batch: Batch, number: int) -> tuple[P.Params, losses.Terms, Tensor]:
        rows = visible(batch, options.cross_documents)
        totals = losses.sum_totals(cfg, rows, axes, objective)
        compute = {
            k: p if masters and placed[k].fsdp else p.to(options.compute_dtype or p.dtype)
            for k, p in state.params.items()
        }
        frozen = {path: p for path, p in compute.items() if not options.optimizer.rate(path)}
        trained = {path: p for path, p in compute.items() if path not in frozen}
        stream = None
        if cfg.attention_dropout:
            stream = rng.fold(state.seed, state.step * options.updates + number)
        parts = cut_batch(rows, options.parts_of(batch), layout)
        grads, terms = summed(trained, frozen, state.params, parts, totals, stream)
        return sum_replicated(grads, placed, axes), losses.sum_ranks(terms, axes), totals.count

    return gradients


def _make_summed_gradients(
    cfg: ModelConfig, objective: Objective, execution: model.Execution, layout: Layout
) -> Callable[..., tuple[P.Params, losses.Terms]]:
    """fn(trained, frozen, masters, micro-batches, totals, stream) -> (sums of gradients, sums of Terms).

    It runs one micro-batch after the other. masters: the master parameters; the sums have their dtype.
    """
    options = {"dropout": cfg.attention_dropout > 0, "layout": layout}
    differentiate = grad_and_value(losses.make_differentiated(cfg, objective, execution, **options), has_aux=True)
    exact = cfg.router_balance == "global_exact" and bool(cfg.sparse_layers) and objective.router_losses
    count = losses.make_load(cfg, execution, **options) if exact else None

    def summed(
        trained: P.Params,
        frozen: P.Params,
        masters: P.Params,
        parts: list[MicroBatch],
        totals: losses.Totals,
        stream: Tensor | None,
    ) -> tuple[P.Params, losses.Terms]:
        streams = [None if stream is None else rng.fold(stream, index) for index in range(len(parts))]
        whole = None
        if count is not None and len(parts) > 1:  # a single micro-batch has all counts already
            for part, part_stream in zip(parts, streams):
                whole = balance.add(whole, count({**trained, **frozen}, part.own, part_stream))
        grads, terms = None, None
        for part, part_stream in zip(parts, streams):
            others = whole if terms is None or whole is not None else terms.load
            leaves = _unstack(cfg, trained), _unstack(cfg, frozen)
            part_grads, (_, part_terms) = differentiate(*leaves, part, totals, others, part_stream)
            grads = _accumulate(grads, part_grads, masters, only=len(parts) == 1)
            terms = losses.add_terms(terms, part_terms)
        return grads, terms

    return summed


def _make_update(cfg: ModelConfig, options: StepOptions) -> Callable[..., tuple[TrainState, Metrics]]:
    """update(state, gradients, Terms, the loss's divisor, a batch, its number, examples) -> (state, metrics).

    batch: the update's. number: of the update within its step. examples: how many examples the step's batch consumed,
    on the step's last update; None on the others.
    """
    axes, placed, hyper = options.layout.axes, options.layout.place(cfg), options.optimizer
    rules = optimizer.leaf_rules(hyper, P.decays(cfg))  # outside update, so that no pattern is matched while compiling

    def update(
        state: TrainState,
        grads: P.Params,
        terms: losses.Terms,
        count: Tensor,
        batch: Batch,
        number: Tensor,
        examples: Tensor | None,
    ) -> tuple[TrainState, Metrics]:
        norm = optimizer.global_norm(grads, placed, axes)
        scale = optimizer.clip_factor(norm, hyper.clip_norm)
        finite = torch.isfinite(norm) & torch.isfinite(terms.loss)
        done = state.step if options.updates == 1 else state.step * options.updates + number
        lr = options.schedule(done)
        # with nothing to learn from, an update would move the weights by old momentum and weight decay alone
        at = optimizer.Scalars(done, lr, scale, finite & (count > 0))
        params, opt = optimizer.update(hyper, rules, state.params, grads, state.opt, at, placed, axes)
        if cfg.vision_enabled:
            seen = _any_image(batch, axes)
            params = _unless_idle(seen, state.params, params)
            opt = optimizer.OptimizerState(*(_unless_idle(seen, *trees) for trees in zip(state.opt, opt)))
        tokens = sum_over(losses.batch_tokens(batch), axes, ROWS)
        step, position = state.step, state.position
        if examples is not None:  # data is consumed, even if the update was withheld
            step, position = step + 1, position + examples
        new = TrainState(step, params, opt, state.seed, state.tokens_seen + tokens, position)
        metrics = {
            "loss": terms.loss,
            "grad_norm": norm,
            "grad_norm_clipped": norm * scale,
            "lr": lr,
            "tokens": tokens,
            "finite": finite,
            **terms.figures,
        }
        if terms.load is not None:
            metrics |= {"aux_loss": terms.aux_loss, "router_z_loss": terms.z_loss, **balance.load_metrics(terms.load)}
        return new, metrics

    return update


def _any_image(batch: Batch, axes: Axes) -> Tensor:
    """bool scalar tensor: whether any rank's part of the update's batch has an image token."""
    if "visual_index" not in batch:
        return torch.zeros((), dtype=torch.bool, device=batch["tokens"].device)
    return sum_over((batch["visual_index"] > 0).sum(), axes, ROWS) > 0


def _unless_idle(seen: Tensor, old: P.Params, new: P.Params) -> P.Params:
    """`new`, but with the vision tower's old values if no image was seen: weight decay would shrink an idle tower."""
    return {
        path: torch.where(seen, leaf, old[path]) if path.startswith(P.VISUAL) and leaf is not old[path] else leaf
        for path, leaf in new.items()
    }


def _together(history: list[Metrics], counts: Tensor) -> Metrics:
    """A step's metrics from those of its updates; means are over the updates with something to learn from."""
    out = {name: torch.stack([metrics[name] for metrics in history]) for name in history[0]}
    finite, tokens = out.pop("finite"), out.pop("tokens")
    real = counts > 0

    def mean(values: Tensor) -> Tensor:
        kept = torch.where(real.view(-1, *[1] * (values.dim() - 1)), values, 0)
        return kept.sum(0) / real.sum().clamp(min=1)

    means = {name: mean(values) for name, values in out.items()}
    return means | {"lr": out["lr"][-1], "tokens": tokens.sum(), "finite": finite.all(), "withheld": (~finite).sum()}


def visible(batch: Batch, cross_documents: bool) -> dict[str, Tensor]:
    """The batch's tensors that have rows, as the model gets them; 0-d tensors are left out.

    cross_documents: replace segments, which bound attention to a document, by `real`, which only marks padding.
    """
    rows = {key: value for key, value in batch.items() if value.dim()}
    if cross_documents and "segments" in rows:
        rows["real"] = rows.pop("segments") != 0
    return rows


def cut_batch(rows: Batch, parts: int, layout: Layout = ONE_DEVICE) -> list[MicroBatch]:
    """Cut this rank's rows, from `visible`, into `parts` micro-batches; under cp, `own` has its part of every row."""
    whole = split_batch(rows, parts)
    if layout.axes.cp.size == 1:
        return [MicroBatch(part, part) for part in whole]
    return [MicroBatch(split_sequence(part, layout.axes.cp), part) for part in whole]


def split_batch(batch: Batch, parts: int) -> list[dict[str, Tensor]]:
    """Cut a batch into equal parts along its rows, without 0-d tensors. UserError if the rows do not divide."""
    rows = batch["tokens"].shape[0]
    if rows % parts:
        raise UserError(f"a batch of {rows} rows cannot be cut into {parts} equal parts; make its rows a multiple")
    chunks = {key: value.split(rows // parts) for key, value in batch.items() if value.dim()}
    return [{key: values[i] for key, values in chunks.items()} for i in range(parts)]


def _unstack(cfg: ModelConfig, params: P.Params) -> dict[str, Tensor | tuple[Tensor, ...]]:
    """Stacked leaves as tuples of per-layer views, so that each layer's gradient is a leaf of its own."""
    table = P.abstract_params(cfg)
    return {path: leaf.unbind(0) if table[path].stack else leaf for path, leaf in params.items()}


def _stack(leaf: Tensor | tuple[Tensor, ...]) -> Tensor:
    return torch.stack(leaf) if isinstance(leaf, tuple) else leaf


def _accumulate(total: P.Params | None, part: dict[str, object], like: Mapping[str, Tensor], only: bool) -> P.Params:
    """Add one micro-batch's per-layer gradients to the stacked sum, which has the master dtype.

    only: there is no other micro-batch; its gradients are stacked in their own dtype, and the update casts them.
    """
    if only:
        # pop frees a parameter's per-layer gradients as soon as they are stacked
        return {path: _stack(part.pop(path)) for path in list(part)}
    if total is None:
        return {
            path: torch.stack([x.to(like[path].dtype) for x in g]) if isinstance(g, tuple) else g.to(like[path].dtype)
            for path, g in part.items()
        }
    rows = {path: leaf.unbind(0) if isinstance(part[path], tuple) else leaf for path, leaf in total.items()}
    torch._foreach_add_(tree.leaves(rows), tree.leaves(part))
    return total
