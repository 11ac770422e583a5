"""The loss through a pipeline without gradients, for evaluation.

torch's schedules have an `eval` that walks through the training schedule and leaves out its backward passes. It is not
used: with zbv it fails, 1f1b takes no fewer micro-batches than ranks, and from torch 2.13 on the receive buffers are
made anew whenever evaluation and training alternate. Forward passes alone need no schedule: micro-batch m is on stage s
at time m + s.
"""

from collections.abc import Callable, Sequence

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.distributed_c10d import _resolve_process_group

from qwen3f import model
from qwen3f import params as P
from qwen3f.config import ModelConfig
from qwen3f.model.stage_slice import Batch, empty_hidden, make_slice, select_leaves
from sharding.layout import Layout
from sharding.pipeline.cut import Slices, make_slices


def make_loss(
    cfg: ModelConfig, execution: model.Execution, layout: Layout
) -> Callable[[P.Params, Sequence[Batch], float], Tensor]:
    """loss(params, microbatches, total_weight) -> this rank's share of Σ loss_weights · nll / total_weight.

    params and micro-batches as for pipeline.make_gradients; any number of micro-batches, of one shape. The shares of
    all ranks add up; only those with the last stage have one. All ranks call it together; it builds no graph and keeps
    nothing. Raises UserError as stages.make_slices and stage_program.check_compile.
    """
    pp = layout.axes.pp
    stages = make_slices(cfg, layout.pipeline, pp.size)
    programs = {stage: make_slice(cfg, execution, layout, stages, stage) for stage in stages.slices_of(pp.index)}

    @torch.no_grad()
    def loss(params: P.Params, microbatches: Sequence[Batch], total_weight: float) -> Tensor:
        leaves = select_leaves(cfg, stages, pp.index, params)
        tokens, group = microbatches[0]["tokens"], _resolve_process_group(pp.group)
        wide = torch.promote_types(layout.gather_dtype or params[P.EMBED].dtype, torch.float32)
        total = torch.zeros((), dtype=wide, device=tokens.device)
        arriving: dict[tuple[int, int], tuple[Tensor, dist.Work | None]] = {}
        sending: tuple[Tensor, dist.Work] | None = None
        for index, stage in work_order(stages, len(microbatches)):
            following = (index, stage + 1)
            here = stages.rank_of(stage) == pp.index
            there = stages.rank_of(stage + 1) == pp.index if stage + 1 < stages.count else here
            if here:
                x, work = arriving.pop((index, stage), (None, None))
                if work is not None:
                    work.wait()
                out, _ = programs[stage](*leaves[stage], microbatches[index], x, total_weight)
                if stage + 1 == stages.count:
                    total = total + out
                elif there:
                    arriving[following] = out, None
                else:
                    if sending is not None:
                        sending[1].wait()  # one message at a time is kept for sending
                    out = out.contiguous()
                    sending = out, dist.isend(out, group=group, group_dst=stages.rank_of(stage + 1))
            elif there:
                room = empty_hidden(cfg, layout, tokens.shape, params, tokens.device)
                arriving[following] = room, dist.irecv(room, group=group, group_src=stages.rank_of(stage))
        if sending is not None:
            sending[1].wait()
        return total

    return loss


def work_order(stages: Slices, microbatches: int) -> list[tuple[int, int]]:
    """(micro-batch, stage) of all ranks' work, in the one order in which every rank goes through it.

    Every rank handles its messages in this order, at the sender's place in it, so none waits for one that comes later.
    """
    work = [(index, stage) for index in range(microbatches) for stage in range(stages.count)]
    return sorted(work, key=lambda task: (sum(task), -task[1]))
