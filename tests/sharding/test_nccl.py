"""Every mesh of 2, 4 and 8 GPUs over NCCL equals one GPU; the cases and their tolerances are in nccl_cases.py."""

import pytest
import torch

from tests.sharding.nccl_cases import run


@pytest.mark.gpu
@pytest.mark.parametrize("gpus", [2, 4, 8])
def test_a_mesh_of_gpus_equals_one(gpus):
    if torch.cuda.device_count() < gpus:
        pytest.skip(f"needs {gpus} GPUs")
    unequal = run(gpus, "cuda")
    assert not unequal, "\n".join(unequal)
