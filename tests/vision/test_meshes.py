"""A training step on images, on a mesh, computes what it computes on one device.

Metrics, parameters and both moments are compared after each AdamW step, on every rank. After the first step the moments
show the gradients. float64, to 1e-10: only the order of sums differs.
"""

import random

import pytest
import torch

from qwen3f import params as P
from qwen3f import tree
from qwen3f.errors import UserError
from qwen3f.model.transformer import with_places
from qwen3f.stages.pretrain import make_train_step
from qwen3f.train.optimizer import AdamW
from qwen3f.train.state import init_state
from sharding.axes import axes_of, make_mesh
from sharding.layout import Layout
from sharding.mesh import parse_mesh
from sharding.pipeline.cut import Pipeline, make_slices
from sharding.state import as_dtensors
from tests.sharding.steps import SCHEDULE, cut_state, expected_on, share, values_of
from tests.sharding.test_equality import compare
from tests.sharding.worlds import each, local_world, run_processes
from tests.vision.hf_vl import MOE, our_batch, row, vl_config

LENGTH, PATCHES = 48, 212
SPARSE = {**MOE, "num_experts_per_tok": 2, "router_aux_loss_coef": 0.05, "router_z_loss_coef": 0.01}
FROZEN = (("model\\.visual\\.(patch_embed|pos_embed|blocks).*", 0.0), ("model\\.layers\\..*", 0.0))
FUSED = {"vision_deepstack_mode": "vit_fuse", "vision_merger": "pool_linear", "vision_deepstack_layers": (0, 1)}
SIZES = {"vocab_size": 96, "num_hidden_layers": 2, "vision_num_hidden_layers": 2, "vision_deepstack_layers": (0,)}


def config(**changes):
    return vl_config(**{**SIZES, **changes})


def batches(cfg, steps, kinds=("tit", "tiv", "t", "t")):
    """Batches of one row for each kind, padded to LENGTH. The last rows, those of the last ranks, have no image."""
    out = []
    for seed in range(steps):
        rand = random.Random(seed)
        batch = our_batch(cfg, [row(rand, kind) for kind in kinds], torch.float64)
        room = LENGTH - batch["tokens"].shape[1]
        assert room >= 0, room
        for key, value in (("tokens", 1), ("segments", 0)):
            batch[key] = torch.nn.functional.pad(batch[key], (0, room), value=value)
        batch["pixel_values"] = torch.nn.functional.pad(
            batch["pixel_values"], (0, 0, 0, PATCHES - batch["pixel_values"].shape[1])
        )
        batch["grids"] = torch.nn.functional.pad(batch["grids"], (0, 0, 0, 8 - batch["grids"].shape[1]))
        g = torch.Generator().manual_seed(seed)
        targets = torch.randint(0, cfg.vocab_size, batch["tokens"].shape, generator=g)
        weights = torch.rand(batch["tokens"].shape, generator=g)
        batch |= {"targets": targets.masked_fill(batch["segments"] == 0, -100), "loss_weights": weights}
        out.append(with_places(batch, cfg))
    return out


def initial(cfg, hyper):
    """The initial state. Fusions and biases start at zero, which would hide errors below them, so they get noise."""
    start = init_state(cfg, 0, hyper, dtype=torch.float64)
    for path, leaf in start.params.items():
        if path.startswith(P.TAP_FUSIONS) or path.endswith("bias"):
            leaf += 0.1 * torch.randn(leaf.shape, generator=torch.Generator().manual_seed(1), dtype=leaf.dtype)
    return start


def on_one_device(cfg, inputs, hyper, **options):
    step, state, history = make_train_step(cfg, hyper, SCHEDULE, **options), initial(cfg, hyper), []
    for batch in inputs:
        state, metrics = step(state, batch)
        history.append((state, metrics))
    return history


def on_local_world(cfg, inputs, hyper, mesh, microbatches=1):
    start, history = initial(cfg, hyper), []
    with local_world(mesh) as (device_mesh, axes):
        layout, shape = Layout(axes), axes.shape
        on_all = tree.map(lambda x: each([x] * shape.size), start)
        state = as_dtensors(cut_state(on_all, layout.place(cfg), axes), cfg, layout, device_mesh)
        step = make_train_step(cfg, hyper, SCHEDULE, microbatches=microbatches, layout=layout)
        for batch in inputs:
            shares = [share(batch, shape, rank, microbatches) for rank in range(shape.size)]
            state, metrics = step(state, {key: each([s[key] for s in shares]) for key in batch})
            history.append(values_of(state, metrics))
    return history


# (mesh, changes of the config, rates, steps)
CASES = [
    ("dp2", {}, (), 2), ("tp2", {}, (), 1), ("cp2", {}, (), 1), ("ep2", SPARSE, (), 1),
    ("dp2,tp2", {}, FROZEN, 1), ("cp2,tp2", {"gradient_checkpointing": "selective"}, (), 1), ("dp2,cp2", FUSED, (), 1),
]  # fmt: skip
AT_NIGHT = [
    ("dp2", {}, FROZEN, 2), ("tp2", {}, FROZEN, 2), ("cp2", {}, FROZEN, 2), ("ep2", SPARSE, FROZEN, 2),
    ("dp2,tp2", {}, (), 2), ("cp2,tp2", {}, FROZEN, 2), ("dp4", FUSED, (), 2), ("dp2,ep2", SPARSE, (), 2),
]  # fmt: skip


