"""Ring attention over 1 to 8 ranks against the formula on the whole sequence: values, log-sum-exp and gradients.

Most cases run all ranks in this process. One test runs four real processes and counts what they send.
"""

import functools
from types import SimpleNamespace
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from kernels import backend
from kernels.flash_attention import reference
from kernels.key_ranges import ranges_from_segments
from sharding import collectives, ring
from sharding.axes import Axis, axes_of, make_mesh
from sharding.mesh import parse_mesh
from sharding.sequence_split import RingRanges, merge_sequence, ring_ranges, split_sequence
from tests.sharding.worlds import each, local_world, ranks_of, run_processes

SIZES = (2, 4, 2, 16)  # B, H, K, d
# Two rows each. Documents cross the borders of chunks, which have 3 to 12 places. 0 is padding.
PACKED = torch.tensor([[1] * 5 + [2] * 14 + [3] + [4] * 4, [1] * 20 + [0] * 4], dtype=torch.int32)
LAYOUTS = {"causal": torch.ones(2, 24, dtype=torch.int32), "packed": PACKED}


def inputs(length, dtype=torch.float64, seed=0):
    """q, k, v, and the gradients of out and lse, of the whole sequence."""
    batch, heads, kv_heads, d = SIZES
    g = torch.Generator().manual_seed(seed)
    shapes = [(heads, length, d), (kv_heads, length, d), (kv_heads, length, d), (heads, length, d), (heads, length)]
    return [torch.randn(batch, *shape, generator=g).to(dtype) for shape in shapes]


def exact(q, k, v, d_out, d_lse, segments):
    """[out, lse, dq, dk, dv] by the formula in float64."""
    qkv = [x.detach().double().requires_grad_() for x in (q, k, v)]
    out, lse = reference(*qkv, ranges=ranges_from_segments(segments))
    return [out.detach(), lse.detach(), *torch.autograd.grad([out, lse], qkv, [d_out.double(), d_lse.double()])]


def cut(x, axis):
    """This rank's part of [B, heads, L] or [B, heads, L, d]."""
    last = x.dim() - 1
    rows = split_sequence({"tokens": x.movedim(2, last)}, axis)["tokens"]
    return rows.movedim(last, 2).contiguous()


def on_a_rank(whole, segments, axis, attend=ring.ring_attention):
    """[out, lse, dq, dk, dv] of this rank's part."""
    starts = split_sequence({"tokens": segments, "segments": segments}, axis)
    ranges = ring_ranges(starts["starts"] if axis.size > 1 else ranges_from_segments(segments).lo, axis)
    *qkv, d_out, d_lse = (cut(x, axis) for x in whole)
    qkv = [x.detach().requires_grad_() for x in qkv]
    out, lse = attend(*qkv, axis, ranges)
    grads = torch.autograd.grad([out, lse], qkv, [d_out, d_lse.to(lse.dtype)])
    return [out.detach(), lse.detach(), *grads]


def merged(parts):
    """Merge the ranks' parts [B, heads, T, …] into the whole sequence."""
    x = torch.cat([part.movedim(2, -1) for part in parts], -1)
    return merge_sequence(x, len(parts)).movedim(-1, 2)


def in_one_process(mesh, whole, segments):
    """[out, lse, dq, dk, dv] merged over cp: one list for each group along cp. All groups get the same input."""
    shape = parse_mesh(mesh)
    with local_world(mesh) as (_, axes):
        whole = [each([x] * shape.size) for x in whole]
        results = [ranks_of(x) for x in on_a_rank(whole, each([segments] * shape.size), axes.cp)]
    groups = torch.arange(shape.size).view(-1, shape.cp, shape.tp).movedim(-1, 0).flatten(0, 1)
    return [[merged([x[rank] for rank in group]) for x in results] for group in groups.tolist()]


def distances(ours, theirs):
    return [((a.double() - b).norm() / b.norm()).item() for a, b in zip(ours, theirs, strict=True)]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("mesh", ["cp1", "cp2", "cp3", "cp4", "cp2,tp2", "dp2,cp3"])
def test_equals_the_formula(mesh, layout):
    """float64 to 1e-12; float32 to 5e-6 by norm: sums in another order."""
    whole, segments = inputs(24), LAYOUTS[layout]
    for dtype, tolerance in ((torch.float64, 1e-12), (torch.float32, 5e-6)):
        cast = [x.to(dtype) for x in whole]
        if mesh == "cp1":
            groups = [on_a_rank(cast, segments, Axis("cp"))]
        else:
            groups = in_one_process(mesh, cast, segments)
        for group in groups:
            assert group[0].dtype == group[2].dtype == dtype
            assert max(distances(group, exact(*cast, segments))) < tolerance


