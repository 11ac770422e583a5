"""The first and the last kernel of a decoding pass: they copy, so they are exact."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kernels import backend
from kernels.decode_ends import pack, start, start_reference
from tests.kernels.gpu_cases import DTYPES


def case(rows, hidden, half, dtype=torch.float32, device="cpu", seed=0):
    """Ids, and −1 − i for each second row."""
    g = torch.Generator().manual_seed(seed)
    last = torch.randint(0, 50, (rows + 3,), generator=g)
    tokens = torch.randint(0, 50, (rows,), generator=g)
    tokens[::2] = -1 - torch.randint(0, len(last), tokens[::2].shape, generator=g)
    positions, rotary = torch.randint(0, 90, (2, rows), generator=g)
    embed, cos, sin = (torch.randn(n, m, generator=g) for n, m in ((50, hidden), (90, half), (90, half)))
    integers = (y.to(device) for y in (tokens, last, positions, rotary))
    return *integers, embed.to(device, dtype), cos.to(device), sin.to(device)


@settings(max_examples=10, deadline=None)
@given(rows=st.integers(1, 4), hidden=st.integers(1, 2100), half=st.integers(1, 130), seed=st.integers(0, 99))
def test_start_interpreted(rows, hidden, half, seed):
    arguments = case(rows, hidden, half, seed=seed)
    with backend.interpreted():
        got = start(*arguments)
    for ours, formula in zip(got, start_reference(*arguments)):
        assert ours.dtype == formula.dtype
        assert torch.equal(ours, formula)


def test_start_feeds_ids_and_what_was_drawn():
    embed, angles = torch.arange(12.0).view(6, 2), torch.arange(4.0)[:, None]
    places = torch.tensor([[1, 3], [1, 2]])
    got = start(torch.tensor([5, -2]), torch.tensor([0, 3]), *places, embed, angles, -angles)
    assert got.x_BD.tolist() == [[10, 11], [6, 7]]
    assert (got.cos_BF.tolist(), got.sin_BF.tolist()) == ([[1], [2]], [[-1], [-2]])
    assert got.lengths_B.tolist() == [1, 3]


def drawn(rows, device="cpu"):
    g = torch.Generator().manual_seed(0)
    log_probs = -torch.rand(rows, generator=g)
    log_probs[::3] = float("nan")
    return (
        torch.randint(0, 2**31, (rows,), generator=g).to(device),
        log_probs.to(device),
        (log_probs == log_probs).to(device),
    )


@pytest.mark.parametrize("rows", [1, 256, 300])
def test_pack_interpreted(rows):
    ids, log_probs, finite = drawn(rows)
    with backend.interpreted():
        out = pack(ids, log_probs, finite)
    for got in (out, pack(ids, log_probs, finite)):
        assert got.dtype == torch.float64
        torch.testing.assert_close(
            got, torch.stack([ids.double(), log_probs.double(), finite.double()]), rtol=0, atol=0, equal_nan=True
        )


def test_opcheck_and_no_rows():
    for context in (torch.no_grad(), backend.interpreted()):
        with context:
            checks = ("test_schema", "test_faketensor")
            torch.library.opcheck(torch.ops.qwen3f.decode_start, case(2, 8, 4), test_utils=checks)
            torch.library.opcheck(torch.ops.qwen3f.decode_pack, drawn(4), test_utils=checks)
            assert start(*case(0, 8, 4)).x_BD.shape == (0, 8)
            assert pack(*drawn(0)).shape == (3, 0)


def test_wrong_arguments_are_named():
    tokens, last, positions, rotary, embed, *angles = case(2, 8, 4)
    for arguments, words in (
        ((tokens, last, positions, rotary[:1], embed), "rotary must be"),
        ((tokens, last, positions, rotary, embed.t()), "embed must be contiguous"),
        ((torch.stack([tokens] * 2, 1)[:, 0], last, positions, rotary, embed), "tokens must be contiguous"),
    ):
        with pytest.raises(ValueError, match=words):
            start(*arguments, *angles)


def test_tensors_on_two_devices_are_named():
    tokens, last, *rest = case(2, 8, 4)
    with pytest.raises(ValueError, match="last is on meta"):
        start(tokens, last.to("meta"), *rest)
    ids, log_probs, finite = drawn(2)
    with pytest.raises(ValueError, match="finite is on meta"):
        pack(ids, log_probs, finite.to("meta"))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", [1, 300])
def test_on_a_gpu(rows, dtype):
    arguments = case(rows, 2100, 64, dtype, "cuda")
    for ours, formula in zip(start(*arguments), start_reference(*arguments)):
        assert torch.equal(ours, formula)
    ids, log_probs, finite = drawn(rows, "cuda")
    expected = torch.stack([ids.double(), log_probs.double(), finite.double()])
    torch.testing.assert_close(pack(ids, log_probs, finite), expected, rtol=0, atol=0, equal_nan=True)
