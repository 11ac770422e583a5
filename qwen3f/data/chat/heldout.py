"""Which held-out rows are measured."""

import numpy as np

from qwen3f.data.loader import Indexed

_SEED = 0


def measured_rows(dataset: Indexed, most: int) -> list[int]:
    """Indices of the rows to measure, the same on all ranks: all in their order, or `most` of the shuffled ones.

    Packed rows begin with the longest documents, so the first ones would be no fair part of them.

    Args:
        dataset: packed rows.
        most: rows; 0 for all.
    """
    if not 0 < most < len(dataset):
        return list(range(len(dataset)))
    return dataset.order(np.arange(most), _SEED).tolist()
