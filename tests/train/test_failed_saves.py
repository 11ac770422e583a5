"""With config.checkpoint.on_failure=go_on, a save that failed does not count as saved, however the run ends."""

import errno
import os
import shutil
import signal

import pytest

from qwen3f.checkpoint import manifest
from qwen3f.checkpoint.checkpointer import Checkpointer
from qwen3f.errors import TrainingError, UserError
from qwen3f.train.feed import Feed
from qwen3f.train.loop import run
from qwen3f.train.step import make_train_step


def configured(make, steps=6, asynchronous=True, on_failure="go_on", keep=0):
    config = make(steps=steps, **{"checkpoint.every": 2, "checkpoint.keep": keep, "eval.every": 0})
    config.checkpoint.update(on_failure=on_failure, asynchronous=asynchronous)
    return config


def signalled_in(step):
    def make_step(*args):
        real = make_train_step(*args)

        def wrapped(state, batch):
            if int(state.step) == step - 1:
                os.kill(os.getpid(), signal.SIGTERM)
            return real(state, batch)

        return wrapped

    return make_step


def steps_in(workdir):
    with Checkpointer(workdir / "checkpoints", 0, 0) as checkpoints:
        return checkpoints.steps()


@pytest.fixture
def full_once(monkeypatch):
    """The first checkpoint fails at the end of its write, at the manifest."""
    real, calls = manifest.write, []

    def write(*args):
        calls.append(None)
        if len(calls) == 1:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return real(*args)

    monkeypatch.setattr(manifest, "write", write)


@pytest.fixture
def undeletable(monkeypatch):
    def denied(path, ignore_errors=False, **kw):
        if not ignore_errors:
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))

    monkeypatch.setattr(shutil, "rmtree", denied)


@pytest.mark.parametrize("asynchronous", [True, False])
def test_a_signal_at_a_save_that_fails_ends_with_a_checkpoint(make, tmp_path, capsys, full_once, asynchronous):
    run(configured(make, asynchronous=asynchronous), tmp_path, progress=False, make_step=signalled_in(2))
    said = capsys.readouterr().out
    assert "step 2 could not be written" in said
    assert "SIGTERM: stopped after step 2" in said
    assert steps_in(tmp_path) == [2]


def test_by_the_policy_stop_the_run_ends_with_the_failure(make, tmp_path, capsys, full_once):
    with pytest.raises(TrainingError, match="step 2 could not be written"):
        run(configured(make, on_failure="stop"), tmp_path, progress=False, make_step=signalled_in(2))
    assert steps_in(tmp_path) == []


@pytest.mark.parametrize("asynchronous", [True, False])
@pytest.mark.parametrize("ending", ["signal", "last step"])
def test_an_old_checkpoint_that_stays_does_not_end_the_run(make, tmp_path, capsys, undeletable, ending, asynchronous):
    """The new checkpoint is complete, so the run does not save it again; a second save would be refused."""
    config = configured(make, 6 if ending == "signal" else 4, asynchronous, keep=1)
    make_step = signalled_in(4) if ending == "signal" else make_train_step
    run(config, tmp_path, progress=False, make_step=make_step)
    said = capsys.readouterr().out
    assert said.count("the checkpoint of step 4 is written, but") == 1
    assert ("SIGTERM: stopped after step 4" in said) == (ending == "signal")
    assert steps_in(tmp_path) == [4]


@pytest.mark.parametrize("end", [2, 3])
def test_where_the_data_ends_a_failed_save_is_made_up_for(make, tmp_path, capsys, monkeypatch, full_once, end):
    """The run ends with the error of the data, as it would without the failed save."""
    real = Feed.next

    def ending(self, state):
        if int(state.step) == end:
            raise UserError("the data ends here")
        return real(self, state)

    monkeypatch.setattr(Feed, "next", ending)
    with pytest.raises(UserError, match="the data ends here"):
        run(configured(make), tmp_path, progress=False)
    assert "step 2 could not be written" in capsys.readouterr().out
    assert steps_in(tmp_path) == [end]
