"""What of a judgement needs math-verify, and may run for ever: for a process that can be killed.

A module of its own, so that loading it, which takes a second, counts in no call's deadline.
"""

import logging

from math_verify import parse, verify

logging.getLogger("math_verify").setLevel(logging.ERROR)  # it warns of its own limits, which are switched off here


def same_mathematics(answer: str, gold: str) -> float | None:
    """1.0 if a final answer means the same as `gold`, 0.0 if not; None if gold is nothing that can be compared."""
    right = parse(f"${gold}$", parsing_timeout=None, raise_on_error=True)
    if not right:
        return None
    given = parse(f"\\boxed{{{answer}}}", parsing_timeout=None)
    return float(bool(given) and verify(right, given, timeout_seconds=None, raise_on_error=True))


same_mathematics("2x + 1", "1 + 2x")  # math-verify loads the rest when it is first asked
