"""Masks and attention: every backend computes the formula, and documents do not see each other."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qwen3f import model, params, presets, rng
from qwen3f.errors import UserError
from qwen3f.model import attention, mask


@settings(max_examples=40, deadline=None)
@given(st.lists(st.lists(st.integers(1, 300), min_size=1, max_size=12), min_size=1, max_size=3))
def test_block_mask_equals_the_dense_mask(rows):
    length = 4 * mask.BLOCK
    segments = torch.zeros(len(rows), length, dtype=torch.int32)
    for row, lengths in enumerate(rows):
        start = 0
        for number, n in enumerate(lengths, 1):
            segments[row, start : start + n] = number
            start += n
    blocks = mask.block_mask(segments)
    dense = mask.dense_mask(segments)
    runs = mask.document_runs(segments)
    tiles = dense.view(len(rows), 1, 4, mask.BLOCK, 4, mask.BLOCK).transpose(3, 4)
    some, every = tiles.any((-1, -2))[:, 0], tiles.all((-1, -2))[:, 0]
    needed, full = torch.zeros_like(some), torch.zeros_like(some)
    for b in range(len(rows)):
        for q in range(4):
            partial = blocks.kv_indices[b, 0, q, : blocks.kv_num_blocks[b, 0, q]].long()
            whole = blocks.full_kv_indices[b, 0, q, : blocks.full_kv_num_blocks[b, 0, q]].long()
            assert not set(partial.tolist()) & set(whole.tolist())
            needed[b, q, partial] = needed[b, q, whole] = True
            full[b, q, whole] = True
    assert torch.equal(needed, some)
    assert torch.equal(full, every)
    place = torch.arange(length)
    b = torch.arange(len(rows))[:, None, None]
    assert torch.equal(blocks.mask_mod(b, 0, place[:, None], place[None, :]), dense[:, 0])
    assert (runs[:, 1:] >= runs[:, :-1]).all()


def qkv(heads=6, kv=2, length=33, dim=8):
    g = torch.Generator().manual_seed(1)
    return [torch.randn(2, h, length, dim, generator=g, dtype=torch.float64) for h in (heads, kv, kv)]


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("kv", [1, 2, 6])
def test_sdpa_equals_reference(packed, kv):
    q, k, v = qkv(kv=kv)
    segments = torch.tensor([[1] * 10 + [2] * 20 + [0] * 3, [1] * 33], dtype=torch.int32)
    m = attention.make_mask(segments if packed else None, "sdpa", compiled=False)
    expected = attention.attend_reference(q, k, v, m, 0.0, None)
    torch.testing.assert_close(attention.attend(q, k, v, m), expected, rtol=1e-12, atol=1e-13)
    assert torch.isfinite(expected).all()


@pytest.mark.parametrize("execution", [model.EAGER, model.REFERENCE])
def test_a_packed_row_equals_its_documents_alone(execution):
    cfg = presets.get("nano").replace(num_hidden_layers=2)
    p = params.init_params(cfg, 0, dtype=torch.float64)
    a, b = torch.randint(0, cfg.vocab_size, (1, 9)), torch.randint(0, cfg.vocab_size, (1, 14))
    packed = {
        "tokens": torch.cat([a, b], 1),
        "positions": torch.cat([torch.arange(9), torch.arange(14)])[None],
        "segments": torch.tensor([[1] * 9 + [2] * 14], dtype=torch.int32),
    }
    together = model.apply(cfg, p, packed, execution).logits
    for part, tokens in ((together[:, :9], a), (together[:, 9:], b)):
        torch.testing.assert_close(
            part, model.apply(cfg, p, {"tokens": tokens}, execution).logits, rtol=1e-10, atol=1e-12
        )
    crossing = model.apply(cfg, p, {k: v for k, v in packed.items() if k != "segments"}, execution).logits
    assert (crossing[:, 9:] - together[:, 9:]).abs().max() > 1e-3


def test_dropout_follows_its_stream_alone():
    cfg = presets.get("nano").replace(num_hidden_layers=2, attention_dropout=0.5)
    p = params.init_params(cfg, 0)
    batch = {"tokens": torch.randint(0, 4096, (2, 16))}

    def logits(stream):
        return model.apply(cfg, p, batch, dropout_stream=None if stream is None else torch.tensor(stream)).logits

    assert torch.equal(logits(1), logits(1))
    assert not torch.equal(logits(1), logits(2))
    plain = model.apply(cfg.replace(attention_dropout=0.0), p, batch).logits
    torch.testing.assert_close(logits(None), plain)


def test_dropout_keeps_the_expectation():
    q, k, v = qkv()
    m = attention.AttentionMask()
    runs = [attention.attend_reference(q, k, v, m, 0.3, torch.tensor(rng.key(i))) for i in range(400)]
    expected = attention.attend_reference(q, k, v, m, 0.0, None)
    stacked = torch.stack(runs)
    error = (stacked.mean(0) - expected).abs() / (stacked.std(0) / 20 + 1e-12)
    assert error.max() < 6  # standard errors; 3,168 values


def test_wrong_backends_are_named():
    segments = torch.ones(1, 100, dtype=torch.int32)
    with pytest.raises(UserError, match="multiple of 128"):
        attention.make_mask(segments, "flex", compiled=True)
    with pytest.raises(UserError, match="'flash' is unknown"):
        attention.make_mask(segments, "flash", compiled=True)
