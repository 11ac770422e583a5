"""A stateless shuffle: which example stands at a place of the data order is a function of (place, size, seed).

Place p lies in epoch p // size. Within an epoch the order is a pseudo-random permutation of range(size), computed one
element at a time: a Feistel network permutes [0, 4^h) for any round function, and values that fall outside range(size)
are sent through it again until they fall inside ("cycle walking", Black and Rogaway 2002), fewer than 4 passes on
average. So a run resumes at any place, on any number of ranks, without a stored permutation or generator state.
"""

from typing import overload

import numpy as np

_ROUNDS = 8
_MASK = 2**64 - 1


@overload
def example_index(position: int, size: int, seed: int) -> int: ...
@overload
def example_index(position: np.ndarray, size: int, seed: int) -> np.ndarray: ...


def example_index(position: int | np.ndarray, size: int, seed: int) -> int | np.ndarray:
    """The example at `position` of the shuffled, endless order over `size` examples.

    Args:
        position: place(s) in the order, from 0; an int, or an integer array of any shape.
        size: number of examples; each epoch of `size` places visits every example once, in an order of its own.
        seed: any integer; other seeds give other orders.

    Returns:
        Index in [0, size): an int for an int, an int64 array of the same shape for an array.

    Raises:
        ValueError: `size` < 1 or a negative position.
    """
    if size < 1:
        raise ValueError(f"size is {size}: there must be at least one example")
    places = np.asarray(position)
    if places.size and places.min() < 0:
        raise ValueError(f"position {places.min()} is negative")
    epochs, values = np.divmod(places.reshape(-1).astype(np.uint64), np.uint64(size))
    half_bits = max(1, ((size - 1).bit_length() + 1) // 2)  # 4^half_bits >= size
    keys = _mix(epochs ^ _mix(np.array(seed & _MASK, np.uint64)))
    values = _feistel(values, keys, half_bits)
    outside = np.flatnonzero(values >= size)
    while outside.size:
        values[outside] = _feistel(values[outside], keys[outside], half_bits)
        outside = outside[values[outside] >= size]
    indices = values.astype(np.int64).reshape(places.shape)
    return indices if isinstance(position, np.ndarray) else int(indices)


def _feistel(values: np.ndarray, keys: np.ndarray, half_bits: int) -> np.ndarray:
    """A permutation of [0, 4^half_bits) for each key; uint64 [n], uint64 [n] -> uint64 [n]."""
    shift, mask = np.uint64(half_bits), np.uint64(2**half_bits - 1)
    left, right = values >> shift, values & mask
    for number in range(_ROUNDS):
        # The round's number enters the key, and the top bits of the mix are used: its low bits are the weaker ones.
        scrambled = _mix(right ^ _mix(keys + np.uint64(number)))
        left, right = right, left ^ (scrambled >> np.uint64(64 - half_bits))
    return (left << shift) | right


def _mix(values: np.ndarray) -> np.ndarray:
    """A 64-bit integer hash (the finaliser of SplitMix64, Steele et al. 2014); uint64 in and out, modulo 2^64."""
    with np.errstate(over="ignore"):
        values = values + np.uint64(0x9E3779B97F4A7C15)
        values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return values ^ (values >> np.uint64(31))
