"""Numbers from JSON and from users: integers may be larger than any float."""

import math
import numbers


def as_finite(value: object) -> float | None:
    """The number as a float. None for NaN, infinity, numbers beyond float, and other values, booleans included."""
    if isinstance(value, bool) or not isinstance(value, numbers.Real):  # numpy's numbers are numbers.Real too
        return None
    try:
        found = float(value)
    except OverflowError:
        return None
    return found if math.isfinite(found) else None
