"""Solves a question from its text alone, by other methods than the generator; shares no code with it."""

import itertools
import math
import re
from collections.abc import Callable
from fractions import Fraction

import sympy

from tests.data.sources.reasoning.checker import truth, value

Solution = tuple[str, dict]  # the answer, and the names that the steps may use


def solve(question: str) -> Solution:
    """The answer and the values of unknowns. Fails if no pattern matches or the question has not exactly one answer."""
    for pattern, solver in _SOLVERS.items():
        match = re.fullmatch(pattern, question, re.DOTALL)
        if match:
            answer, names = solver(*match.groups())
            return str(answer), names
    raise AssertionError(f"no solver for {question!r}")


def _equation(equation: str) -> tuple[Fraction, dict]:
    left, right = equation.split(" = ")
    at = [value(left, {"x": Fraction(x)}) - value(right, {"x": Fraction(x)}) for x in (0, 1, 2)]
    assert at[2] - at[1] == at[1] - at[0] != 0  # linear, one solution
    x = -at[0] / (at[1] - at[0])
    return x, {"x": x}


def _system(equations: str, wanted: str) -> tuple[Fraction, dict]:
    names = wanted.split(" + ")
    rows, right = [], []
    for line in equations.split("\n"):
        left, constant = line.partition(") ")[2].split(" = ")
        rows.append([value(left, {n: Fraction(n == one) for n in names}) for one in names])
        right.append(value(constant))
    solved = sympy.Matrix(rows).LUsolve(sympy.Matrix(right))  # raises if singular
    found = {name: Fraction(int(v.p), int(v.q)) for name, v in zip(names, solved, strict=True)}
    return sum(found.values()), found


def _determinant(matrix: str) -> tuple[int, dict]:
    return int(sympy.Matrix(sympy.sympify(matrix)).det()), {}


def _power(base: str, exponent: str, modulus: str) -> tuple[int, dict]:
    return pow(int(base), int(exponent), int(modulus)), {}


def _congruence(a: str, b: str, m: str) -> tuple[int, dict]:
    return next(x for x in range(int(m)) if int(a) * x % int(m) == int(b)), {}


def _ordering(clues: str, rank: str | None, kind: str, people: str) -> tuple[str, dict]:
    names = re.split(", | and ", people)
    facts = []
    for first, relation, second in re.findall(r"(\w+) is (\w+) than (\w+)\.", clues):
        more = relation in ("taller", "older", "faster", "stronger", "richer", "happier", "louder")
        assert relation.removesuffix("er") == kind.removesuffix("est") or not more
        facts.append((first, second) if more else (second, first))
    fitting = [
        order
        for order in itertools.permutations(names)
        if all(order.index(more) < order.index(less) for more, less in facts)
    ]
    assert len(fitting) == 1
    ordinals = ["second", "third", "fourth", "fifth", "sixth", "seventh"]
    return fitting[0][ordinals.index(rank) + 1 if rank else 0], {}


def says(text: str, case: dict[str, bool]) -> bool:
    """Whether a statement of the knights and knaves is true in a case."""
    if match := re.fullmatch(r"(\w+) is a (knight|knave)\.", text):
        return case[match[1]] == (match[2] == "knight")
    if match := re.fullmatch(r"The number of knights among us is (\d)\.", text):
        return sum(case.values()) == int(match[1])
    pair = [case[name] for name in case if re.search(rf"\b{name}\b", text)]
    assert len(pair) == 2
    return {
        "are of the same kind": pair[0] is pair[1],
        "At least one": not all(pair),
        "Exactly one": sum(pair) == 1,
    }[re.search("are of the same kind|At least one|Exactly one", text)[0]]


def _knights(statements: str, asked: str) -> tuple[object, dict]:
    said = dict(re.findall(r'(\w+) says: "(.*?)"', statements))
    cases = [dict(zip(said, roles)) for roles in itertools.product((True, False), repeat=len(said))]
    possible = [case for case in cases if all(says(text, case) == case[name] for name, text in said.items())]
    assert len(possible) == 1
    if asked == "How many of them are knights":
        return sum(possible[0].values()), {}
    name = re.fullmatch(r"Is (\w+) a knight or a knave", asked)[1]
    return "knight" if possible[0][name] else "knave", {}


def _formula(facts: str, formula: str) -> tuple[str, dict]:
    for name, word in re.findall(r"\b([P-U]) is (true|false)", facts):
        formula = re.sub(rf"\b{name}\b", word, formula)
    return str(truth(formula)).lower(), {}


