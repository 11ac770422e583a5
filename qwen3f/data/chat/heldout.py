"""Which held-out rows are measured."""

import numpy as np

from qwen3f.data.loader import Indexed

_SEED = 0


def measured_rows(dataset: Indexed, most: int) -> list[int]:
    """Indices of the rows to measure, the same on all ranks: all in order, or the first `most` of a shuffled order.

    Packed rows begin with the longest documents, so the first rows would be a biased sample.

    Args:
        dataset: packed rows.
        most: at most this many rows; 0: all.
    """
    if not 0 < most < len(dataset):
        return list(range(len(dataset)))
    return dataset.order(np.arange(most), _SEED).tolist()
