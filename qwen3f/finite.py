"""Numbers from JSON and from users, of which whole ones may be larger than any float."""

import math
import numbers


def as_finite(value: object) -> float | None:
    """The number as a float. None for NaN, infinity, one that no float can hold, and what is no number, as true is."""
    if isinstance(value, bool) or not isinstance(value, numbers.Real):  # numpy's are
        return None
    try:
        found = float(value)
    except OverflowError:
        return None
    return found if math.isfinite(found) else None
