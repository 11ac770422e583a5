"""Every sum over ranks in a training step is needed, and the equality tests see if one is wrong."""

import pytest
import torch
import torch.distributed as dist
from torch.distributed.distributed_c10d import _resolve_process_group

from qwen3f.train.optimizer import AdamW
from sharding import collectives
from tests.sharding.steps import MOE, config, local_run, values_of
from tests.sharding.worlds import each, ranks_of

# name: (changes, mesh, FSDP). Between them they make every kind of reduction there is. With a width of 22 over dp4 some
# weights are replicated.
CASES = {
    "dense": ({}, "dp2,tp2", True),
    "replicated": ({"tie_word_embeddings": True}, "dp2", False),
    "uneven": ({"hidden_size": 22}, "dp4", True),
    "moe": (MOE, "dp2,ep2", True),
    "moe, tp": (MOE, "tp2", True),
}
ON_PUSH = ("uneven", "moe, tp")


def alone_reduce(x, group):
    return x.clone()


def alone_scatter(x, size, group, dim):
    """What this rank would keep of its own tensor, without a sum."""
    first, second, *_ = dist.get_process_group_ranks(_resolve_process_group(group))
    return each([v.chunk(size, dim)[rank // (second - first) % size] for rank, v in enumerate(ranks_of(x))])


def twice(x):
    """2·x. Of the experts' counts double only one: all doubled give the same shares, so rightly the same result."""
    return x * (torch.arange(x.shape[1]) == 0).add(1) if x.dim() == 2 and x.dtype == torch.int64 else 2 * x


@pytest.mark.parametrize("name", [pytest.param(n, marks=() if n in ON_PUSH else pytest.mark.nightly) for n in CASES])
def test_no_reduction_can_be_dropped_or_doubled(name, monkeypatch):
    """Replace each sum over ranks of a step, one at a time, by this rank's part alone, or by twice the sum.

    The result must leave the equality suite's tolerance. So each reduction is needed, and the suite sees each. One
    scatter sums several gradients: all are changed together, and each has to show in its own AdamW moment. Clipping is
    off, so that nothing but its own gradient enters a moment.
    """
    changes, mesh, fsdp = CASES[name]
    cfg = config(**{"num_hidden_layers": 1} | changes)
    calls, target, double = [], None, False

    def changed(real, alone, x, where):
        return twice(real) if double else alone(x, *where)

    def mutated(real, alone):
        def call(x, *where):
            calls.append((real.__name__, 1))
            return changed(real(x, *where), alone, x, where) if len(calls) - 1 == target else real(x, *where)

        return call

    scatters = collectives._start_scatters

    def scatter_each(grads, dtypes, size, group):
        shares = scatters(grads, dtypes, size, group)
        calls.append((scatters.__name__, sum(share is not None for share in shares)))
        if len(calls) - 1 != target:
            return shares
        where = size, group, 0
        return [None if s is None else changed(s, alone_scatter, grad, where) for grad, s in zip(grads, shares)]

    for attribute, alone in (("_all_reduce", alone_reduce), ("_reduce_scatter", alone_scatter)):
        monkeypatch.setattr(collectives, attribute, mutated(getattr(collectives, attribute), alone))
    monkeypatch.setattr(collectives, "_start_scatters", scatter_each)

    with local_run(cfg, mesh, fsdp=fsdp, steps=1, hyper=AdamW(clip_norm=0.0)) as (step, start, (batch,)):

        def result():
            calls.clear()
            return values_of(*step(start, batch))

        expected, order = result(), calls.copy()
        assert order
        unseen = []
        for target, (operator, gradients) in enumerate(order):
            for double in (False, True):
                got = result()
                # where a call makes one sum, any change is enough
                trees = (got, expected) if gradients == 1 else (got[0].opt.m, expected[0].opt.m)
                seen = sum(map(differ, *map(leaves_of_ranks, trees)))
                if seen < 1 or (gradients > 1 and seen != gradients):
                    unseen.append((target, operator, seen, "doubled" if double else "dropped"))
    assert not unseen, f"of {order}"


def leaves_of_ranks(values):
    """The leaves of what values_of gives, each as one tensor [ranks, …]."""
    leaves = torch.utils._pytree.tree_leaves(values, is_leaf=lambda x: isinstance(x, list))
    return [torch.stack(x) for x in leaves]


def differ(got, expected):
    return not torch.allclose(got, expected, rtol=0, atol=1e-10)
