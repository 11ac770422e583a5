"""How a pipeline's ranks store the model's layers: orders written out by hand, and properties of any cut."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from qwen3f import params as P
from qwen3f.errors import UserError
from sharding.pipeline.cut import Pipeline, Slices, heights, make_slices, pipeline_traffic, restore, store
from tests.sharding.steps import MOE, config


@st.composite
def cuts(draw):
    """Any Slices in which no stage is empty and all stages but the last are full."""
    folded = draw(st.booleans())
    ranks, per_rank = draw(st.integers(1, 8)), 2 if folded else draw(st.integers(1, 3))
    height = draw(st.integers(1, 6))
    layers = height * (ranks * per_rank - 1) + draw(st.integers(1, height))
    each = height if ranks * per_rank > 1 and draw(st.booleans()) else 0  # 0: stages as equal as possible
    return Slices(layers, ranks, per_rank, folded, each)


@given(cuts())
def test_every_layer_has_one_place(stages):
    order = stages.layer_order()
    assert len(order) == stages.count * stages.height == stages.rows() * stages.ranks
    assert sorted(layer for layer in order if layer is not None) == list(range(stages.layers))
    assert sorted(stage for rank in range(stages.ranks) for stage in stages.slices_of(rank)) == list(
        range(stages.count)
    )
    for row, layer in enumerate(order):
        rank, within = divmod(row, stages.per_rank * stages.height)
        local, place = divmod(within, stages.height)
        stage = stages.slices_of(rank)[local]
        assert stages.layer_at(stage, place) == layer
        if layer is not None:
            assert stages.place_of(layer) == (stage, place)
            assert layer in stages.layers_of(stage)
        assert stages.layer_order_of(rank)[within] == layer


@given(st.integers(1, 40), st.integers(2, 6), st.integers(0, 45))
def test_heights_are_those_that_leave_the_last_stage_something_and_not_the_most(layers, ranks, each):
    last = layers - each * (ranks - 1)
    assert (each in heights(layers, ranks)) == (1 <= last <= each)
    if each in heights(layers, ranks):
        sizes = [len(Slices(layers, ranks, each=each).layers_of(stage)) for stage in range(ranks)]
        assert sizes == [*[each] * (ranks - 1), last]


@given(cuts())
def test_stages_follow_each_other_from_rank_to_rank(stages):
    """The next stage is on the next rank of the ring. Folded: on a neighbouring rank, and at a fold on the same."""
    for stage in range(stages.count - 1):
        a, b = stages.rank_of(stage), stages.rank_of(stage + 1)
        turn = stage // stages.ranks
        assert (
            b - a == (-1) ** turn * (stage % stages.ranks < stages.ranks - 1)
            if stages.folded
            else (a + 1) % stages.ranks == b
        )
    if stages.folded:
        assert stages.rank_of(0) == stages.rank_of(stages.count - 1) == 0


@given(cuts(), st.integers(1, 8))
def test_every_hidden_state_between_ranks_is_sent_once_and_its_gradient_once(stages, microbatches):
    traffic = [pipeline_traffic(stages, rank, microbatches, 3, 5, torch.bfloat16) for rank in range(stages.ranks)]
    edges = sum(stages.rank_of(s) != stages.rank_of(s + 1) for s in range(stages.count - 1))
    for direction in zip(*traffic):
        assert sum(t.messages for t in direction) == edges * microbatches
        assert all(t.bytes == t.messages * 3 * 5 * 2 for t in direction)


def test_orders_written_out():
    padded = Slices(94, 4)
    assert padded.height == 24
    assert padded.layer_order() == (*range(94), None, None)
    assert Slices(7, 2, 2).layer_order() == (0, 1, 4, 5, 2, 3, 6, None)
    assert Slices(7, 2, 2, folded=True).layer_order() == (0, 1, 6, None, 2, 3, 4, 5)
    assert Slices(6, 3, each=2).layer_order() == (0, 1, 2, 3, 4, 5)
    assert Slices(6, 2, each=5).layer_order() == (0, 1, 2, 3, 4, 5, None, None, None, None)
    assert Slices(16, 2, 2, True, 5).layer_order() == (*range(5), 15, *[None] * 4, *range(5, 15))
    assert Slices(7, 2, each=6).layer_order(kind=(1, 3, 5)) == (1, 3, 5, None, None, None)
    assert Slices(8, 2).layer_order(kind=(1, 3, 5, 7)) == (1, 3, 5, 7)
    assert Slices(7, 2).layer_order(kind=(1, 3, 5)) == (1, 3, 5, None)


@pytest.mark.parametrize(
    "layers, pipeline",
    [(7, Pipeline()), (7, Pipeline("zbv", 2)), (8, Pipeline("interleaved", 2)), (7, Pipeline(layers=6))],
)
def test_store_is_undone_by_restore(layers, pipeline):
    """Each stored row is the layer that layer_order names. Padding is zero. Parameters without layers stay the same."""
    cfg = config(**MOE | {"num_hidden_layers": layers, "decoder_sparse_step": 2})
    params, stages = P.init_params(cfg, 0), make_slices(cfg, pipeline, 2)
    stored = store(cfg, params, stages)
    for path, spec in P.abstract_params(cfg).items():
        if spec.layers is None:
            assert stored[path] is params[path]
            continue
        for row, layer in zip(stored[path], stages.layer_order(spec.layers), strict=True):
            expected = torch.zeros_like(row) if layer is None else params[path][spec.layers.index(layer)]
            assert torch.equal(row, expected)
    back = restore(cfg, stored, stages)
    assert back.keys() == params.keys()
    assert all(torch.equal(back[path], params[path]) for path in params)


@pytest.mark.parametrize(
    "changes, pipeline, ranks, words",
    [
        ({"num_hidden_layers": 3}, Pipeline(), 4, "num_hidden_layers=3 leaves a stage empty: .* write in .* pp3$"),
        ({"num_hidden_layers": 6}, Pipeline(), 4, "write in config.mesh pp3 or pp6$"),
        ({"num_hidden_layers": 5}, Pipeline("interleaved", 2), 2, "write in config.mesh pp1$"),
        ({"num_hidden_layers": 5}, Pipeline("interleaved", 2, layers=1), 2, "write in config.mesh pp1$"),
        (
            {"num_hidden_layers": 6},
            Pipeline("interleaved", 4),
            2,
            "stages of 1 layers; lower config.pipeline.stages, or write",
        ),
        ({"num_hidden_layers": 1}, Pipeline("zbv", 2), 2, "or write config.pipeline.schedule=1f1b with "),
        ({"num_hidden_layers": 28}, Pipeline(layers=10), 4, "layers=10 can't .* write 0, for equal stages, or 7 to 9$"),
        ({"num_hidden_layers": 28}, Pipeline(layers=6), 4, "or 7 to 9$"),
        ({"num_hidden_layers": 28}, Pipeline(layers=-1), 4, "or 7 to 9$"),
        ({"num_hidden_layers": 7}, Pipeline(layers=3), 4, "write 0, for equal stages, or 2$"),
        (MOE | {"num_hidden_layers": 11, "decoder_sparse_step": 2}, Pipeline(layers=5), 3, "the same number of each"),
        (
            MOE | {"num_hidden_layers": 4, "mlp_only_layers": (0,)},
            Pipeline(),
            2,
            "stage 1 of 2 has 2 sparse and 0 dense",
        ),
        (MOE | {"num_hidden_layers": 7, "mlp_only_layers": (6,)}, Pipeline(), 2, "stage 1 of 2 has 2 sparse and 1"),
        (MOE | {"num_hidden_layers": 6, "decoder_sparse_step": 2}, Pipeline(), 2, "the same number of each"),
        (
            MOE | {"num_hidden_layers": 5, "mlp_only_layers": (3, 4)},
            Pipeline(),
            2,
            "stage 1 of 2 has 0 sparse and 2 dense",
        ),
    ],
)
def test_stages_that_cannot_be_are_errors(changes, pipeline, ranks, words):
    with pytest.raises(UserError, match=words):
        make_slices(config(**changes), pipeline, ranks)


@pytest.mark.parametrize(
    "schedule, stages, words", [("gpipe", 1, "use one of 1f1b"), ("1f1b", 2, "stages=1$"), ("zbv", 1, "stages=2$")]
)
def test_schedules_that_do_not_exist_are_errors(schedule, stages, words):
    with pytest.raises(UserError, match=words):
        Pipeline(schedule, stages)


@pytest.mark.parametrize("pipeline", [Pipeline(layers=9), Pipeline("zbv", 2), Pipeline("interleaved", 4)])
def test_without_a_pipeline_its_stages_are_nothing_to_heed(pipeline):
    """With one pipeline rank, pipeline options are ignored: no padding, and few layers are no error.

    So the same command resumes a run on one device or on other axes.
    """
    assert make_slices(config(num_hidden_layers=27), pipeline, 1) == Slices(27)
    assert make_slices(config(**MOE | {"num_hidden_layers": 3, "mlp_only_layers": (0,)}), pipeline, 1) == Slices(3)
