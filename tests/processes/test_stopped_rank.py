"""The error names the rank that a signal has stopped, not the one that gave up waiting for it."""

import os

import pytest

from qwen3f.errors import TrainingError
from qwen3f.processes.launcher import run_ranks

PROGRAM = """
import os, signal, sys, time
if os.environ["RANK"] == "1":
    os.kill(os.getpid(), signal.SIGSTOP)
time.sleep(float(sys.argv[1]))
sys.exit(1 if os.environ["RANK"] == "0" else 0)
"""


def test_the_stopped_rank_is_named(tmp_path):
    program = tmp_path / "ranks.py"
    program.write_text(PROGRAM)
    words = (
        "rank 1 of 3 is stopped, by SIGSTOP or a debugger, and the others waited for it until rank 0 ended with exit"
    )
    with pytest.raises(TrainingError, match=words):
        run_ranks([str(program), "1.5"], 3, os.environ, 0)


def test_without_one_the_first_that_failed_is_named(tmp_path):
    program = tmp_path / "ranks.py"
    program.write_text(PROGRAM.replace("SIGSTOP", "SIGCONT"))
    with pytest.raises(TrainingError, match="rank 0 of 3 ended with exit code 1; the others were ended"):
        run_ranks([str(program), "0.5"], 3, os.environ, 0)
