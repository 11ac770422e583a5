"""Meshes written as text: -1 takes the remaining devices, and FSDP over fewer ranks than dp has makes replicas."""

import dataclasses
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qwen3f.errors import UserError
from sharding.mesh import AXES, MeshShape, divisors, hybrid, parse_mesh

SHAPES = st.builds(MeshShape, **{axis: st.integers(1, 6) for axis in AXES})


def words(shape, order=AXES):
    return ",".join(f"{axis}{getattr(shape, axis)}" for axis in order)


@given(SHAPES, st.permutations(AXES), st.sampled_from(AXES))
def test_what_is_written_is_parsed_and_what_is_left_is_filled(shape, order, open_axis):
    text = words(shape, order)
    assert parse_mesh(text) == parse_mesh(text, devices=7) == shape
    filled = text.replace(f"{open_axis}{getattr(shape, open_axis)}", f"{open_axis}-1")
    assert parse_mesh(filled, shape.size) == shape


def test_divisors_by_trying_all():
    for number in range(1, 200):
        assert divisors(number) == [n for n in range(1, number + 1) if number % n == 0]


@given(SHAPES, st.sampled_from(AXES), st.integers(1, 400))
def test_a_mesh_fills_all_devices_or_none(shape, open_axis, devices):
    rest = shape.size // getattr(shape, open_axis)
    text = words(shape).replace(f"{open_axis}{getattr(shape, open_axis)}", f"{open_axis}-1")
    if devices % rest == 0:
        assert parse_mesh(text, devices) == dataclasses.replace(shape, **{open_axis: devices // rest})
    else:
        with pytest.raises(UserError, match=f"{devices} devices are no multiple of .* = {rest}, so no {open_axis}"):
            parse_mesh(text, devices)


@pytest.mark.parametrize(
    "text, devices, message",
    [
        (
            "dp-1,tp2",
            None,
            r"config.mesh=dp-1,tp2: dp-1 takes all remaining devices, .*write dp with its size",
        ),
        ("dp-1,tp-1", 8, r"only one axis can have the size -1, but dp and tp have it"),
        ("tp3,dp-1", 8, r"8 devices are no multiple of tp3 = 3, so no dp fills them"),
        ("dp-2", 8, r"'dp-2' is not an axis and a size"),
        ("dp", 8, r"'dp' is not an axis and a size; write e.g. dp8,tp2 with axes of pp, dr, dp, ep, cp, tp$"),
        ("DP2", 8, r"config.mesh=DP2: 'DP2' is not an axis and a size; did you mean 'dp'"),
        ("dp0", 8, r"axis dp needs a size of at least 1, or -1"),
        ("dp-1,dp2", 8, r"axis dp stands twice"),
    ],
)
def test_what_cannot_be_filled(text, devices, message):
    with pytest.raises(UserError, match=message):
        parse_mesh(text, devices)


@pytest.mark.parametrize(
    "mesh, shard_size, wanted",
    [
        ("dp16", 8, "dr2,dp8"),
        ("dp16", 16, "dp16"),
        ("dp16", 1, "dr16"),
        ("dp16,tp2,pp4", 4, "dr4,dp4,tp2,pp4"),
        ("dp8,ep2,cp2", 8, "dr4,dp2,ep2,cp2"),
        ("dr2,dp8", 4, "dr4,dp4"),
        ("dp16,ep8", 0, "dp16,ep8"),
    ],
)
def test_replicas_of_what_is_sharded(mesh, shard_size, wanted):
    assert hybrid(parse_mesh(mesh), shard_size) == parse_mesh(wanted)


@given(SHAPES, st.integers(1, 250))
def test_a_hybrid_shards_over_so_many_ranks_or_names_what_would_do(shape, shard_size):
    sizes = [shape.ep * shape.cp * n for n in range(1, shape.dp + 1) if shape.dp % n == 0]
    if shard_size in sizes:
        got = hybrid(shape, shard_size)
        assert got.dp * got.ep * got.cp == shard_size
        assert got.dr * got.dp == shape.dr * shape.dp  # the batch is cut as before
        assert dataclasses.replace(got, dr=shape.dr, dp=shape.dp) == shape
        assert hybrid(got, shard_size) == got
    else:
        with pytest.raises(UserError) as caught:
            hybrid(shape, shard_size)
        assert str(caught.value).endswith("write one of " + ", ".join(map(str, sizes)))
        assert f"dp={shape.dp} · ep={shape.ep} · cp={shape.cp}" in str(caught.value)


@pytest.mark.parametrize(
    "shard_size, fsdp, message",
    [
        (4, False, r"config\.fsdp\.shard_size=4 has no effect with config\.fsdp\.enabled=False"),
        (-1, True, r"config\.fsdp\.shard_size=-1: write how many ranks"),
        (3, True, r"config\.fsdp\.shard_size=3 doesn't fit config\.mesh with dp=8 · ep=1 · cp=1: .* of 1, 2, 4, 8$"),
    ],
)
def test_a_shard_size_that_cannot_be(shard_size, fsdp, message):
    with pytest.raises(UserError, match=message):
        hybrid(parse_mesh("dp8"), shard_size, fsdp)
    assert hybrid(parse_mesh("dp8"), 0, fsdp) == parse_mesh("dp8")


def test_replicas_are_outside_of_what_is_sharded():
    """Ranks are numbered with the last axis fastest: dr before dp keeps FSDP's gathers among neighbours."""
    assert AXES.index("pp") < AXES.index("dr") < AXES.index("dp")
    assert [field.name for field in dataclasses.fields(MeshShape)] == [*AXES]
    assert math.prod(dataclasses.astuple(parse_mesh("dr2,dp3,tp5"))) == 30
