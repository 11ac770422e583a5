"""Samplers against transformers' logits processors, their definitions, and the distribution that they must follow."""

import dataclasses

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers.generation import logits_process as hf

from qwen3f.errors import UserError
from qwen3f.infer.sampling import (
    NON_THINKING,
    THINKING,
    SamplingParams,
    filter_logits,
    penalise,
    stream_of,
    streams_at,
    uniform,
)
from qwen3f.infer.sampling import sample as sample_with_log_prob

SEEDS = st.integers(0, 2**31 - 1)


def random_logits(seed, rows=3, vocab=50, scale=4.0):
    return scale * torch.randn(rows, vocab, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


NOTHING = torch.zeros((), dtype=torch.bool)  # for `seen`: no token was seen


def streams(seed, request, position):
    return streams_at(torch.tensor([stream_of(seed, i) for i in request.tolist()]), position)


def keys(count, seed=0):
    return streams(seed, torch.arange(count), torch.zeros(count, dtype=torch.int64))


def sample(*args):
    return sample_with_log_prob(*args)[0]


@settings(max_examples=150, deadline=None)
@given(
    seed=SEEDS,
    temperature=st.floats(0.05, 3.0),
    top_k=st.integers(0, 60),
    top_p=st.one_of(st.just(1.0), st.floats(0.01, 0.999)),
    min_p=st.one_of(st.just(0.0), st.floats(0.001, 1.0)),
    ties=st.booleans(),
)
def test_filters_equal_transformers(seed, temperature, top_k, top_p, min_p, ties):
    """Both compute in float64. transformers gets logits shifted to a largest one of 0, which changes no probability.

    Equal logits are tested only without top-p: with it the sort decides which of two equal tokens stays.
    """
    logits = random_logits(seed)
    if ties and top_p == 1:
        logits = logits.round()
    expected = hf.TemperatureLogitsWarper(temperature)(None, logits - logits.amax(-1, keepdim=True))
    if top_k:
        expected = hf.TopKLogitsWarper(top_k)(None, expected)
    if top_p < 1:
        expected = hf.TopPLogitsWarper(top_p)(None, expected)
    if min_p:
        expected = hf.MinPLogitsWarper(min_p)(None, expected)
    got = filter_logits(logits, SamplingParams(temperature, top_k, top_p, min_p))
    torch.testing.assert_close(got, expected, rtol=0, atol=0)


def test_presence_counts_a_token_once():
    logits = random_logits(0)
    answers = torch.tensor([[1, 1, 4], [2, 2, 2], [7, 8, 9]])
    seen = torch.zeros(3, 50, dtype=torch.bool).scatter(1, answers, True)
    expected = logits.clone()
    for row, answer in enumerate(answers.tolist()):
        for token in set(answer):
            expected[row, token] -= 1.5
    assert torch.equal(penalise(logits, seen, 1.5), expected)
    greedy = sample(logits, SamplingParams(presence_penalty=2.0), keys(3), torch.ones(3, 50, dtype=torch.bool))
    assert torch.equal(greedy, logits.argmax(-1))
    pushed = torch.tensor([[1.0, 0.5, -9.0]])
    assert sample(pushed, SamplingParams(presence_penalty=1.0), keys(1), torch.tensor([[True, False, False]])) == 1


@pytest.mark.parametrize(
    "params", [SamplingParams(1.0), SamplingParams(0.7, 6, 0.9, 0.02), SamplingParams(1.3, 0, 0.8)]
)
def test_frequencies_follow_the_probabilities(params):
    """40,000 draws. χ² over tokens expected at least 5 times stays below its mean plus 6 standard deviations."""
    draws, logits = 40_000, random_logits(3, rows=1, vocab=12, scale=1.5)
    probs = filter_logits(logits, params).softmax(-1)[0]
    counts = sample(logits.expand(draws, -1), params, keys(draws, seed=5), NOTHING).bincount(minlength=12)
    assert counts[probs == 0].sum() == 0
    usual = probs * draws >= 5
    assert usual.sum() >= 4
    chi2 = ((counts - probs * draws)[usual].square() / (probs * draws)[usual]).sum().item()
    freedom = int(usual.sum()) - 1
    assert chi2 < freedom + 6 * (2 * freedom) ** 0.5
    uniform = torch.full_like(probs, draws / 12)
    assert ((counts - uniform).square() / uniform).sum() > 1000  # the test can tell distributions apart


@settings(max_examples=30, deadline=None)
@given(seed=SEEDS, rows=st.lists(st.integers(0, 7), min_size=1, max_size=8, unique=True))
def test_a_row_does_not_depend_on_its_batch(seed, rows):
    logits, place = random_logits(seed, rows=8), torch.tensor(rows)
    seen = torch.rand(8, 50, generator=torch.Generator().manual_seed(seed)) < 0.3
    position = torch.arange(8) + 3
    whole = sample(logits, NON_THINKING, streams(1, torch.arange(8), position), seen)
    part = sample(logits[place], NON_THINKING, streams(1, place, position[place]), seen[place])
    assert torch.equal(part, whole[place])


@settings(max_examples=150, deadline=None)
@given(seed=SEEDS, vocab=st.integers(1, 400), cut=st.floats(0, 1), scale=st.sampled_from([0.0, 1.0, 30.0]))
def test_a_draw_inverts_the_distribution_function(seed, vocab, cut, scale):
    """The drawn token is the one whose interval of the cumulative distribution holds the uniform number. The expected
    cumulative sums are in float64. Only the order of summation differs: 1e-12 of the total."""
    logits = random_logits(seed, rows=16, vocab=vocab, scale=scale)
    logits[torch.rand(logits.shape, generator=torch.Generator().manual_seed(seed)) < cut * 0.99] = -torch.inf
    logits[:, seed % vocab] = 0.0
    stream = keys(16, seed)
    ids, log_probs = sample_with_log_prob(logits, SamplingParams(1.0), stream)
    probs = logits.softmax(-1)
    upto = probs.cumsum(-1)
    chosen = probs.gather(-1, ids[:, None])[:, 0]
    end = upto.gather(-1, ids[:, None])[:, 0]
    assert (chosen > 0).all()
    assert (end >= uniform(stream) - 1e-12).all()
    assert (end - chosen <= uniform(stream) + 1e-12).all()
    torch.testing.assert_close(log_probs, chosen.log().float(), rtol=1e-5, atol=1e-6)


@settings(max_examples=60, deadline=None)
@given(seed=SEEDS, vocab=st.integers(1, 400))
def test_greedy_takes_the_first_of_equal_logits(seed, vocab):
    logits = random_logits(seed, rows=8, vocab=vocab, scale=1.0).round()
    ids = sample(logits, SamplingParams(), None)
    assert ids.tolist() == [row.index(max(row)) for row in logits.tolist()]


def test_streams_differ_by_seed_request_and_position():
    every = [
        streams(seed, torch.arange(50).repeat(50), torch.arange(50).repeat_interleave(50)).tolist() for seed in (0, 1)
    ]
    assert len({*every[0], *every[1]}) == 5000


def test_tokens_that_cannot_be_are_never_drawn():
    """In 1000 draws no token of probability 0 appears, nor one of probability e^−40."""
    logits = torch.tensor([[float("-inf"), 0.0, -40.0, float("-inf")]], dtype=torch.float64)
    params = SamplingParams(1.0)
    drawn = sample(logits.expand(1000, -1), params, keys(1000), NOTHING)
    assert set(drawn.tolist()) == {1}  # e^−40 is far below 1/1000
    assert sample(torch.zeros(1, 1), params, keys(1), NOTHING).tolist() == [0]


@pytest.mark.parametrize("temperature", [5e-324, 1e-310, 1e-308, 2.3e-308, 1e-300, 1e-45, 1e-9])
@pytest.mark.parametrize(
    "more", [{}, {"top_k": 3}, {"top_p": 0.9}, {"min_p": 0.1}, {"top_k": 3, "top_p": 0.9, "min_p": 0.1}]
)
def test_the_smallest_temperatures_choose_the_largest_logit(temperature, more):
    """As at temperature 0, but of equal logits any may be chosen. Ids stay in the vocabulary for logits of any size."""
    params = SamplingParams(temperature, **more)
    for scale in (1e-3, 1.0, 1e30, 1e300):
        logits = random_logits(0, rows=64, vocab=11) * scale
        if scale == 1e-3 and temperature == 1e-9:
            logits = (logits * 1e3).round() * 1e-3  # neighbours far enough apart for this temperature
        drawn = sample(logits, params, keys(64), NOTHING)
        assert torch.equal(logits.gather(1, drawn[:, None])[:, 0], logits.amax(-1))
        assert (filter_logits(logits, params).softmax(-1).sum(-1) - 1).abs().max() < 1e-12
    ties = torch.tensor([[2.0, 7.0, 7.0, -1.0]]).expand(400, -1)
    assert set(sample(ties, params, keys(400), NOTHING).tolist()) == {1, 2}


@settings(max_examples=100, deadline=None)
@given(seed=SEEDS, temperature=st.floats(5e-324, 1e308), scale=st.floats(1e-300, 1e300))
def test_every_temperature_gives_a_token(seed, temperature, scale):
    logits = random_logits(seed, rows=4, vocab=9) * scale
    drawn = sample(logits, SamplingParams(temperature, top_p=0.9), keys(4), NOTHING)
    assert drawn.min() >= 0
    assert drawn.max() < 9


def test_a_temperature_may_be_a_large_whole_number():
    assert set(sample(torch.zeros(1, 2), SamplingParams(10**300), keys(1), NOTHING).tolist()) <= {0, 1}


def test_the_ends_of_the_ranges_are_values():
    """min_p=1 keeps the largest logit and its equals; penalties of −2 and 2 are allowed."""
    logits = torch.tensor([[0.0, -1e-6, 3.0, 3.0]])
    assert filter_logits(logits, SamplingParams(0.7, min_p=1.0)).tolist() == [[-torch.inf, -torch.inf, 0.0, 0.0]]
    for penalty in (-2, 2):
        assert SamplingParams(presence_penalty=penalty).presence_penalty == penalty


def test_recommended_settings():
    assert dataclasses.astuple(THINKING) == (0.6, 20, 0.95, 0.0, 0.0)
    assert dataclasses.astuple(NON_THINKING) == (0.7, 20, 0.8, 0.0, 1.5)


@pytest.mark.parametrize(
    "values, words",
    [
        ({"temperature": -0.1}, "temperature must be 0"),
        ({"temperature": float("nan")}, "temperature must be 0"),
        ({"temperature": float("inf")}, "temperature must be 0"),
        ({"top_k": -1}, "top_k must be a whole number"),
        ({"top_k": 2.5}, "top_k must be a whole number"),
        ({"top_k": 5.0}, "top_k must be a whole number"),
        ({"top_k": True}, "top_k must be a whole number"),
        ({"top_k": float("inf")}, "top_k must be a whole number"),
        ({"temperature": 10**400}, "temperature must be 0"),
        ({"top_p": 0.0}, r"top_p must lie in \(0, 1\]"),
        ({"top_p": 1.1}, r"top_p must lie in \(0, 1\]"),
        ({"min_p": -0.1}, r"min_p must lie in \[0, 1\]"),
        ({"min_p": 1.1}, r"min_p must lie in \[0, 1\]"),
        ({"min_p": float("nan")}, r"min_p must lie in \[0, 1\]"),
        ({"presence_penalty": -2.5}, r"presence_penalty must lie in \[-2, 2\]"),
        ({"presence_penalty": 2.5}, r"presence_penalty must lie in \[-2, 2\]"),
    ],
)
def test_bad_values_are_named(values, words):
    with pytest.raises(UserError, match=words):
        SamplingParams(**values)


@pytest.mark.parametrize("temperature", [1e38, 1e39, 1e300])
def test_an_id_that_is_not_allowed_stays_so_at_any_temperature(temperature):
    """Divided by an infinite temperature, −inf would be NaN."""
    logits = torch.tensor([[1.0, 2.0, float("-inf"), 3.0]]).expand(64, 4)
    ids, log_probs = sample_with_log_prob(logits, SamplingParams(temperature), torch.arange(64))
    assert set(ids.tolist()) == {0, 1, 3}
    torch.testing.assert_close(log_probs, torch.full((64,), 1 / 3).log())
