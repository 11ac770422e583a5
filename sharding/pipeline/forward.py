"""A pipeline's outputs without gradients, for evaluation and for log-probabilities.

torch's schedules have an `eval` method, which runs the training schedule without its backward passes. It is not used:
it fails with zbv, needs at least as many micro-batches as ranks with 1f1b, and from torch 2.13 on allocates new receive
buffers whenever evaluation and training alternate. Forward passes need no schedule: micro-batch m is on slice s at
time m + s.
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
    """forward(params, microbatches, shared) -> the outputs of the last slice's program, one per micro-batch, in order;
    [] on ranks without that slice.

    params, microbatches and shared: as for schedule.make_gradients. There may be any number of micro-batches, all of
    one shape. The programs' carry is None. All ranks call it together; it builds no autograd graph and saves nothing.
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
    """(micro-batch, slice) of all ranks' work, in the order in which every rank walks through it.

    A rank sends and receives a message when it reaches the sender's entry. All ranks have the same order, so no message
    waits for a later one.
    """
    work = [(index, number) for index in range(microbatches) for number in range(slices.count)]
    return sorted(work, key=lambda task: (sum(task), -task[1]))