@settings(max_examples=15, deadline=None)
@given(st.integers(2, 4), st.integers(1, 3), st.data())
def test_any_layout_of_documents(size, chunk, data):
    length = 2 * size * chunk
    new = data.draw(st.lists(st.booleans(), min_size=2 * length, max_size=2 * length))
    segments = torch.tensor(new, dtype=torch.int32).view(2, length).cumsum(1, dtype=torch.int32)
    whole = inputs(length)
    (ours,) = in_one_process(f"cp{size}", whole, segments)
    # not by norm: the gradient of a query that sees itself alone is 0
    for a, b in zip(ours, exact(*whole, segments)):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


def test_triton_kernels():
    """The backward pass of the Triton kernels takes the merged log-sum-exp too. In the interpreter, float32 by norm."""
    whole = inputs(24, torch.float32)
    with backend.interpreted():
        (ours,) = in_one_process("cp2", whole, PACKED)
    assert max(distances(ours, exact(*whole, PACKED))) < 5e-6


def test_half_precision_is_merged_in_float32():
    """The error of cp8 against float64 is at most √2 times the error of one rank.

    One rank rounds its results once. Here each part is rounded, and so is the sum: √2. Gradients of keys and values
    also inherit the error of the output, through Δ: √3. Sums kept in bfloat16 would exceed both limits.
    """
    whole, segments = inputs(96, torch.bfloat16), torch.ones(2, 96, dtype=torch.int32)
    best = exact(*whole, segments)
    (ours,) = in_one_process("cp8", whole, segments)
    assert ours[0].dtype == ours[2].dtype == torch.bfloat16
    assert ours[1].dtype == torch.float32
    alone = distances(on_a_rank(whole, segments, Axis("cp")), best)
    limits = [2**0.5, 2**0.5, 2**0.5, 3**0.5, 3**0.5]
    assert all(a < c * b for a, b, c in zip(distances(ours, best), alone, limits))


MUTATIONS = {
    "a merge dropped": ("merge", lambda parts: parts[0]),
    "a plain mean": ("merge", lambda parts: tuple(sum(x) / 2 for x in zip(*parts))),
    "nothing sent": ("start_shift", lambda x, axis: x.flatten()),
    "sent backwards": ("start_shift", lambda x, axis, send=ring.start_shift: send(x, axis, -1)),
}


@pytest.mark.parametrize("name", MUTATIONS)
def test_a_mutation_is_seen(monkeypatch, name):
    attribute, broken = MUTATIONS[name]
    monkeypatch.setattr(ring, attribute, broken)
    whole, segments = inputs(24), LAYOUTS["causal"]
    (ours,) = in_one_process("cp3", whole, segments)
    assert max(distances(ours, exact(*whole, segments))) > 1e-3


def test_a_gradient_left_on_the_way_is_seen(monkeypatch):
    """One shift of the backward pass sends nothing: out, lse and dq are right, dk and dv are not."""
    calls = []

    def start_shift(x, axis, send=ring.start_shift):
        calls.append(x)
        return x.flatten() if len(calls) == 6 else send(x, axis)  # calls: 2 forward; keys, keys, gradients, gradients

    monkeypatch.setattr(ring, "start_shift", start_shift)
    whole, segments = inputs(24), LAYOUTS["causal"]
    (ours,) = in_one_process("cp3", whole, segments)
    out, lse, dq, dk, dv = distances(ours, exact(*whole, segments))
    assert len(calls) == 6
    assert max(out, lse, dq) < 1e-12
    assert min(dk, dv) > 1e-3


def counted(messages):
    """A context in which the bytes of every message that this process sends are appended to `messages`."""
    ops = collectives._ops

    def all_to_all_single(x, come, to, group):
        assert sum(n > 0 for n in to) == 1
        messages.append(sum(to) * x.element_size())
        return ops.all_to_all_single(x, come, to, group)

    counting = SimpleNamespace(all_to_all_single=all_to_all_single, wait_tensor=ops.wait_tensor)
    return mock.patch.object(collectives, "_ops", counting)


def keep_attention(ctx, op, *args, **kwargs):
    return CheckpointPolicy.MUST_SAVE if op == ring.RING_ATTENTION else CheckpointPolicy.PREFER_RECOMPUTE


def recomputed(*args):
    return checkpoint(
        ring.ring_attention,
        *args,
        use_reentrant=False,
        context_fn=functools.partial(create_selective_checkpoint_contexts, keep_attention),
    )


def compiled(q, k, v, axis, ranges):
    fn = torch.compile(
        lambda q, k, v, *bounds: recomputed(q, k, v, axis, RingRanges(*bounds)), backend="aot_eager", fullgraph=True
    )
    return fn(q, k, v, *ranges)


def process(rank):
    """The results of every layout on cp4 and on both halves of dp2,cp2, and the bytes of some messages."""
    results, sent = {}, {}
    for mesh in ("cp4", "dp2,cp2"):
        axis = axes_of(make_mesh(parse_mesh(mesh), "cpu")).cp
        for layout, segments in LAYOUTS.items():
            results[mesh, layout] = on_a_rank(inputs(24), segments, axis)
        for dtype in (torch.bfloat16, torch.float32):
            with counted(sent.setdefault((axis.size, dtype), [])):
                on_a_rank(inputs(24, dtype), segments, axis)
    for form in (recomputed, compiled):
        with counted(sent.setdefault(form.__name__, [])):
            results["cp2", form.__name__] = on_a_rank(inputs(24), PACKED, axis, form)
    return results, sent


