"""Every mesh of 2, 4 and 8 GPUs over NCCL equals one GPU; the cases and their tolerances are in nccl_cases.py."""

import contextlib
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT, SECONDS = Path(__file__).parents[2], 1500


@pytest.mark.gpu
@pytest.mark.nightly
@pytest.mark.timeout(SECONDS + 60)
@pytest.mark.parametrize("gpus", [2, 4, 8])
def test_a_mesh_of_gpus_equals_one(gpus):
    if torch.cuda.device_count() < gpus:
        pytest.skip(f"needs {gpus} GPUs")
    command = [sys.executable, "-m", "tests.sharding.nccl_cases", str(gpus)]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True, start_new_session=True)
    try:
        said, _ = process.communicate(timeout=SECONDS)
    finally:
        with contextlib.suppress(ProcessLookupError):  # ranks that hang would keep their GPUs
            os.killpg(process.pid, signal.SIGKILL)
    assert process.returncode == 0, said
