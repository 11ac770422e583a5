"""Digits: sorting numbers, long addition and long multiplication, written out column by column.

Numbers to compute with are written with blanks between their digits, since a model has to read single digits. The
working can be made from the question alone (`working`). Each kind and difficulty has more than 10⁶ questions.
"""

import re

from qwen3f.data.sources.random_choices import Draws
from qwen3f.data.sources.reasoning.draft import Draft

_SORTING = re.compile(r"Sort the numbers (\d+(?: \d+)+), the smallest first\.")
_ADDITION = re.compile(r"Add ((?:\d )+\d) and ((?:\d )+\d)\.")
_MULTIPLICATION = re.compile(r"Multiply ((?:\d )+\d) by (\d)\.")


def make_sorting(draws: Draws, difficulty: int) -> Draft:
    """5 to 9 numbers below 100."""
    numbers = [draws.between(10, 99) for _ in range(4 + difficulty)]
    return _draft(f"Sort the numbers {' '.join(map(str, numbers))}, the smallest first.")


def make_addition(draws: Draws, difficulty: int) -> Draft:
    """Two numbers of 4 to 8 digits."""
    first, second = (_spaced(_of_digits(draws, 3 + difficulty)) for _ in range(2))
    return _draft(f"Add {first} and {second}.")


def make_multiplication(draws: Draws, difficulty: int) -> Draft:
    """A number of 6 to 10 digits, multiplied by a number of one digit."""
    return _draft(f"Multiply {_spaced(_of_digits(draws, 5 + difficulty))} by {draws.between(2, 9)}.")


def working(question: str) -> list[str] | None:
    """The lines of the derivation; the last one ends with ": " and the answer. None for a text that is no question of
    these kinds."""
    if found := _SORTING.fullmatch(question):
        return _sorted_out(found[1].split())
    if found := _ADDITION.fullmatch(question):
        return _added(found[1].split(), found[2].split())
    if found := _MULTIPLICATION.fullmatch(question):
        return _multiplied(found[1].split(), int(found[2]))
    return None


def _draft(question: str) -> Draft:
    lines = working(question)
    return Draft(question, lines, lines[-1].partition(": ")[2])


def _sorted_out(numbers: list[str]) -> list[str]:
    """In each line the least number that is left, and the others; in the last line all numbers, sorted."""
    left, done, lines = list(numbers), [], []
    while left:
        least = min(left, key=int)
        left.remove(least)
        done.append(least)
        lines.append(f"{least}, left {' '.join(left)}" if left else f"sorted: {' '.join(done)}")
    return lines


def _added(first: list[str], second: list[str]) -> list[str]:
    """Columns from the right, as "7 + 8 + 1 gives 1 6": the carry, then the digit."""
    carry, digits, lines = 0, [], []
    for a, b in zip(reversed(first), reversed(second), strict=True):
        total = int(a) + int(b) + carry
        lines.append(f"{a} + {b} + {carry} gives {total // 10} {total % 10}")
        carry = total // 10
        digits.append(str(total % 10))
    return [*lines, f"sum: {' '.join(_read(digits, carry))}"]


def _multiplied(digits: list[str], by: int) -> list[str]:
    """Columns from the right, as "7 * 8 + 4 gives 6 0": the carry, then the digit."""
    carry, found, lines = 0, [], []
    for digit in reversed(digits):
        total = int(digit) * by + carry
        lines.append(f"{digit} * {by} + {carry} gives {total // 10} {total % 10}")
        carry = total // 10
        found.append(str(total % 10))
    return [*lines, f"product: {' '.join(_read(found, carry))}"]


def _read(digits: list[str], carry: int) -> list[str]:
    """The number's digits from the left: the last carry if it is not 0, then `digits` (from the right) reversed."""
    return [*([str(carry)] if carry else []), *reversed(digits)]


def _of_digits(draws: Draws, count: int) -> int:
    return draws.between(10 ** (count - 1), 10**count - 1)


def _spaced(number: int) -> str:
    return " ".join(str(number))
