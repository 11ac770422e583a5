"""Expert parallelism: each rank of ep holds some of the experts, and the tokens travel to them and back.

A rank orders its rows by expert, sends each rank the rows of that rank's experts, and gets its own experts' rows from
all; uneven splits, so nothing is padded or dropped. The host needs the counts to know the splits: one copy a layer.

N tokens · K experts a token · R = N·K rows · M rows received · E experts, all · e this rank's · D hidden · S ranks
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
    """[N, D]: Σ over a token's experts of weight · expert(x), wherever the expert lives.

    experts: this rank's, (rows [M, D], weights [M, 1], numbers among this rank's [M, 1]) -> [M, D], row by row.
    num_experts: of all ranks, a multiple of ep; rank r holds numbers r·e … r·e + e − 1.
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
