"""What clusters do to a run: signals, damaged and unwritable files, losses that are not finite. Nothing is lost."""

import os
import resource
import signal

import numpy as np
import pytest
import torch

from qwen3f.errors import TrainingError, UserError
from qwen3f.stages import pretrain
from qwen3f.train.checkpoint import Checkpointer
from qwen3f.train.loop import run
from tests.train.runs import assert_same_bits, final_state, metrics


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_stops_after_the_step_and_the_run_goes_on_exactly(make, tmp_path, number, capsys):
    config = make(steps=6, **{"checkpoint.every": 4, "eval.every": 5})
    run(config, tmp_path / "whole", progress=False)
    straight = final_state(config, tmp_path / "whole", 6)
    real = pretrain.make_train_step

    def signalled(*args, **kw):
        step = real(*args, **kw)

        def wrapped(state, batch):
            if int(state.step) == 4:  # in step 5, after which there would be an evaluation and no checkpoint
                os.kill(os.getpid(), number)
            return step(state, batch)

        return wrapped

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pretrain, "make_train_step", signalled)
        run(config, tmp_path / "w", progress=False)
    assert f"{number.name}: stopped after step 5" in capsys.readouterr().out
    with Checkpointer(tmp_path / "w" / "checkpoints", 0, 0) as checkpoints:
        assert checkpoints.steps() == [4, 5]
    assert [line["step"] for line in metrics(tmp_path / "w") if "val_bpb" in line] == []
    run(config, tmp_path / "w", progress=False)
    assert_same_bits(straight, final_state(config, tmp_path / "w", 6))


def test_a_damaged_checkpoint_is_named_and_the_one_before_it_used(make, tmp_path, capsys):
    config = make(steps=6, **{"checkpoint.every": 2, "checkpoint.keep": 0, "eval.every": 0})
    run(config, tmp_path, progress=False)
    straight = final_state(config, tmp_path, 6)
    for step in (6, 4):
        for path in (tmp_path / "checkpoints" / str(step)).rglob("manifest.json"):
            path.write_text(path.read_text().replace('"bytes": ', '"bytes": 9'))
    capsys.readouterr()
    run(config, tmp_path, progress=False)
    said = capsys.readouterr().out
    assert "checkpoints/6 is damaged" in said
    assert "checkpoints/4 is damaged" in said
    assert "going on from step 2" in said
    assert_same_bits(straight, final_state(config, tmp_path, 6))
    assert {p.name for p in (tmp_path / "checkpoints.aside1").iterdir()} == {"4", "6"}

    for path in (tmp_path / "checkpoints").rglob("manifest.json"):
        path.write_text("{")
    with pytest.raises(UserError, match="checkpoints/2 is damaged"):
        run(make(steps=8), tmp_path, progress=False)


def test_steps_that_are_not_finite_are_kept_and_passed_over_as_often_as_allowed(make, tmp_path, capsys):
    real, batches = pretrain.make_train_step, {}

    def poisoned(*args, **kw):
        step = real(*args, **kw)

        def wrapped(state, batch):
            number = int(state.step) + 1
            batches[number] = batch
            if number in (3, 5):
                batch = batch | {"loss_weights": batch["loss_weights"] * float("inf")}
            return step(state, batch)

        return wrapped

    def attempt(workdir, skips):
        run(make(steps=6, nonfinite_skips=skips, **{"checkpoint.every": 1, "checkpoint.keep": 0}), workdir, False)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pretrain, "make_train_step", poisoned)
        attempt(tmp_path / "two", 2)
        said = capsys.readouterr().out
        assert "step 3 is not finite" in said
        assert "2 of 2 such steps passed over" in said
        with pytest.raises(TrainingError, match=r"step 5 is not finite.* kept in .*nonfinite/step-5\.npz"):
            attempt(tmp_path / "one", 1)
    assert {p.name for p in (tmp_path / "two" / "nonfinite").iterdir()} == {"step-3.npz", "step-5.npz"}
    with np.load(tmp_path / "two" / "nonfinite" / "step-3.npz") as kept:
        assert set(kept) == set(batches[3])
        assert all((kept[key] == batches[3][key].numpy()).all() for key in kept)
    config = make(steps=6)
    before, bad, after = (final_state(config, tmp_path / "two", step) for step in (2, 3, 4))
    assert_same_bits((before.params, before.opt), (bad.params, bad.opt))
    assert (int(bad.step), int(bad.position)) == (3, 12)
    assert not torch.equal(bad.params["model.norm.weight"], after.params["model.norm.weight"])


@pytest.mark.parametrize("policy", ["stop", "go_on"])
def test_a_full_disk_stops_the_run_or_not_by_policy(make, tmp_path, policy, capsys):
    """A limit on file sizes, from step 3 to step 4, stands for a full disk."""
    real = pretrain.make_train_step
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)

    def filling(*args, **kw):
        step = real(*args, **kw)

        def wrapped(state, batch):
            full = int(state.step) in (3, 4)  # the save after step 4 begins in the one and has ended in the other
            resource.setrlimit(resource.RLIMIT_FSIZE, (20_000 if full else soft, hard))
            return step(state, batch)

        return wrapped

    config = make(steps=8, **{"checkpoint.every": 2, "checkpoint.keep": 0, "eval.every": 0, "log_every": 8})
    config.checkpoint.update(on_failure=policy, asynchronous=False)
    try:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(pretrain, "make_train_step", filling)
            if policy == "stop":
                with pytest.raises(TrainingError, match=r"step 4 could not be written .*last whole one is of step 2"):
                    run(config, tmp_path, progress=False)
            else:
                run(config, tmp_path, progress=False)
                assert "step 4 could not be written" in capsys.readouterr().out
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    with Checkpointer(tmp_path / "checkpoints", 0, 0) as checkpoints:
        assert checkpoints.steps() == ([2] if policy == "stop" else [2, 6, 8])
