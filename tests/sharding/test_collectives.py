"""Each collective against its formula, and its backward against the transpose of the same formula.

A collective is a linear map of all ranks' tensors together, so the formula is written on one stacked tensor
[ranks, …], and torch's autograd of it is the adjoint. Everything is a copy or a sum of a few float64: exact to 1e-12.
"""

import pytest
import torch
import torch.distributed as dist

from sharding import collectives as C
from sharding.axes import ONE, Axis, axes_of, make_mesh
from sharding.mesh import MeshShape, parse_mesh
from tests.sharding.worlds import each, local_world, ranks_of, run_processes

MESHES = ["tp4", "dp2,tp2", "dp2,ep3,tp2", "pp2,tp3"]
NAMES = ["dp", "ep", "tp", "dp_ep"]


def groups(shape, name):
    """The ranks of every group along an axis: [groups, ranks]. Ranks are in row-major order of pp, dr, …, tp."""
    ranks = torch.arange(shape.size).view(shape.pp, shape.dr, shape.dp, shape.ep, shape.cp, shape.tp)
    dims = [("pp", "dr", "dp", "ep", "cp", "tp").index(part) for part in name.split("_")]
    others = [d for d in range(6) if d not in dims]
    return ranks.permute(*others, *dims).flatten(len(others)).flatten(0, -2)


def in_groups(shape, name, formula):
    """A function that applies formula([ranks of a group, …]) -> [ranks of the group, …] to each group of a tensor."""

    def whole(x):
        out = [None] * len(x)
        for group in groups(shape, name).tolist():
            for rank, value in zip(group, formula(x[group])):
                out[rank] = value
        return torch.stack(out)

    return whole


def gather_two(x, axis):
    """Gather along both dimensions in one launch."""
    rows, columns = C.gather_each([x, 3 * x], axis, [0, 1])
    return torch.cat([rows.flatten(), columns.flatten()])


def gather_ahead(x, axis):
    if axis.size == 1:
        return x
    (x,) = C.wait_for_gradients([x])
    (out,) = C.start_gather_each([x], axis)
    C.wait(out)
    return out


