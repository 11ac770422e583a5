"""A batch whose step was not finite is kept in a file. If the file cannot be written, the run says so and goes on."""

import errno
import os
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from qwen3f.errors import TrainingError
from qwen3f.processes.world import ALONE
from qwen3f.train import workdir as W
from qwen3f.train.guards.kept_batch import keep_batch
from qwen3f.train.guards.nonfinite import FiniteCheck
from sharding.axes import ONE

BATCH = {"tokens": torch.arange(6).reshape(2, 3)}
BAD = {"finite": torch.tensor(False), "loss": torch.tensor(float("nan")), "grad_norm": torch.tensor(1.0)}


@pytest.mark.parametrize("full", [False, True])
def test_a_step_is_passed_over_on_a_full_disk_too(tmp_path, monkeypatch, full):
    if full:

        def fail(path, content):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))

        monkeypatch.setattr(W, "write_atomically", fail)
    said = []
    check = FiniteCheck(
        1, lambda step, batch: keep_batch(tmp_path, step, batch, ALONE, ONE, 1), said.append, lambda *args: None
    )
    check(7, BAD, BATCH, 0, 2)
    check.flush()
    [line] = said
    assert "1 of 1 such steps skipped" in line
    if full:
        assert "lost, because it could not be written ([Errno 28] No space left on device" in line
    else:
        assert f"kept in {tmp_path}/nonfinite/step-7.npz" in line
        with np.load(tmp_path / "nonfinite" / "step-7.npz") as kept:
            assert np.array_equal(kept["tokens"], BATCH["tokens"])


@pytest.mark.parametrize("skips, more", [(0, 10), (1, 2), (50, 100)])
def test_the_error_advises_more_skips_than_there_were(skips, more):
    check = FiniteCheck(skips, lambda step, batch: "kept", lambda line: None, lambda *args: None)
    for step in range(skips + 1):
        check(step, BAD, BATCH, 0, 2)
    with pytest.raises(TrainingError, match=f"--config.nonfinite_skips={more}$"):
        check.flush()


def test_more_ranks_than_a_byte_counts(tmp_path):
    alone, ranks, told = SimpleNamespace(index=0), 300, []

    def keep(rank):
        world = SimpleNamespace(size=ranks, main=rank == 0, gather_bytes=lambda content: told.append(content) or told)
        axes = type("", (dict,), {"rows": (rank, ranks)})(pp=alone, cp=alone, tp=alone)
        return keep_batch(tmp_path, 7, {"tokens": torch.full((1, 3), rank)}, world, axes, 1)

    words = [keep(rank) for rank in reversed(range(ranks))]
    assert words[0] == "kept"
    with np.load(tmp_path / "nonfinite" / "step-7.npz") as kept:
        assert np.array_equal(kept["tokens"][:, 0], np.arange(ranks))
