"""The order of a pipeline's forward passes: checked by properties, and by a simulation that counts time."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qwen3f.errors import UserError
from qwen3f.model import Execution
from qwen3f.train.pipelined import make_pipelined_outputs
from sharding.axes import Axis, sizes_only
from sharding.layout import Layout
from sharding.mesh import MeshShape
from sharding.pipeline.cut import Slices
from sharding.pipeline.forward import work_order
from tests.sharding.steps import config


def finish(stages, microbatches):
    """The time when the last forward pass ends. A pass takes 1, a rank runs one at a time, messages take no time."""
    free, done = [0] * stages.ranks, {}
    for index, stage in work_order(stages, microbatches):
        rank = stages.rank_of(stage)
        done[index, stage] = free[rank] = max(free[rank], done[index, stage - 1] if stage else 0) + 1
    return max(free)


@given(st.integers(1, 6), st.integers(1, 3), st.booleans(), st.integers(1, 9))
def test_work_follows_what_it_needs_and_loses_no_time(ranks, per_rank, folded, microbatches):
    per_rank = 2 if folded else per_rank
    stages = Slices(ranks * per_rank, ranks, per_rank, folded)
    order = work_order(stages, microbatches)
    assert sorted(order) == [(index, stage) for index in range(microbatches) for stage in range(stages.count)]
    assert all(order.index((i, s - 1)) < order.index((i, s)) for i, s in order if s)
    if per_rank == 1:
        assert finish(stages, microbatches) == microbatches + ranks - 1
    else:  # never worse than stage by stage, where each rank is busy with one stage at a time
        assert finish(stages, microbatches) <= per_rank * (microbatches + ranks - 1)


def test_an_order_written_out():
    assert work_order(Slices(2, 2), 2) == [(0, 0), (0, 1), (1, 0), (1, 1)]
    assert work_order(Slices(4, 2, 2), 2) == [(0, 0), (0, 1), (1, 0), (0, 2), (1, 1), (0, 3), (1, 2), (1, 3)]


def test_one_graph_is_an_error():
    layout = Layout(sizes_only(MeshShape(pp=2)))
    assert layout.axes.pp == Axis("pp", 2)
    with pytest.raises(UserError, match="write config.compile=block"):
        make_pipelined_outputs(config(), Execution(compile="step"), layout, None)
