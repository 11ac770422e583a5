"""Arithmetic: expressions over integers, reduced one operation at a time, and sums of fractions."""

import math
import operator
from fractions import Fraction

from qwen3f.data.sources.random_choices import Draws
from qwen3f.data.sources.reasoning.draft import Draft

# An expression: a number, or (operator, left, right).
Expression = int | tuple[str, "Expression", "Expression"]

_APPLY = {"+": operator.add, "-": operator.sub, "*": operator.mul, "/": operator.floordiv}  # division is always exact
_BINDING = {"+": 1, "-": 1, "*": 2, "/": 2}
_SIZES = (50, 100, 300, 1000, 3000)  # largest result by difficulty


def make(draws: Draws, difficulty: int) -> Draft:
    """An expression of `difficulty` to 2·difficulty − 1 operations, or a sum of `difficulty` fractions."""
    if difficulty >= 2 and draws.chance(1, 3):
        return _fractions(draws, difficulty)
    return _expression(draws, difficulty)


def _expression(draws: Draws, difficulty: int) -> Draft:
    size = _SIZES[difficulty - 1]
    lowest = -size // 4 if difficulty >= 4 else 1
    tree = _grow(draws, draws.between(lowest, size), draws.between(difficulty, 2 * difficulty - 1), 10 * size)
    question = f"Compute {_written(tree)}."
    steps = [_written(tree)]
    while not isinstance(tree, int):
        tree = _reduced(tree)
        steps.append(f"= {_written(tree)}")
    return Draft(question, steps, tree)


def _grow(draws: Draws, value: int, operations: int, limit: int) -> Expression:
    """An expression equal to `value` whose parts are positive: built from its value down, so divisions are exact."""
    if operations == 0:
        return value
    left = draws.between(0, operations - 1)
    right = operations - 1 - left
    factors = [f for f in range(2, 13) if value > f and value % f == 0]
    kinds = ["-"]
    if value >= 2:
        kinds.append("+")
    if factors:
        kinds += ["*", "*"]  # few values have factors: otherwise products would be rare
    if 0 < value <= limit // 9:
        kinds.append("/")
    kind = draws.choice(kinds)
    if kind == "+":
        a = draws.between(1, value - 1)
        b = value - a
    elif kind == "-":
        b = draws.between(max(1, 1 - value), max(1, 1 - value) + limit // 20)
        a = value + b
    elif kind == "*":
        a = draws.choice(factors)
        b = value // a
    else:
        b = draws.between(2, 9)
        a = value * b
    return (kind, _grow(draws, a, left, limit), _grow(draws, b, right, limit))


def _written(tree: Expression) -> str:
    """The expression with the parentheses it needs and no others."""
    if isinstance(tree, int):
        return str(tree)
    kind, left, right = tree
    left_text, right_text = _written(left), _written(right)
    if not isinstance(left, int) and _BINDING[left[0]] < _BINDING[kind]:
        left_text = f"({left_text})"
    # Operators of one rank go from the left: a - (b + c) and a / (b * c) need parentheses. So do a * (b / c) and
    # a + (b - c) to keep this very tree, which is the order of the steps.
    if not isinstance(right, int) and _BINDING[right[0]] <= _BINDING[kind]:
        right_text = f"({right_text})"
    return f"{left_text} {kind} {right_text}"


def _reduced(tree: tuple[str, Expression, Expression]) -> Expression:
    """The expression after the first operation, from the left, whose operands are numbers."""
    kind, left, right = tree
    if not isinstance(left, int):
        return (kind, _reduced(left), right)
    if not isinstance(right, int):
        return (kind, left, _reduced(right))
    return _APPLY[kind](left, right)


def _fractions(draws: Draws, difficulty: int) -> Draft:
    count = difficulty
    terms: list[tuple[str, int, int]] = []
    for i in range(count):
        bottom = draws.between(2, 5 + difficulty)
        top = draws.choice([n for n in range(1, 2 * bottom) if math.gcd(n, bottom) == 1])
        terms.append(("+" if i == 0 else draws.choice("+-"), top, bottom))
    common = math.lcm(*(bottom for _, _, bottom in terms))
    tops = [(sign, top * (common // bottom)) for sign, top, bottom in terms]
    signed = [top if sign == "+" else -top for sign, top in tops]
    question = _joined((sign, f"{top}/{bottom}") for sign, top, bottom in terms)
    steps = [f"The least common denominator is {common}."]
    steps += [
        f"{top}/{bottom} = {top} * {common // bottom} / {common} = {top * (common // bottom)}/{common}"
        for _, top, bottom in terms
    ]
    steps += [question, f"= {_joined((sign, f'{top}/{common}') for sign, top in tops)}"]
    total = signed[0]
    for i, top in enumerate(signed[1:], start=1):
        total += top
        rest = [("+", f"{total}/{common}"), *((sign, f"{top}/{common}") for sign, top in tops[i + 1 :])]
        steps.append(f"= {_joined(rest)}")
    answer = Fraction(total, common)
    if str(answer) != f"{total}/{common}":
        steps.append(f"= {answer}")
    return Draft(f"Compute {question} and write it as an integer or a fraction in lowest terms.", steps, answer)


def _joined(terms: object) -> str:
    (_, first), *rest = terms
    return first + "".join(f" {sign} {term}" for sign, term in rest)
