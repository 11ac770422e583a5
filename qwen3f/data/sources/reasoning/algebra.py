"""Algebra: linear equations in x, systems solved by elimination, determinants by cofactors."""

import math
from fractions import Fraction

from qwen3f.data.sources.random_choices import Draws
from qwen3f.data.sources.reasoning.draft import Draft, linear, operand

_VARIABLES = "xyz"

Row = list[int]  # coefficients of the unknowns, then the right-hand side


def make(draws: Draws, difficulty: int) -> Draft:
    """An equation at every difficulty; determinants from 2 (3×3 from 4); systems of 2 unknowns at 4 and of 3 at 5."""
    if difficulty >= 2 and draws.chance(1, 3):
        return _determinant(draws, 3 if difficulty >= 4 else 2, 3 * difficulty)
    if difficulty >= 4 and draws.chance(1, 2):
        return _system(draws, difficulty - 2)
    return _equation(draws, difficulty)


def _equation(draws: Draws, difficulty: int) -> Draft:
    # left: groups factor*(a*x + b), then p*x + q; right: r*x + s. The net coefficient of x is drawn, p follows.
    groups = [(draws.nonzero(-6, 6), draws.nonzero(-5, 5), draws.nonzero(-9, 9)) for _ in range(max(0, difficulty - 2))]
    inside, constant = sum(f * a for f, a, _ in groups), sum(f * b for f, _, b in groups)
    net = draws.nonzero(-9, 9)
    r = draws.nonzero(-9, 9) if difficulty >= 2 else 0
    p = net + r - inside
    q = draws.nonzero(-20, 20)
    if difficulty <= 2:
        s = net * draws.between(-12, 12) + q
    else:
        s = draws.between(-30, 30)
    products = "".join(
        f"{' + ' if f > 0 else ' - '}{abs(f)}*({linear([(a, 'x'), (b, '')])})" for f, a, b in groups
    ).removeprefix(" + ")
    left = products.replace(" - ", "-", 1) if products.startswith(" - ") else products
    for text in (linear([(p, "x")]), linear([(q, "")])):
        if text != "0":
            left = text if not left else f"{left} - {text[1:]}" if text.startswith("-") else f"{left} + {text}"
    right = linear([(r, "x"), (s, "")])
    steps = [f"{left} = {right}"]
    if groups:
        steps.append("Expand the products and add up each side:")
        steps.append(f"{linear([(p + inside, 'x'), (q + constant, '')])} = {right}")
    if r:
        steps.append(f"Subtract {linear([(r, 'x')])} from both sides:")
        steps.append(f"{linear([(net, 'x'), (q + constant, '')])} = {s}")
    total = s - q - constant
    steps.append(f"Subtract {q + constant} from both sides:")
    steps.append(f"{linear([(net, 'x')])} = {total}")
    answer = Fraction(total, net)
    if net != 1:
        steps.append(f"Divide both sides by {net}:")
        steps.append(f"x = {total} / {operand(net)} = {answer}")
    return Draft(f"Solve the equation {left} = {right} for x.", steps, answer)


def _system(draws: Draws, count: int) -> Draft:
    unknowns = _VARIABLES[:count]
    values = [draws.between(-9, 9) for _ in range(count)]
    matrix = [[0] * count] * count
    while _det(matrix) == 0:
        matrix = [[draws.between(-5, 5) for _ in range(count)] for _ in range(count)]
    rows = [[*row, sum(a * v for a, v in zip(row, values, strict=True))] for row in matrix]
    wanted = " + ".join(unknowns)
    question = f"Solve the system of equations\n{_numbered(rows, unknowns)}\nWhat is {wanted}?"

    steps: list[str] = []
    numbers = list(range(1, count + 1))  # of the rows still to be eliminated
    left, triangle, next_number = rows, [], count + 1
    for column in range(count):
        at = min((i for i, row in enumerate(left) if row[column]), key=lambda i: abs(left[i][column]))
        pivot, pivot_number = left[at], numbers[at]
        triangle.append(pivot)
        left, numbers = left[:at] + left[at + 1 :], numbers[:at] + numbers[at + 1 :]
        for i, row in enumerate(left):
            if row[column] == 0:
                continue
            shared = math.gcd(row[column], pivot[column])
            times, minus = pivot[column] // shared, row[column] // shared
            left[i] = [times * a - minus * b for a, b in zip(row, pivot, strict=True)]
            steps.append(
                f"({next_number}): take {times} times ({numbers[i]}) minus {operand(minus)} times ({pivot_number}), "
                f"which removes {unknowns[column]}:"
            )
            steps.append(_side(left[i], unknowns))
            numbers[i] = next_number
            next_number += 1
    found: dict[int, int] = {}
    steps.append("Now solve from the last equation back to the first:")
    for column in reversed(range(count)):
        row = triangle[column]
        known = [c for c in range(column + 1, count) if row[c]]
        rest = str(row[-1]) + "".join(f" - {operand(row[c])}*{operand(found[c])}" for c in known)
        found[column] = values[column]
        top = f"({rest})" if known else operand(row[-1])
        steps.append(f"{unknowns[column]} = {top} / {operand(row[column])} = {found[column]}")
    total = sum(values)
    steps.append(f"{wanted} = {' + '.join(operand(v) for v in values)} = {total}")
    return Draft(question, steps, total)


def _numbered(rows: list[Row], unknowns: str) -> str:
    return "\n".join(f"({i}) {_side(row, unknowns)}" for i, row in enumerate(rows, start=1))


def _side(row: Row, unknowns: str) -> str:
    return f"{linear(list(zip(row[:-1], unknowns, strict=True)))} = {row[-1]}"


def _determinant(draws: Draws, count: int, size: int) -> Draft:
    matrix = [[draws.between(-size, size) for _ in range(count)] for _ in range(count)]
    written = ", ".join(str(row) for row in matrix)
    question = f"Compute the determinant of the matrix [{written}]."
    if count == 2:
        return Draft(question, ["The determinant is a*d - b*c:", _det_line(matrix)], _det(matrix))
    steps = ["Expand along the first row."]
    for column in range(3):
        steps += [f"The minor without row 1 and column {column + 1}:", _det_line(_minor(matrix, column))]
    minors = [_det(_minor(matrix, column)) for column in range(3)]
    first = matrix[0]
    products = [f"{operand(a)}*{operand(m)}" for a, m in zip(first, minors, strict=True)]
    numbers = [a * m for a, m in zip(first, minors, strict=True)]
    total = _det(matrix)
    steps.append("The signs are +, -, +:")
    steps.append(f"{products[0]} - {products[1]} + {products[2]}")
    steps.append(f"= {operand(numbers[0])} - {operand(numbers[1])} + {operand(numbers[2])}")
    steps.append(f"= {total}")
    return Draft(question, steps, total)


def _minor(matrix: list[Row], column: int) -> list[Row]:
    return [row[:column] + row[column + 1 :] for row in matrix[1:]]


def _det(matrix: list[Row]) -> int:
    if len(matrix) == 1:
        return matrix[0][0]
    return sum((-1) ** c * a * _det(_minor(matrix, c)) for c, a in enumerate(matrix[0]))


def _det_line(matrix: list[Row]) -> str:
    (a, b), (c, d) = matrix
    products = f"{operand(a)}*{operand(d)} - {operand(b)}*{operand(c)}"
    return f"{products} = {operand(a * d)} - {operand(b * c)} = {a * d - b * c}"