# name: (the collective on (x, axis), the formula on the stacked group [n, 6, 12])
CASES = {
    "gather 0": (lambda x, a: C.gather(x, a, 0), lambda g: [torch.cat(list(g), 0)] * len(g)),
    "gather -1": (lambda x, a: C.gather(x, a, -1), lambda g: [torch.cat(list(g), 1)] * len(g)),
    "recut 0 to 1": (lambda x, a: C.recut(x, a, 0, 1), lambda g: torch.cat(list(g), 0).chunk(len(g), 1)),
    "recut 1 to 0": (lambda x, a: C.recut(x, a, 1, 0), lambda g: torch.cat(list(g), 1).chunk(len(g), 0)),
    "gather_each": (
        gather_two,
        lambda g: [torch.cat([torch.cat(list(g), 0).flatten(), 3 * torch.cat(list(g), 1).flatten()])] * len(g),
    ),
    "start_gather_each": (gather_ahead, lambda g: [torch.cat(list(g), 0)] * len(g)),
    "reduce_scatter 0": (lambda x, a: C.reduce_scatter(x, a, 0), lambda g: g.sum(0).chunk(len(g), 0)),
    "reduce_scatter 1": (lambda x, a: C.reduce_scatter(x, a, 1), lambda g: g.sum(0).chunk(len(g), 1)),
    "all_reduce": (C.all_reduce, lambda g: [g.sum(0)] * len(g)),
    "shard 1": (lambda x, a: C.shard(x, a, 1), lambda g: [g[i].chunk(len(g), 1)[i] for i in range(len(g))]),
    "shift 1": (lambda x, a: C.shift(x, a), lambda g: g.roll(1, 0)),
    "shift -1": (lambda x, a: C.shift(x, a, -1), lambda g: g.roll(-1, 0)),
    "shift 2": (lambda x, a: C.shift(x, a, 2), lambda g: g.roll(2, 0)),
    "all_to_all": (
        lambda x, a: C.all_to_all(x, [12 // a.size] * a.size, [12 // a.size] * a.size, a),
        lambda g: [torch.cat([x.chunk(len(g), 0)[to] for x in g]) for to in range(len(g))],
    ),
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("mesh", MESHES)
@pytest.mark.parametrize("name", NAMES)
def test_value_and_adjoint(mesh, name, case):
    shape = parse_mesh(mesh)
    collective, formula = CASES[case]
    g = torch.Generator().manual_seed(0)
    x = torch.randn(shape.size, 12, 24, dtype=torch.float64, generator=g, requires_grad=True)
    expected = in_groups(shape, name, formula)(x)
    upstream = torch.randn(expected.shape, dtype=torch.float64, generator=g)
    (expected_grad,) = torch.autograd.grad(expected, x, upstream)
    with local_world(mesh) as (_, axes):
        axis = axes.over(*name.split("_"))
        local = each(x.detach()).requires_grad_()
        got = collective(local, axis)
        (grad,) = torch.autograd.grad(got, local, each(upstream))
        got, grad = torch.stack(ranks_of(got.detach())), torch.stack(ranks_of(grad))
    torch.testing.assert_close(got, expected.detach(), rtol=0, atol=1e-12)
    torch.testing.assert_close(grad, expected_grad, rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    "gather",
    [lambda x, a: C.gather(x, a, 0, torch.float32), lambda x, a: C.gather_each([x], a, [0], torch.float32)[0]],
    ids=["gather", "gather_each"],
)
def test_a_gather_that_casts_sums_gradients_before_rounding(gather):
    """1 and 2⁻³⁰ are float32 numbers, but their sum is not: a float32 sum would be 1."""
    with local_world("dp2") as (_, axes):
        x = each([torch.full((2,), 0.1, dtype=torch.float64)] * 2).requires_grad_()
        out = gather(x, axes.dp)
        assert out.dtype == torch.float32
        (grad,) = torch.autograd.grad(out, x, each([torch.ones(4), torch.full((4,), 2.0**-30)]))
        assert [v.tolist() for v in ranks_of(out.detach())] == [[torch.tensor(0.1).item()] * 4] * 2
        assert [v.tolist() for v in ranks_of(grad)] == [[1 + 2.0**-30] * 2] * 2


def test_an_axis_of_size_one_returns_its_argument():
    x = torch.ones(4, 2)
    for out in (
        C.gather(x, ONE.dp, 0),
        C.reduce_scatter(x, ONE.dp, 1),
        C.all_reduce(x, ONE.over("dp", "ep", "cp")),
        C.all_to_all(x, [4], [4], ONE.ep),
        C.shift(x, ONE.cp),
        C.shard(x, ONE.tp, 0),
        C.recut(x, ONE.tp, 0, 1),
    ):
        assert out is x


def test_what_does_not_divide_is_named():
    with pytest.raises(ValueError, match=r"reduce_scatter: dim 1 of \(4, 3\) does not divide by tp=2"):
        C.reduce_scatter(torch.ones(4, 3), Axis("tp", 2), 1)
    with pytest.raises(ValueError, match=r"shard: dim 0 of \(3,\) does not divide by dp=2"):
        C.shard(torch.ones(3), Axis("dp", 2), 0)
    with pytest.raises(ValueError, match=r"recut: dim 1 of \(2, 3\) does not divide by dp=2"):
        C.recut(torch.ones(2, 3), Axis("dp", 2), 0, 1)


def uneven(rank):
    """(rows sent to each rank, rows received from each). Rank r sends r + to + 1 rows to rank `to`."""
    return [rank + to + 1 for to in range(2)], [source + rank + 1 for source in range(2)]


def chain(x, axes):
    """A scalar computed through gather, reduce_scatter, all_reduce and shift, as a compiled block may do."""
    x = C.gather(x, axes.tp, 1).tanh()
    x = C.reduce_scatter(x, axes.tp, 0).sin()
    x = C.all_reduce(x, axes.dp).sin()
    x = C.shift(x, axes.dp).sin()
    return (x * x).sum()


def uneven_chain(x, axes):
    send, receive = uneven(axes.tp.index)
    y = C.all_to_all(x[: sum(send)].exp(), send, receive, axes.tp)
    return (y * torch.arange(len(y), dtype=y.dtype)[:, None]).sum()


def on_processes(rank, values):
    axes = axes_of(make_mesh(MeshShape(dp=2, tp=2), "cpu"))
    assert (axes.dp.index, axes.tp.index) == divmod(rank, 2)
    out = {}
    for name, fn in (("chain", chain), ("uneven", uneven_chain)):
        for compiled in (False, True):
            x = values[rank].clone().requires_grad_()
            call = torch.compile(fn, fullgraph=True, backend="aot_eager") if compiled else fn
            value = call(x, axes)
            value.backward()
            out[name, compiled] = value.detach(), x.grad
    dist.barrier()
    return out


def test_four_processes_agree_with_one_and_so_does_the_compiled_block():
    values = torch.randn(4, 8, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    got = run_processes(on_processes, 4, values)
    with local_world("dp2,tp2") as (_, axes):
        x = each(values).requires_grad_()
        value = chain(x, axes)
        (grad,) = torch.autograd.grad(value, x)
        expected = list(zip(ranks_of(value.detach()), ranks_of(grad)))
    for rank in range(4):
        for compiled in (False, True):
            for a, b in zip(got[rank]["chain", compiled], expected[rank]):
                torch.testing.assert_close(a, b, rtol=0, atol=1e-12)
        base = rank - rank % 2
        rows = [values[base + source].exp() for source in range(2)]
        start = [0 if rank % 2 == 0 else source + 1 for source in range(2)]
        count = [source + rank % 2 + 1 for source in range(2)]
        received = torch.cat([r[s : s + c] for r, s, c in zip(rows, start, count)])
        value = (received * torch.arange(len(received), dtype=torch.float64)[:, None]).sum()
        # row i that this rank sends gets the number of the place where it arrives
        sent = [rank % 2 + to + 1 for to in range(2)]
        place = torch.cat([torch.arange(sent[to]) + (0 if rank % 2 == 0 else to + 1) for to in range(2)])
        grad = torch.zeros(8, 3, dtype=torch.float64)
        grad[: sum(sent)] = values[rank][: sum(sent)].exp() * place[:, None]
        for compiled in (False, True):
            torch.testing.assert_close(got[rank]["uneven", compiled], (value, grad), rtol=0, atol=1e-12)