@pytest.mark.parametrize(
    "mesh, changes, rates, steps", [*CASES, *(pytest.param(*case, marks=pytest.mark.nightly) for case in AT_NIGHT)]
)
def test_a_mesh_equals_one_device(mesh, changes, rates, steps):
    cfg, hyper = config(**changes), AdamW(rates=rates)
    inputs = batches(cfg, steps)
    expected = on_one_device(cfg, inputs, hyper)
    got = on_local_world(cfg, inputs, hyper, mesh)
    for (whole, metrics), (shards, on_ranks) in zip(expected, got, strict=True):
        assert on_ranks.keys() == metrics.keys()
        for key, value in metrics.items():
            for rank_value in on_ranks[key]:
                torch.testing.assert_close(rank_value, value, rtol=0, atol=1e-10 if value.is_floating_point() else 0)
        compare(shards, expected_on(whole, cfg, mesh))


@pytest.mark.parametrize("mesh, kinds", [("", ("t", "tt", "t", "t")), ("", None), ("dp2", ("t", "tt", "t", "t"))])
def test_a_batch_without_images_leaves_the_tower_alone(mesh, kinds):
    """Neither weight decay nor moments may change it then. kinds None: a batch without the tensors for images."""
    cfg, hyper = config(), AdamW()
    inputs = batches(cfg, 2)
    inputs[1] = batches(cfg, 1, kinds or ("t",) * 4)[0]
    if kinds is None:
        inputs[1] = {k: v for k, v in inputs[1].items() if k not in ("pixel_values", "grids", "visual_index")}
    history = on_local_world(cfg, inputs, hyper, mesh) if mesh else on_one_device(cfg, inputs, hyper)
    before, after = history[0][0], history[1][0]
    for old, new in zip((before.params, *before.opt), (after.params, *after.opt)):
        for path, leaf in old.items():
            same = all(map(torch.equal, new[path], leaf)) if mesh else torch.equal(new[path], leaf)
            assert same == path.startswith(P.VISUAL), path


def test_microbatches_change_nothing():
    cfg, hyper = config(), AdamW()
    inputs = batches(cfg, 1)
    ((whole, _),) = on_one_device(cfg, inputs, hyper)
    ((parts, _),) = on_one_device(cfg, inputs, hyper, microbatches=2)
    for path, leaf in whole.opt.m.items():
        torch.testing.assert_close(parts.opt.m[path], leaf, rtol=0, atol=1e-10)


PIPELINES = {
    "pp2": (Pipeline(), {}, FROZEN),
    "pp2,dp2": (Pipeline("zero_bubble"), SPARSE, ()),
    "pp2,tp2": (Pipeline("zbv", 2), {"num_hidden_layers": 4}, ()),
    "pp2,cp2": (Pipeline("interleaved", 2), {"num_hidden_layers": 4, **FUSED}, ()),
}


def on_processes(rank):
    torch.set_num_threads(1)
    out = {}
    for mesh, (pipeline, changes, rates) in PIPELINES.items():
        shape = parse_mesh(mesh if "," in mesh else f"{mesh},dr2")
        cfg, hyper = config(**changes), AdamW(rates=rates)
        device_mesh = make_mesh(shape, "cpu")
        layout = Layout(axes_of(device_mesh), pipeline=pipeline)
        state = init_state(cfg, 0, hyper, dtype=torch.float64, layout=layout, mesh=device_mesh)
        step = make_train_step(cfg, hyper, SCHEDULE, microbatches=2, layout=layout)
        for batch in batches(cfg, 1):
            state, metrics = step(state, share(batch, shape, rank, 2))
        tower = {path: leaf.full_tensor() for path, leaf in state.opt.m.items() if path.startswith(P.VISUAL)}
        embed = state.params[P.EMBED].full_tensor()
        out[mesh] = {"metrics": metrics, "tower": tower, "embed": embed}
    return out


def test_pipelines_equal_one_device():
    ranks = run_processes(on_processes, 4)
    for mesh, (_, changes, rates) in PIPELINES.items():
        cfg, hyper = config(**changes), AdamW(rates=rates)
        step, state = (
            make_train_step(cfg, hyper, SCHEDULE, microbatches=2),
            init_state(cfg, 0, hyper, dtype=torch.float64),
        )
        for batch in batches(cfg, 1):
            state, metrics = step(state, batch)
        for got in (rank[mesh] for rank in ranks):
            for key, value in metrics.items():
                torch.testing.assert_close(got["metrics"][key], value, rtol=0, atol=1e-10)
            torch.testing.assert_close(got["embed"], state.params[P.EMBED], rtol=0, atol=1e-10)
            for path, leaf in got["tower"].items():
                torch.testing.assert_close(leaf, state.opt.m[path], rtol=0, atol=1e-10)


def test_taps_must_lie_in_the_first_stage():
    with pytest.raises(UserError, match="has 2 taps, .* but stage 0 of 2, .* holds only 1"):
        make_slices(config(vision_deepstack_layers=(0, 1)), Pipeline(), 2)
    make_slices(config(**FUSED), Pipeline(), 2)
    three = config(num_hidden_layers=28, vision_deepstack_layers=(0, 1, 2), vision_num_hidden_layers=3)
    with pytest.raises(
        UserError, match="holds only 2; write in config.mesh pp10$"
    ):  # 13 stages of 3 would leave one empty
        make_slices(three, Pipeline(), 14)
    make_slices(three, Pipeline(), 10)
    with pytest.raises(UserError, match="holds only 1; lower config.pipeline.stages, or write "):
        make_slices(three.replace(num_hidden_layers=4), Pipeline("interleaved", 2), 2)
