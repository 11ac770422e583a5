"""A rank that is killed, and one that hangs, in a run that launch.py's code has started on two ranks."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from qwen3f.train.loop import run
from tests.train.runs import metrics

SCRIPT = Path(__file__).with_name("lost_ranks.py")


STEPS, CHECKPOINT = 7, 3
OPTIONS = {
    "checkpoint.every": CHECKPOINT,
    "checkpoint.asynchronous": False,
    "eval.every": 0,
    "log_every": 1,
    "batch_size": 4,
}
TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "--max-restarts=1")


def _launched(tmp_path, config, fault, *mesh, by=()):
    (path := tmp_path / "config.json").write_text(json.dumps(config.to_dict()))
    command = [sys.executable, *by, str(SCRIPT), str(path), str(tmp_path / "w"), fault, *mesh]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=300, env=environment)


@pytest.fixture
def alone(make, tmp_path):
    """The losses of a run on one device without a fault."""
    run(make(steps=STEPS, **OPTIONS), tmp_path / "alone", progress=False)
    return [line["loss"] for line in metrics(tmp_path / "alone")]


def _assert_went_on(done, workdir, losses):
    assert done.returncode == 0, done.stderr
    assert f"resuming from step {CHECKPOINT}" in done.stdout
    found = metrics(workdir)
    assert [line["step"] for line in found] == list(range(1, STEPS + 1))
    assert [line["loss"] for line in found] == pytest.approx(losses, rel=1e-3)


def test_after_a_rank_is_killed_the_run_goes_on_from_its_last_checkpoint(make, tmp_path, alone):
    done = _launched(tmp_path, make(steps=STEPS, mesh="dp2", restarts=1, **OPTIONS), "killed")
    _assert_went_on(done, tmp_path / "w", alone)
    assert "rank 1 of 2 ended with signal 9; the others were ended; starting all again (1 of 1)\n" in done.stderr
    assert "Traceback" not in done.stderr  # not even from the rank that lost its peer


@pytest.mark.nightly
def test_under_torchrun_the_run_goes_on_from_its_last_checkpoint(make, tmp_path, alone):
    """torchrun's agent restarts both ranks with the store of the first ones. Here they also get another mesh."""
    done = _launched(tmp_path, make(steps=STEPS, mesh="dp2", **OPTIONS), "killed", "tp2", by=TORCHRUN)
    _assert_went_on(done, tmp_path / "w", alone)
    assert "mesh: dp2, 2 ranks" in done.stdout
    assert "mesh: tp2, 2 ranks" in done.stdout


@pytest.mark.nightly
def test_a_rank_that_hangs_is_shown_and_ends_the_run(make, tmp_path):
    begin = time.monotonic()
    done = _launched(tmp_path, make(steps=7, mesh="dp2", watchdog=10.0, **{"eval.every": 0}), "stuck")
    assert done.returncode == 1
    assert "rank 1 of 2 has not finished a step in 10 s; it is at lost_ranks.py:" in done.stderr
    assert "(stuck):" in done.stderr
    assert "in stuck" in done.stderr  # its stack
    assert "rank 0 of 2 has not finished a step in 10 s; it waits for other ranks, at" in done.stderr
    assert done.stderr.splitlines()[-1] == "error: rank 1 of 2 ended with exit code 1; the others were ended"
    assert time.monotonic() - begin < 120