def _events(first: str, have: str, things: str, story: str) -> tuple[int, dict]:
    now = Fraction(have)
    effects: dict[str, Callable[[Fraction, list[int]], Fraction]] = {
        rf"{first} buys (\d+) \w+ with (\d+) {things} each": lambda n, v: n + v[0] * v[1],
        rf"\w+ gives {first} (\d+) {things}": lambda n, v: n + v[0],
        rf"{first} then finds as many {things} as {first} already has": lambda n, v: 2 * n,
        rf"{first} gives (\d+) {things} to \w+": lambda n, v: n - v[0],
        rf"{first} puts all {things} into (\d+) boxes, the same number into each, and keeps one box": lambda n, v: (
            n / v[0]
        ),
    }
    for sentence in story.strip().removesuffix(".").split(". "):
        (effect, match), *more = [(e, m) for p, e in effects.items() if (m := re.fullmatch(p, sentence))]
        assert not more
        now = effect(now, [int(group) for group in match.groups()])
        assert now > 0
        assert now.denominator == 1
    return int(now), {}


def _shopping(goods: str, percent: str | None, note: str) -> tuple[Fraction, dict]:
    total = sum(int(n) * int(price) for n, price in re.findall(r"(\d+) \w+ at (\d+) euros", goods))
    left = int(note) - total * (1 - Fraction(percent or 0) / 100)
    assert left > 0
    return left, {}


def _journey(legs: str) -> tuple[Fraction, dict]:
    pairs = [(int(h), int(v)) for h, v in re.findall(r"(\d+) hours? at (\d+) km/h", legs)]
    return Fraction(sum(h * v for h, v in pairs), sum(h for h, _ in pairs)), {}


def _pumps(pumps: str) -> tuple[Fraction, dict]:
    return 1 / sum(Fraction(1, int(h)) for h in re.findall(r"alone in (\d+) hours", pumps)), {}


def _polynomial(degree: str, values: str, places: str, at: str) -> tuple[Fraction, dict]:
    x = [int(place) for place in places.split(", ")]
    y = [int(v) for v in values.split(", ")]
    symbol = sympy.Symbol("x")
    found = sympy.Poly(sympy.interpolate(list(zip(x, y, strict=True)), symbol), symbol)
    assert found.degree() == int(degree)
    return found.eval(int(at)), {}


def _recurrence(starts: str, rule: str, order: str, asked: str) -> tuple[Fraction, dict]:
    terms = {int(n): Fraction(v) for n, v in re.findall(r"a\((\d)\) = (-?\d+)", starts)}
    assert len(terms) == int(order)
    for n in range(int(order) + 1, int(asked) + 1):
        terms[n] = value(rule, {"n": Fraction(n), "a": terms.__getitem__})
    return terms[int(asked)], {"a": terms.__getitem__}


_SOLVERS: dict[str, Callable[..., tuple[object, dict]]] = {
    r"Compute ([-+*/() \d]+?)(?: and write it as an integer or a fraction in lowest terms)?\.": lambda e: (
        value(e),
        {},
    ),
    r"Compute the determinant of the matrix (\[.*\])\.": _determinant,
    r"Solve the equation (.*) for x\.": _equation,
    r"Solve the system of equations\n(.*)\nWhat is (.*)\?": _system,
    r"What is the remainder when (\d+) is divided by (\d+)\?": lambda n, m: (int(n) % int(m), {}),
    r"What is the greatest common divisor of (\d+) and (\d+)\?": lambda a, b: (math.gcd(int(a), int(b)), {}),
    r"What is the least common multiple of (\d+) and (\d+)\?": lambda a, b: (math.lcm(int(a), int(b)), {}),
    r"What is the remainder when (\d+)\^(\d+) is divided by (\d+)\?": _power,
    r"Find the smallest integer x ≥ 0 such that (\d+) \* x leaves the remainder (\d+) when .* by (\d+)\.": _congruence,
    r"(.* than .*) Who is the (?:(\w+) )?(\w+est) of (.*)\?": _ordering,
    r"Knights always .*? a knave\. (.*) (How many of them are knights|Is \w+ a knight or a knave)\?": _knights,
    r"(P is .*)\. Is the statement (.*) true or false\?": _formula,
    r"(\w+) has (\d+) (\w+)\. (.*) How many \w+ does \w+ have now\?": _events,
    r"\w+ buys (.*?)\.(?: There is .* of (\d+) percent on .*\.)? \w+ pays with (\d+) euros\. How many.*": (_shopping),
    r"\w+ \w+s (\d hours? at .*)\. What is the average speed of the whole journey in km/h\? Give .*": _journey,
    r"\d pumps can fill a \w+: (.*)\. How many hours do they need together\? Give .*": _pumps,
    r"A polynomial of degree (\d) has the values (.*) at (.*)\. What is its value at (\d+)\?": _polynomial,
    r"A sequence begins with (.*), and a\(n\) = (.*) for n > (\d)\. What is a\((\d+)\)\?": _recurrence,
}
