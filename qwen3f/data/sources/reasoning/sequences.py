"""Sequences: polynomials continued by their differences, and recurrences."""

import math

from qwen3f.data.sources.random_choices import Draws
from qwen3f.data.sources.reasoning.draft import Draft, linear, operand


def make(draws: Draws, difficulty: int) -> Draft:
    """Polynomials of degree 1 to 4; recurrences of order 1 (to difficulty 2) and 2, `difficulty` + 1 terms further."""
    return draws.choice((_polynomial, _recurrence))(draws, difficulty)


def _polynomial(draws: Draws, difficulty: int) -> Draft:
    """The degree is told, so one polynomial fits and the answer is the only one."""
    degree, ahead = ((1, 1), (2, 1), (2, 2), (3, 2), (4, 2))[difficulty - 1]
    # By Newton's forward formula: value n is the sum of differences[j] * C(n, j), an integer.
    differences = [draws.between(-20, 30), *(draws.between(-9, 12) for _ in range(degree - 1)), draws.nonzero(-5, 6)]
    shown = degree + 2
    values = [sum(d * math.comb(n, j) for j, d in enumerate(differences)) for n in range(shown)]
    places = ", ".join(str(n) for n in range(1, shown + 1))
    question = (
        f"A polynomial of degree {degree} has the values {', '.join(map(str, values))} at {places}. "
        f"What is its value at {shown + ahead}?"
    )
    rows = [values]
    steps = []
    for order in range(1, degree + 1):
        rows.append([b - a for a, b in zip(rows[-1], rows[-1][1:])])
        steps.append(f"Differences of order {order}: {', '.join(map(str, rows[-1]))}.")
    steps.append(f"Those of order {degree} stay the same, so go on from there:")
    ends = [row[-1] for row in rows]
    for n in range(shown + 1, shown + ahead + 1):
        for order in reversed(range(degree)):
            steps.append(f"{operand(ends[order])} + {operand(ends[order + 1])} = {ends[order] + ends[order + 1]}")
            ends[order] += ends[order + 1]
        steps.append(f"The value at {n} is {ends[0]}.")
    return Draft(question, steps, ends[0])


def _recurrence(draws: Draws, difficulty: int) -> Draft:
    order = 1 if difficulty <= 2 else 2
    factors = [draws.nonzero(-3, 4) for _ in range(order)]
    constant = draws.between(-9, 9)
    terms = [draws.between(-9, 9) for _ in range(order)]
    last = order + difficulty + 1
    starts = " and ".join(f"a({i}) = {term}" for i, term in enumerate(terms, start=1))
    rule = linear([*((f, f"a(n-{i})") for i, f in enumerate(factors, start=1)), (constant, "")])
    question = f"A sequence begins with {starts}, and a(n) = {rule} for n > {order}. What is a({last})?"
    steps = []
    for n in range(order + 1, last + 1):
        products = [f"{operand(f)}*{operand(terms[-i])}" for i, f in enumerate(factors, start=1)]
        if constant:
            products.append(operand(constant))
        value = sum(f * terms[-i] for i, f in enumerate(factors, start=1)) + constant
        steps.append(f"a({n}) = {' + '.join(products)} = {value}")
        terms.append(value)
    return Draft(question, steps, terms[-1])
