"""The training loop on four ranks: it learns what one device learns, and what happens to one rank happens to all."""

import os
import shutil
import signal
from pathlib import Path

import numpy as np
import pytest
from ml_collections import ConfigDict

from qwen3f.data import loader
from qwen3f.errors import UserError
from qwen3f.processes.world import open_world
from qwen3f.train import loop
from qwen3f.train.readings import number
from qwen3f.train.step import make_train_step
from sharding.mesh import parse_mesh
from tests.sharding.worlds import run_processes
from tests.train.runs import assert_same_bits, final_state, metrics

RANKS = 4


class Story:
    """The runs of one rank, each in a directory of its own below `folder`."""

    def __init__(self, rank, config, folder):
        self.rank, self.config, self.folder = rank, config, folder

    def train(self, workdir, mesh="dp2,tp2", before=None, after=None, **changes):
        """Train on a mesh; before(step, batch) -> what the step gets, after(step, metrics) -> what it gives instead."""
        config = ConfigDict(self.config)
        config.update_from_flattened_dict({"mesh": mesh, **changes})

        def watched(*args):
            step = make_train_step(*args)

            def wrapped(state, batch):
                at = number(state.step) + 1
                new, found = step(state, before(at, batch) if before else batch)
                return new, after(at, found) if after else found

            return wrapped

        world = open_world(parse_mesh(mesh), "cpu", self.rank)
        return loop.run(config, self.folder / workdir, False, world, make_step=watched)


def signal_to_one(story):
    def before(step, batch):
        if step == 5 and story.rank == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        return batch

    story.train("stopped", before=before)
    if story.rank == 0:
        shutil.copytree(story.folder / "stopped", story.folder / "moved")
    story.train("stopped")
    story.train("moved", "pp2,dp2")


def infinity_on_one(story):
    def before(step, batch):
        bad = step == 3 and story.rank == 1
        return batch | {"loss_weights": batch["loss_weights"] * float("nan")} if bad else batch

    story.train("infinite", before=before, nonfinite_skips=1)


def spike(story):
    """A loss ten times as high, at step 5 of the first pass."""
    seen = []

    def after(step, found):
        seen.append(step)
        return found | {"loss": found["loss"] * (10 if step == 5 and seen.count(5) == 1 else 1)}

    options = {"spike.threshold": 10.0, "spike.window": 3, "checkpoint.every": 2, "checkpoint.asynchronous": False}
    story.train("spike", after=after, **options)
    return seen


def bad_data_on_one(story):
    calls, real = [], loader._stacked

    def stacked(*args):
        calls.append(1)
        if story.rank == 3 and len(calls) == 4:
            raise UserError("the data is bad")
        return real(*args)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loader, "_stacked", stacked)
        with pytest.raises(UserError, match="^the data is bad$"):
            story.train("bad")


def runs(rank, config, folder):
    story = Story(rank, config, Path(folder))
    straight = story.train("straight")
    signal_to_one(story)
    infinity_on_one(story)
    bad_data_on_one(story)
    return straight, spike(story)


def test_four_ranks(make, tmp_path):
    config = make(steps=6, **{"checkpoint.every": 4, "eval.every": 5, "log_every": 1, "microbatches": 2})
    alone = loop.run(config, tmp_path / "alone", progress=False)
    told = run_processes(runs, RANKS, config.to_dict(), str(tmp_path))
    whole = metrics(tmp_path / "alone")

    def learned(workdir):
        return [[line[key] for key in ("loss", "grad_norm", "tokens_seen")] for line in metrics(tmp_path / workdir)]

    # float32 sums in another order; and AdamW's first steps follow the sign of a gradient, even of a tiny one
    close = pytest.approx
    for result, _ in told:
        assert result == {key: close(value, rel=1e-3) for key, value in alone.items()}
    for workdir in ("straight", "stopped", "moved"):
        assert learned(workdir) == [close(line, rel=1e-3) for line in learned("alone")], workdir
    assert [line["step"] for line in whole] == [1, 2, 3, 4, 5, 6]

    def saved(workdir):
        return sorted(int(path.name) for path in (tmp_path / workdir / "checkpoints").iterdir())

    straight = final_state(config, tmp_path / "straight", 6)
    assert saved("straight") == [4, 6]
    assert saved("stopped") == [5, 6]
    assert saved("moved") == [5, 6]
    assert_same_bits(straight, final_state(config, tmp_path / "stopped", 6))
    assert int(straight.position) == 24

    assert [line["finite" if "finite" in line else "loss"] for line in metrics(tmp_path / "infinite")][2] is None
    (kept,) = (tmp_path / "infinite" / "nonfinite").iterdir()
    with np.load(kept) as batch:
        assert kept.name == "step-3.npz"
        assert batch["index"].tolist() == [8, 9, 10, 11]  # all ranks' rows
        assert np.isfinite(batch["loss_weights"]).all()  # as the data has them

    assert saved("bad") == [3]
    # on from the checkpoint of step 4, without the examples of step 5
    assert {tuple(seen) for _, seen in told} == {(1, 2, 3, 4, 5, 5, 6)}
    assert int(final_state(config, tmp_path / "spike", 6).position) == 28
