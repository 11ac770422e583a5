"""Plain values over a pipe: JSON in which tuples, sets, other keys than text and the like keep what they are.

Only exact built-in types travel, so no object of the code that is judged ever reaches the one that compares: of a
Counter its dict, of a named tuple its tuple, whatever their methods say. Runs on both sides of the pipe: the standard
library alone, any Python from 3.8 on.
"""

from __future__ import annotations

from collections import Counter
from typing import Any

DEPTH = 50
COLLISIONS = 125_000  # pairs of a message's keys that share a hash within a set: making the set compares each
_TYPES = (bool, str, int, float, list, tuple, set, frozenset, dict, bytes, complex)
_LARGE = 1 << 64  # from here on an integer travels as hex, which no limit of decimal digits holds for


def pack(value: Any, depth: int = DEPTH) -> Any:
    """A plain value as what json.dumps takes; of a subclass what it holds as the built-in type. Raises TypeError for
    any other type, and for values that are nested deeper than `depth`."""
    if depth < 0:
        raise TypeError("a value that is nested too deeply")
    kind = next((base for base in type(value).__mro__ if base in _TYPES), type(value))
    if value is None or kind is bool:
        return value
    if kind is str:
        return str.__str__(value)
    if kind is int:
        value = int.__int__(value)
        return value if -_LARGE < value < _LARGE else {"i": hex(value)}
    if kind is float:
        value = float.__float__(value)
        return value if value - value == 0 else {"f": repr(value)}
    if kind is list:
        return [pack(x, depth - 1) for x in list.__iter__(value)]
    if kind is tuple:
        return {"t": [pack(x, depth - 1) for x in tuple.__iter__(value)]}
    if kind in (set, frozenset):
        return {"s" if kind is set else "z": [pack(x, depth - 1) for x in kind.__iter__(value)]}
    if kind is dict:
        return {"d": [[pack(k, depth - 1), pack(v, depth - 1)] for k, v in dict.items(value)]}
    if kind is bytes:
        return {"b": bytes.hex(value)}
    if kind is complex:
        return {"c": [pack(value.real), pack(value.imag)]}
    raise TypeError(f"a value of type {kind.__name__[:100]}, which is none of the plain built-in types")


def unpack(found: Any) -> Any:
    """The inverse of pack, of what json.loads gives. Raises ValueError or TypeError for anything else, for values that
    are nested deeper than DEPTH, and for sets and dicts whose keys share hashes: made so, they take minutes."""
    return _Message().unpack(found, DEPTH)


class _Message:
    """One of them, with how many pairs of its keys share a hash within their set."""

    def __init__(self) -> None:
        self._shared = 0

    def unpack(self, found: Any, depth: int) -> Any:
        if depth < 0:
            raise ValueError("a value that is nested too deeply")
        if found is None or type(found) in (bool, int, float, str):
            return found
        if type(found) is list:
            return [self.unpack(x, depth - 1) for x in found]
        if type(found) is not dict or len(found) != 1:
            raise ValueError("no packed value")
        ((tag, inner),) = found.items()
        if tag == "f" and inner in ("nan", "inf", "-inf"):
            return float(inner)
        if tag == "i":
            return int(inner, 16)
        if tag == "b":
            return bytes.fromhex(inner)
        if type(inner) is not list:
            raise ValueError("no packed value")
        if tag == "d":
            keys = self._keys([self.unpack(key, depth - 1) for key, _ in inner])
            return dict(zip(keys, [self.unpack(value, depth - 1) for _, value in inner]))
        if tag == "c":
            return self._complex(inner)
        parts = [self.unpack(x, depth - 1) for x in inner]
        if tag == "t":
            return tuple(parts)
        if tag in ("s", "z"):
            return (set if tag == "s" else frozenset)(self._keys(parts))
        raise ValueError("no packed value")

    def _complex(self, inner: list[Any]) -> complex:
        parts = [self.unpack(x, 0) for x in inner]
        if [type(x) for x in parts] != [float, float]:
            raise ValueError("no packed value")
        return complex(*parts)

    def _keys(self, keys: list[Any]) -> list[Any]:
        self._shared += sum(count * (count - 1) // 2 for count in Counter(map(hash, keys)).values())
        if self._shared > COLLISIONS:
            raise ValueError("a set or dict whose keys share their hashes")
        return keys
