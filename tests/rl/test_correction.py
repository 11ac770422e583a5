"""The factors of an advantage, importance weights and the entropy filter: against TRL's formulas, and by hand."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from qwen3f.errors import UserError
from qwen3f.rl.correction import MODES, entropy_threshold, high_entropy, importance_weights, per_token, sampler_kl


def rows(seed=0):
    """(log-ratios, whether each token counts, segments) of three rows of packed documents with padding."""
    g = torch.Generator().manual_seed(seed)
    segments = torch.tensor(
        [[1] * 4 + [2] * 5 + [0], [1] * 10, [1] * 2 + [2] * 3 + [3] * 3 + [0, 0]], dtype=torch.int32
    )
    gap = 0.4 * torch.randn(3, 10, generator=g, dtype=torch.float64)
    counts = (torch.rand(3, 10, generator=g) < 0.7) & (segments > 0)
    return gap, counts, segments


@given(st.sampled_from(MODES), st.sampled_from([0.0, 0.5]), st.sampled_from([1.0, 1.5, 3.0]), st.integers(0, 20))
def test_weights_are_the_formulas(mode, low, high, seed):
    gap, counts, segments = rows(seed)
    got = importance_weights(gap, counts, segments, mode, low, high)
    for b in range(3):
        for t in range(10):
            if mode == "none" or not counts[b, t]:
                assert got[b, t] == 1
                continue
            own = (segments[b] == segments[b, t]) & counts[b]
            w = math.exp(gap[b][own].sum() if mode.startswith("sequence") else gap[b, t])
            if mode.endswith("truncate"):
                w = min(w, high)
            elif not low <= w <= high:
                w = 0.0
            assert got[b, t].item() == pytest.approx(w, rel=1e-12)


def test_they_are_trls_of_one_document_a_row():
    """Each row is one document. Expected: TRL 1.16's lines in `_generate_and_score_completions`, clip_max 3."""
    gap, counts, _ = rows()
    segments = torch.ones_like(counts, dtype=torch.int32)
    difference = torch.where(counts, gap, 0.0)
    for mode in MODES[1:]:
        logs = difference.sum(-1, keepdim=True) if mode.startswith("sequence") else difference
        ratio = logs.exp()
        ratio = ratio.clamp(max=3.0) if mode.endswith("truncate") else ratio.masked_fill(ratio > 3.0, 0.0)
        got = importance_weights(gap, counts, segments, mode, 0.0, 3.0)
        assert (got - ratio.expand_as(got))[counts].abs().max() <= 1e-5


def test_a_documents_number_at_each_token():
    _, _, segments = rows()
    numbers = torch.arange(30.0).view(3, 10)
    got = per_token(numbers, segments)
    assert got[0].tolist() == [0.0] * 4 + [1.0] * 5 + [0.0]
    assert got[2].tolist() == [20.0] * 2 + [21.0] * 3 + [22.0] * 3 + [0.0, 0.0]


def test_the_highest_entropies_are_kept():
    entropy = torch.arange(10.0).view(1, 10)
    counts = torch.ones(1, 10, dtype=torch.bool)
    counts[0, 9] = False
    threshold = entropy_threshold(entropy[counts], 0.2)
    assert high_entropy(entropy, counts, threshold)[0].tolist() == [0.0] * 7 + [1.0, 1.0, 0.0]
    assert entropy_threshold(entropy[:0], 0.2) == -math.inf
    assert high_entropy(entropy, counts, entropy_threshold(entropy[counts], 1.0))[0].sum() == 9


@given(st.lists(st.floats(0, 10), min_size=1, max_size=30), st.floats(0.01, 1.0))
def test_the_threshold_is_the_quantile(values, share):
    entropies = torch.tensor(values, dtype=torch.float64)
    assert entropy_threshold(entropies, share) == torch.quantile(entropies, 1 - share).item()


def test_more_tokens_have_a_threshold_than_torchs_quantile_takes():
    entropies = torch.arange(2**24 + 1, dtype=torch.float32)
    assert entropy_threshold(entropies, 0.25) == 0.75 * 2**24


def test_the_samplers_kl_is_never_negative():
    gap = torch.linspace(-1, 1, 11, dtype=torch.float64)
    assert (sampler_kl(gap) >= 0).all()
    assert sampler_kl(gap)[5] == 0


@pytest.mark.parametrize("mode, low, high", [("tis", 0, 2), ("token_mask", 2.0, 3.0), ("token_truncate", 0.0, 0.5)])
def test_what_cannot_be_is_refused(mode, low, high):
    with pytest.raises(UserError, match=r"rollout\.correction"):
        importance_weights(*rows(), mode, low, high)
