"""Masks and attention: every backend computes the formula, and documents do not see each other."""

import pytest
import torch

from qwen3f import model, params, presets, rng
from qwen3f.errors import UserError
from qwen3f.model import attention


def qkv(heads=6, kv=2, length=33, dim=16):
    g = torch.Generator().manual_seed(1)
    return [torch.randn(2, h, length, dim, generator=g, dtype=torch.float64) for h in (heads, kv, kv)]


@pytest.mark.parametrize("backend", ["auto", "sdpa", "flash"])
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("kv", [1, 2, 6])
def test_backends_equal_the_formula(packed, kv, backend):
    q, k, v = qkv(kv=kv)
    segments = torch.tensor([[1] * 10 + [2] * 20 + [0] * 3, [1] * 33], dtype=torch.int32)
    segments = segments if packed else None
    expected = attention.attend_reference(q, k, v, attention.make_mask(segments, "reference", 16), 0.0, None)
    got = attention.attend(q, k, v, attention.make_mask(segments, backend, 16), backend)
    torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-13)
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


def test_wrong_choices_are_named():
    with pytest.raises(UserError, match="'flex' is unknown"):
        attention.make_mask(torch.ones(1, 100, dtype=torch.int32), "flex", 16)
    with pytest.raises(UserError, match="kernels"):
        model.Execution(kernels=("softmax",))
