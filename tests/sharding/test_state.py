"""State on a mesh: the same values whatever the mesh, and what a mesh refuses."""

import pytest
import torch
from torch.distributed.tensor import DTensor

from qwen3f import model, tree
from qwen3f.errors import UserError
from qwen3f.model.block import block_fn
from qwen3f.stages.pretrain import make_train_step
from qwen3f.train.optimizer import AdamW
from qwen3f.train.state import init_state
from sharding.axes import Axes, Axis
from sharding.layout import Layout
from sharding.pipeline.cut import Pipeline
from tests.sharding.steps import MOE, SCHEDULE, config, expected_on
from tests.sharding.worlds import local_world, ranks_of


@pytest.mark.parametrize("changes, mesh", [({"qk_norm": "l2"}, "dp2,tp2"), (MOE, "dp2,ep2"), ({}, "cp2,tp4")])
def test_a_mesh_starts_from_one_devices_values(changes, mesh):
    cfg = config(**changes)
    whole = init_state(cfg, 3)
    with local_world(mesh) as (device_mesh, axes):
        mine = init_state(cfg, 3, layout=Layout(axes), mesh=device_mesh)
        assert all(isinstance(x, DTensor) for x in tree.leaves(mine))
        for path, x in whole.params.items():
            assert mine.params[path].shape == x.shape
            assert mine.opt.m[path].placements == mine.params[path].placements
        shards = {path: ranks_of(x.to_local()) for path, x in mine.params.items()}
    for path, expected in expected_on(whole, cfg, mesh).params.items():
        for got, value in zip(shards[path], expected, strict=True):
            assert torch.equal(got, value), path


@pytest.mark.parametrize(
    "layout, compiled",
    [
        (Layout(Axes(dp=Axis("dp", 2))), {False, True}),
        (Layout(Axes(ep=Axis("ep", 2))), {False}),
        (Layout(Axes(pp=Axis("pp", 2)), pipeline=Pipeline("zero_bubble")), set()),
    ],
    ids=["dp", "ep", "zero_bubble"],
)
def test_blocks_that_cannot_be_compiled_run_as_they_are(layout, compiled, monkeypatch):
    """compiled: which kinds of block are compiled, of dense (False) and sparse (True)."""
    monkeypatch.setattr("qwen3f.skeletons.compile_static", lambda fn: "compiled")
    make = block_fn.__wrapped__  # without its cache
    blocks = {sparse: make(config(**MOE), model.Execution("block"), sparse, layout) for sparse in (False, True)}
    assert {sparse for sparse, block in blocks.items() if block == "compiled"} == compiled


@pytest.mark.parametrize(
    "changes, compile, axis, message",
    [
        ({"attention_dropout": 0.1}, "off", "dp", "model.attention_dropout is not supported on a mesh"),
        (MOE, "step", "ep", "config.compile=step with ep=2, .*write compile=block"),
    ],
)
def test_what_a_mesh_cannot_do(changes, compile, axis, message):
    layout = Layout(Axes(**{axis: Axis(axis, 2)}))
    with pytest.raises(UserError, match=message):
        make_train_step(config(**changes), AdamW(), SCHEDULE, execution=model.Execution(compile=compile), layout=layout)
