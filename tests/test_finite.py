"""Which numbers a float can hold."""

import math

import numpy as np
import pytest

from qwen3f.finite import as_finite


@pytest.mark.parametrize("value, found", [
    (1, 1.0), (-2.5, -2.5), (10**300, 1e300), (np.float32(0.5), 0.5), (np.int64(3), 3.0),
    (10**400, None), (-(10**400), None), (math.inf, None), (math.nan, None), (True, None), ("1", None), (None, None),
])  # fmt: skip
def test_a_number_is_a_float_or_none(value, found):
    assert as_finite(value) == found
