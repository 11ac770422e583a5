"""Which checkpoints stay, over any sequence of saves, and that the latest always does."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qwen3f.checkpoint.checkpointer import Checkpointer, CheckpointWriteError
from qwen3f.checkpoint.retention import Retention
from qwen3f.errors import UserError

POLICIES = st.builds(
    Retention, st.integers(0, 4), every=st.integers(0, 5), best=st.integers(0, 3), mode=st.sampled_from(["min", "max"])
)
VALUES = st.none() | st.floats(-3, 3).map(lambda x: round(x, 1)) | st.sampled_from([math.nan, math.inf])
SAVES = st.lists(st.tuples(st.integers(1, 7), VALUES, st.booleans()), min_size=1, max_size=25)


@given(POLICIES, SAVES)
def test_over_sequences_of_saves(policy, saves):
    """A save is (rise of the step, metric, whether it fails). A save that fails deletes nothing."""
    there, all_saved, step = {}, {}, 0
    for rise, value, fails in saves:
        step += rise
        if fails:
            continue
        there[step] = all_saved[step] = {} if value is None else {"val_loss": value}
        for old in policy.expired(there):
            del there[old]
        steps = sorted(all_saved)
        assert step in there
        assert policy.expired(there) == []
        if policy.keep == 0:
            assert sorted(there) == steps
            continue
        assert set(steps[-policy.keep :]) <= set(there)
        if policy.every:
            assert {s for s in steps if s % policy.every == 0} <= set(there)
        good = {s: m["val_loss"] for s, m in all_saved.items() if math.isfinite(m.get("val_loss", math.nan))}
        best = sorted(good.values(), reverse=policy.mode == "max")[: policy.best]
        held = sorted((good[s] for s in there if s in good), reverse=policy.mode == "max")
        assert held[: policy.best] == best  # the best of all there ever were are never given up
        assert len(there) <= policy.keep + policy.best + (len(steps) if policy.every else 0)


@settings(max_examples=300)
@given(POLICIES, st.dictionaries(st.integers(1, 40), VALUES, max_size=12))
def test_a_checkpoint_goes_if_no_rule_keeps_it(policy, values):
    good = {step: value for step, value in values.items() if value is not None and math.isfinite(value)}

    def stays(step):
        last = sum(other > step for other in values) < policy.keep or policy.keep == 0
        multiple = policy.every > 0 and step % policy.every == 0
        sign = {"min": 1, "max": -1}[policy.mode]
        better = [other for other in good if (sign * good[other], other) < (sign * good.get(step, 0), step)]
        return last or multiple or (step in good and len(better) < policy.best)

    saved = {step: {} if value is None else {"val_loss": value} for step, value in values.items()}
    assert policy.expired(saved) == [step for step in sorted(values) if not stays(step)]


def test_a_number_alone_keeps_that_many_of_the_latest():
    assert Retention(2).expired({step: {"val_loss": step} for step in range(1, 5)}) == [1, 2]


def test_on_disk(tmp_path):
    """The loss falls to 0.1 at step 5 and rises again. What stays: the last, the multiples of 4 and the best two."""
    state = {"w": torch.zeros(2)}
    with Checkpointer(tmp_path, 1, Retention(1, every=4, best=2, metric="loss")) as checkpoints:
        for step in range(1, 12):
            checkpoints.save(step, state, {}, {"loss": abs(step - 5.1), "other": math.nan})
        checkpoints.wait()
        assert checkpoints.steps() == [4, 5, 6, 8, 11]
    with Checkpointer(tmp_path, 1, Retention(1, every=4, best=2, metric="loss")) as again:  # it reads old metrics
        again.save(12, state, {}, {"loss": 9.0})
        again.wait()
        assert again.steps() == [4, 5, 6, 8, 12]
        (tmp_path / "6" / "manifest.json").write_text("{")
        again.save(13, state, {}, {"loss": 9.5})  # if its metric can't be read, it is none of the best
        again.wait()
        assert again.steps() == [4, 5, 8, 12, 13]


def test_a_save_that_fails_deletes_nothing(tmp_path, monkeypatch):
    with Checkpointer(tmp_path, 1, 1) as checkpoints:
        checkpoints.save(1, {"w": torch.zeros(2)}, {})
        checkpoints.wait()
        monkeypatch.setattr(
            "qwen3f.checkpoint.manifest.write", lambda *args: (_ for _ in ()).throw(OSError("disk full"))
        )
        for step in (2, 3):
            checkpoints.save(step, {"w": torch.zeros(2)}, {})
            with pytest.raises(CheckpointWriteError, match="disk full"):
                checkpoints.wait()
            assert checkpoints.steps() == [1]
            assert [path.name for path in tmp_path.iterdir()] == ["1"]


@pytest.mark.parametrize(
    "options, words",
    [
        ({"keep": -1}, "keep is -1"),
        ({"every": -2}, "keep_every is -2"),
        ({"best": -1}, "keep_best is -1"),
        ({"mode": "lowest"}, "best_mode is 'lowest': write min or max"),
    ],
)
def test_wrong_policies(options, words):
    with pytest.raises(UserError, match=words):
        Retention(**{"keep": 1} | options)
