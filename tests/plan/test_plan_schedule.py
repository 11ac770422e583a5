"""The order of a pipeline's work, against torch's schedules and the papers' bubbles."""

import itertools
from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st
from torch.distributed.pipelining import schedules as torch_schedules

from qwen3f.plan import schedule as S

KINDS = {"FORWARD": "F", "FULL_BACKWARD": "B", "BACKWARD_INPUT": "I", "BACKWARD_WEIGHT": "W"}


def torchs_order(name, ranks, stages, microbatches):
    cls = {
        "interleaved": torch_schedules.ScheduleInterleaved1F1B,
        "zero_bubble": torch_schedules.ScheduleInterleavedZeroBubble,
        "zbv": torch_schedules.ScheduleZBVZeroBubble,
    }[name]
    of = SimpleNamespace(
        n_local_stages=stages,
        num_stages=stages * ranks,
        pp_group_size=ranks,
        _n_microbatches=microbatches,
        microbatches_per_round=microbatches // max(1, microbatches // ranks),
    )
    return [
        [
            (KINDS[action.computation_type.name], action.stage_index, action.microbatch_index)
            for action in cls._calculate_single_rank_operations(of, rank)
            if action is not None
        ]
        for rank in range(ranks)
    ]


@pytest.mark.parametrize("name", ["interleaved", "zero_bubble", "zbv"])
@pytest.mark.parametrize(
    "ranks, stages, microbatches", [(2, 1, 2), (4, 1, 8), (4, 2, 8), (3, 3, 8), (2, 2, 6), (4, 2, 3)]
)
def test_orders_are_torchs(name, ranks, stages, microbatches):
    stages = 2 if name == "zbv" else stages
    ours = S.orders(name, ranks, stages, microbatches)
    got = [[(a.kind, a.stage, a.microbatch) for a in actions] for actions in ours]
    assert got == torchs_order(name, ranks, stages, microbatches)


@given(ranks=st.integers(1, 6), more=st.integers(0, 9))
def test_1f1b_alternates_as_torchs(ranks, more):
    """Kinds are compared with torch, micro-batches with 0, 1, 2, …

    torch's own list for Schedule1F1B has the kinds right, but numbers the last rank's micro-batches from 1.
    """
    microbatches = ranks + more
    of = SimpleNamespace(_num_stages=ranks, _n_microbatches=microbatches)
    order = S.orders("1f1b", ranks, 1, microbatches)
    for rank, actions in torch_schedules.Schedule1F1B._get_pipeline_order(of).items():
        kinds = [KINDS[a.computation_type.name] for a in actions if a and a.computation_type.name in KINDS]
        assert [action.kind for action in order[rank]] == kinds
        for kind in "FB":
            assert [a.microbatch for a in order[rank] if a.kind == kind] == list(range(microbatches))
    timeline = S.simulate(order, *[[1.0] * ranks] * 3)
    assert timeline.in_flight == tuple(range(ranks, 0, -1))


@given(
    ranks=st.integers(1, 6),
    more=st.integers(0, 5),
    times=st.tuples(*[st.floats(0.1, 2.0)] * 3),
)
def test_bubble_of_equal_stages_is_the_papers(ranks, more, times):
    """(p−1)(F+I+W) for 1F1B (Narayanan et al. 2021), whatever the durations; the tolerance is rounding's."""
    microbatches = ranks * (1 + more)
    timeline = S.simulate(S.orders("1f1b", ranks, 1, microbatches), *([t] * ranks for t in times))
    assert timeline.bubble == pytest.approx(S.ideal_bubble("1f1b", ranks, 1, microbatches, *times), abs=1e-9)


@pytest.mark.parametrize("stages", [1, 2, 4])
def test_interleaving_and_zero_bubble_shrink_it(stages):
    """With equal F, I and W (so I+W is twice F, as for products) the figures are exactly the papers'."""
    times = [1.0] * 4 * stages
    name = "interleaved" if stages > 1 else "1f1b"
    interleaved = S.simulate(S.orders(name, 4, stages, 8), times, times, times)
    zero = S.simulate(S.orders("zero_bubble", 4, stages, 8), times, times, times)
    total = 3.0 * stages * 8
    assert interleaved.seconds == pytest.approx(total + 3 * 3.0)  # (p−1)(F+I+W) of a stage
    assert zero.seconds <= total + 3 * 3.0 - 3
    if stages == 1:
        assert zero.seconds == pytest.approx(total + 3 * 1.0)  # ZB-H1: (p−1)(F+I−W)
        assert zero.bubble == pytest.approx(S.ideal_bubble("zero_bubble", 4, 1, 8, 1, 1, 1))
    folded = S.simulate(S.orders("zbv", 4, 2, 8), *[[1.0] * 8] * 3)
    assert folded.seconds == pytest.approx(3.0 * 2 * 8 + 3)  # a rank waits for the first micro-batch to arrive, no more
    for timeline in (interleaved, zero, folded):
        for slots in timeline.ranks:
            assert all(a.end <= b.start + 1e-12 for a, b in itertools.pairwise(slots))


def test_an_impossible_order_is_an_error():
    order = [[S.Action("B", 0, 0), S.Action("F", 0, 0)]]
    with pytest.raises(ValueError, match="deadlocks"):
        S.simulate(order, [1.0], [1.0], [1.0])
