"""The comparison of answers by math-verify. It may run for ever, so it runs in a process that can be killed.

It is a module of its own, so that the second it takes to load counts in no call's deadline.
"""

import logging
from typing import Any

from math_verify import parse, verify

from qwen3f.tasks.as_latex import as_latex, without_percent

logging.getLogger("math_verify").setLevel(logging.ERROR)  # it warns of its own limits, which are switched off here


def same_mathematics(answer: str, gold: str) -> float | None:
    """1.0 if a final answer means the same as `gold`, 0.0 if not; None if gold cannot be compared.

    If one of the two is in percent, such as 10%, the other may be 10 (the answer to "how many percent?") or 0.1.
    """
    answer, answer_of_100 = without_percent(as_latex(answer))
    gold, gold_of_100 = without_percent(as_latex(gold))
    right = _parsed(gold)
    if not right:
        return None
    if _means(answer, right):
        return 1.0
    if answer_of_100 == gold_of_100:
        return 0.0
    return float(_means(_hundredth(answer), right) if answer_of_100 else _means(answer, _parsed(_hundredth(gold))))


def _parsed(gold: str) -> list[Any]:
    return parse(f"${gold}$", parsing_timeout=None, raise_on_error=True)


def _means(answer: str, right: list[Any]) -> bool:
    given = parse(f"\\boxed{{{answer}}}", parsing_timeout=None)
    return bool(given) and verify(right, given, timeout_seconds=None, raise_on_error=True)


def _hundredth(number: str) -> str:
    return rf"\frac{{{number}}}{{100}}"


same_mathematics("2x + 1", "1 + 2x")  # math-verify loads the rest of itself at its first call
