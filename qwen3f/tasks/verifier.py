"""The comparison of answers by math-verify. It may run for ever, so it runs in a process that can be killed.

It is a module of its own, so that the second it takes to load counts in no call's deadline.
"""

import logging
import re
from typing import Any

from latex2sympy2_extended import NormalizationConfig
from math_verify import LatexExtractionConfig, parse, verify

from qwen3f.tasks.as_latex import as_latex, without_base, without_percent, without_unit

logging.getLogger("math_verify").setLevel(logging.ERROR)  # it warns of its own limits, which are switched off here

SMALL, SAME = 1e-3, 1e-5  # numbers below SMALL are equal up to this part of themselves
NOISE = 1e-90  # sympy gives some smaller number for an expression that is exactly 0
_WORD = re.compile(r"[a-z]{4,}|[A-Z][a-z]+", re.ASCII)
_HOUR = re.compile(r"\d{1,2}:00", re.ASCII)

# Nothing but LaTeX: where that cannot be read, math-verify would else take some number in it for the answer.
_READ = LatexExtractionConfig(
    normalization_config=NormalizationConfig(units=False, malformed_operators=True, nits=True, boxed="all")
)


def same_mathematics(answer: str, gold: str) -> float | None:
    """1.0 if a final answer means the same as `gold`, 0.0 if not; None if gold cannot be compared.

    If one of the two is in percent, such as 10%, the other may be 10 (the answer to "how many percent?") or 0.1. If
    both have a unit (or a base), it must be the same one; if only one has it, the question has said it.
    """
    (answer, base), (gold, right_base) = without_base(as_latex(answer)), without_base(as_latex(gold))
    if base or right_base:
        return float(answer == gold and (base == right_base or not base or not right_base))
    (answer, unit), (gold, right_unit) = without_unit(answer), without_unit(gold)
    (answer, answer_of_100), (gold, gold_of_100) = without_percent(answer), without_percent(gold)
    words = _WORD.fullmatch(gold) and _WORD.fullmatch(answer)  # no products of letters; but infinity may be \infty
    if words or _HOUR.fullmatch(gold):  # no ratio to 0
        return float(answer == gold)
    right = _parsed(gold)
    if not right:
        return None
    if unit and right_unit and unit != right_unit:
        return 0.0
    if _means(answer, right):
        return 1.0
    if answer_of_100 == gold_of_100:
        return 0.0
    return float(_means(_hundredth(answer), right) if answer_of_100 else _means(answer, _parsed(_hundredth(gold))))


def _parsed(gold: str) -> list[Any]:
    return parse(f"\\boxed{{{gold}}}", [_READ], parsing_timeout=None, raise_on_error=True)


def _means(answer: str, right: list[Any]) -> bool:
    given = parse(f"\\boxed{{{answer}}}", [_READ], parsing_timeout=None)
    means = bool(given) and verify(
        right, given, allow_set_relation_comp=True, timeout_seconds=None, raise_on_error=True
    )
    return means and not _differ(given[0], right[0])


def _differ(given: Any, right: Any) -> bool:
    """Whether these are numbers so near 0 that math-verify's six decimal places do not tell them apart."""
    try:
        a, b = float(given), float(right)
    except (TypeError, ValueError, OverflowError, AttributeError):
        return False
    a, b = (0.0 if abs(x) < NOISE else x for x in (a, b))
    return max(abs(a), abs(b)) < SMALL and abs(a - b) > SAME * abs(b)


def _hundredth(number: str) -> str:
    return rf"\frac{{{number}}}{{100}}"


same_mathematics("2x + 1", "1 + 2x")  # math-verify loads the rest of itself at its first call
