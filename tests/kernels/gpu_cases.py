"""What the kernels' tests on a GPU have in common."""

import pytest
import torch

DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def in_dtypes(cases):
    """Parameters (*case, dtype): a push runs every case in bfloat16 and the first in all dtypes, the night the rest.

    Compiling a kernel for another dtype takes longer than running it.
    """
    return [
        pytest.param(*case, dtype, marks=() if dtype == torch.bfloat16 or case is cases[0] else pytest.mark.nightly)
        for case in cases
        for dtype in DTYPES
    ]
