"""Hybrid FSDP equals one device: weights are sharded within each data replica (dr), gradients summed over replicas."""

import itertools

import pytest
import torch
from torch.distributed.tensor import Replicate

from qwen3f import params as P
from qwen3f import presets, tree
from sharding import fsdp, rules
from sharding.mesh import AXES, DATA, FSDP, hybrid, parse_mesh
from sharding.pipeline.cut import Pipeline, make_slices
from tests.sharding.steps import MOE, config, expected_on, local_run, on_local_world, on_one_device, values_of
from tests.sharding.test_equality import compare
from tests.sharding.worlds import each, local_world, ranks_of

TIED = {"tie_word_embeddings": True}
CASES = [
    ({}, "dr2", 1, True),
    ({}, "dr2,dp2", 1, True),
    (TIED, "dr2,dp2,tp2", 2, True),
    ({"gradient_checkpointing": "selective"}, "dr2,cp2", 1, True),
    ({"hidden_size": 22}, "dr2,dp4", 1, True),  # 22 doesn't divide by 4: some leaves are replicated over both
    ({}, "dr2,dp2", 1, False),
    (MOE, "dr2,ep2", 1, True),
    (MOE | {"router_balance": "global_exact"}, "dr2,dp2", 2, True),
    (MOE, "dr2,dp2,ep2,cp2", 1, True),
]


@pytest.mark.parametrize("changes, mesh, microbatches, cut", CASES)
def test_a_hybrid_equals_one_device(changes, mesh, microbatches, cut):
    """All metrics, parameters and moments after a step, on every rank: float64 to 1e-10, as in test_equality."""
    cfg, run = config(**{"num_hidden_layers": 1} | changes), {"microbatches": microbatches, "steps": 1}
    _, (whole, metrics) = on_one_device(cfg, **run)
    ((shards, on_ranks),) = on_local_world(cfg, mesh, fsdp=cut, **run)
    compare(on_ranks, {key: [value] * len(on_ranks[key]) for key, value in metrics.items()})
    compare(shards, expected_on(whole, cfg, mesh, cut))


@pytest.mark.parametrize(
    "changes, mesh, microbatches", [({}, "dr2,dp2", 2), ({"hidden_size": 22}, "dr2,dp4", 1), (MOE, "dr2,ep2", 2)]
)
def test_the_gradients_sum_over_replicas_can_be_neither_dropped_nor_doubled(changes, mesh, microbatches, monkeypatch):
    """A step makes this sum once for each set of axes, after the last micro-batch. If one is dropped or doubled, the
    result moves by more than the 1e-10 of the test above."""
    cfg, real = config(**{"num_hidden_layers": 1} | changes), fsdp.sum_over
    calls, target = [], None

    def dropped(x, axes, names):
        return real(x, axes, tuple(name for name in names if name != "dr"))

    def doubled(x, axes, names):
        return 2 * real(x, axes, names)

    def sum_over(x, axes, names=AXES):
        if "dr" not in names or x.dim() != 1 or len(x) < 4:  # sums of totals and losses, not of gradients
            return real(x, axes, names)
        calls.append(names)
        return (mutated if names == target else real)(x, axes, names)

    monkeypatch.setattr(fsdp, "sum_over", sum_over)
    with local_run(cfg, mesh, microbatches=microbatches, steps=1) as (step, start, (batch,)):

        def result():
            return tree.leaves(values_of(*step(start, batch)))

        expected, sets = result(), calls.copy()
        assert len(sets) == len({*sets})
        assert ("dr",) in sets
        for target, mutated in itertools.product(sets, (dropped, doubled)):
            got = result()
            seen = any(not torch.allclose(a, b, rtol=0, atol=1e-10) for a, b in zip(got, expected, strict=True))
            assert seen, (target, mutated.__name__)


@pytest.mark.parametrize("preset", ["debug", "debug_moe"])
@pytest.mark.parametrize("mesh", ["dp8", "dp8,ep2", "dp4,cp2,tp2", "pp2,dp4"])
@pytest.mark.parametrize("factor", [1, 2, 4])
def test_replicas_hold_what_a_smaller_mesh_would(preset, mesh, factor):
    """dr cuts no parameter: a rank holds what it holds on the mesh without replicas, and sums gradients over dr."""
    shape = parse_mesh(mesh)
    mixed = hybrid(shape, shape.dp * shape.ep * shape.cp // factor)
    assert (mixed.dr, mixed.dr * mixed.dp) == (factor, shape.dp)
    alone = parse_mesh(mesh.replace(f"dp{shape.dp}", f"dp{mixed.dp}"))
    cfg = presets.get(preset)
    table, inner = P.abstract_params(cfg), rules.place(cfg, alone)
    stages = make_slices(cfg, Pipeline(), shape.pp)
    for path, placed in rules.place(cfg, mixed).items():
        assert placed == inner[path]
        assert "dr" not in placed.cuts
        assert rules.placements(placed)[AXES.index("dr")] == Replicate()
        here, there = (
            rules.local_shape(table[path], p, sizes, stages) for p, sizes in ((placed, mixed), (inner[path], alone))
        )
        assert here == there
        summed = set(rules.replicated_axes(placed, mixed))
        assert summed == {*rules.replicated_axes(inner[path], alone)} | ({"dr"} if factor > 1 else set())


@pytest.mark.parametrize("mesh", ["dr2,dp3", "dr2,dp2,ep2", "dr3,cp2,tp2", "dr2,dp2,ep2,cp2", "pp2,dr2,ep2"])
def test_sums_over_data_axes_are_one_collective(mesh, monkeypatch):
    """For any set of axes: the right sum, by one collective for all data axes together and one for each other axis."""
    shape = parse_mesh(mesh)
    wide = [axis for axis in AXES if getattr(shape, axis) > 1]
    x = torch.arange(float(shape.size), dtype=torch.float64) ** 2
    ranks = x.view([getattr(shape, axis) for axis in AXES])
    calls, real = [], fsdp.all_reduce
    monkeypatch.setattr(fsdp, "all_reduce", lambda *args: calls.append(args[1].name) or real(*args))
    sets = {
        ("dr",),
        DATA,
        FSDP,
        ("dr", "dp", "ep"),
        ("dr", "dp", "cp"),
        ("dp", "cp"),
        ("ep",),
        AXES,
        ("pp", "dr", "tp"),
    }
    with local_world(mesh) as (_, axes):
        for names in sets:
            calls.clear()
            dims = [AXES.index(name) for name in names]
            expected = ranks.sum(dims, keepdim=True).expand(ranks.shape).flatten()
            got = ranks_of(fsdp.sum_over(each(x), axes, names))
            assert torch.equal(torch.stack(got), expected), names
            over = [name for name in names if name in wide]
            assert len([call for call in calls if axes_size(axes, call) > 1]) == (
                sum(name not in DATA for name in over) + any(name in DATA for name in over)
            ), names


def axes_size(axes, name):
    return axes.over(*name.split("_")).size


def test_a_rank_finds_its_rows_among_the_replicas():
    """Rows go to ranks in the same order as with dp8,tp2, whichever part of dp8 becomes dr or ep."""
    for mesh in ("dp8,tp2", "dr2,dp4,tp2", "dr4,dp2,tp2", "dr8,tp2", "dr2,dp2,ep2,tp2"):
        with local_world(mesh) as (_, axes):
            place, places = axes.rows
            got = ranks_of(each([torch.tensor(0)] * 16) + place)
        assert places == 8
        assert [int(x) for x in got] == [rank // 2 for rank in range(16)], mesh