def test_four_processes():
    """Values of real processes, eager, recomputed and compiled; their messages are those that the plan counts on.

    A recomputed block whose policy keeps RING_ATTENTION sends no more than one that is not recomputed.
    """
    ranks = run_processes(process, 4)
    cases = [("cp4", name, name, [0, 1, 2, 3]) for name in LAYOUTS]
    cases += [("dp2,cp2", name, name, group) for name in LAYOUTS for group in ([0, 1], [2, 3])]
    cases += [("cp2", form, "packed", group) for form in ("recomputed", "compiled") for group in ([0, 1], [2, 3])]
    for mesh, case, layout, group in cases:
        ours = [merged(parts) for parts in zip(*(ranks[rank][0][mesh, case] for rank in group), strict=True)]
        assert max(distances(ours, exact(*inputs(24), LAYOUTS[layout]))) < 1e-12, (mesh, case)
    batch, _, kv_heads, d = SIZES
    for _, sent in ranks:
        for size in (4, 2):
            for dtype in (torch.bfloat16, torch.float32):
                there, back = ring.ring_traffic(size, batch, kv_heads, 24 // size, d, dtype)
                messages = sent[size, dtype]
                assert len(messages) == there.messages + back.messages
                assert sum(messages[: there.messages]) == there.bytes
                assert sum(messages[there.messages :]) == back.bytes
        expected = sum(way.bytes for way in ring.ring_traffic(2, batch, kv_heads, 12, d, torch.float64))
        assert sum(sent["recomputed"]) == expected
        assert sum(sent["compiled"]) == expected


def test_operators_are_well_formed():
    """opcheck tests schema, shapes without data, registered gradient. Not values: torch's fake group sends nothing."""
    dist.init_process_group("fake", rank=0, world_size=2)
    try:
        axis = Axis("cp", 2, 0, dist.group.WORLD.group_name)
        ranges = ring_ranges(split_sequence({"tokens": PACKED, "segments": PACKED}, axis)["starts"], axis)
        q, k, v, d_out, d_lse = (cut(x, axis) for x in inputs(24))
        place = *ranges, axis.size, axis.index, axis.group, 0.25
        checks = ("test_schema", "test_autograd_registration", "test_faketensor")
        qkv = [x.detach().requires_grad_() for x in (q, k, v)]
        torch.library.opcheck(torch.ops.qwen3f.ring_attention, (*qkv, *place), test_utils=checks)
        out, lse = torch.ops.qwen3f.ring_attention(q, k, v, *place)
        back = d_out, d_lse, q, k, v, out, lse, *place
        torch.library.opcheck(torch.ops.qwen3f.ring_attention_backward, back, test_utils=checks)
    finally:
        dist.destroy_process_group()


@pytest.mark.gpu
@pytest.mark.parametrize(
    "dtype, tolerance, layout",
    [
        (torch.float32, 5e-6, "packed"),
        (torch.bfloat16, 1e-2, "causal"),
        pytest.param(torch.float32, 5e-6, "causal", marks=pytest.mark.nightly),
        pytest.param(torch.bfloat16, 1e-2, "packed", marks=pytest.mark.nightly),
    ],
)
def test_on_a_gpu(dtype, tolerance, layout):
    """All ranks on one card. bfloat16 rounds inputs of products to 3 digits."""
    segments = LAYOUTS[layout].repeat_interleave(64, 1).cuda()
    whole = [x.cuda() for x in inputs(24 * 64, dtype)]
    (ours,) = in_one_process("cp4", whole, segments)
    assert max(distances(ours, exact(*whole, segments))) < tolerance


def test_traffic_by_hand():
    """cp4, B 1, K 2, T 8, d 16 in bfloat16: 3 hops of 2·256 numbers, 2 bytes each; gradients 4 bytes each."""
    assert ring.ring_traffic(4, 1, 2, 8, 16, torch.bfloat16) == ((3, 3072), (6, 3072 + 6144))
    assert ring.ring_traffic(1, 1, 2, 8, 16, torch.bfloat16) == ((0, 0), (0, 0))


def test_arguments_that_do_not_fit():
    q, k, v, *_ = inputs(8)
    ranges = ring_ranges(torch.zeros(2, 8, dtype=torch.int32), Axis("cp"))
    with pytest.raises(ValueError, match=r"as many keys as queries, got 4 and 8"):
        ring.ring_attention(q, k[:, :, :4], v[:, :, :4], Axis("cp"), ranges)
    with pytest.raises(ValueError, match=r"ranges.lo must be .* \[2, 2, 8\], got \[1, 2, 8\]"):
        ring.ring_attention(q, k, v, Axis("cp", 2, 0, "any"), ranges)
