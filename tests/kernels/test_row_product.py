"""The launches of decoding's products follow from shapes alone and fit the card's limits."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kernels import row_product

SHARED_BYTES = 227 << 10  # of shared memory, which one program may have on an H100


@given(B=st.integers(1, 1024), N=st.integers(1, 300_000), D=st.integers(1, 30_000))
def test_every_launch_is_possible(B, N, D):
    cut = row_product.config(B, N, D)
    assert cut.outputs == row_product.config(B, N, 0).outputs
    for size in (cut.rows, cut.outputs, cut.step):
        assert size & (size - 1) == 0
    assert cut.rows == 1 or min(cut.rows, cut.outputs, cut.step) >= 16
    assert cut.stages * (cut.rows + cut.outputs) * cut.step * 2 <= SHARED_BYTES


@pytest.mark.parametrize("N", [1024, 2048, 4096, 6144, 24576])
def test_one_row_fills_the_card(N):
    """Two programs or more on each of 132 multiprocessors, or else the narrowest tiles."""
    outputs = row_product.config(1, N, 1024).outputs
    assert N // outputs >= 264 or outputs == 4
