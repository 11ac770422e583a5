"""The placement table against cuts worked out by hand, and against the local shapes that DTensor computes."""

import dataclasses
import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.distributed.tensor import Replicate, Shard
from torch.distributed.tensor._utils import _compute_local_shape_and_global_offset

from qwen3f import params as P
from qwen3f import presets
from qwen3f.errors import UserError
from qwen3f.stages.configs import pretrain_config
from qwen3f.train.setup import make_setup
from sharding import rules
from sharding.mesh import AXES, MeshShape, parse_mesh
from sharding.pipeline.cut import Pipeline, make_slices

Q, K, O = (P.LAYERS + f"self_attn.{name}_proj.weight" for name in "qko")
UP, DOWN, EXPERT = (P.LAYERS + f"mlp.{name}.weight" for name in ("up_proj", "down_proj", "experts.down_proj"))


@pytest.mark.parametrize("name", presets.PRESETS)
def test_every_path_of_every_preset_has_a_row(name):
    cfg = presets.get(name).replace(attention_bias=True)
    table = P.abstract_params(cfg)
    placed = rules.place(cfg, MeshShape(dp=2))
    assert placed.keys() == table.keys()
    for path, spec in table.items():
        dims = rules.rule(path)
        assert set(dims) <= set(AXES)
        assert len(set(dims.values())) == len(dims), "two axes on one dim"
        assert all(dim < len(spec.shape) for dim in dims.values())
        assert ("pp" in dims) == spec.pipelined
        assert ("ep" in dims) == (".experts." in path)
        assert placed[path].fsdp_dim == (1 if spec.stack else 0), "no copies: the first dimension, the stack's apart"


def test_a_path_without_a_row_is_an_error():
    with pytest.raises(UserError, match=r"parameter visual\.merger\.weight: no row of sharding/rules\.py"):
        rules.rule("visual.merger.weight")


@pytest.mark.parametrize(
    "preset, mesh, path, cuts, local",
    [
        ("qwen3-1.7b", "dp4,tp2", Q, {"tp": 1, "dp": 2}, (28, 1024, 512)),
        ("qwen3-1.7b", "dp4,tp2", O, {"tp": 2, "dp": 1}, (28, 512, 1024)),
        ("qwen3-1.7b", "tp16", K, {}, (28, 1024, 2048)),  # 8 key/value heads: replicated
        ("qwen3-1.7b", "tp8", K, {"tp": 1}, (28, 128, 2048)),
        ("qwen3-1.7b", "dp2,cp2,tp2", P.EMBED, {"tp": 0, "dp": 1, "cp": 1}, (75968, 512)),
        ("qwen3-1.7b", "dp3", P.EMBED, {}, (151936, 2048)),  # 2,048 is no multiple of 3: replicated, not cut unevenly
        ("large", "pp4,dp8,tp2", Q, {"pp": 0, "tp": 1, "dp": 2}, (24, 4096, 512)),  # 94 layers, padded
        ("large", "dp2,ep8,cp2", EXPERT, {"ep": 1, "dp": 2, "cp": 2}, (94, 16, 1024, 1536)),
        ("large", "dp2,ep8,cp2", O, {"dp": 1, "ep": 1, "cp": 1}, (94, 128, 8192)),
        ("large", "ep8", EXPERT, {"ep": 1}, (94, 16, 4096, 1536)),
    ],
)
def test_cuts_and_local_shapes(preset, mesh, path, cuts, local):
    cfg, shape = presets.get(preset), parse_mesh(mesh)
    placed = rules.place(cfg, shape)[path]
    assert placed.cuts == cuts
    stages = make_slices(cfg, Pipeline(), shape.pp)
    assert rules.local_shape(P.abstract_params(cfg)[path], placed, shape, stages) == local
    assert set(rules.replicated_axes(placed, shape)) == {
        name for name in AXES if getattr(shape, name) > 1 and name not in cuts
    }


def test_without_fsdp_data_axes_replicate():
    shape = parse_mesh("dp2,ep2,cp2,tp2")
    placed = rules.place(presets.get("debug_moe"), shape, fsdp=False)
    assert placed[P.EMBED].cuts == {"tp": 0}
    assert placed[EXPERT].cuts == {"ep": 1, "tp": 3}
    assert rules.replicated_axes(placed[EXPERT], shape) == ("dp", "cp")


