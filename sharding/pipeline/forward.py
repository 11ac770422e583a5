"""A pipeline's outputs without gradients, for evaluation and for log-probabilities.

torch's schedules have an `eval` that walks through the training schedule and leaves out its backward passes. It is not
used: with zbv it fails, 1f1b takes no fewer micro-batches than ranks, and from torch 2.13 on the receive buffers are
made anew whenever evaluation and training alternate. Forward passes alone need no schedule: micro-batch m is on slice s
at time m + s.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.distributed_c10d import _resolve_process_group

from sharding.layout import Layout
from sharding.pipeline.cut import Slices
from sharding.pipeline.schedule import Params, SlicedModel


def make_forward(model: SlicedModel, layout: Layout) -> Callable[[Params, Sequence[Any], Any], list[Any]]:
    """forward(params, microbatches, shared) -> what the last slice's program gives for each micro-batch, in order;
    [] on ranks without that slice.

    params, micro-batches and shared as for schedule.make_gradients; any number of micro-batches, of one shape. Programs
    get no carry. All ranks call it together; it builds no graph and keeps nothing.
    """
    pp, slices = layout.axes.pp, model.slices

    @torch.no_grad()
    def forward(params: Params, microbatches: Sequence[Any], shared: Any) -> list[Any]:
        leaves, group = model.select(params), _resolve_process_group(pp.group)
        device = next(iter(params.values())).device
        outputs: list[Any] = []
        arriving: dict[tuple[int, int], tuple[Tensor, dist.Work | None]] = {}
        sending: tuple[Tensor, dist.Work] | None = None
        for index, number in work_order(slices, len(microbatches)):
            following = (index, number + 1)
            here = slices.rank_of(number) == pp.index
            there = slices.rank_of(number + 1) == pp.index if number + 1 < slices.count else here
            if here:
                x, work = arriving.pop((index, number), (None, None))
                if work is not None:
                    work.wait()
                out, _ = model.programs[number](leaves[number], microbatches[index], shared, None, x)
                if number + 1 == slices.count:
                    outputs.append(out)
                elif there:
                    arriving[following] = out, None
                else:
                    if sending is not None:
                        sending[1].wait()  # one message at a time is kept for sending
                    out = out.contiguous()
                    sending = out, dist.isend(out, group=group, group_dst=slices.rank_of(number + 1))
            elif there:
                room = model.empty_hidden(microbatches[index], params, device)
                arriving[following] = room, dist.irecv(room, group=group, group_src=slices.rank_of(number))
        if sending is not None:
            sending[1].wait()
        return outputs

    return forward


def work_order(slices: Slices, microbatches: int) -> list[tuple[int, int]]:
    """(micro-batch, slice) of all ranks' work, in the one order in which every rank goes through it.

    Every rank handles its messages in this order, at the sender's place in it, so none waits for one that comes later.
    """
    work = [(index, number) for index in range(microbatches) for number in range(slices.count)]
    return sorted(work, key=lambda task: (sum(task), -task[1]))
