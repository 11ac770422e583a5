"""What the kernels' tests on a GPU have in common."""

import pytest
import torch

DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def in_dtypes(cases):
    """(*case, dtype) of all: bfloat16 of every case and every dtype of the first, the rest at night.

    To compile a kernel for another dtype takes longer than to run it.
    """
    return [
        pytest.param(*case, dtype, marks=() if dtype == torch.bfloat16 or case is cases[0] else pytest.mark.nightly)
        for case in cases
        for dtype in DTYPES
    ]
