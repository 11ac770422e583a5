"""Plain values over a pipe: JSON in which tuples, sets, other keys than text and the like keep what they are.

Only exact built-in types travel, so no object of the code that is judged ever reaches the one that compares. Runs on
both sides of the pipe: the standard library alone, any Python from 3.8 on.
"""

from __future__ import annotations

from typing import Any

DEPTH = 50


def pack(value: Any, depth: int = DEPTH) -> Any:
    """A plain value as what json.dumps takes. Raises TypeError for any other type, subclasses included, and for values
    that are nested deeper than `depth`."""
    if depth < 0:
        raise TypeError("a value that is nested too deeply")
    kind = type(value)
    if value is None or kind in (bool, int, str):
        return value
    if kind is float:
        return value if value - value == 0 else {"f": repr(value)}
    if kind is list:
        return [pack(x, depth - 1) for x in value]
    if kind is tuple:
        return {"t": [pack(x, depth - 1) for x in value]}
    if kind in (set, frozenset):
        return {"s" if kind is set else "z": [pack(x, depth - 1) for x in value]}
    if kind is dict:
        return {"d": [[pack(k, depth - 1), pack(v, depth - 1)] for k, v in value.items()]}
    if kind is bytes:
        return {"b": value.hex()}
    if kind is complex:
        return {"c": [pack(value.real), pack(value.imag)]}
    raise TypeError(f"a value of type {kind.__name__[:100]}, which is none of the plain built-in types")


def unpack(found: Any) -> Any:
    """The inverse of pack, of what json.loads gives. Raises ValueError or TypeError for anything else."""
    if found is None or type(found) in (bool, int, float, str):
        return found
    if type(found) is list:
        return [unpack(x) for x in found]
    if type(found) is not dict or len(found) != 1:
        raise ValueError("no packed value")
    ((tag, inner),) = found.items()
    if tag == "f" and inner in ("nan", "inf", "-inf"):
        return float(inner)
    if tag == "b":
        return bytes.fromhex(inner)
    if type(inner) is not list:
        raise ValueError("no packed value")
    if tag == "d":
        return {unpack(key): unpack(value) for key, value in inner}
    make = {"t": tuple, "s": set, "z": frozenset, "c": lambda parts: complex(*parts)}.get(tag)
    if make is None:
        raise ValueError("no packed value")
    return make([unpack(x) for x in inner])
