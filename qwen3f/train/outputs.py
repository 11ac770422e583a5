"""The model's outputs without gradients, on any mesh: sums of the next-token loss, and one number per token.

B rows of this rank · T sequence length
"""

import functools
from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor

from qwen3f import model
from qwen3f import params as P
from qwen3f.config import ModelConfig
from qwen3f.train import losses
from qwen3f.train.objective import Batch, MicroBatch, Output, batch_weight, make_head, make_numbers
from qwen3f.train.pipelined import make_pipelined_outputs
from qwen3f.train.step import cut_batch, visible
from sharding.collectives import all_reduce, gather
from sharding.fsdp import sum_over
from sharding.layout import ONE_DEVICE, Layout
from sharding.mesh import ROWS
from sharding.sequence_split import merge_sequence
from sharding.state import local_shards


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

    microbatches: the batch is cut into this many equal parts, which run one after another. Any number works; with pp,
    as many as in training keep all ranks busy. It does not change the result, except with moe_drop_tokens: an expert's
    capacity follows from the tokens of a micro-batch, as in training.

    On a mesh params are DTensors, the batch is this rank's share, and the sums are those of all ranks. With pp the
    schedule makes no difference. Raises UserError if the batch size is no multiple of microbatches, and for a model
    that cannot be cut into the pipeline's stages.
    """
    axes = layout.axes
    if axes.pp.size > 1:
        head = make_head(cfg, execution, layout)
        pipelined = make_pipelined_outputs(cfg, execution, layout, lambda *args: head(*args)[0])

        def share(params: P.Params, parts: list[MicroBatch]) -> Tensor:
            dtype = torch.promote_types(layout.gather_dtype or params[P.EMBED].dtype, torch.float32)
            zero = torch.zeros((), dtype=dtype, device=params[P.EMBED].device)
            return functools.reduce(torch.add, pipelined(params, parts, 1.0), zero)

    else:
        loss = losses.make_loss(cfg, execution, layout=layout)

        def share(params: P.Params, parts: list[MicroBatch]) -> Tensor:
            return functools.reduce(torch.add, (loss(params, part.own, 1.0) for part in parts))

    @torch.no_grad()
    def eval_step(params: P.Params, batch: Batch) -> tuple[Tensor, Tensor]:
        rows = visible(batch, cross_documents)
        nats = share(_compute(params, compute_dtype), cut_batch(rows, microbatches, layout))
        return sum_over(nats, axes), sum_over(batch_weight(rows), axes, ROWS)

    return eval_step


def make_outputs(
    cfg: ModelConfig,
    execution: model.Execution = model.EAGER,
    layout: Layout = ONE_DEVICE,
    output: Output | Literal["entropy"] = "log_probs",
    num_ids: int = 0,
    *,
    microbatches: int = 1,
    compute_dtype: torch.dtype | None = None,
) -> Callable[[P.Params, Batch], Tensor]:
    """outputs(params, batch) -> [B, T], float32 (float64 for float64), without gradients: one number per token.

    output: "log_probs": of the targets, at the batch's temperature, 0 where nothing is predicted; "nll": their
    negative; "scores": of the scalar head; "entropy": of the distribution at the batch's temperature. These are the
    numbers that an Objective with this output gets. num_ids: as Objective's.

    On a mesh params are DTensors and the batch holds this rank's rows; the result covers these rows whole (T = the
    whole sequence) and is the same on all ranks of cp, tp and pp. microbatches: as for make_eval_step.
    """
    axes = layout.axes
    entropy = output == "entropy"
    numbers = make_numbers(cfg, execution, "scores" if output == "scores" else "log_probs", layout, entropy, num_ids)

    def head(hidden: Tensor, outer: P.Params, micro: MicroBatch, shared: None = None) -> Tensor:
        return numbers(hidden, outer, micro.own)[int(entropy)]

    if axes.pp.size > 1:
        pipelined = make_pipelined_outputs(cfg, execution, layout, head)
    else:
        forward, whole = model.make_forward(cfg, execution, layout=layout), model.make_outer(cfg, layout)

    def of_parts(params: P.Params, parts: list[MicroBatch]) -> list[Tensor]:
        if axes.pp.size > 1:
            return pipelined(params, parts, None)
        params = whole(params)
        return [head(forward(params, part.own)[0], params, part) for part in parts]

    @torch.no_grad()
    def outputs(params: P.Params, batch: Batch) -> Tensor:
        compute = _compute(params, compute_dtype)
        parts = cut_batch(visible(batch, False), microbatches, layout)
        found = of_parts(compute, parts)
        dtype = torch.promote_types(layout.gather_dtype or compute[P.EMBED].dtype, torch.float32)
        empty = torch.zeros(len(batch["tokens"]), *parts[0].own["tokens"].shape[1:], dtype=dtype)
        own = torch.cat(found) if found else empty.to(batch["tokens"].device)
        own = all_reduce(own, axes.pp)  # ranks without the last slice have zeros
        if axes.cp.size > 1:
            own = merge_sequence(gather(own, axes.cp, 1), axes.cp.size)
        return -own if output == "nll" else own

    return outputs


def _compute(params: P.Params, dtype: torch.dtype | None) -> P.Params:
    """This rank's shards in the dtype of the forward pass."""
    return {k: p.to(dtype or p.dtype) for k, p in local_shards(params).items()}
