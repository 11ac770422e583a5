"""Counter-based random numbers: a pure function of (key, index), equal on every device, mesh and torch version.

torch's generators are stateful and differ between CPU, CUDA and compiled code. Here element i of a stream is a hash of
its key and i, so a shard can draw exactly its own elements and a recomputed block draws the same dropout mask again.
The hash is the finaliser of SplitMix64 (Steele, Lea and Flood 2014, doi:10.1145/2660193.2660195).
"""

import hashlib
import math
from numbers import Integral

import torch
from torch import Tensor

from qwen3f.errors import UserError

_CHUNK = 1 << 22  # elements drawn at once: bounds the int64 temporaries to 32 MiB each


def _signed(x: int) -> int:
    return x - (1 << 64) if x >= 1 << 63 else x


_GOLDEN = _signed(0x9E3779B97F4A7C15)
_MIX_1 = _signed(0xBF58476D1CE4E5B9)
_MIX_2 = _signed(0x94D049BB133111EB)


def key(*parts: int | str) -> int:
    """A signed 64-bit key from any names and numbers, e.g. key(seed, path, layer)."""
    text = "\x1f".join(str(p) for p in parts).encode()
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "little", signed=True)


def check_seed(seed: int, name: str = "seed") -> int:
    """`seed`. Raises UserError unless it is a whole number that fits a signed 64-bit one. name: for the error."""
    if not isinstance(seed, Integral) or isinstance(seed, bool) or not -(2**63) <= seed < 2**63:
        raise UserError(f"{name} must be a whole number from -2^63 to 2^63 - 1, got {str(seed)[:40]}")
    return seed


def _shift_right(x: Tensor, n: int) -> Tensor:
    return (x >> n) & ((1 << (64 - n)) - 1)  # torch shifts int64 arithmetically; the hash needs a logical shift


def _mix(x: Tensor) -> Tensor:
    x = (x ^ _shift_right(x, 30)) * _MIX_1
    x = (x ^ _shift_right(x, 27)) * _MIX_2
    return x ^ _shift_right(x, 31)


def bits(stream: Tensor | int, index: Tensor) -> Tensor:
    """64 random bits as int64 for each element of `index` (int64); `stream` is a key or an int64 scalar tensor."""
    # & -1 changes no value. It hides from torch.compile that an index is a sum of places times strides: torch.compile
    # would multiply strides and constant at compile time, to numbers beyond 64 bits.
    return _mix((index & -1) * _GOLDEN + stream)


def fold(stream: Tensor, value: Tensor | int) -> Tensor:
    """A new stream from a stream and a number (a layer, a micro-batch), as jax.random.fold_in does."""
    return _mix(_mix(stream + _GOLDEN) + value)


def uniform(stream: Tensor | int, index: Tensor) -> Tensor:
    """float32 in [0, 1) with 24 random bits, for each element of `index`."""
    return _shift_right(bits(stream, index), 40).to(torch.float32) * 2.0**-24


def normal(stream: int, start: int, count: int, device: torch.device | str = "cpu") -> Tensor:
    """Elements start … start+count−1 of a standard normal stream, float32 [count], by the Box–Muller transform."""
    out = torch.empty(count, dtype=torch.float32, device=device)
    for lo in range(0, count, _CHUNK):
        hi = min(lo + _CHUNK, count)
        h = bits(stream, torch.arange(start + lo, start + hi, dtype=torch.int64, device=device))
        radius = ((_shift_right(h, 32).to(torch.float32) + 0.5) * 2.0**-32).log_().mul_(-2.0).sqrt_()
        angle = (h & 0xFFFFFFFF).to(torch.float32) * (2.0 * math.pi * 2.0**-32)
        torch.mul(radius, angle.cos_(), out=out[lo:hi])
    return out
