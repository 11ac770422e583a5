"""Loss spikes: the run goes back to the last checkpoint and skips the data since then. Rollbacks are limited."""

import json
import statistics

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from qwen3f.checkpoint import inspect
from qwen3f.checkpoint.checkpointer import Checkpointer
from qwen3f.data.loader import build_batch
from qwen3f.errors import TrainingError
from qwen3f.processes.world import ALONE
from qwen3f.stages import pretrain
from qwen3f.train.guards.spikes import LossSpike, SpikeGuard, SpikePolicy
from qwen3f.train.loop import run
from qwen3f.train.setup import make_setup
from qwen3f.train.stage import Run
from qwen3f.train.step import make_train_step
from tests.train.runs import assert_same_bits, final_state, metrics

LOSSES = st.lists(st.floats(0.5, 9), min_size=1, max_size=40)


@given(LOSSES, st.integers(1, 9), st.floats(1, 12))
def test_the_limit_is_the_median_and_robust_deviations(losses, window, threshold):
    guard, good = SpikeGuard(SpikePolicy(threshold, window, 1), {}), []
    for step, loss in enumerate(losses, 1):
        last = good[-window:]
        spike = False
        if len(last) == window:
            middle = np.median(last)
            deviation = max(1.4826 * np.median(np.abs(np.array(last) - middle)), 0.01 * middle)
            spike = loss > middle + threshold * deviation
        if spike:
            with pytest.raises(LossSpike) as caught:
                guard.judge(step, loss, step * 4, 4)
            assert (caught.value.step, caught.value.end) == (step, step * 4 + 4)
        else:
            guard.judge(step, loss, step * 4, 4)
            good.append(loss)
        assert guard.record["losses"] == good[-window:]
        guard = SpikeGuard(SpikePolicy(threshold, window, 1), json.loads(json.dumps(guard.record)))  # as by a resume


def test_off_it_knows_nothing():
    guard = SpikeGuard(SpikePolicy(0.0, 2, 1), {})
    for loss in (1.0, 1.0, 1e9):
        guard.judge(1, loss, 0, 1)
    assert guard.record == {"losses": [], "rollbacks": 0, "skipped": []}


def configured(make, **changes):
    options = {"spike.threshold": 10.0, "spike.window": 4, "spike.rollbacks": 2, "eval.every": 0, "log_every": 1}
    return make(steps=14, **{"checkpoint.every": 3, "checkpoint.keep": 0} | options | changes)


@pytest.fixture
def spikes():
    """at(*places) -> (make_step, calls). Steps spike on batches with these places; calls: each batch's first place."""
    calls = []

    def at(*places):
        def make_step(*args):
            step = make_train_step(*args)

            def wrapped(state, batch):
                calls.append(int(batch["index"][0]))
                state, values = step(state, batch)
                if set(batch["index"].tolist()) & set(places):
                    values = values | {"loss": values["loss"] * 10}
                    for leaf in state.params.values():
                        leaf.mul_(1.5)  # what a rollback must undo
                return state, values

            return wrapped

        return make_step, calls

    return at


