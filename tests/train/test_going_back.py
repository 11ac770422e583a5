"""A command that keeps config.resume=N goes back to step N once. When the run is past N, the key does nothing."""

import contextlib

import pytest

from qwen3f.errors import UserError
from qwen3f.train.loop import run
from qwen3f.train.step import make_train_step


class Killed(Exception):
    pass


def steps_of(config, workdir, last=None):
    """(first, last) of the steps that a run takes, or None. The run is killed after step `last`."""
    taken = []

    def recording(*args):
        step = make_train_step(*args)

        def wrapped(state, batch):
            if taken and taken[-1] == last:
                raise Killed
            taken.append(int(state.step) + 1)
            return step(state, batch)

        return wrapped

    with contextlib.suppress(Killed):
        run(config, workdir, progress=False, make_step=recording)
    return (taken[0], taken[-1]) if taken else None


@pytest.mark.parametrize("keep", [0, 1])
def test_the_same_command_goes_on(make, tmp_path, capsys, keep):
    """keep=1: when the run is past the step, its checkpoint no longer exists."""
    rare = {"checkpoint.every": 2, "checkpoint.keep": keep, "checkpoint.keep_every": 4, "eval.every": 0}
    rare["checkpoint.asynchronous"] = False
    assert steps_of(make(steps=8, **rare), tmp_path) == (1, 8)
    back = make(steps=8, **rare, resume=4)
    back.checkpoint.keep_every = 0
    assert steps_of(back, tmp_path, last=5) == (5, 5)  # killed before it has a checkpoint past step 4
    assert steps_of(back, tmp_path, last=7) == (5, 7)
    assert "has already gone back" not in capsys.readouterr().out
    assert (tmp_path / "checkpoints" / "4").exists() == (keep == 0)
    for expected in ((7, 8), None):
        assert steps_of(back, tmp_path) == expected
        assert "config.resume=4: the run has already gone back to this step" in capsys.readouterr().out
    assert sorted(p.name for p in tmp_path.glob("checkpoints.aside*")) == ["checkpoints.aside1"]
    longer = make(steps=10, **rare)
    assert steps_of(longer, tmp_path) == (9, 10)
    if keep == 0:  # a run without the key came between, so the key counts again
        assert steps_of(back, tmp_path) == (5, 8)
    else:
        with pytest.raises(UserError, match="no checkpoint of step 4: there are 8, 10"):
            steps_of(back, tmp_path)
