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


def _launched(tmp_path, config, fault):
    (path := tmp_path / "config.json").write_text(json.dumps(config.to_dict()))
    command = [sys.executable, str(SCRIPT), str(path), str(tmp_path / "w"), fault]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=300, env=environment)


def test_after_a_rank_is_killed_the_run_goes_on_from_its_last_checkpoint(make, tmp_path):
    options = {
        "checkpoint.every": 3,
        "checkpoint.asynchronous": False,
        "eval.every": 0,
        "log_every": 1,
        "batch_size": 4,
    }
    run(make(steps=7, **options), tmp_path / "alone", progress=False)
    done = _launched(tmp_path, make(steps=7, mesh="dp2", restarts=1, **options), "killed")
    assert done.returncode == 0, done.stderr
    assert "rank 1 of 2 ended with signal 9; the others were ended; starting all again (1 of 1)\n" in done.stderr
    assert "Traceback" not in done.stderr  # of the rank that lost its peer
    assert "going on from step 3" in done.stdout
    found, whole = metrics(tmp_path / "w"), metrics(tmp_path / "alone")
    assert [line["step"] for line in found] == [1, 2, 3, 4, 5, 6, 7]
    assert [line["loss"] for line in found] == pytest.approx([line["loss"] for line in whole], rel=1e-3)


def test_a_rank_that_hangs_is_shown_and_ends_the_run(make, tmp_path):
    begin = time.monotonic()
    done = _launched(tmp_path, make(steps=7, mesh="dp2", watchdog=10.0, **{"eval.every": 0}), "stuck")
    assert done.returncode == 1
    assert "rank 1 of 2 has not come through a step in 10 s; it is at lost_ranks.py:" in done.stderr
    assert "(stuck):" in done.stderr
    assert "in stuck" in done.stderr  # its stack
    assert "rank 0 of 2 has not come through a step in 10 s; it waits for other ranks, at" in done.stderr
    assert done.stderr.splitlines()[-1] == "error: rank 1 of 2 ended with exit code 1; the others were ended"
    assert time.monotonic() - begin < 120
