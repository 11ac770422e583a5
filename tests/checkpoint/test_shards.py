"""Exactly one rank stores each element of a state, where one device would have it; DTensor's shapes are the oracle."""

import dataclasses
import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.distributed.tensor._utils import _compute_local_shape_and_global_offset

from qwen3f import params as P
from qwen3f.checkpoint.shards import param_shards, shards, whole
from qwen3f.errors import UserError
from sharding.axes import Axis, sizes_only
from sharding.layout import Layout
from sharding.mesh import AXES, FSDP, MeshShape, parse_mesh
from sharding.pipeline.cut import Pipeline, make_slices, store
from sharding.rules import placements
from tests.sharding.steps import MOE, config


def layouts(shape, **options):
    """(place on the mesh, Layout) of every rank of a mesh, without processes."""
    for place in itertools.product(*(range(getattr(shape, axis)) for axis in AXES)):
        axes = sizes_only(shape)
        at = {name: dataclasses.replace(axes[name], index=index) for name, index in zip(AXES, place)}
        wide = [axis for axis in (at[name] for name in FSDP) if axis.size > 1]
        joint = [join(part) for count in (2, 3) for part in itertools.combinations(wide, count)]
        yield place, Layout(dataclasses.replace(axes, **at, joint=tuple(joint)), **options)


def join(axes):
    index = 0
    for axis in axes:
        index = index * axis.size + axis.index
    return Axis("_".join(axis.name for axis in axes), math.prod(axis.size for axis in axes), index)


MODELS = {
    "dense": config(num_hidden_layers=7, attention_bias=True),
    "tied": config(num_hidden_layers=8, tie_word_embeddings=True),
    "moe": config(num_hidden_layers=8, **MOE),
    "mixed": config(num_hidden_layers=8, decoder_sparse_step=2, **MOE),
    "padded": config(num_hidden_layers=7, decoder_sparse_step=2, **MOE),  # the last stage has fewer dense layers
}
PIPELINES = [Pipeline(), Pipeline("interleaved", 2), Pipeline("zbv", 2)]


@settings(max_examples=25, deadline=None)
@given(
    model=st.sampled_from(sorted(MODELS)),
    sizes=st.tuples(*(st.sampled_from([1, 1, 2, 4] if axis in ("dp", "tp") else [1, 1, 2]) for axis in AXES)),
    pipeline=st.sampled_from(PIPELINES),
    fsdp=st.booleans(),
)
def test_every_element_has_one_writer_and_its_place(model, sizes, pipeline, fsdp):
    cfg, shape = MODELS[model], MeshShape(**dict(zip(AXES, sizes)))
    try:
        stages = make_slices(cfg, pipeline, shape.pp)
    except UserError:  # unequal stages
        return
    natural = {}
    for path, spec in P.abstract_params(cfg).items():
        natural[path] = torch.arange(1.0, spec.numel + 1).view(spec.shape)
    stored = store(cfg, natural, stages)
    found = {path: torch.zeros_like(x) for path, x in natural.items()}
    for place, layout in layouts(shape, fsdp=fsdp, pipeline=pipeline):
        placed = layout.place(cfg)
        for path, shard in param_shards(cfg, layout).items():
            local_shape, offset = _compute_local_shape_and_global_offset(
                stored[path].shape, sizes, list(place), placements(placed[path])
            )
            local = stored[path][tuple(slice(at, at + size) for at, size in zip(offset, local_shape))]
            assert shard.local == local_shape
            assert shard.shape == natural[path].shape
            covered = torch.zeros_like(local)
            for here, there in shard.pieces:
                assert torch.equal(local[here], natural[path][there])
                covered[here] += 1
                for box, chunk, size in zip(there, shard.chunk, shard.shape):  # a piece is one whole file
                    assert box.start % chunk == 0
                    assert box.stop == min(box.start + chunk, size)
                if shard.writes:
                    found[path][there] += local[here]
            assert torch.equal(covered, (local != 0).to(covered.dtype))  # no piece has padding, which is 0
    for path in natural:
        assert torch.equal(found[path], natural[path]), path  # a second writer would double it


def test_what_is_no_parameter_is_whole_and_written_by_one_rank():
    cfg, writers = MODELS["dense"], []
    for _, layout in layouts(parse_mesh("dr2,tp2")):
        shard = shards(cfg, layout)(("step",), ())
        assert shard == whole((), shard.writes)
        assert shard.pieces == (((), ()),)
        writers.append(shard.writes)
        moment = shards(cfg, layout)(("opt", "m", P.EMBED), (20, 24))
        assert moment == param_shards(cfg, layout)[P.EMBED]
    assert writers == [True, False, False, False]
    with pytest.raises(ValueError, match=r"params.model.norm.weight: this rank has \[23\], its layout says \[24\]"):
        shards(cfg, layout)(("params", "model.norm.weight"), (23,))
