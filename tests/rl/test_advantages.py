"""Advantages against formulas, group by group; completions without a reward, groups of equal rewards, groups of one."""

import math
import statistics

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from qwen3f.errors import UserError
from qwen3f.rl.advantages import BASELINES, SCALES, combine_rewards, group_advantages, tells_nothing

NAN = math.nan
reward = st.one_of(st.sampled_from([0.0, 1.0, NAN]), st.floats(-10, 10).map(lambda x: round(x, 2)))
groups = st.integers(1, 5).flatmap(lambda g: st.lists(st.lists(reward, min_size=g, max_size=g), min_size=1, max_size=4))


@given(groups, st.sampled_from(BASELINES), st.sampled_from(SCALES))
def test_they_are_the_formulas(rewards, baseline, scale):
    got = group_advantages(torch.tensor(rewards, dtype=torch.float64), baseline, scale)
    judged = [x for row in rewards for x in row if not math.isnan(x)]
    for row, out in zip(rewards, got.tolist()):
        own = [x for x in row if not math.isnan(x)]
        for x, a in zip(row, out):
            if math.isnan(x) or len(set(own)) == 1:
                assert a == 0
                continue
            others = [*own]
            others.remove(x)
            base = statistics.fmean(own if baseline == "mean" else others)
            spread = {"group": own, "batch": judged, "none": None}[scale]
            expected = (x - base) / (1.0 if spread is None else statistics.stdev(spread) + 1e-4)
            assert a == pytest.approx(expected, rel=1e-9, abs=1e-12)


def test_unjudged_rewards_leave_mean_and_deviation():
    """TRL PR 5902, ms-swift 8123: a completion without a reward made its group NaN, or lowered the group's mean."""
    with_it = group_advantages(torch.tensor([[1.0, 0.0, NAN, 1.0]]))
    without = group_advantages(torch.tensor([[1.0, 0.0, 1.0]]))
    assert with_it[0, 2] == 0
    assert torch.equal(with_it[0, [0, 1, 3]], without[0])
    assert torch.equal(group_advantages(torch.full((2, 3), NAN)), torch.zeros(2, 3).double())


@pytest.mark.parametrize("value", [0.1, 1 / 3, 1e9 + 0.1, -0.7])
@pytest.mark.parametrize("scale", SCALES)
def test_equal_rewards_give_exactly_zero(value, scale):
    """NeMo PR 4161: float32's rounding of the mean was divided by a deviation that was rounding too. That gave
    advantages 4000 times too large."""
    rewards = torch.full((3, 7), value, dtype=torch.float32)
    assert torch.equal(group_advantages(rewards, scale=scale), torch.zeros(3, 7).double())
    assert tells_nothing(rewards).all()


def test_a_large_offset_changes_nothing():
    """The mean is subtracted before the variance is computed, so 1e6 + x has the variance of x."""
    x = torch.tensor([[0.0, 1.0, 1.0, 0.25]])
    far = group_advantages(x.double() + 1e6)
    assert (far - group_advantages(x)).abs().max() <= 1e-9


def test_small_spreads_are_not_shrunk():
    """verl PR 6348: a lower bound of the variance made advantages 100 times too small. We add 1e-4 to the deviation."""
    got = group_advantages(torch.tensor([[0.0, 0.1, 0.1, 0.0]]))
    big = group_advantages(torch.tensor([[0.0, 1.0, 1.0, 0.0]]))
    assert (got / big - 1).abs().max() <= 2e-3


@pytest.mark.parametrize("baseline", BASELINES)
@pytest.mark.parametrize("scale", SCALES)
def test_a_group_of_one_gets_zero(baseline, scale):
    assert torch.equal(group_advantages(torch.tensor([[1.0], [0.0]]), baseline, scale), torch.zeros(2, 1).double())
    assert tells_nothing(torch.tensor([[1.0], [0.0]])).all()


def test_trls_default_is_ours():
    """The formula of its `_generate_and_score_completions`: group mean, torch.std, 1e-4."""
    rewards = torch.rand(5, 8, generator=torch.Generator().manual_seed(0)).double()
    expected = (rewards - rewards.mean(1, keepdim=True)) / (rewards.std(1, keepdim=True) + 1e-4)
    assert (group_advantages(rewards) - expected).abs().max() <= 1e-12


def test_several_rewards_are_summed_by_weight_and_then_normalised():
    rewards = torch.tensor([[[1.0, 0.0, 1.0]], [[0.5, 0.5, NAN]]])
    total, advantages = combine_rewards(rewards, (1.0, 0.2))
    assert total[0, :2].tolist() == [1.1, 0.1]
    assert total[0, 2].isnan()
    assert torch.equal(advantages, group_advantages(total))


def test_normalising_first_lets_a_reward_of_small_spread_count():
    rewards = torch.tensor([[[1.0, 0.0, 1.0, 0.0], [0.0, 0.0, 1.0, 1.0]], [[0.01, 0.0, 0.0, 0.01], [0.0, 0.01, 0, 0]]])
    _, got = combine_rewards(rewards, (1.0, 1.0), "normalize_then_sum")
    each = [group_advantages(one) for one in rewards]
    summed = each[0] + each[1]
    expected = (summed - summed.mean()) / (summed.std() + 1e-4)
    assert (got - expected).abs().max() <= 1e-12
    _, equal = combine_rewards(torch.ones(2, 3, 4), (1.0, 1.0), "normalize_then_sum")
    assert torch.equal(equal, torch.zeros(3, 4).double())


def test_normalised_first_a_weight_counts_and_what_one_reward_cannot_judge_is_left_out():
    rewards = torch.tensor([[[1.0, 0.0, 1.0, 0.0], [0.0, NAN, 1.0, 1.0]], [[0.3, 0.0, 0.1, NAN], [0.0, 0.2, 0.5, 0.1]]])
    total, got = combine_rewards(rewards, (1.0, -0.25), "normalize_then_sum")
    out = rewards.isnan().any(0)
    assert torch.equal(total.isnan(), out)
    assert (got[out] == 0).all()
    each = [group_advantages(one.masked_fill(out, NAN)) for one in rewards]
    summed = (each[0] - 0.25 * each[1])[~out]
    assert (got[~out] - (summed - summed.mean()) / (summed.std() + 1e-4)).abs().max() <= 1e-12


def test_an_unknown_way_of_combining_is_refused():
    with pytest.raises(UserError, match="combining rewards by 'sum': write one of sum_then_normalize, normalize_then_"):
        combine_rewards(torch.ones(1, 1, 2), (1.0,), "sum")


@pytest.mark.parametrize("how", [{"baseline": "median"}, {"scale": "std"}])
def test_names_that_do_not_exist_are_refused(how):
    with pytest.raises(UserError, match="write one of"):
        group_advantages(torch.zeros(1, 2), **how)


@pytest.mark.parametrize("wrong", [torch.zeros(3), torch.tensor([[math.inf, 0.0]])])
def test_rewards_that_cannot_be_are_refused(wrong):
    with pytest.raises(UserError, match="rewards have the shape|infinite"):
        group_advantages(wrong)