@pytest.mark.parametrize(
    "mesh, changes, message",
    [
        ("tp3", {}, r"model\.embed_tokens\.weight: dim 0 \(32768 ids\) doesn't divide by tp=3; .* tp2 or tp4$"),
        ("tp3", {"vocab_size": 300}, r"q_proj\.weight: dim 1 \(8 heads\) doesn't divide by tp=3"),
        ("tp4", {"num_key_value_heads": 8, "intermediate_size": 690}, r"mlp\.gate_proj\.weight: dim 1 \(690 rows\)"),
        ("ep3", {}, r"mlp\.experts\.gate_proj\.weight: dim 1 \(8 experts\) doesn't divide by ep=3"),
        ("pp8", {}, r"input_layernorm\.weight: dim 0 has 6 layers, fewer than pp=8 stages; .* pp6 at most$"),
        (
            "tp4",
            {"num_attention_heads": 12, "num_key_value_heads": 6},
            r"k_proj\.weight: .*\(6 heads\) .*tp=4; .* tp3 or tp6$",
        ),
    ],
)
def test_what_does_not_divide_names_path_dim_and_axis(mesh, changes, message):
    preset = "debug_moe" if "ep" in mesh else "debug"
    with pytest.raises(UserError, match=message):
        rules.place(presets.get(preset).replace(**changes), parse_mesh(mesh))


@pytest.mark.parametrize(
    "mesh, rows, length, message",
    [
        ("dp2,ep2", 6, 8, r"config.batch_size=6 doesn't divide by dp=2 · ep=2; make it a multiple of 4"),
        ("cp2", 2, 6, r"config.seq_len=6 cannot be cut over cp=2"),
        ("cp2,tp4", 1, 12, r"micro-batch has 6 tokens \(1 × 12, over cp=2\), which don't divide by tp=4; .*config.seq"),
    ],
)
def test_a_batch_that_does_not_divide(mesh, rows, length, message):
    with pytest.raises(UserError, match=message):
        rules.check_batch(parse_mesh(mesh), rows, length)
    with pytest.raises(UserError, match="config.batch_size=16 doesn't divide by dp=4 · config.microbatches=8; "):
        rules.check_batch(parse_mesh("dp4"), 16, length, 8)
    rules.check_batch(parse_mesh(mesh), 12, 16)


@given(st.fixed_dictionaries({axis: st.sampled_from([1, 2, 4]) for axis in AXES}), st.booleans(), st.booleans())
@settings(max_examples=40, deadline=None)
def test_local_shapes_are_dtensors(sizes, moe, fsdp):
    cfg = presets.get("debug_moe" if moe else "debug").replace(num_hidden_layers=8)
    shape = MeshShape(**sizes)
    stages = make_slices(cfg, Pipeline(), shape.pp)
    for path, placed in rules.place(cfg, shape, fsdp).items():
        spec, placements = P.abstract_params(cfg)[path], rules.placements(placed)
        mesh = dataclasses.astuple(shape)
        expected, _ = _compute_local_shape_and_global_offset(spec.shape, mesh, [0] * len(AXES), placements)
        assert rules.local_shape(spec, placed, shape, stages) == tuple(expected)
        assert all(isinstance(p, Replicate) or p == Shard(placed.cuts[axis]) for axis, p in zip(AXES, placements))
        copies = math.prod(getattr(shape, axis) for axis in rules.replicated_axes(placed, shape))
        assert math.prod(rules.local_shape(spec, placed, shape, stages)) * shape.size == spec.numel * copies


@pytest.mark.parametrize(
    "rows, mesh, message",
    [
        (3, "dp2", "config.eval.batch_size=3 doesn't divide by dp=2"),
        (
            *(1, "tp2"),
            r"has 33 tokens \(1 × 33, over cp=1\), which don't divide by tp=2; make config.seq_len a multiple of 2, or "
            "change config.eval.batch_size",
        ),
    ],
)
def test_an_evaluation_that_does_not_divide(rows, mesh, message):
    """It is refused also where the training batch divides."""
    config = pretrain_config("nano")
    config.update(device="cpu", mesh=mesh, batch_size=2, seq_len=33 if mesh == "tp2" else 32)
    config.eval.batch_size = rows
    with pytest.raises(UserError, match=message):
        make_setup(config)
    config.eval.batch_size = 4
    make_setup(config)
