"""Each schedule against torch.optim.lr_scheduler's chain of the same shape, and against its formula."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.optim import lr_scheduler as S

from qwen3f.errors import UserError
from qwen3f.train.schedule import Schedule

PEAK, TOTAL, WARMUP = 3e-3, 50, 8


def rates(schedule, steps=TOTAL):
    return [schedule(torch.tensor(s)).item() for s in range(steps)]


def torch_rates(make_tail, tail_start, warmup=WARMUP, steps=TOTAL):
    """Warmup by LinearLR, then constant, then whatever make_tail builds from step tail_start on."""
    opt = torch.optim.SGD([torch.nn.Parameter(torch.ones(()))], lr=PEAK)
    parts = [S.LinearLR(opt, 1 / warmup, total_iters=warmup - 1), S.ConstantLR(opt, 1.0, 1), make_tail(opt)]
    chain = S.SequentialLR(opt, parts, milestones=[warmup, tail_start])
    out = []
    for _ in range(steps):
        out.append(opt.param_groups[0]["lr"])
        opt.step()
        chain.step()
    return out


def test_cosine():
    ours = rates(Schedule("cosine", PEAK, TOTAL, WARMUP, min_lr=PEAK / 10))
    length = TOTAL - WARMUP
    theirs = torch_rates(lambda o: S.CosineAnnealingLR(o, length, eta_min=PEAK / 10), WARMUP + 1)
    # The chain starts its tail one step late to hold one constant step; compare against a chain without it.
    opt = torch.optim.SGD([torch.nn.Parameter(torch.ones(()))], lr=PEAK)
    cosine = S.CosineAnnealingLR(opt, length, eta_min=PEAK / 10)
    tail = []
    for _ in range(length):
        tail.append(opt.param_groups[0]["lr"])
        opt.step()
        cosine.step()
    assert ours[:WARMUP] == pytest.approx(theirs[:WARMUP], rel=1e-12)
    assert ours[WARMUP:] == pytest.approx(tail, rel=1e-12)


def test_wsd_linear():
    decay = 15
    ours = rates(Schedule("wsd", PEAK, TOTAL, WARMUP, min_lr=0.0, decay_steps=decay))
    theirs = torch_rates(lambda o: S.LinearLR(o, 1.0, 1e-12, total_iters=decay), TOTAL - decay)
    assert ours == pytest.approx(theirs, rel=1e-9)


def test_wsd_cosine():
    decay = 15
    ours = rates(Schedule("wsd", PEAK, TOTAL, WARMUP, min_lr=PEAK / 4, decay_steps=decay, decay_shape="cosine"))
    theirs = torch_rates(lambda o: S.CosineAnnealingLR(o, decay, eta_min=PEAK / 4), TOTAL - decay)
    assert ours == pytest.approx(theirs, rel=1e-12)


def test_ends_hold():
    schedule = Schedule("cosine", PEAK, TOTAL, WARMUP, min_lr=1e-4)
    assert schedule(torch.tensor(TOTAL)).item() == pytest.approx(1e-4, rel=1e-12)
    assert schedule(torch.tensor(TOTAL * 10)).item() == pytest.approx(1e-4, rel=1e-12)
    assert set(rates(Schedule("constant", PEAK, TOTAL))) == {PEAK}


@given(
    st.sampled_from(["cosine", "wsd", "constant"]),
    st.sampled_from(["linear", "cosine"]),
    *[st.integers(0, 5)] * 2,
    st.integers(1, 5),
    st.sampled_from([0.0, 0.25, 1.0]),
)
def test_formula(kind, shape, warmup, decay, rest, least):
    """Also of parts without a step, and of parts that fill the whole run."""
    total = max(warmup + decay, rest)
    schedule = Schedule(kind, PEAK, total, warmup, least * PEAK, decay, shape)

    def expected(s):
        if s < warmup:
            return (s + 1) / warmup
        length = decay if kind == "wsd" else total - warmup
        done = s - (total - length)  # steps of decay before this one
        if kind == "constant" or done <= 0:
            return 1.0
        if done >= length:
            return least
        straight = kind == "wsd" and shape == "linear"
        return least + (1 - least) * (1 - done / length if straight else math.cos(math.pi * done / length / 2) ** 2)

    steps = [*range(total), total + 1, 10 * total + 9]
    assert [schedule(torch.tensor(s)).item() for s in steps] == pytest.approx(
        [PEAK * expected(s) for s in steps], rel=1e-12, abs=1e-15
    )


def test_without_options_there_is_no_warmup_no_decay_and_no_least_rate():
    assert Schedule("wsd", PEAK, TOTAL) == Schedule("wsd", PEAK, TOTAL, 0, 0.0, 0, "linear")


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"kind": "cosin"}, "'cosin' is unknown"),
        ({"warmup_steps": 60}, "exceed the 50 steps"),
        ({"warmup_steps": 25, "decay_steps": 26}, "exceed the 50 steps"),
        ({"min_lr": 1.0}, "min_lr"),
        ({"decay_shape": "square"}, "linear or cosine"),
    ],
)
def test_wrong_values_are_named(changes, words):
    with pytest.raises(UserError, match=words):
        Schedule(**{"kind": "wsd", "peak": PEAK, "total_steps": TOTAL, **changes})
