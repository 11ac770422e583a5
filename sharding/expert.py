"""Expert parallelism: each rank of ep holds some of the experts; tokens are sent to their experts' ranks and back.

A rank sorts its rows by expert, sends every rank the rows for that rank's experts, and receives the rows for its own.
The splits are uneven, so no row is padded or dropped. The host needs the splits: one copy from the device per layer.

N tokens · K experts per token · R = N·K rows · M rows received · E experts of all ranks · e experts of this rank ·
D hidden · S ranks
"""

from collections.abc import Callable

import torch
from torch import Tensor

from kernels import moe_dispatch
from sharding.axes import Axis
from sharding.collectives import all_to_all

ExpertsFn = Callable[[Tensor, Tensor, Tensor], Tensor]


def mix_of_ranks(
    experts: ExpertsFn, x_ND: Tensor, weights_NK: Tensor, experts_NK: Tensor, num_experts: int, ep: Axis
) -> Tensor:
    """[N, D]: for each token, Σ over its K experts of weight · expert(x), on whichever rank the expert is.

    experts: applies this rank's experts, (rows [M, D], weights [M, 1], expert numbers 0 … e − 1 [M, 1]) -> [M, D].
    num_experts: E, a multiple of the size of ep; rank r holds experts r·e … r·e + e − 1.
    """
    if ep.size == 1:
        return experts(x_ND, weights_NK, experts_NK)
    where = moe_dispatch.plan(experts_NK, num_experts)
    to_Se = where.counts.view(ep.size, -1)
    ones = [1] * ep.size
    from_Se = all_to_all(to_Se, ones, ones, ep)
    send, receive = torch.stack((to_Se.sum(1), from_Se.sum(1))).tolist()
    rows_MD = all_to_all(moe_dispatch.take(x_ND, where), send, receive, ep)
    numbers_e = torch.arange(to_Se.shape[1], device=x_ND.device)
    numbers_M1 = numbers_e.repeat(ep.size).repeat_interleave(from_Se.flatten(), output_size=sum(receive)).unsqueeze(1)
    y_MD = experts(rows_MD, torch.ones_like(numbers_M1, dtype=x_ND.dtype), numbers_M1)
    return moe_dispatch.combine(all_to_all(y_MD, receive, send, ep), weights_NK, where)