@pytest.mark.parametrize("log_every", [1, 14])  # a step's loss is known at once, or while the next one runs
def test_a_run_goes_back_and_on_behind_the_spike(make, tmp_path, spikes, capsys, log_every):
    """Step 8 (examples 28 to 31) spikes. The last checkpoint is of step 6, so examples 24 to 31 are left out.

    The final state equals, bit for bit, steps made by hand: from step 6 on, with the data order at 32.
    """
    config = configured(make, log_every=log_every)
    make_step, calls = spikes(30)
    run(config, tmp_path / "w", progress=False, make_step=make_step)
    said = capsys.readouterr().out
    assert "the loss of step 8, " in said
    assert "back to step 6, skipping examples 24 to 31 of the data order (rollback 1 of 2)" in said
    assert calls == [*range(0, 32, 4), *([] if log_every == 1 else [32]), *range(32, 64, 4)]
    state = final_state(config, tmp_path / "w", 14)
    assert (int(state.step), int(state.position)) == (14, 32 + 8 * 4)
    logged = [line["step"] for line in metrics(tmp_path / "w")]
    assert logged == (list(range(1, 15)) if log_every == 1 else [1, 7, 14])  # 7: the first step after the rollback

    with Checkpointer(tmp_path / "w" / "checkpoints", 0, 0) as checkpoints:
        assert checkpoints.steps() == [3, 6, 9, 12, 14]
        records = [checkpoints.read_meta(step)["spikes"] for step in checkpoints.steps()]
        assert [(r["skipped"], r["rollbacks"]) for r in records] == 2 * [([], 0)] + 3 * [([[24, 32]], 1)]
        before, _ = checkpoints.restore(state, 6)
    shown = inspect.report(str(tmp_path / "w"), verify=False)
    assert "left out after a loss spike: examples 24 to 31 of the data order" in shown

    setup = make_setup(config)
    stage = pretrain.make(Run(setup, tmp_path / "w", ALONE, False, lambda: False))
    step = make_train_step(setup.model, stage.objective, setup.step_options())
    for place in range(32, 64, 4):
        before, _ = step(before, build_batch(stage.dataset, place, np.arange(4), config.seed, setup.model.vocab_size))
    assert_same_bits((before.params, before.opt), (state.params, state.opt))


def test_resuming_around_a_spike_is_exact(make, tmp_path, spikes):
    """A run is killed three times: before the spike, after the rollback, and after the next checkpoint.

    Its final state and records equal those of a run that is never killed.
    """
    config = configured(make)
    make_step, _ = spikes(30)
    run(config, tmp_path / "whole", progress=False, make_step=make_step)
    straight, calls = final_state(config, tmp_path / "whole", 14), []

    class Killed(Exception):
        pass

    def dying(*args):
        step = make_step(*args)

        def wrapped(state, batch):
            calls.append(1)
            if len(calls) in (7, 7 + 4, 7 + 4 + 7):  # in step 7, in 8 after the rollback, in 11
                raise Killed
            return step(state, batch)

        return wrapped

    for _ in range(3):
        with pytest.raises(Killed):
            run(config, tmp_path / "cut", progress=False, make_step=dying)
    run(config, tmp_path / "cut", progress=False, make_step=dying)
    assert_same_bits(final_state(config, tmp_path / "cut", 14), straight)
    records = []
    for name in ("whole", "cut"):
        with Checkpointer(tmp_path / name / "checkpoints", 0, 0) as checkpoints:
            records.append([checkpoints.read_meta(step)["spikes"] for step in checkpoints.steps()])
    assert records[0] == records[1]


def test_two_spikes_before_any_checkpoint(make, tmp_path, spikes, capsys):
    config = configured(make, **{"checkpoint.every": 6, "spike.rollbacks": 3})
    make_step, _ = spikes(18, 30, 38)  # in step 5; after the rollback in step 3, too early to be judged, and in step 5
    run(config, tmp_path / "w", progress=False, make_step=make_step)
    said = capsys.readouterr().out
    assert "back to step 0, skipping examples 0 to 19 of the data order (rollback 1 of 3)" in said
    with Checkpointer(tmp_path / "w" / "checkpoints", 0, 0) as checkpoints:
        last = checkpoints.read_meta(14)["spikes"]
        assert int(final_state(config, tmp_path / "w", 14).position) == last["skipped"][-1][1] + 14 * 4
    assert last["skipped"] == [[0, 40]]
    assert last["rollbacks"] == 2


def test_after_so_many_rollbacks_the_run_ends_and_keeps_its_checkpoints(make, tmp_path, spikes):
    make_step, _ = spikes(*range(24, 400))
    with pytest.raises(TrainingError, match=r"the loss of step 7, .*; 2 of 2 rollbacks are used up"):
        run(configured(make), tmp_path, progress=False, make_step=make_step)
    with Checkpointer(tmp_path / "checkpoints", 0, 0) as checkpoints:
        assert checkpoints.steps() == [3, 6]
        for step in (3, 6):
            final_state(configured(make), tmp_path, step)
    assert statistics.fmean(line["loss"] for line in metrics(tmp_path)) < 8  # no spike is in the log
