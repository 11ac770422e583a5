"""A head that is cut over ranks chooses what the whole one does (kernels.head_sample): all ranks in one process.

Log-probabilities agree to 1e-5, for float32 sums in another order, and to 1e-12 in float64.
"""

import contextlib

import pytest
import torch

from kernels import backend
from kernels.head_sample import head_sample
from kernels.head_shards import choose, head_shard
from tests.kernels.gpu_cases import in_dtypes
from tests.kernels.test_head_sample import case, ends_of_a_distribution


def by_shards(x, norm, eps, head, num_ids, inverse, uniform, shards, allowed=None):
    """(ids, logprob, logits, finite) as head_sample gives them: results summed over ranks, logits side by side."""
    size = len(head) // shards
    known = [min(max(num_ids - rank * size, 0), size) for rank in range(shards)]
    masks = [None] * shards if allowed is None else allowed.chunk(shards)
    parts = [
        head_shard(x, norm, eps, head[rank * size : (rank + 1) * size], known[rank], inverse, masks[rank])
        for rank in range(shards)
    ]
    sums = torch.stack([sums for _, sums in parts])
    found = [choose(parts[rank][0], sums, known[rank], inverse, uniform, rank, masks[rank]) for rank in range(shards)]
    ids, logprob, finite = (torch.stack(values).sum(0) for values in zip(*found))
    assert finite.max() <= 1  # one rank alone has a row's token
    return ids, logprob, torch.cat([logits for logits, _ in parts], 1), finite > 0


def check(arguments, shards, interpret, tolerance, allowed=None):
    with backend.interpreted() if interpret else contextlib.nullcontext():
        got, expected = by_shards(*arguments, shards, allowed), head_sample(*arguments, allowed)
    good = expected[3]
    assert torch.equal(got[3], good)
    assert torch.equal(got[0][good], expected[0][good])
    assert ((got[0] >= 0) & (got[0] < arguments[4])).all()
    torch.testing.assert_close(got[1][good], expected[1][good], rtol=0, atol=tolerance)
    torch.testing.assert_close(got[2][good], expected[2][good], rtol=tolerance, atol=tolerance, equal_nan=True)
    return got


# rows, hidden, vocabulary, ids, shards. The ids end in a shard, at its end, or shards before the last; each product
SHAPES = [(1, 40, 90, 83, 2), (1, 16, 90, 45, 2), (5, 32, 104, 40, 4), (34, 32, 70, 43, 2), (2, 32, 60, 60, 3)]


@pytest.mark.parametrize("sizes", SHAPES)
@pytest.mark.parametrize("how", ["formula", "float64", "interpreted"])
def test_shards_choose_what_the_whole_head_chooses(sizes, how):
    dtype = torch.float64 if how == "float64" else torch.float32
    arguments = case(*sizes[:4], temperatures=(0.7, 0.0, 1.0, 1.6), dtype=dtype)
    check(arguments, sizes[4], how == "interpreted", 1e-12 if how == "float64" else 1e-5)


@pytest.mark.parametrize("sizes", SHAPES)
@pytest.mark.parametrize("how", ["float64", "interpreted"])
def test_ids_that_are_not_allowed(sizes, how):
    """Some in each shard, and all of the first one."""
    dtype = torch.float64 if how == "float64" else torch.float32
    arguments = case(*sizes[:4], temperatures=(0.7, 0.0, 1.0, 1.6), dtype=dtype)
    allowed = torch.arange(sizes[2]) % 3 != 1
    check(arguments, sizes[4], how == "interpreted", 1e-12 if how == "float64" else 1e-5, allowed)
    if sizes[3] > sizes[2] // sizes[4]:  # ids beyond the first shard
        allowed[: sizes[2] // sizes[4]] = False
        got = check(arguments, sizes[4], how == "interpreted", 1e-12 if how == "float64" else 1e-5, allowed)
        assert allowed[got[0]].all()


@pytest.mark.parametrize("interpret", [False, True])
def test_ends_of_the_distribution(interpret):
    """The first and the last possible id, in the first and the last shard; equal logits in two shards."""
    arguments, expected = ends_of_a_distribution()
    assert check(arguments, 2, interpret, 2e-6)[0].tolist() == expected


@pytest.mark.filterwarnings("ignore:invalid value", "ignore:divide by zero")  # of numpy, in the interpreter
@pytest.mark.parametrize("interpret", [False, True])
def test_a_row_that_is_not_finite_is_named_alone(interpret):
    x, norm, eps, head, num_ids, inverse, uniform = case(6, 16, 90, 70, (1.0, 0.0))
    x[1, 3], x[2, 0] = float("nan"), float("inf")
    head[80] = float("nan")  # padding
    got = check((x, norm, eps, head, num_ids, inverse, uniform), 3, interpret, 1e-5)
    assert got[3].tolist() == [True, False, False, True, True, True]
    head[65] = float("nan")  # read by the last shard only
    got = check((x, norm, eps, head, num_ids, inverse, uniform), 3, interpret, 1e-5)
    assert not got[3].any()


def test_wrong_arguments_are_named():
    x, norm, eps, head, _, inverse, _ = case(2, 16, 40, 33)
    with pytest.raises(ValueError, match="num_ids must be 0 … 40, got 41"):
        head_shard(x, norm, eps, head, 41, inverse)
    with pytest.raises(ValueError, match="head must be"):
        head_shard(x, norm, eps, head.t(), 3, inverse)


@pytest.mark.gpu
@pytest.mark.parametrize("rows", [1, 8, 64, 256])
@pytest.mark.parametrize("hidden, vocab, num_ids, dtype", in_dtypes([(1024, 151936, 151669)]))
def test_on_a_gpu(rows, hidden, vocab, num_ids, dtype):
    """Logits are those of the whole head, up to the order of float32 sums. So a draw near the border of two ids may
    take the other one, within 2e-5 of the range."""
    arguments = case(rows, hidden, vocab, num_ids, (0.7, 0.0, 1.0), dtype, "cuda")
    got, expected = by_shards(*arguments, 2), head_sample(*arguments)
    torch.testing.assert_close(got[2], expected[2], rtol=1e-5, atol=1e-4)
    assert got[3].all()
    same = got[0] == expected[0]
    assert same.float().mean() >= 0.98
    torch.testing.assert_close(got[1][same], expected[1][same], rtol=0, atol=1e-4)
