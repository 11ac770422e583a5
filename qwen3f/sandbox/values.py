"""Plain values over a pipe: JSON that keeps tuples, sets, keys that are no strings, and the like.

Only exact built-in types are sent, so no object of the judged code reaches the process that compares. A Counter is sent
as its dict, a named tuple as its tuple; their own methods are not called. It runs on both sides of the pipe, needs only
the standard library, and runs on any Python from 3.8 on.
"""

from __future__ import annotations

from collections import Counter
from typing import Any

DEPTH = 50
COLLISIONS = 125_000  # pairs of a message's keys that share a hash within a set: making the set compares each
_TYPES = (bool, str, int, float, list, tuple, set, frozenset, dict, bytes, complex)
_LARGE = 1 << 64  # from here on an integer travels as hex, which no limit of decimal digits holds for


def pack(value: Any, depth: int = DEPTH) -> Any:
    """A plain value in a form that json.dumps takes; a subclass is packed as its built-in type. Raises TypeError for
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
    """The inverse of pack, for what json.loads gives. Raises ValueError or TypeError for anything else, for values
    nested deeper than DEPTH, and for sets and dicts with many keys of the same hash: these could take minutes to
    make."""
    return _Message().unpack(found, DEPTH)


class _Message:
    """Unpacks one message, and counts the pairs of keys that share a hash within their set or dict."""

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
